"""CyclicLRWithRestarts: its state, through a file, into another job."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dist_adamw import CheckpointError, CyclicLRWithRestarts, DistAdamW, ReduceMaxLROnRestart, load, save
from dist_adamw.schedule.saved import OnDifference
from tests.unit.test_scheduler import adamw, make, parameter, train


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, the safe way."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_resume_at_every_update_of_three_cycles() -> None:
    options = {"restart_period": 0.7, "t_mult": 1.5, "eta_on_restart_cb": ReduceMaxLROnRestart(0.5)}
    reference = adamw()
    whole = train(reference, make(reference, **options), 40)
    optimizer = adamw()
    scheduler = make(optimizer, **options)
    for k in range(40):
        state = saved(scheduler.state_dict())
        again = adamw()
        resumed = make(again, **options)
        resumed.load_state_dict(state)
        group = again.param_groups[0]  # lr and weight decay are in the groups at once
        assert (resumed.samples, group["lr"], group["weight_decay"]) == whole[k]
        assert train(again, resumed, 40 - k) == whole[k:]
        train(optimizer, scheduler, 1)


def test_a_different_configuration_is_a_diff_and_the_caller_chooses() -> None:
    optimizer = adamw()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 5)
    state = saved(scheduler.state_dict())
    other = make(adamw(lr=2e-3), restart_period=2)
    with pytest.raises(ValueError, match=r"restart_period was 1 and is 2") as raised:
        other.load_state_dict(state)
    assert "groups (lr, min_lr, weight_decay) was [[0.001" in str(raised.value)
    assert other.samples == 0
    other.load_state_dict(state, on_difference="new")
    assert other.get_last_lr() == [pytest.approx(2e-3 * (1 + math.cos(math.pi / 4)) / 2)]
    other.load_state_dict(state, on_difference="checkpoint")
    assert other.get_last_lr() == scheduler.get_last_lr()
    assert other.cycle == scheduler.cycle


def test_a_function_cannot_come_from_a_checkpoint() -> None:
    state = saved(make(adamw(), eta_on_restart_cb=ReduceMaxLROnRestart(0.5)).state_dict())
    scheduler = make(adamw())
    with pytest.raises(ValueError, match=r"eta_on_restart_cb='ReduceMaxLROnRestart\(ratio=0\.5\)'"):
        scheduler.load_state_dict(state, on_difference="checkpoint")


def test_a_foreign_state_is_refused() -> None:
    scheduler = make(adamw())
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([parameter()], lr=0.1), 3)
    with pytest.raises(ValueError, match="not a state of CyclicLRWithRestarts"):
        scheduler.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="on_difference must be"):
        scheduler.load_state_dict(scheduler.state_dict(), on_difference=cast(Any, "maybe"))


def test_resume_with_another_global_batch_keeps_lr_and_moves_the_norm() -> None:
    options = {"policy": "exp_range", "gamma": 0.9, "restart_period": 3}
    optimizer = adamw()
    scheduler = make(optimizer, **options)
    train(optimizer, scheduler, 7)
    again = adamw()
    resumed = make(again, **options, batch_size=400)
    resumed.load_state_dict(saved(scheduler.state_dict()))
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert resumed.batch_size == 400
    assert resumed.get_last_weight_decay()[0] == pytest.approx(2 * scheduler.get_last_weight_decay()[0])


def test_resume_with_a_group_that_was_added_in_between() -> None:
    def job(updates: int) -> tuple[DistAdamW, CyclicLRWithRestarts]:
        optimizer = adamw()
        scheduler = make(optimizer)
        train(optimizer, scheduler, min(updates, 3))
        optimizer.add_param_group({"params": [parameter()], "lr": 1e-2})
        train(optimizer, scheduler, updates - 3)
        return optimizer, scheduler

    optimizer, scheduler = job(5)
    again = adamw()
    resumed = make(again)
    again.add_param_group({"params": [parameter()], "lr": 1e-2})
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert train(again, resumed, 4) == train(optimizer, scheduler, 4)


def test_a_state_without_its_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="not a state of CyclicLRWithRestarts version 1"):
        make(adamw()).load_state_dict({"version": 1, "samples": 5})


def test_a_function_of_this_job_may_be_given_up_for_the_checkpoints_none() -> None:
    state = saved(make(adamw()).state_dict())
    scheduler = make(adamw(), eta_on_restart_cb=ReduceMaxLROnRestart(0.5))
    scheduler.load_state_dict(state, on_difference="checkpoint")
    assert scheduler.preview(cycles=2).rows[1].peak_lr == pytest.approx(1e-3)


@pytest.mark.parametrize("choice", ["strict", "checkpoint", "new"])
def test_a_configuration_with_other_keys_is_refused(choice: OnDifference) -> None:
    scheduler = make(adamw())
    state = saved(scheduler.state_dict())
    assert state["configuration"]["policy_fn"] is None  # a key that is missing must not pass for None
    without = {k: v for k, v in state["configuration"].items() if k != "policy_fn"}
    for configuration in (without, {**state["configuration"], "warmup": 100}):
        other = {**state, "samples": 500, "configuration": configuration}
        with pytest.raises(ValueError, match=r"missing or unknown: \['(policy_fn|warmup)'\]"):
            scheduler.load_state_dict(other, on_difference=choice)
        assert scheduler.samples == 0


def test_a_configuration_whose_decay_is_no_number_changes_nothing() -> None:
    scheduler = make(adamw())
    state = saved(scheduler.state_dict())
    state |= {"samples": 500}
    state["configuration"]["groups (lr, min_lr, weight_decay)"] = [[1e-315, 0.0, 0.05]]
    with pytest.raises(ValueError, match="is not a finite number"):
        scheduler.load_state_dict(state, on_difference="checkpoint")
    assert scheduler.samples == 0
    assert scheduler.get_lr() == [1e-3]


@pytest.mark.parametrize("choice", ["strict", "checkpoint", "new"])
def test_an_epoch_size_that_was_not_known_yet_is_no_difference(choice: OnDifference) -> None:
    state = saved(make(adamw(), epoch_size=None).state_dict())
    scheduler = make(adamw())
    scheduler.load_state_dict(state, on_difference=choice)
    assert scheduler.epoch_size == 1000
    waiting = make(adamw(), epoch_size=None)
    waiting.load_state_dict(saved(scheduler.state_dict()), on_difference=choice)
    assert waiting.epoch_size == 1000


def test_resume_after_a_group_was_deleted(tmp_path: Path) -> None:
    """An unfreezing script drops the old head: the remaining groups keep their own base values."""

    def job(delete: bool = True) -> tuple[torch.nn.Module, DistAdamW, CyclicLRWithRestarts]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        lrs_and_decays = ((1e-2, 0.0), (1e-3, 0.05))
        optimizer = DistAdamW(
            {"params": layer.parameters(), "lr": lr, "weight_decay": decay}
            for layer, (lr, decay) in zip(model, lrs_and_decays, strict=True)
        )
        scheduler = make(optimizer)
        if delete:
            del optimizer.param_groups[0]
        return model, optimizer, scheduler

    model, optimizer, scheduler = job()
    train(optimizer, scheduler, 3)
    save(tmp_path / "c", model, optimizer, scheduler)
    again = job()
    load(tmp_path / "c", *again)
    assert (
        again[2].get_last_lr() == scheduler.get_last_lr() == [pytest.approx(1e-3 * (1 + math.cos(0.3 * math.pi)) / 2)]
    )
    assert train(*again[1:], 4) == train(optimizer, scheduler, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again[0].parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"groups .* was \[\[0\.001, 0\.0, 0\.05\]\] and is \[\[0\.01, "):
        load(tmp_path / "c", *job(delete=False))
