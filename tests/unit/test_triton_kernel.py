"""The Triton kernel against plain arithmetic, on a CPU: Triton's interpreter runs it, its compiler compiles it.

Whether Triton interprets is settled when it is imported, so both happen in processes of their own: this file,
run as a program, carries out the cases below and prints what became of each. tests/gpu/ has the real device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.mixed import join_master, mixed_adamw_update_, split_master_
from dist_adamw.optimizer.kernels.triton import ROW_NUMEL, BlockTable, available, flat_adamw_update_

pytestmark = pytest.mark.slow

BF16, FP16, FP32, INT16 = torch.bfloat16, torch.float16, torch.float32, torch.int16
SIZES = (1, 31, 0, ROW_NUMEL + 40, 5000)  # part of a tile, more than a row, rows that fit 16 bytes and that do not
DEFAULTS: dict[str, Any] = {
    "scale": None, "found_inf": None, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8,
    "weight_decay": 1e-2, "decay_by": "lr", "maximize": False,
}  # fmt: skip
ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


class Bucket:
    """Scattered weights and flat state, and a copy of all of it for the plain arithmetic."""

    def __init__(
        self,
        dtype: torch.dtype = BF16,
        grad_dtype: torch.dtype = BF16,
        master: torch.dtype | None = FP32,
        state: torch.dtype = FP32,
        *,
        amsgrad: bool = False,
        device: str = "cpu",
        sizes: tuple[int, ...] = SIZES,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.sizes, self.grad_dtype, self.device = sizes, grad_dtype, device
        start = torch.randn(sum(sizes), generator=generator)
        weights = start.to(dtype)
        self.master: Tensor | None = start.to(device) if master == FP32 else None
        if master == INT16:
            self.master = torch.empty(start.shape, dtype=INT16)
            split_master_(start, weights, self.master)
            self.master = self.master.to(device)
        self.params = [w.clone().to(device) for w in weights.split(sizes)]
        # As in the middle of training: a first update from zeros hides mistakes in the moments.
        self.moments = [torch.randn(len(start), generator=generator).mul(0.3).to(state).to(device)]
        for _ in range(2 if amsgrad else 1):
            self.moments.append(torch.rand(len(start), generator=generator).to(state).to(device))
        self.steps = torch.arange(len(sizes), dtype=torch.float32, device=device) * 10
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.table: BlockTable | None = None

    def grads(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(n, generator=generator).to(self.grad_dtype).to(self.device) for n in self.sizes]

    def state(self) -> list[Tensor]:
        return [*self.params, *([] if self.master is None else [self.master]), *self.moments]

    def weights(self) -> Tensor:
        flat = torch.cat(self.params)
        if self.master is None:
            return flat.float()
        return self.master if self.master.dtype == FP32 else join_master(flat, self.master)

    def update(self, grads: list[Tensor], **options: Any) -> None:
        """By the kernel."""
        if self.table is None:
            indices = range(len(self.sizes))
            self.table = BlockTable(self.params, grads, offsets=self.offsets, step_indices=indices)
        self.table.follow(self.params, grads)
        self.steps += 1
        maximum = self.moments[2] if len(self.moments) == 3 else None
        flat_adamw_update_(
            self.table, self.master, self.moments[0], self.moments[1], maximum, self.steps, **{**DEFAULTS, **options}
        )  # fmt: skip

    def update_plainly(self, grads: list[Tensor], **options: Any) -> None:
        self.steps += 1
        masters = [] if self.master is None else list(self.master.split(self.sizes))
        moments = [list(m.split(self.sizes)) for m in self.moments]
        maxima = moments[2] if len(moments) == 3 else []
        mixed_adamw_update_(
            self.params, grads, masters, moments[0], moments[1], maxima, list(self.steps.unbind()),
            **{**DEFAULTS, **options},
        )  # fmt: skip

    def become(self, other: Bucket) -> None:
        for mine, its in zip(self.state(), other.state(), strict=True):
            mine.copy_(its)


def assert_near(actual: Tensor, expected: Tensor, allowed: Tensor | float, what: str) -> None:
    error = (actual.float() - expected.float()).abs()
    assert bool((error <= allowed).all()), (
        f"{what}: error {error.max()}, {(error > allowed).sum()} beyond the tolerance"
    )


def compare(updates: int = 3, device: str = "cpu", options: dict[str, Any] | None = None, **bucket: Any) -> None:
    """Each update from equal state, within the docstring's tolerance; a bf16 result may be its neighbour.

    Betas are rounded to fp32, which is most of the tolerance; test_triton_bits.py compares bits.
    """
    options = dict(options or {})
    amsgrad = options.pop("amsgrad", False)
    ours, plain = (Bucket(device=device, amsgrad=amsgrad, **bucket) for _ in range(2))
    narrow = 2**-7 if ours.moments[0].dtype == BF16 else 0.0
    lr, scale = float(options.get("lr", 1e-3)), float(options.get("scale") or 1.0)
    beta_error = tolerance_of(options.get("betas", DEFAULTS["betas"]))
    for seed in range(updates):
        grads = ours.grads(seed)
        grad = torch.cat(grads).float() * scale
        before, weights_before = [m.float() for m in ours.moments], plain.weights().clone()
        kept = torch.cat(grads)
        ours.update(grads, **options)
        plain.update_plainly(grads, **options)
        assert torch.equal(torch.cat(grads), kept), "the gradients are changed"
        bits = narrow * plain.moments[0].float().abs()
        assert_near(ours.moments[0], plain.moments[0], 3e-7 * (before[0].abs() + grad.abs()) + bits, "exp_avg")
        for i, name in ((1, "exp_avg_sq"), (2, "max_exp_avg_sq"))[: len(before) - 1]:
            # 3e-8 for beta rounded to fp32; the interpreter of Triton 3.6 also rounds an fma twice, a GPU does not.
            allowed = (5e-7 + narrow) * plain.moments[i].float() + 1e-7 * grad.square()
            assert_near(ours.moments[i], plain.moments[i], allowed, name)
        weights, expected = ours.weights(), plain.weights()
        narrowed = 2**-7 if ours.master is None and ours.params[0].dtype != FP32 else 0.0
        moved = (expected - weights_before).abs() + lr
        assert_near(weights, expected, (2.5e-7 + narrowed) * expected.abs() + beta_error * moved, "weights")
        if ours.master is not None and ours.master.dtype == FP32:
            rounded = ours.master.to(ours.params[0].dtype)
            assert torch.equal(torch.cat(ours.params), rounded), "a parameter is not its master rounded to even"
        plain.become(ours)


def tolerance_of(betas: tuple[float, float]) -> float:
    """Return the relative difference of a step whose bias corrections are of betas rounded to fp32."""
    return 2e-6 + 3e-8 / (1 - betas[1]) + 6e-8 / (1 - betas[0])


def everywhere(device: str = "cpu") -> dict[str, Callable[[], None]]:
    """The cases that hold on any device; tests/gpu runs them on CUDA."""

    def tensor(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    kinds: list[dict[str, Any]] = [
        {},
        {"master": INT16},
        {"master": INT16, "grad_dtype": FP32, "state": BF16},
        {"dtype": FP16, "grad_dtype": FP16},
        {"dtype": FP32, "grad_dtype": FP32, "master": None},
        {"dtype": FP32, "grad_dtype": BF16, "master": None, "state": BF16},
        {"master": None, "state": BF16},
    ]
    options: list[dict[str, Any]] = [
        {"scale": tensor(0.37), "eps": 0.1},
        {"amsgrad": True, "maximize": True, "found_inf": tensor(0.0)},
        {"decay_by": "schedule", "betas": (0.0, 0.95), "lr": 0.02},
        {"lr": tensor(0.003), "weight_decay": 0.1},
        {"lr": tensor(0.0), "decay_by": "schedule", "weight_decay": 0.25},
    ]
    cases: dict[str, Callable[[], None]] = {}
    for i, kind in enumerate(kinds):
        for j, option in enumerate(options):
            chosen = {k: v.item() if isinstance(v, Tensor) else v for k, v in option.items()}
            name = f"{i}-{j}: " + ", ".join(f"{k} {v}" for k, v in {**kind, **chosen}.items())
            cases[name] = partial(compare, 1, device, option, **kind)
    for master in (FP32, INT16):
        cases[f"overflow {master}"] = partial(check_overflow, device, master)
    return {
        **cases,
        "decay in device memory": lambda: check_decay_tensor(device),
        "ties": lambda: check_ties(device),
        "a nan shows": lambda: check_nan(device),
        "moved gradients": lambda: check_moved(device),
        "misaligned": lambda: check_misaligned(device),
        "first steps": lambda: check_first_steps(device),
        "many updates": lambda: check_many_updates(device),
    }


def check_overflow(device: str, master: torch.dtype) -> None:
    ours = Bucket(master=master, amsgrad=True, device=device)
    kept = [t.clone() for t in ours.state()]
    grads = [g.fill_(float("inf")) for g in ours.grads(0)]
    ours.update(grads, found_inf=torch.tensor(1.0, device=device))
    for now, was in zip(ours.state(), kept, strict=True):
        assert torch.equal(now, was)


def check_decay_tensor(device: str) -> None:
    ours, other = Bucket(device=device), Bucket(device=device)
    ours.update(ours.grads(0), weight_decay=torch.tensor(0.5, device=device))
    other.update(other.grads(0), weight_decay=0.5)
    assert torch.equal(ours.weights(), other.weights())
    third = Bucket(device=device)
    third.update(third.grads(0), weight_decay=0.0)
    assert not torch.equal(ours.weights(), third.weights())


def check_ties(device: str) -> None:
    """Half-way between two bf16, a parameter goes to the even one, as torch's conversion does."""
    ours = Bucket(sizes=(512,), device=device)
    assert ours.master is not None
    ours.master.copy_(((torch.arange(512, dtype=torch.int32) << 16) + 0x3F808000).view(FP32))
    ours.params[0].copy_(ours.master)
    kept = ours.master.clone()
    ours.update(ours.grads(0), lr=0.0)
    assert torch.equal(ours.master, kept)
    assert torch.equal(ours.params[0], kept.to(BF16))


