"""Random numbers of a forward pass that depend on the micro-batch, and not on the rank that computes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.weak_hooks import WeakHook, remove
from dist_adamw.ranks import agreement

_active: list[KeyedRandom] = []  # whose forward pass runs, outermost first


class KeyedRandom:
    """Seeds torch's generators for each forward pass of a training module, and restores them afterwards. Local.

    Also refuses forward passes that change buffers.

    Args:
        seed: The same on all ranks.
        place: The optimizer's method that returns the number of the update and that of the micro-batch in it.
    """

    def __init__(self, seed: int, place: Callable[[], tuple[int, int]]) -> None:
        self._seed, self._place = seed, weakref.WeakMethod(place)
        self._passes = 0  # forward passes since the last backward pass
        self._before: list[_Before | None] = []  # a stack, since forward passes may nest
        self._modules: list[weakref.ref[nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, remove, self._handles).atexit = False

    def listen(self, model: nn.Module) -> None:
        """Seed the forward passes of ``model``."""
        # DDP broadcasts buffers before it calls the module inside, which is no change by forward.
        inside = model.module if isinstance(model, DistributedDataParallel) else model
        if any(ref() is inside for ref in self._modules):
            return
        self._modules.append(weakref.ref(inside))
        self._handles.append(inside.register_forward_pre_hook(WeakHook(self, "before_forward")))
        self._handles.append(inside.register_forward_hook(WeakHook(self, "after_forward"), always_call=True))

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Seed the generators by the micro-batch and the number of forward passes since it began."""
        method = self._place()
        # Another optimizer may be attached to the same module. Hooks run first in, first out, so one of them acts.
        if _active or method is None or not (module.training and torch.is_grad_enabled()):
            self._before.append(None)
            return
        _active.append(self)
        devices = {param.device for param in module.parameters() if param.device.type not in ("cpu", "meta")}
        states = {device: getattr(torch, device.type).get_rng_state(device) for device in devices}
        buffers = [(name, buffer, buffer._version) for name, buffer in module.named_buffers()]
        self._before.append(_Before(torch.get_rng_state(), states, buffers))
        torch.manual_seed(agreement.fingerprint({"": [self._seed, *method(), self._passes]}))
        self._passes += 1

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Restore the generators.

        Raises:
            RuntimeError: the forward pass has changed a buffer.
        """
        before = self._before.pop() if self._before else None
        if before is None:
            return
        _active.clear()
        torch.set_rng_state(before.state)
        for device, state in before.of_devices.items():
            getattr(torch, device.type).set_rng_state(state, device)
        for name, buffer, version in before.buffers:
            if buffer._version != version:
                raise RuntimeError(
                    f"forward has changed the buffer {name!r}. With reproducible=True a rank would compute it from its "
                    "micro-batches alone. Freeze its module with eval(), or use one without running statistics."
                )
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(WeakHook(self, "backward_came"))  # type: ignore[no-untyped-call]

    def backward_came(self, grad: Tensor) -> None:
        """Note that a backward pass has begun, so that the next forward pass is the first of its micro-batch."""
        self._passes = 0


@dataclass(frozen=True, slots=True)
class _Before:
    """The state of generators and the versions of buffers before a forward pass."""

    state: Tensor
    of_devices: dict[torch.device, Tensor]
    buffers: list[tuple[str, Tensor, int]]


def find_running_statistics(model: nn.Module) -> str | None:
    """Return the name of a module of ``model`` that changes running statistics; None if there is none. Local."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            return str(name)
    return None
