"""Cycles, policies and units beside independent definitions in exact fractions: the same bits."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW, Optimizer

from dist_adamw import CyclicLRWithRestarts, DistAdamW, RestartSchedule

E, B = 1000, 96


def make(**options: Any) -> RestartSchedule:
    if "cycle_ends" not in options:
        options = {"restart_period": 1, **options}
    return RestartSchedule(epoch_size=E, batch_size=B, **options)


# ---------------------------------------------------------------- the definition


def boundaries(ends: list[Fraction] | None, period: Fraction, t_mult: Fraction) -> Iterator[tuple[Fraction, Fraction]]:
    """Yield (start, end) of each cycle, in samples after warm-up."""
    start = Fraction(0)
    if ends is not None:
        for end in ends:
            yield start, end
            start = end
        return
    while True:
        yield start, start + period
        start, period = start + period, period * t_mult


SHAPES: dict[Any, Any] = {
    "linear": lambda x: 1.0 - x,
    "one_minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}


def position(u: int, start: Fraction, end: Fraction) -> float:
    return min(float((u - start) / (end - start)), math.nextafter(1.0, 0.0))


def eta(
    u: int, cycles: list[tuple[Fraction, Fraction]], policy: str, rise: Fraction, fall: Fraction, shape: str
) -> float:
    """Return the curve's value; ``rise`` and ``fall`` are shares of a cycle, or samples if above 1."""
    if u >= cycles[-1][1]:
        return 0.0
    index = next(i for i, (_, end) in enumerate(cycles) if u < end)
    start, end = cycles[index]
    risen = start
    if rise and index:
        risen += rise * (end - start) if rise <= 1 else rise
        if u < risen:
            return position(u, start, risen)
    if policy != "wsd":
        return SHAPES[policy](position(u, risen, end))
    falls = end - (fall * (end - start) if fall <= 1 else fall)
    return 1.0 if u < falls else SHAPES[shape](position(u, falls, end))


def as_length(share: Fraction) -> str:
    return f"{share} cycles" if share <= 1 else f"{share} samples"


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(["linear", "one_minus_sqrt", "wsd"]),
    shape=st.sampled_from(["linear", "one_minus_sqrt"]),
    period=st.fractions(Fraction(1, 2), 3, max_denominator=12),
    t_mult=st.fractions(1, 3, max_denominator=8),
    ends=st.none() | st.lists(st.integers(200, 900), min_size=1, max_size=5),
    rise=st.sampled_from([Fraction(0), Fraction(1, 10), Fraction(1, 7), Fraction(37)]),
    fall=st.sampled_from([Fraction(1, 10), Fraction(1, 3), Fraction(101, 2)]),
    warmup=st.sampled_from([0, 130]),
    samples=st.lists(st.integers(0, 20_000), min_size=1, max_size=20),
)
def test_every_policy_beside_its_definition(
    policy: str,
    shape: str,
    period: Fraction,
    t_mult: Fraction,
    ends: list[int] | None,
    rise: Fraction,
    fall: Fraction,
    warmup: int,
    samples: list[int],
) -> None:
    sums = None if ends is None else [Fraction(sum(ends[: i + 1])) for i in range(len(ends))]
    options: dict[str, Any] = {"policy": policy, "warmup_samples": warmup}
    if sums is None:
        options |= {"restart_period": period, "t_mult": t_mult}
    else:
        options["cycle_ends"] = [f"{end + warmup} samples" for end in sums]
    if rise:
        options["rewarmup"] = as_length(rise)
    if policy == "wsd":
        options |= {"decay_length": as_length(fall), "decay_shape": shape}
    schedule = make(**options)
    cycles = []
    for edges in boundaries(sums, period * E, t_mult):
        cycles.append(edges)
        if edges[1] > 20_000:
            break
    for s in samples:
        if s >= warmup:
            assert schedule.at(s).multiplier == eta(s - warmup, cycles, policy, rise, fall, shape), s


