"""``load_recipe`` and ``from_recipe``: optimizer, schedule and batch from one file."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
import yaml
from pydantic import BaseModel, ValidationError
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.recipes.decay import NoDecay, parameter_groups
from dist_adamw.recipes.kinds import RECIPE, mistaken
from dist_adamw.recipes.problems import problems_of, with_corrected_keys
from dist_adamw.recipes.sections import DTYPES, SECTIONS, RecipeFile
from dist_adamw.recipes.source import FileError, Place, Problem, Source, read_file
from dist_adamw.schedule.batch import GlobalBatch
from dist_adamw.schedule.batch_schedule import read_batch, solve_each
from dist_adamw.schedule.lengths import Length, Sizes, in_samples, parse
from dist_adamw.schedule.preview import Preview
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts

Section = dict[str, Any]
_LARGE_EPOCH = 1 << 40  # samples, in place of a size that is not known
# Lengths of the schedule: the unit of a number, and whether they may be a share of a cycle.
_LENGTHS = (
    ("restart_period", "epochs", False),
    ("min_restart_period", "epochs", False),
    ("warmup_samples", "samples", False),
    ("cycle_ends", "samples", False),
    ("total_samples", "samples", False),
    ("decay_length", "samples", True),
    ("rewarmup", "samples", True),
    ("weight_decay_timescale", "samples", True),
)
RecipeLike = str | os.PathLike[str] | Mapping[str, Any]
# What constructors call a key in their errors.
_NAMES_IN_ERRORS = {"learning rate": "lr", "epsilon value": "eps", "beta parameter": "betas", "batch_size": "size"}


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Optimizer, schedule, batch and length of training, as a recipe file has them; from `load_recipe`.

    The sections have only the keys that the file has. They are copies: change a recipe with `with_changes`.

    Attributes:
        source: The file and the lines of its keys, for errors.
    """

    _sections: Mapping[str, Section]
    source: Source = field(compare=False, repr=False)

    @property
    def optimizer(self) -> Section:
        """Arguments of `DistAdamW` and ``no_decay``; dtypes by name."""
        return copy.deepcopy(self._sections["optimizer"])

    @property
    def scheduler(self) -> Section:
        """Arguments of `CyclicLRWithRestarts`, without the batch."""
        return copy.deepcopy(self._sections["scheduler"])

    @property
    def batch(self) -> Section:
        """``size`` and ``micro_batch_size``."""
        return copy.deepcopy(self._sections["batch"])

    @property
    def training(self) -> Section:
        """``total_samples``."""
        return copy.deepcopy(self._sections["training"])

    @property
    def no_decay(self) -> NoDecay:
        """Which parameters do not decay: "none", "norms_and_biases", "one_dimensional" or patterns of names."""
        return self.optimizer.get("no_decay") or "none"

    @property
    def total_samples(self) -> Length | None:
        """The length of training; None if the recipe does not say."""
        given: Length | None = self.training.get("total_samples", self.scheduler.get("total_samples"))
        return given

    def optimizer_arguments(self) -> dict[str, Any]:
        """Return the arguments of `DistAdamW` other than ``params``. Local."""
        given = self.optimizer
        given.pop("no_decay", None)
        if "betas" in given:
            given["betas"] = tuple(given["betas"])
        return {name: DTYPES.get(value, value) if name.endswith("_dtype") else value for name, value in given.items()}

    def scheduler_arguments(self) -> dict[str, Any]:
        """Return the arguments of `CyclicLRWithRestarts` other than ``optimizer``. Local."""
        size = self.batch.get("size")
        return self.scheduler if size is None else {"batch_size": size, **self.scheduler}

    def make_optimizer(self, model: nn.Module | ParamsT, **options: Any) -> DistAdamW:
        """Return the optimizer of ``model``, in two groups if ``no_decay`` leaves some parameters out. Local.

        Args:
            model: The model; without ``no_decay`` also parameters or groups, as for any torch optimizer.
            options: Further arguments of `DistAdamW`, such as ``mesh``. They override those of the recipe.

        Raises:
            ValueError: an argument is out of its range; ``no_decay`` needs a model, or one of its patterns matches
                nothing.
        """
        with _located(self, "optimizer"):
            params = parameter_groups(model, self.no_decay)
            return DistAdamW(params, **{**self.optimizer_arguments(), **options})

    def make_scheduler(self, optimizer: Optimizer, **options: Any) -> CyclicLRWithRestarts:
        """Return the scheduler of ``optimizer``, for `dist_adamw.prepare`, which fills in missing sizes. Local.

        Args:
            optimizer: From `make_optimizer`, or any torch optimizer.
            options: Further arguments of `CyclicLRWithRestarts`, such as ``policy_fn``. They override those of the
                recipe.

        Raises:
            ValueError: an argument is out of its range.
        """
        with _located(self, "scheduler"):
            return CyclicLRWithRestarts(optimizer, **{**self.scheduler_arguments(), **options})

    def global_batch(self, data_parallel_size: int | None = None) -> GlobalBatch:
        """Return the accumulation that makes the global batch; of a schedule, its first one. Local.

        ``Accelerator(gradient_accumulation_steps=recipe.global_batch().gradient_accumulation_steps)`` uses it.

        Args:
            data_parallel_size: The number of ranks that see different samples. None: all that were launched (the
                process group's, or else WORLD_SIZE).

        Raises:
            ValueError: the recipe has no batch; or one, of a schedule any, is not a multiple of the micro-batch times
                the ranks.
        """
        for name in ("size", "micro_batch_size"):
            if self.batch.get(name) is None:
                raise FileError([self.source.problem(("batch",), f"{name} is not there, and is needed. Add it.")])
        micro = self.batch["micro_batch_size"]
        if data_parallel_size is None:
            data_parallel_size = _launched_ranks()
        first, given = read_batch(self.batch["size"])
        with _located(self, "batch", "size"):
            if given is not None:
                return solve_each(given, micro_batch_size=micro, data_parallel_size=data_parallel_size)[0]
            return GlobalBatch.solve(size=first, micro_batch_size=micro, data_parallel_size=data_parallel_size)

    def preview(self, **options: Any) -> Preview:
        """Return the table of restarts and the curves of a parameter that decays. Local.

        Args:
            options: ``batch_size`` and ``epoch_size``, if the recipe lacks them; other arguments of
                `CyclicLRWithRestarts.preview`, of which ``total_samples`` is the recipe's by default.

        Raises:
            ValueError: batch or epoch size is not known, or an argument is out of its range.
        """
        sizes = {name: options.pop(name) for name in ("batch_size", "epoch_size") if name in options}
        scheduler = self.make_scheduler(_stand_in(self), **sizes)
        for name, where in (("batch_size", ("batch", "size")), ("epoch_size", ("scheduler", "epoch_size"))):
            if getattr(scheduler, name) is None:
                sentence = f"{where[1]} is not there, and a preview needs it. Add it, or pass {name}."
                raise FileError([self.source.problem(where, sentence)])
        with _located(self, "training"):
            return scheduler.preview(**{"total_samples": self.total_samples, **options})

    def with_changes(self, **sections: Mapping[str, Any]) -> TrainingRecipe:
        """Return the recipe with other values: ``recipe.with_changes(optimizer={"lr": 1e-4})``. Local.

        Args:
            sections: By section, the keys to replace or to add.

        Raises:
            ValueError: as `load_recipe`.
        """
        data: dict[str, Any] = copy.deepcopy(dict(self._sections))
        changed: set[Place] = set()
        for name, keys in sections.items():
            data[name] = {**data.get(name, {}), **keys}
            changed |= {(name, key) for key in keys}
        changed |= {(name,) for name in sections if not self._sections.get(name)}
        lines = {place: line for place, line in self.source.lines.items() if place[:2] not in changed}
        data = {name: keys for name, keys in data.items() if keys}
        return _read(Source(self.source.name, data, lines, self.source.changed | changed))

    def to_yaml(self) -> str:
        """Return the recipe as the text of a file. Local."""
        given = {name: keys for name, keys in self._sections.items() if keys}
        text: str = yaml.safe_dump(given, sort_keys=False, default_flow_style=None, width=120)
        return text

    def __str__(self) -> str:
        return self.to_yaml()


