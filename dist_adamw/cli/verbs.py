"""The verbs of ``dist-adamw``. To add one, write a function that returns an `Answer`, and add a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb.

    Attributes:
        place: Its module in this package, and its function, whose signature is the command line.
        examples: Its arguments in examples.
        passes_on: Whether everything after the first positional argument is passed on unread.
    """

    place: str
    examples: tuple[str, ...]
    passes_on: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """The function. It returns an `Answer`, or a function that does the work and returns the exit status."""
        module, _, name = self.place.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"dist_adamw.cli.{module}"), name)
        return function

    @property
    def summary(self) -> str:
        """The first sentence of its help, without the full stop."""
        return (self.function.__doc__ or "").partition("\n")[0].partition(". ")[0].rstrip(".")


VERBS = {
    "preview": Verb(
        "schedule:preview",
        (
            '--batch_size 32 --epoch_size 50000 --restart_period 1 --total_samples "15 epochs"',
            "recipe.yaml --epoch_size 50000 --plot recipe.png",
        ),
    ),
    "plot": Verb(
        "schedule:plot",
        (
            "--batch_size 32 --epoch_size 50000 --restart_period 1",
            "cosine.yaml wsd.yaml --epoch_size 50000 --axis updates --out curves.svg",
        ),
    ),
    "batch": Verb("schedule:batch", ("--size 256 --micro_batch_size 8 --data_parallel_size 4",)),
    "plan": Verb(
        "planning:plan",
        (
            "1.3B --ranks 8,16,64 --memory 80GiB",
            "model.py:make_model recipe.yaml --epoch_size 50000 --mixed_precision bf16",
        ),
    ),
    "check": Verb(
        "planning:check", ("recipe.yaml --accelerate_config config.yaml", "recipe.yaml --deepspeed ds.json --ranks 8")
    ),
    "schema": Verb("planning:schema", ("> recipe.schema.json",)),
    "lr-range": Verb(
        "lr_range:lr_range", ("--ranks 2 --out range.png launch/train.py --out /tmp/range",), passes_on=True
    ),
    "inspect": Verb("checkpoints:inspect", ("runs/mine/checkpoints", "--verify --json checkpoint-500")),
    "import": Verb("checkpoints:import_", ("theirs.pt checkpoint", "pytorch_model_fsdp_0 checkpoint --kind dcp")),
    "export": Verb("checkpoints:export", ("runs/mine/checkpoints weights.safetensors --kind safetensors --master",)),
    "diff": Verb("runs:diff", ("runs/mine runs/again", "runs/mine runs/mine")),
    "completion": Verb("completion:completion", ("bash > ~/.local/share/bash-completion/completions/dist-adamw",)),
}
