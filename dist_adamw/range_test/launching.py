"""Start the ranks of ``dist-adamw lr-range --ranks``; end in the script's error, not in the launcher's traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

_FILE = "DIST_ADAMW_RANGE_ERROR"  # the variable with the path of the file in which a rank leaves its error


def run_on_ranks(command: Sequence[str], ranks: int) -> int:
    """Run ``dist-adamw *command`` on ``ranks`` ranks of this machine; return the exit status. Local.

    If the script raises on some rank, its traceback is printed, and at the end its error in one sentence.
    """
    launcher = [sys.executable, "-m", __name__, "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if not torch.cuda.is_available() and environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        environment["ACCELERATE_USE_CPU"] = "true"  # without it each rank on a CPU trains alone
    with tempfile.TemporaryDirectory(prefix="dist_adamw-") as folder:
        left = Path(folder) / "error"
        environment[_FILE] = str(left)
        done = subprocess.run([*launcher, "-m", "dist_adamw.cli", *command], env=environment, check=False)
        if done.returncode and left.exists():
            print(f"dist-adamw lr-range: {left.read_text()}", file=sys.stderr, flush=True)
    return done.returncode


def leave_error(script: str, error: BaseException) -> None:
    """Leave the error of a launched script for `run_on_ranks`; end this process if another rank has left one. Local.

    Raises:
        SystemExit: the other rank prints its traceback, and this one would probably follow from that.
    """
    path = os.environ.get(_FILE)
    if path is None:
        return
    what = f"ended with {error.code}" if isinstance(error, SystemExit) else f"raised {type(error).__name__}: {error}"
    try:
        with open(path, "x") as file:
            file.write(f"{script} {what} (rank {os.environ.get('RANK', '0')}).")
    except FileExistsError:
        raise SystemExit(1) from None


def _launch() -> None:
    """Run torchrun in this process; without its traceback, if a rank has left an error."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(sys.argv[1:])
    except ChildFailedError:
        if not Path(os.environ[_FILE]).exists():
            raise
        sys.exit(1)


if __name__ == "__main__":
    _launch()