@pytest.mark.parametrize("fit", ["last", "scale"])
@pytest.mark.parametrize("total", [700, 1000, 1001, 2499, 2501, 3000, 5000, 12_345, 14_999, 15_000])
def test_the_last_cycle_ends_with_training(total: int, fit: Any) -> None:
    warmup = 137
    schedule = make(total_samples=total, fit=fit, warmup_samples=warmup)
    assert schedule.count is not None
    assert schedule.first_sample(schedule.count) == total == schedule.last_sample
    assert schedule.at(total - 1).multiplier < 0.01
    assert schedule.at(total).multiplier == schedule.at(total + 10**6).multiplier == 0.0
    lengths = [schedule.cycle(i).length for i in range(schedule.count)]
    if fit == "scale":
        assert {b / a for a, b in itertools.pairwise(lengths)} <= {2}

        # No other number of cycles needs a factor nearer to 1.
        def distance(count: int) -> float:
            return abs(math.log((total - warmup) / (E * (2**count - 1))))

        assert distance(schedule.count) == min(map(distance, range(1, 8)))
    else:
        assert lengths[:-1] == [E * 2**i for i in range(schedule.count - 1)]
        usual = E * 2 ** (schedule.count - 1)
        assert lengths[-1] <= 2 * usual
        assert schedule.count == 1 or lengths[-1] >= usual / 2


def test_a_number_of_cycles_limits_a_preview() -> None:
    scheduler = scheduled(AdamW, cycle_ends=[500, "1 epoch", "3 epochs"])
    assert [row.first_sample for row in scheduler.preview().rows] == [0, 500, 1000]
    assert [row.samples for row in scheduler.preview(cycles=9).rows] == [500, 500, 2000]
    assert "sample 3,000 (epoch 3), at the end of cycle 2" in str(scheduler.preview())
    with pytest.raises(ValueError, match="cycle 3 does not exist: the schedule ends after 3 cycles"):
        scheduler.schedule.cycle(3)


@pytest.mark.parametrize(
    ("factor", "peaks"), [(0.5, [1, 0.5, 0.25, 0.125]), ([1.0, 0.3], [1, 0.3, 0.3, 0.3]), (0.0, [1, 0, 0, 0])]
)
def test_peaks_of_cycles(factor: Any, peaks: list[float]) -> None:
    schedule = make(t_mult=1, peak_factor=factor)
    assert [schedule.at(1000 * i).multiplier for i in range(4)] == peaks


# ---------------------------------------------------------------- units


@settings(max_examples=100, deadline=None)
@given(
    updates=st.lists(st.integers(1, 60), min_size=4, max_size=4),
    tokens=st.sampled_from([1, 512, 1000]),
    samples=st.lists(st.integers(0, 30_000), min_size=1, max_size=10),
)
def test_one_recipe_in_every_unit(updates: list[int], tokens: int, samples: list[int]) -> None:
    names = ("restart_period", "warmup_samples", "rewarmup", "decay_length")
    amounts = dict(zip(names, updates, strict=True))
    amounts["restart_period"] += 120  # longer than the two in it
    total = 700 + sum(updates)
    forms = [
        (lambda n: f"{n} updates"),
        (lambda n: f"{n * B} samples"),
        (lambda n: f"{Fraction(n * B, E)} epochs"),
        (lambda n: f"{n * B * tokens} tokens"),
    ]
    schedules = [
        make(
            policy="wsd",
            tokens_per_sample=tokens,
            total_samples=form(total),
            weight_decay_timescale=form(77),
            **{name: form(amount) for name, amount in amounts.items()},
        )
        for form in forms
    ]
    for s in samples:
        points = [schedule.at(s) for schedule in schedules]
        assert len({(p.multiplier, p.tau, p.warmup, p.cycle) for p in points}) == 1
        assert len({x.weight_decay_norm(p, B) for x, p in zip(schedules, points, strict=True)}) == 1


