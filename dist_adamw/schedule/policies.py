"""Annealing policies: functions from the position in a cycle, tau, to a multiplier, eta.

Arithmetic only. A policy knows nothing of samples, cycles or learning rates;
``restarts.py`` supplies tau and uses eta. Each gives the same bits on every processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dist_adamw.schedule.exact_math import arc_cosine, raised_cosine

Policy = Callable[[float], float]


def cosine(tau: float) -> float:
    """Half a cosine, from 1 to 0.

    Source: Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5.
    """
    return raised_cosine(float(tau))


def arccosine(tau: float) -> float:
    """The inverse of `cosine`: steep at both ends, flat in the middle."""
    return arc_cosine(float(tau))


def triangular(tau: float, peak: float = 0.5) -> float:
    """Rise linearly to 1 at ``tau == peak``, then fall linearly to 0.

    Args:
        tau: Position in the cycle, in [0, 1).
        peak: Where the maximum lies, in [0, 1]. 0 only falls, 1 only rises.

    Source: Smith, CLR, arXiv:1506.01186, section 3.
    """
    if tau < peak:
        return tau / peak
    return (1.0 - tau) / (1.0 - peak)


# triangular2 and exp_range have triangular's shape; their amplitude is the schedule's affair.
POLICIES = ("cosine", "arccosine", "triangular", "triangular2", "exp_range")


def make_policy(name: str, triangular_step: float) -> Policy:
    """Return the policy called ``name``.

    Raises:
        ValueError: ``name`` is none of `POLICIES`.
    """
    if name == "cosine":
        return cosine
    if name == "arccosine":
        return arccosine
    if name in POLICIES:
        return partial(triangular, peak=triangular_step)
    raise ValueError(
        f"unknown policy {name!r}. Choose one of {', '.join(POLICIES)}, or pass your own function of tau as policy_fn."
    )
