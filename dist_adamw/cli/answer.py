"""Answer: the result of a verb, as text and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_adamw.json_text import json_text

DONE, NO, CANNOT = 0, 1, 2  # exit statuses


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a verb.

    Attributes:
        text: Printed to stdout. A function is called only if it is printed.
        data: Printed to stdout instead, with ``--json``; its keys are stable.
        status: `DONE`, or `NO` if the answer is no.
        notes: Lines for stderr.
    """

    text: str | Callable[[], str]
    data: Mapping[str, Any]
    status: int = DONE
    notes: tuple[str, ...] = ()

    def as_text(self) -> str:
        """Return the text."""
        return self.text if isinstance(self.text, str) else self.text()

    def as_json(self) -> str:
        """Return the data as one JSON document."""
        return json_text(self.data)


def fields_of(value: Any) -> dict[str, Any]:
    """Return the public fields of a dataclass."""
    return {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if not one.name.startswith("_")}
