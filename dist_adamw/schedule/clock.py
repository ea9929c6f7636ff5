"""Count the samples of all applied updates."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class SampleSource(Protocol):
    """A counter of each update's real samples, used in place of the plain-loop rule (one global batch per update).

    A function that returns a number, or None for the plain-loop rule, works too.
    """

    def before_update(self, *, has_closure: bool) -> None:
        """Handle the start of ``optimizer.step``. Ranks may start to exchange their counts."""

    def returned_unapplied(self) -> None:
        """Handle a skipped update."""

    def __call__(self) -> Callable[[], int | None]:
        """Handle an applied update; return a function that `CyclicLRWithRestarts.step` calls for its samples."""


# Samples of an update: a number, a function that returns it later, or None for the plain-loop rule.
_Count = int | None | Callable[[], int | None]


class SampleClock:
    """Count the samples of applied updates; `advance` adds them to `samples`. Local.

    If the device decides whether to skip an update, the update counts as applied until the next one begins: asking at
    once would make the host wait. `retract_skipped` asks later.

    Attributes:
        samples: Real global samples of the updates so far.
        source: Counts an update's samples; None: the plain-loop rule.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.source: SampleSource | Callable[[], int | None] | None = None
        self._applied: list[_Count] = []  # updates since the last advance, as the source counted them
        self._stepped: set[int] = set()  # first parameters of the groups that the last of them has stepped
        self._is_in_update = False  # whether `begin_update` was called without an `end_update` yet
        self._began_without_state = False
        self._is_unconfirmed = False  # whether the last update may yet turn out to have been skipped
        self._counted_last = 0  # samples of the last update added

    def __getstate__(self) -> dict[str, Any]:
        # The source belongs to this process; a job that loads the copy calls prepare itself.
        self.settle()
        return {**self.__dict__, "source": None, "_applied": [*self._applied], "_stepped": {*self._stepped}}

    @property
    def has_applied(self) -> bool:
        """Whether updates were applied since the last advance."""
        return bool(self._applied)

    def begin_update(self, optimizer: Optimizer, arguments: Sequence[Any]) -> None:
        """Handle the start of ``optimizer.step(*arguments)``, after `retract_skipped`."""
        is_nested, self._is_in_update = self._is_in_update, True  # nested: a step() that a subclass's step() calls
        self._began_without_state = not optimizer.state
        begin = getattr(self.source, "before_update", None)
        continues = bool(self._applied) and self._continues(_first_params(optimizer))
        if begin is not None and not is_nested and not continues:
            begin(has_closure=any(map(callable, arguments)))

    def end_update(self, optimizer: Optimizer, *, has_lr: bool) -> None:
        """Handle the return of ``optimizer.step``.

        Args:
            has_lr: Whether the schedule's lr of some group is not 0.
        """
        # A step() that calls its parent class's step() runs torch's hooks twice for one update.
        if not self._is_in_update:
            return
        self._is_in_update = False
        # get_optimizer_state_dict steps an optimizer without state once, with lr 0: not an update.
        if has_lr and self._began_without_state and _has_no_lr(optimizer):
            return
        is_known = skip_is_known(optimizer)
        if not is_known or was_applied(optimizer):
            stepped = _first_params(optimizer)
            if self._continues(stepped):
                self._stepped |= stepped
            else:
                self._stepped = stepped
                self._applied.append(None if self.source is None else self.source())
        elif (unapplied := getattr(self.source, "returned_unapplied", None)) is not None:
            unapplied()
        self._is_unconfirmed = not is_known

    def _continues(self, stepped: set[int]) -> bool:
        """Return whether a call that steps these groups continues the previous call's update.

        For one update, ZeRO calls its optimizer once per group or part of a group, and shows it only those parameters.
        """
        return bool(self._applied) and stepped.isdisjoint(self._stepped)

    def retract_skipped(self, optimizer: Optimizer) -> bool:
        """Retract the last update if the device skipped it; return whether `samples` changed."""
        is_unconfirmed, self._is_unconfirmed = self._is_unconfirmed, False
        if not is_unconfirmed or was_applied(optimizer):
            return False
        if self._applied:  # not advanced since
            self._applied.pop()
            return False
        self.samples -= self._counted_last
        return True

    def settle(self) -> None:
        """Resolve pending counts to numbers, which may wait for other ranks."""
        self._applied = [counted() if callable(counted) else counted for counted in self._applied]

    def take_applied(self, *, settle: bool) -> list[_Count]:
        """Return the updates since the last advance, and start a new list; `settle` first if asked."""
        if settle and any(map(callable, self._applied)):
            self.settle()
        applied, self._applied = self._applied, []
        return applied

    def advance(self, applied: Sequence[_Count], samples: int | None, rule: Callable[[int], int]) -> None:
        """Add the samples of ``applied``.

        Args:
            applied: From `take_applied`.
            samples: Samples of all of them together; None: as counted.
            rule: Returns the samples of an update without a count, given `samples` before it.
        """
        if samples is not None:
            self.samples += samples
            self._counted_last = samples // len(applied)  # only their sum is known
            return
        for counted in applied:
            self._counted_last = counted if isinstance(counted, int) else rule(self.samples)
            self.samples += self._counted_last

    def set(self, samples: int) -> None:
        """Set the clock, and drop updates that were not added yet."""
        self.samples, self._applied = samples, []
        self._is_unconfirmed, self._counted_last = False, 0


