"""Mistakes of github.com/mpyrozhok/adamwr, one test each."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from dist_adamw import CyclicLRWithRestarts, DistAdamW, ReduceMaxLROnRestart
from tests.unit.test_scheduler import adamw, make, parameter, train


def lr_at(scheduler: CyclicLRWithRestarts, samples: int) -> float:
    return scheduler.schedule.lr(scheduler.schedule.at(samples), 1e-3, 0.0)


def test_first_batch_after_a_restart_runs_at_the_peak_with_decay() -> None:
    optimizer = adamw(decay_by="schedule")
    rows = {s: (lr, decay) for s, lr, decay in train(optimizer, make(optimizer), 40)}
    for start in (0, 1000, 3000):
        lr, decay = rows[start]
        assert lr == 1e-3
        assert decay > 0
    assert rows[1000][1] == pytest.approx(0.05 * math.sqrt(100 / 2000))


def test_exp_range_does_not_compound_gamma() -> None:
    scheduler = make(adamw(), policy="exp_range", gamma=0.9, triangular_step=0.0, t_mult=1)
    for k in range(30):  # the original's amplitude after k batches is gamma ** (k (k + 1) / 2)
        assert lr_at(scheduler, 100 * k) == pytest.approx(1e-3 * 0.9**k * (1 - (k % 10) / 10))


def test_fractional_periods_are_not_rounded_up() -> None:
    scheduler = make(adamw(), restart_period=2.5, t_mult=1)
    assert [row.first_sample for row in scheduler.preview(cycles=3).rows] == [0, 2500, 5000]


def test_shrinking_periods_shrink() -> None:
    scheduler = make(adamw(), restart_period=5, t_mult=0.9)
    assert [row.epochs for row in scheduler.preview(cycles=3).rows] == pytest.approx([5, 4.5, 4.05])


def test_restart_period_one_reaches_its_peak() -> None:
    optimizer = adamw()
    scheduler = make(optimizer, restart_period=1, t_mult=1, policy="triangular")
    assert max(lr for _, lr, _ in train(optimizer, scheduler, 10)) == 1e-3


def test_more_batches_than_an_epoch_has_do_not_raise_stop_iteration() -> None:
    optimizer = adamw()
    scheduler = make(optimizer, epoch_size=250)
    train(optimizer, scheduler, 12)
    assert scheduler.samples == 4 * 250


def test_fewer_batches_than_an_epoch_has_do_not_shift_the_restart() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 5)  # half an epoch, then the user's loop begins again
    train(optimizer, scheduler, 4)
    assert scheduler.cycle == 0
    train(optimizer, scheduler, 1)
    assert scheduler.cycle == 1


def test_resuming_does_not_take_the_annealed_weight_decay_for_the_base() -> None:
    optimizer = adamw(decay_by="schedule")
    scheduler = make(optimizer)
    rows = train(optimizer, scheduler, 20)
    again = adamw(decay_by="schedule")
    again.load_state_dict(optimizer.state_dict())  # groups hold annealed values now
    resumed = make(again)
    resumed.load_state_dict(scheduler.state_dict())
    assert train(again, resumed, 5) == train(optimizer, scheduler, 5)
    assert rows[0][2] == pytest.approx(0.05 * math.sqrt(0.1))


def test_state_is_plain_data_that_a_safe_load_accepts() -> None:
    options: dict[str, Any] = {"policy_fn": lambda tau: 1 - tau, "eta_on_restart_cb": ReduceMaxLROnRestart(0.5)}
    file = io.BytesIO()
    torch.save(make(adamw(), **options).state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["samples"] == 0


def test_loading_touches_the_optimizers_lr_and_weight_decay() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 15)
    again = adamw()
    make(again).load_state_dict(scheduler.state_dict())
    for key in ("lr", "weight_decay"):
        assert again.param_groups[0][key] == optimizer.param_groups[0][key]


def test_added_parameter_groups_are_not_ignored() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 3)
    optimizer.add_param_group({"params": [parameter()], "lr": 1e-2})
    train(optimizer, scheduler, 2)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(5e-3)


def test_a_bad_policy_name_fails_at_once() -> None:
    with pytest.raises(ValueError, match="unknown policy 'cosnie'"):
        make(adamw(), policy="cosnie")


def test_triangular2_keeps_the_users_callback() -> None:
    scheduler = make(
        adamw(), policy="triangular2", t_mult=1, triangular_step=0.0, eta_on_restart_cb=ReduceMaxLROnRestart(0.5)
    )
    assert lr_at(scheduler, 2000) == pytest.approx(1e-3 * 0.25 * 0.25)


def test_the_model_does_not_diverge_after_restarts() -> None:
    """adamwr #8: a quadratic keeps falling from cycle to cycle."""
    param = parameter(3.0)
    optimizer = DistAdamW([param], lr=0.1, weight_decay=0.01)
    scheduler = make(optimizer, restart_period=2, t_mult=2)
    ends = []
    for _ in range(3):
        cycle = scheduler.cycle
        while scheduler.cycle == cycle:
            optimizer.zero_grad()
            param.square().sum().backward()
            optimizer.step()
            scheduler.step()
        ends.append(param.square().sum().item())
    assert ends[0] > ends[1] > ends[2]
    assert ends[2] < 36.0 / 1000  # from 36 at the start
