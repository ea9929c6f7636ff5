"""AdamW on flat state and scattered weights, in one Triton launch per bucket.

The weights and gradients of a bucket may lie anywhere: a table in device memory gives the kernel their addresses, so
Python works once per bucket and nothing waits for the device. `mixed.mixed_adamw_update_` is the same update in plain
torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.foreach import DecayBy, decay_over_lr

# Elements of one row of the table, which one program updates in tiles. With 4096 a bucket of 2 ** 23 gives
# 2048 programs, several for each multiprocessor; a table of 96 KiB; and tiles that fill 16 bytes a thread.
ROW_NUMEL = 4096
_TILE = 1024
_WARPS = 4
# Flat state is read 16 bytes at a time where an offset allows it: 8 elements of 2 bytes.
_ALIGNED_BYTES, _ALIGNED_NUMEL = 16, 8

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = (torch.float32, torch.bfloat16)


@lru_cache
def available(device: torch.device) -> bool:
    """Return whether the kernel can run on ``device``: Triton is installed and supports this GPU.

    With TRITON_INTERPRET=1, Triton's interpreter runs it on a CPU, for tests. The answer is cached per device.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    # Triton needs compute capability 7, but emulates bf16 conversions below 8. ROCm devices report 9 and more.
    return torch.cuda.get_device_capability(device) >= (8, 0)


class BlockTable:
    """The addresses of a bucket's pieces, in device memory: one row per block of `ROW_NUMEL` elements.

    It does not keep the tensors alive; the caller must, and must call `follow` when they may have moved.

    Args:
        params: 1-D, contiguous, of one dtype and device.
        grads: The gradients of the same pieces, of one dtype.
        offsets: Where each piece begins in the flat state, in elements.
        step_indices: The element of ``steps`` that counts the updates of each piece.

    Raises:
        ValueError: lists differ in length, a gradient has another size, or a piece is not contiguous.

    Local. Building takes Python work per piece; an update does not.
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], *, offsets: Sequence[int], step_indices: Sequence[int]
    ) -> None:
        lengths = {len(params), len(grads), len(offsets), len(step_indices)}
        if len(lengths) != 1:
            raise ValueError(
                f"params, grads, offsets and step_indices must be equally long, got "
                f"{len(params)}, {len(grads)}, {len(offsets)} and {len(step_indices)}."
            )
        numels = torch.tensor([p.numel() for p in params], dtype=torch.int64)
        rows_of = (numels + ROW_NUMEL - 1) // ROW_NUMEL
        self._piece = torch.repeat_interleave(torch.arange(len(params)), rows_of)
        first_row = rows_of.cumsum(0) - rows_of
        self._start = (torch.arange(len(self._piece)) - first_row[self._piece]) * ROW_NUMEL
        self._numel = (numels[self._piece] - self._start).clamp(max=ROW_NUMEL)
        self._offset = torch.tensor(offsets, dtype=torch.int64)[self._piece] + self._start
        self._step = torch.tensor(step_indices, dtype=torch.int64)[self._piece]
        self._addresses: tuple[list[int], list[int]] | None = None
        self.param_dtype: torch.dtype | None = None
        self.grad_dtype: torch.dtype | None = None
        self._sizes = numels.tolist()
        self.rows: Tensor | None = None
        self.end = int((self._offset + self._numel).max()) if len(self._piece) else 0
        self.num_steps = max(step_indices, default=-1) + 1
        self.follow(params, grads)

    def follow(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Rewrite the table if a weight or gradient has moved or changed its dtype; return whether it was rewritten.

        The copy to the device is queued; the host does not wait.

        Raises:
            ValueError: a piece is not contiguous, or its size is not the one that the table was built for. Checked
                only if an address or a dtype has changed.
            RuntimeError: a tensor has moved while a CUDA graph is being captured. A replay would read the old table;
                call `follow` with the gradients of the capture before it begins.
        """
        addresses = (list(map(Tensor.data_ptr, params)), list(map(Tensor.data_ptr, grads)))
        dtypes = (params[0].dtype, grads[0].dtype) if params else (None, None)
        if self._addresses == addresses and (self.param_dtype, self.grad_dtype) == dtypes:
            return False
        for name, tensors in (("params", params), ("grads", grads)):
            self._check(name, tensors)
        self.param_dtype, self.grad_dtype = dtypes
        if len(self._piece):
            self._write(addresses, params[0], grads[0])
        self._addresses = addresses
        return True

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        sizes = [t.numel() for t in tensors]
        if sizes != self._sizes:
            raise ValueError(f"{name} have {sizes} elements, the table was built for {self._sizes}. Build a new table.")
        for t in tensors:
            if t.dtype not in _WEIGHTS or t.dtype != tensors[0].dtype:
                raise ValueError(f"{name} must all be float32, or all bfloat16 or float16, got {t.dtype}.")
            if not t.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {t.stride()} for shape {tuple(t.shape)}.")

    def _write(self, addresses: tuple[list[int], list[int]], param_like: Tensor, grad_like: Tensor) -> None:
        device = param_like.device
        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a weight or gradient moved while a CUDA graph is being captured. Call BlockTable.follow with the "
                "tensors that the graph will use before the capture."
            )
        bases = [torch.tensor(column, dtype=torch.int64)[self._piece] for column in addresses]
        param = bases[0] + self._start * param_like.itemsize
        grad = bases[1] + self._start * grad_like.itemsize
        misfit = (param | grad) % _ALIGNED_BYTES + (self._offset | self._numel) % _ALIGNED_NUMEL
        columns = [param, grad, self._offset, self._numel, self._step, (misfit == 0).to(torch.int64)]
        # From pinned memory the copy is asynchronous, and torch reuses that memory only once the copy is done.
        host = torch.empty(len(self._piece), len(columns), dtype=torch.int64, pin_memory=on_gpu)
        torch.stack(columns, dim=1, out=host)
        if self.rows is None or self.rows.device != device:
            self.rows = torch.empty_like(host, device=device)
        self.rows.copy_(host, non_blocking=True)


