"""Parameters that an engine has sharded (FSDP2, HSDP, tensor parallelism) are stepped in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_adamw import CyclicLRWithRestarts, DistAdamW, load, save
from dist_adamw.checkpoint.storage.index import read_index
from tests.ranks import expect_error_on_all, run_ranks


def network() -> nn.Sequential:
    """Odd sizes, so that some ranks have less; the last bias has fewer elements than there are ranks."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 10), nn.Tanh(), nn.Linear(10, 2))


def sharded(how: str) -> nn.Sequential:
    """Return `network`, sharded."""
    model, size = network(), dist.get_world_size()
    policy: dict[str, Any] = {}
    if how in ("hsdp", "tensor parallel"):
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("outer", "inner"))
    if how == "hsdp":
        policy["mesh"] = mesh
    if how == "tensor parallel":
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = network_for_two()
        parallelize_module(model, mesh["inner"], plan)
        policy["mesh"] = mesh["outer"]
    if how == "bf16":
        policy["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if how == "offload":
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **policy)
    fully_shard(model, **policy)
    return model


def network_for_two() -> nn.Sequential:
    """Tensor parallelism cuts the middle in two."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 34), nn.Tanh(), nn.Linear(34, 10), nn.Tanh(), nn.Linear(10, 2))


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(5, 8, generator=generator)
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_steps(how: str, options: dict[str, Any]) -> None:
    """Given the gradients that arrive, the weights of torch.optim.AdamW; clipping by the norm of all."""
    model = sharded(how)
    twin = network_for_two() if how == "tensor parallel" else network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    theirs = {k: v for k, v in options.items() if k in ("eps", "amsgrad")}
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1, fused=True, **theirs)
    rank = dist.get_rank() // 2 if how == "tensor parallel" else dist.get_rank()
    for step in range(6):
        loss_of(model, step, rank).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            q.grad = whole(p.grad).clone()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), options.get("max_grad_norm", float("inf")))
        optimizer.step()
        reference.step()
        if optimizer.grad_norm is not None:
            torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        optimizer.zero_grad()
        reference.zero_grad()
    assert optimizer.updates == 6
    assert optimizer.process_group is None
    assert "DTensors" in repr(optimizer)
    # Bits, but for the last one where FSDP2 cuts: torch's kernel rounds otherwise in what a vector does not fill.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"eps": 0.1, "amsgrad": True}, {"max_grad_norm": 0.05}])
@pytest.mark.parametrize(
    ("how", "world_size"),
    [("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tensor parallel", 4), ("bf16", 2), ("offload", 2)],
)
def test_the_weights_of_torchs_adamw(how: str, world_size: int, options: dict[str, Any]) -> None:
    run_ranks(world_size, check_steps, how, options)


def check_overflow() -> None:
    """One bad element on one rank: no rank updates."""
    model = sharded("fsdp2")
    optimizer = DistAdamW(model.parameters(), max_grad_norm=1.0)
    scheduler = CyclicLRWithRestarts(optimizer, 4, 100, restart_period=2)
    for step in range(4):
        loss_of(model, step, dist.get_rank()).backward()
        before = [whole(p).clone() for p in model.parameters()]
        if step == 2 and dist.get_rank() == 1:
            grad = next(model.parameters()).grad
            assert isinstance(grad, DTensor)
            grad.to_local()[0] = float("nan")
        optimizer.step()
        scheduler.step()
        same = [torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True)]
        assert optimizer.step_was_skipped == (step == 2)
        assert all(same) if step == 2 else not any(same)
        optimizer.zero_grad()
    assert optimizer.updates == 3
    assert scheduler.samples == 12


def test_an_overflow_on_one_rank_is_skipped_on_all() -> None:
    run_ranks(2, check_overflow)


def check_state_dict() -> None:
    """torch.distributed.checkpoint's way: state keyed by name, in DTensors, before and after the first update."""
    model = sharded("fsdp2")
    optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, decay_by="schedule")
    weights = [whole(p).clone() for p in model.parameters()]
    empty: Any = get_optimizer_state_dict(model, optimizer)  # steps once, with lr 0
    assert optimizer.updates == 0
    assert all(torch.equal(whole(p), w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(float(state["step"]) == 0 for state in empty["state"].values())
    for step in range(3):
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved: Any = get_optimizer_state_dict(model, optimizer)
    saved = {**saved, "state": {k: {n: v.clone() for n, v in state.items()} for k, state in saved["state"].items()}}
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    assert isinstance(saved["state"]["0.weight"]["exp_avg"], DTensor)
    other = sharded("fsdp2")
    other.load_state_dict(model.state_dict())
    loaded = DistAdamW(other.parameters(), lr=1e-2, weight_decay=0.1, decay_by="schedule")
    set_optimizer_state_dict(other, loaded, saved)
    assert loaded.updates == 3
    for step in range(3, 6):
        for m, o in ((model, optimizer), (other, loaded)):
            loss_of(m, step, dist.get_rank()).backward()
            o.step()
            o.zero_grad()
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_state_dicts_of_distributed_checkpoint() -> None:
    run_ranks(2, check_state_dict)


def check_whole_state() -> None:
    """A state dict of torch.optim.AdamW on one rank loads into sharded parameters."""
    twin = network()
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    loss_of(twin, 0, 0).backward()
    reference.step()
    model = sharded("fsdp2")
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.updates == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(optimizer.state[p]["exp_avg"]), reference.state[q]["exp_avg"])


def test_a_whole_state_loads_into_shards() -> None:
    run_ranks(3, check_whole_state)


def check_mixed() -> None:
    plain = nn.Parameter(torch.ones(100))
    optimizer = DistAdamW([plain])
    plain.grad = torch.ones(100)
    optimizer.step()
    optimizer.add_param_group({"params": list(sharded("fsdp2").parameters())})
    for param in optimizer.param_groups[1]["params"]:
        param.grad = torch.zeros_like(param)
    optimizer.step()


def test_dtensors_beside_state_that_is_shared_are_refused() -> None:
    for error in expect_error_on_all(2, check_mixed):
        assert "an engine has sharded" in error


def check_moved() -> None:
    """Module.to() swaps DTensors, which torch refuses if there is a weak reference to one."""
    model = sharded("fsdp2")
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    model.to(torch.float64)
    model.to(torch.float32)
    loss_of(model, 0, dist.get_rank()).backward()
    optimizer.step()
    assert optimizer.updates == 1
    assert optimizer.process_group is None


def test_a_model_may_be_moved_beside_its_optimizer() -> None:
    run_ranks(2, check_moved)


def check_zero_head() -> None:
    """At lr 0 the one row of a head of zeros is the only gradient there is, and one rank's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
    nn.init.zeros_(model.get_parameter("2.weight"))
    fully_shard(model)
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    scheduler = CyclicLRWithRestarts(optimizer, 8, 80, restart_period=2, warmup_samples=32)
    for step in range(3):
        model(torch.full((4, 6), 1.0 + step)).sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert (optimizer.updates, scheduler.samples) == (3, 24)


def test_gradients_of_zeros_on_one_rank_are_an_update() -> None:
    run_ranks(2, check_zero_head)


def save_after_validation(folder: str) -> None:
    model: Any = network()
    fully_shard(model[0])
    fully_shard(model)  # the root has parameters, which a forward pass without backward leaves whole
    optimizer = DistAdamW(model.parameters())
    scheduler = CyclicLRWithRestarts(optimizer, 10, 100)
    for step in range(2):
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            expected = loss_of(model, 9, 0)
        save(f"{folder} {step}", model, optimizer, scheduler)
    names = {key for key in read_index(Path(f"{folder} 1")).tensors if key.startswith("model.")}
    assert names == {f"model.{name}" for name, _ in network().named_parameters()}
    load(f"{folder} 0", model, optimizer, scheduler)  # the forward pass before it has left the root's weights whole
    with torch.no_grad():
        assert not torch.equal(loss_of(model, 9, 0), expected)
    load(f"{folder} 1", model, optimizer, scheduler)
    with torch.no_grad():
        assert torch.equal(loss_of(model, 9, 0), expected)


def test_training_goes_on_after_a_validation_and_a_save(tmp_path: Path) -> None:
    run_ranks(2, save_after_validation, str(tmp_path / "saved"))
