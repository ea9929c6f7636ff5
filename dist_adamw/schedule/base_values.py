"""Remember each parameter group's lr and weight decay from before any schedule changed them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dist_adamw.schedule.batch import shown


@dataclass(frozen=True, slots=True)
class BaseValues:
    """A parameter group's values before any schedule changed them."""

    lr: float
    min_lr: float
    weight_decay: float
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.lr < math.inf:
            raise ValueError(f"lr must be a finite number >= 0, got {self.lr!r}.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number >= 0, got {self.weight_decay!r}.")
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"min_lr must lie between 0 and the group's lr {self.lr!r}, got {self.min_lr!r}. "
                "Set min_lr in the parameter group, or pass a smaller one."
            )
        if not 0.0 <= self.lr_scale < math.inf:
            raise ValueError(f"lr_scale must be a finite number >= 0, got {self.lr_scale!r}.")

    def plain(self) -> list[float]:
        """Return the numbers as plain data; the scale only if it is not 1."""
        # Checkpoints from before lr_scale have three numbers, and configurations are compared strictly.
        scale = [] if self.lr_scale == 1.0 else [self.lr_scale]
        return [self.lr, self.min_lr, self.weight_decay, *scale]


GroupCheck = Callable[[Optimizer, Mapping[str, Any], BaseValues], None]


@dataclass(slots=True)
class ScheduledGroup:
    """A parameter group and its base values.

    The reference keeps the group alive, so that no other dict can get its ``id``.

    Attributes:
        marks: Marks of the lr and weight decay that the schedule wrote last: see `_marks`. Not up to date while
            `ScheduledGroups` itself knows what was written.
    """

    group: dict[str, Any]
    base: BaseValues
    marks: tuple[object, object] | None = None


