"""Detect what the user changed in ``param_groups`` and ``state`` since the last update, and move state accordingly.

Knows shards, parameter groups and optimizer state; ``adamw.py`` asks at every update, and applies it.

In torch, ``param_groups`` and ``state`` are the optimizer. Shards keep the state elsewhere and show it there, so they
compare what they have shown with what is there. ``state`` and its entries tell when they are changed; lists of
parameters, and dicts that the user put there, are compared by identity. ``state[p]["exp_avg"].data = x`` tells nothing:
once the user has had a tensor of ``state`` in hand, addresses are compared, too. Loops over tensors run in C.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import local_of, shard_axes
from dist_adamw.optimizer.sharding.shard import MASTERS, MOMENTS, Shard, peek
from dist_adamw.optimizer.transport.layout import FlatLayout
from dist_adamw.ranks import agreement

AMSGRAD_CHANGED = (
    "amsgrad cannot be changed after the first update. Set it when the group is made, or empty the entries of its "
    "parameters in optimizer.state (optimizer.state[p] = {}), which then begin with zeros."
)
CHUNK_NUMEL = 1 << 23  # elements of whole parameters that are put together at a time
Home = tuple[Shard, int]  # a parameter's shard, and its place in it


class Bell:
    """Rung by `State` and `Entry` when the user changes them.

    Attributes:
        rung: Whether that has happened.
        was_read: Whether the user has had an entry of ``state`` in hand, ever. What reads by dict's own methods
            (``dict.get(state, param)``) is not the user.
    """

    rung = False
    was_read = False


def _telling(name: str, *, changes: bool, reads: bool) -> Any:
    method = getattr(dict, name)

    @functools.wraps(method)
    def tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.bell is not None:
            self.bell.rung = self.bell.rung or changes
            self.bell.was_read = self.bell.was_read or reads
        return method(self, *args, **kwargs)

    return tell


class Entry(dict[str, Any]):
    """A parameter's entry in ``state``: a dict that rings when it is changed. Copies and pickles are plain dicts."""

    bell: Bell | None = None

    @classmethod
    def of(cls, bell: Bell, values: Mapping[str, Any]) -> Entry:
        """``values``, and the bell to ring."""
        entry = cls(values)
        entry.bell = bell
        return entry

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class State(defaultdict[Tensor, dict[str, Any]]):
    """An optimizer's ``state``: a dict that rings when it is changed. Copies and pickles are ``defaultdict(dict)``."""

    bell: Bell | None = None

    @classmethod
    def of(cls, bell: Bell, entries: Mapping[Tensor, Mapping[str, Any]]) -> State:
        """``entries``, each as an `Entry`, and the bell to ring."""
        state = cls(dict, {param: Entry.of(bell, entry) for param, entry in entries.items()})
        state.bell = bell
        return state

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))


# What is put into ``state`` stays in the user's hands, too.
for _name in ("__setitem__", "__ior__", "pop", "popitem", "update", "setdefault"):
    setattr(State, _name, _telling(_name, changes=True, reads=True))
for _name in ("__delitem__", "clear"):
    setattr(State, _name, _telling(_name, changes=True, reads=False))
for _name in ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "clear", "update", "setdefault"):
    setattr(Entry, _name, _telling(_name, changes=True, reads=False))
# With another __iter__ than dict's, dict(state), {**state} and state.copy() read by __getitem__.
for _name in ("__getitem__", "__iter__", "get", "items", "values"):
    setattr(State, _name, _telling(_name, changes=False, reads=True))


@dataclass(frozen=True, slots=True)
class Shown:
    """The values put into a parameter's entry in ``state``, and their addresses: ``.data = x`` rings no bell."""

    values: dict[str, Tensor]
    addresses: list[int]

    @classmethod
    def of(cls, values: dict[str, Tensor]) -> Shown:
        """``values``, where they lie now."""
        return cls(values, [_address(local_of(value)) for value in values.values()])

    def is_replaced(self, key: str, value: Any) -> bool:
        """Return whether ``value`` is another tensor than was shown, or has other memory."""
        place = list(self.values).index(key)
        return value is not self.values[key] or _address(local_of(value)) != self.addresses[place]


