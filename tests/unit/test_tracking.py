"""Tracking: what it logs in real loops, to real trackers, and when; messages through logging."""

from __future__ import annotations

import csv
import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import StepLR

from dist_adamw import CyclicLRWithRestarts, DistAdamW, Tracking, csv_tracker, prepare
from dist_adamw.tracking.csv_file import CsvFile, read_rows
from tests.conftest import ROOT
from tests.distributed.jobs import RECIPE, data, model_of_two_layers

Rows = list[dict[str, str]]
LENGTH, BATCH, ACCUMULATION = 40, 2, 2


class Run:
    """The loop that every Accelerate user has, with both trackers."""

    def __init__(self, folder: Path, **tracking: Any) -> None:
        self.folder = folder
        self.accelerator = Accelerator(
            log_with=["tensorboard", csv_tracker(folder / "log.csv")],
            project_dir=str(folder),
            gradient_accumulation_steps=ACCUMULATION,
        )
        self.accelerator.init_trackers("job")
        model = model_of_two_layers()
        adamw = DistAdamW(model.parameters(), 1e-2, weight_decay=0.05, max_grad_norm=1.0)
        scheduler = CyclicLRWithRestarts(adamw, **RECIPE)
        loader = torch.utils.data.DataLoader(data(LENGTH), BATCH)
        self.model, self.optimizer, self.loader, self.scheduler = prepare(
            self.accelerator, model, adamw, loader, scheduler
        )
        self.inner = adamw
        self.tracking = Tracking(self.optimizer, self.scheduler, self.accelerator, **tracking)
        self.truth: list[dict[str, float]] = []

    def train(self, epochs: int = 1, after_update: Callable[[], None] = lambda: None) -> None:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.mse_loss(self.model(x), y)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self._note(loss)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.tracking.log({"loss": loss})
                if self.accelerator.sync_gradients:
                    after_update()

    def _note(self, loss: torch.Tensor) -> None:
        group, point = self.inner.param_groups[0], self.scheduler.schedule.at(self.scheduler.samples)
        norm = nn.utils.get_total_norm([param.grad for param in self.model.parameters() if param.grad is not None])
        self.truth.append(
            {
                "loss": loss.item(),
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "cycle": point.cycle.index,
                "tau": point.tau,
                "grad_norm": float(norm),
            }
        )

    def rows(self) -> Rows:
        with (self.folder / "log.csv").open() as file:
            return list(csv.DictReader(file))

    def events(self) -> EventAccumulator:
        found = EventAccumulator(str(self.folder / "job"))
        found.Reload()
        return found


