"""CyclicLRWithRestarts as an LRScheduler: the clock, the groups, the state."""

from __future__ import annotations

import copy
import csv
import gc
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer

from dist_adamw import CyclicLRWithRestarts, DistAdamW, ExpReduceMaxLROnIteration, GlobalBatch, ReduceMaxLROnRestart

GOLDEN = Path(__file__).parents[1] / "golden"


def parameter(value: float = 1.0) -> Tensor:
    return torch.nn.Parameter(torch.full((4,), value))


def adamw(**options: Any) -> DistAdamW:
    return DistAdamW([parameter()], **{"lr": 1e-3, "weight_decay": 0.05, **options})


def make(optimizer: Optimizer, **options: Any) -> CyclicLRWithRestarts:
    return CyclicLRWithRestarts(
        optimizer, **{"batch_size": 100, "epoch_size": 1000, "restart_period": 1, "min_lr": 0.0, **options}
    )


def update(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def train(optimizer: Optimizer, scheduler: CyclicLRWithRestarts, updates: int) -> list[tuple[int, float, float]]:
    rows = []
    for _ in range(updates):
        rows.append((scheduler.samples, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
        update(optimizer)
        scheduler.step()
    return rows


def golden(name: str) -> list[tuple[int, float, float]]:
    with (GOLDEN / f"{name}.csv").open() as file:
        return [(int(r["samples"]), float(r["lr"]), float(r["weight_decay"])) for r in csv.DictReader(file)]


PAPER = {"batch_size": 32, "epoch_size": 1000, "restart_period": 2.5, "t_mult": 1.5}


def check_golden(rows: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    for (s, lr, decay), (s_ref, lr_ref, decay_ref) in zip(rows, expected, strict=True):
        assert s == s_ref
        assert math.isclose(lr, lr_ref, rel_tol=1e-9, abs_tol=1e-15)
        assert math.isclose(decay, decay_ref, rel_tol=1e-9, abs_tol=1e-15)


def test_golden_trace_in_the_papers_convention() -> None:
    optimizer = adamw(decay_by="schedule")
    expected = golden("09_paper_cosine_frac_partial")
    check_golden(train(optimizer, make(optimizer, **PAPER), len(expected)), expected)


@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.AdamW])
def test_golden_trace_in_torchs_convention(cls: Callable[..., Optimizer]) -> None:
    optimizer = cls([parameter()], lr=1e-3, weight_decay=0.05)
    expected = golden("10_paper_cosine_torch_convention")
    check_golden(train(optimizer, make(optimizer, **PAPER, min_lr=1e-5), len(expected)), expected)


def test_golden_trace_with_a_batch_change() -> None:
    optimizer = adamw(decay_by="schedule")
    scheduler = make(optimizer, batch_size=64, epoch_size=6400)
    expected = golden("13_paper_cosine_batch_change")
    rows = train(optimizer, scheduler, 200)
    scheduler.batch_size = GlobalBatch(64, 2, 2)
    check_golden(rows + train(optimizer, scheduler, len(expected) - 200), expected)


def test_both_conventions_give_the_same_weights() -> None:
    weights = []
    for decay_by in ("lr", "schedule"):
        param = parameter()
        optimizer = DistAdamW([param], lr=1e-2, weight_decay=0.5, decay_by=decay_by)
        train(optimizer, make(optimizer, restart_period=0.7, t_mult=1.5), 60)
        weights.append(param.detach())
    # The two multiply the same three numbers in another order.
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=0)
    assert weights[0].abs().max() < 0.9


def test_calls_without_an_update_change_nothing() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    for _ in range(3):
        scheduler.step()
    assert scheduler.samples == 0
    update(optimizer)
    for _ in range(4):  # Accelerate calls once per process
        scheduler.step()
    assert scheduler.samples == 100
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]


def test_every_update_counts_even_if_step_is_called_once() -> None:
    optimizer = adamw()
    scheduler = make(optimizer, epoch_size=250)
    for _ in range(4):
        update(optimizer)
    scheduler.step()
    assert scheduler.samples == 100 + 100 + 50 + 100


def test_the_last_update_of_an_epoch_counts_what_is_left() -> None:
    optimizer = adamw()
    assert [s for s, *_ in train(optimizer, make(optimizer, epoch_size=250), 5)] == [0, 100, 200, 250, 350]
    optimizer = adamw()
    assert [s for s, *_ in train(optimizer, make(optimizer, epoch_size=250, stream=True), 4)] == [0, 100, 200, 300]