def _address(tensor: Tensor) -> int:
    """Where ``tensor`` lies; of an empty share the storage's identity, so that every rank sees what was replaced."""
    return tensor.data_ptr() or _identity(tensor.untyped_storage())


class Snapshot:
    """``param_groups`` and ``state`` as they were when the shards last agreed with them.

    Args:
        placed: Ids of the parameters that have a place in a shard.
        shown: What the shards have shown in ``state``.
        bell: Rung by what `State` and `Entry` are told; other dicts, which the user put there, are compared.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        placed: Collection[int],
        shown: Collection[Shown],
        bell: Bell,
    ) -> None:
        self._groups = list(groups)
        self._params = [list(group["params"]) for group in groups]
        self._bell = bell
        bell.rung = False
        self.state = state
        self._is_telling = isinstance(state, State) and state.bell is bell
        self._keys = [] if self._is_telling else list(state)
        entries = list(dict.values(state) if isinstance(state, dict) else state.values())
        self._all = [] if self._is_telling else entries
        self._entries = [entry for entry in entries if type(entry) is not Entry or entry.bell is not bell]
        self._values = _values(self._entries)
        tensors = [local_of(value) for one in shown for value in one.values.values()]
        addresses = [address for one in shown for address in one.addresses]
        is_empty = [tensor.numel() == 0 for tensor in tensors]
        self._empty = list(itertools.compress(tensors, is_empty))
        self._empty_addresses = list(itertools.compress(addresses, is_empty))
        has_elements = list(map(operator.not_, is_empty))
        self._tensors = list(itertools.compress(tensors, has_elements))
        self._addresses = list(itertools.compress(addresses, has_elements))
        # Parameters without a place; the first gradient gives them one.
        self.waiting = [param for params in self._params for param in params if id(param) not in placed]

    def differs(self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Return whether anything was replaced, added, taken away or moved since. Local."""
        if self._bell.rung or state is not self.state:
            return True
        if not (_same(groups, self._groups) and all(map(_same, map(_PARAMS, groups), self._params))):
            return True
        if not self._is_telling and not (_same(state, self._keys) and _same(state.values(), self._all)):
            return True
        if sum(map(len, self._entries)) != len(self._values):
            return True
        if not all(map(operator.is_, _iterate(self._entries), self._values)):
            return True
        if self._is_telling and not self._bell.was_read:
            return False
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            return True
        return list(map(_identity, map(Tensor.untyped_storage, self._empty))) != self._empty_addresses


_PARAMS = operator.itemgetter("params")
_identity = operator.attrgetter("_cdata")


