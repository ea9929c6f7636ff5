"""SIMULATED: what averaging gradients in bf16 costs, against fp32.

``python -m tests.unit.test_reduce_dtype`` prints the table. Each rank's gradient is one common part, and noise of its
own of a multiple of its size. Sums go around in rank order, each rounded to the dtype that it is kept in, as in NCCL's
ring; errors are L2 norms relative to the exact average.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
RANKS = (8, 64, 1024)
NUMEL = 1 << 14
# What ranks have, what is sent, and what the sum is kept in on its way.
CASES = {
    "bf16 gradients, summed in bf16": (BF16, BF16, BF16),
    "bf16 gradients, summed in fp32": (BF16, BF16, FP32),
    "fp32 gradients, summed in fp32": (FP32, FP32, FP32),
    "fp32 gradients sent as bf16, summed in fp32": (FP32, BF16, FP32),
    "fp32 gradients sent as bf16, summed in bf16": (FP32, BF16, BF16),
}


def gradients(ranks: int, noise: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(NUMEL, generator=generator)
    return [common + noise * torch.randn(NUMEL, generator=generator) for _ in range(ranks)]


def average(grads: list[Tensor], sent: torch.dtype, kept: torch.dtype) -> Tensor:
    """Return the average, summed in rank order in ``kept``."""
    total = torch.zeros(NUMEL, dtype=kept)
    for grad in grads:
        total = (total.float() + grad.to(sent).float()).to(kept)
    return (total.float() / len(grads)).to(kept)


def error(ranks: int, case: str, noise: float = 1.0) -> float:
    """Return the relative error of the average in the dtype of the gradients."""
    has, sent, kept = CASES[case]
    grads = [grad.to(has) for grad in gradients(ranks, noise)]
    exact = torch.stack(grads).double().mean(0)
    found = average(grads, sent, kept).to(has).double()
    return float((found - exact).norm() / exact.norm())


def table() -> str:
    lines = ["| noise | | " + " | ".join(f"{ranks:,} ranks" for ranks in RANKS) + " |"]
    lines.append("|---" * (2 + len(RANKS)) + "|")
    for noise in (1, 10, 100):
        for case in CASES:
            errors = " | ".join(f"{error(ranks, case, noise):.2g}" for ranks in RANKS)
            lines.append(f"| {noise} x | {case} | {errors} |")
    return "\n".join(lines)


def test_the_error_of_a_sum_in_bf16_grows_with_the_ranks() -> None:
    few, many = (error(ranks, "bf16 gradients, summed in bf16") for ranks in (8, 64))
    assert many > 2 * few
    assert many > 0.006


@pytest.mark.parametrize("ranks", [8, 64])
def test_a_sum_in_fp32_is_only_rounded_at_the_end(ranks: int) -> None:
    assert error(ranks, "bf16 gradients, summed in fp32") < 0.002  # bf16 has 8 bits: at most 2 ** -9 = 0.00195
    # Every rank's own rounding averages out.
    assert error(ranks, "fp32 gradients sent as bf16, summed in fp32") < 0.003 / ranks**0.5


if __name__ == "__main__":
    print(table())
