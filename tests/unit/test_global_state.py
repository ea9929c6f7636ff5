"""torch's ``optimizer.state`` may have entries that are not of a parameter. DistAdamW refuses them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_adamw import DistAdamW


def optimizer_with(key: str, value: object, updates: int) -> DistAdamW:
    optimizer = optimizer_with_updates(updates)
    optimizer.state[key] = value  # type: ignore[index]
    return optimizer


def optimizer_with_updates(updates: int) -> DistAdamW:
    optimizer = DistAdamW([nn.Parameter(torch.ones(3))], lr=0.1)
    for _ in range(updates):
        step(optimizer)
    return optimizer


CALLS: dict[str, Callable[[DistAdamW], object]] = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "step": lambda optimizer: step(optimizer),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
}


def step(optimizer: DistAdamW) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("value", [1, {"a": 1}])
def test_an_entry_that_is_not_of_a_parameter_is_refused(
    call: Callable[[DistAdamW], object], updates: int, value: object
) -> None:
    optimizer = optimizer_with("mine", value, updates)
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=r"optimizer\.state\['mine'\] is not the state of a parameter.*elsewhere"):
        call(optimizer)
    assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))


def test_one_that_a_hook_of_load_state_dict_adds_is_refused() -> None:
    optimizer = DistAdamW([nn.Parameter(torch.ones(3))], lr=0.1)
    saved = optimizer.state_dict()

    def note(one: Any) -> None:
        one.state["loaded"] = True

    optimizer.register_load_state_dict_post_hook(note)
    with pytest.raises(ValueError, match=r"optimizer\.state\['loaded'\] is not the state of a parameter"):
        optimizer.load_state_dict(saved)


def test_one_that_a_hook_of_state_dict_adds_is_refused() -> None:
    optimizer = optimizer_with_updates(2)
    optimizer.register_state_dict_pre_hook(lambda one: one.state.update(mine=1))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"optimizer\.state\['mine'\] is not the state of a parameter"):
        optimizer.state_dict()


@pytest.mark.parametrize("value", [1, {"a": 1}])
def test_what_a_hook_adds_to_the_state_dict_stays(value: object) -> None:
    optimizer = optimizer_with_updates(2)
    optimizer.register_state_dict_post_hook(lambda _, saved: saved["state"].update(mine=value))
    assert list(optimizer.state_dict()["state"]) == [0, "mine"]
    assert optimizer.state_dict()["state"]["mine"] == value


def test_state_of_a_parameter_that_has_left_the_groups_is_no_error() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = DistAdamW([{"params": [param]} for param in params], lr=0.1)
    step(optimizer)
    params[1].grad = torch.ones(3)
    optimizer.step()
    del optimizer.param_groups[1]
    step(optimizer)
    assert optimizer.updates == 3
