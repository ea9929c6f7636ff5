"""Annealing policies: functions from the position in a cycle, tau, to a multiplier, eta.

``restarts.py`` supplies tau and uses eta. Each policy gives the same bits on every processor.
"""

from __future__ import annotations

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
    if tau < peak:
        return tau / peak
    return (1.0 - tau) / (1.0 - peak)


# triangular2 and exp_range have triangular's shape; `RestartSchedule` scales their amplitude.
POLICIES = ("cosine", "arccosine", "triangular", "triangular2", "exp_range")


def make_policy(name: str, triangular_step: float) -> Policy:
    """Return the policy called ``name``.

    Raises:
        ValueError: ``name`` is not in `POLICIES`.
    """
    if name == "cosine":
        return raised_cosine  # `cosine` without its conversion: tau is a float here
    if name == "arccosine":
        return arccosine
    if name in POLICIES:
        return partial(triangular, peak=triangular_step)
    raise ValueError(
        f"unknown policy {name!r}. Choose one of {', '.join(POLICIES)}, or pass your own function of tau as policy_fn."
    )
