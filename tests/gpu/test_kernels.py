"""The kernels on a CUDA device: the plain update's numbers, no synchronisation, CUDA graphs, and their bandwidth.

``pytest tests/gpu -s`` prints the fractions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.foreach import adamw_update_
from dist_adamw.optimizer.kernels.triton import available
from tests.unit.test_mixed import Weights, assert_same_bits, gradients, torch_adamw
from tests.unit.test_triton_kernel import BF16, DEFAULTS, FP32, INT16, Bucket, assert_near, everywhere

CUDA = torch.device("cuda")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"),
]


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_triton
def test_the_kernel_is_available_here() -> None:
    assert available(CUDA), f"capability {torch.cuda.get_device_capability()}: the kernel needs (8, 0)"


@needs_triton
@pytest.mark.parametrize("name", list(everywhere()))
def test_the_kernel_is_the_plain_update(name: str) -> None:
    everywhere("cuda")[name]()


@needs_triton
@pytest.mark.parametrize("master", [FP32, INT16])
def test_the_kernel_never_waits(master: torch.dtype, request: pytest.FixtureRequest) -> None:
    scale, found_inf, lr = (torch.tensor(v, device=CUDA) for v in (0.5, 0.0, 1e-3))
    ours = Bucket(master=master, device="cuda")
    grads = [ours.grads(seed) for seed in range(3)]
    ours.update(grads[0], scale=scale, found_inf=found_inf, lr=lr)  # compiles
    request.getfixturevalue("_no_waiting")
    for some in grads:  # each lies elsewhere, so the table is written again
        ours.update(some, scale=scale, found_inf=found_inf, lr=lr)
        ours.update(some, scale=scale, found_inf=found_inf)


@pytest.mark.parametrize("master", [FP32, INT16, None])
def test_the_plain_update_never_waits(master: torch.dtype | None, request: pytest.FixtureRequest) -> None:
    state = on_cuda(Weights(BF16, master, sizes=(33, 4099)))
    scale, found_inf, lr = (torch.tensor(v, device=CUDA) for v in (0.5, 0.0, 1e-3))
    grads = [g.to(CUDA) for g in gradients(0, BF16, (33, 4099))]
    state.update(grads, scale=scale)
    request.getfixturevalue("_no_waiting")
    state.update(grads, scale=scale, found_inf=found_inf)
    state.update(grads, scale=scale, found_inf=found_inf, lr=lr, decay_by="schedule")


def on_cuda(weights: Weights) -> Weights:
    weights.params = [p.to(CUDA) for p in weights.params]
    weights.masters = [m.to(CUDA) for m in weights.masters]
    weights.moments = [[m.to(CUDA) for m in column] for column in weights.moments]
    weights.steps = weights.steps.to(CUDA)
    return weights


@pytest.mark.parametrize("master", [FP32, INT16])
def test_the_plain_update_has_torchs_bits_on_cuda(master: torch.dtype) -> None:
    ours = on_cuda(Weights(BF16, master))
    theirs, reference = torch_adamw([w.clone() for w in ours.weights()])
    scale = torch.tensor(0.37, device=CUDA)
    for step in range(20):
        grads = [g.to(CUDA) for g in gradients(step, BF16)]
        ours.update(grads, scale=scale)
        for copy, grad in zip(theirs, grads, strict=True):
            copy.grad = grad.float() * scale
        reference.step()
    assert_same_bits(ours.weights(), theirs)


@needs_triton
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.8, 0.95), "eps": 0.1}, {"amsgrad": True, "maximize": True}], ids=str
)
@pytest.mark.parametrize("master", [FP32, INT16, None])
def test_the_kernel_has_torchs_bits(master: torch.dtype | None, options: dict[str, Any]) -> None:
    """fp32 weights, or masters, with clipping: what clip_grad_norm_ and torch.optim.AdamW(fused=True) do."""
    dtype = FP32 if master is None else BF16
    amsgrad = options.get("amsgrad", False)
    ours = Bucket(dtype, dtype, master, amsgrad=amsgrad, device="cuda")
    weights = [w.clone() for w in ours.weights().split(ours.sizes)]
    moments = [[m.clone() for m in moment.split(ours.sizes)] for moment in ours.moments]
    scale = torch.tensor(0.37, device=CUDA)
    chosen = {k: v for k, v in options.items() if k != "amsgrad"}
    for seed in range(10):
        grads = ours.grads(seed)
        ours.update(grads, scale=scale, **chosen)
        adamw_update_(
            weights, moments[0], moments[1], moments[2] if amsgrad else [], list(ours.steps.unbind()), fused=True,
            grads=[g.float() * scale for g in grads],
            **{k: v for k, v in {**DEFAULTS, **chosen}.items() if k not in ("scale", "found_inf")},
        )  # fmt: skip
    assert_same_bits([ours.weights(), *ours.moments], [torch.cat(column) for column in (weights, *moments)])


@pytest.mark.parametrize("master", [FP32, INT16, None])
def test_an_overflow_leaves_everything_as_it_is_on_cuda(master: torch.dtype | None) -> None:
    ours = on_cuda(Weights(BF16, master, BF16))
    ours.update([g.to(CUDA) for g in gradients(0, BF16)])
    everything = [*ours.params, *ours.masters, *(m for column in ours.moments for m in column)]
    kept = [t.clone() for t in everything]
    bad = [torch.full_like(p, float("inf")) for p in ours.params]
    ours.update(bad, found_inf=torch.tensor(1.0, device=CUDA), scale=torch.tensor(0.5, device=CUDA))
    assert_same_bits(everything, kept)


@needs_triton
@pytest.mark.parametrize("master", [FP32, INT16])
def test_a_captured_update_reads_everything_anew(master: torch.dtype) -> None:
    ours, plain = (Bucket(master=master, device="cuda") for _ in range(2))
    scale, found_inf, lr, decay = (torch.tensor(v, device=CUDA) for v in (0.5, 0.0, 1e-3, 1e-2))
    options: dict[str, Any] = {"scale": scale, "found_inf": found_inf, "lr": lr}
    grads = ours.grads(0)
    ours.update(grads, **options, weight_decay=decay)  # compiles, and shows the table the gradients
    plain.update_plainly(grads, **options)
    plain.become(ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.update(grads, **options, weight_decay=decay)  # its steps += 1 is captured too
    for seed, (rate, inf) in enumerate([(1e-3, 0.0), (2e-2, 0.0), (2e-2, 1.0), (0.0, 0.0)]):
        for grad, new in zip(grads, ours.grads(10 + seed), strict=True):
            grad.copy_(new)
        lr.fill_(rate)
        found_inf.fill_(inf)
        ours.steps.copy_(plain.steps)
        before = ours.weights().clone()
        graph.replay()
        plain.update_plainly(grads, **options)
        assert_near(ours.weights(), plain.weights(), 2e-7 * plain.weights().abs() + 2e-6 * rate, f"replay {seed}")
        assert torch.equal(ours.weights(), before) == (inf == 1.0 or rate == 0.0)
        plain.become(ours)


@needs_triton
def test_a_gradient_that_moves_during_capture_is_refused() -> None:
    ours = Bucket(device="cuda")
    grads, moved = ours.grads(0), ours.grads(1)
    ours.update(grads)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="moved while a CUDA graph"), torch.cuda.graph(graph):
        ours.update(moved)


# ---------------------------------------------------------------- bandwidth


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median over ``repeats``, on the device's clock."""
    for _ in range(3):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[repeats // 2] / 1e3


def state_of(numel: int, master: torch.dtype, state: torch.dtype) -> Bucket:
    """64 weights of a multiple of 8 elements, as models have them."""
    return Bucket(master=master, state=state, device="cuda", sizes=(numel // 64,) * 64)


@needs_triton
@pytest.mark.parametrize(
    ("master", "state", "bytes_per_element"), [(FP32, FP32, 30), (INT16, FP32, 26), (INT16, BF16, 18)], ids=str
)
def test_the_kernel_reaches_most_of_the_bandwidth(
    master: torch.dtype, state: torch.dtype, bytes_per_element: int
) -> None:
    numel = 1 << 26  # far beyond any cache
    source, target = (torch.zeros(numel, device=CUDA) for _ in range(2))
    bandwidth = 8 * numel / seconds(lambda: target.copy_(source))
    ours = state_of(numel, master, state)
    grads: list[Tensor] = ours.grads(0)
    scale = torch.tensor(0.5, device=CUDA)
    kernel = seconds(lambda: ours.update(grads, scale=scale))
    plainly = seconds(lambda: ours.update_plainly(grads, scale=scale))
    fraction = bytes_per_element * numel / bandwidth / kernel
    print(
        f"\n{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s; master {master}, moments {state}: "
        f"kernel {kernel * 1e3:.3f} ms = {fraction:.2f} of the limit; plain torch {plainly * 1e3:.3f} ms = "
        f"{bytes_per_element * numel / bandwidth / plainly:.2f}"
    )
    assert fraction > 0.5, "16 bytes a thread and one pass should give 0.8 or more"
