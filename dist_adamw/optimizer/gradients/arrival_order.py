"""Lay parameters out in the order in which their gradients really arrive, as DDP's reducer does after its first pass.

Until then the layout has the order of the attached modules. If modules are not used in the order in which they are
registered, the bucket that is sent first is complete last, and nothing is sent during backward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist

from dist_adamw.optimizer.gradients.send_order import longest_wait
from dist_adamw.optimizer.gradients.sending import Sender, ShardSender
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.ranks import collectives


class ArrivalOrder:
    """Replaces the order of the modules with that in which gradients arrived on the first rank."""

    def __init__(self, sources: GradientSources, sender: Sender) -> None:
        self._sources, self._sender = sources, sender

    @property
    def is_due(self) -> bool:
        """Whether ranks must call `adopt` in this update: the first after `attach`; with DDP's buckets the second too.

        DDP replaces its buckets before its second pass. Local; the same on all ranks.
        """
        return self._sources.arrivals.updates_to_record > 0

    def adopt(self, groups: Sequence[dist.ProcessGroup], rounds: int) -> bool:
        """Use the first rank's order of arrival if buckets can then be sent earlier. Collective, in `step`.

        Args:
            groups: The ranks that share state, and perhaps the replicas.
            rounds: Rounds into the shard of the rank with the most. They are finished with the present layout.

        Returns:
            Whether the order has changed, so that the shards must be arranged again. The same on all ranks.
        """
        arrived = self._sources.arrivals.end_update()
        is_first = all(collectives.rank(group) == 0 for group in groups)
        places = self._broadcast(self._better_order(arrived) if is_first else [], groups)
        known = self._sources.known
        # After a change of parameters on one rank alone, an update raises where it compares them.
        if not places or len(places) > len(known):
            return False
        if isinstance(self._sender, ShardSender):
            while self._sender.rounds < rounds:
                self._sender.finish_round()
        self._sources.order = {id(known[i]): place for place, i in enumerate(places)}
        return True

    def _better_order(self, arrived: Sequence[int]) -> list[int]:
        """Return the optimizer's parameters, by index, in the order of a better layout; empty to keep the present one.

        Args:
            arrived: Ids of parameters, in the order in which their gradients arrived.
        """
        plan = self._sender.plan
        bucket_numel = sum(shard.layout.bucket_numel for shard in plan.shards)
        # A bucket holds parameters that arrive one after the other, in whatever order: that costs nothing.
        if longest_wait(plan, arrived) <= bucket_numel:
            return []
        index = {id(param): i for i, param in enumerate(self._sources.known)}
        order = self._sources.order
        merged = merge(sorted(order, key=order.__getitem__), [key for key in arrived if key in index])
        return [index[key] for key in merged]

    def _broadcast(self, places: list[int], groups: Sequence[dist.ProcessGroup]) -> list[int]:
        """Return the first rank's ``places``. Collective."""
        # The device on which the groups can send. With NCCL alone the host waits, once.
        device = torch.device("cpu") if collectives.serves_host(groups[0]) else self._sources.known[0].device
        count = torch.tensor([len(places)], device=device)
        for group in groups:
            dist.broadcast(count, group_src=0, group=group)
        sent = torch.zeros(int(count), dtype=torch.int64, device=device)
        sent[: len(places)] = torch.tensor(places, dtype=torch.int64)
        for group in groups if len(sent) else ():
            dist.broadcast(sent, group_src=0, group=group)
        return [int(place) for place in sent.tolist()]


def merge(order: Sequence[int], arrived: Collection[int]) -> list[int]:
    """Return ids in the order of a layout, which is sent from its end: ``arrived`` in reverse.

    Args:
        order: The order of the modules. An id that has not arrived stays behind the one that precedes it here.
        arrived: Ids in the order of arrival.
    """
    has_arrived = set(arrived)
    followers: dict[int | None, list[int]] = {None: []}
    leader: int | None = None
    for key in order:
        if key in has_arrived:
            leader = key
        else:
            followers.setdefault(leader, []).append(key)
    merged = followers[None]
    for key in reversed(list(arrived)):
        merged += [key, *followers.get(key, ())]
    return merged
