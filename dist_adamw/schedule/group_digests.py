"""Digests of the hyper-parameters of all groups, which ranks compare at every update."""

from __future__ import annotations

import hashlib
import itertools
import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dist_adamw.plain_data import plain
from dist_adamw.ranks.agreement import Digested, canonical

_NOT_OTHERS = ("params", "param_names", "lr", "weight_decay")
_LASTING = frozenset({float, int, bool, str, type(None)})  # values of these types do not change in place
_chain = itertools.chain.from_iterable


class GroupDigests:
    """Digests of the values in param groups; those that no schedule writes are kept until they change. Local."""

    def __init__(self) -> None:
        self._keys: list[tuple[str, ...]] = []
        self._getters: list[Callable[[Mapping[str, Any]], tuple[Any, ...]]] = []
        self._values: list[tuple[Any, ...]] = []
        self._is_lasting = False  # whether values are known not to change in place
        self._others = Digested("", list)

    def lr(self, groups: Sequence[Mapping[str, Any]]) -> Digested:
        """Return the digest of the groups' lr."""
        return _of_numbers([group["lr"] for group in groups])

    def weight_decay(self, groups: Sequence[Mapping[str, Any]]) -> Digested:
        """Return the digest of the groups' weight decay."""
        return _of_numbers([group.get("weight_decay", 0.0) for group in groups])

    def others(self, groups: Sequence[Mapping[str, Any]]) -> Digested:
        """Return the digest of all other values; a list of dicts."""
        keys = [*map(tuple, groups)]
        if keys != self._keys:
            self._keys, self._values, self._is_lasting = keys, [], False
            self._getters = [*map(_getter, keys)]
        values = [getter(group) for getter, group in zip(self._getters, groups, strict=True)]
        is_known = self._is_lasting and all(map(operator.is_, _chain(values), _chain(self._values)))
        if not is_known:
            self._values, self._is_lasting = values, all(map(_is_lasting, _chain(values)))
            found = [other_values(group) for group in groups]
            self._others = Digested(_hash(canonical({"": found}).encode()), partial(list, found))
        return self._others

    def all_values(self, groups: Sequence[Mapping[str, Any]]) -> Digested:
        """Return one digest of all values; a list of dicts."""
        parts = (self.lr(groups), self.weight_decay(groups), self.others(groups))
        has_decay = ["weight_decay" in group for group in groups]
        return Digested(" ".join(part.digest for part in parts), partial(_joined, parts, has_decay))


def other_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's values without parameters, lr and weight decay, as plain data."""
    return {name: plain(value) for name, value in group.items() if name not in _NOT_OTHERS}


def _joined(parts: Sequence[Digested], has_decay: Sequence[bool]) -> list[dict[str, Any]]:
    lrs, decays, others = (part.value() for part in parts)
    return [
        {"lr": lr, **({"weight_decay": decay} if has else {}), **rest}
        for lr, decay, has, rest in zip(lrs, decays, has_decay, others, strict=True)
    ]


def _getter(keys: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    names = [name for name in keys if name not in _NOT_OTHERS]
    # With one name itemgetter returns no tuple.
    return operator.itemgetter(*names) if len(names) > 1 else lambda group: tuple(group[name] for name in names)


def _is_lasting(value: Any) -> bool:
    return type(value) in _LASTING or (type(value) is tuple and all(map(_is_lasting, value)))


def _of_numbers(values: list[Any]) -> Digested:
    try:
        data = array("d", values)  # tensors too, by their value
    except TypeError:
        return Digested(_hash(canonical({"": values}).encode()), partial(plain, values))
    return Digested(_hash(data.tobytes()), data.tolist)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
