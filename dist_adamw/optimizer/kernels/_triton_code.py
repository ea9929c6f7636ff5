# mypy: ignore-errors
# ruff: noqa: N803, RET505, SIM108, SIM300
"""The Triton kernel: one program updates one row of a table of blocks.

The only module that imports Triton; `triton` imports it at the first launch. Triton's language has no types for mypy,
and its convention is to write compile-time arguments in capitals.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The number of int64 columns of a row. A constexpr, because a kernel may read no other globals.
ROW = tl.constexpr(6)


@triton.jit
def _power(base, exponent, HAS_LIBRARY: tl.constexpr):
    """Return base ** exponent in fp32, by the device's own ``powf``, as torch's kernel has it.

    Triton's interpreter has no such library. There it is computed in fp64 and rounded once.
    """
    if HAS_LIBRARY:
        return libdevice.pow(base, exponent)
    else:
        return tl.exp(tl.log(tl.cast(base, tl.float64)) * exponent.to(tl.float64)).to(tl.float32)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Round fp32 ``x`` to ``dtype``, to nearest even. To bf16 by bits, because Triton's interpreter would truncate."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, upper, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _followed(weight, param, PARAM: tl.constexpr):
    """Return the fp32 ``weight``, or the parameter if that is not the weight rounded (to even or away)."""
    # Then the parameter was written to since the last update.
    shown = param.to(tl.float32) == _narrow(weight, PARAM).to(tl.float32)
    if PARAM == tl.bfloat16:
        away = ((weight.to(tl.int32, bitcast=True) + 0x8000) >> 16) << 16
        shown = shown | (param.to(tl.float32) == away.to(tl.float32, bitcast=True))
    return tl.where(shown, weight, param.to(tl.float32))


@triton.jit
def _joined(upper, remainder):
    """Return the fp32 weight of a bf16 parameter's bits, shifted by 16, and a remainder.

    It is not NaN if the parameter was written to; see mixed.follow_params_.
    """
    magnitude = upper & 0x7FFFFFFF
    impossible = ((magnitude == 0) & (remainder < 0)) | ((magnitude == 0x7F800000) & (remainder > 0))
    return tl.where(impossible, upper, upper + remainder).to(tl.float32, bitcast=True)


@triton.jit
def _update(
    param_address, grad_address, offset, numel, masters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs,
    scale, decay, step_size, root_correction2, beta1, beta2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REMAINDER: tl.constexpr, MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr, ROW_NUMEL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update one row of ``numel`` elements, in tiles. A weight loses the fraction ``decay`` of itself."""
    # With remainders, load bits. No other thread reads or writes the elements of this one.
    stored: tl.constexpr = tl.int16 if REMAINDER else PARAM
    if ALIGNED:  # multiplying by 8 shows the compiler an alignment that it cannot infer for values from memory
        numel = numel // 8 * 8
        offset = offset // 8 * 8
    params = param_address.to(tl.pointer_type(stored))
    grads = grad_address.to(tl.pointer_type(GRAD))
    # The bound is a constant: with numpy 2.4, older versions of Triton's interpreter fail on one from memory.
    for start in range(0, ROW_NUMEL, TILE):
        i = start + tl.arange(0, TILE)
        mask = i < numel
        param_at, grad_at, at = params + i, grads + i, offset + i
        if ALIGNED:
            param_at = tl.multiple_of(param_at, 16)
            grad_at = tl.multiple_of(grad_at, 16)
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32) * scale
        if MAXIMIZE:
            grad = -grad
        exp_avg = tl.load(exp_avgs + at, mask=mask, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sqs + at, mask=mask, other=0.0).to(tl.float32)
        if REMAINDER:
            upper = tl.load(param_at, mask=mask, other=0).to(tl.int32) << 16
            weight = _joined(upper, tl.load(masters + at, mask=mask, other=0).to(tl.int32))
        elif masters is not None:
            param = tl.load(param_at, mask=mask, other=0.0)
            weight = _followed(tl.load(masters + at, mask=mask, other=0.0), param, PARAM)
        else:
            weight = tl.load(param_at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.fma(-decay, weight, weight)
        exp_avg = tl.fma(beta1, exp_avg, tl.fma(-beta1, grad, grad))
        square = grad * grad
        exp_avg_sq = tl.fma(beta2, exp_avg_sq, tl.fma(-beta2, square, square))
        largest = exp_avg_sq
        if max_exp_avg_sqs is not None:
            before = tl.load(max_exp_avg_sqs + at, mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(before, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
            tl.store(max_exp_avg_sqs + at, _narrow(largest, max_exp_avg_sqs.dtype.element_ty), mask=mask)
        denominator = tl.div_rn(tl.sqrt_rn(largest), root_correction2) + eps
        weight -= tl.div_rn(step_size * exp_avg, denominator)
        tl.store(exp_avgs + at, _narrow(exp_avg, exp_avgs.dtype.element_ty), mask=mask)
        tl.store(exp_avg_sqs + at, _narrow(exp_avg_sq, exp_avg_sqs.dtype.element_ty), mask=mask)
        if REMAINDER:  # see mixed.split_master_; rounding CUDA's default NaN would carry into the sign
            bits = tl.where(weight == weight, weight.to(tl.int32, bitcast=True), 0x7FC00000)
            tl.store(param_at, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
            tl.store(masters + at, bits.to(tl.int16), mask=mask)
        else:
            if masters is not None:
                tl.store(masters + at, weight, mask=mask)
            tl.store(param_at, _narrow(weight, PARAM), mask=mask)


@triton.jit
def update(
    table, masters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, scale, found_inf, lr, weight_decay,
    beta1, beta2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REMAINDER: tl.constexpr, MAXIMIZE: tl.constexpr,
    DECAY_BESIDE_LR: tl.constexpr, LR_IN_MEMORY: tl.constexpr, DECAY_IN_MEMORY: tl.constexpr,
    HAS_LIBRARY: tl.constexpr, ROW_NUMEL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Apply AdamW to this program's row of ``table``.

    ``masters``, ``max_exp_avg_sqs``, ``scale`` and ``found_inf`` may be None; ``lr`` and ``weight_decay``
    are values or addresses.
    """
    applied = True
    if found_inf is not None:
        applied = tl.load(found_inf) == 0
    if applied:
        row = table + tl.program_id(0).to(tl.int64) * ROW
        param_address, grad_address = tl.load(row), tl.load(row + 1)
        offset, numel = tl.load(row + 2), tl.load(row + 3).to(tl.int32)
        step = tl.load(steps + tl.load(row + 4))
        rate = tl.cast(tl.load(lr) if LR_IN_MEMORY else lr, tl.float32)
        decay = tl.cast(tl.load(weight_decay) if DECAY_IN_MEMORY else weight_decay, tl.float32)
        factor = 1.0
        if scale is not None:
            factor = tl.load(scale).to(tl.float32)
        if DECAY_BESIDE_LR:
            decay = tl.where(rate != 0, decay, 0.0)
        else:
            decay = rate * decay
        step_size = tl.div_rn(rate, 1.0 - _power(beta1, step, HAS_LIBRARY))  # ``/`` would be approximate
        root_correction2 = tl.sqrt_rn(1.0 - _power(beta2, step, HAS_LIBRARY))
        # Whether a row is aligned is known only at run time, and ALIGNED must be constant: hence two branches.
        if tl.load(row + 5) != 0:
            _update(
                param_address, grad_address, offset, numel, masters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs,
                factor, decay, step_size, root_correction2, beta1, beta2, eps,
                PARAM, GRAD, REMAINDER, MAXIMIZE, True, ROW_NUMEL, TILE,
            )  # fmt: skip
        else:
            _update(
                param_address, grad_address, offset, numel, masters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs,
                factor, decay, step_size, root_correction2, beta1, beta2, eps,
                PARAM, GRAD, REMAINDER, MAXIMIZE, False, ROW_NUMEL, TILE,
            )  # fmt: skip