def test_numbers_keep_their_units() -> None:
    assert make(restart_period=2.5, warmup_samples=7) == make(restart_period=2.5, warmup_samples="7 samples")
    forms = (2.5, "2.5", "2.5 epochs", "2.5 Epochs", "2_500 samples")
    assert [make(restart_period=period).cycle(0).length for period in forms] == [2500] * 5
    assert make(rewarmup=0) == make()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"restart_period": "2 fortnights"}, "restart_period='2 fortnights' has an unknown unit. Units are samples"),
        ({"restart_period": "10%"}, "restart_period='10%' cannot be a share of a cycle"),
        ({"restart_period": "ten epochs"}, "restart_period must be a finite number above 0, got 'ten epochs'"),
        ({"warmup_samples": "1e9 tokens"}, "warmup_samples='1e9 tokens' is in tokens: pass tokens_per_sample"),
        ({"warmup_samples": "-5 updates"}, "warmup_samples must be a finite number above 0"),
        ({"cycle_ends": []}, "cycle_ends must be a list of one end or more"),
        ({"cycle_ends": "3 epochs"}, "cycle_ends must be a list"),
        ({"cycle_ends": ["2 epochs", 1500]}, r"cycle_ends\[1\]=1500 must come after '2 epochs', the one before"),
        ({"cycle_ends": [100], "warmup_samples": 100}, r"cycle_ends\[0\]=100 must come after the warm-up of 100"),
        ({"cycle_ends": [1, 3, 7]}, r"cycle_ends\[0\]=1 makes a cycle of 1 samples, less than an update of 96"),
        ({"cycle_ends": [0.5, 1]}, r"cycle_ends\[0\]=0.5 is less than one sample. Write a unit, such as '0.5 epochs'"),
        ({"cycle_ends": [1000], "t_mult": 3}, "stands in place of restart_period, t_mult"),
        ({"fit": "scale"}, "fit='scale' needs total_samples"),
        ({"policy": "wsd", "decay_length": 0.1}, "decay_length=0.1 is less than one sample.* '10%' for a share"),
        ({"total_samples": 15}, "total_samples=15 ends before the first update .* write '15 epochs'"),
        ({"cycle_ends": [1000], "total_samples": 1000}, "pass cycle_ends or total_samples, not both"),
        ({"total_samples": 100, "warmup_samples": 100}, "total_samples=100 ends before .* the warm-up of 100 samples"),
        ({"total_samples": 100, "fit": "first"}, "fit must be 'last' or 'scale', got 'first'"),
        ({"policy": "wsd", "decay_length": "2 epochs"}, "too few for decay_length='2 epochs'. Shorten"),
        ({"policy": "wsd", "rewarmup": "95%"}, "too few for rewarmup='95%' and decay_length='10%'"),
        ({"rewarmup": "3 epochs"}, "too few for rewarmup='3 epochs'"),
        ({"decay_length": "10%"}, "decay_length='10%' is for policy='wsd', got 'cosine'"),
        ({"policy": "triangular", "rewarmup": 10}, "rewarmup=10, but policy='triangular' rises itself"),
        ({"decay_shape": "cosine"}, "decay_shape='cosine' is for policy='wsd', got 'cosine'"),
        ({"weight_decay_timescale": 500, "weight_decay_exponent": 1}, "has no effect with weight_decay_timescale"),
        ({"t_mult": 1.0000001, "total_samples": 10**8 + 1}, "so close to 1 that 99,5.* cycles end in 100000 epochs"),
        ({"decay_shape": "cubic"}, "decay_shape must be one of linear, one_minus_sqrt, cosine, got 'cubic'"),
        ({"peak_factor": [1, -1]}, r"peak_factor must be a finite number >= 0, or a list of them, got \[1, -1\]"),
        ({"peak_factor": []}, "peak_factor must be"),
        ({"tokens_per_sample": 0}, "tokens_per_sample must be a whole number above 0"),
        ({"weight_decay_timescale": 95}, "weight_decay_timescale=95 is 95 samples, less than an update of 96"),
    ],
)
def test_bad_input_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**options)
    with pytest.raises(ValueError, match=said):
        scheduled(AdamW, **options)