def test_step_counts_the_samples_it_is_given() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    update(optimizer)
    scheduler.step(samples=37)
    scheduler.step(samples=37)
    assert scheduler.samples == 37
    wrong: list[Any] = [-1, 1.5, True, "8"]
    for bad in wrong:
        with pytest.raises(ValueError, match=f"samples .*whole number.* {bad!r}"):
            scheduler.step(samples=bad)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((3,), {}), ((), {"epoch": 3}), ((0,), {}), ((32, 1), {}), ((), {"metrics": 0.1})]
)
def test_the_old_habit_of_passing_an_epoch_is_one_sentence(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """step(0), step(1), step(2) counted samples. Not a TypeError: DeepSpeed answers that by step(train_batch_size)."""
    optimizer = adamw()
    scheduler = make(optimizer)
    update(optimizer)
    with pytest.raises(ValueError, match=r"step\(.*\) is not understood: .* step\(samples=") as raised:
        scheduler.step(*args, **kwargs)
    assert str((args or tuple(kwargs.values()))[0]) in str(raised.value)
    assert scheduler.samples == 0
    scheduler.step(None)  # torch's own default
    assert scheduler.samples == 100


INTEGERS: dict[str, Callable[[int], Any]] = {
    "numpy": np.int64,
    "small numpy": np.uint16,
    "0-d array": np.array,
    "tensor": torch.tensor,
    "one element": lambda n: torch.tensor([n], dtype=torch.int32),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_numpy_and_torch_are_integers(kind: str) -> None:
    whole = INTEGERS[kind]
    optimizer = adamw()
    options = {"batch_size": whole(100), "epoch_size": whole(1000), "warmup_samples": whole(50)}
    scheduler = make(optimizer, **options, t_mult=np.float64(1.5))
    update(optimizer)
    scheduler.step(samples=whole(70))
    twin = adamw()
    expected = make(twin, warmup_samples=50, t_mult=1.5)
    update(twin)
    expected.step(samples=70)
    assert scheduler.state_dict() == expected.state_dict()
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["samples"] == 70
    assert type(scheduler.samples) is int
    assert str(scheduler.preview(cycles=whole(2), points=whole(9), total_samples=whole(5000))) == str(
        expected.preview(cycles=2, points=9, total_samples=5000)
    )
    scheduler.batch_size = whole(200)
    assert scheduler.batch_size == 200
    assert GlobalBatch(whole(4), whole(2), whole(3)).size == 24
    late = make(adamw(), epoch_size=None)
    late.epoch_size = whole(1000)
    assert type(late.epoch_size) is int


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 2.0, np.float64(2), torch.tensor(2.0), torch.ones(2), "2"]
)
def test_what_is_no_integer_is_refused_everywhere(value: Any) -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    for call in (
        lambda: scheduler.step(samples=value),
        lambda: scheduler.go_to(samples=value),
        lambda: make(adamw(), batch_size=value),
        lambda: make(adamw(), epoch_size=value),
        lambda: make(adamw(), warmup_samples=2.5 if value == "2" else value),  # "2" is a length
        lambda: GlobalBatch(value),
    ):
        with pytest.raises(ValueError, match="whole number"):
            call()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.AdamW])
def test_an_fp16_update_that_overflows_holds_the_schedule(cls: Callable[..., Optimizer], fused: bool) -> None:
    """accelerate #4242: with a fused optimizer the kernel skips, and Accelerate does not report it."""
    param = parameter()
    optimizer = cls([param], lr=1e-3, fused=fused)
    scheduler = make(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        loss = (param * (math.inf if step in (1, 4) else 1.0)).sum()
        scaler.scale(loss).backward()
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        seen.append(scheduler.samples)
        assert torch.equal(before, param) == (step in (1, 4))
    assert seen == [100, 100, 200, 300, 300, 400]


def test_an_update_that_clipping_skips_holds_the_schedule() -> None:
    optimizer = adamw(max_grad_norm=1.0)
    scheduler = make(optimizer)
    param = optimizer.param_groups[0]["params"][0]
    for value, samples in ((1.0, 100), (math.nan, 100), (2.0, 200)):
        param.grad = torch.full_like(param, value)
        optimizer.step()
        scheduler.step()
        assert scheduler.samples == samples
        assert optimizer.step_was_skipped == math.isnan(value)
    assert optimizer.updates == 2


def test_torchs_empty_step_to_make_state_does_not_count() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = DistAdamW(model.parameters(), decay_by="schedule", weight_decay=0.1)
    scheduler = make(optimizer)
    weights = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    scheduler.step()
    assert scheduler.samples == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_groups_have_their_own_lr_weight_decay_and_min_lr() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [parameter()], "lr": 1e-2, "weight_decay": 0.0, "min_lr": 1e-3},
        {"params": [parameter()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)
    scheduler = make(optimizer, min_lr=1e-4)
    train(optimizer, scheduler, 5)
    assert scheduler.get_last_lr() == [pytest.approx(5.5e-3), pytest.approx(5.5e-4)]
    lambda_0 = 0.05 * math.sqrt(0.1)
    assert scheduler.get_last_weight_decay() == [0.0, pytest.approx(lambda_0 / 1e-3)]


def test_a_group_added_later_is_scheduled_from_its_first_update() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 5)
    optimizer.add_param_group({"params": [parameter()], "lr": 1e-2})
    seen = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[1]["lr"]))
    update(optimizer)
    scheduler.step()
    assert seen == [pytest.approx(5e-3)]
    assert len(scheduler.get_last_lr()) == 2


