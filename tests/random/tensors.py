"""Random tensors, and what it means that two are the same."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from tests.random.script import Spec

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_like(like: Tensor, seed: int | str, *, bits: int = 6) -> Tensor:
    """Multiples of ``2 ** -bits`` between -1 and 1, with the strides of ``like``."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(seed).encode()))
    whole = torch.randint(-(1 << bits), (1 << bits) + 1, tuple(like.shape), generator=generator)
    return torch.empty_like(like.detach()).copy_(whole / (1 << bits))


def make_parameter(spec: Spec, seed: int | str) -> nn.Parameter:
    """A parameter of ``spec`` with random values."""
    like = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    if spec.layout == "transposed":
        like = torch.empty(spec.shape[::-1], dtype=like.dtype).permute(*reversed(range(len(spec.shape))))
    elif spec.layout == "channels_last":
        like = like.to(memory_format=torch.channels_last)
    return nn.Parameter(random_like(like, seed), requires_grad=spec.requires_grad)


def restrided(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with the strides of ``like``, which torch's fused kernel takes for granted."""
    if tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like.detach(), dtype=tensor.dtype).copy_(tensor)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integers = INTEGERS[a.dtype.itemsize]
    return torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers))


def near(a: Tensor, b: Tensor, unit: float = 1e-5, largest_term: float = 0.0) -> bool:
    """Equal but for a few roundings of ``a``'s dtype, or of bf16's where that is coarser than its terms.

    ``largest_term``: of the sum that ``a`` is. Terms may cancel, and the rest has their roundings: an fp32 moment of
    one element was 3e-6, of terms of 5e-2.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    if a.dtype.itemsize == 2:
        unit = 2**-6
    scale = float(torch.maximum(a.detach().abs().max(), b.detach().abs().max()))
    return torch.allclose(a.double(), b.double(), rtol=unit, atol=unit * scale + 2**-23 * largest_term + 1e-12)
