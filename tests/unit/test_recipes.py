"""The experiments of docs/recipes.md, tiny: they continue after an interruption; the report is made from the rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import recipes, recipes_report, recipes_tables
from benchmarks.recipes import TINY, Sheet, decay_run, make_run
from benchmarks.recipes_tables import CYCLE, EPOCHS, NORMALISED, TORCH
from benchmarks.recipes_training import KIND, LAST, Job, target_losses, text_of
from benchmarks.records import Record
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "rows.jsonl"
    for experiment in ("branches", "snapshots"):
        recipes.main([experiment, "--out", str(path), "--tiny"])
    return path


def test_an_interrupted_sweep_continues(rows: Path, tmp_path: Path) -> None:
    whole = rows.read_text().splitlines(keepends=True)
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(whole[:-2]) + whole[-2][:100])  # killed while it wrote the last row but one
    recipes.main(["snapshots", "--out", str(out), "--tiny"])
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in again[len(whole) - 2 :]] == ["environment", KIND, KIND]
    for line, row in zip(whole[-2:], again[-2:], strict=True):
        before = json.loads(line)
        assert before["settings"] == row["settings"]
        assert before["held_out"] == row["held_out"]


def test_a_branch_is_a_dedicated_run_with_its_cooldown(rows: Path) -> None:
    """Which is why the experiment compares branches with cosines."""
    sheet = Sheet(rows, may_run=False)
    row = recipes.reported(sheet, TINY, "trunk")[0]
    run = make_run(TINY, "trunk", lr=row["settings"]["lr"], seed=0)
    for at, end in run.branches[1:3]:
        job = Job(run)
        job.scheduler.cooldown(at=at, length=end - at)
        next(samples for samples in job.updates() if samples >= end)
        expected = float(target_losses(job.gpt, text_of(run.task)).mean(1).mean())
        assert recipes_tables.branch_losses([row], end) == [expected]
        assert recipes_tables.losses([row], end) != [expected]  # the trunk's at the same sample


def test_the_report_is_made_from_the_rows(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "recipes.md"
    page.write_text((ROOT / "docs/recipes.md").read_text())
    recipes_report.main([str(rows), "--docs", str(tmp_path), "--tiny"])
    printed = capsys.readouterr().out
    assert "decay: left out" in printed
    assert "anytime: left out" in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"recipes-branches.png", "recipes-snapshots.png"}
    trunk = recipes.reported(Sheet(rows, may_run=False), TINY, "trunk")
    losses = recipes_tables.branch_losses(trunk, TINY.ends[0])
    assert f" {sum(losses) / 2:.4f} ± {abs(losses[0] - losses[1]) / 2:.4f} |" in page.read_text()
    assert f"{trunk[0]['trained_samples']:,} samples for 2,080 (0.6" in page.read_text()


def test_the_best_decay_and_its_readings() -> None:
    """Losses that are a parabola: its minimum is found, and the readings are those of the schedule's preview."""
    run = decay_run(TINY, TINY.decay_cases[1], 1.0, 0)
    best = 2.0

    def row(decay: float, seed: int) -> Record:
        shift = 1.1 if seed else 1 / 1.1
        loss = 3 + 0.1 * math.log(decay / (best * shift)) ** 2
        return {"settings": run.settings(), "held_out": [{"what": LAST, "held_out": loss}], "epoch_size": 512}

    sweep = {decay: [row(decay, seed) for seed in (0, 1)] for decay in (0.1, 1.0, 3.0, 10.0, 30.0)}
    found = recipes_tables.optimum(sweep)
    assert found.decay == pytest.approx(best)
    assert found.by_seed == pytest.approx([best / 1.1, best * 1.1])
    assert recipes_tables.factor_error(found.by_seed) == pytest.approx(1.1)
    shown = Job(run).scheduler.preview(cycles=1).rows[0]
    assert shown.timescale is not None
    readings = found.readings(run.weight_decay)
    epoch = len(text_of(run.task).training)
    assert readings[TORCH] == pytest.approx(shown.weight_decay)
    assert readings[EPOCHS] * found.epoch_size == pytest.approx(shown.timescale * epoch)
    assert readings[CYCLE] * found.cycle == pytest.approx(shown.timescale * epoch)
    assert readings[NORMALISED] * math.sqrt(8 / found.cycle) == pytest.approx(shown.decay)
    with pytest.raises(recipes_tables.NotBracketedError, match=r"best decay, 3, is at the edge"):
        recipes_tables.optimum({decay: sweep[decay] for decay in (3.0, 10.0, 30.0)})
