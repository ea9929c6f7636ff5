"""Hash all groups' hyper-parameters, to compare them over ranks before every update.

Knows group dicts and tensors of one element; nothing of ranks.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_adamw.ranks import agreement

_NAMES = ("lr", "eps", "weight_decay", "amsgrad", "maximize", "betas")
_options = operator.itemgetter(*_NAMES)
_chain = itertools.chain.from_iterable
# Types whose hash is the same in every process: not str, whose hash is salted, nor None, whose hash was an address.
_HASHED_ALIKE = frozenset({float, int, bool})


class OptionsDigest:
    """62 bits of the hyper-parameters of parameter groups, and of some more numbers.

    A tensor counts by its value where it lies on a CPU, and by its device elsewhere: reading it would make the host
    wait. Plain numbers are hashed only where they are other objects than the last time. Both run in C.
    """

    _last: tuple[tuple[Any, ...], ...] = ()  # plain numbers: a tensor, or a list of betas, may change in place
    _digest = 0

    def of(self, groups: Sequence[Mapping[str, Any]], more: tuple[float, ...]) -> int:
        """The digest of ``groups`` as they are now. Local."""
        try:
            values = (more, *map(_options, groups))
            if len(values) == len(self._last) and all(map(operator.is_, *map(_chain, (values, self._last)))):
                return self._digest
            flat = [*more, *_chain(map(_scalars_and_betas, values[1:]))]
            is_plain = _HASHED_ALIKE.issuperset(map(type, flat))
        except (KeyError, TypeError):  # a group without an option, or betas that are no pair: the update will say so
            is_plain = False
        if is_plain:
            is_lasting = all(type(options[-1]) is tuple for options in values[1:])
            self._last, self._digest = values if is_lasting else (), hash(tuple(flat)) & (1 << 62) - 1
        else:
            self._last = ()
            self._digest = agreement.fingerprint({**describe_options(groups), "": list(more)})
        return self._digest


def _scalars_and_betas(values: tuple[Any, ...]) -> tuple[Any, ...]:
    *scalars, betas = values
    return (*scalars, *betas)


def describe_options(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same for people: each option of each group, by a name such as "lr of group 0"."""
    return {f"{name} of group {g}": _readable(group.get(name)) for g, group in enumerate(groups) for name in _NAMES}


def _readable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else f"a tensor on {value.device.type}"
    if isinstance(value, (tuple, list)):
        return [_readable(one) for one in value]
    return value
