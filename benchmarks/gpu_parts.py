"""The parts of `gpu_session`: what is measured on a GPU, and how.

Kernel time is that of the device between two events, behind a kernel that sleeps until everything is queued: the time
of launching is not in it. Host time is that of the call; a call that returns only after the sleep has waited for the
device. The limit is the time of the bytes that have to move, at the bandwidth of a copy between two large tensors.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import records
from benchmarks.ranks import ROOT
from dist_adamw import DistAdamW

BF16, FP32 = torch.bfloat16, torch.float32
RECIPE: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MODELS = {"125M": (12, 768, 50257), "350M": (24, 1024, 50257), "small": (2, 32, 64)}  # layers, width, vocabulary
# Bytes that one update has to move for each element: gradient, weight, both moments; and master, with masters.
KINDS = {"fp32": (FP32, 28), "bf16": (BF16, 14), "bf16, fp32 masters": (BF16, 28)}
GROUPINGS = ("one", "decay", "layerwise")
SLEEP_SECONDS = 0.02
WARM_UP = 3  # rounds
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "hipStreamSynchronize")
Run = Callable[[], Any]


class Session:
    """The options of one session, and where its results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.is_small: bool = options.small
        self.results: Path = options.out / "results.jsonl"
        self.rounds = 2 if options.small else 15

    def models(self) -> list[str]:
        return ["small"] if self.is_small else ["125M", "350M"]

    def record(self, kind: str, **values: Any) -> None:
        records.append(self.results, [{"kind": kind, **values}])
        print(kind, values, flush=True)

    def arguments(self) -> list[str]:
        """Return the command line of a part of this session."""
        small = ["--small"] if self.is_small else []
        return ["--out", str(self.results.parent), "--device", self.device.type, *small]


# ---------------------------------------------------------------- models and optimizers


def shapes(model: str) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the layer and shape of each parameter of a GPT."""
    layers, width, vocabulary = MODELS[model]
    yield from ((0, (vocabulary, width)), (0, (1024, width)))
    for layer in range(layers):
        for rows, columns in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            yield from ((layer, (rows, columns)), (layer, (rows,)))
        yield from ((layer, (width,)) for _ in range(4))
    yield from ((layers - 1, (width,)) for _ in range(2))


def weights(model: str, dtype: torch.dtype, device: torch.device) -> list[tuple[int, nn.Parameter]]:
    """Return parameters with gradients, each with its layer."""
    made = []
    for layer, shape in shapes(model):
        param = nn.Parameter(torch.full(shape, 0.02, dtype=dtype, device=device))
        param.grad = torch.full_like(param, 1e-3)
        made.append((layer, param))
    return made


def grouped(params: list[tuple[int, nn.Parameter]], how: str) -> list[dict[str, Any]]:
    """Return param groups: one; matrices and the rest; or those two for each layer, with its own lr."""
    groups: dict[Any, dict[str, Any]] = {}
    for layer, param in params:
        key = {"one": 0, "decay": param.ndim > 1, "layerwise": (layer, param.ndim > 1)}[how]
        group = groups.setdefault(key, {"params": [], "lr": RECIPE["lr"]})
        group["params"].append(param)
        if how != "one":
            group["weight_decay"] = RECIPE["weight_decay"] if param.ndim > 1 else 0.0
        if how == "layerwise":
            group["lr"] = RECIPE["lr"] * 0.9**layer
    return list(groups.values())


def engine(name: str, params: list[tuple[int, nn.Parameter]], grouping: str, kind: str) -> Run:
    """Return one update of ``params`` by an optimizer."""
    masters = kind == "bf16, fp32 masters"
    if name == "DistAdamW":
        options: dict[str, Any] = {"master_dtype": FP32} if masters else {}
        return DistAdamW(grouped(params, grouping), shard=False, **RECIPE, **options).step
    fused = name == "torch fused"
    if not masters:
        return torch.optim.AdamW(grouped(params, grouping), fused=fused, foreach=not fused, **RECIPE).step
    return _torch_with_masters(params, grouping, fused=fused)


def _torch_with_masters(params: list[tuple[int, nn.Parameter]], grouping: str, *, fused: bool) -> Run:
    """Return what scripts do for fp32 masters: copy gradients there, update, copy weights back."""
    masters = [(layer, nn.Parameter(param.detach().float())) for layer, param in params]
    for _, master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(grouped(masters, grouping), fused=fused, foreach=not fused, **RECIPE)
    wide, wide_grads = [m.detach() for _, m in masters], [_gradient(m) for _, m in masters]
    narrow, narrow_grads = [p.detach() for _, p in params], [_gradient(p) for _, p in params]

    def run() -> None:
        torch._foreach_copy_(wide_grads, narrow_grads)
        optimizer.step()
        torch._foreach_copy_(narrow, wide)

    return run


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


# ---------------------------------------------------------------- time


def timed(work: Run, device: torch.device) -> tuple[float, float, bool]:
    """Return kernel seconds, host seconds, and whether the host waited for the device."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        took = time.perf_counter() - began
        return took, took, False
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(SLEEP_SECONDS * 1.5e9))
    start.record()
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    waited = start.query()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3, took, waited


