"""Start ranks, join their process group, and give them a separate network.

It works under ``torchrun`` too: a script that finds RANK in its environment is a rank; otherwise it starts the ranks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
PRIVATE, SHARED = "private network namespace", "shared loopback: other processes' traffic counts too"


def is_rank() -> bool:
    """Return whether this process is one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(module: str, args: Sequence[str], *, ranks: int, timeout: float) -> None:
    """Run ``python -m module args`` once per rank and wait.

    Raises:
        RuntimeError: a rank failed, or ``timeout`` seconds passed; the others are ended then.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            env = {
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),  # without it Accelerate asks for a master's address
                "BENCH_RENDEZVOUS": f"file://{folder}/rendezvous",
            }
            processes.append(subprocess.Popen([sys.executable, "-m", module, *args], env=env, cwd=ROOT))
        try:
            _wait(processes, time.monotonic() + timeout, f"python -m {module} {' '.join(args)}")
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float, what: str) -> None:
    while any(process.poll() is None for process in processes):
        failed = [i for i, process in enumerate(processes) if process.poll()]
        if failed:
            raise RuntimeError(f"rank {failed[0]} failed with status {processes[failed[0]].returncode}: {what}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not done in time; raise --timeout: {what}")
        time.sleep(0.1)
    failed = [i for i, process in enumerate(processes) if process.returncode]
    if failed:
        raise RuntimeError(f"rank {failed[0]} failed with status {processes[failed[0]].returncode}: {what}")


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the gloo process group with one thread per rank, unless there is one; yield rank and world size."""
    torch.set_num_threads(1)
    if dist.is_initialized():  # in a rank of the tests
        yield dist.get_rank(), dist.get_world_size()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=os.environ.get("BENCH_RENDEZVOUS", "env://"),
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=5),
    )
    try:
        yield rank, size
    finally:
        dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """Return every rank's ``value``, in rank order. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def private_network() -> tuple[list[str], str]:
    """Return a command prefix for a separate loopback interface, if that is permitted, and its description."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return [], SHARED
    for flags in (["-n"], ["-r", "-n"]):
        prefix = ["unshare", *flags, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix, PRIVATE
    return [], SHARED


def loopback_sent() -> int:
    """Return the bytes that the loopback interface has sent, for all processes in this network namespace."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("/proc/self/net/dev names no interface lo")
