"""One ``trainer.fit()``: its schedules, counters of samples, and comparisons of ranks."""

from __future__ import annotations

import functools
import weakref
from types import SimpleNamespace
from typing import Any

from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.loader_iteration import Batch, Run, holder
from dist_adamw.integrations.accelerate.update_count import send_counts_with
from dist_adamw.integrations.lightning.checkpoints import Checkpoints
from dist_adamw.integrations.lightning.checks import WHOLE, check_configured, check_trainer, kinds_of
from dist_adamw.integrations.lightning.training_data import EpochSizes, RankSizes, record_rows, rows_in
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.replicas import ReplicaWatch, check_replicas
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.run_on_all import check_on_all_ranks
from dist_adamw.run_log import batch_sources
from dist_adamw.run_log.digests import batch_digest
from dist_adamw.schedule.saved import OnDifference
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

_WATCHING: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # hooks that compare ranks, by optimizer


class Fit:
    """What `prepare_lightning` adds to one fit. Lightning's own methods are called through their classes, so a second
    fit replaces what the first one has put in their place.

    Args:
        trainer: Lightning's Trainer, before it makes optimizers and loaders.
        module: The LightningModule.
        every: See ``check_weights_every`` of `dist_adamw.prepare`.
        on_difference: See `dist_adamw.load`.
    """

    def __init__(self, trainer: Any, module: Any, every: int | None, on_difference: OnDifference | None) -> None:
        check_trainer(trainer, module)
        self._trainer, self._module, self._every = trainer, module, every
        self._on_difference = on_difference
        self._schedules: list[CyclicLRWithRestarts] | None = None
        self._counters: list[SampleCounter] = []
        self._watches: list[ReplicaWatch] = []
        self._loaders: list[Any] = []  # the loaders whose sizes are set
        self._has_sizes = False
        self._is_making_loaders = False
        self._run = Run(self)  # all batches of this fit
        Checkpoints(trainer, self._before_save, on_difference, self._forget_batches)
        trainer.fit_loop.setup_data = self._set_up_data
        trainer.strategy.process_dataloader = self._process_dataloader

    # ---------------------------------------------------------------- before training

    def follow_optimizers(self) -> None:
        """Check what ``configure_optimizers`` returned, and follow its optimizers. Collective.

        Raises:
            ValueError: see `check_configured`.
        """
        trainer = self._trainer
        group = collectives.host_group()
        self._schedules = check_on_all_ranks(lambda: check_configured(trainer, self._module), group)
        for scheduler in self._schedules:
            if self._on_difference is not None:  # Lightning loads the schedule once more, from its own file
                scheduler.on_difference = self._on_difference
        for optimizer in map(unwrap, trainer.optimizers):
            if isinstance(optimizer, DistAdamW):
                optimizer.use_model(trainer.strategy.model)

    def _process_dataloader(self, loader: Any) -> Any:
        processed = type(self._trainer.strategy).process_dataloader(self._trainer.strategy, loader)
        return record_rows(processed) if self._is_making_loaders else processed

    def _set_up_data(self) -> None:
        """Make the training loaders as Lightning does, and set the schedules' sizes. Collective."""
        loop = self._trainer.fit_loop
        self._is_making_loaders = True
        try:
            type(loop).setup_data(loop)
        finally:
            self._is_making_loaders = False
        # A module may have it called in configure_optimizers, to know the number of updates.
        if (
            self._schedules
            and loop._combined_loader is not None
            and loop._combined_loader.flattened is not self._loaders
        ):
            self._loaders = loop._combined_loader.flattened
            self._set_sizes(self._schedules)

    def _set_sizes(self, schedules: list[CyclicLRWithRestarts]) -> None:
        trainer = self._trainer
        mine = RankSizes.of(self._loaders, trainer.fit_loop.max_batches)
        of_ranks = collectives.all_gather_objects(mine, collectives.host_group())
        sizes = EpochSizes.of(of_ranks, trainer.accumulate_grad_batches, self._same_rows())

        is_automatic, num_loaders = self._module.automatic_optimization, len(self._loaders)

        def fill() -> None:
            for scheduler in schedules:
                if self._has_sizes:
                    sizes.compare(scheduler, is_automatic=is_automatic)
                else:
                    sizes.fill(scheduler, is_automatic=is_automatic, num_loaders=num_loaders)

        check_on_all_ranks(fill, collectives.host_group())
        if self._has_sizes:
            return
        self._has_sizes = True
        for scheduler in schedules:
            if trainer.world_size > 1:
                record = {**scheduler.configuration(), **scheduler.agreement_record()}
                agreement.check_agreement(record, collectives.host_group())
        if len(self._loaders) == 1:
            self._counters = [self._count(scheduler) for scheduler in schedules]
        if trainer.world_size > 1:
            self._watches = [self._watch(scheduler) for scheduler in schedules]

    def _same_rows(self) -> int:
        """Return how many consecutive ranks see the same rows (tensor parallelism)."""
        kwargs = getattr(self._trainer.strategy, "distributed_sampler_kwargs", {})
        return int(self._trainer.world_size // kwargs.get("num_replicas", self._trainer.world_size))

    def _count(self, scheduler: CyclicLRWithRestarts) -> SampleCounter:
        """Make the clock count the rows that are trained on, over all ranks."""
        # What a counter reads from an accelerator; under FSDP2 no hook of a parameter sees a backward pass.
        is_whole = bool(kinds_of(self._trainer.strategy) & WHOLE)
        job: Any = SimpleNamespace(
            distributed_type=SimpleNamespace(value="NO" if is_whole else "FSDP"),
            num_processes=self._trainer.world_size,
            process_index=self._trainer.global_rank,
            parallelism_config=SimpleNamespace(tp_size=self._same_rows()),
        )
        counter = SampleCounter(scheduler._scheduled.optimizer, job, group=collectives.host_group())
        scheduler.sample_source = counter
        return counter

    def _watch(self, scheduler: CyclicLRWithRestarts) -> ReplicaWatch:
        """Make ranks compare a schedule at every update of its optimizer, and their weights at some."""
        model, optimizer, group = self._trainer.strategy.model, scheduler._scheduled.optimizer, collectives.host_group()
        compare = functools.partial(check_replicas, model, optimizer, group=group)
        watch = ReplicaWatch(group, scheduler._scheduled.digested_record, compare, self._every)
        send_counts_with(watch, scheduler)
        if (earlier := _WATCHING.pop(optimizer, None)) is not None:  # of an earlier fit
            earlier.remove()
        _WATCHING[optimizer] = optimizer.register_step_pre_hook(watch.before_update)
        return watch

    # ---------------------------------------------------------------- during training

    def handed_out(self, batch: Any) -> None:
        """Count a batch that is about to be trained on. Local."""
        if not self._counters:
            return
        rows = rows_in(self._trainer.fit_loop._data_fetcher, batch)
        handed = Batch(rows, self._run, begin=0, end=0, is_last=False, is_held=holder(batch))
        if batch_sources.are_read():
            handed.digest = batch_digest(batch)  # now, since the module may change it
        for counter in self._counters:
            counter.handed_out(handed)

    def backward_begins(self) -> None:
        """Count a backward pass if no hook of a parameter sees it. Local."""
        for counter in self._counters:
            if counter.follows_engine:
                counter.poll()
                counter.backward_began()

    def backward_ends(self) -> None:
        """Finish a backward pass. Local."""
        for counter in self._counters:
            if counter.follows_engine:
                counter.engine_backward_is_over(updates_inside=False)
            else:
                counter.poll()

    def settle(self) -> None:
        """Raise what the ranks' last comparison found. Collective."""
        for watch in self._watches:
            watch.settle()

    def _before_save(self) -> None:
        for watch in self._watches:
            watch.before_save()

    def _forget_batches(self) -> None:
        for counter in self._counters:
            counter.forget()
