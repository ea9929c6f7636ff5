"""The verbs that read recipe files: preview, plot, plan, check, schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.test_cli import Capture, answer, refused, run

RECIPE = """
optimizer: {lr: 2.0e-3, weight_decay: 0.05, max_grad_norm: 1.0}
scheduler: {restart_period: 1 epoch, t_mult: 2, policy: wsd, epoch_size: 1000}
batch: {size: 50, micro_batch_size: 5}
training: {total_samples: 3 epochs}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_preview_of_a_file(recipe: str, capsys: Capture) -> None:
    found = answer(capsys, "preview", recipe)
    assert [row["samples"] for row in found["cycles"]] == [1000, 2000]
    assert found["cycles"][0]["peak_lr"] == 2e-3
    assert found["cycles"][0]["updates"] == 20
    assert found["end"]["is_at_cycle_end"] is True


def test_options_replace_values_of_the_file(recipe: str, capsys: Capture) -> None:
    options = ["--lr=1e-3", "--batch-size=100", "--restart_period=0.5 epochs", "--total_samples=1 epoch"]
    found = answer(capsys, "preview", *options, recipe)
    assert [row["samples"] for row in found["cycles"]] == [500, 1000]
    assert found["cycles"][0]["peak_lr"] == 1e-3
    assert found["cycles"][0]["updates"] == 5
    assert found["end"]["total_samples"] == 1000


def test_fit_makes_a_cycle_end_with_training(recipe: str, capsys: Capture) -> None:
    assert answer(capsys, "preview", recipe, "--total_samples=4 epochs")["end"]["is_at_cycle_end"] is False
    for text in (RECIPE, RECIPE.replace("t_mult: 2", "t_mult: 2, total_samples: 3 epochs")):
        Path(recipe).write_text(text)
        found = answer(capsys, "preview", recipe, "--total_samples=4 epochs", "--fit=scale")
        assert found["end"]["total_samples"] == 4000
        assert found["end"]["is_at_cycle_end"] is True
    Path(recipe).write_text(RECIPE.replace("3 epochs", "3.4 epochs"))
    assert answer(capsys, "preview", recipe)["end"]["is_at_cycle_end"] is False
    assert answer(capsys, "preview", recipe, "--fit=last")["end"]["is_at_cycle_end"] is True
    Path(recipe).write_text(RECIPE.replace("training", "#"))
    assert "--fit last needs --total_samples, since" in refused(capsys, "preview", recipe, "--fit=last")
    Path(recipe).write_text(text)
    assert answer(capsys, "preview", recipe, "--total_samples=4 epochs")["end"]["is_at_cycle_end"] is True


def test_a_mistake_in_the_file(recipe: str, capsys: Capture) -> None:
    Path(recipe).write_text(RECIPE.replace("t_mult", "t_mul"))
    sentence = refused(capsys, "preview", recipe)
    assert f"{recipe}:3" in sentence
    assert "t_mul" in sentence
    assert "no/such.yaml" in refused(capsys, "plot", "no/such.yaml")


def test_a_file_without_an_epoch_size(recipe: str, capsys: Capture) -> None:
    Path(recipe).write_text(RECIPE.replace(", epoch_size: 1000", ""))
    for verb in ("preview", "plot"):
        assert f"{recipe} has no scheduler.epoch_size" in refused(capsys, verb, recipe)
    assert "Pass --epoch_size, in samples, or write it there" in refused(capsys, "preview", recipe)
    run(capsys, "preview", recipe, "--epoch_size=1000")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--epoch_size=-5", "--epoch_size: epoch_size must be a whole number above 0, got -5."),
        ("--batch_size=0", "--batch_size: batch_size must be a whole number above 0, got 0."),
        ("--lr=-1", "--lr: Invalid learning rate: -1.0"),
        ("--min_lr=5", "--min_lr: min_lr must lie between"),
        ("--total_samples=3 epok", "--total_samples: total_samples='3 epok' has an unknown unit"),
        ("--tokens_per_sample=0", "--tokens_per_sample: "),
    ],
)
def test_a_mistaken_option_is_not_blamed_on_the_file(option: str, sentence: str, recipe: str, capsys: Capture) -> None:
    assert refused(capsys, "preview", recipe, option).startswith(f"dist-adamw: {sentence}")


def test_a_file_that_is_no_recipe(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "page.md").write_text("# A page\n\nWith text.\n\nAnd more: text.\n")
    sentence = refused(capsys, "preview", str(tmp_path / "page.md"))
    assert 'page.md:5: the file is not YAML or JSON: "key: value" is expected here' in sentence
    config = "configs/deepspeed/adamwr_zero2.json"
    assert "this is a DeepSpeed configuration, and not a recipe" in refused(capsys, "preview", config)


def test_several_recipes_in_one_picture(recipe: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "recipe.yaml"  # the same name: the legend has the paths
    other.write_text(RECIPE.replace("wsd", "cosine"))
    svg = tmp_path / "x.svg"
    assert run(capsys, "plot", recipe, str(other), "--out", str(svg)) == f"drawn in {svg}\n"
    text = svg.read_text()
    assert recipe in text
    assert str(other) in text
    found = answer(capsys, "plot", recipe, str(other), "--axis=updates")["schedules"]
    assert [one["x"][-1] for one in found.values()] == [60, 60]


def test_plan_of_a_recipe(recipe: str, capsys: Capture) -> None:
    found = answer(capsys, "plan", "1.3B", recipe, "--ranks=1,2", "--memory=40GiB")
    assert found["schedule"] == found["schedule"] | {"global_batch": [50], "total_samples": 3000, "updates": 60}
    assert [row["samples"] for row in found["schedule"]["restarts"]] == [1000, 2000]
    assert [one["ranks"] for one in found["ranks"]] == [1, 2]
    assert found["ranks"][1]["batch"]["gradient_accumulation_steps"] == 5
    assert "1.3B parameters" in run(capsys, "plan", "1.3B", recipe, "--ranks=1,2")
    Path(recipe).write_text(RECIPE.replace(", epoch_size: 1000", ""))
    assert f"{recipe} has no scheduler.epoch_size" in refused(capsys, "plan", "1.3B", recipe)
    found = answer(capsys, "plan", "1.3B", recipe, "--epoch-size=500", "--ranks=1")
    assert found["schedule"]["total_samples"] == 1500
    assert "needs a recipe file" in refused(capsys, "plan", "1.3B", "--epoch-size=500")


def test_check_of_files_that_contradict_each_other(recipe: str, tmp_path: Path, capsys: Capture) -> None:
    assert answer(capsys, "check", recipe, "--ranks=2")["findings"] == []
    config = tmp_path / "ds.json"
    config.write_text('{"train_batch_size": 64, "gradient_clipping": 0.5}')
    found = answer(capsys, "check", recipe, f"--deepspeed={config}", "--ranks=2", status=1)
    kinds = {one["kind"] for one in found["findings"]}
    assert {"batch", "clipping"} <= kinds
    config.write_text("{")
    assert "ds.json" in refused(capsys, "check", recipe, f"--deepspeed={config}")
    assert "nothing to check" in refused(capsys, "check")


def test_the_schema_can_be_saved(capsys: Capture) -> None:
    assert answer(capsys, "schema")["title"] == "dist_adamw recipe"
    assert json.loads(run(capsys, "schema"))["title"] == "dist_adamw recipe"
