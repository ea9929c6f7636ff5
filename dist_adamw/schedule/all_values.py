"""Compute lr and weight decay of all groups at once, with the bits of `Recipe.group_values`.

An update costs one lookup of the schedule and a few operations per group: what depends only on the groups, or only on
the cycle, is kept until they change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.optim import Optimizer

from dist_adamw.schedule.base_values import BaseValues, ScheduledGroups
from dist_adamw.schedule.cycles import Cycle
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.weight_decay import convention_signs, decay_by_lr, decay_factors


class AllValues:
    """The lr and weight decay of an optimizer's groups, by sample. Local."""

    def __init__(self) -> None:
        # What is below is valid for this recipe and these base values,
        self._recipe: Recipe | None = None
        self._look_up: Callable[[int], tuple[Cycle, float, float | None]]
        self._bases: Sequence[BaseValues] = ()
        self._ranges: list[tuple[float, float]] = []  # of each group: lr at multiplier 0, and what 1 adds to it
        self._rises: list[float] = []  # what the whole warm-up adds to the lr
        self._scales: list[float] = []  # lr_scale
        # this for this recipe and this global batch,
        self._batch_size: int | None = 0  # 0: none yet
        self._batch_scale = 1.0
        self._is_scaled = False  # whether any scale is not 1
        # and this for this cycle and these signs of how the optimizer applies weight decay.
        self._cycle: Cycle | None = None
        self._signs: object = None
        self._decays: list[float | None] = []
        self._factors: list[tuple[float, float]] | None = None  # if decay follows lr: `decay_factors`

    def at(
        self, samples: int, recipe: Recipe, groups: ScheduledGroups, optimizer: Optimizer
    ) -> tuple[list[float], list[float | None]]:
        """Return lr and weight decay of each group; None to leave a decay unchanged.

        Raises:
            ValueError: as for `RestartSchedule.at` and `decay_by_lr`.
        """
        if recipe is not self._recipe or groups.bases is not self._bases:
            self._take_bases(recipe, groups.bases)
        if recipe.batch_at(samples) != self._batch_size:
            self._take_batch(recipe, samples)
        cycle, multiplier, warmup = self._look_up(samples)
        signs = convention_signs(optimizer, groups.dicts) if recipe.normalize else None
        if cycle is not self._cycle or signs != self._signs:
            self._take_cycle(cycle, signs, samples, groups, optimizer)
        if warmup is None:
            lrs = [low + span * multiplier for low, span in self._ranges]
        else:
            start = recipe.schedule.warmup_start_lr
            lrs = [start + rise * warmup for rise in self._rises]
        decays = self._decays
        if self._factors is not None:
            decays = [a * lr / b for (a, b), lr in zip(self._factors, lrs, strict=True)]
        return self._scaled(lrs) if self._is_scaled else lrs, decays

    def _take_bases(self, recipe: Recipe, bases: Sequence[BaseValues]) -> None:
        recipe.check_bases(bases)
        start = recipe.schedule.warmup_start_lr
        self._ranges = [(base.min_lr, base.lr - base.min_lr) for base in bases]
        self._rises = [base.lr - start for base in bases]
        self._scales = [base.lr_scale for base in bases]
        self._look_up = recipe.schedule._look_up
        self._recipe, self._bases, self._batch_size = recipe, bases, 0

    def _take_batch(self, recipe: Recipe, samples: int) -> None:
        self._batch_scale = recipe.batch_scale(samples)
        self._is_scaled = any(scale != 1.0 for scale in (*self._scales, self._batch_scale))
        self._batch_size, self._cycle = recipe.batch_at(samples), None

    def _take_cycle(
        self, cycle: Cycle, signs: object, samples: int, groups: ScheduledGroups, optimizer: Optimizer
    ) -> None:
        recipe = self._recipe
        assert recipe is not None
        conventions = [recipe.decay_convention(optimizer, group) for group in groups.dicts]
        self._cycle, self._factors, self._decays = None, None, [None] * len(conventions)  # in case of an error below
        if any(convention != "l2" for convention in conventions):
            norm, reading = recipe.decay_norm_in(cycle, samples), recipe.decay_reading
            if conventions[0] == "schedule":  # an optimizer's, so all are
                self._factors = [decay_factors(base, reading, norm=norm) for base in self._bases]
            else:
                for i, base in enumerate(self._bases):
                    if conventions[i] == "lr":
                        self._decays[i] = decay_by_lr(base, reading, norm=norm, batch_scale=self._batch_scale)
        self._cycle, self._signs = cycle, signs

    def _scaled(self, lrs: list[float]) -> list[float]:
        # One factor after the other, as in `Recipe.lr`: their product would round differently.
        return [lr * scale * self._batch_scale for lr, scale in zip(lrs, self._scales, strict=True)]