def test_l2_optimizers_get_lr_only() -> None:
    for optimizer in (
        torch.optim.SGD([parameter()], lr=0.1, weight_decay=0.01),
        torch.optim.Adam([parameter()], lr=0.1, weight_decay=0.01),
    ):
        scheduler = make(optimizer)
        train(optimizer, scheduler, 5)
        assert scheduler.get_last_lr() == [pytest.approx(0.05)]
        assert scheduler.get_last_weight_decay() == [0.01]
        with pytest.raises(ValueError, match=r"is to be normalised, but .* adds weight_decay=0\.01"):
            make(optimizer, normalize_weight_decay=True)


def test_decoupled_adam_is_recognised_and_false_leaves_decay_alone() -> None:
    optimizer = torch.optim.Adam([parameter()], lr=0.1, weight_decay=0.01, decoupled_weight_decay=True)
    assert make(optimizer).get_last_weight_decay() == [pytest.approx(0.01 * math.sqrt(0.1) / 0.1)]
    alone = adamw()
    assert make(alone, normalize_weight_decay=False).get_last_weight_decay() == [0.05]


def test_drives_an_optimizer_inside_a_wrapper() -> None:
    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    inner = adamw()
    scheduler = make(Wrapper(inner))
    assert scheduler.optimizer is inner
    train(inner, scheduler, 3)
    assert scheduler.samples == 300


def test_a_tensor_lr_is_filled_in_place() -> None:
    lr = torch.tensor(1e-3)
    optimizer = adamw(lr=lr)
    scheduler = make(optimizer)
    train(optimizer, scheduler, 5)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(5e-4)


def test_without_batch_or_epoch_size_the_first_update_says_so() -> None:
    for missing in ("batch_size", "epoch_size"):
        optimizer = adamw()
        scheduler = make(optimizer, **{missing: None})
        param = optimizer.param_groups[0]["params"][0]
        before = param.detach().clone()
        with pytest.raises(ValueError, match=rf"{missing} is not known.*dist_adamw\.prepare"):
            update(optimizer)
        assert torch.equal(param, before)
        setattr(scheduler, missing, 100)
        update(optimizer)
        scheduler.step()
        assert scheduler.samples == 100


def test_batch_size_may_be_a_global_batch() -> None:
    assert make(adamw(), batch_size=GlobalBatch(8, 4, 2)).batch_size == 64


def test_lr_scaling_is_opt_in_and_leaves_the_decay_alone() -> None:
    for decay_by in ("lr", "schedule"):
        for scaling, factor in ((None, 1.0), ("sqrt", 2.0), ("linear", 4.0)):
            optimizer = adamw(decay_by=decay_by)
            scheduler = make(optimizer, lr_scaling=scaling)
            train(optimizer, scheduler, 5)
            scheduler.batch_size = 400
            group = optimizer.param_groups[0]
            assert group["lr"] == pytest.approx(factor * 5e-4)
            d = group["weight_decay"] * (group["lr"] if decay_by == "lr" else 1.0)
            assert d == pytest.approx(0.05 * math.sqrt(0.4) * 0.5)


# ---------------------------------------------------------------- the clock, set by hand


def test_go_to_sets_the_clock_lr_and_decay_as_if_trained_there() -> None:
    trained, moved = adamw(decay_by="schedule"), adamw(decay_by="schedule")
    reference, scheduler = make(trained, restart_period=0.7), make(moved, restart_period=0.7)
    train(trained, reference, 23)
    train(moved, scheduler, 2)
    scheduler.go_to(samples=2300)
    assert scheduler.get_last_lr() == [moved.param_groups[0]["lr"]]
    assert train(moved, scheduler, 20) == train(trained, reference, 20)
    scheduler.go_to(samples=0)
    assert moved.param_groups[0]["lr"] == 1e-3


