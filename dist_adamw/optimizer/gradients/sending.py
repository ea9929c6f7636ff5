"""Hand buckets of gradients to the transport, in the same order on every rank.

Buckets are sent in one fixed order, last parameters first, whatever the order of gradients. During backward, a bucket
is sent once its last gradient has arrived and the bucket before it has been sent. A round is every bucket sent once.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Sequence, Set

import torch
from torch import Tensor

from dist_adamw.optimizer.gradients.change_watch import mark_parts
from dist_adamw.optimizer.gradients.ddp import PackedBucket
from dist_adamw.optimizer.gradients.gather_gradients import flat_gradient, turn_into_sums
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.refusals import too_late
from dist_adamw.optimizer.gradients.send_order import Plan
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.optimizer.sharding.bucket_gradients import BucketGradients
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT, InFlightBucket

_gradient = operator.attrgetter("grad")


class Sender:
    """Reduces gradients into memory of the shards, or in DDP's buckets. One round per update.

    Attributes:
        plan: The plan of the present round.
        owners: The shards whose layout averages have: the plan's, or those of the last update.
        next: The position in the plan of the next bucket to send.
        is_prepared: Whether `prepare` was called for the present pass.
        rounds: Rounds into the shard since the last update; 0 here.
        micro_batches: Those rounds in which this rank had a backward pass; 0 here.
        reduces_every_backward: Whether averages are kept in the shard and ``param.grad`` is freed.
    """

    reduces_every_backward = False
    rounds = 0
    micro_batches = 0

    def __init__(
        self, link: OptimizerLink, sources: GradientSources, messages: RankMessages, record: GradientRecord
    ) -> None:
        self._link, self._sources, self._messages, self._record = link, sources, messages, record
        self.plan = Plan([], sources.ids, {})
        self.owners: list[Shard] = []
        self._flat: dict[int, list[Tensor | None]] = {}  # by id of shard: the flat gradients to send
        self._in_flight: deque[tuple[Shard, InFlightBucket, BucketGradients]] = deque()
        self.next = 0
        self.is_prepared = False
        self.begin_round()

    def __del__(self) -> None:  # the optimizer is gone, and with it the only way to gather its gradients
        self.leave_parts()

    def leave_parts(self) -> None:
        """Mark gradients of which this rank has only a part, since nothing will gather them. Local."""
        if self.next and not self._record.is_whole:
            mark_parts(grad for param in self.plan.params if (grad := param.grad) is not None)
        self.next = 0

    # ---------------------------------------------------------------- rounds

    def begin_round(self) -> None:
        """Start a round: no bucket of the plan has been sent. Local."""
        self.next = 0
        self._waiting = [set(members) for members in self.plan.members]
        self._checked: int | None = None  # the sources' revision at which the plan was known to match the shards
        self._messages.begin_round()

    def follow_layout(self, *, again: bool = False) -> None:
        """Make a new plan if shards or parameters have changed. Called at the first gradient of a round.

        Args:
            again: Check again even if that was done in this round.
        """
        # Once a bucket has been sent the plan is fixed: other ranks receive by it.
        if self.next or (self._checked == self._sources.revision and not again):
            return
        self._sources.follow_params()
        shards = self._link.shards()
        self._checked = self._sources.revision
        if (
            self.plan.listened is not self._sources.ids
            or len(shards) != len(self.plan.shards)
            or any(map(operator.is_not, shards, self.plan.shards))
        ):
            self.plan = Plan(shards, self._sources.ids, self._sources.order)
            self.owners = self.plan.shards
            self._flat = {id(shard): [None] * len(shard.params) for shard in shards}
            self._record.local &= self._sources.known_ids
            self.begin_round()
            self._checked = self._sources.revision

    def forget_layout(self) -> None:
        """Drop the plan after the shards were replaced. Local."""
        self.plan, self.owners, self._flat = Plan([], self._sources.ids, {}), [], {}
        self.begin_round()

    # ---------------------------------------------------------------- gradients arrive

    def enter(self, params: Collection[Tensor]) -> None:
        """Note that the gradients of ``params`` have arrived, and move small ones to memory that stays. Local.

        Raises:
            RuntimeError: the bucket of one of them has been sent already.
        """
        self.take_in(params, large=False)
        arrived = set(map(id, params))
        for members in self.plan.members[: self.next]:
            if not members.isdisjoint(arrived):
                raise too_late(next(param for param in params if id(param) in members))
        for waiting in self._waiting[self.next :]:
            waiting.difference_update(arrived)

    def prepare(self) -> None:
        """Make sure that a pass overwrites no gradient that the user holds. Local; with no bucket in flight."""
        self.is_prepared = True
        for shard in {id(shard): shard for shard, _ in self.plan.order}.values():
            assert shard.transport is not None
            shard.gradients.prepare(shard.transport, moves=self._moves_gradients)

    def take_in(self, params: Collection[Tensor], *, large: bool = True) -> None:
        """Move gradients that have arrived to memory that stays. Local.

        Args:
            large: Also large ones, because they are not sent in this pass.
        """
        if not (self._moves_gradients and self.is_prepared):
            return
        arrived: dict[int, tuple[Shard, list[int]]] = {}
        for param in params:
            place = self.plan.place_of.get(id(param))
            if place is not None:
                arrived.setdefault(id(place[0]), (place[0], []))[1].append(place[1])
        for shard, indices in arrived.values():
            with self._sources.streams.joined(shard.steps.device):
                shard.gradients.take_in(indices, large=large)

    @property
    def _moves_gradients(self) -> bool:
        """Whether gradients are moved to memory of the shards. If DDP averages some, it expects them in its buckets."""
        return not (self._sources.are_buckets or self._sources.wait_for_ddp())

    def enter_bucket(self, packed: PackedBucket) -> None:
        """Note that the gradients of one of DDP's buckets have arrived. Local; raises as `enter`."""
        if packed.plan is not self.plan:
            packed.enter(self.plan)
        if packed.buckets and packed.buckets[0] < self.next:
            raise too_late(packed.params[0])
        self._sources.arrivals.bucket_arrived(packed.params, self._sources.order)
        packed.reorder()
        for shard, i, flat in packed.places:
            self._flat[id(shard)][i] = flat
        for n in packed.buckets:
            self._waiting[n] -= packed.keys

    # ---------------------------------------------------------------- send

    def send_ready(self, *, may_wait: bool = False) -> None:
        """Send buckets whose gradients have arrived. Collective.

        Args:
            may_wait: Whether backward is over. During backward, gradients of several optimizers, or of DDP's own
                buckets, may arrive in another order on another rank, so two ranks could wait for each other.
        """
        while self.next < len(self._waiting) and not self._waiting[self.next]:
            if not may_wait and self._must_not_wait():
                return
            self._send_next()

    def _must_not_wait(self) -> bool:
        if self._messages.is_news:  # must be compared first, which waits for the other ranks
            return True
        transport = self.plan.order[self.next][0].transport
        assert transport is not None
        is_full = len(self._in_flight) == MAX_IN_FLIGHT
        return (is_full or not transport.is_open) and self._sources.has_company()

    def send_all(self) -> None:
        """Send the remaining buckets, with zeros for missing gradients. Collective.

        Called at the end of every backward, so that no rank waits for a bucket that another one sends in its update.
        """
        self.follow_layout()
        self.enter(self._sources.arrivals.take())
        if not self.is_prepared:  # there was no backward pass here
            self.prepare()
        for param in self.plan.params:
            if param.grad is None and id(param) in self.plan.buckets_of:
                shard, i = self.plan.place_of[id(param)]
                shard.gradients.fill_in_zeros(i)
                self._record.filled.add(id(param))
        while self.next < len(self.plan.order):
            self._send_next()

    def send_rest(self) -> None:
        """Send the buckets that no hook has sent, except those without any gradient. Collective."""
        if not self.is_prepared:  # there was no backward pass here
            self.prepare()
        # Ranks have agreed on which parameters have a gradient, so all of them skip the same buckets.
        while self.next < len(self.plan.order):
            if any(grad is not None for grad in map(_gradient, self.plan.params_of[self.next])):
                with self._sources.streams.joined(self.plan.order[self.next][0].steps.device):
                    self._start(self.next, self._from_params(self.next))
            self.next += 1

    def _send_next(self) -> None:
        n = self.next
        with self._sources.streams.joined(self.plan.order[n][0].steps.device):
            gradients = self._from_ddp(n) if self._sources.are_buckets else self._from_params(n)
            self.next += 1
            self._start(n, gradients)

    def _from_ddp(self, n: int) -> BucketGradients:
        """Return the gradients of a bucket of the plan from DDP's buckets."""
        (shard, k), indices = self.plan.order[n], self.plan.indices[n]
        assert shard.transport is not None
        flat = {i: grad for i in indices if (grad := self._flat[id(shard)][i]) is not None}
        return shard.gradients.packed(k, flat, shard.transport)

    @torch.no_grad()
    def _from_params(self, n: int) -> BucketGradients:
        """Return the gradients of a bucket of the plan from ``param.grad``."""
        (shard, k), indices = self.plan.order[n], self.plan.indices[n]
        assert shard.transport is not None
        grads = self.unsent(self.plan.params_of[n])
        if self._moves_gradients:
            moved = shard.gradients.to_send(k, indices, grads, shard.order)
            if moved is not None:
                return moved
        there = [i for i, grad in zip(indices, grads, strict=True) if grad is not None]
        return shard.gradients.packed(k, {i: flat_gradient(shard, i) for i in there}, shard.transport)

    def unsent(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of ``params`` that are still to be sent; None for those without one. Local."""
        return list(map(_gradient, params))

    @torch.no_grad()
    def _start(self, n: int, gradients: BucketGradients) -> None:
        shard, k = self.plan.order[n]
        assert shard.transport is not None
        if len(self._in_flight) == MAX_IN_FLIGHT:  # each bucket in flight needs staging memory
            self.receive(1)
        self._messages.announce_round()
        if self._messages.is_news or not shard.transport.is_open:
            self._messages.check_answer()  # gloo aborts the process when it receives a bucket of another size
        self._in_flight.append((shard, shard.transport.start_reduce(k, gradients.parts), gradients))

    @torch.no_grad()
    def receive(self, count: int | None = None) -> None:
        """Wait for the oldest ``count`` buckets (default: all) and average them. Collective."""
        self._messages.check_answer()
        while self._in_flight and count != 0:
            self._take(*self._in_flight.popleft())
            count = None if count is None else count - 1

    def _take(self, shard: Shard, sent: InFlightBucket, gradients: BucketGradients) -> None:
        assert shard.transport is not None
        shard.transport.finish_reduce(sent, gradients.into)
        shard.gradients.received(sent.bucket, gradients)

    def drop(self) -> None:
        """Forget the buckets in flight, because no rank sends to this one any more. Local."""
        self._in_flight.clear()

    # ---------------------------------------------------------------- between updates

    def reopen(self) -> None:
        """Turn averages back into sums of local gradients, so that backward can add to them. Local."""
        self._sources.look_at_siblings()
        # Kept by bucket, not by parameter: a parameter in several buckets may have been sent only in part.
        sent = {(id(shard), k) for shard, k in self.plan.order[: self.next]}
        # If the last update replaced the shards, it has sent every bucket.
        is_laid_out_again = set(map(id, self.owners)) != set(map(id, self.plan.shards))
        late = self._record.late
        averaged = late | self.plan.buckets_of.keys()
        for shard in self._link.shards():
            averages_in: list[Set[int]] = []
            for k in range(shard.layout.num_buckets):
                was_sent = is_laid_out_again or (id(shard), k) in sent
                averages_in.append(averaged if was_sent else late)
            turn_into_sums(shard, averages_in)
        self._record.is_reopened = True
        self._record.late.clear()
        self.begin_round()
        self._sources.tell_siblings()

    def clear(self) -> None:
        """Forget the gradients of this update, which were used or discarded. Local; the same on every rank."""
        self._record.clear_round()
        self.is_prepared = False
        self._sources.arrivals.take()
        self._record.watch.clear()
        for shard in self.owners:
            shard.gradients.reduced.clear()
        # These references would keep gradients alive that the user sets to None. DDP's buckets live anyway.
        if not _are_buckets_settled(self._sources):
            for shard in self.plan.shards:
                self._flat[id(shard)] = [None] * len(shard.params)
        self._sources.tell_siblings()


def averages_in(shards: Sequence[Shard]) -> list[Tensor]:
    """Return the owned pieces of gradients that have been averaged. Local."""
    reduced = [runs for shard in shards for runs in shard.gradients.reduced.values()]
    return [run for runs in reduced for run in runs if run is not None]


def _are_buckets_settled(sources: GradientSources) -> bool:
    """Return whether gradients lie in DDP's buckets, and DDP will not replace these."""
    if not sources.are_buckets:
        return False
    # A list, since every reducer must be called.
    are_settled = [reducer.forget_unless_settled() for reducer in sources.reducers()]
    return all(are_settled)


class ShardSender(Sender):
    """Reduces gradients into flat memory of the shards, and frees ``param.grad``. One round per backward pass.

    Attributes:
        rounds: Rounds since the last update.
        micro_batches: Those in which this rank had a backward pass.
    """

    reduces_every_backward = True

    def leave_parts(self) -> None:
        """Leave nothing to mark, since ``param.grad`` holds no part of a gradient. Local."""
        self.next = 0

    def finish_round(self, *, is_micro_batch: bool = True) -> None:
        """Send the remaining buckets, with zeros for missing gradients, and wait for all of them. Collective.

        Args:
            is_micro_batch: Whether this rank had a backward pass.
        """
        self.follow_layout()
        while self.next < len(self.plan.order):
            self._send_next()
        self.receive()
        self.rounds += 1
        self.micro_batches += is_micro_batch
        self.begin_round()

    @property
    def _moves_gradients(self) -> bool:
        return False

    def complete(self, micro_batches: int, *, later: bool) -> None:
        """Make averages of what the rounds have left in the shards. Local, before the averages are read.

        Args:
            micro_batches: Those of this update, over all ranks.
            later: Whether the update calls `OwnedGradients.finish_tree_sum` before it reads a bucket.
        """

    @torch.no_grad()
    def _start(self, n: int, gradients: BucketGradients) -> None:
        params = self.plan.params_of[n]
        sent = [param for param, grad in zip(params, self.unsent(params), strict=True) if grad is not None]
        self._record.in_shard.update(map(id, sent))
        super()._start(n, gradients)
        self._let_go(*self.plan.order[n])  # ``gradients`` keeps those that are sent without a copy

    def _take(self, shard: Shard, sent: InFlightBucket, gradients: BucketGradients) -> None:
        assert shard.transport is not None
        # The first round overwrites what the last update left there.
        accumulated = shard.gradients.accumulated(sent.bucket)
        into = [part.in_slice(accumulated) for part in shard.transport.owned_parts(sent.bucket)]
        shard.transport.finish_reduce(sent, into, add=self.rounds > 0)
        gradients.packer.give_back(gradients)
        shard.gradients.reduced[sent.bucket] = list(shard.gradients.accumulated_runs(sent.bucket))

    def _let_go(self, shard: Shard, k: int) -> None:
        """Free the gradients that no later bucket needs."""
        for param in self._in_no_later_bucket(shard, k):
            param.grad = None

    def _in_no_later_bucket(self, shard: Shard, k: int) -> list[Tensor]:
        """Return the parameters of bucket ``k`` that are in none of those sent after it."""
        # The last bucket is sent first, so the bucket with a parameter's first element is the last to need it.
        pieces = shard.layout.pieces(*shard.layout.bucket(k))
        params = [shard.params[piece.param] for piece in pieces if piece.start == 0]
        return [param for param in params if id(param) in self.plan.buckets_of]

    def clear(self) -> None:
        """Forget the gradients of this update, which were used or discarded. Local; the same on every rank."""
        self.rounds = self.micro_batches = 0
        super().clear()
        self.begin_round()