def compared(runs: dict[str, Run], session: Session) -> dict[str, dict[str, Any]]:
    """Return the median times of each, taken in turns."""
    found: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in runs}
    for turn in range(WARM_UP + session.rounds):
        for name, run in runs.items():
            times = timed(run, session.device)
            if turn >= WARM_UP:
                found[name].append(times)
    return {
        name: {
            "kernel_ms": 1e3 * median(t[0] for t in times),
            "host_ms": 1e3 * median(t[1] for t in times),
            "waited": sum(t[2] for t in times),
        }
        for name, times in found.items()
    }


def copy_bandwidth(session: Session) -> float:
    """Return the bytes per second that a copy reads and writes."""
    numel = 1 << (16 if session.is_small else 28)
    source, target = (torch.zeros(numel, device=session.device) for _ in range(2))
    times = [timed(lambda: target.copy_(source), session.device)[0] for _ in range(WARM_UP + session.rounds)]
    return 8 * numel / median(times[WARM_UP:])


# ---------------------------------------------------------------- the parts


def tests(session: Session) -> None:
    """Run ``pytest tests/gpu``: bits, host waits, CUDA graphs, bandwidth."""
    # Without the project's options, which need plugins.
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-s", "-rfEs", "-o", "addopts=", "--tb=short"]
    command += ["--collect-only"] if session.is_small else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    session.record("tests", rc=done.returncode, tail=(done.stdout + done.stderr)[-6000:])


def steps(session: Session) -> None:
    """Compare one update of DistAdamW, unsharded, with torch's fused and foreach AdamW, and with the limit."""
    bandwidth = copy_bandwidth(session)
    session.record("bandwidth", gb_per_s=bandwidth / 1e9)
    for model in session.models():
        for kind in KINDS:
            for grouping in GROUPINGS:
                _steps(session, model, kind, grouping, bandwidth)
                _free(session)


def _steps(session: Session, model: str, kind: str, grouping: str, bandwidth: float) -> None:
    dtype, bytes_per_element = KINDS[kind]
    runs: dict[str, Run] = {}
    numel = 0
    for name in ("DistAdamW", "torch fused", "torch foreach"):
        params = weights(model, dtype, session.device)
        numel = sum(param.numel() for _, param in params)
        runs[name] = engine(name, params, grouping, kind)
    for name, times in compared(runs, session).items():
        limit = 1e3 * bytes_per_element * numel / bandwidth
        fraction = limit / times["kernel_ms"]
        case = {"model": model, "dtype": kind, "groups": grouping, "engine": name}
        session.record("step", **case, **times, gb_per_s=fraction * bandwidth / 1e9, of_the_limit=fraction)


def clip(session: Session) -> None:
    """Compare clipping within the update with clip_grad_norm_ and an update."""
    for model in session.models():
        for kind in ("fp32", "bf16, fp32 masters"):
            _clip(session, model, kind)
            _free(session)


def _clip(session: Session, model: str, kind: str) -> None:
    dtype, _ = KINDS[kind]
    params = [weights(model, dtype, session.device) for _ in range(3)]
    options: dict[str, Any] = {"master_dtype": FP32} if dtype == BF16 else {}
    clipping = DistAdamW(grouped(params[0], "one"), shard=False, max_grad_norm=0.01, **RECIPE, **options)
    torchs = engine("torch fused", params[2], "one", kind)
    clipped = [param for _, param in params[2]]

    def clip_then_step() -> None:
        torch.nn.utils.clip_grad_norm_(clipped, 0.01)
        torchs()

    runs: dict[str, Run] = {
        "DistAdamW, max_grad_norm": clipping.step,
        "DistAdamW": engine("DistAdamW", params[1], "one", kind),
        "clip_grad_norm_, then torch fused": clip_then_step,
    }
    for name, times in compared(runs, session).items():
        session.record("clip", model=model, dtype=kind, engine=name, **times)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        cut = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = cut.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class GPT(nn.Module):
    def __init__(self, model: str) -> None:
        super().__init__()
        layers, width, vocabulary = MODELS[model]
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def train(session: Session) -> None:
    """Compare whole training steps of a GPT in bf16 autocast, clipping included."""
    model = session.models()[0]
    batch, length = (2, 16) if session.is_small else (8, 512)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(MODELS[model][2], (batch, length + 1), generator=generator).to(session.device)
    runs, losses = {}, {}
    for name in ("DistAdamW", "torch fused"):
        runs[name], losses[name] = _training(name, model, tokens)
    for name, times in compared(runs, session).items():
        last = [float(loss) for loss in losses[name][-1:]]
        session.record("train", model=model, engine=name, **times, tokens=batch * length, last_loss=last[0])


