"""Follow backward passes that count as micro-batches, and whose gradients stay in ``param.grad``."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.backward import BackwardPasses
from dist_adamw.optimizer.gradients.forward_passes import ForwardPasses, is_in_backward
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.micro_batch_sender import MicroBatchSender
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.refusals import AFTER_GATHER, SECOND_PASS, USED_TWICE
from dist_adamw.optimizer.gradients.sources import GradientSources, accumulates_into
from dist_adamw.optimizer.gradients.weak_hooks import WeakHook, remove

_gradient = operator.attrgetter("grad")


class MicroBatchPasses(BackwardPasses):
    """The callbacks for ``reproducible=True``.

    After a pass ``param.grad`` is this rank's own gradient, which has been sent: the update does not read it. Each one
    stays until the parameter's next gradient arrives. Autograd would add that one, so a hook that runs before takes the
    old one away.
    """

    def __init__(
        self,
        path: object,
        link: OptimizerLink,
        sources: GradientSources,
        sender: MicroBatchSender,
        messages: RankMessages,
        record: GradientRecord,
        *,
        overlap: bool,
    ) -> None:
        super().__init__(path, link, sources, sender, messages, record, overlap=overlap)
        self._micro_batches = sender
        self._forwards = ForwardPasses()
        self._adds_to_whole = False  # whether the running pass adds to gathered gradients
        self._graph_task, self._accumulates = -1, False  # the graph task of the last hook; whether it changes gradients
        self._arrives = WeakHook(self, "gradient_arrives")
        self._hooked: dict[int, weakref.ref[Tensor]] = {}  # parameters with a hook, by id
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, remove, self._handles).atexit = False

    # ---------------------------------------------------------------- forward

    def hook_parameters(self) -> None:
        """Put hooks on the parameters that require a gradient by now. Local."""
        for param in self._link.params():
            known = self._hooked.get(id(param))
            if param.requires_grad and (known is None or known() is not param):
                self._hooked[id(param)] = ref = weakref.ref(param)
                hook = _Arrival(self._arrives, ref)
                self._handles.append(param.register_hook(hook))  # type: ignore[no-untyped-call]

    def _prepare_gradients(self) -> None:
        if self.is_running and is_in_backward():  # the running pass calls a checkpointed module again
            return
        self.hook_parameters()
        self._look_at_last_pass()
        super()._prepare_gradients()

    def _look_at_last_pass(self) -> None:
        """Note whether the user has changed or discarded the gradients of the last pass. Before the next one does."""
        watch = self._record.watch
        if not (watch.changed() or watch.dropped()):
            return
        if self._is_any_nonzero():
            self._record.was_changed = True
        else:  # as by ``model.zero_grad()``
            self.discard()
            self._micro_batches.forget_zeros()

    def _output_hooks(self) -> list[Callable[[Tensor], object]]:
        return [*super()._output_hooks(), self._forwards.hook()]

    # ---------------------------------------------------------------- backward

    def gradient_arrives(self, param: Tensor, grad: Tensor | None) -> None:
        """Make way for the next gradient of ``param``."""
        if grad is None:  # from a function that does not use it: autograd leaves ``param.grad`` as it is
            return
        if not self.is_running:
            self.backward_begins(grad)
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            self._graph_task, self._accumulates = task, accumulates_into(param)
        if self._accumulates:
            self._micro_batches.make_way(param)

    def _begin(self) -> None:
        self._look_at_last_pass()
        record = self._record
        if record.has_let_go:  # since then they may have been set to zero
            self._micro_batches.forget_zeros()
        record.watch.clear()  # its references would look like the user's
        self._adds_to_whole = record.is_whole and self._is_any_nonzero()
        super()._begin()

    def _after_backward(self, path: object) -> None:
        rounds = self._sender.rounds
        super()._after_backward(path)
        if self._sender.rounds == rounds:  # this was torch.autograd.grad
            self._forwards.forget_pass()
            if self._sender.micro_batches:
                self._watch()
            return
        record = self._record
        if not self._forwards.end_pass(is_first=self._sender.micro_batches == 1):
            record.refusal = SECOND_PASS
        if self._adds_to_whole:
            record.refusal = AFTER_GATHER
        self._watch()

    def _watch(self) -> None:
        self._record.watch.remember(self._sources.watched(self._sender.plan.params))

    # ---------------------------------------------------------------- the update

    def refusal(self) -> int:
        """Return why the update must be refused, as `UpdateReport.change`; 0 if nothing is known. Local."""
        return USED_TWICE if self._are_used_left() else self._record.refusal

    def _are_used_left(self) -> bool:
        """Return whether gradients are left that the last update has used."""
        if not self._record.has_let_go:
            return False
        sent = filter(self._micro_batches.is_sent, self._link.params())
        return any(bool(grad.any()) for grad in map(_gradient, sent))

    def discard(self, *, leave_zeros: bool = False) -> None:
        """See `BackwardPasses`."""
        super().discard(leave_zeros=leave_zeros)
        if leave_zeros:
            self._micro_batches.forget_zeros()


class _Arrival:
    """A hook of a parameter, which it holds weakly."""

    def __init__(self, call: WeakHook, param: weakref.ref[Tensor]) -> None:
        self._call, self._param = call, param

    def __call__(self, grad: Tensor | None) -> None:
        if (param := self._param()) is not None:
            self._call(param, grad)
