"""Lengths of training with units: "2.5 epochs", "10_000 samples", "500 updates", "1e9 tokens", "10%".

A number without a unit keeps the unit of its argument. Everything is computed in exact fractions of a sample.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dist_adamw.schedule.batch import shown

Length = int | float | str | Fraction

_UNITS = ("samples", "updates", "epochs", "tokens", "cycles", "%")
# Two decimal numbers with a stroke between them at most, and a unit: "1/3 epochs", "1e9 tokens".
_DECIMAL = r"[+-]?[0-9_]*\.?[0-9_]*(?:[eE][+-]?[0-9]+)?"
_LENGTH = re.compile(rf"\s*(?=[^A-Za-z%]*[0-9])({_DECIMAL}(?:/{_DECIMAL})?)\s*([A-Za-z]+|%)?\s*")


_ZERO = re.compile(r"\s*0+\.?0*\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What converts units to samples.

    Attributes:
        epoch_size: Samples in an epoch.
        batch_size: Samples in an update: the global batch that the run began with.
        tokens_per_sample: None: tokens are not understood.
    """

    epoch_size: int
    batch_size: int
    tokens_per_sample: int | None = None


def exact(name: str, value: Length) -> Fraction:
    """Return the fraction that ``value`` prints as, so that 0.1 means 1/10.

    Raises:
        ValueError: not a finite number above 0.
    """
    try:
        text = str(value).replace("_", "")
        # As a Fraction, "1e9999999" would exhaust memory.
        fraction = Fraction(0 if len(text) > 1000 or re.search(r"[eE][+-]?\d{4}", text) else text)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if fraction <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {shown(value)}.")
    return fraction


def parse(name: str, value: Length, default_unit: str) -> tuple[Fraction, str]:
    """Return the amount and the unit of a length.

    Args:
        name: Of the argument, for errors.
        value: A number, or a text such as "2.5 epochs". Units may be singular; "10%" is a share of a cycle.
        default_unit: Of a number without one.

    Raises:
        ValueError: not a finite number above 0, or an unknown unit.
    """
    unit = None
    if isinstance(value, str) and len(value) <= 1000 and (found := _LENGTH.fullmatch(value)):
        text, unit = found.groups()
        amount = exact(name, text)
    else:
        amount = exact(name, value)
    if unit is None:
        return amount, default_unit
    return amount, _known_unit(unit, name, value)


def check_length(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a length or a list of lengths, in any unit."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if one != 0 or isinstance(one, str):  # 0 is a length where `in_samples` is not asked
            parse(name, one, "samples")


def is_zero(name: str, value: Any) -> bool:
    """Return whether ``value`` is 0, or a text such as "0 epochs".

    Raises:
        ValueError: the unit of such a text is unknown.
    """
    if not isinstance(value, str):
        return bool(value == 0)
    zero = _ZERO.fullmatch(value)
    if zero is not None and zero[1]:
        _known_unit(zero[1], name, value)
    return zero is not None


def _known_unit(unit: str, name: str, value: Any) -> str:
    for known in _UNITS:
        if unit.lower() in (known, known.removesuffix("s")):
            return known
    raise ValueError(f"{name}={shown(value)} has an unknown unit. Units are {', '.join(_UNITS[:-1])} and %.")


def in_samples(name: str, value: Length, default_unit: str, sizes: Sizes, cycle: Fraction | None = None) -> Fraction:
    """Return a length in samples.

    Args:
        name: Of the argument, for errors.
        value: See `parse`.
        default_unit: See `parse`.
        sizes: What units are worth.
        cycle: Samples in the cycle that "cycles" and "%" refer to; None: these units are not understood.

    Raises:
        ValueError: as `parse`, or the unit cannot be converted here.
    """
    amount, unit = parse(name, value, default_unit)
    if unit == "samples":
        if amount < 1 and default_unit == "samples":
            raise ValueError(
                f"{name}={shown(value)} is less than one sample. Write a unit, such as '{float(amount):g} epochs', or "
                f"'{float(100 * amount):g}%' for a share of a cycle."
            )
        return amount
    if unit == "updates":
        return amount * sizes.batch_size
    if unit == "epochs":
        return amount * sizes.epoch_size
    if unit == "tokens":
        if sizes.tokens_per_sample is None:
            raise ValueError(f"{name}={shown(value)} is in tokens: pass tokens_per_sample to CyclicLRWithRestarts.")
        return amount / sizes.tokens_per_sample
    if cycle is None:
        raise ValueError(f"{name}={shown(value)} cannot be a share of a cycle. Use samples, updates, epochs or tokens.")
    return amount * cycle / (100 if unit == "%" else 1)
