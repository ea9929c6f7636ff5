"""Each of `examples/` on one and on two ranks: stopped, and resumed on the other number."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from tests.conftest import ROOT
from tests.integration.agents import Agent, wait_until
from tests.integration.example_ranks import run_example
from tests.integration.plain_examples import CHANGES, EXAMPLES, differing, example, marked, plain

EPOCH, SAVE, STOP = 4, 3, 7  # updates: of an epoch, from one checkpoint to the next, before the stop
EPOCHS = 3
# The ranks add up gradients in another order, which changes the last bits, and every update passes that on.
TOLERANCE = 1e-3
AT_EPOCHS = {"accelerate_vision", "lightning_module", "timm_loop"}  # save there only
PACKAGES = {"trainer_trl": "trl", "timm_loop": "timm", "lightning_module": "lightning", "ray_train": "ray"}
Row = tuple[str, str, float]  # the clock, lr to the last bit, loss


def toy(name: str) -> list[str]:
    batch = batch_of(name)
    options = ["--samples", str(EPOCH * batch), "--epochs", str(EPOCHS)]
    return options if name in AT_EPOCHS else [*options, "--save_every", str(SAVE * batch)]


def batch_of(name: str) -> int:
    (found,) = re.findall(r"^BATCH = (\d+)", (ROOT / "examples" / f"{name}.py").read_text(), re.MULTILINE)
    return int(found)


def rows(output: str) -> list[Row]:
    found = re.findall(r"^(?:samples|update) (\d+) lr (\S+) loss (\S+)", output, re.MULTILINE)
    return [(clock, lr, float(loss)) for clock, lr, loss in found]


def assert_continues(whole: list[Row], stopped: list[Row], resumed: list[Row]) -> None:
    """Check that the rows up to the checkpoint and those after it are those of the run that was never stopped."""
    assert len(whole) == EPOCH * EPOCHS
    assert len({lr for _, lr, _ in whole}) > EPOCH
    begin = [clock for clock, _, _ in whole].index(resumed[0][0])
    assert 0 < begin < len(stopped), "it did not resume from a checkpoint in the middle"
    for part, expected in ((stopped, whole[: len(stopped)]), (resumed, whole[begin:])):
        assert [row[:2] for row in part] == [row[:2] for row in expected]
        assert [row[2] for row in part] == pytest.approx([row[2] for row in expected], rel=TOLERANCE)


def run(name: str, world_size: int, out: Path, *options: str) -> list[Row]:
    if name == "ray_train":  # whose process starts the ranks
        return rows(run_example(name, 1, out, *toy(name), *options, "--ranks", str(world_size)))
    return rows(run_example(name, world_size, out, *toy(name), *options))


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_resumes_on_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    before, after = (1, 2) if EXAMPLES.index(name) % 2 else (2, 1)
    whole = run(name, after, tmp_path / "whole")
    stopped = run(name, before, tmp_path / "run", "--stop_at", str(STOP * batch_of(name)))
    assert len(stopped) == STOP
    assert_continues(whole, stopped, run(name, after, tmp_path / "run", "--resume"))


# ---------------------------------------------------------------- real launches


def launch(log: Path, command: list[str], *options: str) -> Agent:
    return Agent(
        ["env", f"--chdir={ROOT}", *command, *options], log, {"ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    )


def test_killed_under_torchrun(tmp_path: Path) -> None:
    """SIGKILL at an instant after some checkpoints; then accelerate launch resumes it on one rank."""
    name, script = "accelerate_causal_lm", "examples/accelerate_causal_lm.py"
    batch, out = batch_of(name), str(tmp_path / "run")
    options = ["--samples", str(EPOCH * batch), "--save_every", str(SAVE * batch), "--epochs"]
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "2", script]
    killed = launch(tmp_path / "killed", torchrun, "--out", out, *options, "100000")
    try:
        wait_until(lambda: len(rows(killed.text)) >= STOP, f"{STOP} updates", [killed], ranks.TIMEOUT)
    finally:
        killed.close()
    checkpoints = (tmp_path / "run/checkpoints").glob("sample-*[0-9]")
    newest = max(int(path.name.removeprefix("sample-")) for path in checkpoints)
    epochs = str(newest // batch // EPOCH + 2)
    accelerate = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    resumed = launch(
        tmp_path / "resumed",
        [*accelerate, "--dynamo_backend", "no", script],
        "--out",
        out,
        *options,
        epochs,
        "--resume",
    )
    # The same run undisturbed, whose length is known only now.
    expected = rows(run_example(name, 1, tmp_path / "whole", *options, epochs))
    assert resumed.wait(ranks.TIMEOUT) == 0, resumed.text[-4000:]
    joined = [*rows(killed.text)[: newest // batch], *rows(resumed.text)]
    assert [row[:2] for row in joined] == [row[:2] for row in expected]
    assert [row[2] for row in joined] == pytest.approx([row[2] for row in expected], rel=TOLERANCE)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_marked_lines_are_those_that_differ(name: str) -> None:
    assert marked(name) == differing(name)
    text = (ROOT / "examples/README.md").read_text()
    assert re.search(rf"^\| \[{name}.py\].* \| {len(marked(name))} of {len(example(name))} \|", text, re.MULTILINE)


def test_plain_scripts_have_every_name_that_they_use(tmp_path: Path) -> None:
    for name in EXAMPLES:
        (tmp_path / f"{name}.py").write_text("\n".join(plain(name)) + "\n")
    command = [sys.executable, "-m", "ruff", "check", "--select", "F", "--isolated", str(tmp_path)]
    ruff = subprocess.run(command, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout
    assert sorted(CHANGES) == EXAMPLES
