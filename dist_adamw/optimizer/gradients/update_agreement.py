"""Make ranks agree, before an update, on which parameters have a gradient and whether any gradient was changed."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.gradients.backward import BackwardPasses
from dist_adamw.optimizer.gradients.handshake import Agreed, RankMessages, UpdateReport
from dist_adamw.optimizer.gradients.micro_batch_sender import MicroBatchSender
from dist_adamw.optimizer.gradients.record import GradientRecord
from dist_adamw.optimizer.gradients.refusals import (
    ACCEPTED,
    CHANGED,
    NOT_CHANGED,
    accepted_local,
    dropped_alone,
    refused,
)
from dist_adamw.optimizer.gradients.registry import Path, gather_from_owners
from dist_adamw.optimizer.gradients.sending import Sender
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.optimizer.gradients.unannounced import UnannouncedGradients
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.run_on_all import first_problem

_gradient, _requires_grad = operator.attrgetter("grad"), operator.attrgetter("requires_grad")


class UpdateAgreement:
    """The ranks' agreement on the gradients of one update.

    Args:
        path: The path of these gradients; held weakly.
        overlap: Send during backward.

    Attributes:
        asks_for_changes: Whether the last `complete` has asked all ranks if there are changes.
        needed_rounds: Rounds into the shard of the rank with the most.
        micro_batches: Those of the update over all ranks, if gradients are kept in the shards.
    """

    def __init__(
        self,
        path: Path,
        sources: GradientSources,
        sender: Sender,
        backward: BackwardPasses,
        unannounced: UnannouncedGradients,
        messages: RankMessages,
        record: GradientRecord,
        *,
        overlap: bool,
    ) -> None:
        self._path, self._sources, self._sender = weakref.ref(path), sources, sender
        self._backward, self._unannounced = backward, unannounced
        self._messages, self._record, self._overlap = messages, record, overlap
        self._has_ended = False
        self._hosts: Sequence[dist.ProcessGroup] = ()
        self.asks_for_changes = False
        self.needed_rounds = self.micro_batches = 0

    def end(self) -> None:
        """Refuse updates from now on, because the optimizer no longer exists on other ranks. Local."""
        self._has_ended = True

    def complete(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        *,
        has_changes: bool,
        options: int,
        check_changes: Callable[[], object],
        problem: str | None = None,
        hosts: Sequence[dist.ProcessGroup] = (),
    ) -> bool:
        """Make sure that every rank has every gradient that some rank has. Collective.

        Args:
            has_changes: Whether the user has changed the optimizer's groups or state on this rank.
            options: Digest of the hyper-parameters of all groups.
            check_changes: Called on every rank if some rank has changes or other hyper-parameters; raises if ranks
                differ.
            problem: With ``reproducible``, why this rank refuses the update.
            hosts: Groups of the same ranks that can reduce host tensors, see `ShardingRanks.comparing`.

        Returns:
            Whether there is any gradient.

        Raises:
            RuntimeError: gradients were changed between backward and update, or there is a problem, on some rank; or a
                module is inside ``no_sync``. On every rank.
        """
        record, sources = self._record, self._sources
        self._hosts = hosts
        self._check_may_update()
        self._finish_backward()
        # DDP itself makes its ranks agree on which of its parameters have a gradient.
        subject = self._unannounced.params() if sources.are_buckets else sources.known
        present = self._present(subject)
        prints = self._unannounced.prints()
        # No rank has a negative count, so a problem on some ranks is a difference.
        count = self._sender.micro_batches if problem is None else -1
        report = self._report(subject, present, prints, count, has_changes=has_changes, options=options)
        agreed = self._agree(report, group, replicas)
        self.needed_rounds, self.micro_batches = agreed.rounds, count * collectives.world_size(group)
        # Checked first: these raise before anything else is sent, and name the cause of other differences.
        if (agreed.has_changes or agreed.options_differ) and self.asks_for_changes:
            check_changes()
        self._refuse_changed(report, agreed, group, replicas)
        self._messages.check_carried()
        reports = [(count, problem)]
        if agreed.micro_batches_differ:
            reports = collectives.all_gather_objects((count, problem), group)
            self.micro_batches = sum(number for number, _ in reports)
        if (refused := first_problem([one for _, one in reports])) is not None:
            raise RuntimeError(refused)
        if agreed.is_reopened and not record.is_reopened:  # another rank ran the module forward since backward
            self._sender.reopen()
        if agreed.is_incomplete:  # in few updates, so the whole list is exchanged only then
            present = list(map(bool, self._largest(present, group, replicas)))
        if agreed.prints_differ:
            self._compare_unlistened(prints, group, replicas)
        if agreed.change and self._unannounced.are_local_used(subject, present):
            raise accepted_local()
        record.is_compared = True
        is_all_there = not (agreed.is_incomplete or record.filled or self._sender.reduces_every_backward)
        if not is_all_there:
            self._fill_in(subject, present)
        return any(present) or self._has_any_in_buckets()

    def _refuse_changed(
        self, report: UpdateReport, agreed: Agreed, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> None:
        if agreed.change >= CHANGED:
            on_this_rank = report.change == agreed.change
            is_reproducible = isinstance(self._sender, MicroBatchSender)
            raise refused(agreed.change, on_this_rank=on_this_rank, is_reproducible=is_reproducible)
        if agreed.dropped_differ and self._are_dropped_alone(group, replicas):
            raise dropped_alone(len(self._record.watch.dropped()))

    def _are_dropped_alone(self, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None) -> bool:
        """Return whether a rank has a gradient that another one has set to None. Collective."""
        if not isinstance(self._sender, MicroBatchSender):  # zeros were filled in, so all ranks had the same gradients
            return True
        known, dropped = self._sources.known, set(map(id, self._record.watch.dropped_params()))
        kept = [id(param) in self._record.in_shard for param in known]
        largest = self._largest([*kept, *(id(param) in dropped for param in known)], group, replicas)
        return any(map(operator.and_, largest[: len(known)], largest[len(known) :]))

    def _compare_unlistened(
        self, prints: list[int], group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> None:
        prints = prints or [0] * len(self._unannounced.params())
        self._unannounced.note_extremes(self._largest([*prints, *map(operator.neg, prints)], group, replicas))

    def _has_any_in_buckets(self) -> bool:
        if not self._sources.are_buckets:
            return False
        return any(grad is not None for grad in map(_gradient, self._sources.known))

    def _check_may_update(self) -> None:
        """Raise if gradients have not been averaged and will not be."""
        if self._has_ended:
            raise RuntimeError(
                "step() of an optimizer that no longer exists on other ranks: another one has been attached to its "
                "module since. Keep both on every rank, or only the new one."
            )
        if not self._sources.synchronises and (self._sender.reduces_every_backward or not self._sender.next):
            raise RuntimeError(
                "step() inside no_sync(): this update's gradients have not been averaged, and an optimizer whose state "
                "is sharded over the ranks cannot update one rank alone. Leave no_sync() before the last backward "
                "pass of an update. For local SGD (Accelerate's LocalSGD) pass shard=False to DistAdamW, and "
                "check_weights_every=0 to dist_adamw.prepare."
            )

    def _finish_backward(self) -> None:
        """Send the buckets that other ranks may be waiting for. Collective."""
        sender = self._sender
        if self._backward.is_running:  # the last backward pass raised here; other ranks have sent all their buckets
            self._backward.finish_broken_pass()
        self._sources.follow_params()
        self._sources.look_at_siblings()
        if not self._sources.are_buckets:
            has_begun = sender.next or self._record.is_reopened
            if self._overlap and not sender.reduces_every_backward and not has_begun:
                sender.send_all()  # nothing arrived here, but other ranks may be waiting in backward
                sender.receive()
            else:
                sender.follow_layout()
        others = self._unannounced.params()
        if others and not self._record.is_compared:
            gather_from_owners(self._path(), others)

    def _present(self, params: Sequence[Tensor]) -> list[bool]:
        """Return which of ``params`` have a gradient from backward, as opposed to zeros that were filled in."""
        present = [grad is not None for grad in self._sender.unsent(params)]
        for param in self._record.watch.dropped_params():
            self._record.in_shard.discard(id(param))
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
        micro_batches: int,
        *,
        has_changes: bool,
        options: int,
    ) -> UpdateReport:
        """Return this rank's report to the others. Local."""
        record, sender = self._record, self._sender
        change = max(ACCEPTED if record.is_accepted else NOT_CHANGED, self._backward.refusal())
        if record.was_changed or record.watch.changed():
            change = max(change, CHANGED)
        dropped = record.watch.dropped()
        # A round frees ``param.grad``, so a gradient that is there now was set since and needs one more round.
        has_leftover = sender.reduces_every_backward and any(g is not None for g in sender.unsent(sender.plan.params))
        return UpdateReport(
            rounds=sender.rounds + has_leftover,
            micro_batches=micro_batches,
            is_missing=_is_missing(subject, present),
            is_reopened=record.is_reopened,
            change=change,
            has_changes=has_changes,
            prints=agreement.fingerprint({"": list(prints)}) if any(prints) else 0,
            options=options,
            # A frozen parameter may lack a gradient, but then it must on all ranks: `is_missing` does not see that.
            pattern=0 if all(present) else agreement.fingerprint({"": list(present)}),
            dropped=agreement.fingerprint({"": dropped}) if dropped else 0,
        )

    def _agree(self, report: UpdateReport, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None) -> Agreed:
        """Combine the ranks' reports. None is exchanged without a channel if DDP has every gradient. Collective."""
        self.asks_for_changes = True
        if self._messages.is_open:
            numbers = self._messages.exchange_reports(report)
            if replicas is not None:
                numbers = self._largest(numbers, replicas, None)
        elif not self._sources.are_buckets or any(map(_requires_grad, self._unannounced.params())):
            numbers = self._largest(report.numbers(), group, replicas)
        else:
            self.asks_for_changes = False
            numbers = report.numbers()
        return Agreed.of(numbers)

    def _largest(
        self, values: Sequence[int], group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> list[int]:
        """Return the largest of each value over all ranks. Collective."""
        groups = [ranks for ranks in (group, replicas) if ranks is not None]
        if not collectives.serves_host(group):
            groups = list(self._hosts) or groups  # reading a result on the device would wait for it
        device = torch.device("cpu") if collectives.serves_host(groups[0]) else self._sources.known[0].device
        largest = torch.tensor(values, dtype=torch.int64, device=device)
        for ranks in groups:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks)
        return [int(n) for n in largest.tolist()]

    def _fill_in(self, params: Sequence[Tensor], present: Sequence[bool]) -> None:
        """Give zeros to parameters that only other ranks have a gradient for; remove ours if no rank has one."""
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


def _is_missing(params: Sequence[Tensor], present: Sequence[bool]) -> bool:
    """Return whether a parameter that requires a gradient has none."""
    if all(present):  # in most updates; ``requires_grad`` of every parameter would take longer to look up
        return False
    return any(param.requires_grad for param, there in zip(params, present, strict=True) if not there)
