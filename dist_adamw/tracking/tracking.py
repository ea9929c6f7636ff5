"""Tracking: log the values of every update to Accelerate's trackers, or read them for another log."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.schedule.sample_scheduler import SampleScheduler
from dist_adamw.tracking.csv_file import CsvFile
from dist_adamw.tracking.updates import WatchedUpdates

if TYPE_CHECKING:
    from accelerate import Accelerator

_BEGUN: weakref.WeakSet[Any] = weakref.WeakSet()  # files and writers that this process has begun to log to


class Tracking:
    """Log lr, weight decay, position in the schedule, gradient norm, skipped updates, speed and memory.

    Call `log` after ``scheduler.step()``, for each micro-batch or once per update: it logs once for each applied
    update, through ``accelerator.log``, on the main rank. `values` returns the same values, for any other log::

        tracking = dist_adamw.Tracking(optimizer, scheduler, accelerator)  # after prepare
        ...
            tracking.log({"loss": loss})

    The values are "lr" and "weight_decay" (of the update that was made, see below), "cycle", "tau" (its position in the
    cycle), "samples" and "epoch" (after it), "updates", "grad_norm" (before clipping), "skipped_updates" (since this
    object was made), "samples_per_second" (since the last values), "peak_memory_gb" (1e9 bytes, of the main rank: its
    device's, or on a CPU the process's) and, with a batch-size schedule, "batch_size". An update that begins a cycle
    logs "restart", the number of the cycle.

    What is not known is left out: the gradient norm without ``max_grad_norm``, clipping or DeepSpeed; cycle, tau,
    samples and epoch with another scheduler than `CyclicLRWithRestarts`. If groups have different base lr, each has a
    value, "lr/NAME" with the group's "name" or number; the same for weight decay, where groups without decay do not
    count.

    After a resume the curves continue. What a killed job has logged beyond the point of resumption is hidden in
    TensorBoard, if both log to the same folder: everything at the same or a later step that the folder has when
    this object first logs. `csv_tracker` drops such rows.

    Args:
        optimizer: Any torch optimizer, with or without its wrapper.
        scheduler: `CyclicLRWithRestarts` or another, with or without its wrapper; None: no scheduler.
        accelerator: The accelerator that logs; None: only `values` can be called.
        every: Samples between two logs, on a grid that does not move by a resume; 1: every update. A restart is logged
            in any case. Nothing is read from a GPU in between.
        axis: The step at which values are logged: global "samples", or "updates". Without `CyclicLRWithRestarts` the
            samples are not known, and it is "updates".

    Raises:
        ValueError: an argument is out of its range, or ``every`` is given and the samples are not known.

    Local: no collectives. Make it after ``prepare``, on every rank; `log` may be called on all of them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        accelerator: Accelerator | None = None,
        *,
        every: int = 1,
        axis: Literal["samples", "updates"] = "samples",
    ) -> None:
        clock = _inner(scheduler)
        self._clock = clock if isinstance(clock, SampleScheduler) else None
        _check(optimizer, clock, accelerator, every, axis, has_samples=self._clock is not None)
        self._accelerator = accelerator
        self._every, self._axis = every, axis if self._clock is not None else "updates"
        self._updates = WatchedUpdates(optimizer, self._clock, accelerator)
        self._last: tuple[tuple[int, ...], dict[str, float]] = ((), {})  # what the last values belong to, and they
        self._logged: int | None = None  # the last step
        self._rate: float | None = None
        self._since: tuple[float, int] | None = None  # time and samples of the last values
        self._is_warned = False
        self._names: set[str] = set()  # of further values, in calls after an update

    def log(self, values: Mapping[str, Any] | None = None) -> None:
        """Log the update that was made since the last call, if it was applied and is due. Local.

        Args:
            values: Further values to log with it, such as the loss: numbers, tensors with one element, or what your
                trackers accept. Names that `values` has too replace those.

        Raises:
            ValueError: there is no accelerator, `log` is called between ``optimizer.step()`` and ``scheduler.step()``,
                a name is not text, or a tensor has several elements.
        """
        updates, accelerator = self._updates, self._accelerator
        if accelerator is None:
            raise ValueError("Tracking has no accelerator to log with. Pass it one, or log what `values` returns.")
        if not self._end_update():
            self._warn_of_others(accelerator, values or {})
            return
        self._names.update(values or {})
        self._check_order()
        if not self._is_due():
            return
        further = {} if values is None else dict(values)
        for name, value in further.items():
            if not isinstance(name, str):
                raise ValueError(f"Tracking.log: the name of a value must be text, got {name!r}. Write a str.")
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"Tracking.log: {name!r} is a tensor with {value.numel()} elements. Log a number, such as its mean."
                )
        if not self._has_trackers(accelerator):
            return
        if self._clock is not None:
            # On every rank, since it changes `scheduler.samples`, by which a loop may decide to save.
            self._clock._scheduled.retract_skipped()
        since, updates.unlogged = updates.unlogged, None
        if not accelerator.is_main_process:
            return
        found = self.values()
        step = int(found[self._axis])
        if step == self._logged or (self._clock is not None and found["samples"] == updates.before):
            return  # it was skipped
        self._logged = step
        _begin(accelerator.trackers, step if since is None else min(step, since + 1), step)
        accelerator.log(found | {name: _as_number(value) for name, value in further.items()}, step=step)

    def _warn_of_others(self, accelerator: Accelerator, values: Mapping[str, Any]) -> None:
        """Warn once of values that are not logged and, unlike those of an accumulated micro-batch, never will be."""
        others = [name for name in values if name not in self._names]
        if not (others and self._names and accelerator.is_main_process):
            return
        self._names.update(others)
        warnings.warn(
            f"Tracking.log does not log {', '.join(map(repr, others))}, since there was no update since the last "
            "call, and each update is logged once. Pass all values in one call, or call accelerator.log(..., "
            "step=scheduler.samples).",
            stacklevel=3,
        )

    def _end_update(self) -> bool:
        """Return whether there was an update since the last call; called once per update. Local."""
        self._updates.note_left_out()
        is_new, self._updates.is_new = self._updates.is_new, False
        return is_new

    def values(self) -> dict[str, float]:
        """Return the values of the last update, by name. Local; waits for the device if they are on one.

        Call it on every rank if a device may skip updates: then it corrects ``scheduler.samples``.

        Raises:
            ValueError: it is called between ``optimizer.step()`` and ``scheduler.step()``.
        """
        self._check_order()
        updates, clock = self._updates, self._clock
        skipped = updates.skipped()
        if clock is not None:
            clock._scheduled.retract_skipped()
        key = (updates.calls, skipped, 0 if clock is None else clock.samples)
        if key != self._last[0]:
            self._last = key, self._read(skipped)
            updates.since = None
        return {**self._last[1]}

    def _read(self, skipped: int) -> dict[str, float]:
        updates, clock = self._updates, self._clock
        found = _of_groups(updates)
        if clock is not None:
            found |= self._of_clock(clock)
            self._measure(clock.samples)
        found["updates"] = updates.applied()
        if (norm := self._grad_norm()) is not None:
            found["grad_norm"] = norm
        found["skipped_updates"] = skipped
        if self._rate is not None:
            found["samples_per_second"] = self._rate
        found["peak_memory_gb"] = peak_memory(self._device()) / 1e9
        return found

    def _of_clock(self, clock: SampleScheduler) -> dict[str, float]:
        samples, before = clock.samples, self._updates.before
        begin = samples if before is None else before
        point = clock.schedule.at(begin)
        found: dict[str, float] = {"cycle": point.cycle.index, "tau": point.tau, "samples": samples}
        if clock.epoch_size is not None:
            found["epoch"] = samples / clock.epoch_size
        recipe = clock._scheduled.recipe
        if recipe.batch_schedule is not None:
            found["batch_size"] = recipe.batch_at(begin) or 0
        if (cycle := _begun_cycle(clock, self._updates.since)) is not None:
            found["restart"] = cycle
        return found

    def _is_due(self) -> bool:
        """Return whether the last update passes a multiple of `every`, or begins a cycle. Local."""
        clock, before = self._clock, self._updates.before
        if clock is None or before is None or self._every == 1:
            return True
        return (
            before // self._every != clock.samples // self._every
            or _begun_cycle(clock, self._updates.unlogged) is not None
        )

    def _check_order(self) -> None:
        if self._clock is not None and self._clock._scheduled.clock.has_applied:
            raise ValueError(
                "Tracking was called between optimizer.step() and scheduler.step(), when the update's samples are not "
                "counted yet. Call it after scheduler.step()."
            )

    def _grad_norm(self) -> float | None:
        engine = self._updates.engine
        if engine is not None:
            norm = engine.get_global_grad_norm()
        else:
            norm = getattr(self._updates.optimizer, "grad_norm", None)
        return None if norm is None else float(norm)

    def _measure(self, samples: int) -> None:
        """Update the rate, if there were updates since the last values."""
        now = self._updates.seconds
        if now is None:
            return
        if self._since is not None and samples > self._since[1] and now > self._since[0]:
            self._rate = (samples - self._since[1]) / (now - self._since[0])
        self._since = now, samples

    def _device(self) -> torch.device:
        if self._accelerator is not None:
            return torch.device(self._accelerator.device)
        params = (param for group in self._updates.optimizer.param_groups for param in group["params"])
        return next((param.device for param in params), torch.device("cpu"))

    def _has_trackers(self, accelerator: Accelerator) -> bool:
        is_unused = not accelerator.trackers and accelerator.log_with and accelerator.is_main_process
        if is_unused and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"nothing is logged to {accelerator.log_with}: call accelerator.init_trackers(...) first.", stacklevel=3
            )
        return bool(accelerator.trackers)


