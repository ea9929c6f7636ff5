"""Detect what the user changed in ``param_groups`` and ``state`` since the last update."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import local_of, shard_axes
from dist_adamw.optimizer.sharding.shard import MASTERS, MOMENTS, Shard, peek
from dist_adamw.optimizer.sharding.watched_state import Shown

AMSGRAD_CHANGED = (
    "amsgrad cannot be changed after the first update. Set it when the group is made, or empty the entries of its "
    "parameters in optimizer.state (optimizer.state[p] = {}), which then begin with zeros."
)


Home = tuple[Shard, int]  # a parameter's shard, and its place in it


@dataclass
class Changes:
    """The result of `find_changes`.

    Attributes:
        kept: Where the state of each parameter in the groups lies, by id.
        reset: Parameters in ``kept`` whose state the user took away: they begin with zeros.
        given: Parameters in ``kept``, and the state that the user put in place of what was shown.
        removed: Where the state of parameters lies that are in no group.
        described: The same for people.
        arrangement: Every parameter in the groups, for comparing ranks.
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
    """Compare ``groups`` and ``state`` with what ``shards`` have shown there. Local; changes nothing.

    Args:
        shown: By id of the parameter, what its entry in ``state`` was given.
        are_local: A gradient that one rank has will be averaged over all: it is nothing in which ranks differ.
        may_wait: A parameter whose state was taken away has none until its next gradient, as in torch.

    Raises:
        ValueError: a parameter is there twice, or the user put something into ``state`` that is no state of the
            parameter, or that is another's.
    """
    check_once(groups)
    found = Changes()
    homes = {id(param): (shard, i) for shard in shards for i, param in enumerate(shard.params)}
    numbers = {key: n for n, key in enumerate(homes)}
    for g, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            name = f"parameter {j} of group {g}"
            home = homes.get(id(param))
            entry = peek(state, param)
            if home is None:
                trained = "" if param.requires_grad else ", frozen"
                found.arrangement.append(f"{name} is {list(param.shape)} {param.dtype}{trained}")
                if are_local or param.grad is not None or entry:
                    found.described.append(f"{name} is new: {list(param.shape)} {param.dtype}")
                continue
            if may_wait and not entry and param.grad is None:
                found.described.append(f"{name} has no state")
                continue
            _check_numel(*home)
            if entry and group["amsgrad"] != home[0].has_maxima:
                raise RuntimeError(AMSGRAD_CHANGED)
            found.kept[id(param)] = home
            found.arrangement.append(f"{name} is number {numbers[id(param)]} {param.dtype}")
            if home[0].group is not group and any(home[0].group is other for other in groups):
                found.described.append(f"{name} comes from another group")
            if not entry:
                found.reset.append(home)
                found.described.append(f"{name} has no state")
            elif given := _given(name, home, entry, shown[id(param)]):
                found.given.append((home, given))
                found.described.append(f"{name} has another {', another '.join(sorted(given))}")
    found.removed = [home for key, home in homes.items() if key not in found.kept]
    for shard, i in found.removed:
        name = f"number {numbers[id(shard.params[i])]}"
        entry = peek(state, shard.params[i])
        found.described.append(f"{name} is in no group{', its state stays' if entry else ''}")
        if entry and (
            given := _given(f"a parameter in no group, {name},", (shard, i), entry, shown[id(shard.params[i])])
        ):
            found.given.append(((shard, i), given))
            found.described.append(f"{name} has another {', another '.join(sorted(given))}")
    check_new_state(groups, state, found.kept)
    _check_apart(groups, state)
    return found


def _check_numel(shard: Shard, i: int) -> None:
    """Refuse a parameter that has another number of elements than its state. Local.

    Raises:
        ValueError: says how many there are.
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


def _check_apart(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Refuse one tensor as the state of two parameters. Local.

    torch would update it once for each of them; shards copy it.
    """
    users: dict[int, str] = {}
    for g, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            entry = peek(state, param) or {}
            for key in ("step", *MOMENTS, *MASTERS):
                value = entry.get(key)
                if not isinstance(value, Tensor) or not local_of(value).numel():
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
    """Refuse what ``state`` has of parameters without a place, unless it is their whole state. Local.

    Raises:
        ValueError: names the parameter and what is wrong.
    """
    if not state:
        return
    for g, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if id(param) not in placed and (entry := peek(state, param)):
                for key in ("step", *(MOMENTS if group["amsgrad"] else MOMENTS[:2])):
                    check_given(f"parameter {j} of group {g}", key, entry.get(key), param.shape, None)


def _given(name: str, home: Home, entry: Mapping[str, Any], shown: Shown) -> dict[str, Any]:
    """Return what the user has replaced in ``entry``. A master that is missing follows the parameter: None."""
    shard, i = home
    given = {key: entry.get(key) for key in shown.values if shown.is_replaced(key, entry.get(key))}
    share = torch.Size([sum(stop - start for start, stop in shard.owned.ranges_of(i))])
    for key, value in given.items():
        if key not in MASTERS or value is not None:
            check_given(name, key, value, shard.params[i].shape, share)
    return given


def check_given(name: str, key: str, value: Any, whole: torch.Size, share: torch.Size | None) -> None:
    """Refuse what cannot be state of a parameter. Local.

    Args:
        name: Of the parameter, for the message.
        whole: Its shape.
        share: The shape of this rank's share; None where only whole state can be taken.

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
            "empty the entry (optimizer.state[p] = {}) to begin with zeros."
        )


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"which is {value!r:.60}"


def arrange(groups: Sequence[dict[str, Any]], chosen: Collection[int]) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """The parameters with an id in ``chosen`` that share a shard, and their group. Local.

    The order depends on nothing but the groups, so that a resumed job has the shards of one that never stopped, and
    with them the bits of the gradient norm, which is summed run by run.
    """
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for g, group in enumerate(groups):
        for param in group["params"]:
            if id(param) in chosen:
                key = (g, param.dtype, local_of(param).device, shard_axes(param))
                alike.setdefault(key, []).append(param)
    return [(groups[g], together) for (g, *_), together in alike.items()]
