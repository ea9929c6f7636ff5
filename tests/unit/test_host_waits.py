"""What the host launches, and waits for, in a steady update on a GPU: counted on tensors that pretend to be there.

Run as a program (``python -m tests.unit.test_host_waits 1 8``), this file prints the counts of every case as a table
for each number of ranks; the tests run it with ``json``. It is a process of its own because pretending changes torch
for good, and one for several numbers of ranks because starting it takes most of the time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dist_adamw import DistAdamW
from tests.pretend_cuda import Model, Notes, Stream, current_stream, pretending

ROOT = Path(__file__).parents[2]
BF16, FP32 = torch.bfloat16, torch.float32
UPDATES = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, max_grad_norm": {"max_grad_norm": 1.0},
    "bf16": {"dtype": BF16},
    "bf16, fp32 masters": {"dtype": BF16, "master_dtype": FP32},
    "bf16, fp32 masters, max_grad_norm": {"dtype": BF16, "master_dtype": FP32, "max_grad_norm": 1.0},
    "a parameter without a gradient": {"missing": 1},
    "lr on the device": {"lr": "cuda"},
    "lr on the device, decay_by schedule": {"lr": "cuda", "decay_by": "schedule"},
    "two devices": {"devices": 2},
    "two devices, max_grad_norm": {"devices": 2, "max_grad_norm": 1.0},
}
ATTACHED: dict[str, dict[str, Any]] = {
    "attached": {"attach": True},
    "attached, max_grad_norm": {"attach": True, "max_grad_norm": 1.0},
    "attached, bf16, fp32 masters": {"attach": True, "dtype": BF16, "master_dtype": FP32},
    "attached, a parameter without a gradient": {"attach": True, "missing": 1},
    "attached, reduce_every_backward": {"attach": True, "reduce_every_backward": True},
    "attached, replicas": {"attach": True, "replicas": 2},
}


def measured(notes: Notes, options: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of the last of a few updates, or the error."""
    try:
        return _measured(notes, **options)
    except RuntimeError as error:
        return {"error": str(error)}


