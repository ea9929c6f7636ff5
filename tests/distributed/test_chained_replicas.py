"""With replicas, a bucket's all-reduce over them follows its reduce-scatter while backward goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dist_adamw.optimizer import transport
from dist_adamw.optimizer.gradients import sources
from tests.distributed.test_arrival_order import LAYER_NUMEL, Layers, loss_of
from tests.distributed.test_attach import WAYS, Job, constants
from tests.ranks import run_ranks


def check_chained(way: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replicas = mesh.get_group("replicate")
    started: list[str] = []
    reduce = dist.all_reduce
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def all_reduce(tensor: Any, *args: Any, **options: Any) -> Any:
        if options.get("group") is replicas and tensor.is_floating_point() and tensor.numel() > 1:
            started.append("over replicas" if options.get("async_op") else "while the host waits")
        return reduce(tensor, *args, **options)

    def reduce_scatter(*args: Any, **options: Any) -> Any:
        started.append("over shards")
        return scatter(*args, **options)

    with constants(transport, sends_from_host=lambda *_: False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "reduce_scatter_single", reduce_scatter, raising=False)
        patch.setattr(sources, "_LOOK_EVERY", 1)
        options = {"eps": 0.1, "mesh": mesh, "max_grad_norm": math.inf}
        job = Job(way, options, Layers("as used"), loss_of, bucket_numel=LAYER_NUMEL)
        last = job.model.used[0].bias
        before_last: list[list[str]] = []
        last.register_hook(lambda _: before_last.append([*started]))
        for step in range(3):
            started.clear()
            job.train(range(step, step + 1))
            job.check(rtol=1e-5, atol=1e-7)  # two pairs are added, not four in a row
        count = len(started) // 2
        assert count >= 20
        assert started == ["over shards", "over replicas"] * count
        assert before_last[-1].count("over replicas") >= 0.85 * count


@pytest.mark.parametrize("way", ["plain", "every backward"])
def test_sums_over_replicas_start_during_backward(way: str) -> None:
    run_ranks(4, check_chained, WAYS[way])
