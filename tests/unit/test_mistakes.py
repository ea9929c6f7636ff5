"""A mistake's sentence is printed last, once, and only if the launcher fails."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A launcher: it starts the rank, again while restarts are left, and ends with a traceback if that fails.
_LAUNCHER = """
import os, subprocess, sys
for count in range(int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) + 1):
    print("attempt", flush=True)
    environment = {**os.environ, "TORCHELASTIC_RESTART_COUNT": str(count)}
    if subprocess.run([sys.executable, "-c", sys.argv[1]], env=environment).returncode == 0:
        sys.exit(0)
raise RuntimeError("the rank failed")
"""
_RANK = "from mistakes import report\nreport('train.py: no.', may_restart={})\nraise SystemExit(2)"


def launch(folder: Path, rank: str, restarts: int) -> subprocess.CompletedProcess[str]:
    launcher = folder / "my_launcher"
    launcher.write_text(f"#!{sys.executable}\n{_LAUNCHER}")
    launcher.chmod(0o755)
    environment = {
        "PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT / "launch"),
        "TORCHELASTIC_MAX_RESTARTS": str(restarts),
    }
    command = [sys.executable, str(ROOT / "launch/launcher.py"), "my_launcher", rank]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)


def test_the_sentence_is_the_last_line_in_place_of_the_traceback(tmp_path: Path) -> None:
    done = launch(tmp_path, _RANK.format(False), 0)
    assert (done.returncode, done.stderr, done.stdout) == (2, "train.py: no.\n", "attempt\n")


def test_a_mistake_ends_a_launcher_that_would_start_again(tmp_path: Path) -> None:
    done = launch(tmp_path, _RANK.format(False), 3)
    assert done.stdout == "attempt\n"
    # torchrun makes SIGTERM an exception; this launcher dies of it.
    assert done.returncode in (2, -signal.SIGTERM)


def test_what_a_restart_may_help_is_tried_again(tmp_path: Path) -> None:
    done = launch(tmp_path, _RANK.format(True), 2)
    assert done.stdout == "attempt\n" * 3
    assert (done.returncode, done.stderr) == (2, "train.py: no.\n" * 3)


@pytest.mark.parametrize(("rank", "status"), [("raise SystemExit(1)", 1), ("raise SystemExit(0)", 0)])
def test_other_ends_are_the_launchers(tmp_path: Path, rank: str, status: int) -> None:
    done = launch(tmp_path, rank, 0)
    assert done.returncode == status
    assert ("RuntimeError: the rank failed" in done.stderr) == bool(status)


def test_without_our_launcher_the_main_rank_prints_it(tmp_path: Path) -> None:
    for rank, expected in (("0", "train.py: no.\n"), ("1", "")):
        environment = {"PYTHONPATH": str(ROOT / "launch"), "RANK": rank}
        done = subprocess.run(
            [sys.executable, "-c", _RANK.format(False)], capture_output=True, text=True, env=environment, check=False
        )
        assert (done.returncode, done.stderr) == (2, expected)


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/launcher.py"), "no_such_launcher"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("launcher.py: there is no no_such_launcher on the PATH.")
