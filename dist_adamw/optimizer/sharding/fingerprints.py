"""Compute 64-bit fingerprints of tensors, to compare them over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.memory_order import storage_order

_ROW = 128  # words of 8 bytes in a row
_SMALL = 1 << 10  # words: smaller tensors are not summed first
_BLOCK = 1 << 17  # words that stay in a core's cache between the two sums
_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)  # of splitmix64


@torch.no_grad()
def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """Return a 64-bit hash of each tensor's bits and their positions. Local.

    Words of 8 bytes are summed along the rows and the columns of blocks, which detects any difference in up to three
    words, swaps included; the sums are then mixed with their positions. The host waits once for each device.
    """
    found = [0] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for device, chosen in by_device.items():
        sums = [_sums(tensors[i]) for i in chosen]
        for i, value in zip(chosen, _mixed(sums, device), strict=True):
            found[i] = value % 2**64
    return found


def _sums(tensor: Tensor) -> list[Tensor]:
    """Return the sums over a tensor's rows and columns, and the words that fill no row; of a small one, all words."""
    try:
        flat = storage_order(tensor.detach())
    except ValueError:  # elements overlap, or leave gaps
        flat = tensor.detach().reshape(-1).clone()
    size = flat.dtype.itemsize
    if not flat.numel():
        return []
    if flat.storage_offset() * size % 8:
        flat = flat.clone()  # a view as int64 must begin at a multiple of 8 bytes
    parts = []
    if over := flat.numel() * size % 8:
        data = flat.view(torch.uint8)
        parts.append(data[-over:].long())
        flat = data[:-over]
    words = flat.view(torch.int64)
    if len(words) < _SMALL:
        return [words, *parts]
    full = len(words) // _ROW * _ROW
    for block in torch.split(words[:full], _BLOCK if words.device.type == "cpu" else full):
        rows = block.view(-1, _ROW)
        parts += [rows.sum(1), rows.sum(0)]
    return [words[full:], *parts]


def _mixed(sums: list[list[Tensor]], device: torch.device) -> list[int]:
    """Return one number for each list, in which every sum has been mixed with its position."""
    lengths = torch.tensor([sum(len(part) for part in parts) for parts in sums], device=device)
    ends = lengths.cumsum(0)
    # torch.cat refuses an empty list, which there would be if no tensor had elements.
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    mixed = torch.cat([nothing, *(part for parts in sums for part in parts)])
    places = torch.arange(1, len(mixed) + 1, device=device)
    places -= (ends - lengths).repeat_interleave(lengths, output_size=len(mixed))
    mixed += places.mul_(_ODD[0])
    for shift in (30, 27):
        mixed ^= mixed >> shift
        mixed *= _ODD[1]
    mixed ^= mixed >> 31
    running = torch.cat([mixed.new_zeros(1), mixed.cumsum(0)])
    values: list[int] = (running[ends] - running[ends - lengths]).tolist()
    return values
