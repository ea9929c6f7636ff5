"""Slices through memory that ranks share: the bits of messages, and messages wherever it cannot be shared."""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_adamw import DistAdamW
from dist_adamw.optimizer.transport import gloo, pipes, slots
from dist_adamw.optimizer.transport.shared_memory import SharedMemoryTransport
from tests.distributed.test_attach import WAYS, WORLDS, Job, constants
from tests.ranks import end_pool, expect_error_on_all, run_ranks

NO = "DIST_ADAMW_SHARED_MEMORY"


def shares(optimizer: DistAdamW) -> bool:
    """Return whether the optimizer has sent through shared memory."""
    found = {shard.transport._slots is not None for shard in optimizer.shards}  # type: ignore[union-attr]
    assert len(found) == 1
    return found.pop()


def check_bits(way: dict[str, Any], options: dict[str, Any], accumulation: int = 1) -> Job:
    job = Job(way, {"eps": 0.1, **options})
    job.train(range(5), accumulation)
    job.check()
    return job


# ---------------------------------------------------------------- where memory cannot be shared


def check_messages(way: dict[str, Any], sizes: dict[str, Any]) -> bool:
    os.environ[NO] = "0"
    try:
        with constants(gloo, **sizes):
            return shares(check_bits(way, {}, 2).optimizer)
    finally:
        del os.environ[NO]


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_without_shared_memory_messages_have_the_same_bits(world_size: int, way: str) -> None:
    for sizes in ({}, {"DIRECT_NUMEL": 100, "BLOCK_NUMEL": 96}):
        assert not any(run_ranks(world_size, check_messages, WAYS[way], sizes))


def check_no_descriptor() -> bool:
    """Let rank 1 have no file descriptor for its memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    job = Job({}, {"eps": 0.1})
    if dist.get_rank() == 1:
        free = os.dup(0)  # the lowest number that is free
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        job.loss(job.wrapped, 0).backward()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    job.twin_backward(0, last=True)
    job.update()
    job.train(range(1, 4))
    job.check()
    return shares(job.optimizer)


def check_other_place() -> bool:
    """Let rank 1 be on another host, as far as it knows."""
    with constants(slots, place=dist.get_rank), constants(pipes, place=dist.get_rank):
        return shares(check_bits({}, {}).optimizer)


def check_hidden_process() -> bool:
    """Let rank 1 be refused the files of other processes, as between users."""

    def refused(path: str, *_: Any) -> Tensor:
        raise PermissionError(path)

    with constants(slots, _map_peer=refused) if dist.get_rank() == 1 else constants(slots):
        return shares(check_bits({}, {}).optimizer)


@pytest.mark.parametrize("check", [check_no_descriptor, check_other_place, check_hidden_process])
def test_if_one_rank_cannot_share_none_does(check: Callable[[], bool]) -> None:
    assert run_ranks(3, check) == [False] * 3


def test_only_the_memory_of_a_rank_is_mapped(tmp_path: Path) -> None:
    nbytes, key = slots._HEADER + 4096, 123
    with slots._Memory(nbytes, key) as memory:
        path = f"/proc/self/fd/{memory.fd}"
        assert slots._map_peer(path, nbytes, key).numel() == nbytes
        with pytest.raises(OSError, match="another job"):
            slots._map_peer(path, nbytes, key + 1)
        with pytest.raises(OSError, match="not the memory"):
            slots._map_peer(path, 2 * nbytes, key)
    other = tmp_path / "file"
    other.write_bytes(bytes(nbytes))
    with other.open() as file, pytest.raises(OSError, match="not the memory"):
        slots._map_peer(f"/proc/self/fd/{file.fileno()}", nbytes, key)
    with pytest.raises(FileNotFoundError):
        slots._map_peer(path, nbytes, key)  # closed
    assert other.stat().st_size == nbytes


# ---------------------------------------------------------------- where it is


def check_slow_ranks(way: dict[str, Any], options: dict[str, Any]) -> None:
    """Let each rank be slow at other moments, so that the others overtake it as far as they can."""
    rng = random.Random(dist.get_rank())
    start, finish = SharedMemoryTransport.start_reduce, SharedMemoryTransport.finish_reduce
    gather, gathered = SharedMemoryTransport.start_gather, SharedMemoryTransport.finish_gather

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            if rng.random() < 0.2:
                time.sleep(0.004)
            return function(*args, **kwargs)

        return slow

    changed = {
        "start_reduce": slowly(start),
        "finish_reduce": slowly(finish),
        "start_gather": slowly(gather),
        "finish_gather": slowly(gathered),
    }
    with constants(SharedMemoryTransport, **changed):
        job = Job(way, {"eps": 0.1, **options}, bucket_numel=300)
        job.train(range(8), 2)
        job.check()
        assert shares(job.optimizer)


@pytest.mark.parametrize("way", ["ddp", "plain", "every backward"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_slow_rank_reads_what_was_written_for_it(world_size: int, way: str) -> None:
    run_ranks(world_size, check_slow_ranks, {**WAYS[way], "defer_gather": way == "plain"}, {})


def check_moved_on_one_rank() -> None:
    job = Job({}, {"eps": 0.1})
    job.train(range(2))
    if dist.get_rank() == 0:
        for param in job.model.parameters():
            param.data = param.data.clone()
    job.train(range(2, 5))
    job.check()
    assert shares(job.optimizer)


def test_parameters_that_move_on_one_rank_keep_the_memory() -> None:
    run_ranks(2, check_moved_on_one_rank)


def check_dtype() -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    optimizer.attach(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        for _ in range(2):
            model(torch.ones(2, 40, dtype=dtype) * (1 + dist.get_rank())).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert shares(optimizer)
        weights = [torch.empty_like(model.weight) for _ in range(dist.get_world_size())]
        dist.all_gather(weights, model.weight.detach())
        assert torch.equal(weights[0], weights[1])
        assert weights[0].isfinite().all()


def test_another_dtype_gets_other_memory() -> None:
    run_ranks(2, check_dtype)


def check_laid_out_alone() -> None:
    job = Job({}, {"eps": 0.1})
    job.train(range(2))
    job.optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        job.optimizer.load_state_dict(job.optimizer.state_dict())
    job.train(range(2, 5))


def test_state_laid_out_on_one_rank_alone_is_an_error_on_all() -> None:
    errors = expect_error_on_all(3, check_laid_out_alone)
    assert all(error.startswith("AgreementError: rank ") for error in errors), errors
    assert all("load_state_dict" in error for error in errors), errors


def open_files() -> int:
    return sum(name.startswith("/memfd:dist_adamw") for name in map(_target, os.listdir("/proc/self/fd")))


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # that of the listing itself
        return ""


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:dist_adamw")


def check_freed() -> list[int]:
    gc.collect()
    before = mapped()
    job = check_bits({}, {})
    found = [open_files(), mapped() - before]
    del job
    gc.collect()
    return [*found, open_files(), mapped() - before]


def test_memory_is_freed_with_the_optimizer_and_no_descriptor_stays_open() -> None:
    assert run_ranks(3, check_freed) == [[0, 3, 0, 0]] * 3


def check_third_bucket() -> None:
    job = check_bits({}, {})
    (shard,) = job.optimizer.shards
    assert isinstance(shard.transport, SharedMemoryTransport)
    sent = [shard.transport.start_gather(k) for k in range(2)]
    with pytest.raises(RuntimeError, match="2 buckets are in flight"):
        shard.transport.start_gather(2)
    for bucket in sent:
        shard.transport.finish_gather(bucket)
    job.train(range(5, 7))
    job.check()


def test_a_third_bucket_in_flight_is_refused() -> None:
    run_ranks(2, check_third_bucket)


def check_killed(said: str) -> None:
    job = check_bits({}, {})
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as raised:
        job.train(range(5, 8))
    Path(said).write_text(str(raised.value))


def test_a_rank_that_is_killed_is_told_to_the_others(tmp_path: Path) -> None:
    said = tmp_path / "said"
    try:
        with pytest.raises(AssertionError, match="process ended"):
            run_ranks(2, check_killed, str(said))
    finally:
        end_pool(2)
    assert "has exited" in said.read_text()


def check_loaded_alone_without_memory() -> bool:
    os.environ[NO] = "0"
    try:
        job = Job({}, {"eps": 0.1})
        job.train(range(2))
        if dist.get_rank() == 0:
            job.optimizer.load_state_dict(job.optimizer._share_state_dict())
        job.train(range(2, 5))
        job.check()
        return shares(job.optimizer)
    finally:
        del os.environ[NO]


def test_without_shared_memory_state_may_be_laid_out_alone() -> None:
    assert not any(run_ranks(2, check_loaded_alone_without_memory))


def check_no_descriptor_for_pipes() -> bool:
    """Let rank 1 have no file descriptors when the optimizer is attached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    if dist.get_rank() == 1:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # one, but pipes take more
    try:
        job = Job({}, {"eps": 0.1})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == before
    job.train(range(4))
    job.check()
    return shares(job.optimizer)