def flat_adamw_update_(
    table: BlockTable,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    steps: Tensor,
    *,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    decay_by: DecayBy,
    maximize: bool,
) -> None:
    """Apply one AdamW update in place to the weights of ``table``, in one launch.

    Computes in fp32 what torch's fused CUDA kernel does (2.11 and later), operation by operation, so that weights and
    fp32 moments have its bits: ``fma`` where torch has it, correctly rounded division and roots, the device's ``powf``,
    and hyper-parameters rounded to fp32. This is `mixed.mixed_adamw_update_` on CUDA. On a CPU that follows torch's
    CPU kernel, which takes betas and bias corrections from fp64: one update from the same state then differs by
    3e-8 g**2 in ``exp_avg_sq``, and a weight's step by 3e-8 / (1 - betas[1]) of itself, both beside a few ulps.

    In a CUDA graph, each replay reads ``scale``, ``found_inf``, ``steps``, and ``lr`` and ``weight_decay`` if they are
    tensors; numbers are frozen. The first call with a new set of dtypes compiles the kernel: make it before the
    capture. Local: no collectives.

    Args:
        table: The weights and gradients.
        master: 1-D: fp32 weights; or int16 remainders of bf16 weights (`mixed.join_master`); or None to update the
            weights themselves. This and the next three are flat, indexed by the table's offsets.
        exp_avg: 1-D, fp32 or bf16, of one dtype with the next two. bf16 ones are rounded to nearest even.
        max_exp_avg_sq: Running maximum of ``exp_avg_sq`` (amsgrad), or None.
        steps: 1-D fp32, indexed by the table's step indices: updates so far, this one included. Not changed.
        scale: 0-d fp32; each gradient is multiplied by it. None is 1.
        found_inf: 0-d fp32; 1 leaves everything as it is.
        lr: Step size; a number, or 0-d on the device.
        weight_decay: As for `foreach.adamw_update_`; a number, or 0-d on the device.

    Raises:
        RuntimeError: the kernel cannot run on this device; see `available`.
        ValueError: flat state is too short for the table, or its dtype is unsupported.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2.
    """
    if table.rows is None:
        return
    assert table.param_dtype is not None
    assert table.grad_dtype is not None
    moments = [exp_avg, exp_avg_sq]
    if max_exp_avg_sq is not None:
        moments.append(max_exp_avg_sq)
    _check_state(table, master, moments, steps)
    if not available(table.rows.device):
        raise RuntimeError(
            f"the Triton kernel cannot run on {table.rows.device}: it needs `pip install triton` and a CUDA device of "
            "capability 8 or later. mixed_adamw_update_ runs everywhere."
        )
    code = importlib.import_module("dist_adamw.optimizer.kernels._triton_code")
    names = {torch.float32: code.tl.float32, torch.bfloat16: code.tl.bfloat16, torch.float16: code.tl.float16}
    is_beside_lr = decay_by == "schedule"
    if is_beside_lr and not (isinstance(lr, Tensor) or isinstance(weight_decay, Tensor)):
        weight_decay, is_beside_lr = decay_over_lr(lr, weight_decay), False  # for the bits of torch's kernel
    # Triton launches on the current device, which need not be the table's.
    with torch.cuda.device(table.rows.device) if table.rows.is_cuda else nullcontext():
        code.update[(table.rows.shape[0],)](
            table.rows,
            master,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            steps,
            scale,
            found_inf,
            _kernel_argument(lr),
            _kernel_argument(weight_decay),
            float(betas[0]),
            float(betas[1]),
            float(eps),
            PARAM=names[table.param_dtype],
            GRAD=names[table.grad_dtype],
            REMAINDER=master is not None and master.dtype == torch.int16,
            MAXIMIZE=maximize,
            DECAY_BESIDE_LR=is_beside_lr,
            LR_IN_MEMORY=isinstance(lr, Tensor),
            DECAY_IN_MEMORY=isinstance(weight_decay, Tensor),
            HAS_LIBRARY=table.rows.is_cuda,
            ROW_NUMEL=ROW_NUMEL,
            TILE=_TILE,
            num_warps=_WARPS,
            enable_fp_fusion=True,  # as in nvcc's build of ``powf``; the default depends on Triton's version
        )


