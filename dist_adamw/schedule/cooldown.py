"""A cool-down branch: from some sample on, the lr falls to its minimum and stays there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_adamw.schedule.batch import check_positive_int, check_whole
from dist_adamw.schedule.policies import Policy, make_shape


@dataclass(frozen=True, slots=True)
class Cooldown:
    """A fall of the lr from its value at ``at`` to its minimum.

    Args:
        at: The clock at which it begins, in samples.
        length: Samples.
        shape: "linear", "one_minus_sqrt" or "cosine".

    Raises:
        ValueError: an argument is out of its range.
    """

    at: int
    length: int
    shape: str = "one_minus_sqrt"
    _curve: Policy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", check_whole("at", self.at))
        object.__setattr__(self, "length", check_positive_int("length", self.length))
        object.__setattr__(self, "_curve", make_shape("shape", self.shape))

    def __str__(self) -> str:
        return f"cool-down of {self.length:,} samples from sample {self.at:,} ({self.shape})"

    @property
    def end(self) -> int:
        """The clock at which the lr has reached its minimum, in samples."""
        return self.at + self.length

    def factor(self, samples: int) -> float:
        """Return what multiplies the lr's distance from its minimum, at a clock from ``at`` on."""
        if samples >= self.end:
            return self._curve(1.0)
        return self._curve((samples - self.at) / self.length)

    def plain(self) -> dict[str, Any]:
        """Return the arguments as plain data."""
        return {"at": self.at, "length": self.length, "shape": self.shape}

    @classmethod
    def from_plain(cls, saved: object) -> Cooldown:
        """Return the cool-down of a saved schedule.

        Raises:
            ValueError: ``saved`` is not the result of `plain`.
        """
        if not isinstance(saved, Mapping) or saved.keys() != {"at", "length", "shape"}:
            raise ValueError(f"cooldown of a saved schedule must have at, length and shape, got {saved!r}.")
        return cls(**saved)
