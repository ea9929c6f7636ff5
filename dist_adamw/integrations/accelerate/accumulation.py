"""Change Accelerate's gradient accumulation where a batch-size schedule changes the global batch.

Accelerate counts micro-batches in ``accelerator.step``. It updates where that is a multiple of the accumulation, and at
the end of an epoch. Before the first micro-batch of an update, `Accumulation` reads the schedule's clock, sets the
accumulation, and lets Accelerate count from 0.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dist_adamw.integrations.accelerate.data import LoaderFacts, accumulation_steps, engine_of, loader_facts
from dist_adamw.integrations.deepspeed.configuration import batch_sizes_of, set_accumulation
from dist_adamw.schedule.batch_schedule import GivenBatches, read_batch_sizes, solve_each
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator


# By accelerator: what sets its accumulation, which a second `prepare` replaces.
_FOLLOWING: weakref.WeakKeyDictionary[Accelerator, Accumulation] = weakref.WeakKeyDictionary()
# By accelerator: the accumulation that was set here last, and so was not chosen by the script.
_SET: weakref.WeakKeyDictionary[Accelerator, int] = weakref.WeakKeyDictionary()


def batches_of(accelerator: Accelerator, optimizer: Any, scheduler: Any) -> GivenBatches | None:
    """Return the batch-size schedule of a scheduler, or of the DeepSpeed configuration that defines it. Local.

    Raises:
        ValueError: the configuration's is not one; or it would change the accumulation of another optimizer too.
    """
    given: Any = None
    if isinstance(scheduler, CyclicLRWithRestarts):
        given = scheduler._scheduled.recipe.batch_schedule
    elif engine_of(accelerator) == "DEEPSPEED":
        written = batch_sizes_of(accelerator.deepspeed_plugin.deepspeed_config)
        given = read_batch_sizes(written) if isinstance(written, Mapping) else None
    for other in _other_schedulers(accelerator, unwrap(optimizer)):
        if isinstance(other, CyclicLRWithRestarts) and (given or other._scheduled.recipe.batch_schedule):
            raise ValueError(
                "a batch-size schedule changes the accumulation of all optimizers of the process, and another one was "
                "prepared with this accelerator. Give both one batch_size, or call accelerator.free_memory() if that "
                "phase of training is over."
            )
    return None if given is None else tuple(given)


def _other_schedulers(accelerator: Accelerator, optimizer: Optimizer) -> list[Any]:
    """Return the schedulers that were prepared for other optimizers. Local."""
    schedulers = [getattr(stepped, "scheduler", stepped) for stepped in accelerator._schedulers]
    return [one for one in schedulers if getattr(one, "optimizer", optimizer) is not optimizer]


def loader_facts_of(
    accelerator: Accelerator, optimizer: Any, dataloader: DataLoader[Any], scheduler: Any
) -> LoaderFacts:
    """Return `loader_facts` with the scheduler's batch-size schedule, if it has one. Local.

    Raises:
        ValueError: as `loader_facts` and `batches_of`; or the script has chosen an accumulation that makes none of the
            schedule's global batches.
    """
    batches = batches_of(accelerator, optimizer, scheduler)
    facts = loader_facts(accelerator, dataloader, batches)
    steps = accumulation_steps(accelerator)
    if batches is None or steps in (1, _SET.get(accelerator)):  # 1 is the default
        return facts
    size, sizes = steps * facts.pass_samples, [size for _, size in batches]
    if size not in sizes:
        raise ValueError(
            f"gradient_accumulation_steps={steps} makes a global batch of {size}, which is none of the schedule's "
            f"({', '.join(map(str, sizes))}). Leave it out: the accumulation follows batch_size."
        )
    return facts


def begin_accumulation(accelerator: Accelerator, optimizer: Any, scheduler: Any, facts: LoaderFacts) -> None:
    """Set the accumulation of a schedule's first global batch, before the engine is built. Local."""
    if batches_of(accelerator, optimizer, scheduler) is None:
        return
    steps = facts.batch.gradient_accumulation_steps
    _set(accelerator, steps)
    if engine_of(accelerator) == "DEEPSPEED":
        accelerator.deepspeed_plugin.deepspeed_config["gradient_accumulation_steps"] = steps


def _set(accelerator: Accelerator, steps: int) -> None:
    """Accumulate ``steps`` micro-batches from the next one on. Local."""
    accelerator.gradient_accumulation_steps = _SET[accelerator] = steps
    accelerator.step = 0


def follow_batches(accelerator: Accelerator, scheduler: LRScheduler, facts: LoaderFacts) -> None:
    """Have the accumulation follow the batch-size schedule of ``scheduler``, if it has or gets one. Local."""
    _FOLLOWING.pop(accelerator, None)
    if isinstance(scheduler, CyclicLRWithRestarts):
        _FOLLOWING[accelerator] = Accumulation(accelerator, scheduler, facts)
        follow(accelerator)  # the clock may be past the first global batch


def follow(accelerator: Accelerator) -> None:
    """Set the accumulation for the update that begins at the schedule's clock. Local."""
    if (accumulation := _FOLLOWING.get(accelerator)) is not None:
        accumulation.follow()


@contextlib.contextmanager
def accumulate(accelerator: Accelerator, accumulate_theirs: Callable[..., Any], *models: nn.Module) -> Iterator[None]:
    """Accumulate as Accelerate does, as many micro-batches as a batch-size schedule says. Local."""
    if (accumulation := _FOLLOWING.get(accelerator)) is not None:
        accumulation.begin_micro_batch()
    with accumulate_theirs(*models):
        yield


