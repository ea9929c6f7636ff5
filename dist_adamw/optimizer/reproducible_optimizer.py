"""Third base class of `DistAdamW`: the same bits on any number of ranks."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from dist_adamw.optimizer import attaching
from dist_adamw.optimizer.clipping import clip_owned_
from dist_adamw.optimizer.gradients.keyed_random import KeyedRandom
from dist_adamw.optimizer.gradients.one_process import MicroBatches
from dist_adamw.optimizer.savable_optimizer import SavableOptimizer
from dist_adamw.ranks import collectives


class ReproducibleOptimizer(SavableOptimizer):
    """An optimizer that numbers the micro-batches of an update, for ``reproducible=True``."""

    # Defaults for an unpickled optimizer, whose __init__ has not run.
    _micro_batches: MicroBatches | None = None  # of one process
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
        return 0 if self._micro_batches is None else self._micro_batches.number

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
        elif self._micro_batches is not None:
            self._micro_batches.used()

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
        """Follow the forward passes of ``model``, and in one process its backward passes. Collective."""
        attaching.check_reproducible(model)
        group = self.process_group
        if self._random is None:
            seed = attaching.agree_on_seed(group)
            self._random = KeyedRandom(seed, self._place_of_forward)
        self._random.listen(model)
        if group is None:
            self._micro_batches = self._micro_batches or MicroBatches(self._all_params)
            self._micro_batches.listen(model)

    def _place_of_forward(self) -> tuple[int, int]:
        """Return the number of the update, and in it that of the micro-batch that runs forward now. Local."""
        if self._path is None:
            return self.updates, 0 if self._micro_batches is None else self._micro_batches.number
        rank, ranks = self._ranks.place
        return self.updates, self._path.sender.rounds * ranks + rank

    def _clip_whole(self, params: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Clip gradients that are whole on every rank. Local."""
        grads = [param.grad for param in params if param.grad is not None]
        if not (self.reproducible and grads):
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        device = grads[0].device
        return clip_owned_(
            [], grads, max_norm=max_norm, norm_type=norm_type, group=None, device=device, reproducible=True
        )