def test_one_row_for_each_update_with_the_values_that_it_used(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(epochs=3)
    rows = run.rows()
    assert [int(row["step"]) for row in rows] == [4 * i for i in range(1, 31)]
    assert [row["samples"] for row in rows] == [row["step"] for row in rows]
    assert [int(row["updates"]) for row in rows] == [*range(1, 31)]
    assert {row["skipped_updates"] for row in rows} == {"0"}
    for row, true in zip(rows, run.truth, strict=True):
        assert {name: float(row[name]) for name in ("loss", "lr", "weight_decay", "cycle", "tau")} == {
            name: value for name, value in true.items() if name != "grad_norm"
        }
        assert float(row["grad_norm"]) == pytest.approx(true["grad_norm"])
        assert float(row["epoch"]) == int(row["samples"]) / LENGTH
        assert 0.01 < float(row["peak_memory_gb"]) < 100
    restarts = {int(row["step"]): row["restart"] for row in rows if row["restart"]}
    assert restarts == {60: "1", 100: "2"}
    assert not rows[0]["samples_per_second"]
    assert all(float(row["samples_per_second"]) > 0 for row in rows[1:])
    events = run.events()
    assert {"loss", "lr", "weight_decay", "cycle", "tau", "grad_norm", "restart"} <= {*events.Tags()["scalars"]}
    assert [(event.step, event.value) for event in events.Scalars("restart")] == [(60, 1.0), (100, 2.0)]
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([true["lr"] for true in run.truth])


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.train(epochs=3)
    first = Run(tmp_path / "parts")
    first.train()
    first.accelerator.save_state(str(tmp_path / "state"))
    first.train()  # it is killed at the end of this epoch, so what it logs here comes again
    torch.manual_seed(0)
    second = Run(tmp_path / "parts")
    second.accelerator.load_state(str(tmp_path / "state"))
    second.train(epochs=2)
    varying = ("samples_per_second", "peak_memory_gb")
    assert [{k: v for k, v in row.items() if k not in varying} for row in second.rows()] == [
        {k: v for k, v in row.items() if k not in varying} for row in whole.rows()
    ]
    for name in ("loss", "lr", "restart"):
        found, expected = second.events().Scalars(name), whole.events().Scalars(name)
        assert [(e.step, e.value) for e in found] == [(e.step, e.value) for e in expected]


def test_a_second_tracking_in_one_process_hides_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train()
    run.scheduler.go_to(samples=0)  # another phase
    run.tracking = Tracking(run.optimizer, run.scheduler, run.accelerator)
    run.train()
    assert [int(row["step"]) for row in run.rows()] == 2 * [4 * i for i in range(1, 11)]
    assert len(run.events().Scalars("lr")) == 20


def test_every_is_a_grid_of_samples_and_restarts_are_logged_in_any_case(tmp_path: Path) -> None:
    run = Run(tmp_path, every=32)
    run.train(epochs=3)
    assert [int(row["step"]) for row in run.rows()] == [32, 60, 64, 96, 100]


def test_a_bar_that_reads_the_values_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, every=32)
    log = run.tracking.log

    def read_then_log(values: Any) -> None:
        run.tracking.values()
        log(values)

    run.tracking.log = read_then_log  # type: ignore[method-assign, assignment]
    run.train(epochs=3)
    assert [int(row["step"]) for row in run.rows()] == [32, 60, 64, 96, 100]


def test_nothing_is_read_from_a_device_in_between(tmp_path: Path) -> None:
    run = Run(tmp_path, every=32)

    def far_away() -> None:
        run.inner._outcome.norm = torch.empty((), device="meta")

    # `step` measures the norm, so it is replaced after it.
    run.inner.register_step_post_hook(lambda *_: far_away())
    with pytest.raises(RuntimeError, match="meta"):
        run.train()
    assert run.scheduler.samples == 32


def test_steps_may_be_updates(tmp_path: Path) -> None:
    run = Run(tmp_path, axis="updates")
    run.train()
    assert [(row["step"], row["samples"]) for row in run.rows()] == [(str(i), str(4 * i)) for i in range(1, 11)]


def test_a_skipped_update_is_counted_and_has_no_row(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def spoil(*_: Any) -> None:
        if len(run.truth) == 3:
            grad = next(run.model.parameters()).grad
            assert grad is not None
            grad[0, 0] = math.inf

    run.inner.register_step_pre_hook(spoil)
    run.train()
    assert [int(row["step"]) for row in run.rows()] == [4 * i for i in range(1, 10)]
    assert [int(row["skipped_updates"]) for row in run.rows()] == [0, 0, *[1] * 7]


def test_an_update_that_gradscaler_leaves_out_is_counted() -> None:
    Accelerator()
    weight = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], 0.1), scaler=scaler)
    tracking = Tracking(optimizer)
    for i in range(5):
        weight.grad = torch.full((3,), math.inf if i in (1, 2) else 1.0)
        scaler.scale(torch.zeros(()))
        optimizer.step()
        tracking._end_update()
    assert tracking.values()["skipped_updates"] == 2
    assert tracking.values()["updates"] == 3


def two_groups(**of_groups: Any) -> list[dict[str, Any]]:
    return [
        {"params": [nn.Parameter(torch.ones(3))], **{name: value[i] for name, value in of_groups.items()}}
        for i in range(2)
    ]


