"""The main job with a recipe file: its options, and a run to the end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from tests.conftest import ROOT
from tests.integration.test_train import TINY, history, train

RECIPE = """\
optimizer: {lr: 3e-3, weight_decay: 0.05, betas: [0.9, 0.95], eps: 1e-8, max_grad_norm: 1.0, no_decay: one_dimensional}
scheduler: {restart_period: 0.5, t_mult: 1.5, min_lr: 1e-5, lr_scaling: sqrt}
batch: {size: 8, micro_batch_size: 2}
training: {total_samples: 1.25 epochs}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_file_stands_for_the_options(file: Path) -> None:
    from options import parse

    preset, read = parse(TINY), parse(["--run.seed", "3", *TINY, "--recipe_file", str(file)])
    more = {
        "optimizer": {"no_decay": "one_dimensional"},
        "scheduler": {"lr_scaling": "sqrt"},
        "training": {"total_samples": "1.25 epochs"},
    }
    assert read.recipe == replace(preset.recipe, more=more)
    assert (read.run.seed, read.model) == (3, preset.model)
    flags_first = parse(["--recipe.lr", "1e-4", f"--recipe_file={file}", "--recipe.cycles=7"])
    assert (flags_first.recipe.lr, flags_first.recipe.cycles, flags_first.recipe.t_mult) == (1e-4, 7, 1.5)
    # A whole recipe: what it leaves out has the constructors' default, and not that of the preset.
    file.write_text("optimizer: {amsgrad: true}\n")
    bare = parse([*TINY, "--recipe_file", str(file)]).recipe
    assert (bare.lr, bare.betas, bare.max_grad_norm, bare.global_batch) == (1e-3, (0.9, 0.999), None, 8)
    optimizer = bare.make_optimizer(nn.Linear(2, 2))
    assert optimizer.defaults["amsgrad"]
    assert len(optimizer.param_groups) == 1  # every parameter decays


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (RECIPE.replace("t_mult", "t_mul"), r"recipe\.yaml:2: scheduler\.t_mul: .* Did you mean t_mult\?"),
        (
            RECIPE.replace("t_mult", "epoch_size: 5, t_mult"),
            r"recipe\.yaml:2: scheduler\.epoch_size: .* Leave it out",
        ),
        (RECIPE.replace("3e-3", "-1"), r"recipe\.yaml:1: optimizer\.lr: Invalid learning rate: -1"),
    ],
)
def test_a_mistake_names_file_line_and_key(text: str, sentence: str, file: Path) -> None:
    from options import parse

    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        parse(["--recipe_file", str(file)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--recipe_file"], "--recipe_file: expected one argument"),
        (["--recipe_file", "none.yaml"], r"none\.yaml: there is no such file"),
        (["--recipe.more", "{optimizer: {lr: 1.0}}"], r"recipe\.more has lr, which is an option: pass --recipe\.lr"),
        (["--recipe.more", "{scheduler: {lr_scale: x}}"], r"Did you mean lr_scaling\?"),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence(options: list[str], sentence: str) -> None:
    from options import parse

    with pytest.raises(ValueError, match=sentence):
        parse(options)


def test_it_trains_as_long_as_the_recipe_says(file: Path, tmp_path: Path) -> None:
    job = [sys.executable, str(ROOT / "launch/train.py")]
    output = train(job, tmp_path / "out", "--recipe_file", str(file), "--run.tracker", "none")
    rows = history(tmp_path / "out")
    assert "2 cycles end at sample" in output
    assert float(rows[0]["lr"]) == 3e-3
    epoch = int(output.partition("epoch         ")[2].partition(" updates")[0]) * 8
    assert int(rows[-1]["samples"]) == pytest.approx(1.25 * epoch, abs=8)
