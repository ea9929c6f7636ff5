"""A user's mistake in a launched job: its sentence is the last line that is printed, and it is not tried again.

A launcher prints its own long traceback once a rank has failed. Under `launcher.py` and `rejoin.py` a rank leaves
its sentence in a file, and the launcher's process prints it at the end, in place of that traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

STATUS = 2  # of a process that ends because of a user's mistake
_FILE = "DIST_ADAMW_MISTAKE"  # the variable with the file's path


def report(sentence: str, *, may_restart: bool = False) -> None:
    """Print a sentence on the main rank; under `sentence_last`, leave it for the launcher. Local, before the exit.

    Args:
        sentence: What is wrong, and what to do.
        may_restart: Whether an elastic launcher may start the ranks again, since that might help.
    """
    restarts_left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )
    path = os.environ.get(_FILE)
    if path is None or (may_restart and restarts_left > 0):
        if os.environ.get("RANK", "0") == "0":
            print(sentence, file=sys.stderr, flush=True)
        return
    try:
        with open(path, "x") as file:  # the first rank of this machine; they all have the same sentence
            file.write(sentence)
    except FileExistsError:
        return
    if restarts_left > 0:
        os.kill(os.getppid(), signal.SIGTERM)  # the launcher, which would start the ranks again


@contextlib.contextmanager
def sentence_last() -> Iterator[None]:
    """Run a launcher. If a rank has left a sentence and the launcher fails, print that instead of its traceback.

    Raises:
        SystemExit: with `STATUS`, after the sentence was printed.
    """
    with tempfile.TemporaryDirectory(prefix="dist_adamw-") as folder:
        path = Path(folder) / "mistake"
        os.environ[_FILE] = str(path)
        try:
            yield
        except (Exception, SystemExit) as error:
            succeeded = isinstance(error, SystemExit) and error.code in (None, 0)
            if succeeded or not (sentence := _read(path)):
                raise
            sys.stdout.flush()
            print(sentence, file=sys.stderr, flush=True)
            raise SystemExit(STATUS) from None


def is_reported() -> bool:
    """Return whether a rank of the launcher in this process has left a sentence."""
    return bool(_read(Path(os.environ[_FILE])))


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
