"""AdamW for weights, state and gradients of different dtypes, in plain torch.

The arithmetic is that of `foreach.adamw_update_` on fp32. Tensors of other dtypes are converted in scratch memory block
by block, so that each is read from memory once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.foreach import DecayBy, adamw_update_, can_fuse, zeros_apart

# torch's CPU kernel handles elements that do not fill a vector in a scalar loop, which rounds differently. With cuts
# at multiples of this, exactly the elements that would go through that loop in the whole piece do so in its blocks.
_CUT_AT = 32
_HALF = 1 << 15
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
# Offsets within a memory page; see `zeros_apart`.
_PLACES: dict[int | str, int] = {0: 1, 1: 2, 2: 3, "weights": 4, "grads": 5, "rounded": 1}
_SHORT = 4096  # elements; see `_Scratch.are_short`


class _Columns(NamedTuple):
    """Equally long lists of 1-D tensors (steps: 0-d), or empty where there is no such tensor."""

    params: list[Tensor]
    grads: list[Tensor]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


def mixed_adamw_update_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_by: DecayBy,
    maximize: bool,
) -> None:
    """Apply one AdamW update in place, computed in fp32 whatever the dtypes.

    With fp32 masters and moments, the masters have the bits of fp32 weights that ``torch.optim.AdamW(fused=True)``
    updates with gradients ``grad.float() * scale``, and every parameter is its master rounded to nearest even. (On a
    CPU this holds with one thread: with more, torch chooses where to cut a tensor between threads, and its kernel's
    rounding depends on the cut by an ulp.) The update is elementwise, so updating a slice gives the same result as
    slicing the updated whole, with the same reservation. Local.

    Args:
        params: 1-D, contiguous, of one dtype: bf16, fp16 or fp32. The next five lists match them piece by piece.
        grads: Of one dtype: bf16, fp16 or fp32. Not changed.
        masters: fp32 weights; or int16 remainders, of bf16 parameters only (see `join_master`); or
            empty: the parameters are the weights, and an update loses what their 16 bits cannot hold.
        exp_avgs: fp32 or bf16, of one dtype with the next two lists. bf16 ones are widened, updated, and
            rounded to nearest even, with an error of 2**-8 at most. Then choose 1 - beta2 above 2**-8 (beta2 = 0.99,
            not 0.999): below it ``exp_avg_sq`` times beta2 rounds to ``exp_avg_sq``, which never shrinks.
        max_exp_avg_sqs: Running maxima of ``exp_avg_sqs`` (amsgrad), or empty.
        steps: Updates so far, this one included, as 0-d fp32 tensors. Not changed.
        scale: 0-d fp32; each gradient is multiplied by it (unscaling times clipping). None is 1.
        found_inf: 0-d fp32; if it is 1, nothing is changed. The host reads it only on a CPU, where that is free, or
            if torch has no fused kernel.
        lr: This and the other hyper-parameters are those of `foreach.adamw_update_`.

    Raises:
        ValueError: lists differ in length, or a combination of dtypes is unsupported. Raised before anything changes.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2.
    """
    columns = _Columns(params, grads, masters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    _check(columns)
    if not params:
        return
    on_cpu = params[0].device.type == "cpu"
    fused = can_fuse(params[0])
    if found_inf is not None and (on_cpu or not fused):
        if found_inf.item():
            return
        found_inf = None
    if scale is not None and on_cpu and scale.item() == 1:
        scale = None
    hyper: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "decay_by": decay_by,
        "maximize": maximize,
        "fused": fused,
        "found_inf": found_inf,
    }
    _update_blocks(columns, scale, hyper)


def _update_blocks(columns: _Columns, scale: Tensor | None, hyper: dict[str, Any]) -> None:
    """Update block by block; ``hyper`` are the keyword arguments of `adamw_update_` except the gradients."""
    device = columns.params[0].device
    numels = tuple([p.numel() for p in columns.params])
    limit = _block_numel(device)
    scratch = _Scratch(min(limit, sum(numels)), device)
    # Evaluated once: a block's data evicts Python's own from the caches, so each line of Python in the loop costs
    # microseconds.
    has_masters = bool(columns.masters) and columns.masters[0].dtype == torch.float32
    state_is_narrow = columns.exp_avgs[0].dtype != torch.float32
    for block, sizes in _blocks(columns, numels, limit):
        if has_masters:
            _follow_block(block, sizes, scratch)
        weights = _load_weights(block, sizes, scratch)
        state = block[3:6]
        exp_avg, exp_avg_sq, max_exp_avg_sq = state
        if state_is_narrow:
            exp_avg, exp_avg_sq, max_exp_avg_sq = [scratch.widened(i, kept, sizes) for i, kept in enumerate(state)]
        adamw_update_(
            weights,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            block.steps,
            grads=_load_grads(block.grads, sizes, scale, scratch),
            **hyper,
        )
        if state_is_narrow:
            for kept, updated in zip(state, (exp_avg, exp_avg_sq, max_exp_avg_sq), strict=True):
                if kept:
                    torch._foreach_copy_(kept, updated)
        _store_weights(block, weights)


def split_master_(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Write fp32 weights as bf16 parameters and 16-bit remainders; `join_master` is the inverse.

    On the bit patterns, ``param = (master + 0x8000) >> 16`` and ``remainder = master - (param << 16)``:
    rounding to nearest, ties away from zero. ``master.to(bfloat16)`` rounds ties to even, and agrees in every other
    case. With ties to even the remainder of a tie would be +0x8000 or -0x8000 by direction, 65,537 values in all, one
    too many for 16 bits. Here it is always -0x8000, so every finite master, every subnormal, zero of either sign and
    infinity are restored exactly. A finite master beyond the largest bf16 has an infinite parameter, as when rounding
    to even, and is restored too. A NaN is restored as a NaN.

    Args:
        master: fp32, any shape S. Not changed.
        param: bf16, S; written.
        remainder: int16, S; written.

    Raises:
        ValueError: a dtype is not the one above.
    """
    if (master.dtype, param.dtype, remainder.dtype) != (torch.float32, torch.bfloat16, torch.int16):
        raise ValueError(
            f"a master must be split from float32 into bfloat16 and int16, got {master.dtype} into {param.dtype} "
            f"and {remainder.dtype}."
        )
    work = master.clone()
    _tame_nans_([work])
    _split_([work], [param], [remainder])


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 weights that `split_master_` wrote as ``param`` and ``remainder``, exactly.

    Args:
        param: bf16, any shape S, unchanged since: to any other, the remainder is noise of half an ulp of bf16.
        remainder: int16, S.

    Raises:
        ValueError: a dtype is not the one above.
    """
    if (param.dtype, remainder.dtype) != (torch.bfloat16, torch.int16):
        raise ValueError(f"a master must be joined from bfloat16 and int16, got {param.dtype} and {remainder.dtype}.")
    master = param.to(torch.float32)  # its bits, shifted by 16
    master.view(torch.int32).add_(remainder)
    return master


def follow_params_(params: list[Tensor], masters: list[Tensor]) -> None:
    """Bring ``masters`` up to date with parameters that were written to. Local.

    A parameter that is not its fp32 master rounded (to even, or away from zero as by `split_master_`) was written to,
    and becomes the master. Nearly any bf16 parameter makes a valid pair with any 16-bit remainder, so a parameter that
    was written to keeps its remainder, which is below its own rounding; if the pair would be a NaN (at zero and
    infinity), the remainder becomes 0.

    Args:
        params: bf16 or fp16. The next list matches them, or is empty.
        masters: fp32 weights, or int16 remainders; written.
    """
    for param, master in zip(params, masters, strict=bool(masters)):
        if master.dtype == torch.int16:
            master.masked_fill_(_impossible(param, master), 0)
            continue
        shown = param == master.to(param.dtype)
        if master.device.type == "cpu" and bool(shown.all()):
            continue
        if param.dtype == torch.bfloat16:
            away = (master.view(torch.int32) + _HALF).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
            shown |= param == away
        torch.where(shown, master, param.float(), out=master)


def _impossible(param: Tensor, remainder: Tensor) -> Tensor:
    """Return a mask of the pairs that `split_master_` never makes, which would be joined to NaN."""
    return ((param == 0) & (remainder < 0)) | (param.isinf() & (remainder > 0))


def _follow_block(block: _Columns, sizes: tuple[int, ...], scratch: _Scratch) -> None:
    """Apply `follow_params_`; on a CPU, where the host need not wait for the result, only if a cheap check says so."""
    if not (scratch.on_cpu and _show(block, sizes, scratch)):
        follow_params_(block.params, block.masters)


def _show(block: _Columns, sizes: tuple[int, ...], scratch: _Scratch) -> bool:
    """Return whether every parameter is bit for bit its master rounded to even. For a CPU."""
    params, masters = block.params, block.masters
    if scratch.are_short(sizes):
        # Borrow the gradients' memory, which is unused until they are loaded.
        params, masters = [torch.cat(params)], [torch.cat(masters, out=scratch.flat("grads", sum(sizes)))]
        sizes = (sum(sizes),)
    for param, master, numel in zip(params, masters, sizes, strict=True):
        if not _same_bits(scratch.flat("rounded", numel, param.dtype).copy_(master), param):
            return False
    return True


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one dtype, contiguous and on a CPU, have the same bits."""
    # torch.equal compares element by element, which takes six times as long.
    return a.numel() == b.numel() and not _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes)


