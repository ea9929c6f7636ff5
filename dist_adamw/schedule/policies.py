"""Annealing policies: functions from the position in a cycle, tau, to a multiplier, eta.

``restarts.py`` supplies tau and uses eta. Each policy gives the same bits on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from dist_adamw.schedule.exact_math import arc_cosine, raised_cosine

Policy = Callable[[float], float]


def cosine(tau: float) -> float:
    """Fall from 1 to 0 along half a cosine.

    Source: Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5.
    """
    return raised_cosine(float(tau))


def arccosine(tau: float) -> float:
    """Fall from 1 to 0 along the inverse of `cosine`: steep at both ends, flat in the middle."""
    return arc_cosine(float(tau))


def triangular(tau: float, peak: float = 0.5) -> float:
    """Rise linearly to 1 at ``tau == peak``, then fall linearly to 0.

    Args:
        tau: Position in the cycle, in [0, 1).
        peak: The position of the maximum, in [0, 1]. 0 only falls, 1 only rises.

    Source: Smith, CLR, arXiv:1506.01186, section 3.
    """
    if tau < peak or peak == 1.0:
        return tau / peak
    return (1.0 - tau) / (1.0 - peak)


def linear(tau: float) -> float:
    """Fall linearly from 1 to 0."""
    return 1.0 - tau


def one_minus_sqrt(tau: float) -> float:
    """Fall from 1 to 0, fastest at the beginning.

    Source: Hägele et al., arXiv:2405.18392, section 3.
    """
    return 1.0 - math.sqrt(tau)


def stable(tau: float) -> float:
    """Stay at 1."""
    return 1.0


def rise(tau: float) -> float:
    """Rise linearly from 0 to 1."""
    return tau


SHAPES = {"linear": linear, "one_minus_sqrt": one_minus_sqrt, "cosine": cosine}  # of a decay after a stable lr
# triangular2 and exp_range have triangular's shape; `RestartSchedule` scales their amplitude.
POLICIES = ("cosine", "arccosine", "triangular", "triangular2", "exp_range", "linear", "one_minus_sqrt", "wsd")
RISING = ("triangular", "triangular2", "exp_range")  # policies that rise themselves after a restart


def make_shape(name: str, shape: str) -> Policy:
    """Return the shape of a decay, for the argument ``name``.

    Raises:
        ValueError: ``shape`` is not in `SHAPES`.
    """
    if shape not in SHAPES:
        raise ValueError(f"{name} must be one of {', '.join(SHAPES)}, got {shape!r}.")
    return SHAPES[shape]


def make_policy(name: str, triangular_step: float, decay_shape: str = "linear") -> Policy:
    """Return the policy called ``name``; of "wsd", the part that falls.

    Raises:
        ValueError: ``name`` is not in `POLICIES`.
    """
    if name == "wsd":
        return make_shape("decay_shape", decay_shape)
    if name in ("linear", "one_minus_sqrt"):
        return SHAPES[name]
    if name == "cosine":
        return raised_cosine  # `cosine` without its conversion: tau is a float here
    if name == "arccosine":
        return arccosine
    if name in POLICIES:
        return partial(triangular, peak=triangular_step)
    raise ValueError(
        f"unknown policy {name!r}. Choose one of {', '.join(POLICIES)}, or pass your own function of tau as policy_fn."
    )
