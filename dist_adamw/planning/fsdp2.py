"""FSDP2 with DistAdamW: parameters, gradients and state divided by rows, and layers gathered one at a time.

The sizes and the order of allocations are those of torch 2.13: ``_init_sharded_param`` (padded shards),
``FSDPParamGroup.unshard``, ``wait_for_unshard``, ``post_backward`` and ``foreach_reduce`` in
torch/distributed/fsdp/_fully_shard. `fully_shard` is called on each layer, and then on the model, which takes the rest:
those parameters are not resharded after forward.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from dist_adamw.optimizer.transport.layout import FlatLayout
from dist_adamw.planning.memory import Cost, Memory, Setup, Timeline, sum_bytes
from dist_adamw.planning.model import ModelShapes, Parameter

FSDP2 = "FSDP2"
_STEP = 4  # bytes of a parameter's step count


@dataclass(frozen=True, slots=True)
class _Group:
    """The bytes of the parameters that are gathered together.

    Attributes:
        whole: Of the gathered parameters, padding included.
        shard: Of this rank's part of them, as it is kept between passes.
        gradients: Of whole gradients, as backward computes them.
        reduced: Of the input of the reduce-scatter, padding included.
        averages: Of this rank's part of the gradients.
        sums: Elements of this rank's part of the gradients, which are added up in fp32.
        largest: Of the largest gradient.
        tied: Of the largest gradient that several modules add to.
    """

    whole: int
    shard: int
    gradients: int
    reduced: int
    averages: int
    sums: int
    largest: int
    tied: int

    @classmethod
    def of(cls, params: list[Parameter], ranks: int, setup: Setup, tied: Collection[Parameter]) -> _Group:
        """Return the group of ``params``."""
        whole = shard = gradients = reduced = averages = sums = largest = several = 0
        for param in params:
            width = _gathered(param.dtype, setup).itemsize
            padded = chunk_numel(param, ranks) * ranks
            whole += padded * width
            shard += padded // ranks * param.dtype.itemsize
            if param.trained:
                gradients += param.numel * width
                largest = max(largest, param.numel * width)
                several = max(several, param.numel * width if param in tied else 0)
                reduced += padded * width
                averages += padded // ranks * param.dtype.itemsize
                sums += padded // ranks
        return cls(whole, shard, gradients, reduced, averages, sums, largest, several)


def chunk_numel(param: Parameter, ranks: int) -> int:
    """Return the elements of a parameter that each rank stores: equal chunks of rows, the last ones padded."""
    rows, *rest = param.shape or (1,)
    return -(-rows // ranks) * math.prod(rest)


def _gathered(dtype: torch.dtype, setup: Setup) -> torch.dtype:
    return torch.bfloat16 if setup.bf16 and dtype.is_floating_point else dtype


def fsdp2(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what FSDP2 needs on rank 0, which has the most rows."""
    groups = _groups(model, ranks, setup)
    parameters = sum(group.shard for group in groups) + model.buffer_bytes
    gradients = sum(group.averages for group in groups)
    state = 0
    for dtype, params in model.by_dtype().items():
        layout = FlatLayout(tuple(_rows_of_first_rank(param, ranks) for param in params))
        state += layout.shard_numel * setup.state_bytes(dtype) + _STEP * len(params)
    peak = _peak(groups, ranks, setup)
    memory = Memory(parameters, gradients, state, max(0, peak - gradients), setup.activations)
    return Cost(FSDP2, ranks, memory, _sent(groups, ranks, setup), _note(model, setup))


def _groups(model: ModelShapes, ranks: int, setup: Setup) -> list[_Group]:
    """Return the groups, the rest of the model first."""
    by_layer: dict[int | None, list[Parameter]] = {None: []}
    for param in model.parameters:
        by_layer.setdefault(param.layer, []).append(param)
    rest = by_layer.pop(None)
    order = [rest, *(by_layer[layer] for layer in sorted(by_layer, key=lambda layer: layer or 0))]
    tied = model.tied
    return [_Group.of(params, ranks, setup, tied) for params in order]


def _rows_of_first_rank(param: Parameter, ranks: int) -> int:
    return min(chunk_numel(param, ranks), param.numel)


