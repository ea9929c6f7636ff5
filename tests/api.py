"""Print the public API, one line per name: ``python -m tests.api > tests/api.txt`` records a change.

`tests/unit/test_api.py` compares. A line that differs belongs into the CHANGELOG.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import dist_adamw


def signature(value: Any) -> str:
    """Return the arguments and the result, as they are written."""
    return str(inspect.signature(value)).replace("'", "")


def lines_of_class(name: str, cls: type) -> Iterator[str]:
    """Yield the constructor and the public members that the class itself or a base of this package defines."""
    try:
        yield f"{name}{signature(cls)}"
    except ValueError:  # a type without a constructor in Python
        yield name
    if issubclass(cls, BaseException):
        return
    bases = [base for base in cls.__mro__ if base.__module__.startswith("dist_adamw")]
    members: dict[str, Any] = {}
    for base in reversed(bases):
        members.update(vars(base))
    for member, value in sorted(members.items()):
        if member.startswith("_"):
            continue
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if inspect.isfunction(value):
            yield f"{name}.{member}{signature(value)}"
        else:
            yield f"{name}.{member}"


def describe_api() -> list[str]:
    """Return the lines."""
    lines: list[str] = []
    for name in sorted(dist_adamw.__all__):
        value = getattr(dist_adamw, name)
        if inspect.isclass(value):
            lines += lines_of_class(name, value)
        elif callable(value):
            lines.append(f"{name}{signature(value)}")
        else:
            lines.append(name)
    return lines


if __name__ == "__main__":
    print("\n".join(describe_api()))
