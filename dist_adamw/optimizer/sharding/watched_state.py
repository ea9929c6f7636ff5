"""Dicts for ``optimizer.state`` that record whether the user has read or changed them.

A parameter's entry is compared only after a change. ``state[p]["exp_avg"].data = x`` changes no dict, so once the user
has read a tensor from ``state``, addresses are compared too. Loops over tensors run in C.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import local_of


class AccessRecord:
    """A record of the user's accesses to a `WatchedState` and its entries.

    Attributes:
        was_changed: Whether they were changed since the last `Snapshot`.
        was_read: Whether the user may hold an entry of ``state``. This package reads with dict's own methods
            (``dict.get(state, param)``), which do not count.
    """

    was_changed = False
    was_read = False


def _recording(name: str, *, changes: bool, reads: bool) -> Any:
    method = getattr(dict, name)

    @functools.wraps(method)
    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.accesses is not None:
            self.accesses.was_changed = self.accesses.was_changed or changes
            self.accesses.was_read = self.accesses.was_read or reads
        return method(self, *args, **kwargs)

    return record


class WatchedEntry(dict[str, Any]):
    """A parameter's entry in ``state``: a dict that records changes. Copies and pickles are plain dicts."""

    __slots__ = ("accesses",)  # with a ``__dict__`` each would take 350 bytes more

    accesses: AccessRecord | None

    def __new__(cls, *args: Any, **kwargs: Any) -> WatchedEntry:  # noqa: D102
        entry = super().__new__(cls)
        entry.accesses = None
        return entry

    @classmethod
    def of(cls, accesses: AccessRecord, values: Mapping[str, Any]) -> WatchedEntry:
        """Return an entry with ``values`` that records in ``accesses``."""
        entry = cls(values)
        entry.accesses = accesses
        return entry

    def __reduce__(self) -> Any:  # a pickle that torch can load without this package
        return dict, (dict(self),)


class WatchedState(defaultdict[Tensor, dict[str, Any]]):
    """An optimizer's ``state``: a dict that records accesses. Copies and pickles are ``defaultdict(dict)``."""

    accesses: AccessRecord | None = None

    @classmethod
    def of(cls, accesses: AccessRecord, entries: Mapping[Tensor, Mapping[str, Any]]) -> WatchedState:
        """Return a state with ``entries``, each a `WatchedEntry`, that records in ``accesses``."""
        state = cls(dict, {param: WatchedEntry.of(accesses, entry) for param, entry in entries.items()})
        state.accesses = accesses
        return state

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))


# A user who puts something into ``state`` may keep a reference to it, so these methods count as reads too.
for _name in ("__setitem__", "__ior__", "pop", "popitem", "update", "setdefault"):
    setattr(WatchedState, _name, _recording(_name, changes=True, reads=True))
for _name in ("__delitem__", "clear"):
    setattr(WatchedState, _name, _recording(_name, changes=True, reads=False))
for _name in ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "clear", "update", "setdefault"):
    setattr(WatchedEntry, _name, _recording(_name, changes=True, reads=False))
# Since __iter__ is overridden, dict(state), {**state} and state.copy() read by __getitem__, which records.
for _name in ("__getitem__", "__iter__", "get", "items", "values"):
    setattr(WatchedState, _name, _recording(_name, changes=False, reads=True))


@dataclass(frozen=True, slots=True)
class Shown:
    """The values put into a parameter's entry in ``state``, and their addresses, which ``.data = x`` changes."""

    keys: tuple[str, ...]
    values: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, values: dict[str, Tensor]) -> Shown:
        """Return ``values`` with their current addresses."""
        tensors = tuple(values.values())
        return cls(_shared(tuple(values)), tensors, tuple(_address(local_of(tensor)) for tensor in tensors))

    def get(self, key: str) -> Tensor | None:
        """Return the tensor put there as ``key``."""
        return self.values[self.keys.index(key)] if key in self.keys else None

    def is_replaced(self, key: str, value: Any) -> bool:
        """Return whether ``value`` is not the tensor put there as ``key``, or has moved to other memory."""
        place = self.keys.index(key)
        return value is not self.values[place] or _address(local_of(value)) != self.addresses[place]


@functools.cache
def _shared(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return one and the same tuple for equal ``keys``."""
    return keys


def _address(tensor: Tensor) -> int:
    """Return the address of ``tensor``, or the identity of its storage if it is empty."""
    # A rank may own no element of a parameter, and must still notice the change that other ranks notice.
    return tensor.data_ptr() or _identity(tensor.untyped_storage())


class Snapshot:
    """``param_groups`` and ``state`` as they were when the shards last matched them.

    Args:
        placed: Ids of the parameters that have a place in a shard.
        shown: The views that the shards put into ``state``.
        accesses: The record of `WatchedState` and `WatchedEntry`; dicts that the user put there do not record, and are
            compared item by item.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        placed: Collection[int],
        shown: Collection[Shown],
        accesses: AccessRecord,
    ) -> None:
        self._groups = list(groups)
        self._params = [list(group["params"]) for group in groups]
        self._accesses = accesses
        accesses.was_changed = False
        self.state = state
        self._note_dicts(state)
        self._note_addresses(shown)
        # Parameters without a place; the first gradient gives them one.
        self.waiting = [param for params in self._params for param in params if id(param) not in placed]

    def _note_dicts(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Note the contents of the dicts that do not record changes."""
        accesses = self._accesses
        self._is_watched = isinstance(state, WatchedState) and state.accesses is accesses
        entries = list(dict.values(state) if isinstance(state, dict) else state.values())
        self._keys, self._all = ([], []) if self._is_watched else (list(state), entries)
        self._entries = [
            entry for entry in entries if type(entry) is not WatchedEntry or entry.accesses is not accesses
        ]
        self._values = _values(self._entries)

    def _note_addresses(self, shown: Collection[Shown]) -> None:
        """Note the addresses of the shards' views; for empty tensors, which have none, the identities of storages."""
        tensors = [local_of(value) for one in shown for value in one.values]
        addresses = [address for one in shown for address in one.addresses]
        is_empty = [tensor.numel() == 0 for tensor in tensors]
        self._empty = list(itertools.compress(tensors, is_empty))
        self._empty_addresses = list(itertools.compress(addresses, is_empty))
        has_elements = list(map(operator.not_, is_empty))
        self._tensors = list(itertools.compress(tensors, has_elements))
        self._addresses = list(itertools.compress(addresses, has_elements))

    def differs(self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Return whether anything was replaced, added, removed or moved since. Local."""
        return self._are_dicts_changed(groups, state) or self._are_tensors_moved()

    def _are_dicts_changed(self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        if self._accesses.was_changed or state is not self.state:
            return True
        if not (_same(groups, self._groups) and all(map(_same, map(_PARAMS, groups), self._params))):
            return True
        if not self._is_watched and not (_same(state, self._keys) and _same(state.values(), self._all)):
            return True
        if sum(map(len, self._entries)) != len(self._values):  # the comparison below stops at the shorter one
            return True
        return not all(map(operator.is_, _iterate(self._entries), self._values))

    def _are_tensors_moved(self) -> bool:
        if self._is_watched and not self._accesses.was_read:
            return False  # without a reference to a tensor, the user cannot have moved it
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