class Accumulation:
    """Keeps an accelerator's accumulation at the global batch of a schedule. Local; the same on every rank.

    A scheduler with one global batch is left alone, until it gets a schedule of them.

    Args:
        accelerator: The accelerator, held weakly.
        scheduler: Its prepared scheduler, held weakly.
        facts: The micro-batch and the ranks.
    """

    def __init__(self, accelerator: Accelerator, scheduler: CyclicLRWithRestarts, facts: LoaderFacts) -> None:
        self._accelerator, self._scheduler = weakref.ref(accelerator), weakref.ref(scheduler)
        self._facts = facts
        self._follows = False  # whether there is or was a batch-size schedule
        self._has_begun = False  # whether the loop has called accelerator.accumulate
        scheduler._scheduled.check_batches = self.check_batches
        known = weakref.ref(self)

        def before_update(optimizer: Optimizer, *_: Any) -> None:
            if (alive := known()) is not None:
                alive._check_update(optimizer)

        scheduler.optimizer.register_step_pre_hook(before_update)

    @property
    def scheduler(self) -> CyclicLRWithRestarts | None:
        """The scheduler that the accumulation follows; None: it has one global batch, or is gone."""
        scheduler = self._scheduler()
        if scheduler is None:
            return None
        self._follows = self._follows or scheduler._scheduled.recipe.batch_schedule is not None
        return scheduler if self._follows else None

    def check_batches(self, recipe: Recipe) -> None:
        """Raise ValueError if a global batch of ``recipe`` cannot be made of whole micro-batches."""
        given = recipe.batch_schedule
        if given is None and recipe.batch_size is not None and self.scheduler is not None:
            given = ((0, recipe.batch_size),)
        if recipe.batch_schedule is not None:
            self._check_alone(recipe)
        if given is not None:
            batch = self._facts.batch
            solve_each(given, micro_batch_size=batch.micro_batch_size, data_parallel_size=batch.data_parallel_size)

    def _check_alone(self, recipe: Recipe) -> None:
        accelerator, scheduler = self._accelerator(), self._scheduler()
        if accelerator is None or scheduler is None or not _other_schedulers(accelerator, scheduler.optimizer):
            return
        raise ValueError(
            f"batch_size {dict(recipe.batch_schedule or ())} is a schedule, which would change the accumulation of all "
            "optimizers that this accelerator has prepared. Load or set one batch_size, or prepare this one alone."
        )

    def begin_micro_batch(self) -> None:
        """Handle ``accelerator.accumulate``: set the accumulation, if an update begins.

        Raises:
            ValueError: the schedule of another accelerator has set it.
        """
        self._has_begun = True
        accelerator = self._accelerator()
        if accelerator is None:
            return
        if self.scheduler is None:
            self._check_unchanged(accelerator)
        elif accelerator.step % accelerator.gradient_accumulation_steps == 0:
            self.follow()

    def _check_unchanged(self, accelerator: Accelerator) -> None:
        steps, ours = accelerator.gradient_accumulation_steps, self._facts.batch.gradient_accumulation_steps
        if steps != ours and any(other is not accelerator and of == steps for other, of in _SET.items()):
            raise ValueError(
                f"this accelerator was prepared to accumulate {ours} micro-batches, and a batch-size schedule that "
                f"another one follows has set {steps}: Accelerate has one accumulation per process. Give both one "
                "batch_size."
            )

    def follow(self) -> None:
        """Set the accumulation for the update that begins at the schedule's clock."""
        accelerator, scheduler = self._accelerator(), self.scheduler
        if accelerator is None or scheduler is None:
            return
        if self._steps(scheduler) == accelerator.gradient_accumulation_steps:
            return
        # The device may have skipped the last update, and then the clock has not passed the boundary. Asking waits for
        # the device, so it is done only here.
        scheduler._scheduled.retract_skipped()
        steps = self._steps(scheduler)
        if steps == accelerator.gradient_accumulation_steps:
            return
        _set(accelerator, steps)
        if engine_of(accelerator) == "DEEPSPEED":
            set_accumulation(accelerator.deepspeed_engine_wrapped.engine, steps)

    def _steps(self, scheduler: CyclicLRWithRestarts) -> int:
        batch_size = scheduler.batch_size
        assert batch_size is not None
        return batch_size // self._facts.pass_samples

    def _check_update(self, optimizer: Optimizer) -> None:
        """Raise ValueError if the update that begins has another number of micro-batches than the schedule says."""
        accelerator, scheduler = self._accelerator(), self.scheduler
        if accelerator is None or scheduler is None or _FOLLOWING.get(accelerator) is not self:
            return
        if not optimizer.state and all(group["lr"] == 0 for group in optimizer.param_groups):
            return  # torch's get_optimizer_state_dict makes such a step, which is not an update
        if not self._has_begun:
            raise ValueError(
                f"batch_size is a schedule ({scheduler._scheduled.recipe.batches}), which needs accelerator.accumulate("
                "model) around each micro-batch: there the accumulation changes. Use it, or pass one batch_size."
            )
        steps = accelerator.gradient_accumulation_steps
        if steps != self._steps(scheduler):
            raise ValueError(
                f"the update that begins at sample {scheduler.samples:,} has a global batch of {scheduler.batch_size} "
                f"by the schedule, and the accelerator accumulates {steps} micro-batches, that is "
                f"{steps * self._facts.pass_samples} samples. Call scheduler.step() after every optimizer.step() and "
                "before the next accelerator.accumulate(); leave accelerator.gradient_accumulation_steps alone."
            )
