"""The tutorial's job, really launched: two ranks, then one, then two under DeepSpeed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.docs.blocks import commands, language, read, title
from tests.docs.commands import ELSEWHERE, TUTORIAL

TIMEOUT = 100.0  # seconds for one launch


def test_the_tutorial_trains_on_two_ranks_on_one_and_under_zero(tmp_path: Path) -> None:
    """Each command is the page's, and prints what the page shows."""
    examples = list(read("docs/tutorial.md").examples())
    (tmp_path / "train.py").write_text(next(example.parsed for example in examples if title(example) == "train.py"))
    shown = [
        (command, after.parsed if language(after) == "text" else "")
        for example, after in itertools.pairwise(examples)
        if language(example) == "sh"
        for command in commands(example)
        if ELSEWHERE.get(command) == TUTORIAL
    ]
    assert len(shown) == 3
    for command, expected in shown:
        printed = _launch(command, tmp_path)
        for line in expected.splitlines():
            assert line in printed


def _launch(command: str, folder: Path) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()