def test_options_are_checked_before_sizes_are_known() -> None:
    for options in ({"restart_period": "2 fortnights"}, {"cycle_ends": ["x"]}, {"weight_decay_timescale": "1 y"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CyclicLRWithRestarts(adamw(AdamW), **options)
    # In epochs of unknown size these could be anything.
    later = CyclicLRWithRestarts(
        adamw(AdamW), cycle_ends=["1 epoch", 1500], warmup_samples="2 updates", weight_decay_timescale="2 epochs"
    )
    CyclicLRWithRestarts(adamw(AdamW), total_samples="2 epochs", fit="scale")
    with pytest.raises(ValueError, match="needs total_samples"):
        CyclicLRWithRestarts(adamw(AdamW), fit="scale")
    later.batch_size, later.epoch_size = B, E
    assert later.schedule.last_sample == 1500
    scheduler = CyclicLRWithRestarts(adamw(AdamW), B, cycle_ends=["2 epochs", 1500])
    with pytest.raises(ValueError, match=r"cycle_ends\[1\]=1500 must come after"):
        scheduler.epoch_size = E


# ---------------------------------------------------------------- weight decay


def adamw(cls: Any, lr: float = 2e-3, weight_decay: float = 0.1, **options: Any) -> Any:
    return cls([nn.Parameter(torch.linspace(-1, 1, 40))], lr=lr, weight_decay=weight_decay, **options)


def scheduled(cls: Any, optimizer: Any = None, **options: Any) -> CyclicLRWithRestarts:
    optimizer = adamw(cls) if optimizer is None else optimizer
    if "cycle_ends" not in options:
        options = {"restart_period": 1, **options}
    return CyclicLRWithRestarts(optimizer, B, E, **options)


def update(optimizer: Optimizer, scheduler: CyclicLRWithRestarts, count: int = 1) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.sin(param.detach() * 3)
        optimizer.step()
        scheduler.step()


def test_first_cycle_keeps_torchs_weight_decay() -> None:
    """Swapping the optimizer changes nothing in the first cycle; later ones are normalised from there."""
    scheduler = scheduled(AdamW, weight_decay_norm="first_cycle")
    for samples, expected in ((0, 0.1), (999, 0.1), (1000, 0.1 * math.sqrt(1 / 2)), (3000, 0.1 * math.sqrt(1 / 4))):
        scheduler.go_to(samples=samples)
        assert scheduler.get_last_weight_decay() == [expected]
    # By the paper's reading the same number is another quantity.
    paper = scheduled(AdamW)
    assert paper.get_last_weight_decay()[0] / 0.1 == pytest.approx(math.sqrt(B / E) / 2e-3)
    swapped, torchs = adamw(DistAdamW), adamw(AdamW)
    curve = torch.optim.lr_scheduler.LambdaLR(torchs, lambda _: 1.0)
    ours = scheduled(DistAdamW, swapped, weight_decay_norm="first_cycle", policy="wsd", decay_length=1)
    for _ in range(9):
        update(swapped, ours)
        torchs.param_groups[0]["params"][0].grad = torch.sin(torchs.param_groups[0]["params"][0].detach() * 3)
        torchs.step()
        curve.step()
    assert torch.equal(swapped.param_groups[0]["params"][0], torchs.param_groups[0]["params"][0])


@pytest.mark.parametrize("norm", [{"weight_decay_norm": "first_cycle"}, {"weight_decay_timescale": "1 cycle"}, {}])
def test_both_conventions_decay_alike(norm: dict[str, Any]) -> None:
    """Equal up to the rounding of a product of three numbers."""
    by = {}
    for decay_by in ("lr", "schedule"):
        optimizer = adamw(DistAdamW, decay_by=decay_by)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 1e-3, "lr_scale": 0.5})
        scheduler = scheduled(DistAdamW, optimizer, lr_scaling="sqrt", **norm)
        scheduler.batch_size = 4 * B
        found = []
        for samples in (0, 300, 1700, 5000):
            scheduler.go_to(samples=samples)
            for lr, decay in zip(scheduler.get_last_lr(), scheduler.get_last_weight_decay(), strict=True):
                found.append(float(lr) * decay if decay_by == "lr" else decay)
        by[decay_by] = found
    assert by["lr"] == pytest.approx(by["schedule"], rel=1e-15)