def test_go_to_refuses_what_would_be_lost() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    update(optimizer)
    with pytest.raises(ValueError, match=r"go_to\(samples=500\) between optimizer.step\(\) and scheduler.step\(\)"):
        scheduler.go_to(samples=500)
    scheduler.step()
    assert scheduler.samples == 100
    wrong: list[Any] = [-1, 1.5, 1 << 62]
    for bad in wrong:
        with pytest.raises(ValueError, match="samples must be"):
            scheduler.go_to(samples=bad)
    with pytest.raises(ValueError, match="batch_size is not known"):
        make(adamw(), batch_size=None).go_to(samples=5)


def test_a_skip_that_is_told_after_go_to_does_not_move_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistAdamW, "skip_is_known", False)
    optimizer = adamw(max_grad_norm=1.0)
    scheduler = make(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.full((4,), math.nan)
    optimizer.step()
    scheduler.step()
    scheduler.go_to(samples=700)
    assert scheduler.state_dict()["samples"] == 700


def test_on_difference_is_an_argument() -> None:
    state = make(adamw(), restart_period=3).state_dict()
    with pytest.raises(ValueError, match=r"restart_period was 3 and is 1.*on_difference='checkpoint'"):
        make(adamw()).load_state_dict(state)
    taken = make(adamw(), on_difference="checkpoint")
    taken.load_state_dict(state)
    assert taken.schedule.restart_period == 3
    kept = make(adamw(), on_difference="new")
    kept.load_state_dict(state)
    assert kept.schedule.restart_period == 1
    with pytest.raises(ValueError, match=r"on_difference .*'maybe'"):
        make(adamw(), on_difference="maybe")


# ---------------------------------------------------------------- other schedulers


@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.SGD])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("container", ["SequentialLR", "ChainedScheduler"])
def test_torchs_containers_are_refused_when_they_are_made(
    container: str, first: bool, cls: Callable[..., Optimizer]
) -> None:
    optimizer = cls([parameter()], lr=1e-3)
    other = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    scheduler = make(optimizer)
    lr = optimizer.param_groups[0]["lr"]
    members = [scheduler, other] if first else [other, scheduler]
    args = (optimizer, members, [5]) if container == "SequentialLR" else (members, optimizer)
    with pytest.raises(ValueError, match=rf"{container} cannot drive CyclicLRWithRestarts.*warmup_samples"):
        getattr(torch.optim.lr_scheduler, container)(*args)
    assert optimizer.param_groups[0]["lr"] == lr == 1e-3
    update(optimizer)
    scheduler.step()
    assert scheduler.samples == 100


