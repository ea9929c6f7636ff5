"""Third base class of `DistAdamW`: the same bits on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_adamw.optimizer import attaching
from dist_adamw.optimizer.clipping import clip_owned_
from dist_adamw.optimizer.gradients.keyed_random import KeyedRandom
from dist_adamw.optimizer.gradients.one_process import MicroBatches
from dist_adamw.optimizer.savable_optimizer import SavableOptimizer


class ReproducibleOptimizer(SavableOptimizer):
    """An optimizer that numbers the micro-batches of an update, for ``reproducible=True``."""

    # Defaults for an unpickled optimizer, whose __init__ has not run.
    _micro_batches: MicroBatches | None = None  # of one process
    _random: KeyedRandom | None = None

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
        if self._path is not None:
            self._path.update.used()
        elif self._micro_batches is not None:
            self._micro_batches.used()

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