def crosses_epoch(before: int, samples: int, epoch_size: int) -> bool:
    """Return whether an update ends inside a later epoch than it began in."""
    after = before + samples
    return after % epoch_size != 0 and after // epoch_size != before // epoch_size


def crossing_warning(before: int, samples: int, epoch_size: int) -> str:
    """Return the warning for an update for which `crosses_epoch` holds."""
    beyond = (before + samples) % epoch_size
    return (
        f"an update of {samples} samples ends {beyond} samples beyond an epoch of {epoch_size}, "
        "so restarts and the loop's epochs drift apart. epoch_size is the samples that one epoch really trains on "
        "(with drop_last=True whole batches only); for data without epochs pass stream=True."
    )


def lag_warning(updates: int) -> str | None:
    """Return a warning if many updates came before one ``scheduler.step()``."""
    if updates < 3:  # one more may be meant, as in a script that retries
        return None
    return (
        f"scheduler.step() was called once for {updates} updates, which all had the same lr. Call it after every "
        'optimizer.step(); in Lightning, return {"scheduler": scheduler, "interval": "step"} as the lr_scheduler.'
    )


def _has_no_lr(optimizer: Optimizer) -> bool:
    """Return whether every group's lr is 0."""
    return all(group["lr"] == 0 for group in optimizer.param_groups)


_params_of, _first_of = operator.itemgetter("params"), operator.itemgetter(0)


def _first_params(optimizer: Optimizer) -> set[int]:
    # Filter and map run in C: this is called at every update.
    return {*map(id, map(_first_of, filter(None, map(_params_of, optimizer.param_groups))))}


def was_applied(optimizer: Optimizer) -> bool:
    """Return whether the step that is returning changed the weights. Gradients must still be there."""
    if isinstance(skipped := getattr(optimizer, "step_was_skipped", None), bool):
        if skipped:
            return False
        if isinstance(getattr(optimizer, "updates", None), int):
            return True  # DistAdamW: it may have freed the gradients already
    # A fused torch optimizer skips inside the kernel; GradScaler leaves it the flag during step().
    found_inf = getattr(optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor) and found_inf.item():
        return False
    return any(param.grad is not None for group in optimizer.param_groups for param in group["params"])


def skip_is_known(optimizer: Optimizer) -> bool:
    """Return whether `was_applied` can answer without waiting for the device."""
    return bool(getattr(optimizer, "skip_is_known", True))
