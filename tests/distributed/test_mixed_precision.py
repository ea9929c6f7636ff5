"""bf16 parameters with exact weights in the shard: on any number of ranks, and through checkpoints."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW, load, save
from dist_adamw.optimizer.sharding.dtensors import local_of
from dist_adamw.optimizer.sharding.values import exact_weights
from tests.distributed.test_attach import averaged
from tests.ranks import run_ranks

MASTERS = [torch.float32, torch.int16]


class Small(nn.Module):
    """Return bf16 weights with an fp32 norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(37, 41, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(41)
        self.second = nn.Linear(41, 3, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x.bfloat16()).float()).tanh()
        return self.second(hidden.bfloat16()).float()


def backward(model: nn.Module, step: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1000 * step + rank)
    model(torch.randn(4, 37, generator=generator)).square().mean().backward()


class Pair:
    """DistAdamW on bf16 parameters, and torch.optim.AdamW on fp32 copies of them, fed the same averages."""

    def __init__(self, **options: Any) -> None:
        self.model = Small()
        self.weights = [nn.Parameter(p.detach().float()) for p in self.model.parameters()]
        self.optimizer = DistAdamW(self.model.parameters(), lr=1e-3, bucket_numel=500, **options)
        if dist.get_world_size() > 1:
            self.optimizer.attach(self.model)
        clip = options.get("max_grad_norm")
        self.clip = None if clip is None else float(clip)
        theirs = {k: v for k, v in options.items() if k in ("eps", "amsgrad")}
        self.reference = torch.optim.AdamW(self.weights, lr=1e-3, fused=True, **theirs)

    def train(self, steps: range, *, follow: bool = True) -> None:
        for step in steps:
            twin = copy.deepcopy(self.model) if follow else None
            if twin is not None:
                backward(twin, step)
                for weight, average in zip(self.weights, averaged([p.grad for p in twin.parameters()]), strict=True):
                    assert average is not None
                    weight.grad = average.float()
            backward(self.model, step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if follow:
                if self.clip is not None:
                    torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
                self.reference.step()

    def masters(self) -> list[Tensor]:
        """This rank's elements of the exact weights, by parameter."""
        found = {}
        for shard in self.optimizer.shards:
            for i, param in enumerate(shard.params):
                own = torch.cat([torch.empty(0), *(param.detach().view(-1)[a:b] for a, b in shard.owned.ranges_of(i))])
                found[param] = exact_weights(shard, i) if shard.has_master else own
        return [found[p] for p in self.model.parameters()]

    def expected(self) -> list[Tensor]:
        weights: dict[Tensor, Tensor] = dict(zip(self.model.parameters(), self.weights, strict=True))
        found = {}
        for shard in self.optimizer.shards:
            for i, param in enumerate(shard.params):
                weight = weights[param].detach().view(-1)
                found[param] = torch.cat([torch.empty(0), *(weight[a:b] for a, b in shard.owned.ranges_of(i))])
        return [found[p] for p in self.model.parameters()]


def check_exact(options: dict[str, Any]) -> int:
    pair = Pair(**options)
    pair.train(range(30))
    for mine, theirs in zip(pair.masters(), pair.expected(), strict=True):
        if "max_grad_norm" in options:  # the norm is summed in another order
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine, theirs)
    for param, weight in zip(pair.model.parameters(), pair.weights, strict=True):
        torch.testing.assert_close(param.float(), weight.detach(), rtol=2**-8, atol=0)
    return pair.optimizer.state_bytes


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"amsgrad": True}, {"max_grad_norm": 0.01}], ids=repr)
@pytest.mark.parametrize("master_dtype", MASTERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_those_of_fp32_training(
    world_size: int, master_dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Fed the same bf16 gradients, the exact weights are the bits of torch.optim.AdamW on fp32 ones."""
    sizes = run_ranks(world_size, check_exact, {"master_dtype": master_dtype, **options})
    numel = 37 * 41 + 41 + 3 * 41 + 3
    moments = 12 if "amsgrad" in options else 8
    bf16, fp32 = moments + master_dtype.itemsize, moments
    most = (bf16 * numel + fp32 * 82) / world_size + (bf16 + fp32) * (31 * 4 + 32) + 24
    assert (bf16 * numel + fp32 * 82) / world_size <= max(sizes) <= most


def check_bf16_moments() -> tuple[int, float]:
    pair = Pair(master_dtype=torch.int16, state_dtype=torch.bfloat16, betas=(0.9, 0.99))
    for group in pair.reference.param_groups:
        group["betas"] = (0.9, 0.99)
    pair.train(range(30))
    differences = [
        float((a - b).abs().max()) for a, b in zip(pair.masters(), pair.expected(), strict=True) if a.numel()
    ]
    return pair.optimizer.state_bytes, max(differences)


def test_bf16_moments_take_half_the_memory_and_cost_some_of_an_update() -> None:
    for nbytes, difference in run_ranks(2, check_bf16_moments):
        assert nbytes < 6 * 1684 / 2 + 4 * 82 / 2 + 10 * 31 * 6 + 24
        assert 0 < difference < 30 * 1e-3 * 0.1  # a tenth of what 30 updates may move a weight


def save_and_go_on(folder: str, saved: str, loaded: str) -> list[Tensor]:
    pair = Pair(master_dtype=getattr(torch, saved))
    pair.train(range(5), follow=False)
    save(folder, pair.model, pair.optimizer)
    pair.train(range(5, 9), follow=False)
    return [p.detach().clone() for p in pair.model.parameters()]


def load_and_go_on(folder: str, saved: str, loaded: str) -> list[Tensor]:
    pair = Pair(master_dtype=getattr(torch, loaded))
    pair.train(range(3), follow=False)  # what is here is replaced
    load(folder, pair.model, pair.optimizer)
    pair.train(range(5, 9), follow=False)
    return [p.detach().clone() for p in pair.model.parameters()]


@pytest.mark.parametrize(
    ("saved", "loaded"), [("float32", "float32"), ("int16", "int16"), ("int16", "float32"), ("float32", "int16")]
)
def test_exact_weights_go_through_a_checkpoint_into_either_kind(saved: str, loaded: str, tmp_path: Path) -> None:
    gone_on = run_ranks(2, save_and_go_on, str(tmp_path), saved, loaded)[0]
    resumed = run_ranks(2, load_and_go_on, str(tmp_path), saved, loaded)[0]
    # A tie is rounded up beside a remainder and to even beside an fp32 master.
    for p, q in zip(gone_on, resumed, strict=True):
        assert torch.equal(p, q) or saved != loaded
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-6)


def check_loaded_weights_are_taken_over() -> None:
    pair = Pair(master_dtype=torch.float32)
    pair.train(range(3))
    with torch.no_grad():
        pair.model.second.bias[1] = 7.0
        pair.weights[-1][1] = 7.0
    pair.train(range(3, 6))
    for mine, theirs in zip(pair.masters(), pair.expected(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_that_somebody_wrote_are_taken_over_and_the_others_keep_their_bits() -> None:
    for world_size in (1, 2):
        run_ranks(world_size, check_loaded_weights_are_taken_over)


def check_state_dict() -> None:
    for master_dtype in MASTERS:
        pair, other = Pair(master_dtype=master_dtype), Pair(master_dtype=master_dtype)
        pair.train(range(4), follow=False)
        other.model.load_state_dict(pair.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(pair.optimizer._share_state_dict()))
        for a, b in zip(pair.masters(), other.masters(), strict=True):
            assert torch.equal(a, b)
        pair.train(range(4, 8), follow=False)
        other.train(range(4, 8), follow=False)
        for a, b in zip(pair.masters(), other.masters(), strict=True):
            assert torch.equal(a, b)


def test_a_state_dict_keeps_fp32_state_of_bf16_parameters() -> None:
    """torch's load_state_dict rounds state to the parameter's dtype."""
    run_ranks(1, check_state_dict)


def check_loss_scaling(max_grad_norm: float | None, *, fsdp: bool = False) -> None:
    """The average is inf on all ranks if one rank overflows. DistAdamW under DDP shards the state."""
    nets: list[nn.Module] = [nn.Sequential(*Small().float().children()) for _ in range(2)]
    wrapped: list[nn.Module] = [*nets]
    for i, net in enumerate(nets):
        if fsdp:
            fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        else:
            wrapped[i] = DistributedDataParallel(net)
    optimizers: list[Any] = [
        DistAdamW(nets[0].parameters(), lr=0.1, eps=1e-3, bucket_numel=500, max_grad_norm=max_grad_norm),
        torch.optim.AdamW(nets[1].parameters(), lr=0.1, eps=1e-3, fused=True),
    ]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2) for _ in nets]  # type: ignore[attr-defined,unused-ignore]
    for step in range(6):
        x = torch.randn(4, 37, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        overflows = step in (1, 4) and dist.get_rank() == 1
        for net, optimizer, scaler in zip(wrapped, optimizers, scalers, strict=True):
            scaler.scale(net(x).square().mean() * (math.inf if overflows else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert optimizers[0].step_was_skipped == (step in (1, 4))
        for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(local_of(mine), local_of(theirs))


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1e6])
def test_scaled_losses_are_torchs_on_several_ranks(max_grad_norm: float | None, fsdp: bool) -> None:
    run_ranks(2, check_loss_scaling, max_grad_norm, fsdp=fsdp)
