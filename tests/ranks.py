"""A pool of ranks: real processes over gloo, started once and used by many tests.

`run_ranks(4, function, *args)` runs ``function(*args)`` on ranks 0 to 3 of a process group and
returns their results in order. The function must be importable (a test module's own function is).
Starting ranks is what costs time, so they are forked from a server that has imported torch,
Accelerate and DeepSpeed once; a rank waits for the next job afterwards, and a pool whose job failed is replaced.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import ParamSpec, TypeVar, cast

import pytest

TIMEOUT = float(os.environ.get("RANKS_TIMEOUT", 60.0))  # seconds for one job
GRACE = 3.0  # seconds that ranks may still take once one of them has failed

# What most jobs import; the package imports these only where they are used.
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "accelerate",
    "deepspeed",
    "dist_adamw.checkpoint.async_saver",
    "dist_adamw.integrations.accelerate.prepare",
    "dist_adamw.integrations.deepspeed.zero_state",
    "dist_adamw.integrations.transformers.trainer",
    "tests.distributed.jobs",
]
P = ParamSpec("P")
T = TypeVar("T")
_context = multiprocessing.get_context("forkserver")
_pools: dict[int, _Pool] = {}


class RankError(AssertionError):
    """Some rank raised; the message has every rank's traceback."""

    def __init__(self, failures: dict[int, tuple[str, str, str]]) -> None:
        self.errors = {rank: f"{kind}: {text}" for rank, (kind, text, _) in failures.items()}
        super().__init__("\n".join(f"--- rank {rank}\n{trace}" for rank, (_, _, trace) in sorted(failures.items())))


def run_ranks(world_size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
    """Run ``function(*args, **kwargs)`` on ``world_size`` ranks.

    Raises:
        RankError: a rank raised, died or did not finish in time.
    """
    return run_ranks_within(TIMEOUT, world_size, function, *args, **kwargs)


def run_ranks_within(
    timeout: float, world_size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Call `run_ranks` with another timeout."""
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    pool = _pools[world_size]
    try:
        return pool.run(functools.partial(function, *args, **kwargs), timeout)
    except BaseException:  # also Ctrl-C: the next job would get this one's answers
        _pools.pop(world_size).close()
        raise


def end_pool(world_size: int) -> None:
    """End the ranks that are there: an error in the middle of an exchange leaves transfers that time out later."""
    if world_size in _pools:
        _pools.pop(world_size).close()


def expect_error_on_all(world_size: int, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> list[str]:
    """Run a job that must raise on every rank; return "Type: message" by rank."""
    with pytest.raises(RankError) as raised:
        run_ranks(world_size, function, *args, **kwargs)
    errors = raised.value.errors
    if sorted(errors) != list(range(world_size)):
        raise AssertionError(f"only ranks {sorted(errors)} raised\n{raised.value}")
    return [errors[rank] for rank in range(world_size)]


class _Pool:
    def __init__(self, world_size: int) -> None:
        # The server imports these once; ranks are forked from it and start in milliseconds.
        _context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = f"file://{self._folder.name}/rendezvous"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs, rank, world_size, rendezvous), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[[], T], timeout: float) -> list[T]:
        for pipe in self._pipes:
            pipe.send(job)
        results: dict[int, T] = {}
        failures: dict[int, tuple[str, str, str]] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(self._pipes):
            waiting = {pipe: r for r, pipe in enumerate(self._pipes) if r not in results and r not in failures}
            ready = cast(list[Connection], wait(list(waiting), max(0.0, deadline - time.monotonic())))
            if not ready:
                why = f"no answer (a job may take {timeout:g} s, and {GRACE:g} s after another rank's failure)"
                failures.update(dict.fromkeys(waiting.values(), ("Timeout", why, why)))
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, ("Died", "the rank's process ended", "the rank's process ended")
                (results if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            raise RankError(failures)
        return [results[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, world_size: int, rendezvous: str) -> None:
    # What a launcher would have set; Accelerate takes the ranks from it.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # never used: the group exists before Accelerate looks
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Under ZeRO-3, DeepSpeed replaces it for the rest of the process, with another rounding in bf16.
    linear = torch.nn.functional.linear
    # A loader's workers start as in a rank that a launcher has started, and not as this process did.
    multiprocessing.set_start_method(None, force=True)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            _forget_accelerate()
            torch.nn.functional.linear = linear
            torch.manual_seed(0)
            answer = (True, job())
        except BaseException as error:  # a rank reports whatever ended its job
            answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send(answer)


def _forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._reset_state()
    GradientState._reset_state()


@atexit.register
def close_all() -> None:
    """End all ranks; later jobs start new ones."""
    while _pools:
        _pools.popitem()[1].close()
