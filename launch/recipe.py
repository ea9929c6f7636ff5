"""Optimizer, schedule and global batch of the main job, from options or from a recipe file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from dist_adamw import CyclicLRWithRestarts, DistAdamW, TrainingRecipe, load_recipe
from dist_adamw.recipes.decay import parameter_groups
from dist_adamw.recipes.recipe import RecipeLike
from dist_adamw.recipes.sections import SECTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Optimizer, schedule and global batch. A sample is one window of text.

    Args:
        global_batch: Samples of one update, over all ranks; or a schedule by samples or lengths with a unit, such as
            {0: 16, 2 epochs: 32}.
        micro_batch: Samples of one rank in one forward pass; accumulation makes up the rest.
        cycles: Number of cycles to train.
        lr: Learning rate at the beginning of each cycle.
        min_lr: Learning rate at the end of each cycle.
        weight_decay: AdamWR's normalised decay, lambda_norm; norms and biases do not decay. See weight_decay_norm.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        max_grad_norm: Clip the global gradient to this norm; null for no clipping.
        decay_by: Whether weights decay by lr * weight_decay (torch) or by weight_decay (the paper); same result.
        restart_period: Length of the first cycle, in epochs; may be a fraction, or have a unit ("5_000 samples").
        t_mult: Factor from the length of one cycle to the next.
        policy: Shape of each cycle.
        gamma: Factor on exp_range's amplitude at every update.
        warmup_samples: Samples over which the learning rate rises from 0, before the first cycle.
        decay_length: For wsd, the samples at each cycle's end over which lr falls, or "10%", the default.
        decay_shape: For wsd, the shape of that fall.
        rewarmup: Samples over which lr rises after each restart, or "10%" of the cycle.
        peak_factor: Factor on the peak at every restart, or a list with one for each cycle.
        weight_decay_norm: paper, or first_cycle: weight_decay is torch's in the first cycle, normalised from there.
        weight_decay_timescale: Samples over which updates are averaged, or "1 cycle", in place of weight_decay.
        averages: Averages of the weights, by name: "{ema: {decay: 0.999}, ends: {every: cycle}, last: {every: 1 epoch,
            last: 3}}"; the job reports their held-out losses.
        reproducible: Compute the same bits on any number of ranks; the last line is then a hash of the weights.
        more: Keys of a recipe file that are no options here, by section, such as "{scheduler: {lr_scaling: sqrt},
            optimizer: {no_decay: norms_and_biases}, training: {total_samples: 5 epochs}}"; --recipe_file sets it.
    """

    global_batch: int | dict[int | str, int] = 16
    micro_batch: int = 8
    cycles: int = 3
    lr: float = 2e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    decay_by: Literal["lr", "schedule"] = "lr"
    restart_period: float | str = 0.13
    t_mult: float = 2.0
    policy: Literal[
        "cosine", "arccosine", "triangular", "triangular2", "exp_range", "linear", "one_minus_sqrt", "wsd"
    ] = "cosine"
    gamma: float = 1.0
    warmup_samples: int | str = 320
    decay_length: int | str | None = None
    decay_shape: Literal["linear", "one_minus_sqrt", "cosine"] = "linear"
    rewarmup: int | str | None = None
    peak_factor: float | list[float] = 1.0
    weight_decay_norm: Literal["paper", "first_cycle"] = "paper"
    weight_decay_timescale: int | str | None = None
    averages: dict[str, dict[str, int | float | str | None]] | None = None
    reproducible: bool = False
    more: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("micro_batch", "cycles"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe.{name} must be above 0, got {getattr(self, name)}.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"recipe.global_batch must be above 0, got {self.global_batch}.")
        more = self._more  # names a wrong key
        ours = {one.name for one in fields(self)}
        for key in (*more.optimizer, *more.scheduler):
            if key in ours:
                raise ValueError(f"recipe.more has {key}, which is an option: pass --recipe.{key}.")

    @property
    def batch_sizes(self) -> list[int]:
        """All global batches, the first one first."""
        return [self.global_batch] if isinstance(self.global_batch, int) else list(self.global_batch.values())

    @property
    def _more(self) -> TrainingRecipe:
        return load_recipe({"batch": {"size": 1}, **(self.more or {})})

    @property
    def total_samples(self) -> int | float | str | None:
        """Samples of the whole training, or a length with a unit; None: the ends of ``cycles``."""
        total: int | float | str | None = self._more.total_samples  # type: ignore[assignment]
        return total

    def make_optimizer(self, model: nn.Module) -> DistAdamW:
        """Return the optimizer of ``model``; unless ``more`` says otherwise, only matrices decay."""
        more = self._more
        return DistAdamW(
            parameter_groups(model, more.optimizer.get("no_decay", "one_dimensional")),
            **more.optimizer_arguments(),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decay_by=self.decay_by,
            max_grad_norm=self.max_grad_norm,
            averages=self.averages,
            reproducible=self.reproducible,
        )

    def make_scheduler(self, optimizer: DistAdamW) -> CyclicLRWithRestarts:
        """Return the schedule; ``prepare`` fills in a constant global batch and the epoch size."""
        return CyclicLRWithRestarts(
            optimizer,
            None if isinstance(self.global_batch, int) else self.global_batch,
            restart_period=self.restart_period,
            t_mult=self.t_mult,
            policy=self.policy,
            min_lr=self.min_lr,
            gamma=self.gamma,
            warmup_samples=self.warmup_samples,
            decay_length=self.decay_length,
            decay_shape=self.decay_shape,
            rewarmup=self.rewarmup,
            peak_factor=self.peak_factor,
            weight_decay_norm=self.weight_decay_norm,
            weight_decay_timescale=self.weight_decay_timescale,
            **self._more.scheduler,
        )


def options_of(file: RecipeLike) -> dict[str, Any]:
    """Return the options that a recipe file stands for: all of them, since it is a whole recipe, but ``cycles``.

    Raises:
        ValueError: file, line and key of a mistake.
    """
    recipe = load_recipe(file)
    if "epoch_size" in recipe.scheduler:
        place = ("scheduler", "epoch_size")
        sentence = "the epoch size of the main job is the length of its text. Leave it out."
        raise ValueError(str(recipe.source.problem(place, sentence)))
    ours = {one.name for one in fields(Recipe)}
    options: dict[str, Any] = {}
    more: dict[str, dict[str, Any]] = {"optimizer": {"no_decay": recipe.no_decay}}
    for section, given in (("optimizer", recipe.optimizer), ("scheduler", recipe.scheduler)):
        options |= {name: key.default for name, key in SECTIONS[section].model_fields.items() if name in ours}
        options |= {name: value for name, value in given.items() if name in ours}
        more[section] = {**more.get(section, {}), **{k: v for k, v in given.items() if k not in ours}}
    names = {"size": "global_batch", "micro_batch_size": "micro_batch"}
    options |= {names[key]: value for key, value in recipe.batch.items() if value is not None}
    more["training"] = recipe.training
    return {**options, "more": {name: keys for name, keys in more.items() if keys}}