def test_a_time_scale_is_the_papers_decay_with_exponent_1() -> None:
    by_timescale = scheduled(AdamW, weight_decay_timescale="1 cycle")
    by_exponent = scheduled(AdamW, adamw(AdamW, weight_decay=1.0), weight_decay_exponent=1)
    quarter = scheduled(AdamW, weight_decay_timescale="0.25 cycles")
    by_four = scheduled(AdamW, adamw(AdamW, weight_decay=4.0), weight_decay_exponent=1)
    for samples in (0, 500, 1000, 2999, 3000, 100_000):
        for scheduler in (by_timescale, by_exponent, quarter, by_four):
            scheduler.go_to(samples=samples)
        assert by_timescale.get_last_weight_decay() == by_exponent.get_last_weight_decay()
        assert quarter.get_last_weight_decay() == by_four.get_last_weight_decay()


@pytest.mark.parametrize("batch", [B, 4 * B, 17])
def test_a_time_scale_in_epochs_depends_on_neither_batch_nor_period(batch: int) -> None:
    scheduler = CyclicLRWithRestarts(adamw(AdamW), batch, E, 1, weight_decay_timescale="3 epochs")
    for samples in (0, 1500, 40_000):
        scheduler.go_to(samples=samples)
        peak_decay = scheduler.get_last_weight_decay()[0] * 2e-3
        assert batch / peak_decay == pytest.approx(3 * E, rel=1e-15)
    assert [row.timescale for row in scheduler.preview(cycles=3).rows] == pytest.approx([3, 3, 3], rel=1e-12)


def test_a_time_scale_leaves_groups_without_decay_alone() -> None:
    optimizer = adamw(AdamW)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.0})
    scheduler = scheduled(AdamW, optimizer, weight_decay_timescale="1 cycle")
    assert scheduler.get_last_weight_decay() == [B / E / 2e-3, 0.0]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.2})
    for _ in range(2):  # also if the script catches the first one
        with pytest.raises(ValueError, match=r"replaces weight decays above 0, but groups have \[0.1, 0.2\]"):
            update(optimizer, scheduler)
    assert scheduler.samples == 0


def test_a_time_scale_needs_something_that_decays() -> None:
    with pytest.raises(ValueError, match=r"but every group's is 0\. Pass any weight_decay above 0"):
        scheduled(AdamW, adamw(AdamW, weight_decay=0.0), weight_decay_timescale="1 cycle")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight_decay_norm": "torch"}, "weight_decay_norm must be 'paper' or 'first_cycle', got 'torch'"),
        (
            {"weight_decay_norm": "first_cycle", "weight_decay_timescale": "1 cycle"},
            "pass weight_decay_norm or weight_decay_timescale, not both",
        ),
        (
            {"weight_decay_timescale": "1 cycle", "normalize_weight_decay": False},
            "weight_decay_timescale normalises weight decay, and normalize_weight_decay is False",
        ),
    ],
)
def test_readings_that_exclude_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scheduled(AdamW, **options)


