"""The path of gradients from backward to their owners, which `DistAdamW.attach` sets up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from torch import Tensor, nn

from dist_adamw.optimizer.gradients.arrival_order import ArrivalOrder
from dist_adamw.optimizer.gradients.backward import BackwardPasses
from dist_adamw.optimizer.gradients.ddp import PackedBucket
from dist_adamw.optimizer.gradients.gradients_for_update import GradientsForUpdate
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.micro_batch_passes import MicroBatchPasses
from dist_adamw.optimizer.gradients.micro_batch_sender import MicroBatchSender
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.sending import Sender, ShardSender
from dist_adamw.optimizer.gradients.sources import GradientSources
from dist_adamw.optimizer.gradients.unannounced import UnannouncedGradients
from dist_adamw.optimizer.gradients.update_agreement import UpdateAgreement
from dist_adamw.optimizer.sharding.shard import Shard


class GradientPath:
    """Takes one attached optimizer's gradients from its modules to the update.

    Args:
        params: The optimizer's method that returns every parameter, in order.
        shards: Its method that returns the shards, and builds them if there are none yet.
        gather: Its method that makes every gradient whole. Collective.
        overlap: Send during backward.
        reduce_every_backward: Keep averages in flat memory of the shards, and free ``param.grad``.
        reproducible: Do so, and average micro-batches in the order of their numbers.

    Attributes:
        sources: The modules and hooks that announce gradients.
        sender: Sends buckets to their owners.
        backward: The callbacks of forward and backward passes.
        agreement: The ranks' agreement on the gradients of an update.
        order: The order in which parameters are laid out.
        update: Provides the update's gradients.
        messages: Tells other ranks what this one is about to do.
        record: The state of the gradients since the last update.
    """

    def __init__(
        self,
        params: Callable[[], list[Tensor]],
        shards: Callable[[], list[Shard]],
        gather: Callable[[], None],
        *,
        overlap: bool,
        reduce_every_backward: bool,
        reproducible: bool = False,
    ) -> None:
        self.overlap, self.reproducible = overlap, reproducible
        self.reduce_every_backward = reduce_every_backward or reproducible
        self.messages = RankMessages()
        self.record = GradientRecord()
        self._link = OptimizerLink(params, shards, gather)
        self.sources = GradientSources(self, self._link, self.messages, self.record)
        parts = (self.messages, self.record)
        self.sender: Sender
        self.backward: BackwardPasses
        if reproducible:
            self.sender = micro_batches = MicroBatchSender(self._link, self.sources, *parts)
            self.backward = MicroBatchPasses(self, self._link, self.sources, micro_batches, *parts, overlap=overlap)
        else:
            kind = ShardSender if reduce_every_backward else Sender
            self.sender = kind(self._link, self.sources, *parts)
            self.backward = BackwardPasses(self, self._link, self.sources, self.sender, *parts, overlap=overlap)
        self.sources.call(self.backward)
        unannounced = UnannouncedGradients(self._link, self.sources, self.sender, self.record)
        self.agreement = UpdateAgreement(
            self, self.sources, self.sender, self.backward, unannounced, *parts, overlap=overlap
        )
        self.order = ArrivalOrder(self.sources, self.sender)
        self.update = GradientsForUpdate(self._link, self.sources, self.sender, unannounced, *parts)

    @property
    def is_whole(self) -> bool:
        """Whether every ``param.grad`` is the average over all ranks, which the update uses as it is."""
        return self.record.is_whole

    def listen(self, model: nn.Module) -> None:
        """Receive the gradients of ``model``, in place of any other path. Local.

        Raises:
            ValueError: ``model`` is wrapped so that this path cannot serve it.
        """
        self.sources.add(model, reduces_every_backward=self.reduce_every_backward, reproducible=self.reproducible)
        if isinstance(self.backward, MicroBatchPasses):
            self.backward.hook_parameters()  # forward passes of the module may go past its hooks

    def forget_layout(self) -> None:
        """Discard gradients and the plan after the shards were replaced. Local."""
        self.sources.look_at_siblings()
        self.backward.discard()
        self.sender.forget_layout()

    def join_backward(self) -> None:
        """Take part in a backward pass of the other ranks, with zeros. Collective."""
        assert isinstance(self.sender, ShardSender)
        self.sender.finish_round(is_micro_batch=False)

    # ---------------------------------------------------------------- for other optimizers' paths

    @property
    def listening(self) -> Set[int]:
        """Ids of the parameters whose gradients it receives; a new set whenever they change."""
        return self.sources.ids

    @property
    def is_sending(self) -> bool:
        """Whether a backward pass of an attached module is running."""
        return self.backward.is_running

    @property
    def has_let_go(self) -> bool:
        """Whether an update has used gradients and freed them, so that no ``param.grad`` has them."""
        return self.record.has_let_go

    @property
    def used_ids(self) -> set[int]:
        """Ids of the parameters whose gradients that update used."""
        return self.record.used

    def keep_alive(self) -> object:
        """Return an object that keeps the path and its optimizer alive."""
        return self, self._link.keep_alive()

    def look_for_changes(self) -> None:
        """Note changes to its gradients, before another optimizer writes to the buffers that hold them. Local."""
        self.backward.look_for_changes()

    def release(self, ids: Iterable[int]) -> None:
        """Stop receiving gradients of these parameters, which another path now receives. Collective."""
        self.sources.look_at_siblings()
        # Gradients that were not set to zero are parts of averages, and the other path would take them as local ones.
        if self.sender.next or (self.sender.rounds and not self.has_let_go):
            self.gather_gradients()
        self.backward.discard()
        self.sources.remove(set(ids))

    def end(self) -> None:
        """Stop receiving and sending gradients, because the optimizer no longer exists on other ranks. Local."""
        self.sender.leave_parts()
        self.sources.end()
        self.sender.drop()
        self.messages.close()
        self.backward.is_running = False
        self.agreement.end()

    def gather_gradients(self) -> None:
        """Have the optimizer make every gradient whole. Collective.

        Raises:
            RuntimeError: the optimizer has used them and freed them.
        """
        if self.has_let_go:
            raise RuntimeError(
                "another optimizer is attached to some of these parameters with reduce_every_backward=True: its step() "
                "has used and freed their gradients. Call step() of this optimizer before that one's, or attach "
                "without reduce_every_backward."
            )
        if not self.is_whole:
            self._link.gather()

    # ---------------------------------------------------------------- for DDP's reducers

    def bucket_came(self, packed: PackedBucket | None) -> None:
        """Take the gradients of one of DDP's buckets; None if DDP copies them to ``param.grad`` later."""
        self.backward.bucket_came(packed)

    def follow_params(self) -> None:
        """Follow parameters that were added to the optimizer or removed from it. Local."""
        self.sources.follow_params()

    def announce_change(self) -> None:
        """Raise if another rank has other parameters. Collective.

        Raises:
            AgreementError: names the rank. On every rank.
        """
        self.messages.meet_for_change()

    def announce_round(self) -> None:
        """Raise if another rank is not in a backward pass of the same update. Collective.

        Raises:
            AgreementError: names the rank and what it does. On every rank.
        """
        if self.messages.is_open and self.is_sending:
            self.messages.announce_round()
            self.messages.check_all_answers()