def _begun_cycle(clock: SampleScheduler, since: int | None) -> int | None:
    """Return the cycle that the updates from sample ``since`` on have begun; None if they have not. Local."""
    cycle = clock.cycle
    return cycle if since is not None and cycle > clock.schedule.at(since).cycle.index else None


def _inner(scheduler: Any) -> Any:
    """Return a scheduler without the wrappers of Accelerate. Local."""
    while (inner := getattr(scheduler, "scheduler", None)) is not None:
        scheduler = inner
    return scheduler


def _check(optimizer: Any, scheduler: Any, accelerator: Any, every: Any, axis: Any, *, has_samples: bool) -> None:
    """Raise ValueError for an argument that cannot work. Local."""
    if not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "optimizer"):
        raise ValueError(f"Tracking: optimizer must be a torch optimizer, got {type(optimizer).__name__}.")
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        raise ValueError(f"Tracking: scheduler must be a torch scheduler or None, got {type(scheduler).__name__}.")
    if accelerator is not None and not hasattr(accelerator, "trackers"):
        raise ValueError(f"Tracking: accelerator must be an Accelerator, got {type(accelerator).__name__}.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"Tracking: every must be a whole number of samples above 0, got {every!r}.")
    if axis not in ("samples", "updates"):
        raise ValueError(f"Tracking: axis must be 'samples' or 'updates', got {axis!r}.")
    if every != 1 and not has_samples:
        raise ValueError(
            f"Tracking: every={every} counts samples, which {type(scheduler).__name__} does not. Leave it out, and "
            "call `log` when you want to log."
        )


def _of_groups(updates: WatchedUpdates) -> dict[str, float]:
    """Return lr and weight decay: one value for all groups, or one for each if they differ. Local."""
    groups = updates.optimizer.param_groups
    used = [updates.used(group) for group in groups]
    lr = [one[0] for one in used]
    decay = [one[1] for one in used]
    names = _names(groups)
    # By the base values: during a warm-up from 0 all are equal, and names must not change. A normalised decay is of the
    # form lambda / lr, so it differs if the base lr does.
    bases = {(float(group.get("initial_lr", group["lr"])), group.get("lr_scale", 1.0)) for group in groups}
    decaying = [i for i, one in enumerate(decay) if one]
    found = {"lr": lr[0]} if len(bases) == 1 else {f"lr/{name}": one for name, one in zip(names, lr, strict=True)}
    if not decaying or (len(bases) == 1 and len({decay[i] for i in decaying}) == 1):
        found["weight_decay"] = decay[decaying[0]] if decaying else 0.0
    else:
        found |= {f"weight_decay/{names[i]}": decay[i] for i in decaying}
    return found


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the groups' names; their numbers if some have none or share one. Local."""
    names = [str(group.get("name", "")) for group in groups]
    is_usable = all(names) and len(set(names)) == len(names)
    return names if is_usable else [str(i) for i in range(len(groups))]


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors have taken on ``device``; on a CPU, the most that this process has. Local."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).max_memory_allocated(device))
    import resource  # POSIX

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _begin(trackers: Sequence[Any], step: int, now: int) -> None:
    """Hide or drop what a killed job logged from ``step`` on, once for each tracker, before step ``now``. Local."""
    for tracker in trackers:
        name = getattr(tracker, "name", None)
        if name not in ("csv", "tensorboard") or tracker.tracker in _BEGUN:
            continue
        _BEGUN.add(tracker.tracker)
        if isinstance(tracker.tracker, CsvFile):
            tracker.tracker.drop_from(step, now)
        elif name == "tensorboard":
            _hide_later_events(tracker.tracker, step)


def _hide_later_events(writer: Any, step: int) -> None:
    """Do what ``SummaryWriter(purge_step=step)`` does, which would have to be known before a resume. Local."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    except ModuleNotFoundError:  # the writer is tensorboardX's
        return
    writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
