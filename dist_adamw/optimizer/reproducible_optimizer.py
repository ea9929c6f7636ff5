"""Fourth base class of `DistAdamW`: the same bits on any number of ranks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_adamw.optimizer import attaching
from dist_adamw.optimizer.averaged_optimizer import AveragedOptimizer
from dist_adamw.optimizer.clipping import clip_owned_
from dist_adamw.optimizer.gradients.fsdp import FSDPMicroBatches
from dist_adamw.optimizer.gradients.keyed_random import KeyedRandom, Place
from dist_adamw.optimizer.gradients.one_process import MicroBatches
from dist_adamw.optimizer.options import MACHINE, SEED
from dist_adamw.optimizer.sharding.dtensors import is_dtensor
from dist_adamw.ranks import collectives


class MicroBatchData(Protocol):
    """The data that micro-batches come from, as far as an integration follows it."""

    def problem(self, kept: int, *, for_update: bool) -> str | None:
        """Return why an update of ``kept`` micro-batches on this rank depends on the number of ranks, or None. Local.

        Args:
            kept: The backward passes of the update on this rank.
            for_update: Whether `DistAdamW.step` asks.
        """


class ReproducibleOptimizer(AveragedOptimizer):
    """An optimizer that numbers the micro-batches of an update, for ``reproducible=True``."""

    # Defaults for an unpickled optimizer, whose __init__ has not run.
    _micro_batches: MicroBatches | None = None  # of one process
    _fsdp_micro_batches: FSDPMicroBatches | None = None
    _random: KeyedRandom | None = None
    _seed = 0
    _machine = ""
    _data: MicroBatchData | None = None
    _is_loss_whole = False  # whether the loop is known not to divide the loss by the accumulation

    @property
    def updates(self) -> int:
        """The number of applied updates; skipped ones do not count. Local."""
        return self._outcome.updates

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `step` changed no weights, because gradients were inf, nan or missing. Local.

        With ``max_grad_norm`` on an accelerator, this waits for the device.
        """
        return self._outcome.was_skipped

    @property
    def skip_is_known(self) -> bool:
        """Whether `step_was_skipped` and `updates` are known without waiting for a device. Local."""
        return self._outcome.is_known

    @property
    def grad_norm(self) -> Tensor | None:
        """The global gradient norm of the last update before clipping, 0-d; None if it was not measured. Local.

        ``max_grad_norm`` measures it, and so do `clip_grad_norm_` and, after ``prepare``, the accelerator's method of
        that name, if they clip the parameters of all groups together.
        """
        return self._outcome.norm

    @property
    def _kept_micro_batches(self) -> int:
        """The micro-batches of the present update whose gradients this rank has sent or set aside. Local."""
        if self._path is not None:
            return self._path.sender.micro_batches
        kept = self._fsdp_micro_batches or self._micro_batches
        return 0 if kept is None else kept.number

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Treat the block as one forward pass of the attached modules, with ``reproducible``. Local.

        For a loop that calls other methods than the module itself, such as ``vae.encode(x)`` and ``vae.decode(z)``:
        random numbers drawn in the block are then those of the micro-batch. Without ``reproducible`` it does nothing.

        Raises:
            RuntimeError: no module is attached, or the block has changed a buffer.
        """
        self._check_attached()
        with contextlib.nullcontext() if self._random is None else self._random.forward_pass():
            yield
        if self._fsdp_micro_batches is not None and torch.is_grad_enabled():
            self._fsdp_micro_batches.after_block()

    def _find_problem(self, *, for_update: bool) -> str | None:
        """Return why the update would depend on the number of ranks, as far as this rank knows, or None. Local.

        Raises:
            RuntimeError: nothing is attached.
        """
        self._check_attached()
        if self._random is None:
            return None
        kept = self._kept_micro_batches
        problem = self._random.problem(kept)
        if problem is None and self._data is not None:
            problem = self._data.problem(kept, for_update=for_update)
        return problem

    def _check_attached(self) -> None:
        if self.reproducible and self._random is None and not self._is_partitioned:
            raise RuntimeError(
                "reproducible=True, but no module is attached, so micro-batches are added up as they come. Call "
                "dist_adamw.prepare, or optimizer.attach(model) before the first forward pass."
            )

    def _gradients_were_used(self) -> None:
        """Record that an update has used the gradients. Local."""
        if self.reproducible and not self._is_loss_whole:
            self._tell_of_division()
        if self._random is not None:
            self._random.used()
        if self._path is not None:
            self._path.update.used()
        for kept in (self._micro_batches, self._fsdp_micro_batches):
            if kept is not None:
                kept.used()

    def _tell_of_division(self) -> None:
        """Say once that the loss must not be divided, if this rank had several micro-batches. Local."""
        count = self._kept_micro_batches
        if count > 1:
            self._is_loss_whole = True
            if collectives.rank() == 0:
                warnings.warn(
                    f"reproducible=True: this update is the average of {count} micro-batches on each rank. If your "
                    "loop divides the loss by the accumulation, take that out: 1/3 and 1/4 round differently. "
                    "accelerator.backward does it for you after dist_adamw.prepare.",
                    stacklevel=7,
                )

    def _reproduce(self, model: nn.Module) -> None:
        """Follow the forward passes of ``model``, and its backward passes in one process or under FSDP2. Collective."""
        attaching.check_reproducible(model)
        is_sharded = any(map(is_dtensor, model.parameters()))
        if is_sharded:
            self._fsdp_micro_batches = self._fsdp_micro_batches or FSDPMicroBatches()
            self._fsdp_micro_batches.listen(model, self._all_params())
        elif self.process_group is None:
            self._micro_batches = self._micro_batches or MicroBatches(self._all_params)
            self._micro_batches.listen(model)
        if self._random is None:
            self._seed, self._machine = attaching.agree_on_seed(self._averaging_group)
            self._random = KeyedRandom(self._place_of_forward)
            self._follow_groups()
        self._random.listen(model)

    def _follow_groups(self) -> None:
        """Take the seed that a load has brought, and warn if the saved job may have computed other bits. Local."""
        self._seed = self._in_groups(SEED, self._seed)
        before = self._in_groups(MACHINE, self._machine)
        if before != self._machine:
            for group in self.param_groups:
                group[MACHINE] = self._machine
            if collectives.rank() == 0:
                what = "this job may compute other bits than the one that it continues"
                attaching.warn_of_other_bits(what, self._machine, before, stacklevel=4)

    def _in_groups(self, key: str, known: Any) -> Any:
        """Return the value in the parameter groups that is not ``known``, if there is one; write it to all of them."""
        value = next((found for group in self.param_groups if (found := group.get(key, known)) != known), known)
        for group in self.param_groups:
            group[key] = value
        return value

    @property
    def _averaging_group(self) -> dist.ProcessGroup | None:
        """The ranks over which gradients are averaged; None: there is one."""
        if self._fsdp_micro_batches is not None:
            return dist.group.WORLD
        return self.process_group

    def _place_of_forward(self) -> Place:
        """Return the place of the micro-batch that runs forward now. Local."""
        self._follow_groups()
        kept = self._kept_micro_batches
        number = kept if self._path is None else self._path.sender.rounds
        if (group := self._averaging_group) is not None:
            number = number * collectives.world_size(group) + collectives.rank(group)
        return Place(self._seed, self.updates, number, kept)

    def _batch_came(self) -> None:
        """Count forward passes from 0 again, since a loader hands out a batch. Local."""
        if self._random is not None:
            self._random.start_again()

    def _note_clipped(self, norm: Tensor, norm_type: float, params: Iterable[Tensor]) -> None:
        """Remember the norm for `grad_norm`, if it is that of all gradients. Collective under FSDP2."""
        if norm_type != 2:
            return
        whole = norm.full_tensor() if is_dtensor(norm) else norm
        clipped = set(map(id, params))
        # Without gradients, the norm is another optimizer's.
        ours = [param for param in self._all_params() if param.grad is not None]
        if ours and all(id(param) in clipped for param in ours):
            self._outcome.note_clipped(whole)

    def _clip_whole(self, params: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Clip gradients that are whole on every rank. Local."""
        grads = [param.grad for param in params if param.grad is not None]
        if not (self.reproducible and grads):
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        if any(map(is_dtensor, grads)):
            raise ValueError(
                "clip_grad_norm_ under FSDP2 adds squares in an order that depends on the number of ranks. With "
                "reproducible=True pass max_grad_norm to DistAdamW instead."
            )
        device = grads[0].device
        return clip_owned_(
            [], grads, max_norm=max_norm, norm_type=norm_type, group=None, device=device, reproducible=True
        )
