"""CyclicLRWithRestarts: an ``LRScheduler`` that counts samples, for any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch.optim import Optimizer

from dist_adamw.schedule.batch import GlobalBatch
from dist_adamw.schedule.batch_schedule import BatchSizes
from dist_adamw.schedule.cooldown import Cooldown
from dist_adamw.schedule.cycles import Fit
from dist_adamw.schedule.lengths import Length, in_samples
from dist_adamw.schedule.policies import Policy
from dist_adamw.schedule.preview import Preview
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.restarts import IterationCallback, RestartCallback
from dist_adamw.schedule.sample_scheduler import SampleScheduler
from dist_adamw.schedule.saved import OnDifference, check_on_difference
from dist_adamw.schedule.scheduled_optimizer import ScheduledOptimizer, given_decay_of
from dist_adamw.wrappers import unwrap


class CyclicLRWithRestarts(SampleScheduler):
    """Cyclic learning rates with warm restarts and normalised weight decay, in samples (AdamWR).

    The clock, ``samples``, counts the real global samples of applied updates. Call `step` after every
    ``optimizer.step()``; calls without an update in between (Accelerate makes one per process, and users one per
    micro-batch) change nothing, and neither does a skipped update.

    A parameter group's own ``lr``, ``weight_decay`` and ``min_lr`` are its base values (``initial_lr``, if another
    scheduler ran before). They stay with the group, which may be added, deleted, moved, or replaced by a copy
    (``dict(group, params=[...])``) between updates. A group's ``lr_scale`` (timm's layer-wise decay) multiplies the
    scheduled lr, including ``min_lr`` and warm-up, as under timm's schedulers. A normalised weight decay depends on
    neither ``lr_scale`` nor the base lr, unless it is torch's by ``weight_decay_norm="first_cycle"``.

    Lengths may have a unit: "2.5 epochs", "10_000 samples", "500 updates" (of the global batch that the run begins
    with), "1e9 tokens"; "10%" and "1 cycle" where a share of the cycle makes sense. Numbers have the unit named below.

    Args:
        optimizer: Any torch optimizer, also if a library has wrapped it.
        batch_size: Global batch, in samples, or a `GlobalBatch`. A mapping such as ``{0: 256, "2 epochs": 512}`` is a
            schedule: it gives the batch from a sample on, and ``prepare`` changes the accumulation there. None:
            ``prepare`` fills it in.
        epoch_size: Samples that one epoch actually trains on: with ``drop_last=True`` that is
            ``len(dataset) // batch_size * batch_size``. None: ``prepare`` takes it from the data loader.
        restart_period: Length of the first cycle in epochs; may be a fraction.
        t_mult: Factor from the length of one cycle to the next.
        policy: "cosine", "arccosine", "triangular", "triangular2", "exp_range", "linear", "one_minus_sqrt", or "wsd":
            stable, then a decay.
        policy_fn: Your own function of tau, the position in the cycle, instead of ``policy``.
        min_lr: lr at the end of a cycle, for groups without their own.
        gamma: Amplitude of exp_range: gamma ** (samples after warm-up / batch_size).
        triangular_step: Position of the triangular policies' peak in the cycle, from 0 to 1.
        min_restart_period: Shortest cycle in epochs, where cycles shrink: one epoch, or the first cycle if that is
            shorter, unless you pass it.
        warmup_samples: Samples over which lr rises from ``warmup_start_lr`` to its base, once.
        warmup_start_lr: lr at the beginning of the warm-up.
        eta_on_restart_cb: (eta_min, eta_max) -> (eta_min, eta_max), applied again at each restart.
        eta_on_iteration_cb: (eta_min, eta_max, iterations) -> (eta_min, eta_max), never compounded.
            Both must be pure functions: they are evaluated again after a resume.
        normalize_weight_decay: "auto" normalises weight decay if the optimizer decouples it, and leaves weight_decay
            unchanged otherwise; True raises if it does not; False never changes it.
        weight_decay_exponent: 1/2 is AdamWR's.
        lr_scaling: "sqrt" or "linear" scales lr (not the decay) with the global batch, relative to the batch that the
            run began with; Malladi et al., arXiv:2205.10287.
        decay_length: For "wsd": the part at the end of each cycle in which lr falls, in samples or "10%", the default.
        decay_shape: For "wsd": "linear", "one_minus_sqrt" or "cosine".
        rewarmup: Samples, or a share of the cycle, over which lr rises from ``min_lr`` after each restart.
        peak_factor: A number f multiplies the peak of cycle i by f ** i; a list has a factor for each cycle, of which
            the last serves for all further ones.
        cycle_ends: Training so far at each cycle's end, in samples with the warm-up, in place of ``restart_period`` and
            ``t_mult``. After the last one the lr stays.
        total_samples: Samples of the whole training with the warm-up: the last cycle ends there, and the lr stays.
        fit: How ``total_samples`` ends a cycle: "last" cuts or extends the last cycle, "scale" scales all cycles.
        weight_decay_norm: "paper": the groups' ``weight_decay`` is AdamWR's normalised lambda, another quantity than
            torch's; "first_cycle": it is torch's in the first cycle, multiplied by (T_0 / T_i) ** weight_decay_exponent
            in cycle i, so that only later cycles differ from torch's AdamW.
        weight_decay_timescale: The number of samples over which AdamW averages its updates at the base lr ("1 cycle",
            "0.5 epochs"), in place of the groups' ``weight_decay``, which is 0 for groups without decay and any other
            number, the same, for the rest; arXiv:2405.13698.
        tokens_per_sample: For lengths in tokens.
        stream: Data without epochs: updates may span epochs. Otherwise the last update of an epoch counts only the
            rest of the epoch.
        verbose: Log one line per restart, on the main rank: at INFO below "dist_adamw", or to stderr if ``logging`` has
            no handlers.
        on_difference: If a loaded state has another configuration: "strict" raises, "checkpoint" takes the saved one,
            "new" keeps this one. It can be set later through the attribute of the same name.

    Raises:
        ValueError: an argument is out of its range; the message has the value and what to do.

    Local: no collectives. Every rank calls `step`.

    It writes lr and weight decay into the groups itself, so it cannot be one of several schedulers: torch's
    ``SequentialLR`` and ``ChainedScheduler`` raise an error, and a change of lr by other code gives a warning.

    Source: Loshchilov & Hutter, arXiv:1608.03983 (restarts) and arXiv:1711.05101 (AdamWR, and its
    appendix on normalised weight decay). Unlike the paper it counts samples, not batches.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        batch_size: int | GlobalBatch | BatchSizes | None = None,
        epoch_size: int | None = None,
        restart_period: Length = 100,
        t_mult: Length = 2,
        *,
        policy: str = "cosine",
        policy_fn: Policy | None = None,
        min_lr: float = 1e-7,
        gamma: float = 1.0,
        triangular_step: float = 0.5,
        min_restart_period: Length | None = None,
        warmup_samples: Length = 0,
        warmup_start_lr: float = 0.0,
        eta_on_restart_cb: RestartCallback | None = None,
        eta_on_iteration_cb: IterationCallback | None = None,
        normalize_weight_decay: bool | Literal["auto"] = "auto",
        weight_decay_exponent: float = 0.5,
        lr_scaling: Literal["sqrt", "linear"] | None = None,
        decay_length: Length | None = None,
        decay_shape: Literal["linear", "one_minus_sqrt", "cosine"] = "linear",
        rewarmup: Length | None = None,
        peak_factor: float | Sequence[float] = 1.0,
        cycle_ends: Sequence[Length] | None = None,
        total_samples: Length | None = None,
        fit: Fit = "last",
        weight_decay_norm: Literal["paper", "first_cycle"] = "paper",
        weight_decay_timescale: Length | None = None,
        tokens_per_sample: int | None = None,
        stream: bool = False,
        verbose: bool = False,
        on_difference: OnDifference = "strict",
    ) -> None:
        check_on_difference(on_difference)
        recipe = Recipe.from_arguments(
            batch_size,
            epoch_size,
            restart_period=restart_period,
            t_mult=t_mult,
            policy=policy,
            policy_fn=policy_fn,
            gamma=gamma,
            triangular_step=triangular_step,
            min_restart_period=min_restart_period,
            warmup_samples=warmup_samples,
            warmup_start_lr=warmup_start_lr,
            eta_on_restart_cb=eta_on_restart_cb,
            eta_on_iteration_cb=eta_on_iteration_cb,
            normalize_weight_decay=normalize_weight_decay,
            weight_decay_exponent=weight_decay_exponent,
            lr_scaling=lr_scaling,
            stream=stream,
            decay_length=decay_length,
            decay_shape=decay_shape,
            rewarmup=rewarmup,
            peak_factor=peak_factor,
            cycle_ends=cycle_ends,
            total_samples=total_samples,
            fit=fit,
            weight_decay_norm=weight_decay_norm,
            weight_decay_timescale=weight_decay_timescale,
            tokens_per_sample=tokens_per_sample,
        )
        self._verbose = verbose
        self.on_difference: OnDifference = on_difference
        self._scheduled = ScheduledOptimizer(unwrap(optimizer), recipe, min_lr)
        # Before torch's constructor, which adds "initial_lr": a group without one may have an annealed lr.
        self._scheduled.groups.follow()
        self._scheduled.listen(self)
        super().__init__(self._scheduled.optimizer)

    def cooldown(
        self,
        *,
        at: Length,
        length: Length,
        shape: Literal["linear", "one_minus_sqrt", "cosine"] = "one_minus_sqrt",
    ) -> None:
        """End this run: from ``at`` on the lr falls to ``min_lr``, and stays there. Local; every rank calls it.

        A trunk's checkpoint is loaded into any number of runs, of which each calls this: one trunk, several finished
        models. The checkpoints of such a run have its cool-down, and a call with the same arguments changes nothing.
        The weight decay remains normalised by the cycle that contains ``at``.

        Args:
            at: The clock at which the fall begins, in samples, such as ``scheduler.samples``; rounded up.
            length: Samples; rounded up.
            shape: "linear", "one_minus_sqrt" or "cosine".

        Raises:
            ValueError: ``at`` lies in the past or in the warm-up, there is another cool-down, or the schedule is not
                known yet.

        Source: Hägele et al., arXiv:2405.18392.
        """
        schedule = self.schedule
        sizes = schedule.sizes
        begin = 0 if at == 0 else math.ceil(in_samples("at", at, "samples", sizes))
        wanted = Cooldown(begin, math.ceil(in_samples("length", length, "samples", sizes)), shape)
        recipe = self._scheduled.recipe
        if recipe.cooldown == wanted:
            return
        if recipe.cooldown is not None:
            raise ValueError(
                f"cooldown: there is a {recipe.cooldown} already, got a {wanted}. A branch's checkpoint brings its "
                "cool-down: leave out this call to continue it, or load a checkpoint of the trunk for another one."
            )
        earliest = max(self.samples, schedule.warmup_samples)
        if wanted.at < earliest:
            raise ValueError(
                f"cooldown(at={at!r}) must begin at or after {earliest:,} samples: the clock is at {self.samples:,}, "
                f"and the warm-up takes {schedule.warmup_samples:,}. Load an earlier checkpoint, or begin later."
            )
        if schedule.last_sample is not None and wanted.at >= schedule.last_sample:
            raise ValueError(
                f"cooldown(at={at!r}) begins after the last cycle, which ends at {schedule.last_sample:,} samples."
            )
        self._scheduled.use(replace(recipe, cooldown=wanted))

    def preview(
        self, cycles: int | None = None, points: int = 1000, group: int = 0, *, total_samples: Length | None = None
    ) -> Preview:
        """Return the table of restarts, with weight decay in its three readings, and the curves. Local.

        Args:
            cycles: The number of cycles to show. None: 4, or those of ``total_samples``, at most 20.
            points: The number of evenly spaced samples at which the curves are evaluated; both sides of each restart
                are added.
            group: The index of the parameter group.
            total_samples: Samples of the whole training, or "15 epochs". The preview then says where in its cycle
                training ends, and which periods would end a cycle there. Default: that of the schedule, if it has one.

        Raises:
            ValueError: batch_size or epoch_size is not known yet, or a number is not whole and above 0.
        """
        schedule, values = self.schedule, self._scheduled.values_of(group)
        batches = self._scheduled.recipe.batches
        return Preview.compute(
            schedule,
            values,
            batch_size=batches,
            cycles=cycles,
            points=points,
            total_samples=total_samples,
            given_decay=given_decay_of(self._scheduled, group),
        )