def _measured(
    notes: Notes,
    *,
    dtype: torch.dtype = FP32,
    devices: int = 1,
    missing: int = 0,
    lr: float | str = 1e-3,
    attach: bool = False,
    reduce_every_backward: bool = False,
    replicas: int = 0,
    **options: Any,
) -> dict[str, Any]:
    if replicas:
        shape = (replicas, dist.get_world_size() // replicas)
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    params = [nn.Parameter(torch.randn(6400, device=f"cuda:{i % devices}").to(dtype)) for i in range(4)]
    model = Model(params)
    rate = torch.tensor(1e-3, device=lr) if isinstance(lr, str) else lr
    optimizer = DistAdamW(model.parameters(), lr=rate, **options)
    if attach:
        optimizer.attach(model, reduce_every_backward=reduce_every_backward)
    with reduced_over(optimizer.replica_group) as streams:
        for update in range(UPDATES):
            notes.clear()
            model.without_gradient = set(range(missing)) if update else set()
            model().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {
        "streams of replicas": [stream is current_stream(stream.device) for stream in streams],
        "kernels": dict(notes.kernels),
        "waits": dict(notes.waits),
        "event waits": notes.event_waits,
        "events": [str(device) for device in notes.events],
    }


@contextlib.contextmanager
def reduced_over(group: Any) -> Iterator[list[Any]]:
    """Yield the streams on which buckets are all-reduced over ``group``."""
    streams: list[Any] = []
    reduce = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if group is not None and options.get("group") is group and tensor.is_cuda and options.get("async_op"):
            streams.append(torch.cuda.current_stream(tensor.device))
        return reduce(tensor, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        yield streams


def join(world_size: int) -> None:
    """Make this process rank 0 of a process group that sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def counts_of(notes: Notes, world_size: int) -> dict[str, Any]:
    """Return the counts of every case, on rank 0 of a process group that sends nothing."""
    if world_size == 1:
        return {name: measured(notes, options) for name, options in OPTIONS.items()}
    join(world_size)
    try:
        return {name: measured(notes, options) for name, options in (OPTIONS | ATTACHED).items()}
    finally:
        dist.destroy_process_group()


def main(world_sizes: list[int]) -> dict[str, Any]:
    """Return the counts by number of ranks, and by name what is wrong with the parts."""
    with pretending() as notes:
        found = {str(size): counts_of(notes, size) for size in world_sizes}
        return found | {name: _error(function, notes) for name, function in CHECKS.items()}


def _error(function: Callable[[Notes], None], notes: Notes) -> str:
    notes.clear()
    try:
        function(notes)
    except Exception:
        return traceback.format_exc()
    return ""


def table(found: dict[str, Any]) -> str:
    """Return the counts in Markdown."""
    lines = ["| update | kernels | host waits | event waits |", "|---|---|---|---|"]
    for name, counts in found.items():
        if "error" in counts:
            lines.append(f"| {name} | {counts['error']} | | |")
            continue
        waits = ", ".join(f"{what} x{n}" for what, n in counts["waits"].items()) or "0"
        lines.append(f"| {name} | {sum(counts['kernels'].values())} | {waits} | {counts['event waits']} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the tests


FEW, MANY = (1, 8), (1024, 4096)


@pytest.fixture(scope="module", params=[*FEW, *(pytest.param(size, marks=pytest.mark.slow) for size in MANY)])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    counts: dict[str, Any] = counted(FEW if request.param in FEW else MANY)[str(request.param)]
    return counts


@functools.cache
def counted(world_sizes: tuple[int, ...]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.test_host_waits", *map(str, world_sizes), "json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    counts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counts


@pytest.mark.parametrize("name", [*OPTIONS, *ATTACHED])
def test_the_host_never_waits_in_a_steady_update(name: str, found: dict[str, Any]) -> None:
    if name not in found:
        pytest.skip("needs several ranks")
    counts = found[name]
    assert "error" not in counts, counts["error"]
    assert counts["waits"] == {}
    # One event, recorded in the update before: the host is at most an update ahead.
    assert counts["event waits"] == ("max_grad_norm" in name)


def test_backward_does_not_wait_for_sums_over_replicas(found: dict[str, Any]) -> None:
    """Another stream waits for the reduce-scatter before the all-reduce."""
    if "attached, replicas" not in found:
        pytest.skip("needs several ranks")
    are_current = found["attached, replicas"]["streams of replicas"]
    assert len(are_current) == UPDATES
    assert not any(are_current)


def test_an_update_launches_few_kernels(found: dict[str, Any]) -> None:
    """As many for any number of parameters and ranks."""
    launched = {name: sum(counts["kernels"].values()) for name, counts in found.items() if "kernels" in counts}
    gather = 3 if "attached" in found else 0  # pack, all-gather, unpack
    assert launched["fp32"] == 2 + gather  # steps, and the update
    # The kernel's table is copied to the device again if gradients have moved.
    assert launched["bf16, fp32 masters"] in (2 + gather, 3 + gather)
    assert launched["fp32, max_grad_norm"] <= 19 + gather


STREAMS: dict[str, dict[str, Any]] = {
    "copied when they are sent": {},
    "into the shard": {"reduce_every_backward": True},
    "sent in step": {"overlap": False},
}


def check_streams(**attach: Any) -> None:
    """Gradients that were written on several streams are read behind them, and let go before these go on."""
    model = Model([nn.Parameter(torch.randn(6400, device="cuda:0")) for _ in range(9)])
    model.streams = {i: Stream("cuda:0") for i in range(9) if i % 3}
    optimizer = DistAdamW(model.parameters(), bucket_numel=12800)
    optimizer.attach(model, **attach)
    read: dict[int, Any] = {}

    def reads(name: str) -> Any:
        method = getattr(torch, name)

        def noted(targets: Any, sources: Any) -> None:
            for param in model.weights:
                grad = param.grad
                if any(grad is not None and source.data_ptr() == grad.data_ptr() for source in sources):
                    here = current_stream("cuda:0")
                    assert here.is_behind(model.written[id(param)])
                    read.setdefault(id(param), here.work())  # later its values are in memory that stays
            method(targets, sources)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", reads("_foreach_copy_"))
        for _ in range(3):
            read.clear()
            model().backward()
            optimizer.step()
            assert len(read) == 9
            for param in model.weights:
                if attach.get("overlap", True):
                    assert model.written[id(param)][0].is_behind(read[id(param)])
            optimizer.zero_grad()


CHECKS: dict[str, Callable[[Notes], None]] = {}


def check(function: Callable[[Notes], None]) -> Callable[[Notes], None]:
    CHECKS[function.__name__] = function
    return function


@check
def gradients_written_on_several_streams_are_read_behind_them(_: Notes) -> None:
    for options in STREAMS.values():
        join(8)
        try:
            check_streams(**options)
        finally:
            dist.destroy_process_group()


@check
def the_event_is_recorded_on_the_stream_of_the_norms_device(notes: Notes) -> None:
    from dist_adamw.optimizer.outcome import Outcome

    outcome = Outcome()
    outcome.measure(torch.tensor(1.0, device="cuda:1"))
    assert notes.events == [torch.device("cuda:1")]
    assert not outcome.is_known
    assert not outcome.was_skipped
    assert outcome.updates == 1
    assert notes.event_waits == 1


@check
def an_update_is_skipped_if_the_device_says_so(notes: Notes) -> None:
    from dist_adamw.optimizer.outcome import Outcome

    outcome = Outcome()
    for value, updates in ((0.0, 1), (1.0, 1), (0.0, 2)):
        flag = torch.tensor(value, device="cuda:0")
        notes.clear()
        outcome.begin()
        outcome.skip_if(flag)
        assert not notes.waits
        assert outcome.was_skipped == bool(value)
        assert outcome.updates == updates
    for norm, skipped in ((1e300, False), (float("inf"), True), (float("nan"), True), (0.0, False)):
        outcome.begin()
        outcome.measure(torch.tensor(norm, dtype=torch.float64, device="cuda:0"))
        assert outcome.was_skipped == skipped


@check
def a_value_is_copied_once_to_each_device(notes: Notes) -> None:
    from dist_adamw.optimizer.outcome import Outcome

    outcome = Outcome()
    value = torch.tensor(0.5, device="cuda:0")
    notes.clear()
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert outcome.on_device(value, first) is value
    copies = [outcome.on_device(value, second) for _ in range(3)]
    assert copies[0] is not None
    assert copies[0].device == second
    assert copies[0] is copies[1] is copies[2]
    assert outcome.on_device(None, second) is None
    assert notes.kernels == {"copy": 1}
    assert not notes.waits
    outcome.begin()
    assert outcome.on_device(value, second) is not copies[0]


@check
def gradients_on_two_devices_are_clipped(notes: Notes) -> None:
    from dist_adamw.optimizer.clipping import _scale_

    grads = [torch.ones(4, device=f"cuda:{i % 2}") for i in range(3)]
    _scale_(grads, torch.tensor(0.5, device="cuda:0"))
    assert [grad.cpu().tolist() for grad in grads] == [[0.5] * 4] * 3


@check
def saving_reads_the_steps_at_once(notes: Notes) -> None:
    from dist_adamw.checkpoint.torch_state import TorchAccess

    model = Model([nn.Parameter(torch.randn(64, device="cuda:0")) for _ in range(5)])
    optimizer = DistAdamW(model.parameters())
    model().backward()
    optimizer.step()
    notes.clear()
    saved = TorchAccess(model, optimizer).to_save()
    assert [numbers["step"] for numbers in saved.scalars.values()] == [1.0] * 5
    assert sum(notes.waits.values()) == 1


@check
def parameters_are_gathered_on_a_stream_of_their_own(notes: Notes) -> None:
    join(4)
    model = Model([nn.Parameter(torch.randn(6400, device="cuda:0")) for _ in range(3)])
    optimizer = DistAdamW(model.parameters(), bucket_numel=6400)
    optimizer.attach(model, defer_gather=True)
    for _ in range(3):
        notes.clear()
        model().backward()
        optimizer.step()
    dist.destroy_process_group()
    first = current_stream()
    side = next(stream for stream in notes.by_stream if stream is not first)
    # A bucket is packed and unpacked there, after its update; the update, and what reads parameters, runs elsewhere.
    assert notes.by_stream.keys() == {first, side}
    assert notes.by_stream[side] == {"_foreach_copy_": 6, "_allgather_base_": 3}
    assert notes.by_stream[first]["_fused_adamw_"] == 3
    assert "_allgather_base_" not in notes.by_stream[first]
    # Nothing waits until all buckets are under way. Parameters of a subclass, as here, are never deferred.
    assert notes.order[:3] == [(side, first)] * 3
    assert set(notes.order[3:]) == {(first, side)}
    assert len(notes.order) >= 6
    assert not notes.waits


@check
def what_waits_is_noticed(notes: Notes) -> None:
    there = torch.zeros(4, device="cuda:0")
    for work in (
        lambda: there.sum().item(),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: there.to("cpu", non_blocking=True),  # to pageable memory
        lambda: there.copy_(torch.ones(4)),
        lambda: there.copy_(torch.ones(4), non_blocking=True),
        lambda: there.nonzero(),
        lambda: bool(there[0]),
        lambda: torch.tensor([1.0], device="cuda:0"),
    ):
        notes.clear()
        work()
        assert sum(notes.waits.values()) == 1, notes
    notes.clear()
    there.copy_(torch.empty(4, pin_memory=True), non_blocking=True)
    torch.empty(4, pin_memory=True).copy_(there, non_blocking=True)
    there.to("cuda:1").add_(1)
    assert not notes.waits


@pytest.mark.parametrize("part", CHECKS)
def test_the_parts(part: str) -> None:
    assert counted(FEW)[part] == ""


if __name__ == "__main__":
    sizes = [int(arg) for arg in sys.argv[1:] if arg != "json"] or [1]
    everything = main(sizes)
    if "json" in sys.argv:
        print(json.dumps(everything))
    else:
        for size in sizes:
            print(f"\n{size} ranks\n\n{table(everything[str(size)])}")