def step(optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(3)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"weight_decay": (0.1, 0.0)}, {"lr", "weight_decay"}),
        ({"weight_decay": (0.1, 0.2)}, {"lr", "weight_decay/0", "weight_decay/1"}),
        (
            {"lr": (0.1, 0.2), "name": ("head", "body")},
            {"lr/head", "lr/body", "weight_decay/head", "weight_decay/body"},
        ),
        ({"lr": (0.1, 0.2), "name": ("one", "one")}, {"lr/0", "lr/1", "weight_decay/0", "weight_decay/1"}),
        ({"lr_scale": (1.0, 0.5)}, {"lr/0", "lr/1", "weight_decay/0", "weight_decay/1"}),
    ],
)
def test_groups_that_differ_have_a_value_each(groups: dict[str, Any], expected: set[str]) -> None:
    optimizer = DistAdamW(two_groups(**groups), 0.1)
    scheduler = CyclicLRWithRestarts(optimizer, 10, 100, warmup_samples=50)
    tracking = Tracking(optimizer, scheduler)
    for _ in range(3):  # in the warm-up's first update all lr are 0, and names are the same
        lr, decay = [[group[name] for group in optimizer.param_groups] for name in ("lr", "weight_decay")]
        step(optimizer, scheduler)
        values = tracking.values()
        assert {name for name in values if name.startswith(("lr", "weight_decay"))} == expected
        of_groups = [value for name, value in values.items() if name.startswith("lr/")]
        assert of_groups in ([], lr)
        assert values.get("weight_decay", decay[0]) == decay[0]


def test_a_tensor_lr_is_that_of_the_update() -> None:
    lr = torch.tensor(0.1)
    optimizer = DistAdamW([nn.Parameter(torch.ones(3))], lr)
    scheduler = CyclicLRWithRestarts(optimizer, 10, 100, restart_period=1)
    tracking = Tracking(optimizer, scheduler)
    step(optimizer, scheduler)
    assert tracking.values()["lr"] == pytest.approx(0.1)
    assert float(optimizer.param_groups[0]["lr"]) < 0.0999


def test_other_schedulers_and_optimizers() -> None:
    optimizer = torch.optim.AdamW(two_groups(), 0.1)
    scheduler = StepLR(optimizer, 2, 0.5)
    tracking = Tracking(optimizer, scheduler)
    assert tracking.values()["updates"] == 0
    for expected in (0.1, 0.1, 0.05):
        step(optimizer, scheduler)
        values = tracking.values()
        assert values["lr"] == expected
    assert values.keys() == {"lr", "weight_decay", "updates", "skipped_updates", "peak_memory_gb"}
    assert values["updates"] == 3
    with pytest.raises(ValueError, match="every=100 counts samples, which StepLR does not"):
        Tracking(optimizer, scheduler, every=100)


def test_the_norm_by_which_the_loop_clips(tmp_path: Path) -> None:
    accelerator = Accelerator()
    model: nn.Module = model_of_two_layers()
    adamw = DistAdamW(model.parameters(), 1e-2)
    scheduler = CyclicLRWithRestarts(adamw, restart_period=1)
    loader = torch.utils.data.DataLoader(data(8), 8)
    model, optimizer, loader, scheduler = prepare(accelerator, model, adamw, loader, scheduler)
    tracking = Tracking(optimizer, scheduler, accelerator)
    for x, y in loader:
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        accelerator.clip_grad_norm_(list(model.parameters())[:1], 1.0)
        assert adamw.grad_norm is None  # of one parameter alone
        norm = accelerator.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        scheduler.step()
    assert tracking.values()["grad_norm"] == float(norm) > 1e-3
    adamw.step()  # which nothing has measured
    assert adamw.grad_norm is None