@pytest.mark.parametrize("tensor", [False, True])
def test_another_writer_of_lr_is_named_once(tensor: bool) -> None:
    optimizer = adamw(lr=torch.tensor(1e-3) if tensor else 1e-3)
    scheduler = make(optimizer)
    other = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            update(optimizer)
            scheduler.step()
            other.step()
    assert [str(w.message).split(" is ")[0] for w in caught] == ["lr of parameter group 0"]
    assert "another scheduler" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_another_writer_of_the_decay_is_named_unless_the_decay_is_left_alone() -> None:
    for options, count in (({}, 1), ({"normalize_weight_decay": False}, 0)):
        optimizer = adamw()
        scheduler = make(optimizer, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                optimizer.param_groups[0]["weight_decay"] = 0.01 * step
                update(optimizer)
                scheduler.step()
        assert [str(w.message).split(" is ")[0] for w in caught] == ["weight_decay of parameter group 0"] * count


def test_what_belongs_to_training_is_no_other_writer() -> None:
    """Loads, copies, groups added later, torch's empty step, and values that the schedule has written."""
    model = torch.nn.Linear(2, 2)
    optimizer = DistAdamW(model.parameters(), lr=torch.tensor(1e-3))
    scheduler = make(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_optimizer_state_dict(model, optimizer)
        train(optimizer, scheduler, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, scheduler, 2)
        optimizer.add_param_group({"params": [parameter()], "lr": 1e-2})
        train(optimizer, scheduler, 2)
        optimizer2, scheduler2 = copy.deepcopy((optimizer, scheduler))
        train(optimizer2, scheduler2, 2)
        scheduler.load_state_dict(scheduler2.state_dict())
        scheduler.batch_size = 50
        train(optimizer, scheduler, 2)
        scheduler.go_to(samples=300)
        train(optimizer, scheduler, 2)


# ---------------------------------------------------------------- looks


def test_repr_shows_the_recipe_and_the_clock() -> None:
    optimizer = adamw()
    scheduler = make(optimizer, batch_size=None, policy="triangular", warmup_samples=200, gamma=0.9)
    assert repr(scheduler).splitlines()[1:5] == [
        "    recipe: restart_period=1, t_mult=2, policy='triangular', gamma=0.9, warmup_samples=200, min_lr=0.0",
        "    epoch_size: 1,000 samples",
        "    batch_size: not known yet",
        "    clock: 0 samples",
    ]
    scheduler.batch_size = 100
    train(optimizer, scheduler, 1)
    assert "clock: 100 samples (epoch 0.1), 50.0% of the warm-up\n" in repr(scheduler)
    scheduler.go_to(samples=1700)
    assert repr(scheduler) == (
        "CyclicLRWithRestarts(\n"
        "    recipe: restart_period=1, t_mult=2, policy='triangular', gamma=0.9, warmup_samples=200, min_lr=0.0\n"
        "    epoch_size: 1,000 samples\n"
        "    batch_size: 100 samples\n"
        "    clock: 1,700 samples (epoch 1.7), 25.0% into cycle 1\n"
        "    lr: 0.0005\n"
        "    weight_decay: 11.18\n"
        ")"
    )


def test_verbose_logs_one_line_per_restart(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = adamw()
    train(optimizer, make(optimizer, verbose=True), 31)
    lines = caplog.messages
    assert len(lines) == 2
    assert lines[0].startswith("warm restart 1 at sample 1,000 (epoch 1.00): the next 2 epochs start from lr 0.001")


def test_preview_shows_the_restarts_and_the_trace(tmp_path: Path) -> None:
    optimizer = adamw()
    scheduler = make(optimizer, warmup_samples=500, eta_on_restart_cb=ReduceMaxLROnRestart(0.5))
    preview = scheduler.preview(cycles=3, points=75)
    assert [row.first_sample for row in preview.rows] == [500, 1500, 3500]
    assert [row.updates for row in preview.rows] == [10, 20, 40]
    assert [row.peak_lr for row in preview.rows] == pytest.approx([1e-3, 5e-4, 2.5e-4])
    assert len(preview.samples) == len(preview.lr) == len(preview.decay)
    assert {*range(0, 7500, 100), 1499, 1500, 7499} <= {*preview.samples}
    assert preview.lr[preview.samples.index(500)] == pytest.approx(1e-3)
    assert "first sample" in str(preview)
    assert len(str(preview).splitlines()) == 5
    assert scheduler.samples == 0
    png = preview.plot(tmp_path / "preview.png")
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("epochs", "options", "said"),
    [
        (
            20,
            {},
            "epoch 20) ... 12.5% into cycle 3 ... 96.2% ... epoch 17.5 (17,500 samples) ... "
            "epoch 37.5 (37,500 samples) ... restart_period=1.33 ... restart_period=2.86",
        ),
        (17.5, {}, "(epoch 17.5) ... end of cycle 2"),
        (17.58, {}, "(epoch 17.58) ... end of cycle 2"),  # the last update began before the restart
        (17.6, {}, "0.5% into cycle 3 ... 100.0%"),  # one update at the peak
        (17.4, {}, "(epoch 17.4) ... end of cycle 2"),  # no update is left of it
        (1, {}, "first cycle ... epoch 2.5 (2,500 samples) ... restart_period=1 "),
        (4, {"warmup_samples": 5000}, "before the warm-up ... 80.0%"),
        (20, {"t_mult": 0.5}, "epoch 19.75 (19,750 samples) ... epoch 20.75 (20,750 samples)"),
        (20, {"t_mult": 1, "restart_period": 0.3}, "restart_period=0.299 ... restart_period=0.303"),
    ],
)
def test_preview_shows_where_training_ends(epochs: float, options: dict[str, Any], said: str) -> None:
    scheduler = make(adamw(), **{"restart_period": 2.5, **options})
    preview = scheduler.preview(total_samples=int(1000 * epochs))
    last_line = str(preview).splitlines()[-1]
    assert all(part in last_line for part in said.split(" ... "))
    assert preview.samples[-1] < 1000 * epochs
    assert preview.end is not None
    assert len(preview.rows) == min(preview.end.cycle + 1, 20)


@pytest.mark.parametrize("options", [{}, {"t_mult": 1}, {"t_mult": 1.3, "warmup_samples": 777}, {"epoch_size": 98_765}])
def test_periods_that_fit_end_a_cycle_there(options: dict[str, Any]) -> None:
    total = 123_456
    preview = make(adamw(), **options).preview(total_samples=total)
    assert preview.end is not None
    for period in preview.end.restart_periods:
        end = make(adamw(), **{**options, "restart_period": period}).preview(total_samples=total).end
        assert end is not None
        assert end.is_at_cycle_end, period


def test_the_hooks_do_not_keep_a_dropped_scheduler_alive() -> None:
    optimizer = adamw()
    make(optimizer, batch_size=None)  # would refuse every update
    gc.collect()
    update(optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 2e-3}, r"min_lr .* 0\.001, got 0\.002"),
        ({"min_lr": math.nan}, r"min_lr .* 0\.001, got nan"),
        ({"restart_period": 0}, "restart_period .*finite.* got 0"),
        ({"t_mult": -1}, "t_mult .*finite.* -1"),
        ({"policy": "cosin"}, "unknown policy 'cosin'"),
        ({"batch_size": 0}, "batch_size .*whole number.* got 0"),
        ({"epoch_size": -5}, "epoch_size .*whole number.* -5"),
        ({"normalize_weight_decay": "yes"}, "normalize_weight_decay .*'yes'"),
        ({"lr_scaling": "cubic"}, "lr_scaling .*'cubic'"),
        ({"batch_size": None, "policy": "cosin"}, "unknown policy"),
    ],
)
def test_bad_arguments_leave_the_optimizer_as_it_was(options: dict[str, Any], message: str) -> None:
    optimizer = adamw()
    with pytest.raises(ValueError, match=message):
        make(optimizer, **options)
    gc.collect()
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    update(optimizer)


