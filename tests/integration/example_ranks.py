"""Run an example on ranks with the environment that torchrun sets, forked with torch already imported.

torchrun's ranks meet in a store in torchrun's process, on a free port. Here the store is in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests import ranks
from tests.conftest import ROOT

TIMEOUT = 2 * ranks.TIMEOUT
_context = multiprocessing.get_context("forkserver")


def run_example(name: str, world_size: int, out: Path, *options: str) -> str:
    """Run ``examples/<name>.py`` on ``world_size`` ranks; return what rank 0 printed.

    Raises:
        AssertionError: a rank failed, with the end of its output.
    """
    _context.set_forkserver_preload(ranks.PRELOADED)
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=TIMEOUT), wait_for_workers=False)
    out.mkdir(parents=True, exist_ok=True)
    logs = [out / f"log of rank {rank}" for rank in range(world_size)]
    arguments = [str(ROOT / "examples" / f"{name}.py"), "--out", str(out), *options]
    processes = [
        _context.Process(target=_run, args=(arguments, _environment(rank, world_size, store.port), log))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert codes == [0] * world_size, "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs)
    return logs[0].read_text()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def _run(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