@pytest.mark.parametrize("option", [{"weight_decay_norm": "first_cycle"}, {"weight_decay_timescale": "1 cycle"}])
def test_l2_optimizers_have_no_such_decay(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is to be normalised, but SGD adds"):
        scheduled(torch.optim.SGD, **option)


def test_a_batch_that_grows_beyond_the_time_scale() -> None:
    scheduler = scheduled(AdamW, weight_decay_timescale=500)
    with pytest.raises(ValueError, match="500 samples, less than an update of 501"):
        scheduler.batch_size = 501
    assert scheduler.batch_size == B


def test_preview_has_three_readings_of_one_decay() -> None:
    for optimizer in (adamw(AdamW), adamw(DistAdamW, decay_by="schedule"), adamw(DistAdamW)):
        row = scheduled(AdamW, optimizer, weight_decay_norm="first_cycle").preview().rows[0]
        assert row.weight_decay == pytest.approx(0.1)
        assert row.decay == pytest.approx(0.1 * 2e-3)
        assert row.timescale == pytest.approx(B / (0.1 * 2e-3) / E)
    row = scheduled(torch.optim.SGD).preview().rows[0]
    assert (row.decay, row.weight_decay, row.timescale) == (None, None, None)
    assert "decay" not in str(scheduled(torch.optim.SGD).preview())


# ---------------------------------------------------------------- cool-down branches


def test_a_branch_falls_from_the_trunk_and_leaves_it_alone() -> None:
    trunk_optimizer = adamw(AdamW)
    trunk = scheduled(AdamW, trunk_optimizer, policy="wsd", min_lr=1e-5)
    update(trunk_optimizer, trunk, 5)
    saved, weights = copy.deepcopy(trunk.state_dict()), copy.deepcopy(trunk_optimizer.state_dict())
    for shape, curve in SHAPES.items():
        optimizer = adamw(AdamW)
        optimizer.load_state_dict(weights)
        branch = scheduled(AdamW, optimizer, policy="wsd", min_lr=1e-5)
        branch.load_state_dict(saved)
        branch.cooldown(at=branch.samples, length="4 updates", shape=shape)
        found = []
        for _ in range(4):
            found.append(branch.get_last_lr()[0])
            update(optimizer, branch)
        assert found == [1e-5 + (2e-3 - 1e-5) * (1.0 * curve(k / 4)) for k in range(4)]
        assert branch.get_last_lr() == [1e-5]
        with pytest.warns(UserWarning, match="the schedule ended at sample 864, and training has reached 960"):
            update(optimizer, branch)
        assert branch.get_last_lr() == [1e-5]
    update(trunk_optimizer, trunk, 3)
    assert trunk.get_last_lr() == [2e-3]
    assert "cooldown" not in trunk.state_dict()


def test_a_branch_is_saved_and_resumed() -> None:
    optimizer = adamw(AdamW)
    branch = scheduled(AdamW, optimizer)
    branch.cooldown(at="2 updates", length="1 epoch")
    update(optimizer, branch, 5)
    expected = branch.get_last_lr()
    saved = branch.state_dict()
    assert saved["cooldown"] == {"at": 192, "length": 1000, "shape": "one_minus_sqrt"}
    resumed = scheduled(AdamW)
    resumed.load_state_dict(saved)
    assert resumed.get_last_lr() == expected
    resumed.cooldown(at=192, length=1000)  # the same script runs again
    with pytest.raises(
        ValueError, match=r"there is a cool-down of 1,000 samples from sample 192 .* already, got a cool-"
    ):
        resumed.cooldown(at=500, length=1000)
    for copied in (copy.deepcopy(resumed), pickle.loads(pickle.dumps(resumed))):
        assert copied.get_lr() == expected
    other = scheduled(AdamW)
    other.cooldown(at=200, length=1000)
    with pytest.raises(ValueError, match=r"the checkpoint is in the cool-down of .* from sample 192 .* and this job"):
        other.load_state_dict(saved)


def test_a_trunks_checkpoint_and_a_branch_that_was_asked_for() -> None:
    optimizer = adamw(AdamW)
    trunk = scheduled(AdamW, optimizer)
    update(optimizer, trunk, 3)
    saved = trunk.state_dict()
    asked = scheduled(AdamW)
    asked.cooldown(at=288, length=100)  # before it loads
    asked.load_state_dict(saved)
    assert asked.state_dict()["cooldown"]["at"] == 288
    late = scheduled(AdamW)
    late.cooldown(at=287, length=100)
    with pytest.raises(ValueError, match="the checkpoint is at sample 288, after the beginning of the cool-down"):
        late.load_state_dict(saved)
    assert late.samples == 0
    branch_optimizer = adamw(AdamW)
    branch = scheduled(AdamW, branch_optimizer)
    branch.cooldown(at=96, length=1000)
    update(branch_optimizer, branch, 3)
    branch.load_state_dict(saved)  # back to the trunk
    assert branch.get_last_lr() == trunk.get_last_lr()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"at": 200, "length": 10}, r"cooldown\(at=200\) must begin at or after 288 samples: the clock is at 288"),
        ({"at": "0.29 epochs", "length": 0}, "length must be a finite number above 0, got 0"),
        ({"at": 300, "length": "1 cycle"}, "length='1 cycle' cannot be a share of a cycle"),
        ({"at": 300, "length": 10, "shape": "cubic"}, "shape must be one of linear"),
        ({"at": "9 epochs", "length": 10}, "begins after the last cycle, which ends at 9,000 samples"),
    ],
)
def test_cooldowns_that_cannot_be(arguments: dict[str, Any], said: str) -> None:
    optimizer = adamw(AdamW)
    scheduler = scheduled(AdamW, optimizer, total_samples="9 epochs")
    update(optimizer, scheduler, 3)
    with pytest.raises(ValueError, match=said):
        scheduler.cooldown(**arguments)
    assert "cooldown" not in scheduler.state_dict()
    with pytest.raises(ValueError, match="epoch_size is not known"):
        CyclicLRWithRestarts(adamw(AdamW), B).cooldown(at=0, length=1)
    with pytest.raises(ValueError, match="the warm-up takes 500"):
        scheduled(AdamW, warmup_samples=500).cooldown(at=499, length=1)


