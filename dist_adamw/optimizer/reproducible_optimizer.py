"""Third base class of `DistAdamW`: the same bits on any number of ranks."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_adamw.optimizer import attaching
from dist_adamw.optimizer.clipping import clip_owned_
from dist_adamw.optimizer.gradients.fsdp import FSDPMicroBatches
from dist_adamw.optimizer.gradients.keyed_random import KeyedRandom
from dist_adamw.optimizer.gradients.one_process import MicroBatches
from dist_adamw.optimizer.savable_optimizer import SavableOptimizer
from dist_adamw.optimizer.sharding.dtensors import is_dtensor
from dist_adamw.ranks import collectives


class ReproducibleOptimizer(SavableOptimizer):
    """An optimizer that numbers the micro-batches of an update, for ``reproducible=True``."""

    # Defaults for an unpickled optimizer, whose __init__ has not run.
    _micro_batches: MicroBatches | None = None  # of one process
    _fsdp_micro_batches: FSDPMicroBatches | None = None
    _random: KeyedRandom | None = None
    _is_loss_whole = False  # whether the loop is known not to divide the loss by the accumulation

    @property
    def updates(self) -> int:
        """The number of applied updates; skipped ones do not count. Local."""
        return self._outcome.updates

    @property
    def _kept_micro_batches(self) -> int:
        """The micro-batches of the present update whose gradients this rank has sent or set aside. Local."""
        if self._path is not None:
            return self._path.sender.micro_batches
        kept = self._fsdp_micro_batches or self._micro_batches
        return 0 if kept is None else kept.number

    def _check_reproducible(self) -> None:
        """Refuse an update whose micro-batches were not summed in order. Local.

        Raises:
            RuntimeError: nothing is attached.
        """
        if self.reproducible and self._random is None and not self._is_partitioned:
            raise RuntimeError(
                "reproducible=True, but no module is attached, so micro-batches are added up as they come. Call "
                "dist_adamw.prepare, or optimizer.attach(model) before the first forward pass."
            )

    def _gradients_were_used(self) -> None:
        """Record that an update has used the gradients. Local."""
        if self.reproducible and not self._is_loss_whole:
            self._tell_of_division()
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
            self._random = KeyedRandom(attaching.agree_on_seed(self._averaging_group), self._place_of_forward)
        self._random.listen(model)

    @property
    def _averaging_group(self) -> dist.ProcessGroup | None:
        """The ranks over which gradients are averaged; None: there is one."""
        if self._fsdp_micro_batches is not None:
            return dist.group.WORLD
        return self.process_group

    def _place_of_forward(self) -> tuple[int, int]:
        """Return the number of the update, and in it that of the micro-batch that runs forward now. Local."""
        passes = self._kept_micro_batches if self._path is None else self._path.sender.rounds
        group = self._averaging_group
        if group is None:
            return self.updates, passes
        return self.updates, passes * collectives.world_size(group) + collectives.rank(group)

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
