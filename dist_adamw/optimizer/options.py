"""Check an optimizer's options, describe them, and hash them so that ranks can compare them before every update."""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy

from dist_adamw.optimizer.kernels.foreach import can_fuse
from dist_adamw.optimizer.sharding.dtensors import local_of
from dist_adamw.optimizer.sharding.memory_order import axes_in_memory
from dist_adamw.plain_data import plain
from dist_adamw.ranks import agreement

# What reproducible=True keeps in the parameter groups, so that every kind of checkpoint has it, and the types.
SEED, MACHINE = "random_seed", "computed_with"
KEPT: Mapping[str, Any] = {SEED: 0, MACHINE: ""}
_NAMES = ("lr", "eps", "weight_decay", "amsgrad", "maximize", "betas")
_NUMBER, _PLAIN = (Real, Tensor), frozenset({float, int})
_NUMBERS = ("lr", "eps", "weight_decay")
_numbers = operator.itemgetter(*_NUMBERS)
_options = operator.itemgetter(*_NAMES)
_chain = itertools.chain.from_iterable
# Types whose hash is the same in every process. That of str is salted; that of None was an address before Python 3.12.
_HASHED_ALIKE = frozenset({float, int, bool})


class OptionsDigest:
    """A 62-bit digest of the hyper-parameters of param groups and of some further numbers.

    A CPU tensor counts by its value, other tensors only by their device, since the host would have to wait for the
    value. Plain numbers are hashed again only if they are other objects than the last time. Both loops run in C.
    """

    _last: tuple[tuple[Any, ...], ...] = ()  # plain numbers: a tensor, or a list of betas, may change in place
    _digest = 0

    def of(self, groups: Sequence[Mapping[str, Any]], more: tuple[float, ...]) -> int:
        """Return the digest of ``groups`` as they are now. Local."""
        try:
            values = (more, *map(_options, groups))
            if len(values) == len(self._last) and all(map(operator.is_, *map(_chain, (values, self._last)))):
                return self._digest
            flat = [*more, *_chain(map(_scalars_and_betas, values[1:]))]
            is_plain = _HASHED_ALIKE.issuperset(map(type, flat))
        except (KeyError, TypeError):  # an option is missing, or betas are no pair: the update raises a clear error
            is_plain = False
        if is_plain:
            # A list of betas may change in place, so remember only tuples for the comparison by identity.
            is_lasting = all(type(options[-1]) is tuple for options in values[1:])
            self._last, self._digest = values if is_lasting else (), hash(tuple(flat)) & (1 << 62) - 1
        else:
            self._last = ()
            self._digest = agreement.fingerprint({**describe_options(groups), "": list(more)})
        return self._digest


def _scalars_and_betas(values: tuple[Any, ...]) -> tuple[Any, ...]:
    *scalars, betas = values
    return (*scalars, *betas)


def describe_options(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options in the digest by readable names, such as "lr of group 0"."""
    return {f"{name} of group {g}": _readable(group.get(name)) for g, group in enumerate(groups) for name in _NAMES}


def _readable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else f"a tensor on {value.device.type}"
    if isinstance(value, (tuple, list)):
        return [_readable(one) for one in value]
    return value


def describe_groups(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return what must be the same on all ranks: the hyper-parameters ``names`` and the parameters of groups. Local."""
    record: dict[str, Any] = {}
    for g, group in enumerate(groups):
        record[f"hyper-parameters of group {g}"] = {name: plain(group.get(name)) for name in names}
        record[f"parameters of group {g}"] = [[list(p.shape), str(p.dtype), p.requires_grad] for p in group["params"]]
    return record


def as_number(value: float | Tensor) -> float:
    """Return ``value``, a number or a tensor of one element, as a number."""
    return float(value) if isinstance(value, Tensor) else value


def check_options(
    *,
    decay_by: str,
    shard: bool | str,
    max_grad_norm: float | None,
    mesh: DeviceMesh | None,
    bucket_numel: int | None,
    master_dtype: torch.dtype | None,
    state_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    reproducible: bool,
) -> None:
    """Refuse invalid options of the constructor. Local; see `DistAdamW`.

    Raises:
        ValueError: names the option, its value and the valid ones.
    """
    if decay_by not in ("lr", "schedule"):
        raise ValueError(f"decay_by must be 'lr' or 'schedule', got {decay_by!r}.")
    if shard not in (True, False, "auto"):
        raise ValueError(f"shard must be True, False or 'auto', got {shard!r}.")
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"max_grad_norm must be above 0 or None, got {max_grad_norm!r}.")
    if mesh is not None and mesh.ndim > 2:
        raise ValueError(f"mesh must have one axis or two, got {mesh.ndim}: {mesh}. Pass mesh['axis name'].")
    if bucket_numel is not None and bucket_numel < 1:
        raise ValueError(f"bucket_numel must be above 0, got {bucket_numel!r}.")
    _check_dtypes(master_dtype, state_dtype, reduce_dtype)
    if reproducible and shard is False:
        raise ValueError("reproducible=True averages gradients while it shards. Leave shard='auto'.")
    if reproducible and reduce_dtype is not None:
        raise ValueError(f"reproducible=True sums in fp32. Leave reduce_dtype=None, got {reduce_dtype!r}.")
    if reproducible and mesh is not None and mesh.ndim > 1:
        raise ValueError(
            f"reproducible=True averages over one group of ranks, got a mesh of two axes: {mesh}. Pass one axis of it."
        )