def test_the_norm_of_another_optimizer_is_not_its_own() -> None:
    accelerator = Accelerator()
    ours, theirs = nn.Linear(2, 1), nn.Linear(2, 1)
    first, second = DistAdamW(ours.parameters()), DistAdamW(theirs.parameters())
    accelerator.prepare(first, second)
    prepare(accelerator, ours, first, torch.utils.data.DataLoader(data(8), 2), CyclicLRWithRestarts(first, **RECIPE))
    ours(torch.ones(2)).sum().backward()
    accelerator.clip_grad_norm_(ours.parameters(), 0.1)
    theirs(torch.ones(2)).sum().backward()
    second.step()
    assert second.grad_norm is None
    first.step()
    assert first.grad_norm is not None


def test_mistakes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    batches = iter(run.loader)

    def update() -> None:
        x, y = next(batches)
        run.accelerator.backward(nn.functional.mse_loss(run.model(x), y))
        run.optimizer.step()

    update()
    with pytest.raises(ValueError, match=r"Call it after scheduler\.step"):
        run.tracking.log()
    run.scheduler.step()
    update()
    run.scheduler.step()
    with pytest.raises(ValueError, match="'loss' is a tensor with 2 elements"):
        run.tracking.log({"loss": torch.zeros(2)})
    update()
    run.scheduler.step()
    with pytest.raises(ValueError, match="name of a value must be text, got 1"):
        run.tracking.log({1: 2.0})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="no accelerator"):
        Tracking(run.optimizer, run.scheduler).log()
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((run.model,), {}, "torch optimizer, got Sequential"),
        ((run.optimizer, run.accelerator), {}, "torch scheduler or None, got Accelerator"),
        ((run.optimizer, run.scheduler, run.scheduler), {}, "an Accelerator, got CyclicLRWithRestarts"),
        ((run.optimizer, run.scheduler), {"every": 0}, "above 0, got 0"),
        ((run.optimizer, run.scheduler), {"every": 1.5}, "whole number"),
        ((run.optimizer, run.scheduler), {"axis": "epochs"}, "got 'epochs'"),
    ]
    for arguments, options, words in wrong:
        with pytest.raises(ValueError, match=words):
            Tracking(*arguments, **options)


def test_values_that_are_never_logged_are_noticed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train()  # with accumulation, and its loss at each micro-batch
    with pytest.warns(UserWarning, match="does not log 'val', since there was no update") as warned:
        run.tracking.log({"loss": 0.0, "val": 1.0})
    run.tracking.log({"val": 1.0})
    assert len(warned) == 1


def test_forgotten_trackers_are_noticed(tmp_path: Path) -> None:
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(tmp_path))
    optimizer = DistAdamW(two_groups(), 0.1)
    scheduler = CyclicLRWithRestarts(optimizer, 10, 100)
    tracking = Tracking(optimizer, scheduler, accelerator)
    step(optimizer, scheduler)
    with pytest.warns(UserWarning, match="call accelerator.init_trackers"):
        tracking.log()
    step(optimizer, scheduler)
    tracking.log()  # once


def test_hooks_do_not_keep_it_alive() -> None:
    optimizer = DistAdamW(two_groups(), 0.1)
    tracking = Tracking(optimizer)
    known = weakref.ref(tracking)
    del tracking
    gc.collect()
    assert known() is None
    step(optimizer)


# -------------------------------------------------------------------- CSV


def test_the_file_of_a_finished_run_is_kept(tmp_path: Path) -> None:
    for _ in range(3):
        Run(tmp_path).train()
    assert [len(read_rows(tmp_path / name)[1]) for name in ("log.csv", "log.csv.1", "log.csv.2")] == [10, 10, 10]


def test_a_csv_file_gets_columns_as_they_come(tmp_path: Path) -> None:
    file = CsvFile(tmp_path / "a" / "log.csv")
    file.append({"loss": 0.1}, 1)
    file.append({"loss": 1 / 3, "text": 'a "b", c\nd'}, 2)
    file.append({"other": 5}, None)
    names, rows = read_rows(file.path)
    assert names == ["step", "loss", "text", "other"]
    assert [list(row.values()) for row in rows] == [
        ["1", "0.1", "", ""],
        ["2", repr(1 / 3), 'a "b", c\nd', ""],
        ["", "", "", "5"],
    ]
    file.close()
    with file.path.open("a") as text:
        text.write("3,0.")  # a killed process
    again = CsvFile(file.path)
    again.append({"loss": 0.25}, 3)
    assert [row["step"] for row in read_rows(file.path)[1]] == ["1", "2", "", "3"]