def _same(these: Collection[Any], those: Collection[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _iterate(entries: list[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, entries))


def _values(entries: list[dict[str, Any]]) -> list[Any]:
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"optimizer.state must hold a dict for each parameter, got a {type(entry).__name__}.")
    return list(_iterate(entries))


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
            home[0].check_numel(home[1])
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
    share = torch.Size([sum(stop - start for start, stop in shard.ranges_of(i))])
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


def carry_state(old: Sequence[Shard], new: Sequence[Shard]) -> None:
    """Give the shards ``new`` the state that their parameters have in ``old``. Collective over the old shards' ranks.

    As many elements of whole parameters are in memory at a time as fit `CHUNK_NUMEL`, or one parameter.
    """
    targets = {id(param): (shard, j) for shard in new for j, param in enumerate(shard.params)}
    for shard in old:
        moved = [(i, *targets[id(param)]) for i, param in enumerate(shard.params) if id(param) in targets]
        for i, target, j in moved:
            target.steps[j] = shard.steps[i]
        for name in shard.moments:
            for (i, target, j), flat in _whole(shard, moved, [shard.owned_moment(i, name) for i, *_ in moved]):
                if name in target.moments:
                    target.fill(j, name, reorder(flat, shard, i, target, j))


def reorder(flat: Tensor, shard: Shard, i: int, target: Shard, j: int) -> Tensor:
    """A parameter's elements in the order of its memory in ``shard``, brought to that in ``target``. Local."""
    if shard.order_of(i) == target.order_of(j):
        return flat
    return target.as_laid_out(j, shard.from_laid_out(i, flat))


Move = tuple[int, Shard, int]


def _whole(shard: Shard, moved: Sequence[Move], values: Sequence[Tensor]) -> Iterator[tuple[Move, Tensor]]:
    """All elements of some parameters of ``shard``, 1-D, of which every rank has its own in ``values``. Collective."""
    if shard.process_group is None:
        yield from zip(moved, values, strict=True)
        return
    ranges = [shard.layout.ranges(rank) for rank in range(shard.layout.world_size)]
    for members in _chunks(shard.layout, [i for i, *_ in moved]):
        wholes = [values[n].new_empty(shard.layout.numels[moved[n][0]]) for n in members]
        for rank, of_rank in enumerate(ranges):
            runs = [
                whole[start:stop]
                for n, whole in zip(members, wholes, strict=True)
                for start, stop in of_rank[moved[n][0]]
            ]
            if not runs:
                continue
            sent = torch.cat([values[n] for n in members]) if rank == shard.rank else torch.cat(runs)
            # As bytes: gloo has no int16, which remainders are.
            dist.broadcast(
                sent.view(torch.uint8), src=dist.get_global_rank(shard.process_group, rank), group=shard.process_group
            )
            torch._foreach_copy_(runs, list(torch.split(sent, [run.numel() for run in runs])))
        yield from zip([moved[n] for n in members], wholes, strict=True)


def _chunks(layout: FlatLayout, indices: Sequence[int]) -> Iterator[list[int]]:
    """Places in ``indices`` whose parameters are put together at a time."""
    members: list[int] = []
    total = 0
    for n, i in enumerate(indices):
        if members and total + layout.numels[i] > CHUNK_NUMEL:
            yield members
            members, total = [], 0
        members.append(n)
        total += layout.numels[i]
    if members:
        yield members


class Flag:
    """Whether some rank has changes or other hyper-parameters, asked while this rank computes. Collective to build.

    Args:
        raised: Whether this rank has changes.
        options: Digest of its hyper-parameters.
        groups: Over which ranks, one group after the other.
    """

    def __init__(self, raised: bool, options: int, groups: Sequence[dist.ProcessGroup]) -> None:
        self._value = torch.tensor([raised, options, -options], dtype=torch.int64)
        self._rest = groups[1:]
        self._work = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=groups[0], async_op=True)

    def wait(self) -> bool:
        """The answer. Collective where there are two groups."""
        assert self._work is not None
        self._work.wait()
        for group in self._rest:
            dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=group)
        raised, highest, minus_lowest = self._value.tolist()
        return bool(raised or highest != -minus_lowest)


def check_changes_alike(
    changes: Changes | str, options: Mapping[str, Any], groups: Sequence[dist.ProcessGroup]
) -> None:
    """Raise on every rank unless all have made the same changes and have the same hyper-parameters. Collective.

    Args:
        changes: Of this rank; or why it cannot follow them.
        options: Hyper-parameters by name.

    Raises:
        AgreementError: says which rank differs, and how.
    """
    what = "what was changed in optimizer.param_groups and state"
    if isinstance(changes, str):
        record = {**options, what: changes}
    else:
        record = {
            **options,
            what: "; ".join(changes.described) or "nothing",
            "fingerprint of all parameters": agreement.fingerprint({"": changes.arrangement}),
        }
    for group in groups:
        agreement.check_agreement(record, group)