def _check_dtypes(
    master_dtype: torch.dtype | None, state_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None
) -> None:
    if master_dtype not in (None, torch.float32, torch.int16):
        raise ValueError(
            f"master_dtype must be torch.float32, torch.int16 (remainders of bf16) or None, got {master_dtype!r}."
        )
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {state_dtype!r}.")
    if reduce_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"reduce_dtype must be torch.float32, torch.bfloat16 or None, got {reduce_dtype!r}.")


def warn_of_lasting_moments(state_dtype: torch.dtype | None, beta2: float) -> None:
    """Warn if rounding would keep the second moment from shrinking. The warning names the caller's caller. Local."""
    if state_dtype == torch.bfloat16 and 1 - beta2 < 2**-8:
        warnings.warn(
            f"with state_dtype=torch.bfloat16 and betas[1]={beta2} exp_avg_sq never shrinks: multiplying by {beta2} "
            "changes it by less than half of bf16's last bit. Choose betas[1] <= 0.996.",
            stacklevel=3,
        )


def check_group(group: Mapping[str, Any], fused: bool | None) -> None:
    """Refuse parameters that cannot be updated. Local.

    Args:
        fused: See `DistAdamW`.

    Raises:
        ValueError: a parameter is complex, or has gaps in its memory; also as `check_lr`.
    """
    for param in group["params"]:
        if is_lazy(param):  # it has no shape or dtype yet
            continue
        if param.is_complex():
            raise ValueError(
                f"DistAdamW does not support complex parameters, got {param.dtype}. Register "
                "torch.view_as_real(parameter) instead."
            )
        if param.layout == torch.strided:
            axes_in_memory(local_of(param))
    check_lr(group, fused)


def check_lr(group: Mapping[str, Any], fused: bool | None) -> None:
    """Refuse a tensor ``lr`` if no fused kernel runs, as torch's foreach arithmetic does. Local.

    Raises:
        ValueError: ``lr`` is a tensor, and some parameter has no fused kernel.
    """
    if not isinstance(group["lr"], Tensor):
        return
    is_fused = all(map(can_fuse, group["params"])) if fused is None else fused
    if not is_fused:
        raise ValueError(
            f"lr as a Tensor is not supported by foreach arithmetic (fused={fused}), got {group['lr']!r}. "
            "Pass a float, or fused=True."
        )


def check_types(group: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that are no numbers, before an update. Local.

    Values out of their range are not refused: torch does not either, once the optimizer is built.

    Raises:
        ValueError: names the value.
    """
    betas, numbers = group["betas"], _numbers(group)
    if type(betas) is tuple and len(betas) == 2 and _PLAIN.issuperset(map(type, (*numbers, *betas))):
        return  # nearly always, and this runs in every update
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(isinstance(beta, _NUMBER) for beta in betas)):
        raise ValueError(f"param_groups: betas must be two numbers, got {betas!r}. Write a pair: (0.9, 0.999).")
    for name, value in zip(_NUMBERS, numbers, strict=True):
        if not isinstance(value, _NUMBER):
            raise ValueError(f"param_groups: {name} must be a number, got {value!r}. Write a float.")


def check_hyper_parameters(group: Mapping[str, Any]) -> None:
    """Refuse the values that torch.optim.AdamW refuses, with its messages, and also inf.

    Args:
        group: A param group, of which ``lr``, ``betas``, ``eps`` and ``weight_decay`` are checked.

    Raises:
        ValueError: a value is out of range, or nan.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, value in (
        ("learning rate", lr),
        ("epsilon value", group["eps"]),
        ("weight_decay value", group["weight_decay"]),
    ):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"Invalid {name}: {value}")
    _check_betas(group["betas"])


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}.")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}.")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
