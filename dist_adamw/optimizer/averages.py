"""Averages of the weights: which ones an optimizer keeps, and how often each has had the weights added."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch

from dist_adamw.optimizer.sharding.bucket_views import MASTERS, MOMENTS
from dist_adamw.schedule.batch import check_positive_int, shown
from dist_adamw.schedule.lengths import Length, check_length, in_samples, is_zero
from dist_adamw.schedule.restarts import RestartSchedule

# What parameter groups keep for checkpoints: which averages there are, and the contributions to each.
AVERAGED = "averaged"
_TAKEN = {"step", "model", "rng", *MOMENTS, *MASTERS}  # other kinds of state, and of tensors in a checkpoint
_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class EMA:
    """An exponential moving average of the weights, moved by applied updates.

    The first update copies the weights w; each further one computes a + (1 - decay) (w - a), with the bits of
    ``torch.optim.swa_utils.get_ema_multi_avg_fn(decay)``. With ``every``, updates 1, 1 + every, 1 + 2 every, ... do so,
    with ``decay ** every``.

    Args:
        decay: The factor per update, above 0 and below 1.
        timescale: Instead of ``decay``, the time tau over which it averages, in samples or with a unit ("0.5 epochs").
            The factor is exp(-b / tau) for a global batch of b samples, so that another batch averages over the same
            samples. It needs a `CyclicLRWithRestarts`, which knows the batch and the epoch. At least one update;
            arXiv:2307.13813.
        every: The updates from one move to the next; each move reads and writes the whole average.
        dtype: Of the average: ``torch.float32`` or ``torch.bfloat16``. None: fp32, or fp64 for fp64 weights.

    Raises:
        ValueError: an argument is out of range.

    Source of ``timescale``: Busbridge et al., arXiv:2307.13813.
    """

    decay: float | None = None
    timescale: Length | None = None
    every: int = 1
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", check_positive_int("EMA's every", self.every))
        if (self.decay is None) == (self.timescale is None):
            raise ValueError(f"EMA needs decay or timescale, and not both, got {self}.")
        if self.decay is not None and not (type(self.decay) in (int, float) and 0.0 < self.decay < 1.0):
            raise ValueError(f"EMA's decay must be above 0 and below 1, got {shown(self.decay)}.")
        if self.timescale is not None:
            check_length("EMA's timescale", _not_zero("EMA's timescale", self.timescale))
        object.__setattr__(self, "dtype", _dtype(self.dtype))
        if self.dtype == torch.bfloat16 and self.decay is not None and (part := 1 - self.decay**self.every) < 2**-6:
            warnings.warn(
                f"{self} stands still: a move by {part:.2g} of a difference is less than bf16's last bit, unless the "
                "weights have moved a long way. Keep it in float32, or move it less often with every=.",
                stacklevel=3,
            )

    def decay_at(self, schedule: RestartSchedule, batch_size: int, largest: int) -> float:
        """Return the factor of an update of ``batch_size`` samples, of ``largest`` at most. Local.

        Raises:
            ValueError: the time scale is shorter than an update.
        """
        if self.decay is not None:
            return self.decay
        assert self.timescale is not None
        tau = in_samples("EMA's timescale", self.timescale, "samples", schedule.sizes)
        if tau < largest:
            raise ValueError(
                f"EMA's timescale={shown(self.timescale)} is {float(tau):g} samples, less than an update of "
                f"{largest}: the average would be the weights. Pass a longer one."
            )
        return math.exp(-batch_size / tau)

    def slots(self, name: str) -> list[str]:
        """Return the names of its tensors in ``state``. Local."""
        return [name]

    def __repr__(self) -> str:
        return _as_text(self)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Mean:
    """An equally weighted mean of the weights at chosen moments: of cycle ends, SWA, LAWA.

    `CyclicLRWithRestarts` adds the weights when its clock reaches such a moment; `DistAdamW.add_to_average` does at any
    other. The arithmetic is that of ``torch.optim.swa_utils.get_swa_multi_avg_fn()``.

    Args:
        every: "cycle": at the end of each cycle. Otherwise the length between two moments, in samples or with a unit
            ("1 epoch"); the weights after the update that reaches a moment count. None: only with
            `DistAdamW.add_to_average`.
        start: The first moment, in samples or with a unit; 0: ``every`` after training begins. With "cycle", cycles
            that end earlier are left out.
        last: The number of most recent moments to average, for which that many copies of the weights are kept (each
            rank has its share); None: all.
        dtype: See `EMA`.

    Raises:
        ValueError: an argument is out of range.

    Source: SWA, Izmailov et al., arXiv:1803.05407; LAWA (``last``), Kaddour, arXiv:2209.14981.
    """

    every: Length | None = "cycle"
    start: Length = 0
    last: int | None = None
    dtype: torch.dtype | None = None
    AT_CYCLE_ENDS: ClassVar[str] = "cycle"

    def __post_init__(self) -> None:
        if self.every not in (None, self.AT_CYCLE_ENDS):
            check_length("Mean's every", _not_zero("Mean's every", self.every))
        if not is_zero("Mean's start", self.start):
            check_length("Mean's start", self.start)
        if self.last is not None:
            object.__setattr__(self, "last", check_positive_int("Mean's last", self.last))
        object.__setattr__(self, "dtype", _dtype(self.dtype))

    def moments(self, schedule: RestartSchedule) -> tuple[Fraction, Fraction | None]:
        """Return ``start`` and ``every`` in samples; None: not at equal distances. Local.

        Raises:
            ValueError: a length is a share of a cycle, or in tokens without ``tokens_per_sample``.
        """
        sizes = schedule.sizes
        start = (
            Fraction(0)
            if is_zero("Mean's start", self.start)
            else in_samples("Mean's start", self.start, "samples", sizes)
        )
        if self.every is None or self.every == self.AT_CYCLE_ENDS:
            return start, None
        return start, in_samples("Mean's every", self.every, "samples", sizes)

    def is_due(self, schedule: RestartSchedule, before: int, after: int) -> bool:
        """Return whether an update from sample ``before`` to ``after`` has reached a moment. Local."""
        start, every = self.moments(schedule)
        if self.every is None or after < start:
            return False
        if self.every == self.AT_CYCLE_ENDS:
            last = schedule.last_sample
            has_ended = last is not None and before < last <= after
            return has_ended or schedule.at(before).cycle.index != schedule.at(after).cycle.index
        assert every is not None
        return (before - start) // every != (after - start) // every

    def slots(self, name: str) -> list[str]:
        """Return the names of its tensors in ``state``. Local."""
        return [name] if self.last is None else [f"{name}_{i}" for i in range(self.last)]

    def slot(self, name: str, count: int) -> str:
        """Return the name of the tensor that contribution number ``count``, from 0, is written to. Local."""
        return name if self.last is None else f"{name}_{count % self.last}"

    def __repr__(self) -> str:
        return _as_text(self)


Average = EMA | Mean


def _as_text(average: Average) -> str:
    """Return an average with the options that are not the defaults. Local."""
    options = ((field.name, getattr(average, field.name), field.default) for field in fields(average))
    told = ", ".join(f"{name}={value!r}" for name, value, default in options if value != default)
    return f"{type(average).__name__}({told})"


def _not_zero(name: str, value: Any) -> Any:
    if value == 0 and not isinstance(value, str):
        raise ValueError(f"{name} must be a finite number above 0, got {shown(value)}.")
    return value


def _dtype(dtype: Any) -> torch.dtype | None:
    found = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in (None, *_DTYPES.values()):
        raise ValueError(f"the dtype of an average must be torch.float32, torch.bfloat16 or None, got {dtype!r}.")
    return found


def check_averages(averages: Mapping[str, Any] | None) -> dict[str, Average]:
    """Return the averages by name. Local.

    Args:
        averages: `EMA` and `Mean`, or, from JSON and YAML, their arguments: those with "decay" or "timescale" are EMAs.

    Raises:
        ValueError: names what is wrong.
    """
    if not isinstance(averages, Mapping | None):
        raise ValueError(f"averages must be a dict such as {{'ema': EMA(decay=0.999)}}, got {shown(averages)}.")
    found = {name: _average(name, given) for name, given in (averages or {}).items()}
    names: dict[str, str] = {}
    for name, average in found.items():
        if not (isinstance(name, str) and name.isidentifier()) or name in _TAKEN:
            raise ValueError(
                f"the name of an average must be a word, and not one of {', '.join(sorted(_TAKEN))}, got {name!r}."
            )
        for slot in average.slots(name):
            if (other := names.setdefault(slot, name)) != name:
                raise ValueError(f"the averages {other!r} and {name!r} both have {slot!r} in state. Rename one.")
    return found


def _average(name: Any, given: Any) -> Average:
    if isinstance(given, EMA | Mean):
        return given
    if isinstance(given, Mapping):
        kind = EMA if {"decay", "timescale"} & given.keys() else Mean
        options = {of: [field.name for field in fields(of)] for of in (EMA, Mean)}
        if unknown := [key for key in given if key not in options[kind]]:
            known = "; ".join(f"{', '.join(names)} of an {of.__name__}" for of, names in options.items())
            raise ValueError(f"the average {name!r} has no option {unknown[0]!r}. Options are {known}.")
        return kind(**given)
    raise ValueError(f"the average {name!r} must be an EMA or a Mean of dist_adamw, got {shown(given)}.")


def dtypes_of(averages: Mapping[str, Average]) -> dict[str, torch.dtype | None]:
    """Return the dtype of each tensor that the averages keep in ``state``, by its name there. Local."""
    return {slot: average.dtype for name, average in averages.items() for slot in average.slots(name)}


@dataclass(frozen=True, slots=True)
class SavedAverage:
    """What a checkpoint says of an average.

    Attributes:
        count: How often the weights were added; for an EMA, the updates since its first.
        options: The average as text, without its dtype, such as "EMA(decay=0.9)".
        tensors: The names of its tensors in ``state``.
    """

    count: int
    options: str
    tensors: tuple[str, ...]

    def oldest_first(self) -> list[str]:
        """Return the names of the tensors whose mean it is. Local."""
        kept = len(self.tensors)
        return (
            [self.tensors[i % kept] for i in range(max(0, self.count - kept), self.count)]
            if kept > 1
            else [*self.tensors]
        )


def described(name: str, average: Average, count: int) -> SavedAverage:
    """Return what a checkpoint is to say of an average with ``count`` contributions. Local."""
    # Another dtype computes the same, less exactly or more.
    return SavedAverage(count, repr(replace(average, dtype=None)), tuple(average.slots(name)))


def as_text(saved: Mapping[str, SavedAverage]) -> str:
    """Return the value of `AVERAGED` in a parameter group: text, which every kind of checkpoint keeps. Local."""
    return json.dumps({name: asdict(average) for name, average in saved.items()})


def from_groups(groups: Iterable[Mapping[str, Any]]) -> dict[str, SavedAverage]:
    """Return the averages by name that parameter groups speak of. Local.

    Raises:
        ValueError: they say something else.
    """
    text = next((group[AVERAGED] for group in groups if AVERAGED in group), "{}")
    try:
        found = {
            name: SavedAverage(given["count"], given["options"], tuple(given["tensors"]))
            for name, given in json.loads(text).items()
        }
        is_right = all(_is_right(name, average) for name, average in found.items())
    except (TypeError, ValueError, KeyError, AttributeError):
        is_right = False
    if not is_right:
        raise ValueError(f"{AVERAGED} of a parameter group is {shown(text)}, which does not describe averages.")
    return found


def _is_right(name: str, average: SavedAverage) -> bool:
    is_count = type(average.count) is int and 0 <= average.count < 1 << 53
    are_names = bool(average.tensors) and all(
        isinstance(tensor, str) and re.fullmatch(rf"{re.escape(name)}(_\d+)?", tensor) for tensor in average.tensors
    )
    return name.isidentifier() and name not in _TAKEN and is_count and isinstance(average.options, str) and are_names


class Contributions:
    """How often each average has had the weights added.

    An EMA counts the updates since its first, so the host need not know at once whether a device has skipped one.
    """

    def __init__(self) -> None:
        self._first: dict[str, int] = {}  # by EMA, the number of the update that began it
        self._means: dict[str, int] = {}
        self._is_loaded = False

    def load(self, groups: Sequence[Mapping[str, Any]], averages: Mapping[str, Average], updates: int) -> None:
        """Take the counts that a load has put into the parameter groups, unless that was done. Local.

        An average that was saved as another kind, or with another number of tensors, begins again.

        Args:
            updates: The number of applied updates.
        """
        if self._is_loaded:
            return
        self._is_loaded = True
        saved = from_groups(groups)
        for name, average in averages.items():
            here = described(name, average, 0)
            there = saved.get(name, here)
            if there.count and (_kind(there), there.tensors) == (_kind(here), here.tensors):
                if isinstance(average, EMA):
                    self._first[name] = updates - there.count + 1
                else:
                    self._means[name] = there.count

    def since_first(self, name: str, number: int) -> int:
        """Return how many updates before ``number`` an EMA has had; a skipped one is tried again. Local."""
        return number - self._first.setdefault(name, number)

    def add(self, name: str) -> None:
        """Count a contribution to a `Mean`. Local."""
        self._means[name] = self._means.get(name, 0) + 1

    def of(self, name: str, updates: int) -> int:
        """Return the number of contributions after ``updates`` applied updates. Local."""
        if name in self._first:
            return max(0, updates - self._first[name] + 1)
        return self._means.get(name, 0)


def _kind(average: SavedAverage) -> str:
    return average.options.partition("(")[0]