def check_nan(device: str) -> None:
    ours = Bucket(master=INT16, grad_dtype=FP32, device=device)
    grads = [torch.zeros_like(g) for g in ours.grads(0)]
    grads[3].view(torch.int32)[7] = 0x7FFFFFFF
    ours.update(grads)
    assert ours.params[3].isnan().nonzero().tolist() == [[7]]
    assert int(ours.weights().isnan().sum()) == 1


def check_moved(device: str) -> None:
    """The table follows gradients to other addresses, and says whether it had to."""
    ours, plain = Bucket(device=device), Bucket(device=device)
    first = ours.grads(0)
    ours.update(first)
    plain.update_plainly(first)
    assert ours.table is not None
    assert not ours.table.follow(ours.params, first)
    second = [g.clone() for g in ours.grads(1)]
    assert ours.table.follow(ours.params, second)
    first[3].fill_(float("nan"))
    ours.update(second)
    plain.update_plainly(second)
    assert_near(ours.weights(), plain.weights(), 1e-5, "weights")


def check_misaligned(device: str) -> None:
    """Views that begin at any element: no 16 bytes may be read at once where they are not aligned."""
    ours, plain = Bucket(device=device), Bucket(device=device)
    grads = ours.grads(0)
    for k in (1, 3, 8):
        shifted = [torch.empty(k + g.numel(), dtype=g.dtype, device=device)[k:].copy_(g) for g in grads]
        params = [torch.empty(k + p.numel(), dtype=p.dtype, device=device)[k:].copy_(p) for p in ours.params]
        ours.params, ours.table = params, None
        ours.update(shifted)
        plain.update_plainly(grads)
        assert_near(ours.weights(), plain.weights(), 1e-5, f"weights shifted by {k}")