def _peak(groups: list[_Group], ranks: int, setup: Setup) -> int:
    """Return the largest sum of gathered parameters, whole gradients and averages in an update."""
    time = Timeline()
    rounds = min(setup.accumulation, 3)  # all micro-batches between the first and the last are alike
    for micro_batch in range(rounds):
        is_first, is_last = micro_batch == 0, micro_batch == rounds - 1
        _forward(groups, time, setup)
        # Accelerate's accumulate() adds micro-batches up in whole gradients, and reduces them in the last one.
        _backward(groups, time, setup, first=is_first, reduces=is_last or setup.reproducible)
        if setup.reproducible and not is_first:  # the averages before this pass were kept to its end
            time.drop(sum(group.averages for group in groups))
    if setup.reproducible:
        numel = sum(group.sums for group in groups)
        return time.peak + sum_bytes(setup, ranks, numel, len(groups), dtype=torch.float32, home=False)
    return time.peak


def _forward(groups: list[_Group], time: Timeline, setup: Setup) -> None:
    """Gather group after group; the output of a gather is freed when the next one has been copied out."""
    held = 0
    for number, group in enumerate(groups):
        time.add(group.whole)
        time.add(group.whole)
        time.drop(held)
        held = group.whole
        if number and setup.reshard_after_forward:
            time.drop(group.whole)
    time.drop(held)


def _compute_gradients(group: _Group, time: Timeline, *, are_new: bool) -> None:
    if are_new:
        time.add(group.gradients)
    else:  # each is added to that of the earlier micro-batches
        time.add(group.largest)
        time.drop(group.largest)


def _backward(groups: list[_Group], time: Timeline, setup: Setup, *, first: bool, reduces: bool) -> None:
    """Gather each group again while the one before it computes gradients, and reduce these."""
    rest, *layers = groups
    is_gathered = not setup.reshard_after_forward
    held = 0  # the input of the last reduce-scatter
    time.add(rest.gradients if first or setup.reproducible else rest.tied)
    ahead = 0 if is_gathered or not layers else layers[-1].whole
    time.add(ahead)
    for number in range(len(layers) - 1, -1, -1):
        group = layers[number]
        if not is_gathered:
            time.add(group.whole)
            time.drop(ahead)
            ahead = layers[number - 1].whole if number else 0
            time.add(ahead)
        _compute_gradients(group, time, are_new=first or setup.reproducible)
        time.drop(group.whole)
        held = _reduce(group, time, held, setup, reduces=reduces)
    time.add(2 * rest.tied)  # a tied weight's gradient: two terms, and their sum
    time.drop(2 * rest.tied if first or setup.reproducible else 3 * rest.tied)
    time.drop(rest.whole)
    held = _reduce(rest, time, held, setup, reduces=reduces)
    time.drop(held)


def _reduce(group: _Group, time: Timeline, held: int, setup: Setup, *, reduces: bool) -> int:
    """Reduce-scatter the gradients of a group; return the bytes of its input, which is held."""
    if not reduces:
        return held
    time.drop(held)
    time.add(group.reduced)
    time.drop(group.gradients)
    time.add(group.averages)
    if setup.reproducible:  # `GroupSum` receives the terms of all ranks
        time.add(group.reduced)
        time.drop(group.reduced)
    return group.reduced


def _sent(groups: list[_Group], ranks: int, setup: Setup) -> int:
    """Return the bytes of gathers in every forward and backward pass, and of reduce-scatters."""
    rest, *layers = groups
    gathers = 2 if setup.reshard_after_forward else 1
    gathered = rest.whole + gathers * sum(layer.whole for layer in layers)
    rounds = setup.accumulation if setup.reproducible else 1
    reduced = rounds * sum(group.reduced for group in groups)
    return (ranks - 1) * (setup.accumulation * gathered + reduced) // ranks


def _note(model: ModelShapes, setup: Setup) -> str:
    if not model.layers:
        return "no layers were found, so all parameters are gathered at once: name their class"
    if setup.accumulation > 1 and not setup.reproducible:
        return "whole gradients of all layers between the micro-batches of an update"
    return ""
