"""Provide the gradients that the update uses on this rank, or whole ones for the user."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

from torch import Tensor

from dist_adamw.optimizer.gradients.gather_gradients import gather_from_ranks, take_replaced, zeros_for
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.micro_batch_sender import MicroBatchSender
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.refusals import CHANGED, refused
from dist_adamw.optimizer.gradients.sending import Sender, ShardSender, averages_in
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.optimizer.gradients.unannounced import UnannouncedGradients
from dist_adamw.optimizer.sharding.moved_state import carry_averages
from dist_adamw.optimizer.sharding.shard import Shard

_gradient = operator.attrgetter("grad")


class GradientsForUpdate:
    """Gradients that the ranks have agreed on.

    Call `arrive` and then `used` for an update, or `make_whole` for the user.
    """

    def __init__(
        self,
        link: OptimizerLink,
        sources: GradientSources,
        sender: Sender,
        unannounced: UnannouncedGradients,
        messages: RankMessages,
        record: GradientRecord,
    ) -> None:
        self._link, self._sources, self._sender, self._unannounced = link, sources, sender, unannounced
        self._messages, self._record = messages, record

    def arrive(self, needed_rounds: int, micro_batches: int, *, for_update: bool, divides: bool) -> None:
        """Send and receive the remaining gradients. Collective; after `UpdateAgreement.complete` and the layout.

        Args:
            needed_rounds: Rounds into the shard of the rank with the most.
            micro_batches: Those of this update over all ranks, if gradients are kept in the shards.
            for_update: Whether an update follows at once, so that the user cannot change them before it.
            divides: Whether it finishes sums bucket by bucket, see `ShardSender.complete`.
        """
        sender, record = self._sender, self._record
        is_averaged = bool(sender.next or sender.rounds or record.late or record.kept)
        if not is_averaged:  # nothing has been sent with the old layout, so the new one can be used
            sender.follow_layout(again=True)
        shards = self._link.shards()
        is_laid_out_again = not {id(shard) for shard in sender.owners} <= {id(shard) for shard in shards}
        if is_laid_out_again and is_averaged:
            self._complete(micro_batches, later=False)
            is_laid_out_again = not self._carry_averages(shards)
        self._send_rest(0 if is_laid_out_again else needed_rounds)
        self._complete(micro_batches, later=divides)
        # Only these have been averaged; the rest may be whole gradients that another optimizer still needs.
        sent = sender.plan.buckets_of.keys() | record.late | record.kept
        if is_laid_out_again and is_averaged:  # the averages lie with owners of the old layout
            self._gather_from_former_owners(sent)
        self._unannounced.take(self._not_taken_yet(is_laid_out_again))
        sender.owners = list(shards)
        if sender.reduces_every_backward:
            self._keep_in_shards(sent if is_laid_out_again else ())
        elif for_update:
            record.watch.clear()
            self._sources.tell_siblings()
        else:
            record.watch.remember_written(self._sources.watched(sender.plan.params), averages_in(sender.owners))
            self._sources.tell_siblings()

    def _send_rest(self, needed_rounds: int) -> None:
        sender = self._sender
        if not isinstance(sender, ShardSender):
            sender.send_rest()
            sender.receive()
            return
        while sender.rounds < needed_rounds:
            sender.finish_round()

    def _complete(self, micro_batches: int, *, later: bool) -> None:
        if isinstance(self._sender, ShardSender):
            self._sender.complete(micro_batches, later=later)

    def _not_taken_yet(self, is_laid_out_again: bool) -> Sequence[Tensor]:
        """Return the parameters whose gradients no owner has received."""
        others = self._unannounced.params()
        if is_laid_out_again:
            return self._sources.known
        if others and not self._sender.reduces_every_backward:
            # A second update with the averages of the last one, which are only in ``param.grad`` by now.
            is_repeated = not any(shard.gradients.reduced for shard in self._sender.owners)
            if is_repeated:
                return self._sources.known
        return others

    def _keep_in_shards(self, moved: Collection[int]) -> None:
        """Free ``param.grad`` of the parameters with these ids, whose averages have moved to other shards."""
        for param in self._sources.known if moved else ():
            if id(param) in moved:
                param.grad = None
        for shard in self._link.shards():
            shard.gradients.has_grad = [id(param) in self._record.in_shard for param in shard.params]

    def _carry_averages(self, shards: Sequence[Shard]) -> bool:
        """Move averages that are kept in shards to ``shards``, if these have the same parameters. Collective.

        Whole gradients would take the memory that ``reduce_every_backward`` saves.

        Returns:
            Whether they have.
        """
        sender = self._sender
        before, now = ({id(param) for shard in some for param in shard.params} for some in (sender.owners, shards))
        if not isinstance(sender, ShardSender) or before != now:
            return False
        carry_averages(sender.owners, shards)
        sender.follow_layout(again=True)
        for shard, k in sender.plan.order:
            shard.gradients.reduced[k] = list(shard.gradients.accumulated_runs(k))
        return True

    def _gather_from_former_owners(self, sent: Collection[int]) -> None:
        """Make gradients whole that were averaged with a layout that has been replaced. Collective."""
        sender, record = self._sender, self._record
        if sender.reduces_every_backward:
            for shard in sender.owners:
                averaged = record.in_shard.intersection(sent)
                shard.gradients.has_grad = [id(param) in averaged for param in shard.params]
        self.make_whole(sender.owners, sent)
        record.is_whole = False  # only those that had been sent are whole
        sender.next = len(sender.plan.order)
        if sender.reduces_every_backward:
            record.in_shard.update(id(param) for param in self._sources.known if param.grad is not None)

    def make_whole(self, shards: list[Shard] | None = None, only: Collection[int] | None = None) -> None:
        """Make every ``param.grad`` the average over all ranks. Collective; after `arrive`.

        Args:
            shards: The shards whose owners have the averages; default: the optimizer's.
            only: Ids of the parameters that have been averaged; default: all. The gradients of others are left alone.
        """
        record, sender = self._record, self._sender
        self._sources.look_at_siblings()
        shards = self._link.shards() if shards is None else shards
        for shard in shards:
            if sender.reduces_every_backward:
                zeros_for(shard.params, shard.gradients.has_grad)
            gather_from_ranks(shard, only)
        sender.rounds = sender.micro_batches = 0
        record.is_reopened = False
        record.filled.clear()
        record.in_shard.clear()
        record.kept.clear()
        if only is None:
            record.late.difference_update(id(param) for shard in shards for param in shard.params)
        self._sources.arrivals.take()
        record.watch.clear()
        sender.begin_round()
        self._sources.tell_siblings()
        record.is_whole = True

    def take_whole(self) -> bool:
        """Have the update use whole gradients as they are now; return whether there are any. Local."""
        self._sources.look_at_siblings()
        for shard in self._link.shards():
            shard.gradients.reduced.clear()
            shard.gradients.has_grad = [param.grad is not None for param in shard.params]
        return any(grad is not None for grad in map(_gradient, self._link.params()))

    def used(self) -> None:
        """Record that an update has used the gradients. They stay averages until set to zero or None. Local."""
        record = self._record
        self._messages.number += 1
        record.has_let_go = self._sender.reduces_every_backward and not record.is_whole
        if record.has_let_go:
            record.used = set(record.in_shard)
        self._sender.clear()

    def accept_changes(self) -> None:
        """Accept the gradients as they are now. Local.

        Raises:
            RuntimeError: they have not been averaged yet.
        """
        record = self._record
        if isinstance(self._sender, MicroBatchSender) and (record.was_changed or record.watch.changed()):
            raise refused(CHANGED, on_this_rank=True, is_reproducible=True)
        # A change of local gradients is fine only if it commutes with averaging, and nothing shows whether it does.
        if self._are_any_local() and (record.was_changed or record.watch.changed()):
            raise RuntimeError(
                "accept_gradients() was called after attach(overlap=False), or after parameters were added: gradients "
                "are local until step(), and a nonlinear change of local gradients is not the same change of their "
                "average. Call gather_gradients() before you change them."
            )
        record.was_changed = False
        others = () if record.is_compared else self._unannounced.params()
        record.is_accepted = record.is_accepted or any(grad is not None for grad in map(_gradient, others))
        if record.watch.replaced():
            for shard in self._sender.owners:
                take_replaced(shard)
        record.watch.accept(averages_in(self._sender.owners))

    def _are_any_local(self) -> bool:
        """Return whether some watched gradient is known not to have been averaged yet."""
        plan = self._sender.plan
        if self._record.is_compared:
            return False
        if self._sender.next < len(plan.order):
            return True
        for param in self._sources.watched(plan.params):
            if param.grad is not None and param.numel() and id(param) not in plan.buckets_of:
                return True
        return False
