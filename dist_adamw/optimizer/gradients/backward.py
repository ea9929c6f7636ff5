"""Follow forward and backward passes: trigger sending, and record the gradients when backward has ended."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from dist_adamw.optimizer.gradients.ddp import PackedBucket
from dist_adamw.optimizer.gradients.forward_passes import on_backward
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.refusals import left_before_backward
from dist_adamw.optimizer.gradients.sending import Sender, ShardSender, averages_in
from dist_adamw.optimizer.gradients.sources import GradientSources, accumulates_now
from dist_adamw.optimizer.gradients.weak_hooks import WeakHook

_gradient = operator.attrgetter("grad")


class BackwardPasses:
    """The callbacks of hooks on modules and parameters.

    Args:
        path: Kept alive while a backward pass runs; held weakly otherwise.
        overlap: Send during backward.

    Attributes:
        is_running: Whether a backward pass of an attached module is running.
    """

    def __init__(
        self,
        path: object,
        link: OptimizerLink,
        sources: GradientSources,
        sender: Sender,
        messages: RankMessages,
        record: GradientRecord,
        *,
        overlap: bool,
    ) -> None:
        _exclude_from_compilation()
        self._path, self._link, self._sources, self._sender = weakref.ref(path), link, sources, sender
        self._messages, self._record, self._overlap = messages, record, overlap
        self.is_running = False
        self._has_heard = False  # whether this backward pass has reached a parameter
        self._before_pass = (False, False, False, False)  # flags to restore if the pass brings no gradient

    # ---------------------------------------------------------------- forward

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Prepare gradients for the backward pass of the forward pass that begins."""
        if not torch.is_grad_enabled():  # no backward pass will follow
            return
        if isinstance(module, DistributedDataParallel) and module._join_config.enable:
            raise RuntimeError(
                "DistributedDataParallel.join() is not supported after DistAdamW.attach(): a rank that has run out of "
                "data would not send its gradients. Give every rank the same number of batches (dist_adamw.prepare "
                "does), or do not call attach()."
            )
        with torch.no_grad():
            self._prepare_gradients()

    def _prepare_gradients(self) -> None:
        """Make gradients safe for backward to add to: either none, or sums of local ones."""
        sender, record = self._sender, self._record
        self._messages.check_groups()
        if self.is_running:  # the last backward raised before its end
            self.is_running = False
            sender.receive()
        if not (sender.plan.shards or any(map(is_lazy, self._sources.known))):
            # Refuse invalid ``optimizer.state`` now: an error in the middle of backward would leave DDP unusable.
            self._link.shards()
        self.look_for_changes()
        self._sources.streams.clear()
        # Arrivals of a backward pass that raised, or inside no_sync, must not count for the next one.
        self.keep_arrivals()
        sender.is_prepared = False
        record.watch.clear()  # backward is about to change the gradients
        for reducer in self._sources.reducers():
            reducer.restore_views()
        if (sender.next or record.late) and not sender.reduces_every_backward:
            # ``param.grad`` holds averages. Backward adds local gradients to them, so make them sums again.
            if any(param.grad is not None for param in self._sources.known):
                sender.reopen()
            else:
                self.discard()

    def look_for_changes(self) -> None:
        """Note whether the user changed gradients since backward. The update shares this: other ranks may not have."""
        record = self._record
        record.was_changed = record.was_changed or (record.watch.changed() and self._is_any_nonzero())

    def _is_any_nonzero(self) -> bool:
        """Return whether some gradient has a nonzero element."""
        # ``model.zero_grad(set_to_none=False)`` writes to gradients too, and is not a change to refuse.
        return any(bool(grad.any()) for grad in map(_gradient, self._sources.known) if grad is not None)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook the output's gradient, which marks the beginning of the backward pass."""
        # Autograd calls back at the end of the graph task in which the callback is queued. A parameter's hook may run
        # in an inner one, that of a segment checkpointed with use_reentrant=True; the output's hook does not.
        on_backward(output, *self._output_hooks())

    def _output_hooks(self) -> list[Callable[[Tensor], object]]:
        return [WeakHook(self, "backward_begins")]

    # ---------------------------------------------------------------- backward

    def backward_begins(self, grad: Tensor) -> None:
        """Begin to follow a backward pass, on the gradient of an attached module's output."""
        if not self.is_running:
            self.keep_arrivals()  # of a backward pass inside DDP's no_sync
            if self._sends_now:
                self._begin()
            else:
                self._sender.follow_layout()
                self._sender.prepare()

    @property
    def _sends_now(self) -> bool:
        return self._sources.synchronises or self._sender.reduces_every_backward

    def keep_arrivals(self) -> None:
        """Keep gradients that have arrived in a pass that does not send them, and forget that they have. Local."""
        self._sender.take_in(self._sources.arrivals.take())

    def look_at_arrivals(self, param: Tensor) -> None:
        """Send the buckets that are ready. A hook on some parameters; the others only record their arrival.

        ``param`` itself counts from the next call on: hooks that were registered on it later than this one have not
        run yet, and may change its gradient.
        """
        self._sources.streams.note(param)
        if not self._sends_now:
            if not self._sender.is_prepared:  # the pass did not begin at an attached module's output
                self._sender.follow_layout()
                self._sender.prepare()
            self._sender.take_in(self._sources.arrivals.take())
            self._record.filled.discard(id(param))  # backward has added to the zeros, so they are a gradient now
            self._sources.arrivals.note(param)
            return
        if not self.is_running:
            self._begin()
        self._has_heard = True
        self._sender.enter(self._sources.arrivals.take())
        if self._overlap:
            self._sender.send_ready()
        self._sources.arrivals.note(param)

    def bucket_came(self, packed: PackedBucket | None) -> None:
        """Record one of DDP's buckets as complete, and send the buckets that are ready. Collective."""
        if not self.is_running:
            self._begin()
        self._messages.announce_round()  # even if nothing is sent: DDP waits for its ranks at the end of backward
        if packed is None:
            return
        self._sender.enter_bucket(packed)
        if self._overlap:
            self._sender.send_ready()

    def _begin(self) -> None:
        """Follow the layout, and have autograd call back at the end. Called before the first gradient of a backward."""
        record, sources = self._record, self._sources
        # Saved because the pass may turn out to be ``torch.autograd.grad``, which changes no gradient.
        self._before_pass = (record.has_begun, record.is_whole, record.is_compared, record.has_let_go)
        self.is_running, self._has_heard, record.has_begun = True, False, True
        record.is_whole = record.is_compared = record.has_let_go = False
        # The partial holds the path strongly: the user may drop the optimizer during backward, and other ranks wait.
        _when_backward_is_over(functools.partial(self._after_backward, self._path()))
        heard = sources.ids
        self._sender.follow_layout()
        self._sender.prepare()
        # The forward pass has already told DDP not to average this pass, so a parameter that left since then, without
        # its hook, would keep a local gradient.
        has_left = sources.ids is not heard and not heard <= sources.known_ids
        if sources.is_ddp and has_left and sources.has_ddp_aside():
            raise left_before_backward()

    @torch.no_grad()
    def _after_backward(self, path: object) -> None:
        """Send the remaining buckets. The argument keeps ``path`` alive until then."""
        self.is_running = False
        sources, sender, record = self._sources, self._sender, self._record
        has_gradients = self._has_heard or sources.are_buckets or sources.arrivals.has_any
        if not (has_gradients or accumulates_now(sources.modules())):
            # This was torch.autograd.grad, with respect to an input for example: there is no gradient to send yet.
            record.has_begun, record.is_whole, record.is_compared, record.has_let_go = self._before_pass
            return
        if isinstance(sender, ShardSender):
            sender.finish_round()
            return
        if self._overlap and sources.are_buckets:
            sender.send_ready(may_wait=True)
        elif self._overlap and not sources.wait_for_ddp():
            sender.send_all()
        elif not sources.are_buckets:
            sender.enter(sources.arrivals.take())
        sender.receive()
        # DDP's own callback may be queued after this one and write gradients, so queue the watch behind it.
        _when_backward_is_over(functools.partial(self._begin_watch, path))

    def finish_broken_pass(self) -> None:
        """Send what a backward pass that raised has not sent. As in torch, gradients from before the error count."""
        self.is_running = False
        if isinstance(self._sender, ShardSender):
            self._sender.finish_round()
            return
        if self._overlap and not self._sources.are_buckets:
            self._sender.send_all()
        self._sender.receive()

    @torch.no_grad()
    def _begin_watch(self, path: object) -> None:
        """Remember the gradients as they are, to detect changes before the update."""
        sources, sender = self._sources, self._sender
        if self._overlap and sources.wait_for_ddp():  # DDP has written its gradients by now
            if not sources.are_buckets:
                sender.send_all()
            elif all(grad is not None for grad in map(_gradient, sender.plan.params)):
                sender.send_rest()
            sender.receive()
        for reducer in sources.reducers():
            reducer.note_views()
        self._record.watch.remember(sources.watched(sender.plan.params), averages_in(sender.owners))
        sources.tell_siblings()

    def refusal(self) -> int:
        """Return why the update must be refused, as `UpdateReport.change`; 0 if nothing is known. Local."""
        return self._record.refusal

    def discard(self, *, leave_zeros: bool = False) -> None:
        """Drop gradients that arrived. The same on every rank; after `look_at_siblings`.

        Args:
            leave_zeros: Put zeros where gradients were freed: torch counts zeros as a gradient.
        """
        record, sender = self._record, self._sender
        self.is_running = False
        sender.receive()  # buckets left in flight by a backward that raised
        self._sources.arrivals.take()
        record.has_let_go = False
        # A discarded round counts like an update, so a rank that does not discard it is detected as out of step.
        self._messages.number += record.has_begun
        for param in sender.plan.params if record.filled else ():
            if id(param) in record.filled:  # our zeros; no backward pass has reached the parameter
                param.grad = None
        let_go = record.used | record.in_shard if leave_zeros else ()
        for param in self._link.params() if let_go else ():
            if param.grad is None and id(param) in let_go:
                param.grad = torch.zeros_like(param)
        record.used.clear()
        sender.clear()
        record.late.clear()
        record.is_compared = record.is_whole = record.was_changed = False
        sender.begin_round()


def _when_backward_is_over(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


@functools.cache
def _exclude_from_compilation() -> None:
    """Keep torch.compile out of the module hooks."""
    # Done when the first path is made, not at import: torch.compiler.disable imports torch._dynamo.
    for name in ("before_forward", "after_forward"):
        hook = getattr(BackwardPasses, name)
        setattr(BackwardPasses, name, torch.compiler.disable(hook))  # type: ignore[no-untyped-call]