def _kernel_argument(scalar: float | Tensor) -> float | Tensor:
    """Return a tensor as it is, and a number as a float, since Triton would compile another kernel for an int."""
    return scalar if isinstance(scalar, Tensor) else float(scalar)


def _check_state(table: BlockTable, master: Tensor | None, moments: list[Tensor], steps: Tensor) -> None:
    """Raise ValueError for state whose memory the kernel would misread."""
    if master is not None:
        _check_master_dtype(table, master)
    for moment in moments:
        if moment.dtype not in _MOMENTS or moment.dtype != moments[0].dtype:
            raise ValueError(f"moments must all be float32 or all bfloat16, got {moment.dtype}.")
    flat_state = moments if master is None else [master, *moments]
    _check_flat(table, flat_state)
    _check_steps(table, steps)


def _check_master_dtype(table: BlockTable, master: Tensor) -> None:
    if master.dtype not in (torch.float32, torch.int16):
        raise ValueError(f"master must be float32 or int16, got {master.dtype}.")
    if master.dtype == torch.int16 and table.param_dtype != torch.bfloat16:
        raise ValueError(f"16-bit remainders complete bfloat16 weights only, got {table.param_dtype}.")


def _check_flat(table: BlockTable, flat_state: list[Tensor]) -> None:
    for flat in flat_state:
        if flat.ndim != 1 or flat.numel() < table.end or not flat.is_contiguous():
            raise ValueError(
                f"flat state must be 1-D, contiguous, of {table.end} elements or more, got {tuple(flat.shape)}."
            )


def _check_steps(table: BlockTable, steps: Tensor) -> None:
    if steps.dtype != torch.float32 or steps.numel() < table.num_steps or not steps.is_contiguous():
        raise ValueError(
            f"steps must be contiguous float32 and have {table.num_steps} elements, "
            f"got {steps.dtype} {tuple(steps.shape)}."
        )
