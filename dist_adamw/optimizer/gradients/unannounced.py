"""Average gradients that no hook announces: of a module that is not attached, or of a parameter unfrozen since.

They are compared only in ``step``, because a DDP module that they belong to may not have averaged them before. A
gradient with the same bits on all ranks is used as it is; others are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import Tensor

from dist_adamw.optimizer.gradients.gather_gradients import flat_gradient
from dist_adamw.optimizer.gradients.micro_batch_sender import MicroBatchSender
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.send_order import Plan
from dist_adamw.optimizer.gradients.sending import Sender
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.optimizer.sharding.fingerprints import fingerprints
from dist_adamw.optimizer.sharding.shard import Shard


class UnannouncedGradients:
    """The gradients of an optimizer's parameters for which no bucket is sent during backward."""

    def __init__(self, link: OptimizerLink, sources: GradientSources, sender: Sender, record: GradientRecord) -> None:
        self._link, self._sources, self._sender, self._record = link, sources, sender, record
        self._found_for: tuple[Plan, list[Tensor]] | None = None
        self._params: list[Tensor] = []

    def params(self) -> list[Tensor]:
        """Return the parameters with elements for which no bucket is sent. Local."""
        plan, known = self._sender.plan, self._sources.known
        if self._found_for is None or self._found_for[0] is not plan or self._found_for[1] is not known:
            self._found_for = (plan, known)
            self._params = [param for param in known if id(param) not in plan.buckets_of and param.numel()]
        return self._params

    def prints(self) -> list[int]:
        """Return fingerprints of gradients that may be the same on all ranks; 0 for none or a local one. Local."""
        params = self.params()
        if self._record.is_compared or not params:
            return []
        local = self._record.local
        asked = [i for i, param in enumerate(params) if param.grad is not None and id(param) not in local]
        prints = [0] * len(params)
        for i, value in zip(asked, fingerprints([params[i].grad for i in asked]), strict=True):  # type: ignore[misc]
            prints[i] = value >> 2 | 1  # fits into an int64 with its negative, and is never 0
        return prints

    def note_extremes(self, extremes: Sequence[int]) -> None:
        """Note which gradients differ over ranks, and so are local ones. Local.

        Args:
            extremes: The largest print of each parameter over all ranks, then minus the smallest ones.
        """
        params = self.params()
        most, minus_least = extremes[: len(params)], extremes[len(params) :]
        for param, high, low in zip(params, most, minus_least, strict=True):
            if high != -low:
                self._record.local.add(id(param))

    def are_local_used(self, params: Sequence[Tensor], present: Sequence[bool]) -> bool:
        """Return whether the update uses a local gradient of a parameter for which no bucket is sent. Local.

        Args:
            params: Parameters of the optimizer.
            present: Whether each has a gradient on some rank.
        """
        for param, is_used in zip(params, present, strict=True):
            if is_used and id(param) in self._record.local and id(param) not in self._sender.plan.buckets_of:
                return True
        return False

    def take(self, params: Sequence[Tensor]) -> None:
        """Average the local gradients of ``params``, and take this rank's runs of whole ones. Collective."""
        record, into_shard = self._record, self._sender.reduces_every_backward
        taken = {id(param) for param in params if param.grad is not None}
        late = (taken & record.local) - record.late - self._sender.plan.buckets_of.keys()
        if late and isinstance(self._sender, MicroBatchSender):
            raise RuntimeError(
                f"reproducible=True: {len(late)} parameters have gradients that were not summed in the order of the "
                "micro-batches, because they were frozen or in no group when their module was attached, or are in a "
                "module that is not. Attach every module, with requires_grad=True and all parameters in the groups; "
                "freeze parameters only afterwards."
            )
        for shard in self._link.shards() if taken else []:
            self._take_in_shard(shard, taken, late)
        record.late |= late
        if into_shard:
            for param in params:
                if id(param) in late:
                    param.grad = None
                    record.late.discard(id(param))
                    record.kept.add(id(param))
        if late:
            self._sources.add_latecomers(late)

    def _take_in_shard(self, shard: Shard, taken: Set[int], late: Set[int]) -> None:
        assert shard.transport is not None
        flat: list[Tensor | None] = []
        sent: list[Tensor | None] = []
        for i, param in enumerate(shard.params):
            is_taken = id(param) in taken and param.grad is not None
            view = flat_gradient(shard, i) if is_taken else None
            flat.append(view)
            sent.append(view if id(param) in late else None)
        for k in range(shard.layout.num_buckets):
            members = {id(param) for param in shard.members(k)}
            if members.isdisjoint(taken):
                continue
            # The same on all ranks: `local` and `late` follow from numbers that they have exchanged.
            if not members.isdisjoint(late):
                self._average(shard, k, sent)
            self._take_runs(shard, k, flat, late)

    def _average(self, shard: Shard, k: int, flat: Sequence[Tensor | None]) -> None:
        """Average bucket ``k`` of ``flat``, and write the averages to the runs that this rank owns. Collective."""
        transport = shard.transport
        assert transport is not None
        gradients = shard.gradients.packed(k, {i: grad for i, grad in enumerate(flat) if grad is not None}, transport)
        transport.finish_reduce(transport.start_reduce(k, gradients.parts), gradients.into)
        gradients.packer.write_back(k, gradients)

    def _take_runs(self, shard: Shard, k: int, flat: Sequence[Tensor | None], late: Set[int]) -> None:
        """Give the update this rank's runs of ``flat`` in bucket ``k``; those of ``late`` may be freed afterwards."""
        into_shard = self._sender.reduces_every_backward
        pieces = shard.owned.pieces[k]
        into: list[Tensor | None] = list(shard.gradients.reduced.get(k) or [None] * len(pieces))
        memory = shard.gradients.accumulated_runs(k) if into_shard else []
        for j, piece in enumerate(pieces):
            whole = flat[piece.param]
            if whole is None:
                continue
            run = whole[piece.start : piece.stop]
            is_let_go = into_shard and id(shard.params[piece.param]) in late
            into[j] = memory[j].copy_(run) if is_let_go else run
        shard.gradients.reduced[k] = into
