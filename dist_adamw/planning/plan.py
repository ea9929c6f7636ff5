"""The plan of a job: `plan` computes it, and `Plan` is the result."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from dist_adamw.planning import text
from dist_adamw.planning.engines import ENGINES, cost_of, engines_for
from dist_adamw.planning.memory import Cost, Setup
from dist_adamw.planning.model import ModelShapes, read_module, shapes_from
from dist_adamw.planning.schedule import Given, SchedulePlan, from_recipe, schedule_plan, setup_of
from dist_adamw.recipes.recipe import TrainingRecipe
from dist_adamw.schedule.batch import GlobalBatch, check_positive_int, shown
from dist_adamw.schedule.batch_schedule import BatchSizes
from dist_adamw.schedule.lengths import Length
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts

MOST_RANKS = 4096  # of the search for the smallest number
_LARGEST = 1_000_000  # number of ranks that is planned


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One number of ranks.

    Attributes:
        batch: How the largest global batch is divided; None: it is not known, or cannot be.
        problem: Why it cannot be divided; costs are empty then.
    """

    ranks: int
    batch: GlobalBatch | None
    costs: tuple[Cost, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """The smallest number of ranks on which an engine fits into the memory.

    Attributes:
        fits: False: it does not on any number that was tried, and ``cost`` is that of the largest.
    """

    engine: str
    fits: bool
    cost: Cost


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of `plan`; ``print`` it.

    Attributes:
        setup: The options that the costs depend on; ``accumulation`` is that of each `RankPlan` if its batch is known.
        memory: The bytes that a device has; None: not given.
        fits: By engine; empty without ``memory``.
    """

    model: ModelShapes
    setup: Setup
    schedule: SchedulePlan
    by_ranks: tuple[RankPlan, ...]
    memory: int | None = None
    fits: tuple[Fit, ...] = ()

    def __str__(self) -> str:
        blocks = [text.model_text(self.model), text.schedule_text(self.schedule)]
        for one in self.by_ranks:
            blocks.append(text.ranks_text(one.ranks, one.batch, one.costs, one.problem))
        blocks.append(text.uncounted(self.setup))
        if self.memory is not None:
            rows = [(fit.engine, fit.fits, fit.cost) for fit in self.fits]
            blocks.append(text.fits_text(self.memory, rows, MOST_RANKS))
        return "\n\n".join(filter(None, blocks))

    @property
    def is_feasible(self) -> bool:
        """Whether one of the numbers of ranks divides the global batch and, with ``memory``, some engine fits."""
        return any(one.costs for one in self.by_ranks) and (self.memory is None or any(fit.fits for fit in self.fits))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for JSON; sizes are bytes."""
        model = self.model
        preview = self.schedule.preview
        return {
            "model": {
                "source": model.source,
                "parameters": model.numel,
                "trained": sum(param.numel for param in model.trained),
                "bytes": sum(param.nbytes for param in model.parameters),
                "tensors": len(model.parameters),
                "layers": len(model.layers),
            },
            "setup": {one.name: _plain(getattr(self.setup, one.name)) for one in fields(self.setup)},
            "schedule": {
                "global_batch": None if self.schedule.batches is None else list(self.schedule.batches.sizes),
                "micro_batch_size": self.schedule.micro_batch_size,
                "total_samples": self.schedule.total_samples,
                "updates": self.schedule.updates,
                "restarts": [] if preview is None else [asdict(row) for row in preview.rows],
            },
            "ranks": [
                {
                    "ranks": one.ranks,
                    "batch": None if one.batch is None else asdict(one.batch),
                    "problem": one.problem or None,
                    "engines": [_cost(cost) for cost in one.costs],
                }
                for one in self.by_ranks
            ],
            "memory": self.memory,
            "fits": [{"fits": fit.fits, **_cost(fit.cost)} for fit in self.fits],
            "feasible": self.is_feasible,
        }


def plan(
    model: nn.Module | str | float,
    *,
    ranks: Sequence[int] = (1, 2, 4, 8),
    memory: int | None = None,
    setup: Setup | None = None,
    dtype: str | torch.dtype | None = None,
    layers: str | None = None,
    recipe: TrainingRecipe | None = None,
    scheduler: CyclicLRWithRestarts | None = None,
    batch_size: int | BatchSizes | None = None,
    micro_batch_size: int | None = None,
    total_samples: Length | None = None,
    engines: Sequence[str] | None = None,
) -> Plan:
    """Plan a job. Local; no process group, no GPU and no memory for weights are needed.

    Args:
        model: A module, a factory, a Hugging Face configuration or a number of parameters: see `read_model`.
        ranks: Numbers of ranks to show.
        memory: Bytes of a device. The plan then names the smallest number of ranks that fits, for each engine.
        setup: What memory and traffic depend on; options of the recipe's or the scheduler's optimizer replace its own.
        dtype: Of the parameters; None: the model's.
        layers: The class of the modules that FSDP2 shards one by one; None: see `read_model`.
        recipe: From ``dist_adamw.load_recipe``; in place of ``scheduler``.
        scheduler: Has the table of restarts, the global batch and, with its `DistAdamW`, the options of state.
        batch_size: The global batch, if there is no schedule, or a recipe that lacks it.
        micro_batch_size: Samples of one rank in a forward pass. With the global batch it gives the accumulation.
        total_samples: Samples of the whole training.
        engines: Some of `ENGINES`; None: all.

    Raises:
        ValueError: says which argument is wrong, and what to pass.
        ModuleNotFoundError: ``model`` is a Hugging Face model, and transformers is not installed.
    """
    wanted = [_ranks(one) for one in ranks]
    if memory is not None:
        memory = check_positive_int("memory", memory)
    names = _engines(engines)
    module = read_module(model)
    shapes = shapes_from(model, module, dtype=dtype, layers=layers)
    given = Given(scheduler, None, batch_size, micro_batch_size, total_samples)
    if recipe is not None:
        given = _merged(recipe, module, given)
    if given.scheduler is not None and given.optimizer is None:
        given = replace(given, optimizer=given.scheduler.optimizer)
    setup = setup_of(given.optimizer, Setup() if setup is None else setup)
    schedule = schedule_plan(given)
    by_ranks = tuple(_of_ranks(shapes, one, setup, schedule, names) for one in dict.fromkeys(wanted))
    fits = () if memory is None else _fits(shapes, memory, setup, schedule, names)
    return Plan(shapes, setup, schedule, by_ranks, memory, fits)


def _ranks(ranks: int) -> int:
    if check_positive_int("ranks", ranks) > _LARGEST:
        raise ValueError(f"ranks must be at most {_LARGEST:,}, got {ranks:,}.")
    return int(ranks)


def _engines(engines: Sequence[str] | None) -> list[str]:
    for name in engines or ():
        if name not in ENGINES:
            raise ValueError(f"engines has {shown(name)}. Engines are {', '.join(ENGINES)}.")
    return list(ENGINES if engines is None else engines)


def _merged(recipe: TrainingRecipe, module: nn.Module | None, given: Given) -> Given:
    """Return what the recipe says, but what the caller says in its place."""
    if given.scheduler is not None:
        raise ValueError("pass a recipe or a scheduler, not both.")
    if given.batch_size is not None:
        if recipe.batch.get("size") is not None:
            raise ValueError("the recipe has the global batch, which its schedule depends on: leave batch_size out.")
        recipe = recipe.with_changes(batch={"size": given.batch_size})
    found = from_recipe(recipe, module)
    micro, total = given.micro_batch_size, given.total_samples
    return replace(
        found,
        micro_batch_size=found.micro_batch_size if micro is None else micro,
        total_samples=found.total_samples if total is None else total,
    )


def _of_ranks(shapes: ModelShapes, ranks: int, setup: Setup, schedule: SchedulePlan, names: Sequence[str]) -> RankPlan:
    try:
        batch = schedule.largest(ranks)
    except ValueError as error:
        return RankPlan(ranks, None, (), str(error))
    setup = _with_batch(setup, batch)
    costs = [cost_of(name, shapes, ranks, setup) for name in engines_for(ranks, setup) if name in names]
    return RankPlan(ranks, batch, tuple(costs))


def _with_batch(setup: Setup, batch: GlobalBatch | None) -> Setup:
    return setup if batch is None else replace(setup, accumulation=batch.gradient_accumulation_steps)


def _fits(
    shapes: ModelShapes, memory: int, setup: Setup, schedule: SchedulePlan, names: Sequence[str]
) -> tuple[Fit, ...]:
    candidates = [ranks for ranks in range(1, MOST_RANKS + 1) if _divides(schedule, ranks)]
    found = []
    for name in names:
        usable = [ranks for ranks in candidates if name in engines_for(ranks, setup)]
        if usable:
            found.append(_smallest(name, shapes, memory, setup, schedule, usable))
    return tuple(found)


def _divides(schedule: SchedulePlan, ranks: int) -> bool:
    if schedule.batches is None or schedule.micro_batch_size is None:
        return True
    return all(size % (schedule.micro_batch_size * ranks) == 0 for size in schedule.batches.sizes)


def _smallest(
    name: str, shapes: ModelShapes, memory: int, setup: Setup, schedule: SchedulePlan, usable: Sequence[int]
) -> Fit:
    """Return the smallest of ``usable`` that fits. More ranks need less each, up to padding."""

    def cost(ranks: int) -> Cost:
        return cost_of(name, shapes, ranks, _with_batch(setup, schedule.largest(ranks)))

    place = bisect_left(usable, True, key=lambda ranks: cost(ranks).memory.total <= memory)
    if place == len(usable):
        return Fit(name, False, cost(usable[-1]))
    return Fit(name, True, cost(usable[place]))


def _cost(cost: Cost) -> dict[str, Any]:
    return {**asdict(cost), "memory": {**asdict(cost.memory), "total": cost.memory.total}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: str(one) for name, one in value.items()}
    return value if isinstance(value, int | float | bool | str | None) else str(value)
