"""Cosine, arc cosine and powers: how exact they are, and the whole schedule on two variants of the C library."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable

import mpmath
import pytest

from dist_adamw.schedule import exact_math
from dist_adamw.schedule.exact_math import arc_cosine, power, raised_cosine
from tests.conftest import ROOT

BOUND = 0.5001  # units in the last place


def ulps(found: float, exact: mpmath.mpf) -> float:
    return float(abs(mpmath.mpf(found) - exact) / math.ulp(found))


def positions(count: int) -> list[float]:
    """Random ones, and those where cancellation, tiny results or symmetry could hurt."""
    rng = random.Random(1)
    chosen = [rng.random() for _ in range(count)]
    chosen += [k / 512 for k in range(513)]
    chosen += [2.0**-k for k in range(1, 1075)] + [1 - 2.0**-k for k in range(1, 54)]
    edges = [math.nextafter(k / 32, toward) for k in range(33) for toward in (-1.0, 2.0)]
    return [x for x in chosen + edges if 0.0 <= x <= 1.0]


def bases_and_exponents(count: int) -> list[tuple[float, float]]:
    rng = random.Random(2)
    pairs = []
    for _ in range(count):
        base = rng.choice(
            [rng.random() + 1e-9, 1 - rng.random() * 2.0 ** -rng.randrange(53), rng.random() * 1e-6 + 1e-12]
        )
        exponent = rng.choice(
            [10 * rng.random(), rng.random() * 10.0 ** rng.randrange(7), rng.randrange(9999), 0.25, 1 / 3]
        )
        pairs.append((base, exponent))
    return pairs


def test_functions_of_tau_are_rounded_once() -> None:
    with mpmath.workprec(300):
        for x in positions(4000):
            exact = mpmath.mpf(x)
            assert ulps(raised_cosine(x), mpmath.cospi(exact / 2) ** 2) < BOUND, x
            # acos(2 x - 1) = 2 asin(sqrt(1 - x)), which mpmath does not cancel.
            assert ulps(arc_cosine(x), 2 * mpmath.asin(mpmath.sqrt(1 - exact)) / mpmath.pi) < BOUND, x
        assert int(mpmath.floor(mpmath.pi * 2**192)) == exact_math._PI


def test_powers_are_rounded_once() -> None:
    with mpmath.workprec(300):
        for base, exponent in bases_and_exponents(6000):
            exact = mpmath.mpf(base) ** mpmath.mpf(exponent)
            found = power(base, exponent)
            if exact > sys.float_info.min:
                assert ulps(found, exact) < BOUND, (base, exponent)
            else:
                assert abs(found - exact) <= math.ulp(0.0)


def test_exact_values_are_exact() -> None:
    assert [raised_cosine(x) for x in (0.0, 0.5, 1.0, 1.5, 2.0, -1.0, 3.0)] == [1.0, 0.5, 0.0, 0.5, 1.0, 0.0, 0.0]
    assert [arc_cosine(x) for x in (0.0, 0.5, 1.0, 0.25, 0.75)] == [1.0, 0.5, 0.0, 2 / 3, 1 / 3]
    assert power(0.75, 1) == 0.75
    assert power(0.3, 0.5) == math.sqrt(0.3)
    assert power(0.5, 1074) == math.ulp(0.0)
    assert power(0.5, 2000) == 0.0
    assert power(0.3, 0) == power(1.0, 1e9) == 1.0


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (arc_cosine, (1.5,)),
        (arc_cosine, (-0.1,)),
        (arc_cosine, (math.nan,)),
        (power, (0.0, 2.0)),
        (power, (1.0, math.inf)),
    ],
)
def test_what_has_no_value_is_refused(function: Callable[..., float], args: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="got"):
        function(*args)


SCRIPT = """
import hashlib, random, struct, sys, types
package = types.ModuleType("dist_adamw")  # the schedule alone, which needs no torch
package.__path__ = [sys.argv[1]]
sys.modules["dist_adamw"] = package
from dist_adamw.schedule.policies import POLICIES
from dist_adamw.schedule import ExpReduceMaxLROnIteration, RestartSchedule

def show(name, values):
    print(name, len(values), hashlib.sha256(struct.pack(f"{len(values)}d", *values)).hexdigest())

rng = random.Random(3)
for policy in POLICIES:
    schedule = RestartSchedule(
        epoch_size=1_281_167, batch_size=256, restart_period=3, t_mult=2, policy=policy, gamma=0.99999,
        warmup_samples=1000, weight_decay_exponent=0.3,
        eta_on_iteration_cb=ExpReduceMaxLROnIteration(0.999999) if policy == "triangular2" else None,
    )
    samples = sorted(rng.randrange(200_000_000) for _ in range(COUNT))
    points = [schedule.at(s) for s in samples]
    show(policy, [schedule.lr(point, 1e-3, 1e-7) for point in points])
    norms = [schedule.weight_decay_norm(point, 256 + k) for k, point in enumerate(points[::20])]
    show(f"decay under {policy}", norms + [0.05 * n * schedule.lr(p, 1e-3, 1e-7) for n, p in zip(norms, points[::20])])
"""


def test_lr_and_decay_do_not_depend_on_the_processor() -> None:
    """glibc's cos, acos, exp and pow have variants for processors with and without fused multiply-add."""
    script = SCRIPT.replace("COUNT", os.environ.get("EXACT_POINTS", "20_000"))
    jobs = []
    for tunables in ("", "glibc.cpu.hwcaps=-FMA,-AVX2,-FMA4,-AVX512F"):
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        command = [sys.executable, "-c", script, str(ROOT / "dist_adamw")]
        jobs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    usual, other = (job.communicate(timeout=200)[0].splitlines() for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0]
    assert len(usual) == 16
    assert usual == other
