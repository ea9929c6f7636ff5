"""lr and weight decay of all groups at once: the bits of the formulas for one group, whatever the user changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dist_adamw import CyclicLRWithRestarts, DistAdamW
from dist_adamw.schedule import RestartSchedule, SchedulePoint
from tests.unit.test_scheduler import make, parameter, update


def two_groups(kind: type = DistAdamW, **options: Any) -> Any:
    groups = [
        {"params": [parameter()], "lr": 1e-3, "weight_decay": 0.05, "lr_scale": 0.3},
        {"params": [parameter()], "lr": 7e-3, "weight_decay": 0.0, "min_lr": 1e-5},
    ]
    return kind(groups, **options)


def check_values(scheduler: CyclicLRWithRestarts) -> None:
    """Compare the written values with those that a new schedule gives for each group alone."""
    recipe, optimizer = scheduler._scheduled.recipe, scheduler.optimizer
    assert recipe.epoch_size is not None
    assert recipe.reference_batch_size is not None
    schedule = RestartSchedule(epoch_size=recipe.epoch_size, batch_size=recipe.reference_batch_size, **recipe.options)
    point = schedule.at(scheduler.samples)
    wanted = recipe.group_values(point, scheduler._scheduled.groups, optimizer)
    for group, (lr, decay) in zip(optimizer.param_groups, wanted, strict=True):
        assert group["lr"] == lr
        assert decay is None or group["weight_decay"] == decay
    assert scheduler.get_last_lr() == [lr for lr, _ in wanted]


@pytest.mark.parametrize("policy", ["cosine", "arccosine", "triangular2", "exp_range"])
@pytest.mark.parametrize("options", [{"decay_by": "lr"}, {"decay_by": "schedule"}, {"kind": torch.optim.AdamW}])
def test_every_update_has_the_values_of_its_sample(policy: str, options: dict[str, Any]) -> None:
    optimizer = two_groups(**options)
    choices: dict[str, Any] = {"policy": policy, "t_mult": "1.3", "restart_period": "0.3", "gamma": 0.99}
    scheduler = make(optimizer, warmup_samples=250, warmup_start_lr=1e-4, lr_scaling="sqrt", **choices)
    for n in range(60):
        if n == 20:
            scheduler.batch_size = 50
        if n == 30:
            optimizer.add_param_group({"params": [parameter()], "lr": 2e-3, "weight_decay": 0.01})
        if n == 40:
            scheduler.go_to(samples=777)
        if n == 50:
            optimizer.param_groups.reverse()
        update(optimizer)
        scheduler.step()
        check_values(scheduler)
    assert scheduler.cycle > 1


@pytest.mark.parametrize("seed", range(5))
def test_lookups_in_any_order_are_those_of_a_new_schedule(seed: int) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"epoch_size": 97, "batch_size": 8, "restart_period": "1.7", "t_mult": "1.1"}
    schedule, samples, step = RestartSchedule(**options, warmup_samples=31), 0, 8
    for _ in range(400):
        assert schedule.at(samples) == RestartSchedule(**options, warmup_samples=31).at(samples)
        if rng.random() < 0.1:
            step = rng.choice([1, 8, 13, 40])
        samples = rng.randrange(5000) if rng.random() < 0.03 else samples + step


def test_a_function_of_the_user_is_called_only_for_samples_that_are_reached() -> None:
    asked: list[float] = []

    def policy(tau: float) -> float:
        asked.append(tau)
        return 1.0 - tau

    schedule = RestartSchedule(epoch_size=1000, batch_size=10, restart_period=1, policy_fn=policy)
    points: list[SchedulePoint] = [schedule.at(samples) for samples in range(0, 100, 10)]
    assert asked == [point.tau for point in points]


def test_what_the_optimizer_does_with_weight_decay_may_change_at_any_time() -> None:
    optimizer = two_groups(torch.optim.Adam)
    for group in optimizer.param_groups:
        group["decoupled_weight_decay"] = False  # torch.optim.Adam of some versions has no such key
    scheduler = make(optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    update(optimizer)
    optimizer.param_groups[0]["decoupled_weight_decay"] = True
    scheduler.step()
    check_values(scheduler)
    assert optimizer.param_groups[0]["weight_decay"] != 0.05
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
