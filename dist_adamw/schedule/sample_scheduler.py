"""An ``LRScheduler`` that counts samples: the clock, the values it writes, saving and loading."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.logs import report
from dist_adamw.ranks import collectives
from dist_adamw.schedule.averaging import check_averages_of, pass_clock
from dist_adamw.schedule.batch import GlobalBatch, check_positive_int, check_whole
from dist_adamw.schedule.batch_schedule import BatchSizes
from dist_adamw.schedule.clock import SampleSource, lag_warning
from dist_adamw.schedule.describe import describe_restart, describe_scheduler
from dist_adamw.schedule.legacy_pickles import attributes_from_first_version
from dist_adamw.schedule.loading import prepare_load
from dist_adamw.schedule.restarts import RestartSchedule
from dist_adamw.schedule.saved import OnDifference
from dist_adamw.schedule.scheduled_optimizer import ScheduledOptimizer
from dist_adamw.schedule.unsupported import ExplainsMissing, refuse_container, refuse_epochs


class SampleScheduler(ExplainsMissing, LRScheduler):
    """What `CyclicLRWithRestarts` does after its construction."""

    _scheduled: ScheduledOptimizer
    _verbose: bool
    on_difference: OnDifference

    def _initial_step(self) -> None:
        """Write the values of sample 0; torch's constructor calls this."""
        # torch's own calls step(), which would advance the clock.
        self._step_count = 1
        self._scheduled.write()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state if "_scheduled" in state else attributes_from_first_version(state))
        # copy.copy passes the original's state here, and the copy needs its own clock.
        self._scheduled = copy.copy(self._scheduled)
        self._scheduled.listen(self)

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer whose groups are written, without its wrappers.

        Raises:
            ValueError: the caller is torch's SequentialLR or ChainedScheduler.
        """
        # Reading this attribute is all that their constructors do before they change lr, so it is the place to refuse.
        refuse_container(sys._getframe(1).f_code)
        return self._scheduled.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._scheduled.optimizer = optimizer

    @property
    def batch_size(self) -> int | None:
        """The global batch of the next update, in samples.

        Setting it, to a number or a schedule, changes the weight decay's norm, not the position in the cycle.
        """
        return self._scheduled.recipe.batch_at(self.samples)

    @batch_size.setter
    def batch_size(self, batch_size: int | GlobalBatch | BatchSizes) -> None:
        recipe = self._scheduled.recipe.with_batch_size(batch_size)
        self._scheduled.check_batches(recipe)
        check_averages_of(self._scheduled.optimizer, recipe)
        self._scheduled.use(recipe)

    @property
    def epoch_size(self) -> int | None:
        """Samples in an epoch. It can be set once."""
        return self._scheduled.recipe.epoch_size

    @epoch_size.setter
    def epoch_size(self, epoch_size: int) -> None:
        epoch_size = check_positive_int("epoch_size", epoch_size)
        if self.epoch_size not in (None, epoch_size):
            raise ValueError(f"epoch_size is already {self.epoch_size}, got {epoch_size}: cycles would move.")
        self._scheduled.use(replace(self._scheduled.recipe, epoch_size=epoch_size))

    @property
    def schedule(self) -> RestartSchedule:
        """The schedule as a pure function of samples.

        Raises:
            ValueError: batch_size or epoch_size is not known yet.
        """
        return self._scheduled.recipe.schedule

    @property
    def cycle(self) -> int:
        """The current cycle, from 0: the number of restarts so far."""
        return self.schedule.at(self.samples).cycle.index

    @property
    def samples(self) -> int:
        """Real global samples of the applied updates so far."""
        return self._scheduled.clock.samples

    @property
    def sample_source(self) -> SampleSource | Callable[[], int | None] | None:
        """The counter of an update's samples, set by ``prepare``; None: the plain-loop rule."""
        return self._scheduled.clock.source

    @sample_source.setter
    def sample_source(self, source: SampleSource | Callable[[], int | None] | None) -> None:
        self._scheduled.clock.source = source

    def step(self, *positional: Any, samples: int | None = None, **others: Any) -> None:
        """Advance the clock by the updates applied since the last call, and set lr and weight decay.

        Args:
            samples: Real global samples (over all ranks) of those updates; keyword only. None: the data loader's count
                under ``prepare``; otherwise ``batch_size``, but not past the end of an epoch unless ``stream=True``.

        Raises:
            ValueError: ``samples`` is not a whole number >= 0, another argument was passed (torch's old
                ``step(epoch)``), or the schedule is not known yet.
        """
        if positional or others:
            refuse_epochs(positional, others)
        if samples is not None:
            samples = check_whole("samples", samples)
        scheduled = self._scheduled
        clock = scheduled.clock
        # Settling waits for other ranks and may raise, so it comes before anything changes.
        if not (applied := clock.take_applied(settle=samples is None)):
            return
        is_as_written = scheduled.groups.is_as_written()
        if not is_as_written and (warning := scheduled.find_other_writer()) is not None:
            warnings.warn(warning, stacklevel=2)
        cycle_before, batch_before = (self.cycle, self.batch_size) if self._verbose else (0, None)
        if samples is not None and (warning := scheduled.find_crossing(samples)) is not None:
            warnings.warn(warning, stacklevel=2)
        if samples is None and not scheduled.has_lagged and (warning := lag_warning(len(applied))) is not None:
            scheduled.has_lagged = True
            warnings.warn(warning, stacklevel=2)
        before = clock.samples
        clock.advance(applied, samples, scheduled.recipe.samples_of_update)
        scheduled.write(len(applied), follow=not is_as_written)
        pass_clock(scheduled.optimizer, scheduled.recipe, before, clock.samples)
        if (warning := scheduled.find_end_passed()) is not None:
            warnings.warn(warning, stacklevel=2)
        if not self._verbose or collectives.rank() != 0:
            return
        if self.batch_size != batch_before:
            report(__name__, f"global batch {self.batch_size:,} from sample {self.samples:,} on")
        if self.cycle != cycle_before:
            lr, decay = scheduled.values_of(0)(self.schedule.at(self.samples))
            report(__name__, describe_restart(scheduled.recipe, self.samples, lr, decay))

    def go_to(self, *, samples: int) -> None:
        """Set the clock, and write that sample's lr and weight decay into the groups. Local.

        Every rank calls it with the same number, between two updates. Weights, optimizer state and the position in the
        data do not change.

        Args:
            samples: Real global samples of the updates so far, warm-up included.

        Raises:
            ValueError: ``samples`` is not a whole number >= 0, the schedule is not known yet, or `step` has not been
                called since the last update.
        """
        samples = check_whole("samples", samples)
        _ = self.schedule
        self._scheduled.retract_skipped()
        if self._scheduled.clock.has_applied:
            raise ValueError(
                f"go_to(samples={samples}) between optimizer.step() and scheduler.step() would lose that update, or "
                "add it to the new count. Call it after scheduler.step()."
            )
        self._scheduled.clock.set(samples)
        self._scheduled.write()

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group at ``samples``."""
        return [*self._scheduled.lr()]

    def get_last_weight_decay(self) -> list[float]:
        """Return each group's ``weight_decay`` for the next update."""
        return self._scheduled.weight_decay()

    def __repr__(self) -> str:
        return describe_scheduler(self, self._scheduled)

    def state_dict(self) -> dict[str, Any]:
        """Return ``samples`` and the configuration as plain data; it loads with ``weights_only=True``."""
        self._scheduled.retract_skipped()
        return self._scheduled.state_dict()

    def configuration(self) -> dict[str, Any]:
        """Return everything that shapes the curve, except the clock and a constant global batch, as plain data."""
        return self._scheduled.configuration()

    def load_state_dict(self, state_dict: Mapping[str, Any], on_difference: OnDifference | None = None) -> None:
        """Restore the clock, and write lr and weight decay into the groups at once.

        A constant global batch remains this job's: lr continues on the same curve, and the decay is normalised by the
        new batch. A batch-size schedule is part of the configuration.

        Args:
            on_difference: If the saved configuration differs: "strict" raises, "checkpoint" takes the saved one, "new"
                keeps this one. Default: the attribute ``on_difference``, which the constructor sets.

        Raises:
            ValueError: not a state of this class, or configurations differ; nothing is changed.
        """
        choice = self.on_difference if on_difference is None else on_difference
        recipe, groups = prepare_load(state_dict, self._scheduled, choice)
        self._scheduled.load(recipe, groups, state_dict["samples"])

    def check_loadable(self, state_dict: Mapping[str, Any], on_difference: OnDifference | None = None) -> None:
        """Raise what `load_state_dict` would raise, and change nothing. Local."""
        prepare_load(state_dict, self._scheduled, self.on_difference if on_difference is None else on_difference)

    def agreement_record(self) -> dict[str, Any]:
        """Return the values that must be equal on all ranks at this update, as plain data."""
        return self._scheduled.agreement_record()
