"""A transcription of torch's fused AdamW kernel for CUDA, for tensors of one dtype, in numpy.

Source: `adam_math` and `FusedAdamMathFunctor` in aten/src/ATen/native/cuda/fused_adam_utils.cuh, as it is since pull
request 173224 (January 2026, torch 2.11): fp32 with one rounding per operation. Before, hyper-parameters were fp64.
nvcc contracts the decay (``param -= lr * weight_decay * param``) into an fma, as it may, and compiles division and
square root to ``div.rn`` and ``sqrt.rn``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Single: TypeAlias = npt.NDArray[np.float32]


@dataclass
class FusedAdamW:
    """The hyper-parameters of one update, as Python's floats."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool = False

    def update(
        self, param: Single, grad: Single, exp_avg: Single, exp_avg_sq: Single, largest: Single | None, step: float
    ) -> list[Single]:
        """Return the new weights, both moments, and the maxima if there are any."""
        lr, beta1, beta2, eps, decay = map(np.float32, (self.lr, *self.betas, self.eps, self.weight_decay))
        correction1 = np.float32(1) - power(beta1, step)
        root_correction2 = np.sqrt(np.float32(1) - power(beta2, step))
        if self.maximize:
            grad = -grad
        if decay != 0:
            param = fma(-(lr * decay), param, param)
        exp_avg = fma(beta1, exp_avg, fma(-beta1, grad, grad))
        square = grad * grad
        exp_avg_sq = fma(beta2, exp_avg_sq, fma(-beta2, square, square))
        step_size = lr / correction1
        largest = exp_avg_sq if largest is None else np.maximum(largest, exp_avg_sq)
        denominator = np.sqrt(largest) / root_correction2 + eps
        return [param - step_size * exp_avg / denominator, exp_avg, exp_avg_sq, largest]


def power(base: Any, exponent: float) -> Any:
    """Return ``powf`` correctly rounded; a GPU's may differ in the last bit."""
    return np.float32(math.pow(float(base), exponent))


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of fp32 arrays, rounded once."""
    product = np.float64(a) * np.float64(b)  # exact: 48 bits
    wide = np.float64(c)
    total = product + wide
    # What the sum lost, exactly (Knuth's two-sum). If anything, make the last bit odd, so that rounding to fp32 is not
    # misled by a sum that looks like a tie.
    back = total - product
    lost = (product - (total - back)) + (wide - back)
    is_even = (total.view(np.int64) & 1) == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    return np.where((lost != 0) & is_even, np.nextafter(total, towards), total).astype(np.float32)
