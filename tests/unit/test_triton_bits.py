"""The Triton kernel has the bits of torch's fused CUDA kernel: its interpreter against a transcription in numpy.

tests/gpu compares it with torch's kernel itself. This file, run as a program, carries out the cases, since whether
Triton interprets is settled when it is imported.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fused_adamw import FusedAdamW, fma
from tests.unit.test_triton_kernel import BF16, DEFAULTS, FP32, Bucket, needs_triton, run_as_program

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clipped": {"scale": 0.37},
    "no decay": {"weight_decay": 0.0, "lr": 0.3},
    "amsgrad, ascending": {"amsgrad": True, "maximize": True, "eps": 0.1},
    "other betas": {"betas": (0.0, 0.95), "scale": 0.01},
    "bf16 with masters": {"dtype": BF16, "grad_dtype": BF16, "master": FP32, "scale": 0.37},
    "bf16 with remainders": {"dtype": BF16, "grad_dtype": BF16, "master": torch.int16, "scale": 0.37},
}
KINDS = ("dtype", "grad_dtype", "master", "amsgrad")


def main() -> None:
    """Print by case how many elements differ, or None if this Triton's interpreter rounds an fma twice."""
    from triton.runtime import interpreter

    rounds_once = hasattr(getattr(interpreter, "_interpreter", None), "fma_fp32")
    print(json.dumps({name: differing(case) if rounds_once else None for name, case in CASES.items()}))


def differing(case: dict[str, Any]) -> int:
    """Return the number of elements of weights and moments in which three updates differ from the transcription."""
    kind = {"dtype": FP32, "grad_dtype": FP32, "master": None} | {k: case[k] for k in KINDS if k in case}
    options = {k: v for k, v in case.items() if k not in KINDS}
    ours = Bucket(**kind)
    expected = [ours.weights().numpy().copy(), *(m.numpy().copy() for m in ours.moments)]
    wrong = 0
    for seed in range(3):
        grads = ours.grads(seed)
        scale = options.get("scale")
        ours.update(grads, **options | ({} if scale is None else {"scale": torch.tensor(scale)}))
        expected = _transcribed(ours, torch.cat(grads).float(), expected, {**DEFAULTS, **options})
        for now, then in zip([ours.weights(), *ours.moments], expected, strict=True):
            wrong += int((now.numpy().view(np.int32) != then.view(np.int32)).sum())
    return wrong


def _transcribed(ours: Bucket, grad: Tensor, state: list[Any], options: dict[str, Any]) -> list[Any]:
    """Return weights and moments after one update of every piece."""
    if options["scale"] is not None:
        grad = grad * torch.tensor(options["scale"])
    kernel = FusedAdamW(*(options[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")))
    pieces = []
    for i, (start, numel) in enumerate(zip(ours.offsets, ours.sizes, strict=True)):
        weight, exp_avg, exp_avg_sq, *maximum = (s[start : start + numel] for s in state)
        largest = maximum[0] if maximum else None
        step = float(ours.steps[i])
        pieces.append(kernel.update(weight, grad.numpy()[start : start + numel], exp_avg, exp_avg_sq, largest, step))
    return [np.concatenate(column) for column in list(zip(*pieces, strict=True))[: len(state)]]


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_as_program(__file__, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_has_the_bits_of_torchs(name: str, interpreted: dict[str, Any]) -> None:
    if interpreted[name] is None:
        pytest.skip("this Triton's interpreter rounds an fma twice, a GPU once: needs Triton 3.9")
    assert interpreted[name] == 0, f"{interpreted[name]} elements differ"


def test_the_transcription_rounds_an_fma_once() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(2000).astype(np.float32) for _ in range(2))
    c = (-(a * b) * random.choice([1, 1 + 2**-20, 2**-24, 0.5], 2000)).astype(np.float32)
    for x, y, z, found in zip(a, b, c, fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(found)) - exact)
        for neighbour in (np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf))):
            assert error <= abs(Fraction(float(neighbour)) - exact)


if __name__ == "__main__":
    main()
