"""DistAdamW on several ranks: unsharded AdamW's bits, 1/W of the state, the same weights on every rank."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW
from tests.known import grad_of, to_memory_format
from tests.ranks import expect_error_on_all, run_ranks

WORLDS = [1, 2, 3, 4]


class Network(nn.Module):
    """Sizes that divide by nothing, a permuted memory format, a scalar, an unused and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = to_memory_format(nn.Conv2d(3, 5, 3), torch.channels_last)
        self.hidden = nn.Linear(5 * 36, 41)
        self.out = nn.Linear(41, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(70))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.conv(x).flatten(1)).relu()) * self.scale


def backward(model: nn.Module, step: int) -> None:
    """Gradients of data that differ by rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1000 * step + rank)
    model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()


def check_same_bits(options: dict[str, Any], updates: int = 10) -> tuple[int, int]:
    model = Network()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    twin = copy.deepcopy(model)
    optimizer = DistAdamW(model.parameters(), lr=1e-2, **options)
    theirs = {k: v for k, v in options.items() if k in ("eps", "amsgrad", "maximize")}
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=True, **theirs)
    for step in range(updates):
        backward(wrapped, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()  # the averaged gradients
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q), (step, name)
    assert optimizer.updates == updates
    return optimizer.state_bytes, sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 0.1}, {"amsgrad": True, "bucket_numel": 1}, {"maximize": True, "bucket_numel": 500}],
    ids=["default", "eps", "amsgrad", "maximize"],
)
def test_same_bits_as_unsharded_adamw(world_size: int, options: dict[str, Any]) -> None:
    results = run_ranks(world_size, check_same_bits, options)
    assert len(set(results)) == 1  # shares are equal
    state_bytes, numel = results[0]
    moments = 3 if options.get("amsgrad") else 2
    steps = 4 * 8
    padding = 32 * (8 + world_size)  # elements: one alignment per parameter and per rank
    assert moments * 4 * numel / world_size <= state_bytes <= moments * 4 * (numel + padding) / world_size + steps


def check_weights_alike(options: dict[str, Any]) -> list[list[float]]:
    model = Network()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = DistAdamW(model.parameters(), lr=1e-2, **options)
    for step in range(5):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.flatten().tolist() for p in model.parameters()]


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1}, {"fused": False}, {"shard": False}])
def test_every_rank_has_the_same_weights(options: dict[str, Any]) -> None:
    results = run_ranks(3, check_weights_alike, options)
    assert results[0] == results[1] == results[2]


def check_global_norm(max_norm: float) -> None:
    model = Network()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    twin = copy.deepcopy(model)
    optimizer = DistAdamW(model.parameters(), lr=1e-2, eps=0.1, max_grad_norm=max_norm, bucket_numel=300)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=0.1, fused=True)
    for step in range(5):
        backward(wrapped, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # The norm is summed in another order, which moves the clip factor's last bits.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world_size", WORLDS)
def test_clipping_is_by_the_global_norm(world_size: int) -> None:
    run_ranks(world_size, check_global_norm, 0.05)


def check_skip(bad_rank: int) -> None:
    model = Network()
    optimizer = DistAdamW(model.parameters(), max_grad_norm=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if dist.get_rank() == bad_rank:  # in whatever this rank owns
        for p in model.parameters():
            grad_of(p).fill_(math.nan)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert optimizer.step_was_skipped
    assert optimizer.updates == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_nan_on_any_rank_skips_the_update_on_all(bad_rank: int) -> None:
    run_ranks(3, check_skip, bad_rank)


def check_later_changes() -> None:
    model = Network()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    twin = copy.deepcopy(model)
    results = []
    for module, run, cls in ((twin, twin, torch.optim.AdamW), (model, wrapped, DistAdamW)):
        optimizer = cls([*module.hidden.parameters(), module.frozen], lr=1e-2, fused=True)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": list(module.out.parameters()), "lr": 1e-3})
            backward(run, step)
            if step >= 4:
                module.frozen.grad = torch.full((5,), 0.5)
            if module is twin:  # what DDP would leave
                for p in module.parameters():
                    if p.grad is not None and p is not module.frozen:
                        dist.all_reduce(p.grad)
                        p.grad /= dist.get_world_size()
            optimizer.step()
            optimizer.zero_grad()
            for p in module.parameters():
                p.grad = None
        results.append([p.detach() for p in module.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the two averages round differently


def test_groups_added_and_parameters_unfrozen_later() -> None:
    run_ranks(3, check_later_changes)


def check_fewer_elements_than_ranks() -> int:
    param = nn.Parameter(torch.ones(2))
    optimizer = DistAdamW([param], lr=0.1, weight_decay=0.0)
    param.grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(param, torch.full((2,), 0.9))
    return int(optimizer.state[param]["exp_avg"].numel())


def test_more_ranks_than_elements() -> None:
    assert run_ranks(4, check_fewer_elements_than_ranks) == [2, 0, 0, 0]


def check_mixed_dtypes() -> None:
    params = [nn.Parameter(torch.ones(n, dtype=d)) for n, d in ((77, torch.bfloat16), (50, torch.float32))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, reference = DistAdamW(params), torch.optim.AdamW(twins, fused=True)
    for step in range(4):
        torch.manual_seed(step)
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_mixed_dtypes() -> None:
    run_ranks(2, check_mixed_dtypes)


def make_trained() -> tuple[Network, DistAdamW]:
    model = Network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def check_share_round_trip() -> list[Any]:
    model, optimizer = make_trained()
    again = Network()
    again.load_state_dict(model.state_dict())
    loaded = DistAdamW(again.parameters(), lr=1.0)
    loaded.load_state_dict(copy.deepcopy(optimizer._share_state_dict()))
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (again, loaded), (copied_model, copied)):
        torch.manual_seed(9)
        for p in m.parameters():
            p.grad = torch.randn_like(p)
        o.step()
        assert o.updates == 4
    for p, q, r in zip(model.parameters(), again.parameters(), copied_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    return [optimizer._share_state_dict()["share"]["rank"], "sharded over" in repr(optimizer)]


def check_share_twice() -> None:
    _, optimizer = make_trained()
    first = copy.deepcopy(optimizer._share_state_dict())
    loaded = DistAdamW(Network().parameters())
    loaded.load_state_dict(first)
    again = DistAdamW(Network().parameters())
    again.load_state_dict(loaded._share_state_dict())  # before any update of either
    for i, state in first["state"].items():
        assert all(torch.equal(v, again._share_state_dict()["state"][i][k]) for k, v in state.items())
    other = DistAdamW(Network().parameters(), bucket_numel=1)
    with pytest.raises(ValueError, match=r"another model.*bucket_numel"):
        other.load_state_dict(first)
    with pytest.raises(RuntimeError, match=f"rank {dist.get_rank()} of 2 has its own share"):
        optimizer.state_dict()


def test_a_share_survives_loading_and_saving_again() -> None:
    run_ranks(2, check_share_twice)


def check_mesh_copy_refused() -> None:
    optimizer = DistAdamW([nn.Parameter(torch.ones(3))], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    copy.deepcopy(optimizer)


def test_copying_with_a_mesh_is_refused() -> None:
    for error in expect_error_on_all(2, check_mesh_copy_refused):
        assert "mesh cannot be pickled" in error


def test_a_ranks_share_loads_on_that_rank() -> None:
    assert run_ranks(3, check_share_round_trip) == [[0, True], [1, True], [2, True]]


def check_share_of_another_rank() -> None:
    _, optimizer = make_trained()
    boxes = [optimizer._share_state_dict()]
    dist.broadcast_object_list(boxes, src=0)  # what saving on rank 0 alone would give everybody
    if dist.get_rank() == 0:
        raise ValueError("rank 0 has its own")
    optimizer.load_state_dict(boxes[0])


def test_a_share_of_another_rank_is_refused() -> None:
    errors = expect_error_on_all(2, check_share_of_another_rank)
    assert re.search("share of rank 0 of 2.* rank 1 of 2", errors[1])
    assert "accelerator.save_state" in errors[1]


def check_one_axis_of_a_mesh() -> tuple[int, int, bool]:
    """Ranks 0 and 1, and ranks 2 and 3, shard the state of one model each; gradients are equal in a pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(dist.get_rank() // 2)
    param = nn.Parameter(torch.randn(100))
    twin = nn.Parameter(param.detach().clone())
    optimizer = DistAdamW([param], mesh=mesh["shard"])
    reference = torch.optim.AdamW([twin], fused=True)
    for _ in range(3):
        param.grad = torch.randn(100)
        twin.grad = param.grad.clone()
        optimizer.step()
        reference.step()
    return int(optimizer.state[param]["exp_avg"].numel()), optimizer.state_bytes, torch.equal(param, twin)


def test_state_is_shared_over_one_axis_of_a_mesh() -> None:
    results = run_ranks(4, check_one_axis_of_a_mesh)
    assert [same for *_, same in results] == [True] * 4
    assert [numel for numel, *_ in results] == [64, 36, 64, 36]


def check_whole_state_is_cut() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n)) for n in (100, 77)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    reference = torch.optim.AdamW(twins, fused=True)
    for q in twins:
        q.grad = torch.randn_like(q)
    reference.step()
    optimizer = DistAdamW(params)
    optimizer.load_state_dict(reference.state_dict())
    for p, q in zip(params, twins, strict=True):
        p.data.copy_(q.data)
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    reference.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_torchs_whole_state_is_cut_to_shares() -> None:
    run_ranks(3, check_whole_state_is_cut)
