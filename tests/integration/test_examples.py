"""Each of `examples/` on one and on two ranks: stopped, and resumed on the other number."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.example_ranks import run_example
from tests.integration.test_train import environment

EPOCH, SAVE, STOP = 4, 3, 7  # updates: of an epoch, from one checkpoint to the next, before the stop
EPOCHS = 3
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
# The ranks add up gradients in another order, which changes the last bits, and every update passes that on.
TOLERANCE = 1e-3
Row = tuple[str, str, float]  # the clock, lr to the last bit, loss


def toy(name: str) -> list[str]:
    batch = batch_of(name)
    options = ["--samples", str(EPOCH * batch), "--epochs", str(EPOCHS)]
    return options if name == "accelerate_vision" else [*options, "--save_every", str(SAVE * batch)]


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


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_resumes_on_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    before, after = (1, 2) if EXAMPLES.index(name) % 2 else (2, 1)
    whole = rows(run_example(name, after, tmp_path / "whole", *toy(name)))
    stopped = rows(run_example(name, before, tmp_path / "run", *toy(name), "--stop_at", str(STOP * batch_of(name))))
    assert len(stopped) == STOP
    assert_continues(whole, stopped, rows(run_example(name, after, tmp_path / "run", *toy(name), "--resume")))


# ---------------------------------------------------------------- real launches


def start(command: list[str], out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "--out", str(out), *options],
        env={**environment(), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,  # so that all its ranks can be ended together
    )


def test_killed_under_torchrun(tmp_path: Path) -> None:
    """SIGKILL at any instant after the first checkpoint; resumed by another launcher on one rank."""
    name, script = "accelerate_causal_lm", "examples/accelerate_causal_lm.py"
    options = ["--samples", str(EPOCH * batch_of(name)), "--save_every", str(SAVE * batch_of(name)), "--epochs"]
    process = start(["torchrun", "--standalone", "--nproc_per_node", "2", script], tmp_path / "run", *options, "100000")
    seen, deadline = "", time.monotonic() + 100
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if len(rows(seen)) >= STOP or time.monotonic() > deadline:
            break
    os.killpg(process.pid, signal.SIGKILL)
    seen += process.communicate()[0]
    newest = max(
        int(path.name.removeprefix("sample-")) for path in (tmp_path / "run/checkpoints").glob("sample-*[0-9]")
    )
    epochs = str(newest // batch_of(name) // EPOCH + 2)
    launch = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    resumed = start([*launch, "--dynamo_backend", "no", script], tmp_path / "run", *options, epochs, "--resume")
    output = resumed.communicate(timeout=100)[0]
    assert resumed.returncode == 0, output[-4000:]
    joined = [*rows(seen)[: newest // batch_of(name)], *rows(output)]
    assert [int(clock) for clock, _, _ in joined] == [i * batch_of(name) for i in range(len(joined))]
    whole = start([sys.executable, script], tmp_path / "whole", *options, epochs)
    expected = rows(whole.communicate(timeout=100)[0])
    assert [row[:2] for row in joined] == [row[:2] for row in expected]
    assert [row[2] for row in joined] == pytest.approx([row[2] for row in expected], rel=TOLERANCE)


# ---------------------------------------------------------------- the table


def test_the_table_is_right() -> None:
    """`examples/README.md` has each example, and the number of lines that differ."""
    text = (ROOT / "examples/README.md").read_text()
    table = {
        name: int(lines) for name, lines in re.findall(r"^\| \[(\w+)\.py\].* \| (\d+) of \d+ \|", text, re.MULTILINE)
    }
    marks = {}
    for name in EXAMPLES:
        lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
        marks[name] = sum(line.endswith("# dist_adamw") for line in lines)
        assert f"| {marks[name]} of {len(lines)} |" in text, f"{name}: {marks[name]} of {len(lines)}"
    assert table == marks
