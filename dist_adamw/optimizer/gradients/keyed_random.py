"""Random numbers of a forward pass that depend on the micro-batch, and not on the rank that computes it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.forward_passes import on_backward
from dist_adamw.optimizer.gradients.refusals import NO_FORWARD_PASS
from dist_adamw.optimizer.gradients.weak_hooks import WeakHook, exclude_from_compilation, is_in_backward, remove
from dist_adamw.ranks import agreement

_active: list[KeyedRandom] = []  # whose forward pass runs


class Place(NamedTuple):
    """The place of a forward pass in the training run.

    Attributes:
        seed: The same on all ranks.
        update: The number of the update.
        micro_batch: The number of the micro-batch in it.
        kept: The micro-batches of this update that have had their backward pass on this rank.
    """

    seed: int
    update: int
    micro_batch: int
    kept: int


class KeyedRandom:
    """Seeds torch's generators for each forward pass of a training module, and restores them afterwards. Local.

    Also refuses forward passes that change buffers, and notices backward passes without a forward pass.

    Args:
        place: The optimizer's method that returns the present `Place`.

    Attributes:
        has_run: Whether a forward pass with gradients enabled has begun since the last backward pass.
    """

    def __init__(self, place: Callable[[], Place]) -> None:
        exclude_from_compilation(KeyedRandom, "before_forward", "after_forward")
        self._place = weakref.WeakMethod(place)
        # Forward passes since the last backward pass or batch, without and with gradients enabled. They are counted
        # apart, so that an evaluation of a module in training does not change what training draws.
        self._passes = [0, 0]
        self.has_run = False
        self._kept = 0  # `Place.kept` when it was last looked at
        self._is_unannounced = False  # whether a micro-batch of this update had no forward pass
        self._before: list[_Before | None] = []  # a stack, since forward passes may nest
        self._seeds: dict[int, list[int]] = {}  # by id of module, for the forward passes since the last backward pass
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

    # ---------------------------------------------------------------- forward passes

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Seed the generators by the micro-batch and the number of forward passes since it began."""
        self._begin([module])

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Restore the generators.

        Raises:
            RuntimeError: the forward pass has changed a buffer.
        """
        if self._end():
            on_backward(output, WeakHook(self, "start_again"))

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Treat the block as a forward pass of all modules together. Raises as `after_forward`."""
        self._begin([module for ref in self._modules if (module := ref()) is not None])
        try:
            yield
        except BaseException:
            self._end(is_complete=False)
            raise
        self._end()

    def _begin(self, modules: Sequence[nn.Module]) -> None:
        method, with_gradients = self._place(), torch.is_grad_enabled()
        place = None if method is None else method()
        is_again = is_in_backward()
        if place is not None and not is_again:
            self._look(place.kept)
        self.has_run |= with_gradients
        # Another optimizer may be attached to the same module. Hooks run first in, first out, so one of them acts.
        if _active or place is None or not _is_training(modules, with_gradients=with_gradients):
            self._before.append(None)
            return
        seed = self._seed_of_first(modules[0]) if is_again else self._next_seed(modules, place)
        if seed is None:
            self._before.append(None)
            return
        self._before.append(_Before.of(modules, with_buffers=with_gradients and not is_again))
        _active.append(self)
        torch.manual_seed(seed)

    def _next_seed(self, modules: Sequence[nn.Module], place: Place) -> int:
        with_gradients = torch.is_grad_enabled()
        if not any(self._passes):
            self._seeds.clear()
        key: list[Any] = [place.seed, place.update, place.micro_batch, self._passes[with_gradients]]
        self._passes[with_gradients] += 1
        seed = agreement.fingerprint({"": key if with_gradients else [*key, "no_grad"]})
        for module in modules:
            self._seeds.setdefault(id(module), []).append(seed)
        return seed

    def _seed_of_first(self, module: nn.Module) -> int | None:
        """Return the seed of the forward pass that is repeated; None if it was inside another module's.

        Raises:
            RuntimeError: it is not known which one that is.
        """
        seeds = self._seeds.get(id(module), [])
        if len(seeds) > 1:
            raise RuntimeError(
                f"activation checkpointing repeats one of {len(seeds)} forward passes of an attached "
                f"{type(module).__name__}, and with reproducible=True each had other random numbers. Checkpoint the "
                "modules inside it instead."
            )
        return seeds[0] if seeds else None

    def _end(self, *, is_complete: bool = True) -> bool:
        """Restore the generators; return whether this object had seeded them."""
        before = self._before.pop() if self._before else None
        if before is None:
            return False
        _active.clear()
        before.restore()
        if is_complete:
            before.check_buffers()
        return True

    def start_again(self, *_: Any) -> None:
        """Count forward passes from 0 again: a backward pass has begun, or a loader hands out a batch."""
        self._passes = [0, 0]

    # ---------------------------------------------------------------- backward passes without a forward pass

    def _look(self, kept: int) -> None:
        """Compare this rank's micro-batches with the forward passes since the last call."""
        if kept < self._kept:  # they were discarded
            self._kept, self._is_unannounced = 0, False
        new = kept - self._kept
        self._is_unannounced |= new > self.has_run
        if new:
            self._kept, self.has_run = kept, False
            self.start_again()

    def problem(self, kept: int) -> str | None:
        """Return why this update depends on the number of ranks; None: nothing is known.

        Args:
            kept: See `Place`.
        """
        self._look(kept)
        if not self._is_unannounced:
            return None
        return NO_FORWARD_PASS

    def used(self) -> None:
        """Record that an update has used the gradients."""
        self._kept, self._is_unannounced = 0, False
        self.start_again()


@dataclass(frozen=True, slots=True)
class _Before:
    """The state of generators and the versions of buffers before a forward pass."""

    state: Tensor
    of_devices: dict[torch.device, Tensor]
    buffers: list[tuple[str, Tensor, int]]

    @classmethod
    def of(cls, modules: Sequence[nn.Module], *, with_buffers: bool) -> _Before:
        """Return those of now. Local."""
        params = [param for module in modules for param in module.parameters()]
        devices = {param.device for param in params if param.device.type not in ("cpu", "meta")}
        states = {device: getattr(torch, device.type).get_rng_state(device) for device in devices}
        named = [pair for module in modules if with_buffers for pair in module.named_buffers()]
        return cls(torch.get_rng_state(), states, [(name, buffer, buffer._version) for name, buffer in named])

    def restore(self) -> None:
        """Restore the generators. Local."""
        torch.set_rng_state(self.state)
        for device, state in self.of_devices.items():
            getattr(torch, device.type).set_rng_state(state, device)

    def check_buffers(self) -> None:
        """Refuse changed buffers. Local.

        Raises:
            RuntimeError: names one.
        """
        for name, buffer, version in self.buffers:
            if buffer._version != version:
                raise RuntimeError(
                    f"forward has changed the buffer {name!r}. With reproducible=True a rank would compute it from its "
                    "micro-batches alone. Freeze its module with eval(), or use one without running statistics."
                )


def _is_training(modules: Sequence[nn.Module], *, with_gradients: bool) -> bool:
    """Return whether a forward pass may draw random numbers that the update depends on."""
    if any(module.training for module in modules):
        return True
    return with_gradients and any(inner.training for module in modules for inner in module.modules())


def find_running_statistics(model: nn.Module) -> str | None:
    """Return the name of a module of ``model`` that changes running statistics; None if there is none. Local."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            return str(name)
    return None
