"""transformers' Trainer with a recipe file: the curve of a plain loop, and what must not contradict it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from dist_adamw import DistAdamW, prepare_trainer
from tests.distributed.test_trainer import (
    BATCH,
    CLIP,
    DECAY,
    EPOCHS,
    EPS,
    LR,
    SAVE,
    Curve,
    Network,
    Noting,
    Samples,
    arguments_on,
    check_same,
)
from tests.distributed.test_trainer_recipes import plain_loop
from tests.ranks import run_ranks

RECIPE: dict[str, Any] = {
    "optimizer": {
        "lr": LR,
        "weight_decay": DECAY,
        "eps": EPS,
        "max_grad_norm": CLIP,
        "bucket_numel": 1000,
        "no_decay": "one_dimensional",
    },
    "scheduler": {"restart_period": 0.75, "t_mult": 1.5, "min_lr": 1e-5, "policy": "linear"},
    "batch": {"size": BATCH, "micro_batch_size": 2},  # so that two ranks can share the last batch, of 4
    "training": {"total_samples": f"{EPOCHS} epochs"},
}
# What a recipe sets, at the defaults.
SET = {"learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "num_train_epochs"}
SET |= {"per_device_train_batch_size", "gradient_accumulation_steps"}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.name in SET}


def train(
    engine: str, folder: str, accumulation: int, options: dict[str, Any], resume: str | None = None
) -> tuple[Curve, int | None]:
    with arguments_on(engine, folder, accumulation, **options) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), recipe=RECIPE)
        trainer.train(resume_from_checkpoint=resume)
        made = trainer.optimizer
        while not isinstance(made, DistAdamW):
            made = made.optimizer
        return trainer.notes.rows, made.bucket_numel


@pytest.mark.parametrize(
    ("engine", "accumulation", "options"),
    [
        ("single", 1, DEFAULTS),  # the recipe sets four accumulation steps, and two on two ranks
        ("DDP", 1, DEFAULTS),
        ("ZeRO-2", 2, {"num_train_epochs": 3.0}),  # whose configuration has the batch: it must agree
    ],
)
def test_one_recipe_on_every_engine(engine: str, accumulation: int, options: dict[str, Any], tmp_path: Path) -> None:
    expected = plain_loop(RECIPE["scheduler"])
    ranks = 1 if engine == "single" else 2
    for rows, bucket_numel in run_ranks(ranks, train, engine, str(tmp_path), accumulation, options):
        assert bucket_numel == 1000
        check_same(rows, expected)


@pytest.mark.parametrize(("first", "second"), [("FSDP2", "single"), ("single", "DDP"), ("DDP", "FSDP2")])
def test_a_recipe_resumes_on_another_engine_and_number_of_ranks(first: str, second: str, tmp_path: Path) -> None:
    expected = plain_loop(RECIPE["scheduler"])
    before, after = (1 if engine == "single" else 2 for engine in (first, second))
    options = {**DEFAULTS, **SAVE}
    begun, _ = run_ranks(before, train, first, str(tmp_path), 1, options)[0]
    check_same(begun, expected)
    for rows, _ in run_ranks(after, train, second, str(tmp_path), 1, options, str(tmp_path / "checkpoint-8")):
        check_same(begun[:8] + rows, expected)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rate": 3e-4}, {}, r"optimizer\.lr: lr is 0\.01, and TrainingArguments has learning_rate=0\.0003"),
    (
        {"adam_beta2": 0.9},
        {},
        r"optimizer\.betas: betas is, by default, 0\.999, and .* has adam_beta2=0\.9",
    ),
    ({"max_grad_norm": 2.0}, {}, r"max_grad_norm is 0\.05, and TrainingArguments has max_grad_norm=2\.0"),
    ({"per_device_train_batch_size": 4}, {}, r"micro_batch_size is 2, and .* has per_device_train_batch_size=4"),
    ({"gradient_accumulation_steps": 3}, {}, r"size is 8, .* 2 x 3 accumulation steps x 1 ranks = 6\. Pass .*=4"),
    (
        {"num_train_epochs": 5.0},
        {},
        r"total_samples is 132 samples, and TrainingArguments\(num_train_epochs=5\.0\)",
    ),
    ({"max_steps": 5}, {}, r"total_samples is 132 samples, and TrainingArguments\(max_steps=5\) makes 40"),
    ({}, {"scheduler": {"t_mult": 2}}, r"t_mult=2 was given to prepare_trainer, and the recipe has 1\.5"),
    ({}, {"optimizer": {"lr": 1.0}}, r"Trainer takes it from TrainingArguments"),
    ({}, {"recipe": {**RECIPE, "batch": {"size": {0: 8, 50: 16}}}}, r"batch_size is a schedule"),
    ({}, {"recipe": {**RECIPE, "batch": {"size": 9, "micro_batch_size": 4}}}, r"global batch size 9 is not a multiple"),
    ({}, {"recipe": {"optimizer": {"no_decay": ["*.x"]}}}, r"no parameter's name matches the pattern '\*\.x'"),
    ({}, {"recipe": {"optimizer": {"lrs": 1.0}}}, r"Did you mean lr\?"),
]


def refusals(folder: str) -> None:
    for options, arguments, sentence in REFUSED:
        AcceleratorState._reset_state(reset_partial_state=True)
        with arguments_on("single", folder, 1, **{**DEFAULTS, **options}) as args:
            trainer = Noting(Network(), args, train_dataset=Samples())
            before, callbacks = {**vars(trainer)}, [*trainer.callback_handler.callbacks]
            given = {**vars(args)}
            with pytest.raises(ValueError, match=sentence):
                prepare_trainer(trainer, **{"recipe": RECIPE, **arguments}).create_optimizer()
            if hasattr(trainer, "_prepared_by_dist_adamw"):  # refused when the optimizer was made
                continue
            assert (vars(args), vars(trainer)) == (given, before)
            assert trainer.callback_handler.callbacks == callbacks


def engine_refusals(folder: str) -> None:
    scheduler = {"type": "CyclicLRWithRestarts", "params": {}}
    for json, sentence in (
        ({"scheduler": scheduler}, "the DeepSpeed configuration has scheduler, and recipe='recipe' was given here"),
        (
            {"gradient_clipping": 0.3},
            r"max_grad_norm is 0\.05, and the DeepSpeed .* has gradient_clipping=0\.3",
        ),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        with arguments_on("ZeRO-2", folder, 2, json=json) as args:
            trainer = Noting(Network(), args, train_dataset=Samples())
            config = copy.deepcopy(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
            with pytest.raises(ValueError, match=sentence):
                prepare_trainer(trainer, recipe=RECIPE)
            assert trainer.accelerator.state.deepspeed_plugin.deepspeed_config == config


def test_what_the_engine_contradicts_is_named(tmp_path: Path) -> None:
    run_ranks(2, engine_refusals, str(tmp_path))


def test_what_the_arguments_contradict_is_named(tmp_path: Path) -> None:
    run_ranks(1, refusals, str(tmp_path))
