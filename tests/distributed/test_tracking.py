"""Tracking on each engine, in Accelerate's loop and in Trainer: the same values everywhere."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader

from dist_adamw import CyclicLRWithRestarts, DistAdamW, Tracking, csv_tracker, prepare, prepare_trainer
from dist_adamw.tracking.csv_file import read_rows
from tests.distributed.engines import accelerator_on
from tests.distributed.test_engines import BATCH, EPOCH, RECIPE, data, network
from tests.distributed.test_trainer import BATCH as TRAINER_BATCH
from tests.distributed.test_trainer import EPOCH as TRAINER_EPOCH
from tests.distributed.test_trainer import RECIPE as TRAINER_RECIPE
from tests.distributed.test_trainer import Network, Noting, Samples, arguments_on
from tests.known import unwrap
from tests.ranks import run_ranks

ENGINES = ["DDP", "FSDP2", "ZeRO-1", "ZeRO-3"]
CLIP = 0.5
MEASURED = ("samples_per_second", "peak_memory_gb")
Values = list[dict[str, float]]


def track(engine: str, path: str, clip: str) -> tuple[int, Values]:
    """Train two epochs; return the number of rows that this rank logged, and its values of each update.

    Args:
        clip: "step" if the optimizer or the engine clips, "loop" if the loop does.
    """
    with accelerator_on(engine, 2) as accelerator:
        accelerator.log_with = [csv_tracker(path)]
        accelerator.init_trackers("job")
        model = network()
        norm = CLIP if clip == "step" else None
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.1, max_grad_norm=norm)
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        loader = DataLoader(data(), batch_size=BATCH // (accelerator.num_processes * 2))
        model, wrapped, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        tracking = Tracking(wrapped, scheduler, accelerator)
        rows = []
        for _ in range(2):
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(x), y)
                    accelerator.backward(loss)
                    if clip == "loop" and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    wrapped.step()
                    scheduler.step()
                    wrapped.zero_grad()
                tracking.log({"loss": loss})
                if accelerator.sync_gradients:
                    rows.append(tracking.values())
        written = sum(getattr(tracker.tracker, "_file", None) is not None for tracker in accelerator.trackers)
        for tracker in accelerator.trackers:
            tracker.finish()
    return written, rows


@functools.cache
def expected(folder: str) -> Values:
    ((_, rows),) = run_ranks(1, track, "single", f"{folder}/single.csv", "step")
    return rows


def check_same(rows: Values, others: Values) -> None:
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        exact = [name for name in row if name not in (*MEASURED, "grad_norm")]
        assert {name: row[name] for name in exact} == {name: other[name] for name in exact}
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tracking"))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_values_of_one_process(engine: str, folder: str) -> None:
    single = expected(folder)
    assert single[0]["grad_norm"] > CLIP  # before clipping
    assert [row.get("restart") for row in single] == [*[None] * 7, 1, None, None]
    path = Path(folder) / f"{engine}.csv"
    results = run_ranks(2, track, engine, str(path), "step")
    assert [written for written, _ in results] == [1, 0]  # the main rank's file alone
    for _, rows in results:
        check_same(rows, single)
    _, logged = read_rows(path)
    updates = 2 * EPOCH // BATCH
    assert [row["step"] for row in logged] == [str(BATCH * (i + 1)) for i in range(updates)]
    assert [float(row["lr"]) for row in logged] == [row["lr"] for row in single]
    assert all(row["loss"] for row in logged)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_the_norm_by_which_the_loop_clips(engine: str, folder: str) -> None:
    for _, rows in run_ranks(2, track, engine, f"{folder}/{engine}-loop.csv", "loop"):
        check_same(rows, expected(folder))


# -------------------------------------------------------------------- Trainer


def train(engine: str, folder: str) -> list[dict[str, Any]]:
    """Return what Trainer logged on this rank."""
    options: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 4, "num_train_epochs": 2}
    evaluation: dict[str, Any] = {"eval_strategy": "epoch", "label_names": ["y"], "prediction_loss_only": True}
    with arguments_on(engine, folder, 2, **options, **evaluation) as args:
        data = Samples()
        trainer = Noting(Network(), args, train_dataset=data, eval_dataset=data)
        prepare_trainer(trainer, scheduler=TRAINER_RECIPE)
        trainer.train()
        assert unwrap(trainer.optimizer).updates == 12
        return trainer.state.log_history


@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), *((engine, 2) for engine in ENGINES)])
def test_trainer_logs_them_with_the_loss(engine: str, world_size: int, tmp_path: Path) -> None:
    ranks = run_ranks(world_size, train, engine, str(tmp_path))
    for history in ranks:
        json.dumps(history)  # Trainer saves it with its checkpoints
        training = [row for row in history if "loss" in row]
        assert [row["step"] for row in training] == [4, 8, 12]
        assert [row["updates"] for row in training] == [4, 8, 12]
        assert [row["samples"] for row in training] == [4 * TRAINER_BATCH, 60, 2 * TRAINER_EPOCH]
        assert [row["cycle"] for row in training] == [0, 1, 2]  # of 33 and 49.5 samples
        assert [row.get("restart") for row in training] == [None, 1, 2]
        assert {row["weight_decay"] > 0 and row["skipped_updates"] == 0 for row in training} == {True}
        for row in training:
            assert {"loss", "learning_rate", "grad_norm", "tau", *MEASURED} - row.keys() <= {"samples_per_second"}
            assert "lr" not in row
        others = [row for row in history if "loss" not in row]
        assert len(others) == 3  # two evaluations and the end
        assert not any({"samples", "tau", "weight_decay"} & row.keys() for row in others)


def train_twice(folder: str) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 6, "num_train_epochs": 1}
    with arguments_on("single", folder, 1, **options) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler=TRAINER_RECIPE)
        trainer.train()
        trainer.train()
        return trainer.state.log_history


def test_a_second_training_begins_again(tmp_path: Path) -> None:
    (history,) = run_ranks(1, train_twice, str(tmp_path))
    assert [row["samples"] for row in history if "loss" in row] == [TRAINER_EPOCH]
