"""Launchers of the main job that a test, or a benchmark, watches from outside: their logs, ranks and rows.

Knows processes and the job's files; nothing of what is expected of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.conftest import ROOT

ELASTIC = (str(ROOT / "launch/elastic.sh"),)
# Twelve samples are made up by 1, 2, 3 and 4 ranks. 93 updates in five cycles.
JOB = [
    *["--config", str(ROOT / "configs/train/tiny.yaml"), "--recipe.global_batch", "12", "--recipe.micro_batch", "1"],
    *["--recipe.cycles", "5", "--run.save_every", "120", "--run.tracker", "none"],
]


class Agent:
    """One launcher and the ranks that it starts.

    Args:
        command: What starts it.
        log: File that it, and its ranks, write to.
        variables: What its environment has besides this process's.
    """

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
        self.log = log
        # Without what the tests of one process, or a launcher around them, set for themselves.
        theirs = ("ACCELERATE_", "PET_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        env = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        with log.open("a") as file:
            self.process = subprocess.Popen(command, env=env | dict(variables or {}), stdout=file, stderr=file)

    @property
    def text(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """Return the process ids of the ranks that have started, by rank."""
        found: dict[int, int] = {}
        for pid in _children(self.process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            rank = [int(v.partition(b"=")[2]) for v in variables if v.startswith(b"RANK=")]
            found |= dict.fromkeys(rank, pid)
        return found

    def signal_ranks(self, number: signal.Signals, *, only: int | None = None) -> None:
        """Send a signal to each rank of this launcher, or to one."""
        for rank, pid in self.ranks().items():
            if only in (None, rank):
                os.kill(pid, number)

    def wait(self, timeout: float) -> int:
        """Wait for its end; return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"no end after {timeout:g} s:\n{self.text[-6000:]}") from error

    def close(self) -> None:
        """End it and its ranks at once."""
        for pid in [*self.ranks().values(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def rows(out: Path) -> int:
    """Updates in a run's history so far."""
    path = out / "history.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def wait_until(condition: Callable[[], bool], what: str, agents: Sequence[Agent], timeout: float = 60.0) -> None:
    """Look again and again until ``condition`` holds.

    Raises:
        AssertionError: it does not hold in time, or no launcher is left; the end of each log.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        ended = all(agent.process.poll() is not None for agent in agents)
        if ended or time.monotonic() > deadline:
            why = "every launcher has ended" if ended else f"not after {timeout:g} s"
            logs = "\n".join(f"--- {agent.log.name}\n{agent.text[-4000:]}" for agent in agents)
            raise AssertionError(f"{what}: {why}\n{logs}")
        time.sleep(0.01)