def test_iteration_callback_sees_global_batches() -> None:
    optimizer = adamw()
    scheduler = make(optimizer, restart_period=100, eta_on_iteration_cb=ExpReduceMaxLROnIteration(0.5))
    train(optimizer, scheduler, 3)
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-3 * 0.125, rel=1e-3)


def test_nan_in_a_group_is_refused() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match=r"lr .*finite.* nan"):
        make(optimizer)


def test_loading_the_optimizer_does_not_leave_its_lr_behind() -> None:
    pretrained = adamw(lr=0.5)
    update(pretrained)
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 5)
    expected = scheduler.get_last_lr(), scheduler.get_last_weight_decay()
    optimizer.load_state_dict(pretrained.state_dict())
    group = optimizer.param_groups[0]
    assert ([group["lr"]], [group["weight_decay"]]) == expected


def test_groups_added_between_update_and_step() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    update(optimizer)
    optimizer.add_param_group({"params": [parameter()], "lr": 1e-2})
    assert len(scheduler.get_lr()) == 2
    assert scheduler.preview(group=1).rows[0].peak_lr == pytest.approx(1e-2)
    scheduler.step()
    assert len(scheduler.get_last_lr()) == 2


@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.AdamW])
def test_a_step_without_gradients_does_not_count(cls: Callable[..., Optimizer]) -> None:
    optimizer = cls([parameter()], lr=1e-3)
    scheduler = make(optimizer)
    optimizer.step()
    scheduler.step()
    assert scheduler.samples == 0


def test_an_update_at_a_lr_that_the_user_set_to_zero_counts() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 1)
    optimizer.param_groups[0]["lr"] = 0.0
    update(optimizer)
    with pytest.warns(UserWarning, match=r"lr of parameter group 0 is 0\.0.*not written"):
        scheduler.step()
    assert scheduler.samples == 200


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_a_clock_of_its_own(how: str) -> None:
    optimizer = adamw()
    scheduler = make(optimizer, policy="triangular")
    train(optimizer, scheduler, 3)
    both = (optimizer, scheduler)
    optimizer2, scheduler2 = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert scheduler2.optimizer is optimizer2
    assert train(optimizer2, scheduler2, 20) == train(optimizer, scheduler, 20)


def test_a_shallow_copy_has_a_clock_of_its_own() -> None:
    scheduler = make(adamw())
    scheduler.sample_source = lambda: 7
    copied = copy.copy(scheduler)
    copied.go_to(samples=50)
    assert (scheduler.samples, copied.samples, copied.sample_source) == (0, 50, None)


def test_another_optimizer_is_followed() -> None:
    scheduler = make(adamw())
    scheduler.optimizer = other = adamw(lr=0.5)
    scheduler.go_to(samples=0)
    assert [other.param_groups[0]["lr"]] == scheduler.get_last_lr() == [0.5]


