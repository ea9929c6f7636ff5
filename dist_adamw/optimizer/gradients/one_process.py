"""Average the micro-batches of one process in the order in which any number of ranks would."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.forward_passes import ForwardPasses, is_in_backward, on_backward
from dist_adamw.optimizer.gradients.refusals import changed_between_passes, second_pass
from dist_adamw.optimizer.gradients.weak_hooks import WeakHook, remove
from dist_adamw.optimizer.sharding.memory_order import shaped_like, storage_order
from dist_adamw.optimizer.transport.tree_sum import TreeSum

_gradient = operator.attrgetter("grad")


class MicroBatches:
    """Keeps ``param.grad`` the average of the micro-batches since the last update. Local.

    Each backward pass through an attached module is a micro-batch. Its gradients are taken out before the next pass
    could add to them.

    Args:
        params: Returns the optimizer's parameters.

    Attributes:
        count: The micro-batches since the last update.
    """

    def __init__(self, params: Callable[[], Sequence[Tensor]]) -> None:
        self.count = 0
        self._forwards = ForwardPasses()
        self._all = weakref.WeakMethod(params)
        self._sums: dict[int, TreeSum] = {}  # by id of parameter, which `_params` keeps alive
        self._params: list[Tensor] = []
        self._written: list[tuple[Tensor | None, int]] = []  # the average of each parameter, and its version
        self._is_used = False  # whether an update has used the averages
        self._is_running = False
        self._refusal: RuntimeError | None = None  # of the running pass, if it turns out to produce gradients
        self._zeros: list[Tensor] = []  # parameters with zeros as gradient before that pass, which count, as in torch
        self._refused: list[Tensor | None] = []  # the gradients before that pass
        self._synchronises: list[bool] = []  # the user's ``require_backward_grad_sync``, while it is overridden
        self._modules: list[weakref.ref[nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[int, weakref.ref[Tensor]] = {}  # parameters with a hook, by id
        weakref.finalize(self, remove, self._handles).atexit = False

    def listen(self, model: nn.Module) -> None:
        """Follow the backward passes through ``model``."""
        if all(ref() is not model for ref in self._modules):
            self._modules.append(weakref.ref(model))
            self._handles.append(model.register_forward_pre_hook(WeakHook(self, "before_forward")))
            self._handles.append(model.register_forward_hook(WeakHook(self, "after_forward"), always_call=True))

        self._hook_parameters()

    def _hook_parameters(self) -> None:
        """Have each parameter mark the beginning of a pass too: it may be used outside of the modules."""
        for param in [] if (method := self._all()) is None else method():
            known = self._hooked.get(id(param))
            if param.requires_grad and (known is None or known() is not param):
                self._hooked[id(param)] = weakref.ref(param)
                # Called before autograd adds to ``param.grad``.
                self._handles.append(param.register_hook(WeakHook(self, "backward_begins")))  # type: ignore[no-untyped-call]

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Count a backward pass that raised, as torch keeps the gradients from before the error."""
        if not torch.is_grad_enabled():
            return
        self._hook_parameters()
        if self._is_running and not is_in_backward():
            self._is_running = False
            if all(param.grad is None for param in self._params):  # discarded
                self.forget()
            else:
                self._after_backward()
        if isinstance(module, DistributedDataParallel):
            self._synchronises.append(module.require_backward_grad_sync)
            module.require_backward_grad_sync = False  # its reducer expects gradients to stay in its buckets

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook the output's gradient, which marks the beginning of the backward pass."""
        if isinstance(module, DistributedDataParallel) and self._synchronises:
            module.require_backward_grad_sync = self._synchronises.pop()
        on_backward(output, WeakHook(self, "backward_begins"), self._forwards.hook())

    def backward_begins(self, grad: Tensor) -> None:
        """Take the average of earlier micro-batches out of ``param.grad``."""
        if self._is_running:
            return
        self._is_running = True
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self._take_out()

    def _take_out(self) -> None:
        params = [] if (method := self._all()) is None else list(method())
        self._refusal = None
        self._zeros = []
        if self._is_used or self._are_discarded():
            self.forget()
            self._zeros = [param for param in params if param.grad is not None and not bool(param.grad.any())]
        elif self.count and not self._are_as_written():
            self._refusal = changed_between_passes()
        self._refused = [] if self._refusal is None else list(map(_gradient, params))
        self._params = params
        for param in params:
            param.grad = None

    def _are_as_written(self) -> bool:
        return len(self._params) == len(self._written) and all(
            param.grad is grad and (grad is None or grad._version == version)
            for param, (grad, version) in zip(self._params, self._written, strict=True)
        )

    def _are_discarded(self) -> bool:
        """Return whether the user has set the gradients to zero or None."""
        grads = [grad for grad in map(_gradient, self._params) if grad is not None]
        return not self._are_as_written() and not any(bool(grad.any()) for grad in grads)

    @torch.no_grad()
    def _after_backward(self) -> None:
        self._is_running = False
        there = [param for param in self._params if param.grad is not None]
        refusal = self._refusal
        if there and refusal is None and not self._forwards.end_pass(is_first=not self.count):
            refusal = second_pass()
        if not there or refusal is not None:  # without gradients this was torch.autograd.grad
            self._forwards.forget_pass()
            self._put_back()
            if there and refusal is not None:
                raise refusal
            return
        for param in self._zeros:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
                there.append(param)
        for param in there:
            assert param.grad is not None
            grad = storage_order(param.grad, like=param)
            sums = self._sum_of(param)
            while sums.count < self.count:  # it had no gradient in earlier micro-batches
                sums.add(1, [(0, [grad.new_zeros(()).expand_as(grad)])])
            sums.add(1, [(0, [grad])])
        self.count += 1
        self._show()

    def _put_back(self) -> None:
        """Leave gradients as they were before the pass."""
        if self._refusal is None:
            self._show()
            return
        for param, grad in zip(self._params, self._refused, strict=True):
            param.grad = grad
        self._refused = []

    def _sum_of(self, param: Tensor) -> TreeSum:
        if id(param) not in self._sums:
            wide = torch.promote_types(param.dtype, torch.float32)
            self._sums[id(param)] = TreeSum(param.numel(), dtype=wide, device=param.device)
        return self._sums[id(param)]

    def _show(self) -> None:
        """Write the averages to ``param.grad``."""
        for param in self._params:
            sums = self._sums.get(id(param))
            if sums is not None and sums.count:
                flat = torch.empty(param.numel(), dtype=param.dtype, device=param.device)
                sums.write([(0, flat)], self.count)
                param.grad = shaped_like(flat, param)
        self._written = [(p.grad, 0 if p.grad is None else p.grad._version) for p in self._params]

    def used(self) -> None:
        """Record that an update has used the averages, so that the next backward pass begins with none."""
        self._is_used = True

    @property
    def number(self) -> int:
        """The number of the micro-batch in its update that the next backward pass will be."""
        return 0 if self._is_used or self._are_discarded() else self.count

    def forget(self) -> None:
        """Forget all micro-batches."""
        self.count, self._is_used, self._written = 0, False, []
        known = set(map(id, self._params))
        self._sums = {key: sums for key, sums in self._sums.items() if key in known}
        for sums in self._sums.values():
            sums.clear()
