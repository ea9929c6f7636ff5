"""Send every micro-batch to the owners, and leave the rank's own gradients in ``param.grad``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from dist_adamw.optimizer.gradients.change_watch import mark_parts
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.sending import ShardSender
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.optimizer.sharding.bucket_gradients import BucketGradients
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.base import InFlightBucket


class MicroBatchSender(ShardSender):
    """Averages micro-batches, one for each backward pass of each rank, in the order of their numbers.

    Micro-batch j of rank r has the number ``j W + r``. A round brings W of them, so their order does not depend on W.
    ``param.grad`` stays the rank's own gradient until the parameter's next one arrives, see `MicroBatchPasses`.
    """

    def __init__(
        self, link: OptimizerLink, sources: GradientSources, messages: RankMessages, record: GradientRecord
    ) -> None:
        self._sent: dict[int, weakref.ref[Tensor]] = {}  # by id of parameter: the gradient that was sent
        super().__init__(link, sources, messages, record)

    def leave_parts(self) -> None:
        """Mark gradients of which this rank has only its own part. Local."""
        super().leave_parts()
        mark_parts(grad for ref in self._sent.values() if (grad := ref()) is not None)

    def is_sent(self, param: Tensor) -> bool:
        """Return whether ``param.grad`` was sent, and stays only for the user to read."""
        ref = self._sent.get(id(param))
        return ref is not None and param.grad is not None and ref() is param.grad

    def make_way(self, param: Tensor) -> None:
        """Remove a gradient that was sent before autograd adds the next one to it. Local."""
        if self.is_sent(param):
            param.grad = None
        self._sent.pop(id(param), None)

    def forget_zeros(self) -> None:
        """Treat gradients that were set to zero as new ones, which count as gradients of the next update. Local."""
        self._sent = {key: ref for key, ref in self._sent.items() if (grad := ref()) is not None and bool(grad.any())}

    def unsent(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """See `Sender`."""
        return [None if self.is_sent(param) else param.grad for param in params]

    def finish_round(self, *, is_micro_batch: bool = True) -> None:
        """See `ShardSender`."""
        self.follow_layout()
        self.enter(self._sources.arrivals.take())
        super().finish_round(is_micro_batch=is_micro_batch)

    def _let_go(self, shard: Shard, k: int) -> None:
        for param in self._in_no_later_bucket(shard, k):
            if param.grad is not None:
                self._sent[id(param)] = weakref.ref(param.grad)

    def _take(self, shard: Shard, sent: InFlightBucket, gradients: BucketGradients) -> None:
        assert shard.transport is not None
        shard.transport.finish_terms(sent, shard.gradients.tree_sum(sent.bucket))
        gradients.packer.give_back(gradients)

    def complete(self, micro_batches: int, *, later: bool) -> None:
        """See `ShardSender`."""
        for shard in self.owners:
            shard.gradients.finish_tree_sums(micro_batches, later=later)

    def clear(self) -> None:
        """Forget the gradients of this update, which were used or discarded. Local; the same on every rank."""
        for shard in self.owners:
            shard.gradients.clear_tree_sums()
        super().clear()
