"""Detect what the user changed in ``param_groups`` and ``state`` since the last update."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.bucket_views import MASTERS, MOMENTS
from dist_adamw.optimizer.sharding.dtensors import local_of, shard_axes
from dist_adamw.optimizer.sharding.shard import Shard, peek
from dist_adamw.optimizer.sharding.watched_state import Shown

AMSGRAD_CHANGED = (
    "amsgrad cannot be changed after the first update. Set it when you create the group, or empty the entries of its "
    "parameters in optimizer.state (optimizer.state[p] = {}): their state then starts from zeros."
)


Home = tuple[Shard, int]  # the shard of a parameter, and its index there


@dataclass
class Changes:
    """The result of `find_changes`.

    Attributes:
        kept: The homes of the parameters in the groups, by id.
        reset: Homes of parameters in ``kept`` whose state the user removed, so that it starts from zeros.
        given: Homes of parameters, and the state with which the user replaced the shard's views.
        removed: Homes of the parameters that are in no group.
        described: A description of each change.
        arrangement: A description of every parameter in the groups, to compare ranks.
    """

    kept: dict[int, Home] = field(default_factory=dict)
    reset: list[Home] = field(default_factory=list)
    given: list[tuple[Home, dict[str, Any]]] = field(default_factory=list)
    removed: list[Home] = field(default_factory=list)
    described: list[str] = field(default_factory=list)
    arrangement: list[str] = field(default_factory=list)


def find_changes(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    shards: Sequence[Shard],
    shown: Mapping[int, Shown],
    *,
    are_local: bool = False,
    may_wait: bool = False,
) -> Changes:
    """Compare ``groups`` and ``state`` with the views that ``shards`` put there. Local; changes nothing.

    Args:
        shown: The values that the shards put into each entry of ``state``, by id of the parameter.
        are_local: Whether gradients are still local. They will be averaged, so ranks need not have the same ones now.
        may_wait: Whether a parameter whose state was removed has none until its next gradient, as in torch.

    Raises:
        ValueError: a parameter is in the groups twice, or an entry of ``state`` is not the state of its parameter, or
            shares a tensor with another entry.
    """
    check_once(groups)
    homes = {id(param): (shard, i) for shard in shards for i, param in enumerate(shard.params)}
    comparison = _Comparison(groups, state, shown, homes)
    for g, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            name = f"parameter {j} of group {g}"
            home = homes.get(id(param))
            if home is None:
                comparison.add_new(name, param, are_local=are_local)
            elif may_wait and not peek(state, param) and param.grad is None:
                comparison.found.described.append(f"{name} has no state")
            else:
                comparison.add_kept(name, param, home, group)
    comparison.add_removed()
    found = comparison.found
    check_new_state(groups, state, found.kept)
    _check_apart(groups, state)
    return found


class _Comparison:
    """Collects `Changes`, one parameter at a time; the arguments are those of `find_changes`."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        shown: Mapping[int, Shown],
        homes: Mapping[int, Home],
    ) -> None:
        self.found = Changes()
        self._groups, self._state, self._shown, self._homes = groups, state, shown, homes
        # Describe placed parameters by number, so that ranks name a parameter alike whatever its group is now.
        self._numbers = {key: n for n, key in enumerate(homes)}

    def add_new(self, name: str, param: Tensor, *, are_local: bool) -> None:
        """Describe a parameter without a place."""
        frozen = "" if param.requires_grad else ", frozen"
        self.found.arrangement.append(f"{name} is {list(param.shape)} {param.dtype}{frozen}")
        if are_local or param.grad is not None or peek(self._state, param):
            self.found.described.append(f"{name} is new: {list(param.shape)} {param.dtype}")

    def add_kept(self, name: str, param: Tensor, home: Home, group: dict[str, Any]) -> None:
        """Compare a parameter that has a place, and is in ``group`` now."""
        shard = home[0]
        entry = peek(self._state, param)
        _check_numel(*home)
        if entry and group["amsgrad"] != shard.has_maxima:
            raise RuntimeError(AMSGRAD_CHANGED)
        self.found.kept[id(param)] = home
        self.found.arrangement.append(f"{name} is number {self._numbers[id(param)]} {param.dtype}")
        # If the old group no longer exists it was replaced as a whole, e.g. by `load_state_dict`: nothing moved.
        before = shard.groups[home[1]]
        if before is not group and any(before is other for other in self._groups):
            self.found.described.append(f"{name} comes from another group")
        if not entry:
            self.found.reset.append(home)
            self.found.described.append(f"{name} has no state")
        else:
            self._compare_entry(name, name, home, entry)

    def add_removed(self) -> None:
        """Compare the parameters that have a place and were not kept."""
        self.found.removed = [home for key, home in self._homes.items() if key not in self.found.kept]
        for shard, i in self.found.removed:
            param = shard.params[i]
            name = f"number {self._numbers[id(param)]}"
            entry = peek(self._state, param)
            self.found.described.append(f"{name} is in no group{', its state stays' if entry else ''}")
            if entry:
                self._compare_entry(name, f"a parameter in no group, {name},", (shard, i), entry)

    def _compare_entry(self, name: str, name_in_errors: str, home: Home, entry: Mapping[str, Any]) -> None:
        """Note what the user has replaced in the entry of a parameter."""
        shard, i = home
        given = _given(name_in_errors, home, entry, self._shown[id(shard.params[i])])
        if given:
            self.found.given.append((home, given))
            self.found.described.append(f"{name} has another {', another '.join(sorted(given))}")


