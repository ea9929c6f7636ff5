"""The options of the main job, from YAML files and the command line.

Each part of the job defines its own options; this module combines them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml
from gpt import ModelConfig
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from recipe import Recipe, options_of
from run import NEWEST
from text import TextConfig

AUTO = "auto"
_DESCRIPTION = "Train a byte-level GPT with DistAdamW and warm restarts, on any number of ranks."
# Options that a resumed job may change: the number of cycles, and the batch, whose size the schedule checks.
_load_yaml = get_loader("yaml")
_FREE = ("recipe.cycles", "recipe.micro_batch", "recipe.global_batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How the job runs. Except for the seed, nothing here changes the result.

    Args:
        seed: Seed of the initial weights and of the order of the data.
        validate_every: Samples between two validations; 0 for the ends of cycles only.
        save_every: Samples between two checkpoints; 0 for the ends of cycles only.
        keep: How many of the newest checkpoints to keep.
        snapshots: Whether to keep the weights of each cycle's end, in --out/snapshots, and to report the held-out loss
            of their ensemble.
        overwrite: Delete the checkpoints in --out, and start from the beginning.
        tracker: One of Accelerate's trackers, such as tensorboard or wandb, or none.
        timeout: Seconds that a rank waits for the others, so that a launcher can continue without a machine that is
            cut off; longer than writing a checkpoint takes. Null for torch's default: 1800, or 600 on GPUs.
    """

    seed: int = 0
    validate_every: int = 1280
    save_every: int = 0
    keep: int = 2
    snapshots: bool = False
    overwrite: bool = False
    tracker: str = "tensorboard"
    timeout: int | None = None

    def __post_init__(self) -> None:
        for name in ("validate_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name} must be >= 0, got {getattr(self, name)}.")
        if self.timeout is not None and self.timeout < 1:
            raise ValueError(f"run.timeout must be above 0 or null, got {self.timeout}.")
        if self.keep < 1:
            raise ValueError(f"run.keep must be above 0, got {self.keep}.")


_SECTIONS: dict[str, Any] = {"model": ModelConfig, "text": TextConfig, "recipe": Recipe, "run": RunConfig}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All options."""

    data: str | None = None
    out: str = "runs/small"
    resume: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    recipe: Recipe = field(default_factory=Recipe)
    run: RunConfig = field(default_factory=RunConfig)

    def shaping(self) -> dict[str, Any]:
        """Return the options that a resumed job must not change."""
        sections = {name: asdict(self)[name] for name in ("model", "text", "recipe")}
        flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        flat |= {"recipe.betas": list(self.recipe.betas), "run.seed": self.run.seed}
        return {name: value for name, value in flat.items() if name not in _FREE}


def _load(text: str) -> Any:
    """Load YAML, without aliases and deep nesting: jsonargparse expands aliases, and is slow on nested lists."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 9:
            raise yaml.YAMLError("lists are nested ten deep; nine is the limit")
    return _load_yaml(text)


def _with_recipe_file(arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments with the options that a recipe file stands for, after ``--config`` and before other options.

    Raises:
        ValueError: the file has a mistake.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe_file")
    first.add_argument("--config", action="append", default=[])
    found, others = first.parse_known_args(arguments)
    if found.recipe_file is None:
        return arguments
    configs = [f"--config={path}" for path in found.config]
    return [*configs, f"--recipe={json.dumps(options_of(found.recipe_file))}", *others]


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line and the YAML files that it names.

    Raises:
        ValueError: an option is unknown or out of its range.
    """
    set_loader("yaml", _load, (yaml.YAMLError,))
    parser = ArgumentParser(prog="train.py", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of options, such as configs/train/small.yaml")
    recipe_help = "a recipe file (docs/recipe_files.md), in place of all --recipe options but cycles, which override it"
    parser.add_argument("--recipe_file", type=str | None, help=recipe_help)
    parser.add_argument("--data", type=str | None, help="file or folder to train on; default: Python's own library")
    parser.add_argument("--out", type=str, default=Config().out, help="folder for everything that the run writes")
    resume = "continue from the newest checkpoint in --out, or from the given one; auto: from the newest whole one, "
    resume += "or from the beginning if there is none"
    parser.add_argument("--resume", type=str, nargs="?", const=NEWEST, help=resume)
    for name, part in _SECTIONS.items():
        parser.add_class_arguments(part, name)
    try:
        arguments = _with_recipe_file(sys.argv[1:] if arguments is None else arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}. See train.py --help.") from error
    try:
        told = parser.parse_args(arguments)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"the configuration cannot be read: {error}. See train.py --help.") from error
    except argparse.ArgumentError as error:
        sentence = re.sub(r"Parser key \"([^\"]+)\":", r"--\1:", " ".join(str(error).split()).rstrip("."))
        sentence = re.sub(r"<class '(\w+)'>|typing\.", r"\1", sentence)
        raise ValueError(f"{sentence[:1000]}. See train.py --help.") from error
    for name, part in _SECTIONS.items():
        if not isinstance(told[name], Namespace):
            raise ValueError(f"--{name}: a section must have keys and values. See train.py --help.")
        for one in fields(part):  # jsonargparse accepts null for any option with a default
            if told[name][one.name] is None and "None" not in str(one.type):
                raise ValueError(f"--{name}.{one.name} cannot be null. See train.py --help.")
    options = parser.instantiate(told)
    return Config(**{name: options[name] for name in ("data", "out", "resume", "model", "text", "recipe", "run")})
