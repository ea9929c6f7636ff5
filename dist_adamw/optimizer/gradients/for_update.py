"""Agree with the other ranks on an update's gradients, and give the update those that this rank owns."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.gradients.backward import BackwardPasses
from dist_adamw.optimizer.gradients.handshake import ACCEPTED, CHANGED, NOT_CHANGED, Agreed, RankMessages, UpdateReport
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.refusals import accepted_local, changed, dropped_alone
from dist_adamw.optimizer.gradients.registry import Path, gather_from_owners
from dist_adamw.optimizer.gradients.sending import Sender, ShardSender
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.optimizer.gradients.unlistened import UnlistenedGradients
from dist_adamw.optimizer.gradients.whole import gather_from_ranks, take_replaced, zeros_for
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.ranks import agreement

_gradient, _requires_grad = operator.attrgetter("grad"), operator.attrgetter("requires_grad")


class UpdateGradients:
    """What the optimizer asks a path for: `complete`, then `arrive`, then `used`; or `make_whole`, or `discard`.

    Args:
        path: Whose gradients these are; held weakly.
        overlap: Send during backward.

    Attributes:
        asks_for_changes: Whether the last `complete` has asked all ranks if there are changes.
    """

    def __init__(
        self,
        path: Path,
        link: OptimizerLink,
        sources: GradientSources,
        sender: Sender,
        backward: BackwardPasses,
        messages: RankMessages,
        record: GradientRecord,
        *,
        overlap: bool,
    ) -> None:
        self._path, self._link, self._sources = weakref.ref(path), link, sources
        self._sender, self._backward = sender, backward
        self._messages, self._record, self._overlap = messages, record, overlap
        self._unlistened = UnlistenedGradients(link, sources, sender, record)
        self.asks_for_changes = False
        self._has_ended = False
        self._needed_rounds = 0  # into the shard: of the rank with the most

    def end(self) -> None:
        """Refuse updates from now on: other ranks have let go of the optimizer. Local."""
        self._has_ended = True

    # ---------------------------------------------------------------- agree

    def complete(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        *,
        has_changes: bool,
        options: int,
        check_changes: Callable[[], object],
    ) -> bool:
        """Make sure that every rank has every gradient that some rank has. Collective.

        Args:
            has_changes: Whether the user has changed the optimizer's groups or state, on this rank.
            options: Digest of the hyper-parameters of all groups.
            check_changes: Called on every rank if some rank has changes or other hyper-parameters; raises if ranks
                are not alike.

        Returns:
            Whether there is any.

        Raises:
            RuntimeError: gradients were changed between backward and update, on some rank; or a module is
                inside ``no_sync``. On every rank.
        """
        record, sources = self._record, self._sources
        self._check_may_update()
        self._finish_backward()
        others = self._unlistened.params()
        if others and not record.is_compared:
            gather_from_owners(self._path(), others)
        subject = others if sources.are_buckets else sources.known  # DDP has seen to its own
        present = self._present(subject)
        prints = self._unlistened.prints()
        report = self._report(subject, present, prints, has_changes=has_changes, options=options)
        agreed = self._agree(report, group, replicas)
        self._needed_rounds = agreed.rounds
        if (agreed.has_changes or agreed.options_differ) and self.asks_for_changes:
            check_changes()
        if agreed.change == CHANGED:
            raise changed(on_this_rank=report.change == CHANGED)
        if agreed.dropped_differ:
            raise dropped_alone(len(record.watch.dropped()))
        if agreed.is_reopened and not record.is_reopened:  # another rank ran the module forward since backward
            self._sender.reopen()
        is_incomplete = agreed.is_missing or agreed.patterns_differ
        if is_incomplete:
            present = [bool(n) for n in self._largest(present, group, replicas)]
        if agreed.prints_differ:
            prints = prints or [0] * len(others)
            self._unlistened.note_extremes(self._largest([*prints, *(-value for value in prints)], group, replicas))
        if agreed.change and self._unlistened.are_local_used(subject, present):
            raise accepted_local()
        record.is_compared = True
        # Without anything filled, shared out or missing, every gradient is there.
        if self._sender.reduces_every_backward or is_incomplete or record.filled:
            self._fill_in(subject, present)
        if any(present):
            return True
        return sources.are_buckets and any(grad is not None for grad in map(_gradient, sources.known))

    def _check_may_update(self) -> None:
        """Raise where gradients have not been averaged, and will not be."""
        if self._has_ended:
            raise RuntimeError(
                "step() of an optimizer that other ranks have let go of: another one has been attached to its module "
                "since. Keep both on every rank, or neither."
            )
        if not self._sources.synchronises and (self._sender.reduces_every_backward or not self._sender.next):
            raise RuntimeError(
                "step() inside no_sync(): this update's gradients have not been averaged, and an optimizer whose state "
                "is shared over the ranks cannot update each rank by itself. Leave no_sync() before the last backward "
                "pass of an update. For local SGD (Accelerate's LocalSGD) pass shard=False to DistAdamW, and "
                "check_weights_every=0 to dist_adamw.prepare."
            )

    def _finish_backward(self) -> None:
        """Send what other ranks may be waiting for. Collective."""
        sender = self._sender
        if self._backward.is_running:  # the last backward pass raised: other ranks have sent all buckets of theirs
            self._backward.finish_broken_pass()
        self._sources.follow_params()
        self._sources.look_at_siblings()
        if self._sources.are_buckets:
            return
        has_begun = sender.next or self._record.is_reopened
        if self._overlap and not sender.reduces_every_backward and not has_begun:
            sender.send_all()  # nothing arrived here, but other ranks may be waiting in backward
            sender.receive()
        else:
            sender.follow_layout()

    def _present(self, params: Sequence[Tensor]) -> list[bool]:
        """Which of ``params`` have a gradient of the user's: in the shard, or there and not zeros of ours."""
        present = [grad is not None for grad in map(_gradient, params)]
        filled, in_shard = self._record.filled, self._record.in_shard
        if not (filled or in_shard):
            return present
        for i, param in enumerate(params):
            present[i] = (present[i] and id(param) not in filled) or id(param) in in_shard
        return present

    def _report(
        self,
        subject: Sequence[Tensor],
        present: Sequence[bool],
        prints: Sequence[int],
        *,
        has_changes: bool,
        options: int,
    ) -> UpdateReport:
        """What this rank tells the others of its gradients. Local."""
        record, sender = self._record, self._sender
        change = ACCEPTED if record.is_accepted else NOT_CHANGED
        if record.was_changed or record.watch.changed():
            change = CHANGED
        dropped = record.watch.dropped()
        has_leftover = sender.reduces_every_backward and any(param.grad is not None for param in sender.plan.params)
        return UpdateReport(
            rounds=sender.rounds + has_leftover,
            is_missing=_is_missing(subject, present),
            is_reopened=record.is_reopened,
            change=change,
            has_changes=has_changes,
            prints=agreement.fingerprint({"": list(prints)}) if any(prints) else 0,
            options=options,
            # Of a frozen parameter nothing is missing, but ranks may differ in whether it has one.
            pattern=0 if all(present) else agreement.fingerprint({"": list(present)}),
            dropped=agreement.fingerprint({"": dropped}) if dropped else 0,
        )

    def _agree(self, report: UpdateReport, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None) -> Agreed:
        """Combine the ranks' reports. Without a channel, where DDP has every gradient, none is needed. Collective."""
        self.asks_for_changes = True
        if self._messages.is_open:
            numbers = self._messages.exchange_reports(report)
            if replicas is not None:
                numbers = self._largest(numbers, replicas, None)
        elif not self._sources.are_buckets or any(map(_requires_grad, self._unlistened.params())):
            numbers = self._largest(report.numbers(), group, replicas)
        else:
            self.asks_for_changes = False
            numbers = report.numbers()
        return Agreed.of(numbers)

    def _largest(
        self, values: Sequence[int], group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> list[int]:
        """The largest of each value over all ranks. Collective."""
        device = self._sources.known[0].device if dist.get_backend(group) != "gloo" else torch.device("cpu")
        largest = torch.tensor(values, dtype=torch.int64, device=device)
        for ranks in (group, replicas):
            if ranks is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks)
        return [int(n) for n in largest.tolist()]

    def _fill_in(self, params: Sequence[Tensor], present: Sequence[bool]) -> None:
        """Give zeros to parameters that have a gradient on other ranks alone; take ours from those without any."""
        record, sender = self._record, self._sender
        for param, is_used in zip(params, present, strict=True):
            if not is_used:
                if id(param) in record.filled:
                    param.grad = None
                continue
            is_in_shard = False
            if sender.reduces_every_backward:
                record.in_shard.add(id(param))
                is_in_shard = id(param) in sender.plan.buckets_of or id(param) in record.kept
            if param.grad is None and not is_in_shard:
                param.grad = torch.zeros_like(param)

    # ---------------------------------------------------------------- take

    def arrive(self) -> None:
        """Send and receive whatever has not been yet. Collective; after `complete` and the layout."""
        sender, record, sources = self._sender, self._record, self._sources
        is_averaged = bool(sender.next or sender.rounds or record.late or record.kept)
        if not is_averaged:  # nothing has been sent by the places that parameters had
            sender.follow_layout(again=True)
        shards = self._link.shards()
        is_laid_out_again = not {id(shard) for shard in sender.owners} <= {id(shard) for shard in shards}
        if not isinstance(sender, ShardSender):
            sender.send_rest()
            sender.receive()
        elif not is_laid_out_again:
            while sender.rounds < self._needed_rounds:
                sender.finish_round()
        # What has been averaged. Others may have whole gradients that another optimizer still needs.
        sent = sender.plan.buckets_of.keys() | record.late | record.kept
        if is_laid_out_again and is_averaged:  # other ranks own it now
            self._gather_from_former_owners(sent)
        others = self._unlistened.params()
        # Another update by the averages of the last one, which are in ``param.grad`` alone by now.
        has_reduced = any(shard.gradients.reduced for shard in sender.owners)
        is_repeated = bool(others) and not sender.reduces_every_backward and not has_reduced
        self._unlistened.take(sources.known if is_laid_out_again or is_repeated else others)
        sender.owners = list(shards)
        if sender.reduces_every_backward:
            for param in sources.known if is_laid_out_again else ():
                if id(param) in sent:
                    param.grad = None
            for shard in self._link.shards():
                shard.gradients.has_grad = [id(param) in record.in_shard for param in shard.params]
            return
        record.watch.remember_written(sources.watched(sender.plan.params))
        sources.tell_siblings()

    def _gather_from_former_owners(self, sent: Collection[int]) -> None:
        """Make whole what was averaged by a layout that is no more. Collective."""
        sender, record = self._sender, self._record
        if sender.reduces_every_backward:
            for shard in sender.owners:
                averaged = record.in_shard.intersection(sent)
                shard.gradients.has_grad = [id(param) in averaged for param in shard.params]
        self.make_whole(sender.owners, sent)
        record.is_whole = False
        sender.next = len(sender.plan.order)
        if sender.reduces_every_backward:
            record.in_shard.update(id(param) for param in self._sources.known if param.grad is not None)

    def make_whole(self, shards: list[Shard] | None = None, only: Collection[int] | None = None) -> None:
        """Let every ``param.grad`` be the average over all ranks. Collective; after `arrive`.

        Args:
            shards: Whose owners have the averages; default: the optimizer's.
            only: Ids of the parameters that have been averaged; default: all. The gradients of others are left alone.
        """
        record, sender = self._record, self._sender
        self._sources.look_at_siblings()
        shards = self._link.shards() if shards is None else shards
        for shard in shards:
            if sender.reduces_every_backward:
                zeros_for(shard.params, shard.gradients.has_grad)
            gather_from_ranks(shard, only)
        sender.rounds = 0
        record.is_reopened = False
        record.filled.clear()
        record.in_shard.clear()
        record.kept.clear()
        if only is None:
            record.late.difference_update(id(param) for shard in shards for param in shard.params)
        self._sources.take_arrivals()
        record.watch.clear()
        sender.begin_round()
        self._sources.tell_siblings()
        record.is_whole = True

    def take_whole(self) -> bool:
        """Let the update take whole gradients as they are now. Whether there is any. Local."""
        self._sources.look_at_siblings()
        for shard in self._link.shards():
            shard.gradients.reduced.clear()
            shard.gradients.has_grad = [param.grad is not None for param in shard.params]
        return any(grad is not None for grad in map(_gradient, self._link.params()))

    def used(self) -> None:
        """An update has been made of the gradients. Until they are set to zero or None, they are averages. Local."""
        record = self._record
        self._messages.number += 1
        record.has_let_go = self._sender.reduces_every_backward and not record.is_whole
        if record.has_let_go:
            record.used = set(record.in_shard)
        self._sender.clear()

    def accept_changes(self) -> None:
        """Let gradients be what they are now. Local.

        Raises:
            RuntimeError: they have not been averaged yet.
        """
        record = self._record
        if self._are_any_local() and (record.was_changed or record.watch.changed()):
            raise RuntimeError(
                "accept_gradients() after attach(overlap=False), or after parameters were added: gradients are local "
                "ones until step(), so a change that is not linear would not be that of their average. Call "
                "gather_gradients() before you change them."
            )
        record.was_changed = False
        others = () if record.is_compared else self._unlistened.params()
        record.is_accepted = record.is_accepted or any(grad is not None for grad in map(_gradient, others))
        if record.watch.replaced():
            for shard in self._sender.owners:
                take_replaced(shard)
        record.watch.accept()

    def _are_any_local(self) -> bool:
        """Whether some watched gradient is known not to have been averaged yet."""
        plan = self._sender.plan
        if self._record.is_compared:
            return False
        if self._sender.next < len(plan.order):
            return True
        for param in self._sources.watched(plan.params):
            if param.grad is not None and param.numel() and id(param) not in plan.buckets_of:
                return True
        return False


def _is_missing(params: Sequence[Tensor], present: Sequence[bool]) -> bool:
    """Return whether a parameter that requires a gradient has none. Most updates have all, on all ranks."""
    if all(present):
        return False
    return any(param.requires_grad for param, there in zip(params, present, strict=True) if not there)