def _split_(masters: list[Tensor], params: list[Tensor], remainders: list[Tensor]) -> None:
    """Apply `split_master_` to lists. Destroys ``masters``, on which `_tame_nans_` must have been called."""
    bits = [master.view(torch.int32) for master in masters]
    torch._foreach_copy_(remainders, bits)  # int32 to int16 keeps the low half: the remainder modulo 2**16
    for pattern, param in zip(bits, params, strict=True):
        pattern.add_(_HALF).bitwise_right_shift_(16)
        param.view(torch.int16).copy_(pattern)


def _tame_nans_(masters: list[Tensor]) -> None:
    """Give every NaN the default bits. With other bits, rounding could carry and turn it into infinity or -0."""
    for master in masters:
        # If an element is NaN, so is the sum. If the sum is not finite for another reason, the fill changes nothing.
        if master.device.type != "cpu" or not math.isfinite(master.sum().item()):
            master.masked_fill_(master.isnan(), math.nan)


# ---------------------------------------------------------------- blocks


class _Scratch:
    """Memory for one block at a time, reused for the next; on a CPU small enough to stay in a cache."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self.numel = numel
        self.on_cpu = device.type == "cpu"
        self._device = device
        self._memory: dict[int | str, Tensor] = {}
        self._cut: dict[int | str, tuple[tuple[int, ...], Tensor, list[Tensor]]] = {}

    def flat(self, key: int | str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``numel`` uninitialized elements of the memory named ``key``, which keeps the first call's dtype."""
        memory = self._memory.get(key)
        if memory is None:
            memory = zeros_apart(self.numel, _PLACES[key], dtype=dtype, device=self._device)
            self._memory[key] = memory
        return memory if numel == self.numel else memory[:numel]

    def room(self, key: int | str, sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return uninitialized memory for fp32 tensors of ``sizes``: flat, and as a view for each tensor."""
        cut = self._cut.get(key)
        if cut is None or cut[0] != sizes:
            flat = self.flat(key, sum(sizes))
            cut = self._cut[key] = (sizes, flat, [flat] if len(sizes) == 1 else list(torch.split(flat, list(sizes))))
        return cut[1:]

    def copy(self, key: int | str, tensors: list[Tensor], sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Copy ``tensors`` as fp32 to the memory named ``key``; return it flat, and as a view for each tensor."""
        flat, views = self.room(key, sizes)
        if not self.are_short(sizes):
            torch._foreach_copy_(views, tensors)
        elif tensors[0].dtype == torch.float32:
            torch.cat(tensors, out=flat)
        else:
            flat.copy_(torch.cat(tensors))  # without ``out``, so that one fp32 tensor among them makes the result fp32
        return flat, views

    def are_short(self, sizes: tuple[int, ...]) -> bool:
        """Return whether tensors of ``sizes`` should be concatenated first."""
        # On a CPU an operation takes a microsecond per tensor, however short; `torch.cat` takes a fifth of that.
        return self.on_cpu and sum(sizes) < _SHORT * len(sizes)

    def widened(self, key: int | str, tensors: list[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
        """Return ``tensors`` themselves if they are fp32 (or empty), else fp32 copies."""
        if not tensors or tensors[0].dtype == torch.float32:
            return tensors
        return self.copy(key, tensors, sizes)[1]


def _block_numel(device: torch.device) -> int:
    # CPU: a scratch of 512 KiB. Measured on 2 ** 22 elements: with a quarter of it an update takes 1.3 times as long
    # (it fits a nearer cache, but every block begins with cold streams and cold code); with twice as much, 1.05 times.
    # On other devices each block costs launches; the limit bounds memory.
    return 1 << 17 if device.type == "cpu" else 1 << 23


def _blocks(columns: _Columns, numels: tuple[int, ...], limit: int) -> Iterator[tuple[_Columns, tuple[int, ...]]]:
    """Cut long pieces into blocks of ``limit`` elements, and gather short ones into blocks of at most as many.

    Yields each block and the lengths of its pieces.
    """
    for first, stop in _groups(numels, limit):
        group = _Columns(*[column[first:stop] for column in columns])
        if numels[first] <= limit:
            yield group, numels[first:stop]
            continue
        cut = [[[view] for view in torch.split(column[0], limit)] if column else [] for column in group[:6]]
        for views in zip_longest(*cut, fillvalue=[]):
            yield _Columns._make([*views, group.steps]), (len(views[0][0]),)


@lru_cache(maxsize=256)
def _groups(numels: tuple[int, ...], limit: int) -> list[tuple[int, int]]:
    """Return the [first, stop) of the pieces that share a block; a piece longer than ``limit`` is alone."""
    assert limit % _CUT_AT == 0
    runs: list[tuple[int, int]] = []
    first, total = 0, 0
    for i, numel in enumerate(numels):
        if i > first and total + numel > limit:
            runs.append((first, i))
            first, total = i, 0
        total += numel
    return [*runs, (first, len(numels))]


def _load_weights(block: _Columns, sizes: tuple[int, ...], scratch: _Scratch) -> list[Tensor]:
    """Return the fp32 weights of a block: masters or parameters that are fp32, else copies in scratch memory."""
    if not block.masters:
        return scratch.widened("weights", block.params, sizes)
    if block.masters[0].dtype == torch.float32:
        return block.masters
    flat, weights = scratch.copy("weights", block.params, sizes)
    torch._foreach_add_([weight.view(torch.int32) for weight in weights], block.masters)
    # The sum is not finite if an element is NaN: because a parameter was written to, or because training diverged.
    if flat.device.type != "cpu" or not math.isfinite(flat.sum().item()):
        for weight, param, remainder in zip(weights, block.params, block.masters, strict=True):
            torch.where(_impossible(param, remainder), param.float(), weight, out=weight)
    return weights


def _load_grads(grads: list[Tensor], sizes: tuple[int, ...], scale: Tensor | None, scratch: _Scratch) -> list[Tensor]:
    if scale is None:
        return scratch.widened("grads", grads, sizes)
    if len(grads) == 1 and grads[0].dtype == torch.float32:  # the product needs no copy before it
        flat, views = scratch.room("grads", sizes)
        torch.mul(grads[0], scale, out=flat)
        return views
    flat, views = scratch.copy("grads", grads, sizes)
    flat.mul_(scale)
    return views


def _store_weights(block: _Columns, weights: list[Tensor]) -> None:
    """Write updated fp32 ``weights`` to parameters and remainders, unless they are the parameters themselves."""
    if block.masters and block.masters[0].dtype == torch.int16:
        # On a CPU, arithmetic keeps a NaN's bits, and a NaN from a bf16 gradient rounds safely. CUDA's NaNs do not.
        if block.grads[0].dtype != torch.bfloat16 or block.params[0].device.type != "cpu":
            _tame_nans_(weights)
        _split_(weights, block.params, block.masters)
    elif weights is not block.params:
        torch._foreach_copy_(block.params, weights)


def _check(columns: _Columns) -> None:
    """Raise ValueError unless the lists match. Only the dtype of each list's first tensor is checked."""
    _check_lengths(columns)
    if not columns.params:
        return
    param, grad = columns.params[0].dtype, columns.grads[0].dtype
    master = columns.masters[0].dtype if columns.masters else None
    if master == torch.int16 and param != torch.bfloat16:
        raise ValueError(f"16-bit remainders complete bfloat16 parameters only, got {param}. Keep float32 masters.")
    for name, dtype in (("params", param), ("grads", grad)):
        _check_dtype(name, dtype, (torch.float32, torch.bfloat16, torch.float16))
    _check_dtype("masters", master, (None, torch.float32, torch.int16))
    for name, column in zip(columns._fields[3:6], columns[3:6], strict=True):
        if column:
            _check_dtype(name, column[0].dtype, (torch.float32, torch.bfloat16))


def _check_lengths(columns: _Columns) -> None:
    lengths = [len(column) for column in columns]
    for name, length in zip(columns._fields, lengths, strict=True):
        may_be_empty = name in ("masters", "max_exp_avg_sqs")
        if length == lengths[0] or (length == 0 and may_be_empty):
            continue
        found = ", ".join(f"{name} {n}" for name, n in zip(columns._fields, lengths, strict=True))
        raise ValueError(
            f"the lists of an update must be equally long (masters and max_exp_avg_sqs may be empty), got {found}."
        )


def _check_dtype(name: str, dtype: torch.dtype | None, allowed: Sequence[torch.dtype | None]) -> None:
    if dtype not in allowed:
        choices = " or ".join(dict.fromkeys(str(d) for d in allowed if d is not None))
        raise ValueError(f"{name} must be {choices}, got {dtype}.")
