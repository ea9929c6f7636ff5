"""The files of one job, read together, and what follows from several of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dist_adamw.recipes.kinds import ACCELERATE, DEEPSPEED, mistaken
from dist_adamw.recipes.recipe import RecipeLike, TrainingRecipe, load_recipe
from dist_adamw.recipes.source import FileError, Place, Problem, Source, read_file
from dist_adamw.schedule.batch import check_positive_int

PathLike = str | os.PathLike[str]
Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that would go wrong.

    Attributes:
        severity: "error": the job would stop, or silently compute something else. "warning": it may be meant.
        kind: A short name, the same for all findings of the kind, such as "clipping".
        file: The file that has the key.
        line: From 1; None if the key is not in a file.
        key: Dotted; "" for the whole file.
        sentence: What is wrong, the values, and what to do.
    """

    severity: Severity
    kind: str
    file: str
    line: int | None
    key: str
    sentence: str

    @classmethod
    def at(cls, severity: Severity, kind: str, problem: Problem) -> Finding:
        """Return a finding for a problem in a file."""
        return cls(severity, kind, problem.file, problem.line, problem.key, problem.sentence)

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        key = f"{self.key}: " if self.key else ""
        return f"{where}: {self.severity}: {key}{self.sentence} [{self.kind}]"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files, read.

    Attributes:
        recipe: None: there is none, or it has mistakes.
        accelerate: The Accelerate config.
        deepspeed: The DeepSpeed JSON, or what the Accelerate config has in its place.
        deepspeed_place: Where the keys of ``deepspeed`` are in its file.
        ranks: All ranks; None: not known.
    """

    recipe: TrainingRecipe | None
    accelerate: Source | None
    deepspeed: Source | None
    deepspeed_place: Place
    ranks: int | None

    @property
    def data_parallel_size(self) -> int | None:
        """The ranks that see different samples; None: not known."""
        if self.ranks is None:
            return None
        same = 1
        for axis in ("tp", "cp", "sp"):
            size = self.of_accelerate("parallelism_config", f"parallelism_config_{axis}_size")
            same *= size if isinstance(size, int) and size > 0 else 1
        return self.ranks // same

    def of_accelerate(self, *place: Any) -> Any:
        """Return a value of the Accelerate config; None if it does not have it."""
        return None if self.accelerate is None else self.accelerate.get(*place)

    def of_deepspeed(self, *place: Any) -> Any:
        """Return a value of the DeepSpeed configuration; None if it does not have it."""
        return None if self.deepspeed is None else self.deepspeed.get(*self.deepspeed_place, *place)

    def deepspeed_config(self) -> Mapping[str, Any]:
        """Return the DeepSpeed configuration; empty if there is none."""
        config = self.of_deepspeed() if self.deepspeed_place else getattr(self.deepspeed, "data", None)
        return config if isinstance(config, dict) else {}

    def uses_deepspeed(self) -> bool:
        """Return whether the engine is DeepSpeed, as far as the files say."""
        if self.accelerate is None:
            return self.deepspeed is not None
        return bool(self.of_accelerate("distributed_type") == "DEEPSPEED")

    def in_recipe(self, severity: Severity, kind: str, place: Place, sentence: str) -> Finding:
        """Return a finding in the recipe."""
        assert self.recipe is not None
        return Finding.at(severity, kind, self.recipe.source.problem(place, sentence))

    def in_accelerate(self, severity: Severity, kind: str, place: Place, sentence: str) -> Finding:
        """Return a finding in the Accelerate config."""
        assert self.accelerate is not None
        return Finding.at(severity, kind, self.accelerate.problem(place, sentence))

    def in_deepspeed(self, severity: Severity, kind: str, place: Place, sentence: str) -> Finding:
        """Return a finding in the DeepSpeed configuration."""
        assert self.deepspeed is not None
        return Finding.at(severity, kind, self.deepspeed.problem((*self.deepspeed_place, *place), sentence))


def is_true(value: Any) -> bool:
    """Return whether Accelerate, which reads YAML 1.1, takes ``value`` for true."""
    return value is True or (isinstance(value, str) and value.lower() in ("yes", "on", "true"))


def read_inputs(
    recipe: RecipeLike | TrainingRecipe | None,
    accelerate_config: PathLike | None,
    deepspeed: PathLike | None,
    ranks: int | None,
) -> tuple[Inputs, list[Finding]]:
    """Read the files, and return what is wrong with each alone. Local.

    Raises:
        ValueError: a file cannot be read, or ``ranks`` is not a whole number above 0.
    """
    if ranks is not None:
        ranks = check_positive_int("ranks", ranks)
    findings: list[Finding] = []
    loaded = None
    if recipe is not None:
        try:
            loaded = load_recipe(recipe)
        except FileError as error:
            if any(not problem.key for problem in error.problems):
                raise
            findings += [Finding.at("error", "recipe", problem) for problem in error.problems]
    accelerate = None if accelerate_config is None else _read_mapping(accelerate_config, ACCELERATE)
    inputs = Inputs(loaded, accelerate, None, (), ranks)
    if ranks is None and type(count := inputs.of_accelerate("num_processes")) is int and count > 0:
        ranks = count
    source, place = _deepspeed_of(inputs, deepspeed, findings)
    return Inputs(loaded, accelerate, source, place, ranks), findings


def _read_mapping(path: PathLike, what: str) -> Source:
    source = read_file(path)
    if not isinstance(source.data, dict):
        raise FileError([source.problem((), f"the file has no keys and values at its top, which {what} has.")])
    if (sentence := mistaken(source.data, what)) is not None:
        raise FileError([source.problem((), sentence)])
    return source


def _deepspeed_of(inputs: Inputs, given: PathLike | None, findings: list[Finding]) -> tuple[Source | None, Place]:
    """Return the DeepSpeed configuration: the file that was given, or that of the Accelerate config, or its keys."""
    accelerate, place = inputs.accelerate, ("deepspeed_config", "deepspeed_config_file")
    named = inputs.of_accelerate(*place)
    if given is None and isinstance(named, str) and named != "none":
        found = _find(named, accelerate)
        if found is None:
            sentence = f"there is no file {named}. The path is relative to the folder that the job is started in."
            findings.append(inputs.in_accelerate("error", "file", place, sentence))
            return None, ()
        return _read_mapping(found, DEEPSPEED), ()
    if given is not None:
        if isinstance(named, str) and _find(named, accelerate) not in (None, Path(given).resolve()):
            sentence = f"the config names {named}, and {os.fspath(given)} is to be checked. Pass the one that is used."
            findings.append(inputs.in_accelerate("warning", "file", place, sentence))
        return _read_mapping(given, DEEPSPEED), ()
    if isinstance(inputs.of_accelerate("deepspeed_config"), dict):
        return accelerate, ("deepspeed_config",)
    return None, ()


def _find(named: str, accelerate: Source | None) -> Path | None:
    """Return a path relative to the working directory, or to a folder above the Accelerate config."""
    above = [] if accelerate is None else list(Path(accelerate.name).resolve().parents)
    for folder in (Path.cwd(), *above):
        if (path := folder / named).is_file():
            return path.resolve()
    return None