def load_recipe(recipe: RecipeLike | TrainingRecipe) -> TrainingRecipe:
    """Return the recipe of a YAML or JSON file. Local.

    Everything is checked that can be without a model: keys, types, ranges, and, if batch and epoch size are there, the
    whole schedule.

    Args:
        recipe: The file; or its content as a mapping; or a recipe, which is returned.

    Raises:
        ValueError: file, line and key of the first mistake, with a sentence.
    """
    if isinstance(recipe, TrainingRecipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _read(Source("recipe", copy.deepcopy(dict(recipe))))
    if not isinstance(recipe, str | os.PathLike):
        raise ValueError(
            f"a recipe must be a file, a mapping or a TrainingRecipe, got a {type(recipe).__name__}. Pass one of these."
        )
    return _read(read_file(recipe))


def from_recipe(
    recipe: RecipeLike | TrainingRecipe, model: nn.Module | ParamsT
) -> tuple[DistAdamW, CyclicLRWithRestarts]:
    """Return the optimizer and the scheduler that a recipe file describes. Local; pass both to `dist_adamw.prepare`.

    Args:
        recipe: The file; or its content as a mapping; or a `TrainingRecipe`.
        model: The model; without ``no_decay`` also parameters or groups, as for any torch optimizer.

    Raises:
        ValueError: as `load_recipe` and `TrainingRecipe.make_optimizer`.
    """
    loaded = load_recipe(recipe)
    optimizer = loaded.make_optimizer(model)
    return optimizer, loaded.make_scheduler(optimizer)


def _read(source: Source) -> TrainingRecipe:
    """Return the recipe of a file's data.

    Raises:
        FileError: all mistakes that were found.
    """
    data = source.data
    if isinstance(data, dict):
        data.pop("$schema", None)  # by which a JSON file names its schema
    if not isinstance(data, dict) or not data:
        what = "is empty" if not data else f"has {'a list' if isinstance(data, list) else 'a text'} at its top"
        sections = ", ".join(SECTIONS)
        raise FileError([source.problem((), f"the file {what}; a recipe has the sections {sections}. Write one.")])
    if (sentence := mistaken(data, RECIPE)) is not None:
        raise FileError([source.problem((), sentence)])
    try:
        checked = RecipeFile.model_validate(data)
    except ValidationError as error:
        raise FileError([*problems_of(error, source), *_problems_of_values(error, source)]) from error
    given = {name: _given(getattr(checked, name), data.get(name, {})) for name in SECTIONS}
    recipe = TrainingRecipe(given, source)
    _check_ranges(recipe)
    return recipe


def _problems_of_values(error: ValidationError, source: Source) -> list[Problem]:
    """Return the problems that are left when misspelt keys are corrected, if no value of a known key is left out."""
    corrected = with_corrected_keys(error, source)
    if corrected is None:
        return []
    try:
        _read(corrected)
    except FileError as found:
        return list(found.problems)
    return []


def _given(section: BaseModel, data: Mapping[str, Any]) -> Section:
    """Return the keys that the file has, in its order, with converted values."""
    found = {}
    for key in data:
        value = getattr(section, key)
        if key == "averages" and value is not None:
            value = {name: _given(average, data[key][name]) for name, average in value.items()}
        found[key] = value
    return found


def _stand_in(recipe: TrainingRecipe) -> DistAdamW:
    """Return an optimizer of one number that has the recipe's options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # make_optimizer gives these warnings
        return DistAdamW([nn.Parameter(torch.zeros(1))], **recipe.optimizer_arguments())


def _check_ranges(recipe: TrainingRecipe) -> None:
    """Build everything once, with the sizes that are known.

    Raises:
        FileError: an argument is out of its range.
    """
    with _located(recipe, "optimizer"):
        optimizer = _stand_in(recipe)
    scheduler = recipe.make_scheduler(optimizer)
    if not scheduler._scheduled.recipe.is_known:
        _check_units(recipe)
    if (total := recipe.training.get("total_samples")) is not None:
        with _located(recipe, "training", "total_samples"):
            _check_total(total, recipe.scheduler.get("total_samples"), scheduler)


def _check_units(recipe: TrainingRecipe) -> None:
    """Raise FileError if a length has a unit that its argument does not understand, whatever batch and epoch are."""
    options = recipe.scheduler
    sizes = Sizes(_LARGE_EPOCH, 1, options.get("tokens_per_sample"))
    for name, unit, has_shares in _LENGTHS:
        value = options.get(name)
        for one in value if isinstance(value, list) else [value]:
            if one is None or one == 0:
                continue
            with _located(recipe, "scheduler", name):
                in_samples(name, one, unit, sizes, Fraction(_LARGE_EPOCH) if has_shares else None)


def _check_total(total: Length, of_schedule: Length | None, scheduler: CyclicLRWithRestarts) -> None:
    in_samples("total_samples", total, "samples", Sizes(_LARGE_EPOCH, 1, _tokens_of(scheduler)))
    amount, unit = parse("total_samples", total, "samples")
    if scheduler._scheduled.recipe.is_known:
        samples = in_samples("total_samples", total, "samples", scheduler.schedule.sizes)
        differs = of_schedule is not None and math.ceil(samples) != scheduler.schedule.last_sample
    else:
        other = None if of_schedule is None else parse("total_samples", of_schedule, "samples")
        differs = other is not None and other[1] == unit and other[0] != amount
    if differs:
        raise ValueError(
            f"total_samples is {total!r} here and {of_schedule!r} under scheduler, which ends the last cycle there. "
            "Leave one out."
        )


def _tokens_of(scheduler: CyclicLRWithRestarts) -> int | None:
    tokens: int | None = scheduler._scheduled.recipe.options["tokens_per_sample"]
    return tokens


def _launched_ranks() -> int:
    """Return the number of ranks, also before the process group is made."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def _located(recipe: TrainingRecipe, section: str, key: str | None = None) -> Iterator[None]:
    """Give an error file, line and key: ``key``, or the one that its sentence mentions."""
    try:
        yield
    except FileError:
        raise
    except (ValueError, ArithmeticError) as error:
        place = _place_of(str(error), section, recipe) if key is None else (section, key)
        raise FileError([recipe.source.problem(place, str(error))]) from error


def _place_of(sentence: str, section: str, recipe: TrainingRecipe) -> Place:
    """Return the place of the key that ``sentence`` mentions first; ``section`` if it mentions none."""
    places: dict[str, Place] = {}
    for name in (section, *SECTIONS):
        for key in recipe._sections[name]:
            places.setdefault(key, (name, key))
    names = {key: key for key in places} | {word: key for word, key in _NAMES_IN_ERRORS.items() if key in places}
    found = [
        (match.start(), -len(word), places[key])
        for word, key in names.items()
        if (match := re.search(rf"(?<![A-Za-z_]){re.escape(word)}(?![A-Za-z_])", sentence)) is not None
    ]
    place = min(found)[2] if found else (section,)
    if section != "optimizer" or ("average" not in sentence and "EMA" not in sentence and "Mean" not in sentence):
        return place
    averages = recipe.optimizer.get("averages") or {}
    named = next((name for name in averages if repr(name) in sentence), next(iter(averages), None))
    return ("optimizer", "averages") if named is None else ("optimizer", "averages", named)
