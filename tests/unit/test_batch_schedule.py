"""A batch-size schedule: compared with its definition, its mistakes, and what is saved of it."""

from __future__ import annotations

import copy
import io
import math
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

from dist_adamw import CyclicLRWithRestarts, DistAdamW, GlobalBatch
from dist_adamw.integrations.deepspeed.configuration import _scheduler_from_json

E, LR, MIN_LR = 1000, 0.25, 0.125
BATCHES: dict[int | str, int] = {0: 64, 1500: 128, "4 epochs": 32}


def make(batch_size: Any = BATCHES, *, epoch_size: int | None = E, **options: Any) -> CyclicLRWithRestarts:
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=LR, weight_decay=0.5)
    recipe = {"restart_period": 1, "t_mult": 2, "policy": "linear", "min_lr": MIN_LR, **options}
    return CyclicLRWithRestarts(optimizer, batch_size, epoch_size, **recipe)


# ---------------------------------------------------------------- the definition


def batch_at(samples: int, batches: list[tuple[Fraction, int]]) -> int:
    return [size for start, size in batches if start <= samples][-1]


def values_at(
    samples: int, batches: list[tuple[Fraction, int]], scaling: str | None, timescale: Fraction | None
) -> tuple[float, float]:
    """Return lr and torch's weight decay: of the linear policy, cycles of 1, 2, 4, ... epochs, and b / tau."""
    start, length = Fraction(0), Fraction(E)
    while start + length <= samples:
        start, length = start + length, 2 * length
    batch = batch_at(samples, batches)
    growth = batch / batches[0][1]
    scale = {None: 1.0, "linear": growth, "sqrt": math.sqrt(growth)}[scaling]
    lr = (MIN_LR + (LR - MIN_LR) * (1.0 - float((samples - start) / length))) * scale
    decay = float(batch / (length if timescale is None else timescale))
    return lr, decay / (LR * scale)


