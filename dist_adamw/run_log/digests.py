"""Compute digests of tensors and batches that do not depend on the number of ranks or on the order in memory.

The sum of a tensor modulo 2**64 is that of its words times pseudo-random keys of their positions: multilinear hashing,
where a word is an element, or half of one of 8 bytes, as an integer. Parts of a tensor have sums that add up to that of
the whole, in any order, so ranks that hold shards add theirs. Words have at most 32 bits and keys 64, so changes of two
words cancel each other by accident only. The keys are the same in every version: logs of different versions compare.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import local_of

_COLUMNS = 512  # words in a row
_BLOCK_ROWS = 128  # rows whose words, as int64, stay in a core's cache
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}  # by bytes of an element
_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64
_MASK = 2**64 - 1


def _mixed(values: Tensor) -> Tensor:
    """Return splitmix64 of int64 values."""
    values = values * _ODD[0]
    for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
        # The shift of a signed integer copies its sign; the mask takes these bits away.
        values = (values ^ (values >> shift & (1 << 64 - shift) - 1)) * factor
    return values ^ (values >> 31 & (1 << 33) - 1)


@functools.cache
def _column_keys(device: torch.device) -> Tensor:
    return _mixed(torch.arange(1, _COLUMNS + 1, device=device))


@functools.lru_cache(maxsize=16)
def _row_keys(device: torch.device, length: int) -> Tensor:
    return _mixed(-torch.arange(1, length + 1, device=device)) | 1  # odd, so that no row loses bits


def _keys_of_rows(device: torch.device, begin: int, end: int) -> Tensor:
    length = 1 << max(8, (end - 1).bit_length())  # few different lengths, since they are kept
    return _row_keys(device, length)[begin:end]


@functools.cache
def _first_keys(device: torch.device) -> Tensor:
    """Return the keys of the positions in the first row."""
    return _column_keys(device) * _keys_of_rows(device, 0, 1)


def _dot(words: Tensor, keys: Tensor) -> Tensor:
    """Return the sum of integers ``words`` times ``keys`` of the same length, modulo 2**64; 0-d int64."""
    if words.device.type == "cpu":
        return torch.dot(words.long(), keys)
    return (words * keys).sum()  # no other device multiplies vectors of integers


def _dot_block(rows: Tensor, keys: Tensor, row_keys: Tensor, memory: Tensor | None) -> Tensor:
    """Return the sum of integer ``rows`` [R, C] times ``keys`` [C] times ``row_keys`` [R], modulo 2**64; 0-d int64."""
    if memory is None:  # no device but the CPU multiplies matrices of integers
        return ((rows * keys).sum(1) * row_keys).sum()
    return torch.dot(torch.mv(memory[: len(rows)].copy_(rows), keys), row_keys)


@torch.no_grad()
def position_sum(tensor: Tensor, offset: int = 0) -> Tensor:
    """Return the sum of a tensor's words times the keys of their positions, 0-d int64 on its device. Local.

    Args:
        tensor: A dense tensor of any shape, strides and dtype of 1 to 16 bytes.
        offset: The position of its first element in the whole tensor of which it is a part, in elements.
    """
    size = tensor.element_size()
    words = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(_WORDS[size])
    row, column = divmod(offset * (max(size, 4) // 4), _COLUMNS)
    if row == 0 and column + len(words) <= _COLUMNS:  # many parameters are short
        return _dot(words, _first_keys(words.device)[column : column + len(words)])
    keys = _column_keys(words.device)
    parts = []
    if column:  # the end of a row
        begun = words[: _COLUMNS - column]
        words = words[len(begun) :]
        parts.append(_dot(begun, keys[column : column + len(begun)]) * _keys_of_rows(words.device, row, row + 1)[0])
        row += 1
    full, rest = divmod(len(words), _COLUMNS)
    if full:
        rows = words[: full * _COLUMNS].view(full, _COLUMNS)
        row_keys = _keys_of_rows(words.device, row, row + full)
        step = min(full, _BLOCK_ROWS) if words.device.type == "cpu" else full
        # The same memory for all blocks stays in the cache.
        memory = rows.new_empty((step, _COLUMNS), dtype=torch.int64) if words.device.type == "cpu" else None
        for block, factors in zip(torch.split(rows, step), torch.split(row_keys, step), strict=True):
            parts.append(_dot_block(block, keys, factors, memory))
    if rest:
        last = words[full * _COLUMNS :]
        parts.append(_dot(last, keys[:rest]) * _keys_of_rows(words.device, row + full, row + full + 1)[0])
    return functools.reduce(torch.add, parts) if parts else keys.new_zeros(())


def as_digest(total: int) -> int:
    """Return a sum of positions as a digest of 64 bits, each of which depends on all bits of the sum. Local."""
    value = total & _MASK
    for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
        value = (value ^ value >> shift) * factor & _MASK
    return value ^ value >> 31


def read_numbers(values: list[Tensor]) -> list[int]:
    """Return 0-d int64 tensors as numbers. Waits once for each device. Local."""
    numbers = [0] * len(values)
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        by_device.setdefault(value.device, []).append(i)
    for chosen in by_device.values():
        for i, number in zip(chosen, torch.stack([values[i] for i in chosen]).tolist(), strict=True):
            numbers[i] = number
    return numbers


# ---------------------------------------------------------------- batches

_WRITTEN_OUT = (str, bytes, bool, int, float, complex, type(None))


def batch_digest(batch: Any) -> Callable[[], int]:
    """Hash the values of a batch now; return a function that waits for the device and returns 64 bits. Local.

    Tensors and NumPy arrays count by dtype, shape and bits, in dicts, lists and tuples of any depth; entries of a dict
    in the order of their keys. Strings, bytes, numbers and None count by their value; of other objects only the type
    counts, because their text may contain addresses.
    """
    parts: list[str] = []
    sums: list[Tensor] = []
    _collect(batch, parts, sums)
    text = "\n".join(parts)

    return lambda: _hash([text, *read_numbers(sums)])


def joint_digest(digests: Sequence[Callable[[], int]]) -> Callable[[], int]:
    """Return a function that returns one digest for those of several batches, in their order. Local."""
    if len(digests) == 1:
        return digests[0]
    return lambda: _hash([digest() for digest in digests])


def _hash(values: Sequence[object]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big")


def _collect(value: Any, parts: list[str], sums: list[Tensor]) -> None:
    """Append a description of ``value`` to ``parts``, and the sums of its tensors to ``sums``."""
    if isinstance(value, Mapping):
        items = sorted(((repr(key), item) for key, item in value.items()), key=lambda pair: pair[0])
        parts.append(f"dict {[key for key, _ in items]}")
        for _, item in items:
            _collect(item, parts, sums)
    elif isinstance(value, list | tuple):
        parts.append(f"list {len(value)}")
        for item in value:
            _collect(item, parts, sums)
    elif isinstance(value, _WRITTEN_OUT):
        parts.append(repr(value))
    else:
        _collect_array(value, parts, sums)


def _collect_array(value: Any, parts: list[str], sums: list[Tensor]) -> None:
    tensor = value
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError):  # texts or objects
            parts.append(f"array {value.dtype} {value.shape} {value.tolist()!r}")
            return
    if not isinstance(tensor, Tensor):
        parts.append(type(value).__qualname__)
        return
    tensor = local_of(tensor)
    parts.append(f"tensor {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized:
        with contextlib.suppress(RuntimeError, TypeError):  # some subclasses have no bits to read
            sums.append(position_sum(tensor))
