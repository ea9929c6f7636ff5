"""Write values to the state of one parameter in a shard, and read its exact weights. All local."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.averaging import move_toward_
from dist_adamw.optimizer.kernels.mixed import join_master, split_master_
from dist_adamw.optimizer.sharding.dtensors import local_of, placed_like
from dist_adamw.optimizer.sharding.memory_order import storage_order
from dist_adamw.optimizer.sharding.shard import Shard


def reset(shard: Shard, i: int) -> None:
    """Reset the state of parameter ``i`` to zeros, and its master and averages to the parameter."""
    shard.steps[i] = 0.0
    for name in shard.moments:
        if name == "master" or name in shard.averages:
            _follow_param(shard, i, name)
        else:
            shard.owned_moment(i, name).zero_()


def _follow_param(shard: Shard, i: int, name: str) -> None:
    weight = local_of(shard.params[i]).detach()
    shard.fill(i, name, shard.order.flatten(i, weight))


def put(shard: Shard, i: int, values: Mapping[str, Any]) -> None:
    """Copy values from the user, checked by `user_changes.check_given`, into the state of parameter ``i``.

    Args:
        values: Whole tensors, of which this rank takes its share, or shares; None resets a master to the parameter.
    """
    for name, value in values.items():
        if name == "step":
            shard.steps[i] = float(value)
        elif value is None and name == "remainder":  # the weight is then exactly the parameter
            shard.owned_moment(i, name).zero_()
        elif value is None:
            _follow_param(shard, i, name)
        elif value.shape == shard.params[i].shape:
            shard.fill(i, name, shard.order.flatten(i, placed_like(value, shard.params[i])))
        else:
            shard.owned_moment(i, name).copy_(value)


def load(shard: Shard, i: int, state: Mapping[str, Any], *, is_share: bool) -> None:
    """Copy ``state`` into that of parameter ``i``: this rank's share, or the whole, of which it takes its share."""
    if "exp_avg" not in state:
        return
    shard.steps[i] = float(state["step"])
    param = shard.params[i]
    for name in shard.moments:
        if name not in state:
            continue
        if is_share:
            shard.owned_moment(i, name).copy_(state[name])
        else:
            shard.fill(i, name, storage_order(placed_like(state[name], param), like=local_of(param)))


def average_bucket(shard: Shard, k: int, by: Mapping[str, float | Tensor]) -> None:
    """Move averages of this rank's slice of bucket ``k`` toward its weights.

    Args:
        by: How far each goes, by its name in ``state``: see `move_toward_`.
    """
    if not by:
        return
    operands = shard.buckets[k].operands
    weights = operands.masters or operands.params
    if "remainder" in shard.moments:
        weights = list(map(join_master, operands.params, operands.masters))
    for name, part in by.items():
        move_toward_(shard.buckets[k].columns[name], weights, part)


def average_all(shard: Shard, by: Mapping[str, float | Tensor]) -> None:
    """Move averages toward all of this rank's weights: see `average_bucket`."""
    for k in range(len(shard.buckets)):
        average_bucket(shard, k, by)


def exact_weights(shard: Shard, i: int) -> Tensor:
    """Return a copy of this rank's fp32 weights of parameter ``i``, 1-D, in the order of its ranges."""
    parts = [torch.empty(0, device=shard.steps.device)]  # torch.cat refuses an empty list
    for operands, j in shard.operands_of(i):
        exact = operands.masters[j]
        parts.append(join_master(operands.params[j], exact) if "remainder" in shard.moments else exact)
    return torch.cat(parts)


def set_exact_weights(shard: Shard, i: int, values: Tensor) -> None:
    """Set the weights of parameter ``i`` to ``values``, as `exact_weights` returns them."""
    places = list(shard.operands_of(i))
    numels = [operands.params[j].numel() for operands, j in places]
    for (operands, j), part in zip(places, torch.split(values, numels), strict=True):
        if "remainder" in shard.moments:
            split_master_(part, operands.params[j], operands.masters[j])
        else:
            operands.masters[j].copy_(part)
