"""RestartSchedule: golden traces, exact boundaries, every policy, bad arguments."""

from __future__ import annotations

import csv
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_adamw import ExpReduceMaxLROnIteration, ReduceMaxLROnRestart, RestartSchedule
from dist_adamw.schedule.policies import POLICIES

GOLDEN = Path(__file__).parents[1] / "golden"
E1024 = {"epoch_size": 1024, "batch_size": 32}
# file: schedule, (base lr, min lr, lambda_norm), decay convention, rows to compare
TRACES: dict[str, tuple[dict[str, Any], tuple[float, float, float], str, int]] = {
    "01_torch_cawr_mult2": ({**E1024, "restart_period": 5}, (1e-3, 1e-5, 0.0), "schedule", 0),
    "03_torch_cyclic_triangular": (
        {**E1024, "restart_period": 5, "t_mult": 1, "policy": "triangular"},
        (1e-2, 1e-4, 0.0),
        "schedule",
        0,
    ),
    # The authors advance T_cur before its first use: rows 0 to 127 run one batch ahead.
    "08_lua_adamwr_authors": ({**E1024, "restart_period": 4}, (1e-3, 0.0, 0.025), "schedule", 128),
    "09_paper_cosine_frac_partial": (
        {"epoch_size": 1000, "batch_size": 32, "restart_period": 2.5, "t_mult": 1.5},
        (1e-3, 0.0, 0.05),
        "schedule",
        0,
    ),
    "10_paper_cosine_torch_convention": (
        {"epoch_size": 1000, "batch_size": 32, "restart_period": 2.5, "t_mult": 1.5},
        (1e-3, 1e-5, 0.05),
        "lr",
        0,
    ),
    "13_paper_cosine_batch_change": (
        {"epoch_size": 6400, "batch_size": 64, "restart_period": 1},
        (1e-3, 0.0, 0.05),
        "schedule",
        0,
    ),
}


def make(**changes: Any) -> RestartSchedule:
    return RestartSchedule(**{"epoch_size": 1000, "batch_size": 100, "restart_period": 1, "t_mult": 2, **changes})