# ---------------------------------------------------------------- saving


RECIPES: dict[str, dict[str, Any]] = {
    "wsd": {"policy": "wsd", "decay_length": "20%", "decay_shape": "one_minus_sqrt", "rewarmup": "10%"},
    "linear": {"policy": "linear", "rewarmup": 90, "peak_factor": 0.5},
    "one_minus_sqrt": {"policy": "one_minus_sqrt", "cycle_ends": ["0.7 epochs", 1500, "2 epochs"]},
    "fitted": {"total_samples": "2.5 epochs", "fit": "scale", "weight_decay_timescale": "1 cycle"},
    "peaks": {"t_mult": 1, "peak_factor": [1.0, 0.3], "weight_decay_norm": "first_cycle"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_resume_at_every_update(name: str) -> None:
    optimizer = adamw(AdamW)
    scheduler = scheduled(AdamW, optimizer, warmup_samples=100, **RECIPES[name])
    states, expected = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of some recipes this goes beyond the end
        for _ in range(33):
            states.append(copy.deepcopy(scheduler.state_dict()))
            expected.append((scheduler.get_last_lr(), scheduler.get_last_weight_decay()))
            update(optimizer, scheduler)
    assert len({lr[0] for lr, _ in expected}) > 10
    for state, values in zip(states, expected, strict=True):
        resumed = scheduled(AdamW, warmup_samples=100, **RECIPES[name])
        resumed.load_state_dict(state)
        assert (resumed.get_last_lr(), resumed.get_last_weight_decay()) == values
        taken = CyclicLRWithRestarts(adamw(AdamW), B, E, on_difference="checkpoint")
        taken.load_state_dict(state)
        assert (taken.get_last_lr(), taken.get_last_weight_decay()) == values


def test_a_state_of_an_earlier_version_has_the_same_keys() -> None:
    """Later options are in a configuration only if they are chosen, so either version loads the other's."""
    usual = scheduled(AdamW).state_dict()
    assert usual["configuration"].keys().isdisjoint({"decay_length", "peak_factor", "weight_decay_norm", "fit"})
    with pytest.raises(ValueError, match="rewarmup was None and is '10%'"):
        scheduled(AdamW, rewarmup="10%").load_state_dict(usual)


def test_schedules_are_pickled_and_copied_by_their_options() -> None:
    schedule = make(policy="wsd", rewarmup="10%", total_samples="9 epochs")
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert copied == schedule
        assert [copied.at(s).multiplier for s in range(0, 9500, 37)] == [
            schedule.at(s).multiplier for s in range(0, 9500, 37)
        ]