def _check_numel(shard: Shard, i: int) -> None:
    """Refuse a parameter that has another number of elements than its state. Local.

    Raises:
        ValueError: gives both numbers.
    """
    if not shard.has_numel_of(i):
        param = local_of(shard.params[i])
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has {param.numel()} elements, and its state has "
            f"{shard.layout.numels[i]}: its data was replaced. Put a new nn.Parameter into the group instead, or "
            "empty its entry in optimizer.state (optimizer.state[p] = {})."
        )


def check_once(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a parameter that is in the groups twice. Local.

    Raises:
        ValueError: names both places.
    """
    places: dict[int, str] = {}
    for g, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            where = f"parameter {j} of group {g}"
            if (first := places.setdefault(id(param), where)) is not where:
                raise ValueError(
                    f"{first} and {where} are the same tensor, of shape {tuple(param.shape)}, and would be updated "
                    "twice. Leave one out: model.parameters() names a shared parameter once."
                )


def check_keys(state: Mapping[Any, Any]) -> None:
    """Refuse what torch calls global state: an entry in ``state`` that is not of a parameter. Local.

    Raises:
        ValueError: names the key.
    """
    for key in dict.keys(state) if isinstance(state, dict) else state:
        if not isinstance(key, Tensor):
            raise ValueError(
                f"optimizer.state[{key!r}] is not the state of a parameter, and would be lost when state is laid out. "
                "Keep it elsewhere, such as in an attribute of the optimizer."
            )


def _check_apart(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Refuse one tensor as the state of two parameters. Local.

    torch would update it twice, once for each parameter. Shards keep a copy for each, so results would differ.
    """
    users: dict[int, str] = {}
    for g, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            entry = peek(state, param) or {}
            for key in ("step", *MOMENTS, *MASTERS):
                value = entry.get(key)
                if not isinstance(value, Tensor) or not local_of(value).numel():  # all empty tensors are at address 0
                    continue
                where = f"{key!r} of parameter {j} of group {g}"
                other = users.setdefault(local_of(value).data_ptr(), where)
                if other is not where:
                    raise ValueError(
                        f"optimizer.state has one tensor as {other} and as {where}. Pass a clone() to each."
                    )


def check_new_state(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]], placed: Collection[int]
) -> None:
    """Refuse entries of ``state`` for parameters without a place, unless they are whole states. Local.

    Raises:
        ValueError: names the parameter and the problem; or an entry is not of a parameter.
    """
    if not state:
        return
    check_keys(state)
    for g, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if id(param) not in placed and (entry := peek(state, param)):
                for key in ("step", *(MOMENTS if group["amsgrad"] else MOMENTS[:2])):
                    check_given(f"parameter {j} of group {g}", key, entry.get(key), param.shape, None)


def _given(name: str, home: Home, entry: Mapping[str, Any], shown: Shown) -> dict[str, Any]:
    """Return the values that the user replaced in ``entry``. A missing master is None: it will follow the parameter."""
    shard, i = home
    given = {key: entry.get(key) for key in shown.keys if shown.is_replaced(key, entry.get(key))}
    share = torch.Size([sum(stop - start for start, stop in shard.owned.ranges_of(i))])
    for key, value in given.items():
        if key not in MASTERS or value is not None:
            check_given(name, key, value, shard.params[i].shape, share)
    return given


def check_given(name: str, key: str, value: Any, whole: torch.Size, share: torch.Size | None) -> None:
    """Refuse a value that cannot be the state ``key`` of a parameter. Local.

    Args:
        name: The parameter's name in the error.
        whole: The parameter's shape.
        share: The shape of this rank's share; None if the value must be whole.

    Raises:
        ValueError: says what was found and what is needed.
    """
    where = f"optimizer.state has {key!r} of {name}"
    if key == "step":
        if not (isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise ValueError(f"{where}, {_shape(value)}: a number is needed, or a tensor of one element.")
        return
    if not isinstance(value, Tensor) or value.shape not in (whole, share):
        or_share = "" if share in (None, whole) else f", or {tuple(share or ())} for this rank's share"
        raise ValueError(
            f"{where}, {_shape(value)}: a tensor of shape {tuple(whole)} is needed{or_share}. Pass such a tensor, or "
            "empty the entry (optimizer.state[p] = {}) to start from zeros."
        )


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"which is {value!r:.60}"


class Arrangement(NamedTuple):
    """The parameters of one shard, in the order of its layout, and the group of each."""

    groups: list[dict[str, Any]]
    params: list[Tensor]


def arrange(
    groups: Sequence[dict[str, Any]],
    chosen: Collection[int],
    order: Mapping[int, int],
    *,
    by_group: bool,
) -> list[Arrangement]:
    """Divide those parameters that have an id in ``chosen`` among shards. Local.

    The result depends only on groups and order, so a resumed job has the same shards as one that never stopped. The
    bits of the gradient norm depend on the shards, since it is summed run by run.

    Args:
        order: The place of parameters in the layout, by id; others come last, in the order of the groups.
        by_group: Whether no two groups may share a shard.
    """
    alike: dict[tuple[Any, ...], Arrangement] = {}
    last = max(order.values(), default=0) + 1
    placed = [(order.get(id(param), last), g, param) for g, group in enumerate(groups) for param in group["params"]]
    for _, g, param in sorted(placed, key=operator.itemgetter(0)):
        if id(param) in chosen:
            divided_by = g if by_group else groups[g]["amsgrad"]
            key = (divided_by, param.dtype, local_of(param).device, shard_axes(param))
            one = alike.setdefault(key, Arrangement([], []))
            one.groups.append(groups[g])
            one.params.append(param)
    return list(alike.values())