def check_first_steps(device: str) -> None:
    """Bias corrections at steps where 1 - beta ** step cancels, and where nothing is left to correct."""
    for step in (1, 2, 7, 300, 700, 1e5, 3e6):
        ours, plain = (Bucket(dtype=FP32, grad_dtype=FP32, master=None, device=device) for _ in range(2))
        for bucket in (ours, plain):
            bucket.steps.fill_(step - 1)
        grads = ours.grads(0)
        ours.update(grads, lr=1.0, betas=(0.9, 0.9999), weight_decay=0.0)
        plain.update_plainly(grads, lr=1.0, betas=(0.9, 0.9999), weight_decay=0.0)
        moved = (plain.weights() - torch.cat(Bucket(dtype=FP32, device=device).params)).abs()
        assert_near(ours.weights(), plain.weights(), tolerance_of((0.9, 0.9999)) * moved + 1e-6, f"step {step}")


def check_many_updates(device: str) -> None:
    """20 updates without starting over: an ulp each, in one direction where weight decay always rounds so."""
    ours, plain = (Bucket(sizes=(33, 515), device=device) for _ in range(2))
    for seed in range(20):
        grads = ours.grads(seed)
        ours.update(grads)
        plain.update_plainly(grads)
    assert_near(ours.weights(), plain.weights(), 20 * (1.2e-7 * plain.weights().abs() + 2e-9), "weights")