def test_rows_at_another_unit_of_steps_go_with_the_updates_next_to_them(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    killed = CsvFile(path)
    killed.append({"val": 0.0}, 0)
    killed.append({"tokens": 0}, 10**6)
    for samples in range(4, 25, 4):
        killed.append({"samples": samples}, samples)
        killed.append({"val": samples}, samples)
        killed.append({"tokens": samples}, 10**6 * samples)
        killed.append({"epochs": samples}, 1)
        killed.append({"text": f"{samples}\u2028"}, None)
    killed.close()
    resumed = CsvFile(path)
    resumed.append({"val": torch.tensor(12.0), "step": 3, "of": {"a": {"b": 0.5}}}, 12)  # before its first update
    resumed.drop_from(13, 16)
    resumed.append({"samples": 16}, 16)
    rows = read_rows(path)[1]
    assert [row["samples"] for row in rows if row["samples"]] == ["4", "8", "12", "16"]
    assert [row["val"] for row in rows if row["val"]] == ["0.0", "4", "8", "12", "12.0"]
    assert [row["step_value"] for row in rows if row["step_value"]] == ["3"]
    assert [row["of/a/b"] for row in rows if row["of/a/b"]] == ["0.5"]
    for name in ("tokens", "epochs", "text"):
        assert [row[name].strip() for row in rows if row[name].strip()] == [
            *(["0"] if name == "tokens" else []), "4", "8", "12"
        ]  # fmt: skip
    again = CsvFile(path)
    again.append({"val": 0.5}, 0)
    again.drop_from(1, 4)
    again.append({"samples": 4}, 4)
    assert [row["step"] for row in read_rows(path)[1]] == ["0", "4"]
    assert read_rows(tmp_path / "log.csv.1")[1][0]["val"] == "0.0"


@pytest.mark.parametrize("text", ["samples,loss\n1,2\n", "\n", "step\n\xff".encode("latin-1")])
def test_another_file_is_not_overwritten(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"data\.csv .*Choose another path"):
        csv_tracker(path)


# -------------------------------------------------------------------- messages


def stderr_of(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("configure", "expected"),
    [
        ("", "a line\n"),
        ("logging.basicConfig()", "INFO:dist_adamw.schedule.name:a line\n"),
        ("logging.basicConfig(level='INFO', format='%(funcName)s %(message)s')", "function a line\n"),
        ("logging.basicConfig(format='%(funcName)s %(message)s')", "function a line\n"),
        ("logging.getLogger('dist_adamw').setLevel('INFO')", "a line\n"),
        ("logging.getLogger('dist_adamw').setLevel('WARNING')", ""),
        ("logging.basicConfig(); logging.getLogger('dist_adamw').setLevel('WARNING')", ""),
        ("logging.basicConfig(); logging.getLogger().handlers[0].setLevel('WARNING')", ""),
        ("logging.disable(logging.INFO)", ""),
    ],
)
def test_what_the_user_asked_for_is_seen_unless_it_is_turned_off(configure: str, expected: str) -> None:
    program = f"import logging\nfrom dist_adamw.logs import report\n{configure}\n"
    program += "def function(): report('dist_adamw.schedule.name', 'a line')\nfunction()"
    assert stderr_of(program) == expected


def test_verbose_lines_are_seen_where_nothing_is_configured() -> None:
    program = """
import torch, dist_adamw
optimizer = dist_adamw.DistAdamW([torch.nn.Parameter(torch.ones(3))])
scheduler = dist_adamw.CyclicLRWithRestarts(optimizer, 10, 10, restart_period=1, verbose=True)
optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
optimizer.step()
scheduler.step()
"""
    text = stderr_of(program)
    assert text.startswith("warm restart 1 at sample 10 ")
    assert text.count("\n") == 1