def _training(name: str, model: str, tokens: Tensor) -> tuple[Run, list[Tensor]]:
    torch.manual_seed(0)
    network = GPT(model).to(tokens.device)
    ours = name == "DistAdamW"
    optimizer: torch.optim.Optimizer = (
        DistAdamW(network.parameters(), shard=False, max_grad_norm=1.0, **RECIPE)
        if ours
        else torch.optim.AdamW(network.parameters(), fused=True, **RECIPE)
    )
    losses: list[Tensor] = []

    def run() -> None:
        with torch.autocast(tokens.device.type, BF16):
            logits = network(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if not ours:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    return run, losses


def profile(session: Session) -> None:
    """Count kernels and host waits of an update."""
    model = session.models()[0]
    for kind, (dtype, _) in KINDS.items():
        for max_norm in (None, 1.0):
            params = weights(model, dtype, session.device)
            options: dict[str, Any] = {"master_dtype": FP32} if kind == "bf16, fp32 masters" else {}
            ours = DistAdamW(grouped(params, "decay"), shard=False, max_grad_norm=max_norm, **RECIPE, **options)
            counts = _profiled(ours.step, session.device)
            session.record("profile", engine="DistAdamW", dtype=kind, max_grad_norm=max_norm, **counts)
        counts = _profiled(engine("torch fused", weights(model, dtype, session.device), "decay", kind), session.device)
        session.record("profile", engine="torch fused", dtype=kind, max_grad_norm=None, **counts)


def _profiled(work: Run, device: torch.device, updates: int = 3) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for _ in range(3):
        work()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profiler(activities=activities) as found:
        for _ in range(updates):
            work()
    events = list(found.events() or [])
    on_device = Counter(e.name for e in events if "CUDA" in str(e.device_type))
    waits = Counter(e.name for e in events if e.name in WAITS)
    operations = sum(e.name.startswith("aten::") for e in events)
    return {
        "kernels": sum(on_device.values()) / updates,
        "waits": {name: n / updates for name, n in waits.items()},
        "operations": operations / updates,
        "most": [f"{name[:60]} x{n / updates:g}" for name, n in on_device.most_common(5)],
    }


def ranks(session: Session) -> None:
    """Take attached steps over NCCL on 1 to all GPUs, and of two ranks on one GPU over gloo; beside DDP."""
    gpus = torch.cuda.device_count() if session.device.type == "cuda" else 0
    jobs = [(size, "nccl") for size in range(1, gpus + 1) if size & (size - 1) == 0] + [(2, "gloo")]
    for size, backend in jobs:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.gpu_session", *session.arguments(), "--part", "rank"]
            env = {**os.environ, "WORLD_SIZE": str(size), "BENCH_BACKEND": backend, "BENCH_STORE": f"file://{folder}/s"}
            processes = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, cwd=ROOT) for rank in range(size)]
            deadline = time.monotonic() + 100
            try:
                codes: list[Any] = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
            except subprocess.TimeoutExpired:
                codes = ["not done in 100 s"]
            finally:
                for process in processes:
                    process.kill()
        if any(codes):
            session.record("ranks", backend=backend, ranks=size, engine="-", error=codes)


def rank(session: Session) -> None:
    """Run one rank of `ranks`."""
    backend, size, number = os.environ["BENCH_BACKEND"], int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if session.device.type == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    dist.init_process_group(backend, init_method=os.environ["BENCH_STORE"], rank=number, world_size=size)
    for name in ("DistAdamW, attached", "DDP, torch fused"):
        step = _rank_run(session, name)
        times = [step() for _ in range(WARM_UP + session.rounds)]
        if number == 0:
            session.record("ranks", backend=backend, ranks=size, engine=name, step_ms=1e3 * median(times[WARM_UP:]))
    dist.destroy_process_group()


def _rank_run(session: Session, name: str) -> Callable[[], float]:
    """Return a function that takes a training step and returns its seconds."""
    torch.manual_seed(0)
    model = session.models()[0]
    network: nn.Module = GPT(model).to(session.device)
    tokens = torch.randint(MODELS[model][2], (2, 17 if session.is_small else 513), device=session.device)
    optimizer: torch.optim.Optimizer
    if name.startswith("DDP"):
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True, **RECIPE)
    else:
        optimizer = DistAdamW(network.parameters(), **RECIPE)
        optimizer.attach(network)
    wait = torch.cuda.synchronize if session.device.type == "cuda" else nullcontext

    def run() -> float:
        wait()
        began = time.perf_counter()
        with torch.autocast(session.device.type, BF16):
            logits = network(tokens[:, :-1])
        nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - began

    return run


def _free(session: Session) -> None:
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
