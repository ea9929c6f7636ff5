"""Convert the schedule's weight decay to what an optimizer expects in ``weight_decay`` (decoupled, or L2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from dist_adamw.schedule.base_values import BaseValues

DecayConvention = Literal["schedule", "lr", "l2"]
_DECOUPLING = {"Lion", "SGDW", "Muon", "Adafactor"}


def decay_convention(optimizer: Optimizer, group: Mapping[str, Any]) -> DecayConvention:
    """Return what ``optimizer`` does with ``group["weight_decay"]``: the table of docs/schedule.md."""
    if (decay_by := getattr(optimizer, "decay_by", None)) in ("schedule", "lr"):
        return "schedule" if decay_by == "schedule" else "lr"
    # apex and DeepSpeed have a flag on the optimizer, torch's Adam family one in the group.
    for flag in (getattr(optimizer, "adam_w_mode", None), getattr(optimizer, "adamw_mode", None)):
        if flag is not None:
            return "lr" if flag else "l2"
    if group.get("decoupled_weight_decay"):
        return "lr"
    return "lr" if _is_known_to_decouple(optimizer) else "l2"


def decay_of_update(convention: DecayConvention, lr: float, weight_decay: float) -> float | None:
    """Return the part of the weights that an update takes away; None if decay enters the gradient."""
    if convention == "l2":
        return None
    return weight_decay if convention == "schedule" else lr * weight_decay


def convention_signs(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> object:
    """Return what `decay_convention` reads for all groups: while this is equal, so are its answers."""
    if (decay_by := getattr(optimizer, "decay_by", None)) in ("schedule", "lr"):
        return decay_by
    flags = getattr(optimizer, "adam_w_mode", None), getattr(optimizer, "adamw_mode", None)
    return type(optimizer), flags, [group.get("decoupled_weight_decay") for group in groups]


def _is_known_to_decouple(optimizer: Optimizer) -> bool:
    """Return whether the class or a base class has the name of an optimizer that decouples weight decay."""
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    return any("adamw" in name.lower() for name in names) or not names.isdisjoint(_DECOUPLING)


def check_decoupled(optimizer: Optimizer, group: Mapping[str, Any], base: BaseValues) -> None:
    """Raise ValueError if ``optimizer`` adds the group's decay to the gradient, where normalisation has no meaning."""
    if base.weight_decay > 0 and decay_convention(optimizer, group) == "l2":
        raise ValueError(
            f"weight decay is to be normalised, but {type(optimizer).__name__} adds weight_decay="
            f"{base.weight_decay!r} to the gradient (L2), where normalisation has no meaning. Use an optimizer with "
            "decoupled decay, such as DistAdamW or torch.optim.AdamW, or leave normalize_weight_decay='auto' and no "
            "weight_decay_norm or weight_decay_timescale."
        )


def check_beside_timescale(optimizer: Optimizer, group: Mapping[str, Any], base: BaseValues) -> None:
    """Raise ValueError if a new group's decay is another one than that of other groups, or enters the gradient."""
    check_decoupled(optimizer, group, base)
    known = [float(one["initial_weight_decay"]) for one in optimizer.param_groups if "initial_weight_decay" in one]
    if base.weight_decay > 0:
        check_one_decay([*known, base.weight_decay])


def check_one_decay(decays: Sequence[float]) -> None:
    """Raise ValueError unless groups have one weight decay above 0, with which a time scale says all."""
    found = sorted(set(decays) - {0.0})
    if decays and not found:
        raise ValueError(
            "weight_decay_timescale replaces weight decays above 0, but every group's is 0. Pass any weight_decay "
            "above 0 to the optimizer."
        )
    if len(found) > 1:
        raise ValueError(
            f"weight_decay_timescale replaces weight decays above 0, but groups have {found}. Give them the same "
            "weight_decay, or 0 to groups without decay."
        )


# What a group's weight_decay is: AdamWR's normalised lambda, torch's in the first cycle, or, beside a time scale, only
# a sign whether the group decays.
DecayReading = Literal["paper", "first_cycle", "timescale"]
# The quantity of each reading that a preview draws: in AdamWR's, lambda_norm itself is constant.
GIVEN_DECAYS: dict[DecayReading, str] = {
    "paper": "lambda_i of AdamWR",
    "first_cycle": "as torch's AdamW",
    "timescale": "time scale, epochs",
}


def decay_factors(base: BaseValues, reading: DecayReading, *, norm: float) -> tuple[float, float]:
    """Return (a, b) with which the decay of one update, of ``p *= 1 - decay``, is ``a * lr / b``.

    Args:
        base: The group's base values.
        reading: What ``base.weight_decay`` is.
        norm: `RestartSchedule.weight_decay_norm` of the current cycle, over that of the first one if ``reading`` is
            "first_cycle".

    Here lr is the scheduled one, before the group's ``lr_scale``.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2 and appendix B.1.
    """
    if base.lr * base.lr_scale == 0:
        return 0.0, 1.0  # the decay is proportional to lr, which is always 0 in this group
    if reading == "first_cycle":
        return base.weight_decay * norm * base.lr_scale, 1.0
    if reading == "timescale":
        return norm if base.weight_decay else 0.0, base.lr
    return base.weight_decay * norm, base.lr


def decay_by_lr(base: BaseValues, reading: DecayReading, *, norm: float, batch_scale: float) -> float:
    """Return the weight decay of an optimizer that computes ``p *= 1 - lr * weight_decay``, as torch's do.

    Args:
        base: See `decay_factors`.
        reading: See `decay_factors`.
        norm: See `decay_factors`.
        batch_scale: The factor on lr for another global batch.

    Raises:
        ValueError: the result is not finite.
    """
    if base.lr * base.lr_scale == 0:
        return 0.0
    # Divided by everything that multiplies lr but the curve: the decay follows the curve, not lr_scale or lr_scaling.
    if reading == "first_cycle":
        return base.weight_decay * norm / batch_scale
    weight_decay = base.weight_decay
    if reading == "timescale":
        weight_decay = 1.0 if weight_decay else 0.0
    decay = weight_decay * norm / (base.lr * base.lr_scale * batch_scale)
    if not decay < math.inf:
        raise ValueError(
            f"weight_decay={base.weight_decay!r} over lr={base.lr * base.lr_scale!r} is not a finite number. "
            "Raise lr, or pass decay_by='schedule' to DistAdamW."
        )
    return decay
