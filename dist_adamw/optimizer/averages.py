"""Averages of the weights: which ones an optimizer keeps, and how often each has had the weights added."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.bucket_views import MASTERS, MOMENTS
from dist_adamw.schedule.batch import check_positive_int, shown
from dist_adamw.schedule.lengths import Length, check_length, in_samples
from dist_adamw.schedule.restarts import RestartSchedule

# What a parameter group keeps for checkpoints: the contributions to each average.
AVERAGED = "averaged"
_TAKEN = {"step", "model", "rng", *MOMENTS, *MASTERS}  # other kinds of state, and of tensors in a checkpoint
_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class EMA:
    """An exponential moving average of the weights, updated with every applied update.

    The first update copies the weights w; each further one computes a + (1 - decay) (w - a), with the bits of
    ``torch.optim.swa_utils.get_ema_multi_avg_fn(decay)``.

    Args:
        decay: The factor per update, above 0 and below 1.
        timescale: Instead of ``decay``, the time tau over which it averages, in samples or with a unit ("0.5 epochs").
            The factor is exp(-b / tau) for a global batch of b samples, so that another batch averages over the same
            samples. It needs a `CyclicLRWithRestarts`, which knows the batch and the epoch. At least one update.
        dtype: Of the average: ``torch.float32`` or ``torch.bfloat16``. None: fp32, or fp64 for fp64 weights.

    Raises:
        ValueError: an argument is out of range.

    Source of ``timescale``: Busbridge et al., arXiv:2307.13813.
    """

    decay: float | None = None
    timescale: Length | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.timescale is None):
            raise ValueError(f"EMA needs decay or timescale, and not both, got {self}.")
        if self.decay is not None and not (type(self.decay) in (int, float) and 0.0 < self.decay < 1.0):
            raise ValueError(f"EMA's decay must be above 0 and below 1, got {shown(self.decay)}.")
        if self.timescale is not None:
            check_length("EMA's timescale", _not_zero("EMA's timescale", self.timescale))
        object.__setattr__(self, "dtype", _dtype(self.dtype))
        if self.dtype == torch.bfloat16 and self.decay is not None and 1 - self.decay < 2**-6:
            warnings.warn(
                f"an EMA with decay={self.decay} in bfloat16 stands still: {1 - self.decay:.2g} of a difference is "
                "less than bf16's last bit, unless the weights have moved a long way. Keep it in float32.",
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


@dataclass(frozen=True, kw_only=True, slots=True)
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
        check_length("Mean's start", self.start)
        if self.last is not None:
            object.__setattr__(self, "last", check_positive_int("Mean's last", self.last))
        object.__setattr__(self, "dtype", _dtype(self.dtype))

    def is_due(self, schedule: RestartSchedule, before: int, after: int) -> bool:
        """Return whether an update from sample ``before`` to ``after`` has reached a moment. Local."""
        sizes = schedule.sizes
        start = 0 if self.start == 0 else in_samples("Mean's start", self.start, "samples", sizes)
        if self.every is None or after < start:
            return False
        if self.every == self.AT_CYCLE_ENDS:
            last = schedule.last_sample
            has_ended = last is not None and before < last <= after
            return has_ended or schedule.at(before).cycle.index != schedule.at(after).cycle.index
        every = in_samples("Mean's every", self.every, "samples", sizes)
        return (before - start) // every != (after - start) // every

    def slots(self, name: str) -> list[str]:
        """Return the names of its tensors in ``state``. Local."""
        return [name] if self.last is None else [f"{name}_{i}" for i in range(self.last)]

    def slot(self, name: str, count: int) -> str:
        """Return the name of the tensor that contribution number ``count``, from 0, is written to. Local."""
        return name if self.last is None else f"{name}_{count % self.last}"

    def oldest_first(self, name: str, count: int) -> list[str]:
        """Return the names of the tensors to average after ``count`` contributions. Local."""
        if self.last is None:
            return [name]
        return [self.slot(name, i) for i in range(max(0, count - self.last), count)]


Average = EMA | Mean


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
        known = [field.name for field in fields(kind)]
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"the average {name!r} has no option {unknown[0]!r}. Options are {', '.join(known)}.")
        return kind(**given)
    raise ValueError(f"the average {name!r} must be an EMA or a Mean of dist_adamw, got {shown(given)}.")


def dtypes_of(averages: Mapping[str, Average]) -> dict[str, torch.dtype | None]:
    """Return the dtype of each tensor that the averages keep in ``state``, by its name there. Local."""
    return {slot: average.dtype for name, average in averages.items() for slot in average.slots(name)}


def unless_skipped(moves: Mapping[str, float], found_inf: Tensor | None) -> Mapping[str, float | Tensor]:
    """Return how far each average moves: nowhere if ``found_inf`` is 1, which the host reads only on a CPU. Local."""
    if found_inf is None or not moves:
        return moves
    if found_inf.device.type == "cpu":
        return {} if found_inf.item() else moves
    # Where weights stay, copying them changes nothing: the next update begins the average once more.
    return {name: by if by == 1 else by * (1 - found_inf) for name, by in moves.items()}


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

        Args:
            updates: The number of applied updates.
        """
        if self._is_loaded:
            return
        self._is_loaded = True
        saved: Mapping[str, Any] = next(
            (group[AVERAGED] for group in groups if isinstance(group.get(AVERAGED), Mapping)), {}
        )
        for name, average in averages.items():
            if count := int(saved.get(name, 0)):
                if isinstance(average, EMA):
                    self._first[name] = updates - count + 1
                else:
                    self._means[name] = count

    def begins(self, name: str, number: int) -> bool:
        """Return whether update ``number`` is the first of an EMA; a skipped one is tried again. Local."""
        return self._first.setdefault(name, number) == number

    def add(self, name: str) -> None:
        """Count a contribution to a `Mean`. Local."""
        self._means[name] = self._means.get(name, 0) + 1

    def of(self, name: str, updates: int) -> int:
        """Return the number of contributions after ``updates`` applied updates. Local."""
        if name in self._first:
            return max(0, updates - self._first[name] + 1)
        return self._means.get(name, 0)
