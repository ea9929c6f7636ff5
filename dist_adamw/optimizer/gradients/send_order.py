"""Decide which buckets are sent, in which order, and with which parameters."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from dist_adamw.optimizer.sharding.shard import Shard


class Plan:
    """The buckets of some shards in the order in which they are sent, and the parameters in them.

    Args:
        shards: All shards of an optimizer.
        listened: Ids of the parameters whose gradients are announced. Others are in no bucket here.
        position: The place of parameters in their modules, by id: backward reaches the last ones first.

    Attributes:
        params: Announced parameters that have a shard.
        order: Shard and number of each bucket.
        members: Ids of the parameters in each bucket.
        indices: The same parameters by their index in the shard.
        params_of: The same parameters.
        buckets_of: Positions in ``order`` of a parameter's buckets, by its id.
        place_of: Shard and index in it of a parameter, by its id.
    """

    def __init__(self, shards: Sequence[Shard], listened: Set[int], position: Mapping[int, int]) -> None:
        self.shards, self.listened = list(shards), listened
        self.order: list[tuple[Shard, int]] = []
        self.members: list[set[int]] = []
        self.indices: list[list[int]] = []
        self.params_of: list[list[Tensor]] = []
        self.buckets_of: dict[int, list[int]] = {}
        self.place_of: dict[int, tuple[Shard, int]] = {}
        self.params: list[Tensor] = []
        for shard in self.shards:
            for i, param in enumerate(shard.params):
                if id(param) in listened:
                    self.place_of[id(param)] = (shard, i)
                    self.params.append(param)
        for shard, k in _by_arrival(self.shards, position):
            self._add(shard, k)

    def _add(self, shard: Shard, k: int) -> None:
        pieces = shard.layout.pieces(*shard.layout.bucket(k))
        places = [(piece.param, shard.params[piece.param]) for piece in pieces]
        places = [(i, param) for i, param in places if id(param) in self.listened]
        if not places:
            return
        for _, param in places:
            self.buckets_of.setdefault(id(param), []).append(len(self.order))
        self.order.append((shard, k))
        self.indices.append([i for i, _ in places])
        self.params_of.append([param for _, param in places])
        self.members.append({id(param) for _, param in places})


def _by_arrival(shards: Sequence[Shard], position: Mapping[int, int]) -> list[tuple[Shard, int]]:
    """Return shard and number of each bucket in the order in which backward completes them.

    Those of one shard are in descending order, whatever the order of its parameters.
    """
    buckets: list[tuple[int, Shard, int]] = []
    for shard in reversed(shards):
        earliest = max(position.values(), default=0)
        for k in reversed(range(shard.layout.num_buckets)):
            # Backward reaches the parameter with the earliest place last.
            places = [position.get(id(param), earliest) for param in shard.members(k)]
            earliest = min([earliest, *places])
            buckets.append((earliest, shard, k))
    buckets.sort(key=operator.itemgetter(0), reverse=True)
    return [(shard, k) for _, shard, k in buckets]


def longest_wait(plan: Plan, arrived: Sequence[int]) -> int:
    """Return how many elements of later buckets, at most, arrive while a bucket waits for its last gradient. Local.

    Args:
        arrived: Ids of parameters, in the order in which their gradients arrived. Others are left out of account.
    """
    numels = {id(param): param.numel() for param in plan.params}
    by_now: dict[int, int] = {}  # elements that have arrived with each parameter, those before it included
    total = 0
    for key in arrived:
        total += numels.get(key, 0)
        by_now[key] = total
    ready = needed = longest = 0
    seen: set[int] = set()
    for members in plan.members:
        new = (members & by_now.keys()) - seen
        seen |= new
        ready = max([ready, *map(by_now.__getitem__, new)])
        needed += sum(map(numels.__getitem__, new))
        longest = max(longest, ready - needed)
    return longest