class ScheduledGroups:
    """The parameter groups of an optimizer with their base values, in the optimizer's order. Local.

    Users add, delete, reorder and replace groups. Base values belong to a group by identity, and are also stored in it
    (``initial_lr``, ``initial_weight_decay``), so that copies keep them.

    Args:
        optimizer: The torch optimizer.
        min_lr: For groups without their own.
        check: Called with each new group and its base values; raises if they cannot be scheduled.

    Attributes:
        dicts: The groups themselves.
        bases: Their base values. Another tuple whenever a group or a base value changes.
    """

    def __init__(self, optimizer: Optimizer, min_lr: float, check: GroupCheck | None = None) -> None:
        self.optimizer, self._min_lr, self._check = optimizer, min_lr, check
        self._known: list[ScheduledGroup] = []
        self.dicts: list[dict[str, Any]] = []
        self.bases: tuple[BaseValues, ...] = ()
        # The lr and weight decay of each group after the last write. If none is a tensor, these objects tell whether
        # they are still there, and marks are made only if they are not. None: there are marks.
        self._written: tuple[Sequence[Any], Sequence[Any]] | None = None
        self._has_warned = False

    def __iter__(self) -> Iterator[ScheduledGroup]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def with_bases(self, bases: Sequence[BaseValues], check: GroupCheck | None) -> ScheduledGroups:
        """Return the same groups with other base values and another check of new groups; writes nothing."""
        self._make_marks()
        changed = ScheduledGroups(self.optimizer, self._min_lr, check)
        changed._know([replace(one, base=base) for one, base in zip(self._known, bases, strict=True)])
        changed._has_warned = self._has_warned
        return changed

    def follow(self) -> None:
        """Update to the optimizer's current groups.

        Raises:
            ValueError: the base values of a new group cannot be scheduled.
        """
        if self._are_current():
            return
        groups = self.optimizer.param_groups
        self._make_marks()
        known = {id(one.group): one for one in self._known}
        self._know([known.get(id(group)) or self._learn(i, group) for i, group in enumerate(groups)])

    def _know(self, known: list[ScheduledGroup]) -> None:
        self._known = known
        self.dicts, self.bases = [one.group for one in known], tuple(one.base for one in known)

    def are_known(self) -> bool:
        """Return whether all of the optimizer's groups are known."""
        if self._are_current():
            return True
        known = set(map(id, self.dicts))
        return all(id(group) in known for group in self.optimizer.param_groups)

    def _are_current(self) -> bool:
        groups = self.optimizer.param_groups
        return len(groups) == len(self.dicts) and all(map(operator.is_, groups, self.dicts))

    def take_loaded(self) -> None:
        """Switch to the new dicts by which ``Optimizer.load_state_dict`` has replaced the groups."""
        self._make_marks()
        for known, group in zip(self._known, self.optimizer.param_groups, strict=True):
            known.group = group
        self._know(self._known)

    def restore(self) -> None:
        """Write the base values into the groups."""
        for one in self._known:
            one.group["initial_lr"], one.group["initial_weight_decay"] = one.base.lr, one.base.weight_decay
            for name, default in (("min_lr", self._min_lr), ("lr_scale", 1.0)):
                if one.group.get(name, default) != getattr(one.base, name):
                    one.group[name] = getattr(one.base, name)

    def write(self, lrs: list[float], decays: Sequence[float | None]) -> list[float | Tensor]:
        """Write lr, and weight decay unless it is None, into the groups; return copies of their lr."""
        has_tensors = False
        for group, lr, decay in zip(self.dicts, lrs, decays, strict=True):
            if type(group["lr"]) is not float and isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # in place: a CUDA graph or a compiled step reads this tensor
                has_tensors = True
            else:
                group["lr"] = lr
            if decay is not None:
                group["weight_decay"] = decay
        if has_tensors or None in decays or not (lrs and type(lrs[0]) is float):
            self._note_written()
            return self.current_lr()
        self._written = (lrs, decays)
        return [*lrs]

    def _note_written(self) -> None:
        written = _current(self.dicts)
        has_tensors = any(isinstance(value, Tensor) for values in written for value in values)
        self._written = None if has_tensors else written
        if has_tensors:
            for one in self._known:
                one.marks = _marks(one.group)

    def is_as_written(self) -> bool:
        """Return whether the groups are the same, with the very numbers of the last `write`, none of them a tensor."""
        groups = self.optimizer.param_groups
        if self._written is None or len(groups) != len(self.dicts):
            return False
        # One loop for everything, since this runs at every update.
        for group, known, lr, decay in zip(groups, self.dicts, *self._written, strict=True):
            if group is not known or group["lr"] is not lr or group.get("weight_decay") is not decay:
                return False
        return True

    def _make_marks(self) -> None:
        """Make the marks of what was written last, before they are compared or groups change."""
        if self._written is not None:
            for one, lr, decay in zip(self._known, *self._written, strict=True):
                one.marks = (lr, decay)
            self._written = None

    def current_lr(self) -> list[float | Tensor]:
        """Return copies of the groups' lr."""
        return [copy_value(group["lr"]) for group in self.dicts]

    def find_other_writer(self, leaves_decay_alone: Callable[[Mapping[str, Any]], bool]) -> str | None:
        """Return a warning if other code has changed lr or weight decay since `write`; only once."""
        if self._has_warned:
            return None
        self.follow()
        self._make_marks()
        for i, known in enumerate(self._known):
            if known.marks is None:
                continue
            group = known.group
            for name, wrote, found in zip(("lr", "weight_decay"), known.marks, _marks(group), strict=True):
                if wrote == found or (name == "weight_decay" and leaves_decay_alone(group)):
                    continue
                self._has_warned = True
                value = group[name] if isinstance(group[name], float | int) else "another tensor or value"
                return (
                    f"{name} of parameter group {i} is {value}, which CyclicLRWithRestarts has not written: another "
                    "scheduler or your own code has. The last update used it; from now on the schedule's own value is "
                    "written again. Let only one of them write it: shape the curve with policy_fn or callbacks, keep "
                    "your own decay with normalize_weight_decay=False, or drop this scheduler."
                )
        return None

    def _learn(self, index: int, group: dict[str, Any]) -> ScheduledGroup:
        """Record the base values of a group, also in the group itself, for its copies."""
        # torch's convention: "initial_lr" is the base, since a scheduler may have annealed "lr" already.
        for name in ("lr", "weight_decay"):
            if f"initial_{name}" not in group:
                self._check_not_annealed(index, name, _number(name, group.get(name, 0.0)))
                group[f"initial_{name}"] = copy_value(group.get(name, 0.0))
        base = BaseValues(
            lr=_number("lr", group["initial_lr"]),
            min_lr=_number("min_lr", group.get("min_lr", self._min_lr)),
            weight_decay=_number("weight_decay", group["initial_weight_decay"]),
            lr_scale=_number("lr_scale", group.get("lr_scale", 1.0)),
        )
        if self._check is not None:
            self._check(self.optimizer, group, base)
        return ScheduledGroup(group, base)

    def _check_not_annealed(self, index: int, name: str, value: float) -> None:
        """Raise if a new group has a value that the schedule wrote into another group: its base value is unknown."""
        for one in self._known:
            base = getattr(one.base, name)
            current = _number(name, one.group.get(name, 0.0))
            # A decay of 0 is common for biases, and says nothing of a copy.
            if current == value != base and (value or name == "lr"):
                raise ValueError(
                    f"parameter group {index} has no 'initial_{name}', and its {name} {value!r} is the current {name} "
                    f"of a group whose base {name} is {base!r}. To replace a group, copy it whole: "
                    f"dict(group, params=[...]). Otherwise set group['initial_{name}'] to its base {name}."
                )


def copy_value(value: float | Tensor) -> float | Tensor:
    """Return a copy of a hyper-parameter, which in-place changes of the group's tensor do not reach."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _current(groups: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    return [group["lr"] for group in groups], [group.get("weight_decay") for group in groups]


def _marks(group: Mapping[str, Any]) -> tuple[object, object]:
    """Return marks that change whenever a group's lr or weight decay does, without waiting for a device."""
    return _mark(group["lr"]), _mark(group.get("weight_decay"))


def _mark(value: object) -> object:
    """Return a number itself; for a tensor its identity and version counter, since reading it would wait."""
    return (id(value), value._version) if isinstance(value, Tensor) else value


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a number, got {shown(value)}.") from error