def test_without_descriptors_for_pipes_all_send_by_gloo() -> None:
    assert run_ranks(3, check_no_descriptor_for_pipes) == [False] * 3


def check_pipes() -> tuple[int, int, int]:
    """Count the descriptors of pipes: with an optimizer, in a child that is forked, and without the optimizer."""
    gc.collect()

    def count() -> int:
        return sum(_target(fd).startswith("pipe:") for fd in os.listdir("/proc/self/fd"))

    before = count()
    job = check_bits({}, {})
    here = count() - before
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.write(theirs, bytes([count() - before - 2]))
        os._exit(0)
    in_child = os.read(ours, 1)[0]
    os.waitpid(child, 0)
    os.close(ours)
    os.close(theirs)
    job.train(range(5, 7))
    job.check()
    del job
    gc.collect()
    return here, in_child, count() - before


def test_pipes_are_closed_with_the_optimizer_and_in_children() -> None:
    assert run_ranks(3, check_pipes) == [(4, 0, 0)] * 3


def check_last_words() -> list[int]:
    """Let rank 0 send a message and go, before rank 1 sends its own."""
    group = dist.group.WORLD
    assert group is not None
    opened = pipes.open_pipes(group)
    assert opened is not None
    if dist.get_rank() == 0:
        opened.post([7])
        opened.close()
        dist.barrier()
        return []
    dist.barrier()
    heard = list(opened.wait(opened.post([8]))[0][:2])
    with pytest.raises(RuntimeError, match="rank 0 has exited"):
        opened.wait(opened.post([9]))
    return heard


def test_the_last_message_of_a_rank_is_read() -> None:
    assert run_ranks(2, check_last_words) == [[], [7, 0]]