def main() -> None:
    """Carry out all cases; print JSON."""
    results = {}
    for name, case in everywhere().items():
        try:
            case()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


# ---------------------------------------------------------------- the tests


def run_as_program(path: str, **environment: str) -> dict[str, Any]:
    """Run a test module as a program; return the JSON that it prints last."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, path], env=env, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_as_program(__file__, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", list(everywhere()))
def test_the_kernel_is_the_plain_update(name: str, interpreted: dict[str, Any]) -> None:
    assert not interpreted[name], interpreted[name]


def test_everything_imports_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from dist_adamw.optimizer.kernels import mixed, triton as k\n"
        "assert not k.available(torch.device('cpu')) and not k.available(torch.device('cuda'))\n"
        "p, g = [torch.zeros(3)], [torch.zeros(3)]\n"
        "t = k.BlockTable(p, g, offsets=[0], step_indices=[0])\n"
        "try:\n"
        "    k.flat_adamw_update_(t, None, torch.zeros(3), torch.zeros(3), None, torch.ones(1), scale=None,\n"
        "        found_inf=None, lr=1.0, betas=(0.9, 0.99), eps=1.0, weight_decay=0.0, decay_by='lr', maximize=False)\n"
        "except RuntimeError as error:\n"
        "    assert 'pip install triton' in str(error)\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cpu_is_not_for_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    available.cache_clear()
    assert not available(torch.device("cpu"))
    available.cache_clear()


def test_the_table_says_where_every_element_lies() -> None:
    ours = Bucket()
    grads = ours.grads(0)
    table = BlockTable(ours.params, grads, offsets=ours.offsets, step_indices=[4, 3, 2, 1, 0])
    assert table.rows is not None
    rows = iter(table.rows.tolist())
    for i, n in enumerate(SIZES):
        for start in range(0, n, ROW_NUMEL):
            param, grad = ours.params[i][start:], grads[i][start:]
            numel, offset = min(ROW_NUMEL, n - start), ours.offsets[i] + start
            aligned = (param.data_ptr() | grad.data_ptr()) % 16 == 0 and offset % 8 == 0 and numel % 8 == 0
            assert next(rows) == [param.data_ptr(), grad.data_ptr(), offset, numel, 4 - i, int(aligned)]
    assert next(rows, None) is None
    assert {row[5] for row in table.rows.tolist()} == {0, 1} or sum(SIZES[:3]) % 8
    assert BlockTable([], [], offsets=[], step_indices=[]).rows is None


def test_mistakes_are_refused() -> None:
    ours = Bucket()
    grads = ours.grads(0)
    table = BlockTable(ours.params, grads, offsets=ours.offsets, step_indices=range(5))
    with pytest.raises(ValueError, match="equally long"):
        BlockTable(ours.params, grads, offsets=[0], step_indices=range(5))
    with pytest.raises(ValueError, match=r"grads .*table was built for"):
        table.follow(ours.params, [torch.zeros(n + 1, dtype=BF16) for n in SIZES])
    with pytest.raises(ValueError, match="contiguous"):
        table.follow(ours.params, [torch.zeros(2 * n, dtype=BF16)[::2] for n in SIZES])
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        table.follow(ours.params, [g.double() for g in grads])
    state = torch.zeros(sum(SIZES))
    good: list[Any] = [table, None, state, state, None, torch.ones(5)]
    cases: list[tuple[int, Any, str]] = [
        (1, state.double(), "master must be float32 or int16"),
        (2, state[:-1], "flat state must be"),
        (3, state.half(), "moments must all be"),
        (5, torch.ones(4), "steps must be"),
    ]
    for place, wrong, message in cases:
        arguments = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(ValueError, match=message):
            flat_adamw_update_(*arguments, **DEFAULTS)
    half = BlockTable([torch.zeros(3, dtype=FP16)], [torch.zeros(3)], offsets=[0], step_indices=[0])
    with pytest.raises(ValueError, match="complete bfloat16 weights only"):
        flat_adamw_update_(half, torch.zeros(3, dtype=INT16), state, state, None, torch.ones(1), **DEFAULTS)


if __name__ == "__main__":
    main()
