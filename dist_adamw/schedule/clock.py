"""Count the samples of all applied updates.

Knows an optimizer's ``step`` and who counts its samples; nothing of learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class SampleSource(Protocol):
    """A counter of the real samples of updates, in place of the rule for a plain loop.

    A function that returns a number, or None for that rule, serves too.
    """

    def before_update(self, *, has_closure: bool) -> None:
        """``optimizer.step`` begins. Ranks may begin to exchange what they counted."""

    def returned_unapplied(self) -> None:
        """The update was skipped."""

    def __call__(self) -> Callable[[], int | None]:
        """The update was applied. The function returned is called in `CyclicLRWithRestarts.step`."""


# Samples of an update: a number, what will tell it, or None for the rule for a plain loop.
_Count = int | None | Callable[[], int | None]


class SampleClock:
    """Count the samples of applied updates, which `advance` adds to `samples`. Local.

    An update that the device decides about counts as applied until the next one begins, since to ask a device at once
    would make the host wait for it. `retract_skipped` asks.

    Attributes:
        samples: Real global samples of the updates so far.
        source: Counts an update's samples; None: the rule for a plain loop.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.source: SampleSource | Callable[[], int | None] | None = None
        self._applied: list[_Count] = []  # updates since the last advance, as the source counted them
        self._stepped: set[int] = set()  # first parameters of the groups that the last of them was made of
        self._is_in_update = False  # whether an update has begun that has not been looked at
        self._began_without_state = False
        self._is_unconfirmed = False  # whether the last update may yet turn out to have been skipped
        self._counted_last = 0  # samples of the last update that was added

    def __getstate__(self) -> dict[str, Any]:
        # prepare's source belongs to this process; the copy's job calls prepare itself.
        self.settle()
        return {**self.__dict__, "source": None, "_applied": [*self._applied], "_stepped": {*self._stepped}}

    @property
    def has_applied(self) -> bool:
        """Whether updates were applied since the last advance."""
        return bool(self._applied)

    def begin_update(self, optimizer: Optimizer, arguments: Sequence[Any]) -> None:
        """``optimizer.step(*arguments)`` begins; after `retract_skipped`."""
        is_nested, self._is_in_update = self._is_in_update, True
        self._began_without_state = not optimizer.state
        begin = getattr(self.source, "before_update", None)
        if begin is not None and not is_nested and not self._continues(_first_params(optimizer)):
            begin(has_closure=any(map(callable, arguments)))

    def end_update(self, optimizer: Optimizer, *, has_lr: bool) -> None:
        """``optimizer.step`` returns.

        Args:
            has_lr: Whether the schedule's lr of some group is not 0.
        """
        # torch runs the hooks of a class and again of a parent whose step() it calls: one update.
        if not self._is_in_update:
            return
        self._is_in_update = False
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
        """Return whether a call that steps these continues the update before it, and steps nothing a second time.

        ZeRO calls its optimizer once for each group, or part of one, and shows it only those: one update.
        """
        return bool(self._applied) and stepped.isdisjoint(self._stepped)

    def retract_skipped(self, optimizer: Optimizer) -> bool:
        """Take the last update back if it turns out that the device skipped it. Return whether `samples` changed."""
        is_unconfirmed, self._is_unconfirmed = self._is_unconfirmed, False
        if not is_unconfirmed or was_applied(optimizer):
            return False
        if self._applied:  # not advanced since
            self._applied.pop()
            return False
        self.samples -= self._counted_last
        return True

    def settle(self) -> None:
        """Have the numbers of what was counted; other ranks may have to send theirs."""
        self._applied = [counted() if callable(counted) else counted for counted in self._applied]

    def take_applied(self) -> list[_Count]:
        """Return the updates since the last advance, which begins."""
        applied, self._applied = self._applied, []
        return applied

    def advance(self, applied: Sequence[_Count], samples: int | None, rule: Callable[[int], int]) -> None:
        """Add the samples of ``applied``.

        Args:
            applied: From `take_applied`.
            samples: Of all of them together; None: as they were counted.
            rule: From `samples` before an update that was not counted to the samples in it.
        """
        if samples is not None:
            self.samples += samples
            self._counted_last = samples // len(applied)
            return
        for counted in applied:
            self._counted_last = counted if isinstance(counted, int) else rule(self.samples)
            self.samples += self._counted_last

    def set(self, samples: int) -> None:
        """Go to ``samples``, forgetting updates that were not counted yet."""
        self.samples, self._applied = samples, []
        self._is_unconfirmed, self._counted_last = False, 0


def crosses_epoch(before: int, samples: int, epoch_size: int) -> bool:
    """Return whether an update ends beyond the epoch that it began in, and not at its end."""
    after = before + samples
    return after % epoch_size != 0 and after // epoch_size != before // epoch_size


def crossing_warning(before: int, samples: int, epoch_size: int) -> str:
    """Return what to say of an update for which `crosses_epoch` holds."""
    beyond = (before + samples) % epoch_size
    return (
        f"an update of {samples} samples ends {beyond} samples beyond an epoch of {epoch_size}, "
        "so restarts and epochs of the loop come apart. epoch_size is the samples that one epoch really trains on "
        "(with drop_last=True whole batches only); for data without epochs pass stream=True."
    )


def _has_no_lr(optimizer: Optimizer) -> bool:
    """Return whether every lr is 0: torch's get_optimizer_state_dict makes an optimizer without state step so."""
    return all(group["lr"] == 0 for group in optimizer.param_groups)


def _first_params(optimizer: Optimizer) -> set[int]:
    return {id(group["params"][0]) for group in optimizer.param_groups if group["params"]}


def was_applied(optimizer: Optimizer) -> bool:
    """Return whether the step that is just returning changed the weights. Gradients are still there."""
    if isinstance(skipped := getattr(optimizer, "step_was_skipped", None), bool):
        if skipped:
            return False
        if isinstance(getattr(optimizer, "updates", None), int):
            return True  # DistAdamW: it may have let go of the gradients by now
    # A fused torch optimizer skips inside the kernel; GradScaler leaves it the flag during step().
    found_inf = getattr(optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor) and found_inf.item():
        return False
    return any(param.grad is not None for group in optimizer.param_groups for param in group["params"])


def skip_is_known(optimizer: Optimizer) -> bool:
    """Return whether `was_applied` answers at once; else it waits for the device."""
    return bool(getattr(optimizer, "skip_is_known", True))
