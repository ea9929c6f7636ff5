"""``lr-range``: find the learning rates that a script trains with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def lr_range(
    script: str,
    *args: str,
    lowest: float = 1e-6,
    highest: float = 1.0,
    updates: int = 100,
    divergence: float = 4.0,
    out: str = "lr_range.png",
    ranks: int | None = None,
    json: bool = False,
) -> Callable[[], int]:
    """Find the learning rates that a script trains with: run it while lr rises, until its loss diverges.

    The script is unmodified, and uses dist_adamw.prepare and accelerator.backward. It ends when the loss diverges or
    all updates were made. Its checkpoints are neither written nor deleted; pass it another output folder if it writes
    other files. Everything after SCRIPT is passed to it. Without ranks it runs in this process, so a launcher can start
    the command: accelerate launch -m dist_adamw.cli lr-range SCRIPT.

    Args:
        script: The Python file.
        args: Its arguments: everything after SCRIPT.
        lowest: lr of the first update, in the group with the largest lr; others keep their ratio to it.
        highest: lr of the last update.
        updates: Updates from the one to the other.
        divergence: End when the smoothed loss exceeds its smallest value by this factor.
        out: PNG file to draw the curve into.
        ranks: Processes to start on this machine.
        json: Print one JSON document to stdout, and what the script prints to stderr.
    """
    from dist_adamw.range_test.launching import run_on_ranks
    from dist_adamw.range_test.script import ScriptRange, run_script

    options = ScriptRange(lowest, highest, updates, divergence, out, is_json=json)
    if not Path(script).is_file():
        raise ValueError(f"{script}: there is no such script.")
    if ranks is None:
        return lambda: run_script(script, args, options)
    if ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {ranks}.")
    if "RANK" in os.environ:
        raise ValueError(
            f"--ranks {ranks}: a launcher has already started this process as one of several. Leave it out."
        )
    numbers = {"lowest": lowest, "highest": highest, "updates": updates, "divergence": divergence, "out": out}
    flags = ["--json"] if json else []
    command = ["lr-range", *flags, *(f"--{name}={value}" for name, value in numbers.items()), script, *args]
    return lambda: run_on_ranks(command, ranks)