KEYS = st.lists(st.fractions(Fraction(1, 50), 6, max_denominator=50), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(
    epochs=KEYS,
    sizes=st.lists(st.integers(1, 400), min_size=5, max_size=5),
    unit=st.sampled_from(["samples", "epochs", "tokens", "updates"]),
    scaling=st.sampled_from([None, "sqrt", "linear"]),
    timescale=st.sampled_from([None, "450 samples"]),
    samples=st.lists(st.integers(0, 7000), min_size=1, max_size=20),
)
def test_values_are_those_of_the_definition(
    epochs: list[Fraction], sizes: list[int], unit: str, scaling: Any, timescale: Any, samples: list[int]
) -> None:
    starts = [epoch * E for epoch in sorted(epochs)]
    if unit == "samples":
        starts = [Fraction(math.ceil(start)) for start in starts]
    worth = {"samples": Fraction(1), "epochs": Fraction(E), "tokens": Fraction(1, 7), "updates": Fraction(sizes[0])}[
        unit
    ]
    given_batches: dict[int | str, int] = {0: sizes[0]}
    given_batches |= {f"{start / worth} {unit}": size for start, size in zip(starts, sizes[1:], strict=False)}
    if len(set(map(math.ceil, starts))) < len(starts):
        with pytest.raises(ValueError, match="must come after"):
            make(given_batches, tokens_per_sample=7)
        return
    scheduler = make(
        given_batches, lr_scaling=scaling, weight_decay_timescale=timescale or "1 cycle", tokens_per_sample=7
    )
    batches = [(Fraction(0), sizes[0]), *zip(starts, sizes[1:], strict=False)]
    group = scheduler.optimizer.param_groups[0]
    for sample in [*samples, *map(math.ceil, starts), *(math.ceil(start) - 1 for start in starts)]:
        scheduler.go_to(samples=sample)
        found = (scheduler.batch_size, (group["lr"], group["weight_decay"]))
        expected = values_at(sample, batches, scaling, None if timescale is None else Fraction(450))
        assert found == (batch_at(sample, batches), expected)
        # The schedule is a function of samples: a preview has the same values.
        lr, decay = scheduler._scheduled.values_of(0)(scheduler.schedule.at(sample))
        assert (lr, decay) == (group["lr"], group["lr"] * group["weight_decay"])


@pytest.mark.parametrize(("norm", "first"), [("paper", 0.5), ("first_cycle", 0.5 * LR)])
def test_the_papers_norm_uses_the_batch_of_the_update(norm: Any, first: float) -> None:
    scheduler = make({0: 64, 1500: 256}, weight_decay_norm=norm)
    reference = 64 if norm == "first_cycle" else E  # b_ref / (E T_0), or 1
    for samples, batch, length in ((0, 64, 1000), (1499, 64, 2000), (1500, 256, 2000), (3000, 256, 4000)):
        scheduler.go_to(samples=samples)
        ratio = batch / length * (1000 / reference if norm == "first_cycle" else 1)
        assert scheduler.get_last_weight_decay()[0] * LR == pytest.approx(first * math.sqrt(ratio), rel=1e-15)


def test_lengths_in_updates_are_of_the_first_batch() -> None:
    scheduler = make({0: 50, "10 updates": 100, "20 updates": 200}, warmup_samples="4 updates")
    assert scheduler.schedule.warmup_samples == 200
    assert scheduler._scheduled.recipe.batches.starts == (0, 500, 1000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_plain_loop_counts_the_batch_of_the_clock(stream: bool) -> None:
    """It may read `batch_size` before each update; an epoch's last update is the rest of it."""
    scheduler = make({0: 300, 700: 450}, stream=stream)
    seen = []
    for _ in range(7):
        assert scheduler.batch_size is not None
        seen.append((scheduler.samples, scheduler.batch_size))
        scheduler.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
        scheduler.optimizer.step()
        scheduler.step()
    clocks = [0, 300, 600, 900, 1350, 1800, 2250] if stream else [0, 300, 600, 900, 1000, 1450, 1900]
    assert seen == [(clock, 300 if clock < 700 else 450) for clock in clocks]


def test_the_batch_is_known_before_the_epoch_is() -> None:
    scheduler = make({0: 64, "2 epochs": 128}, epoch_size=None)
    assert scheduler.batch_size == 64
    assert "batch_size: {0: 64, '2 epochs': 128}" in repr(scheduler)
    scheduler.epoch_size = E
    assert "batch_size: 64 samples, 128 from sample 2,000 on" in repr(scheduler)
    scheduler.go_to(samples=2000)
    assert scheduler.batch_size == 128
    scheduler.batch_size = GlobalBatch(4, 2, 2)  # and a number replaces the schedule
    assert scheduler.batch_size == 16
    scheduler.batch_size = {0: 64, 2000: 8}
    assert scheduler.batch_size == 8


def test_texts_without_a_unit_are_samples() -> None:
    """JSON has texts for keys."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    given_batches = {"0": 64, "1_500": "128", "4 epochs": 32}
    scheduler = _scheduler_from_json(optimizer, batch_size=given_batches, epoch_size=E)
    assert scheduler.configuration()["batch_size_schedule"] == [[0, 64], [1500, 128], ["4 epochs", 32]]
    assert make().configuration()["batch_size_schedule"] == [[0, 64], [1500, 128], ["4 epochs", 32]]
    with pytest.raises(
        ValueError, match=r"batch_size=.* is wrong: it must be a whole number or an object of a whole number by"
    ):
        _scheduler_from_json(optimizer, batch_size={"0": 64, "5": None}, epoch_size=E)


def test_a_json_needs_prepare_which_changes_the_accumulation() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=LR)
    scheduler = _scheduler_from_json(optimizer, batch_size={"0": 64, "5": 32}, epoch_size=E)
    parameter.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"is a schedule .64 samples, 32 from sample 5 on.*dist_adamw\.prepare"):
        optimizer.step()
    assert (scheduler.samples, parameter.item()) == (0, 0.0)
    scheduler.sample_source = None  # prepare sets its own
    optimizer.step()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("batch_size", "said"),
    [
        ({}, "batch_size={} is empty"),
        ({0: 64}, r"batch_size=\{0: 64\} is one batch for all of training: pass 64"),
        ({5: 64, 10: 128}, "the first key of batch_size must be 0, where training begins, got 5"),
        ({"1 epoch": 64, "2 epochs": 128}, "must be 0, where training begins, got '1 epoch'"),
        ({0: 64, 10: 128, 5: 256}, "5 is sample 5 and must come after 10"),
        ({0: 64, 1000: 128, "1 epoch": 256}, "'1 epoch' is sample 1,000 and must come after 1000"),
        ({0: 64, "0 epochs": 128}, "0 is sample 0 and must come after 0"),
        ({0: 64, -5: 128}, "a key of batch_size must be a whole number >= 0, got -5: samples, or a text with a unit"),
        ({0: 64, "-5": 128}, "a key of batch_size must be a finite number above 0, got '-5'"),
        ({0: 64, 5.5: 128}, "a key of batch_size must be a whole number >= 0, got 5.5"),
        ({0: 64, "5.5": 128}, "a key of batch_size must be a whole number of samples, got '5.5'"),
        ({0: 64, True: 128}, "a key of batch_size must be a whole number >= 0, got True"),
        ({False: 64, 5: 128}, "a key of batch_size must be a whole number >= 0, got False"),
        ({0: 64, None: 128}, "a key of batch_size must be a whole number >= 0, got None"),
        ({0: 64, "5 moons": 128}, "a key of batch_size='5 moons' has an unknown unit"),
        ({0: 64, "0 moons": 128}, "a key of batch_size='0 moons' has an unknown unit"),
        ({0: 64, "50%": 128}, "a key of batch_size cannot be a share of a cycle, got '50%'"),
        ({0: 64, "5 tokens": 128}, "'5 tokens' is in tokens: pass tokens_per_sample"),
        ({0: 64, 5: 0}, r"batch_size\[5\] must be a whole number above 0, got 0"),
        ({0: 64, 5: -1}, r"batch_size\[5\] must be a whole number above 0, got -1"),
        ({0: 64, 5: True}, r"batch_size\[5\] must be a whole number above 0, got True"),
        ({0: 64.5, 5: 64}, r"batch_size\[0\] must be a whole number above 0, got 64.5"),
        ({0: 64, 5: None}, r"batch_size\[5\] must be a whole number above 0, got None"),
        ({0: 64, 5: "128"}, r"batch_size\[5\] must be a whole number above 0, got '128'"),
        ([(0, 64), (5, 128)], "batch_size must be a whole number above 0, got"),
    ],
)
def test_a_mistake_is_one_sentence(batch_size: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        make(batch_size)
    assert "\n" not in str(raised.value)
    scheduler = make()
    with pytest.raises(ValueError, match=said):
        scheduler.batch_size = batch_size
    assert scheduler.configuration() == make().configuration()


def test_a_batch_that_grows_beyond_the_time_scale_of_its_cycles() -> None:
    # Cycles of 1, 2 and 4 epochs end at 1,000, 3,000 and 7,000 samples.
    options: dict[str, Any] = {"weight_decay_timescale": "1 cycle"}
    make({0: 1000, 1000: 2000, 3000: 4000}, **options)
    for batches in ({0: 1000, 999: 2000}, {0: 1000, 1000: 2001}, {0: 1000, 2999: 4000}):
        with pytest.raises(ValueError, match=r"weight_decay_timescale='1 cycle' is .* less than an update"):
            make(batches, **options)
    # Cycles of 1,000, 500 and 100 samples.
    ends: dict[str, Any] = {"cycle_ends": [1000, 1500, 1600], "restart_period": 100, "t_mult": 2, **options}
    make({0: 100, 10: 500, 1500: 100}, **ends)
    with pytest.raises(ValueError, match="100 samples, less than an update of 101"):
        make({0: 100, 10: 101, 1501: 100}, **ends)


# ---------------------------------------------------------------- saved and loaded


def test_a_state_loads_safely_and_everywhere() -> None:
    scheduler = make(lr_scaling="sqrt")
    scheduler.go_to(samples=1600)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["batch_size"] == 128
    for other in (make(lr_scaling="sqrt"), make({0: 64, "1500 samples": 128, "4  epochs": 32}, lr_scaling="sqrt")):
        other.load_state_dict(state)
        assert (other.batch_size, other.get_last_lr()) == (128, scheduler.get_last_lr())
        assert other.state_dict() == scheduler.state_dict()
    recipe = copy.copy(make(64)._scheduled.recipe)
    for name in ("batch_schedule", "_batches"):  # of a pickle from before
        del recipe.__dict__[name]
    assert (recipe.batch_at(5), recipe.batches.sizes) == (64, (64,))
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert twin.batch_size == 128
        twin.go_to(samples=4000)
        assert twin.batch_size == 32


def test_a_state_without_a_schedule_has_the_keys_of_before() -> None:
    assert "batch_size_schedule" not in make(64).state_dict()["configuration"]
    plain = make(64).state_dict()
    make(128).load_state_dict(plain)  # a job may have another batch


@pytest.mark.parametrize(("saved", "ours"), [(BATCHES, 64), (BATCHES, {0: 64, 1500: 256}), (64, BATCHES)])
def test_another_schedule_of_batches_is_a_difference(saved: Any, ours: Any) -> None:
    before = make(saved, lr_scaling="linear")
    before.go_to(samples=1600)
    state = before.state_dict()
    scheduler = make(ours, lr_scaling="linear")
    with pytest.raises(ValueError, match="the checkpoint has a different schedule: batch_size_schedule was"):
        scheduler.load_state_dict(state)
    assert (scheduler.samples, scheduler.configuration()) == (0, make(ours, lr_scaling="linear").configuration())
    scheduler.load_state_dict(state, on_difference="checkpoint")
    assert scheduler.state_dict() == state
    assert scheduler.get_last_lr() == before.get_last_lr()
    scheduler = make(ours, lr_scaling="linear")
    scheduler.load_state_dict(state, on_difference="new")
    expected = make(ours, lr_scaling="linear")
    expected.go_to(samples=1600)
    assert scheduler.batch_size == expected.batch_size
    assert scheduler.get_last_lr() == expected.get_last_lr()


@pytest.mark.parametrize("saved", [[], [[0, 64]], [[0, 64], [5]], 5, "x", [[0, 64], [5, "x"]], {"a": 1}])
def test_a_state_that_was_edited(saved: Any) -> None:
    state = make().state_dict()
    state["configuration"]["batch_size_schedule"] = saved
    scheduler = make()
    with pytest.raises(ValueError, match=r"batch_size"):
        scheduler.load_state_dict(state, on_difference="checkpoint")
    assert scheduler.state_dict() == make().state_dict()


# ---------------------------------------------------------------- shown


def test_preview_counts_updates_and_shows_batches(tmp_path: Path) -> None:
    scheduler = make({0: 64, 1500: 300, "4 epochs": 32})
    preview = scheduler.preview(cycles=3)
    assert str(preview).startswith("global batch: 64 samples, 300 from sample 1,500 on, 32 from sample 4,000 on\n")
    counted = []
    for row in preview.rows:
        samples, updates = row.first_sample, 0
        while samples < row.first_sample + row.samples:
            samples += 64 if samples < 1500 else 300 if samples < 4000 else 32
            updates += 1
        counted.append(updates)
    assert [row.updates for row in preview.rows] == counted == [16, 13, 92]
    # The decay at the peak, where the cycle begins: by its batch there.
    batches, lengths = [64, 64, 300], [1000, 2000, 4000]
    for row, batch, length in zip(preview.rows, batches, lengths, strict=True):
        assert row.decay == pytest.approx(0.5 * math.sqrt(batch / length))
        assert row.timescale == pytest.approx(batch / math.sqrt(batch / length) / 0.5 / E)
    assert preview.plot(tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "global batch" not in str(make(64).preview())


def test_an_update_that_reaches_beyond_the_end_is_not_past_it() -> None:
    # Cycle 0 ends at 1,000 samples, and an update of 500 that began before it ends at 1,450.
    ends = [make(batches).preview(total_samples=1450).end for batches in ({0: 64, 900: 500}, 64, {0: 500, 900: 64})]
    assert [end is not None and end.is_at_cycle_end for end in ends] == [True, False, False]


def test_verbose_says_when_the_batch_changes(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make({0: 300, 1100: 450}, verbose=True)
    for _ in range(6):
        scheduler.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
        scheduler.optimizer.step()
        scheduler.step()
    lines = caplog.messages
    assert [line.split(":")[0].split(" (")[0] for line in lines] == [
        "warm restart 1 at sample 1,000",
        "global batch 450 from sample 1,300 on",
    ]
    assert ", a global batch of 300, and decay" in lines[0]
    assert "time scale" in lines[0]


def test_both_conventions_decay_alike() -> None:
    found = []
    for decay_by in ("lr", "schedule"):
        optimizer = DistAdamW([nn.Parameter(torch.zeros(1))], lr=LR, weight_decay=0.5, decay_by=decay_by)
        scheduler = CyclicLRWithRestarts(optimizer, BATCHES, E, restart_period=1, lr_scaling="sqrt")
        values = scheduler._scheduled.values_of(0)
        decays = [values(scheduler.schedule.at(samples))[1] for samples in (0, 1499, 1500, 4000)]
        assert [scheduler.schedule.at(samples).samples for samples in (0, 1499)] == [0, 1499]
        found.append(decays)
        for samples, decay in zip((0, 1499, 1500, 4000), decays, strict=True):
            scheduler.go_to(samples=samples)
            group = optimizer.param_groups[0]
            assert group["weight_decay"] * (group["lr"] if decay_by == "lr" else 1.0) == decay
    assert found[0] == pytest.approx(found[1], rel=1e-12)