def lrs(schedule: RestartSchedule, samples: list[int], base: float = 1.0, low: float = 0.0) -> list[float]:
    return [schedule.lr(schedule.at(s), base, low) for s in samples]


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.parametrize("name", TRACES)
def test_golden_trace(name: str) -> None:
    options, (base, low, norm), convention, first = TRACES[name]
    schedule = RestartSchedule(**options)
    with (GOLDEN / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 300
    for row in rows[first:]:
        samples = int(row["samples"])
        point = schedule.at(samples)
        lr = schedule.lr(point, base, low)
        assert close(lr, float(row["lr"])), row
        if row["weight_decay"]:
            b = schedule.batch_size
            if name.startswith("13") and samples >= 200 * 64:
                b = 256
            decay = norm * schedule.weight_decay_norm(point, b)
            decay = decay * lr / base if convention == "schedule" else decay / base
            assert close(decay, float(row["weight_decay"])), row


def test_formulas_of_every_policy() -> None:
    tau = 0.3
    at = 300
    assert close(lrs(make(policy="cosine"), [at])[0], (1 + math.cos(math.pi * tau)) / 2)
    assert close(lrs(make(policy="arccosine"), [at])[0], math.acos(2 * tau - 1) / math.pi)
    assert close(lrs(make(policy="triangular"), [at])[0], 0.6)
    assert close(lrs(make(policy="triangular", triangular_step=0.2), [at])[0], 0.7 / 0.8)
    assert lrs(make(policy="triangular", triangular_step=0.0), [0, 500]) == [1.0, 0.5]
    assert lrs(make(policy="triangular", triangular_step=1.0), [0, 500]) == [0.0, 0.5]
    assert close(lrs(make(policy="triangular2"), [1000 + 600])[0], 0.6 * 0.5)
    assert close(lrs(make(policy="exp_range", gamma=0.9), [at])[0], 0.6 * 0.9**3)
    assert lrs(make(policy_fn=lambda t: 1 - t), [at]) == [0.7]


def test_min_lr_and_warmup() -> None:
    schedule = make(warmup_samples=400, warmup_start_lr=0.1)
    assert lrs(schedule, [0, 200, 400], 1.1, 0.01) == [0.1, pytest.approx(0.6), 1.1]
    assert lrs(schedule, [400, 900, 1399]) == lrs(make(), [0, 500, 999])
    assert schedule.at(399).cycle.index == 0
    assert schedule.at(400 + 1000).cycle.index == 1


def test_boundaries_are_exact_after_many_cycles() -> None:
    for t_mult in (1, 1.5, 2, 3, 10, "1.1", 1.01):
        schedule = make(restart_period=2.5, t_mult=t_mult, epoch_size=997)
        for i in (0, 1, 2, 7, 30):
            first = -int(-schedule.cycle(i).start // 1)
            assert schedule.at(first).cycle.index == i
            assert schedule.at(first).tau < 1e-3
            if i:
                assert schedule.at(first - 1).cycle.index == i - 1


def test_exact_restart_returns_the_peak_for_every_t_mult() -> None:
    """torch's CosineAnnealingWarmRestarts returns the minimum here for T_mult 3 and 10."""
    for t_mult in (1, 2, 3, 10):
        schedule = make(restart_period=10, t_mult=t_mult)
        for i in range(1, 8):
            assert lrs(schedule, [int(schedule.cycle(i).start)]) == [1.0]


def test_cycle_three_million_costs_what_cycle_three_costs() -> None:
    schedule = make(t_mult=1, restart_period=0.1)
    point = schedule.at(3_000_000 * 100 + 25)
    assert (point.cycle.index, point.tau) == (3_000_000, 0.25)
    shrinking = make(t_mult=0.5, restart_period=8)
    point = shrinking.at(8000 + 4000 + 2000 + 3_000_000 * 1000 + 500)
    assert (point.cycle.index, point.tau) == (3_000_003, 0.5)


def test_shrinking_periods_stop_at_one_epoch_by_default() -> None:
    lengths = [make(restart_period=5, t_mult=0.5).cycle(i).length / 1000 for i in range(6)]
    assert lengths == [5, Fraction(5, 2), Fraction(5, 4), 1, 1, 1]
    short = make(restart_period=0.5, t_mult=0.9)
    assert {short.cycle(i).length for i in range(5)} == {500}
    floored = make(restart_period=5, t_mult=0.5, min_restart_period=2)
    assert [floored.cycle(i).length for i in range(4)] == [5000, 2500, 2000, 2000]


def test_growing_periods_wait_at_a_minimum() -> None:
    schedule = make(restart_period=1, t_mult=2, min_restart_period=3)
    assert [schedule.cycle(i).length for i in range(5)] == [3000, 3000, 4000, 8000, 16000]
    assert [schedule.cycle(i).start for i in range(4)] == [0, 3000, 6000, 10000]
    assert [schedule.at(s).cycle.index for s in (2999, 3000, 5999, 6000, 9999, 10000)] == [0, 1, 1, 2, 2, 3]


def test_restart_callback_is_folded_once_per_restart() -> None:
    schedule = make(t_mult=1, eta_on_restart_cb=ReduceMaxLROnRestart(0.5))
    assert lrs(schedule, [0, 999, 1000, 1000, 5000, 1000, 0])[2:] == [0.5, 0.5, 0.5**5, 0.5, 1.0]
    lifted = make(t_mult=1, eta_on_restart_cb=lambda low, high: (low + 0.1, high))
    assert close(lrs(lifted, [2500])[0], 0.2 + 0.8 * 0.5)


def test_iteration_callback_is_not_compounded() -> None:
    schedule = make(t_mult=1, eta_on_iteration_cb=ExpReduceMaxLROnIteration(0.9))
    assert close(lrs(schedule, [3000])[0], 0.9**30)
    both = make(
        t_mult=1, eta_on_restart_cb=ReduceMaxLROnRestart(0.5), eta_on_iteration_cb=ExpReduceMaxLROnIteration(0.9)
    )
    assert close(lrs(both, [3000])[0], 0.9**30 * 0.125)


def test_weight_decay_norm_is_the_papers() -> None:
    schedule = make(restart_period=2.5, t_mult=2)
    assert close(schedule.weight_decay_norm(schedule.at(0), 100), math.sqrt(100 / 2500))
    assert close(schedule.weight_decay_norm(schedule.at(2500), 400), math.sqrt(400 / 5000))
    linear = make(weight_decay_exponent=1.0)
    assert close(linear.weight_decay_norm(linear.at(0), 100), 0.1)


@settings(max_examples=200, deadline=None)
@given(
    epoch=st.integers(1, 10_000),
    period=st.sampled_from(["0.3", 1, 2.5, "7/3", 11]),
    t_mult=st.sampled_from([0.5, 0.9, 1, 1.1, 1.5, 2, 10]),
    floor=st.sampled_from([None, 0.2, 3]),
    policy=st.sampled_from(POLICIES),
    samples=st.integers(0, 10**9),
)
def test_every_lookup_lies_in_its_cycle(
    epoch: int, period: float, t_mult: float, floor: float | None, policy: str, samples: int
) -> None:
    schedule = RestartSchedule(
        epoch_size=epoch, batch_size=8, restart_period=period, t_mult=t_mult, min_restart_period=floor, policy=policy
    )
    point = schedule.at(samples)
    cycle = point.cycle
    assert cycle.start <= samples < cycle.start + cycle.length
    assert schedule.cycle(cycle.index) == cycle
    assert schedule.cycle(cycle.index + 1).start == cycle.start + cycle.length
    assert 0.0 <= point.tau < 1.0
    assert abs(Fraction(point.tau) - (samples - cycle.start) / cycle.length) <= Fraction(1, 2**53)
    assert -1e-12 <= point.multiplier <= 1.0


def test_cycles_join_without_gaps() -> None:
    for options in ({"t_mult": 0.7, "restart_period": 9}, {"t_mult": 1.3, "min_restart_period": 2}, {"t_mult": 1}):
        cycles = [make(**options).cycle(i) for i in range(40)]
        for a, b in itertools.pairwise(cycles):
            assert a.start + a.length == b.start


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"policy": "cosin"}, ["'cosin'", "cosine, arccosine"]),
        ({"restart_period": 0}, ["restart_period", "0"]),
        ({"restart_period": -1}, ["restart_period", "-1"]),
        ({"restart_period": math.nan}, ["restart_period", "nan"]),
        ({"t_mult": 0}, ["t_mult", "0"]),
        ({"t_mult": -2}, ["t_mult", "-2"]),
        ({"t_mult": math.inf}, ["t_mult", "inf"]),
        ({"min_restart_period": 0}, ["min_restart_period", "0"]),
        ({"gamma": 0}, ["gamma", "0"]),
        ({"gamma": math.nan}, ["gamma", "nan"]),
        ({"triangular_step": 1.5}, ["triangular_step", "1.5"]),
        ({"warmup_samples": -1}, ["warmup_samples", "-1"]),
        ({"warmup_samples": 1.5}, ["warmup_samples", "1.5"]),
        ({"warmup_start_lr": math.nan}, ["warmup_start_lr", "nan"]),
        ({"epoch_size": 0}, ["epoch_size", "0"]),
        ({"batch_size": 2.5}, ["batch_size", "2.5"]),
        ({"policy_fn": 3}, ["policy_fn", "3"]),
        ({"weight_decay_exponent": math.nan}, ["weight_decay_exponent", "nan"]),
    ],
)
def test_bad_arguments_fail_at_once_with_the_value(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make(**changes)
    for name in names:
        assert name in str(raised.value)


@pytest.mark.parametrize("name", ["gamma", "triangular_step", "warmup_start_lr", "weight_decay_exponent"])
def test_a_float32_of_numpys_makes_nothing_less_exact(name: str) -> None:
    value = np.float32(0.3)
    options = {"policy": "exp_range", "warmup_samples": 100}
    ours, twin = make(**options, **{name: value}), make(**options, **{name: float(value)})
    for samples in (33, 777, 2345):
        point = ours.at(samples)
        assert point == twin.at(samples)
        lr = ours.lr(point, 1e-3, 1e-7)
        assert type(lr) is float
        assert (lr, ours.weight_decay_norm(point, 32)) == (
            twin.lr(point, 1e-3, 1e-7),
            twin.weight_decay_norm(point, 32),
        )
    for bad in ("0.3", None, [0.3]):
        with pytest.raises(ValueError, match=f"{name} .*a number.*got"):
            make(**{name: bad})


def test_a_policy_that_returns_nan_is_named() -> None:
    with pytest.raises(ValueError, match=r"nan at tau=0\.5"):
        make(policy_fn=lambda tau: math.nan).at(500)


@pytest.mark.parametrize(
    ("t_mult", "floor"), [(0.99999, 1), (1 - 1e-12, 1), ("0.9999999999999999999999", 1), ("1.00001", 200)]
)
def test_a_t_mult_that_could_not_be_counted_is_refused_at_once(t_mult: float | str, floor: int) -> None:
    with pytest.raises(ValueError, match=r"t_mult=.* close to 1 .*cycles"):
        make(restart_period=100, t_mult=t_mult, min_restart_period=floor)


def test_a_t_mult_near_one_is_counted_exactly() -> None:
    schedule = RestartSchedule(epoch_size=1000, batch_size=10, restart_period=100, t_mult=0.999, min_restart_period=1)
    assert schedule.cycle(4602).length > 1000
    assert schedule.cycle(4603).length == 1000
