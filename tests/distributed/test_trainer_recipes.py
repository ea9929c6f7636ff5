"""transformers' Trainer with phases, given ends and readings of decay; its refusal of a batch-size schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainingArguments

from dist_adamw import EMA, CyclicLRWithRestarts, DistAdamW, prepare_trainer
from tests.distributed.test_trainer import (
    BATCH,
    CLIP,
    DECAY,
    EPOCH,
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
from tests.known import unwrap
from tests.ranks import run_ranks

# An epoch has 6 updates, of which the last has half a batch, and a checkpoint is saved after 8 updates of 18.
RECIPES: dict[str, dict[str, Any]] = {
    "wsd": {
        "restart_period": "5 updates",
        "t_mult": 1,
        "warmup_samples": "2 updates",
        "policy": "wsd",
        "decay_length": "40%",
        "decay_shape": "one_minus_sqrt",
        "rewarmup": "1 update",
        "weight_decay_norm": "first_cycle",
    },
    "ends": {"cycle_ends": ["0.5 epochs", 70, "3 epochs"], "policy": "linear", "weight_decay_timescale": "2 cycles"},
    "total": {"total_samples": "3 epochs", "fit": "scale", "restart_period": 0.8, "peak_factor": [1.0, 0.5, 0.8]},
}
PLACES: dict[str, tuple[str, str]] = {
    "wsd": ("single", "DDP"),
    "ends": ("DDP", "ZeRO-2"),
    "total": ("FSDP2", "single"),
}


def train(engine: str, folder: str, accumulation: int, recipe: dict[str, Any], resume: str | None = None) -> Curve:
    """A run of Trainer; ``resume`` is the checkpoint to begin from."""
    with arguments_on(engine, folder, accumulation, **SAVE) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler=recipe)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.notes.rows


def plain_loop(recipe: dict[str, Any]) -> Curve:
    """The same in torch, on one process."""
    model, data = Network(), Samples()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim == 2]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY, eps=EPS)
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, EPOCH, **recipe)
    rows = []
    for start in [*range(0, EPOCH, BATCH)] * EPOCHS:
        batch = torch.utils.data.default_collate([data[i] for i in range(start, min(start + BATCH, EPOCH))])
        loss = model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        values = [[g[key] for g in optimizer.param_groups] for key in ("lr", "weight_decay")]
        rows.append((scheduler.samples, *values, loss.item()))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return rows


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_and_a_resume_elsewhere(name: str, tmp_path: Path) -> None:
    recipe, (first, second) = RECIPES[name], PLACES[name]
    expected = plain_loop(recipe)
    assert len({row[1][0] for row in expected}) > 6  # a schedule that moves
    before, after = (1 if engine == "single" else 2 for engine in (first, second))
    begun = run_ranks(before, train, first, str(tmp_path), before, recipe)[0]
    check_same(begun, expected)
    for rows in run_ranks(after, train, second, str(tmp_path), after, recipe, str(tmp_path / "checkpoint-8")):
        check_same(begun[:8] + rows, expected)


# ---------------------------------------------------------------- averages of the weights


@torch.no_grad()
def held_out(trainer: Any) -> float:
    data = Samples()
    batch = torch.utils.data.default_collate([data[i] for i in range(EPOCH)])
    return trainer.model_wrapped(**batch)["loss"].item()


def averaged(engine: str, folder: str, resume: str | None = None) -> dict[str, Any]:
    """A run that evaluates with its weights, and with an average of them."""
    accumulation = 1 if engine == "single" else 2  # so that every rank has a whole share of the last batch
    with arguments_on(engine, folder, accumulation, **SAVE) as args:
        noting = Noting(Network(), args, train_dataset=Samples())
        averages = {"ema": EMA(decay=0.5)}
        trainer = prepare_trainer(noting, optimizer={"averages": averages}, scheduler={"restart_period": 1})
        trainer.train(resume_from_checkpoint=resume)
        before = held_out(trainer)
        with trainer.optimizer.averaged("ema"):
            average = held_out(trainer)
        assert held_out(trainer) == before
        return {"weights": before, "average": average, "updates": unwrap(trainer.optimizer).contributions("ema")}


def test_trainer_evaluates_with_an_average_on_every_engine(tmp_path: Path) -> None:
    whole = run_ranks(1, averaged, "single", str(tmp_path / "whole"))[0]
    assert whole["updates"] == 18
    assert abs(whole["average"] - whole["weights"]) > 1e-4
    for engine in ("DDP", "FSDP2", "ZeRO-2"):
        folder = str(tmp_path / engine)
        found = run_ranks(2, averaged, engine, folder)
        assert found[0] == found[1]
        again = run_ranks(1, averaged, "single", folder, str(Path(folder) / "checkpoint-8"))[0]
        for one in (found[0], again):
            assert one["updates"] == 18
            assert one["average"] == pytest.approx(whole["average"], rel=1e-4)
            assert one["weights"] == pytest.approx(whole["weights"], rel=1e-4)


# ---------------------------------------------------------------- a batch-size schedule


BATCHES = {0: BATCH, 100: 2 * BATCH}


def options(args: TrainingArguments) -> None:
    prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler={"batch_size": BATCHES})


def given(args: TrainingArguments) -> None:
    model = Network()
    optimizer = DistAdamW(model.parameters(), lr=LR)
    scheduler = CyclicLRWithRestarts(optimizer, BATCHES)
    prepare_trainer(Noting(model, args, train_dataset=Samples(), optimizers=(optimizer, scheduler)))


def from_a_checkpoint(args: TrainingArguments) -> None:
    """With ``on_difference="checkpoint"``, of a run that had a schedule."""
    trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), on_difference="checkpoint")
    trainer.create_optimizer_and_scheduler(18)
    state = trainer.lr_scheduler.state_dict()
    state["configuration"]["batch_size_schedule"] = [[0, BATCH], [100, 2 * BATCH]]
    trainer.lr_scheduler.load_state_dict(state)


def json(args: TrainingArguments) -> None:
    prepare_trainer(Noting(Network(), args, train_dataset=Samples()))


JSON = {
    "optimizer": {"type": "DistAdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "CyclicLRWithRestarts", "params": {"batch_size": {"0": BATCH, "100": 2 * BATCH}}},
}
REFUSED: list[tuple[str, Callable[[TrainingArguments], None], dict[str, Any]]] = [
    ("DDP", options, {}),
    ("DDP", given, {}),
    ("DDP", from_a_checkpoint, {}),
    ("ZeRO-2", json, {"json": JSON}),
]


def refusals(folder: str) -> list[str]:
    said = []
    for engine, attempt, more in REFUSED:
        AcceleratorState._reset_state(reset_partial_state=True)
        with arguments_on(engine, folder, 2, **more) as args:
            with pytest.raises(ValueError, match="batch_size is a schedule") as raised:
                attempt(args)
            said.append(str(raised.value))
    return said


def test_one_accumulation_for_all_of_training(tmp_path: Path) -> None:
    for said in run_ranks(2, refusals, str(tmp_path)):
        assert len(said) == len(REFUSED)
        for text in said:
            assert "Trainer has one accumulation for all of training (TrainingArguments)" in text
            assert "\n" not in text