@pytest.mark.parametrize("every", [1, 2])
def test_a_skip_that_the_device_tells_later_is_taken_back_before_the_next_update(
    monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """On a GPU the host does not wait for the answer: an update counts until the next one begins."""

    def train(known: bool) -> tuple[list[float], int, int]:
        monkeypatch.setattr(DistAdamW, "skip_is_known", known)
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = DistAdamW([param], lr=0.1, max_grad_norm=1.0)
        scheduler = CyclicLRWithRestarts(optimizer, 4, 30, restart_period=1.3, t_mult=1.5)
        lrs: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: lrs.append(optimizer.param_groups[0]["lr"]))
        for update in range(42):
            param.grad = torch.full((3,), math.nan if update % 7 in (2, 3, 6) else 1.0)
            optimizer.step()
            if update % every == every - 1:
                scheduler.step()
        samples = scheduler.state_dict()["samples"]
        assert samples == scheduler.samples
        return lrs, samples, optimizer.updates

    assert train(known=False) == train(known=True)


def test_updates_across_the_ends_of_epochs_are_told_once() -> None:
    """drop_last with epoch_size=len(dataset): where the real samples are passed, it can be seen."""
    scheduler = CyclicLRWithRestarts(optimizer := torch.optim.AdamW([p := torch.nn.Parameter(torch.ones(1))]), 8, 20)
    p.grad = torch.ones(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.step()
            scheduler.step(samples=8)
    assert ["4 samples beyond an epoch of 20" in str(one.message) for one in told] == [True]


# ---------------------------------------------------------------- parameter groups that users change

NAMED = {"a": (1e-2, 0.05), "b": (1e-3, 0.1), "c": (1e-4, 0.0)}  # lr and weight decay


def three_groups(cls: Any) -> Optimizer:
    groups = [
        {"params": [parameter()], "name": name, "lr": lr, "weight_decay": decay} for name, (lr, decay) in NAMED.items()
    ]
    return cls(groups)


def written(optimizer: Optimizer) -> dict[str, tuple[float, float]]:
    return {g["name"]: (float(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups}


def replace(optimizer: Optimizer) -> None:
    """Gaussian splatting and resized embeddings do this."""
    old = optimizer.param_groups[1]
    optimizer.param_groups[1] = {**old, "params": [parameter()]}


def add_in_front(optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": [parameter()], "name": "d", "lr": 3e-3, "weight_decay": 0.01})
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())


def delete_and_add(optimizer: Optimizer) -> None:
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": [parameter()], "name": "d", "lr": 3e-3, "weight_decay": 0.01})


def delete_and_load(optimizer: Optimizer) -> None:
    """Each load makes new dicts, in the order of the groups."""
    for param in optimizer.param_groups.pop(0)["params"]:
        del optimizer.state[param]  # torch's state_dict() asks for that
    optimizer.load_state_dict(optimizer.state_dict())


def take_out_and_back(optimizer: Optimizer) -> None:
    group = optimizer.param_groups.pop(0)
    update(optimizer)
    optimizer.param_groups.append(group)


CHANGES: dict[str, Callable[[Optimizer], None]] = {
    "delete the first": lambda o: o.param_groups.__delitem__(0),
    "delete the last": lambda o: o.param_groups.__delitem__(2),
    "reorder": lambda o: o.param_groups.reverse(),
    "replace by a copy": replace,
    "add in front": add_in_front,
    "delete and add": delete_and_add,
    "delete and load": delete_and_load,
    "take out and put back": take_out_and_back,
}


@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("change", CHANGES)
def test_base_values_follow_the_group(change: str, cls: Any) -> None:
    optimizer = three_groups(cls)
    scheduler = make(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, scheduler, 2)
        CHANGES[change](optimizer)
        train(optimizer, scheduler, 1)  # an update at the values written before the change, or as it is added
        train(optimizer, scheduler, 2)
        optimizer, scheduler = pickle.loads(pickle.dumps((optimizer, scheduler)))
        train(optimizer, scheduler, 1)
    all_groups = three_groups(cls)
    all_groups.add_param_group({"params": [parameter()], "name": "d", "lr": 3e-3, "weight_decay": 0.01})
    make(all_groups).go_to(samples=scheduler.samples)
    expected = {name: values for name, values in written(all_groups).items() if name in written(optimizer)}
    assert written(optimizer) == expected
    assert scheduler.get_last_lr() == scheduler.get_lr() == [group["lr"] for group in optimizer.param_groups]


def test_an_update_never_runs_at_the_lr_that_a_returning_group_was_taken_out_with() -> None:
    optimizer = three_groups(torch.optim.AdamW)
    scheduler = make(optimizer)
    group = optimizer.param_groups.pop()
    train(optimizer, scheduler, 5)
    optimizer.param_groups.append(group)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[2]["lr"]))
    update(optimizer)
    assert seen == [pytest.approx(5e-5)]


def test_groups_that_an_engine_hides_during_its_step_keep_their_base_values() -> None:
    """ZeRO steps one group after the other, and shows the optimizer only that one."""
    optimizer = three_groups(torch.optim.AdamW)
    scheduler = make(optimizer)
    for _ in range(5):
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            update(optimizer)
        optimizer.param_groups = groups
        scheduler.step()
    assert scheduler.samples == 500
    assert scheduler.get_last_lr() == [pytest.approx(lr / 2) for lr, _ in NAMED.values()]


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_rebuilt_group_with_annealed_values_is_a_sentence(key: str, tensor: bool) -> None:
    """Its base values are lost; torch's schedulers, which keep them by index, would still use them."""
    optimizer = adamw(lr=torch.tensor(1e-3) if tensor else 1e-3)
    scheduler = make(optimizer)
    train(optimizer, scheduler, 5)
    old = optimizer.param_groups[0]
    optimizer.param_groups[0] = {k: v for k, v in old.items() if k != f"initial_{key}"} | {"params": [parameter()]}
    param = optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match=rf"^parameter group 0 has no 'initial_{key}', and its {key} .* copy it whole"):
        update(optimizer)
    assert torch.equal(param, torch.ones(4))
    optimizer.param_groups[0][f"initial_{key}"] = old[f"initial_{key}"]
    train(optimizer, scheduler, 2)
    assert scheduler.configuration()["groups (lr, min_lr, weight_decay)"] == [[pytest.approx(1e-3), 0.0, 0.05]]


