"""Plans of numbers are those of torch's planner."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor
from dist_adamw.checkpoint.storage.planner import Planner


def held(rank: int) -> dict[str, Tensor]:
    edges = [(0, 7), (7, 12)][rank]  # of a tensor of 3 x 4: regions of a row, and of a part of one
    return {
        "weight": PartialTensor.of_ranges((3, 4), torch.zeros(edges[1] - edges[0]), [edges], dtype=torch.float32),
        "on all ranks": torch.zeros(5, dtype=torch.int64),
        "scalar": torch.tensor(1.0),
        f"rng.{rank}": torch.zeros(8, dtype=torch.uint8),
    }


def sent(plans: list[SavePlan]) -> list[SavePlan]:
    return [pickle.loads(pickle.dumps(plan)) for plan in plans]


def plans_of(planners: list[SavePlanner]) -> tuple[list[SavePlan], Metadata]:
    for rank, planner in enumerate(planners):
        planner.set_up_planner(held(rank) if type(planner) is DefaultSavePlanner else {}, None, rank == 0)
    chosen, metadata = planners[0].create_global_plan(sent([planner.create_local_plan() for planner in planners]))
    return [planner.finish_plan(plan) for planner, plan in zip(planners, sent(chosen), strict=True)], metadata


def test_ranks_write_what_torchs_planner_has_them_write() -> None:
    torchs = [DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False) for _ in range(2)]
    expected, their_metadata = plans_of([*torchs])
    ours: list[SavePlanner] = [Planner(held(rank)) for rank in range(2)]
    found, metadata = plans_of(ours)
    assert [plan.items for plan in found] == [plan.items for plan in expected]
    assert metadata == their_metadata
    for planner, plan in zip(ours, found, strict=True):
        sizes = [tuple(planner.resolve_data(item).shape) for item in plan.items]  # type: ignore[union-attr]
        assert sizes == [tuple(item.tensor_data.chunk.sizes) for item in plan.items]  # type: ignore[union-attr]
