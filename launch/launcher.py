#!/usr/bin/env python3
"""Run a launcher, such as torchrun, and end a user's mistake in its sentence instead of the launcher's traceback.

launcher.py torchrun --nproc-per-node 2 train.py ...
"""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

from mistakes import sentence_last


def main() -> None:
    """Run the command line, which names a launcher that is written in Python, in this process."""
    name = sys.argv[1]
    program = shutil.which(name)
    if program is None:
        sys.exit(f"launcher.py: there is no {name} on the PATH. Activate the environment it is installed in.")
    sys.argv = [program, *sys.argv[2:]]
    sys.path[0] = str(Path(program).parent)  # as Python would: this folder's modules are not the launcher's
    with sentence_last():
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