def test_a_rebuilt_group_begins_from_its_own_values() -> None:
    """``add_param_group`` after ``clear``: lr is the optimizer's default, not what was annealed."""
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 5)
    before = written_first(optimizer)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [parameter()]})
    optimizer.add_param_group({"params": [parameter()], "weight_decay": 0.0})
    scheduler.go_to(samples=scheduler.samples)
    assert written_first(optimizer) == before
    assert scheduler.get_last_weight_decay()[1] == 0.0


def written_first(optimizer: Optimizer) -> tuple[float, float]:
    return optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]


@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.AdamW])
def test_base_values_of_a_loaded_optimizer_never_replace_this_jobs(cls: Any) -> None:
    """Nor later, when a group is replaced by a copy of what was loaded."""
    saved = cls([{"params": [parameter()], "lr": 5e-3, "weight_decay": 0.2, "min_lr": 1e-3, "lr_scale": 0.5}])
    make(saved)
    optimizer = cls([parameter()], lr=1e-3, weight_decay=0.05)
    scheduler = make(optimizer)
    optimizer.load_state_dict(saved.state_dict())
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    scheduler.go_to(samples=500)
    assert scheduler.configuration()["groups (lr, min_lr, weight_decay)"] == [[1e-3, 0.0, 0.05]]
    assert scheduler.get_last_lr() == [pytest.approx(5e-4)]


def test_base_values_of_a_checkpoint_follow_the_group() -> None:
    saved = make(three_groups(torch.optim.AdamW)).state_dict()
    optimizer = torch.optim.AdamW([{"params": [parameter()], "lr_scale": 0.5} for _ in range(3)], lr=7e-3)
    scheduler = make(optimizer, min_lr=1e-6)
    scheduler.load_state_dict(saved, on_difference="checkpoint")
    optimizer.param_groups[:] = [dict(group) for group in reversed(optimizer.param_groups)]
    scheduler.go_to(samples=500)
    assert scheduler.get_last_lr() == [pytest.approx(lr / 2) for lr, _ in reversed(NAMED.values())]


def test_another_writer_is_named_by_where_the_group_is_now() -> None:
    optimizer = three_groups(torch.optim.AdamW)
    scheduler = make(optimizer)
    train(optimizer, scheduler, 1)
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.warns(UserWarning, match=r"lr of parameter group 0 is 0\.5"):
        train(optimizer, scheduler, 1)


def test_a_deleted_group_is_let_go_of() -> None:
    optimizer = three_groups(torch.optim.AdamW)
    scheduler = make(optimizer)
    train(optimizer, scheduler, 1)
    param = weakref.ref(optimizer.param_groups[0]["params"][0])
    optimizer.state.clear()
    del optimizer.param_groups[0]
    train(optimizer, scheduler, 1)
    gc.collect()
    assert param() is None
