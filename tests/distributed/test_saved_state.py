"""`save` and `load` of what the resume matrix leaves out: other optimizers, inexact weights, odd models, DeepSpeed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import (
    CheckpointError,
    CyclicLRWithRestarts,
    DistAdamW,
    load,
    prepare_deepspeed,
    register_deepspeed,
    save,
)
from dist_adamw.checkpoint.storage.files import read_whole
from dist_adamw.checkpoint.storage.index import read_index
from tests.known import unwrap
from tests.ranks import expect_error_on_all, run_ranks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 33), nn.BatchNorm1d(33), nn.Tanh(), nn.Linear(33, 2))


def step(model: nn.Module, optimizer: Any, count: int = 3) -> None:
    for i in range(count):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i))
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------- other optimizers

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "DistAdamW amsgrad": lambda p: DistAdamW(p, lr=1e-2, amsgrad=True),
    "DistAdamW whole": lambda p: DistAdamW(p, lr=1e-2, shard=False),
}


def with_optimizer(name: str, folder: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    save(folder, model, optimizer)
    step(model, optimizer)
    again = network()
    other = OPTIMIZERS[name](again.parameters())
    load(folder, again, other)
    step(again, other)
    assert same(bits(model), bits(again))
    if not isinstance(optimizer, DistAdamW):  # what there is of state is used again: both would be twice the memory
        before = {value.data_ptr() for state in optimizer.state.values() for value in tensors_of(state)}
        load(folder, model, optimizer)
        assert before == {value.data_ptr() for state in optimizer.state.values() for value in tensors_of(state)}
        step(model, optimizer)
        assert same(bits(model), bits(again))


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    return [value for kind, value in state.items() if isinstance(value, Tensor) and kind != "step"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_any_optimizer_goes_on(name: str, world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, with_optimizer, name, str(tmp_path))


def from_torch(folder: str, ours_first: bool) -> None:
    """torch's AdamW continues as DistAdamW, and the other way round, bit for bit."""
    makers = [lambda p: DistAdamW(p, lr=1e-2, shard=False), lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)]
    first, second = makers if ours_first else makers[::-1]
    model, again = network(), network()
    optimizer, other = first(model.parameters()), second(again.parameters())
    step(model, optimizer)
    save(folder, model, optimizer)
    load(folder, again, other)
    step(model, optimizer)
    step(again, other)
    assert same(bits(model), bits(again))


@pytest.mark.parametrize("ours_first", [True, False])
def test_torchs_adamw_and_ours_take_over_from_each_other(ours_first: bool, tmp_path: Path) -> None:
    run_ranks(1, from_torch, str(tmp_path), ours_first)


def of_another_family(folder: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    step(model, optimizer)
    save(folder, model, optimizer)
    other = DistAdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"state of SGD.* DistAdamW"):
        load(folder, model, other)
    before = bits(model)
    step(model, optimizer)
    load(folder, model)  # the weights alone
    assert same(bits(model), before)


def test_state_of_another_family_is_refused(tmp_path: Path) -> None:
    run_ranks(2, of_another_family, str(tmp_path))


def whole_steps(folder: str) -> None:
    """SparseAdam counts in a whole number, and torch's Adam in a tensor."""
    rows, again = (nn.Embedding(9, 4, sparse=True) for _ in range(2))
    again.load_state_dict(rows.state_dict())
    optimizer, other = torch.optim.SparseAdam(rows.parameters()), torch.optim.SparseAdam(again.parameters())
    for i in range(20):
        if i == 10:
            save(folder, rows, optimizer)
            load(folder, again, other)
        for model, its in ((rows, optimizer), (again, other)):
            if model is rows or i >= 10:
                model(torch.tensor([i % 9, 3])).square().sum().backward()
                its.step()
                its.zero_grad()
    assert torch.equal(rows.weight, again.weight)
    assert type(other.state[again.weight]["step"]) is int


def test_a_step_that_is_a_whole_number_stays_one(tmp_path: Path) -> None:
    run_ranks(1, whole_steps, str(tmp_path))


def other_groups(folder: str) -> None:
    model = network()
    weights, rest = [model[0].weight, model[3].weight], [model[0].bias, model[3].bias, *model[1].parameters()]
    apart = [{"params": weights, "lr": 1e-3, "weight_decay": 0.1}, {"params": rest, "lr": 5e-2, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(apart)
    step(model, optimizer)
    save(folder, model, optimizer)
    together = torch.optim.AdamW(model.parameters(), lr=7e-3)
    with pytest.raises(CheckpointError, match=r"several groups.*lr 0\.001 and 0\.05"):
        load(folder, model, together)
    assert together.param_groups[0]["lr"] == 7e-3
    load(folder, model, together, on_difference="new")
    assert together.param_groups[0]["lr"] == 7e-3


def test_groups_that_were_several_are_not_made_one_in_silence(tmp_path: Path) -> None:
    run_ranks(2, other_groups, str(tmp_path))


def odd_state(folder: str) -> None:
    model = network()
    with pytest.raises(CheckpointError, match=r"LBFGS .*tensors and numbers"):
        save(folder, model, steps_lbfgs(model))
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for param in model.parameters():
        optimizer.state[param]["momentum_buffer"] = None  # as some versions of torch have it before the first
    save(folder, model, optimizer)
    again = network()
    other = torch.optim.SGD(again.parameters(), lr=1e-2, momentum=0.9)
    load(folder, again, other)
    assert [*other.state.values()] == [{"momentum_buffer": None}] * 6
    step(model, optimizer)
    step(again, other)
    assert same(bits(model), bits(again))


def steps_lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


def test_state_that_is_no_number_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    run_ranks(2, odd_state, str(tmp_path))


# ---------------------------------------------------------------------------------------------- extra state


class Remembers(nn.Module):
    """Keeps plain data, or a tensor of a changing size, in ``get_extra_state``."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def remembering(value: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), Remembers(value))


def extra_state(folder: str, sharded: bool) -> None:
    first: dict[str, Any] = {"tensor": torch.arange(5), "data": {"amax": [1.5, None], "name": "fp8"}}
    for name, value in first.items():
        model, again, without = remembering(value), remembering(None), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        if sharded:
            fully_shard(model)
            fully_shard(again)
        save(f"{folder}/{name}", model)
        load(f"{folder}/{name}", again)
        found: Any = again[1].value
        assert torch.equal(found, value) if name == "tensor" else found == value
        with pytest.raises(CheckpointError, match=r"another model"):
            load(f"{folder}/{name}", without)
    save(f"{folder}/without", nn.Sequential(nn.Linear(8, 8), nn.Identity()))
    with pytest.raises(CheckpointError, match=r"extra state of '1' .*not in the"):
        load(f"{folder}/without", nn.Sequential(nn.Linear(8, 8), Bare()))
    with pytest.raises(CheckpointError, match="get_extra_state of 1: only plain data"):
        save(f"{folder}/object", remembering(object()))
    for path in (f"{folder}/object", f"{folder}/object/index.json"):
        assert not Path(path).is_file()


def wrapped_names(folder: str) -> None:
    """A module's own name may end in its wrapper's."""
    model, again = remembering({"a": 1}), remembering(None)
    wrapped = nn.Sequential(*(checkpoint_wrapper(module) for module in model))
    save(folder, wrapped)
    load(folder, again)
    assert again[1].value == {"a": 1}
    save(folder, again)
    load(folder, wrapped)
    assert {key for key in read_index(folder).tensors if "wrapped" in key} == set()


def test_names_are_those_of_the_bare_model(tmp_path: Path) -> None:
    run_ranks(1, wrapped_names, str(tmp_path))


class Bare(Remembers):
    """Without parameters."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.value = 1


@pytest.mark.parametrize(("world_size", "sharded"), [(1, False), (2, False), (2, True)])
def test_extra_state_of_modules_is_kept(world_size: int, sharded: bool, tmp_path: Path) -> None:
    run_ranks(world_size, extra_state, str(tmp_path), sharded)


# ---------------------------------------------------------------------------------------------- less exact weights

MIXED = {"fp32": torch.float32, "remainder": torch.int16, "none": None}


def mixed(folder: str, kept: str, width: int = 33) -> list[Tensor]:
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 2)).to(torch.bfloat16)
    optimizer = DistAdamW(model.parameters(), lr=1e-2, eps=0.1, master_dtype=MIXED[kept])
    optimizer.attach(model)
    step(model, optimizer)
    save(folder, model, optimizer)
    step(model, optimizer)
    return bits(model)


def go_on_mixed(folder: str, kept: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 2)).to(dtype)
    optimizer = DistAdamW(model.parameters(), lr=1e-2, eps=0.1, master_dtype=MIXED[kept])
    optimizer.attach(model)
    load(folder, model, optimizer)
    step(model, optimizer)
    return bits(model)


@pytest.mark.parametrize("saved", ["fp32", "remainder"])
@pytest.mark.parametrize("loaded", ["fp32", "remainder"])
@pytest.mark.parametrize("ranks", [(2, 2), (3, 1), (1, 2)])
def test_exact_weights_of_bf16_go_on_in_any_form(
    saved: str, loaded: str, ranks: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    expected = run_ranks(ranks[0], mixed, str(tmp_path), saved)[0]
    for found in run_ranks(ranks[1], go_on_mixed, str(tmp_path), loaded):
        assert same(found, expected)


def test_a_model_of_fp32_goes_on_from_the_exact_weights(tmp_path: Path) -> None:
    run_ranks(2, mixed, str(tmp_path), "remainder")
    index = read_index(tmp_path)
    exact, rounded = (read_whole(index, f"{kind}.0.weight") for kind in ("master", "model"))
    assert not torch.equal(exact, rounded.float())
    assert torch.equal(exact.to(torch.bfloat16), rounded)
    fp32 = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 2))
    load(tmp_path, fp32)
    assert torch.equal(fp32.get_parameter("0.weight"), exact)


def test_weights_written_after_a_load_are_the_ones_that_count(tmp_path: Path) -> None:
    run_ranks(1, mixed, str(tmp_path), "fp32")
    model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 2)).to(torch.bfloat16)
    optimizer = DistAdamW(model.parameters(), eps=0.1, master_dtype=torch.float32)
    load(tmp_path, model, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-6
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(3.0)
    step(model, optimizer, 1)
    weight = model.get_parameter("0.weight")
    assert torch.equal(weight, torch.full_like(weight, 3.0))


# ---------------------------------------------------------------------------------------------- what models have


class Odd(nn.Module):
    """Frozen, tied, empty, scalar, large and never used parameters, and buffers of several kinds."""

    constant: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.used.weight
        self.frozen = nn.Linear(200, 200).requires_grad_(False)
        self.never = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("constant", torch.arange(5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.tied(self.used(x))) * self.scale


def odd(folder: str, wrap: str) -> None:
    def make() -> tuple[Odd, nn.Module, DistAdamW]:
        model = Odd()
        wrapped: Any = model
        if wrap == "FSDP2":
            model.scale = nn.Parameter(torch.tensor([0.5]))  # it takes no scalars
            fully_shard(model.frozen)
            fully_shard(model)
        elif wrap == "DDP":
            wrapped = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
        elif wrap == "compiled":
            wrapped = torch.compile(model, backend="eager")
        optimizer = DistAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if wrap == "DDP":
            optimizer.attach(wrapped)
        return model, wrapped, optimizer

    model, wrapped, optimizer = make()
    for _ in range(3):
        wrapped(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save(folder, wrapped, optimizer, extra={"rank": dist.get_rank()})
    again, rewrapped, other = make()
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.fill_(7)
    loaded = load(folder, rewrapped, other)
    assert loaded.extra == {"rank": 0}
    local = lambda tensors: [t.to_local() if hasattr(t, "to_local") else t for t in tensors]  # noqa: E731
    assert same(local(model.parameters()), local(again.parameters()))
    for name in ("constant", "norm.running_mean"):
        assert torch.equal(model.get_buffer(name), again.get_buffer(name))
    assert again.scratch[0] == 7
    assert other.updates == optimizer.updates == 3


@pytest.mark.parametrize("wrap", ["plain", "DDP", "FSDP2", "compiled"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_odd_models_come_back_whole(wrap: str, world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, odd, str(tmp_path), wrap)
    assert {"model.scale", "model.nothing", "model.frozen.weight", "model.norm.num_batches_tracked"} <= set(
        read_index(tmp_path).tensors
    )


def statistics(folder: str) -> list[float]:
    """Each rank's batch norms have seen other samples."""
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(6)))
    means = [model.get_buffer(f"{i}.running_mean") for i in range(6)]
    for mean in means:
        mean.fill_(dist.get_rank() + 1)
    save(folder, model)
    load(folder, model)
    return [float(mean[0]) for mean in means]


def test_buffers_are_the_first_ranks(tmp_path: Path) -> None:
    assert run_ranks(3, statistics, str(tmp_path)) == [[1.0] * 6] * 3


def apart(folder: str) -> float:
    """Ranks that are meant to differ, as in local SGD."""
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(4, 100)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight.fill_(dist.get_rank())
    save(folder, model, optimizer, compare_ranks=False)
    first = optimizer.state[model.weight]["exp_avg"].clone()
    dist.broadcast(first, 0)
    load(folder, model, optimizer)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], first)
    return float(model.weight.sum())


def test_ranks_that_differ_are_not_mixed(tmp_path: Path) -> None:
    assert run_ranks(2, apart, str(tmp_path)) == [0.0, 0.0]


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    save(tmp_path, nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"weight .*meta device.* model\.to_empty"):
        load(tmp_path, nn.Linear(3, 3, device="meta"))


def half_accumulated(folder: str, half: bool) -> list[Tensor]:
    model, optimizer, scheduler = make_recipe()
    step(model, optimizer)
    scheduler.step()
    save(folder, model, optimizer, scheduler)
    if half:
        model(torch.randn(16, 8)).square().mean().backward()
    load(folder, model, optimizer, scheduler)
    step(model, optimizer)
    return bits(model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_before_a_load_are_forgotten(world_size: int, tmp_path: Path) -> None:
    expected, found = (run_ranks(world_size, half_accumulated, str(tmp_path), half)[0] for half in (False, True))
    assert same(expected[:4] + expected[-2:], found[:4] + found[-2:])


# ---------------------------------------------------------------------------------------------- what differs


def make_recipe(betas: tuple[float, float] = (0.9, 0.999), period: float = 2.0) -> tuple[Any, ...]:
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2, betas=betas)
    scheduler = CyclicLRWithRestarts(optimizer, 10, 100, restart_period=period)
    optimizer.attach(model)
    return model, optimizer, scheduler


def differs(folder: str) -> None:
    model, optimizer, scheduler = make_recipe()
    step(model, optimizer)
    scheduler.step()
    save(folder, model, optimizer, scheduler)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"betas": (0.8, 0.999)}, "betas of "),
        ({"period": 3.0}, "restart_period was 2.0 and is 3.0"),
    ]
    for arguments, message in cases:
        other = make_recipe(**arguments)
        before = bits(other[0])
        with pytest.raises(CheckpointError, match=message):
            load(folder, *other)
        assert same(bits(other[0]), before)
        assert other[2].samples == 0
        assert not other[1].state
    other = make_recipe(betas=(0.8, 0.999), period=3.0)
    load(folder, *other, on_difference="new")
    assert other[1].param_groups[0]["betas"] == (0.8, 0.999)
    load(folder, *other, on_difference="checkpoint")
    assert other[1].param_groups[0]["betas"] == (0.9, 0.999)
    assert other[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert other[2].get_last_weight_decay() == scheduler.get_last_weight_decay()


def test_another_recipe_is_a_diff_and_the_caller_chooses(tmp_path: Path) -> None:
    run_ranks(2, differs, str(tmp_path))


def without_schedule(folder: str) -> None:
    model, optimizer = network(), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    step(model, optimizer)
    for _ in range(3):
        scheduler.step()
    save(folder, model, optimizer, scheduler)
    other = torch.optim.AdamW(model.parameters(), lr=5.0)
    again = torch.optim.lr_scheduler.StepLR(other, 2, 0.5)
    load(folder, model, other, again)
    assert again.last_epoch == 3
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 5e-3
    assert other.param_groups[0]["weight_decay"] == 0.3
    with pytest.raises(CheckpointError, match=r"state of StepLR.* CyclicLRWithRestarts"):
        load(folder, model, other, CyclicLRWithRestarts(other, 10, 100))


def test_lr_without_a_schedule_is_the_callers_choice(tmp_path: Path) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=1e-3, decay_by="schedule")
    step(model, optimizer)
    save(tmp_path, model, optimizer)
    kept, taken = (torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.5) for _ in range(2))
    load(tmp_path, model, kept, on_difference="new")
    assert (kept.param_groups[0]["lr"], kept.param_groups[0]["weight_decay"]) == (1e-5, 0.5)
    load(tmp_path, model, taken)
    assert taken.param_groups[0]["lr"] == 1e-2
    assert taken.param_groups[0]["weight_decay"] == pytest.approx(0.1)  # the same decay of an update, in torch's words


def test_schedulers_of_torch(tmp_path: Path) -> None:
    run_ranks(2, without_schedule, str(tmp_path))


def one_rank_differs(folder: str) -> None:
    model = nn.Linear(3, 3 + dist.get_rank())
    load(folder, model)


def test_an_error_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    save(tmp_path, nn.Linear(3, 3))
    for error in expect_error_on_all(2, one_rank_differs, str(tmp_path)):
        assert error.endswith("(rank 1)")
        assert "weight has shape [3, 3] there and [4, 3] here" in error


def by_cycling(kind: str, optimizer_class: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    if kind == "OneCycleLR":
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    return model, optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 3, cycle_momentum=True)


@pytest.mark.parametrize("optimizer_class", [DistAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_cycle_momentum(kind: str, optimizer_class: Any, tmp_path: Path) -> None:
    def train(model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        for i in range(3):
            model(torch.full((2, 4), float(i))).square().mean().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    jobs = [by_cycling(kind, optimizer_class) for _ in range(2)]
    train(*jobs[0])
    save(tmp_path, *jobs[0])
    load(tmp_path, *jobs[1])
    for job in jobs:
        train(*job)
    assert jobs[0][1].param_groups[0]["betas"] == jobs[1][1].param_groups[0]["betas"]
    assert all(torch.equal(p, q) for p, q in zip(jobs[0][0].parameters(), jobs[1][0].parameters(), strict=True))


def test_weights_alone_beside_a_parameter_of_the_loss(tmp_path: Path) -> None:
    model, temperature = nn.Linear(3, 3), nn.Parameter(torch.ones(2))
    optimizer = DistAdamW([*model.parameters(), temperature])
    save(tmp_path, model, optimizer)
    other = nn.Linear(3, 3)
    load(tmp_path, other)
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(CheckpointError, match=r"parameter 2 of group 0 .*this model"):
        load(tmp_path, other, DistAdamW(other.parameters()))


@pytest.mark.parametrize("optimizer_class", [DistAdamW, torch.optim.AdamW])
def test_loading_in_inference_mode(optimizer_class: Any, tmp_path: Path) -> None:
    def update(model: nn.Module, optimizer: Any) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    model = nn.Linear(3, 3)
    optimizer = optimizer_class(model.parameters())
    update(model, optimizer)
    save(tmp_path, model, optimizer)
    other = nn.Linear(3, 3)
    optimizer = optimizer_class(other.parameters())
    with torch.inference_mode():
        load(tmp_path, other, optimizer)
    update(other, optimizer)


def test_a_buffer_that_cannot_be_read_into_is_told_before_anything_changes(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.ones(3).expand(2, 3))
    save(tmp_path, model)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(CheckpointError, match="buffer mask share memory"):
        load(tmp_path, model)
    assert torch.equal(model.weight, before + 1)


# ---------------------------------------------------------------------------------------------- random state


def draws() -> tuple[float, float]:
    return random.random(), float(torch.rand(()))


def save_random(folder: str, seeds: list[int]) -> tuple[float, float]:
    random.seed(seeds[dist.get_rank()])
    np.random.seed(seeds[dist.get_rank()])
    torch.manual_seed(seeds[dist.get_rank()])
    save(folder, nn.Linear(2, 2), compare_ranks=False)
    return draws()


def load_random(folder: str) -> tuple[str, tuple[float, float]]:
    return load(folder, nn.Linear(2, 2)).random, draws()


@pytest.mark.parametrize("seeds", [[5, 5, 5], [5, 6, 7], [5, 5, 6]], ids=str)
def test_random_state_is_restored_as_far_as_it_was_there(seeds: list[int], tmp_path: Path) -> None:
    expected = run_ranks(3, save_random, str(tmp_path), seeds)
    assert len(set(expected)) == len(set(seeds))
    assert run_ranks(3, load_random, str(tmp_path)) == [("restored", values) for values in expected]
    assert run_ranks(1, load_random, str(tmp_path)) == [("restored", expected[0])]
    *others, last = found = run_ranks(4, load_random, str(tmp_path))
    assert others == [("restored", values) for values in expected]
    if len(set(seeds)) == 1:
        assert last == ("restored", expected[0])
    else:
        assert last[0].startswith("seeded again")
        assert last[1] not in expected
    assert run_ranks(4, load_random, str(tmp_path)) == found


# ---------------------------------------------------------------------------------------------- DeepSpeed's own calls


def engine_of(stage: int, dtype: str, zero: dict[str, Any] | None = None, **options: Any) -> Any:
    import deepspeed

    register_deepspeed()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 2))
    optimizer = DistAdamW(model.parameters(), lr=1e-2, eps=0.1)
    scheduler = CyclicLRWithRestarts(optimizer, 8, 80, restart_period=2)
    config = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        **options,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)[0]
    prepare_deepspeed(engine)
    return engine


def wrapped_engine(folder: str, stage: int) -> None:
    """With activation checkpointing an engine has the names of the model without, and batch norm's too."""
    import deepspeed

    register_deepspeed()  # else DeepSpeed compiles, and a killed build leaves a lock on which every later one waits

    def wrapped(module: nn.Sequential) -> nn.Sequential:
        return nn.Sequential(*(checkpoint_wrapper(child) for child in module))

    def bare_model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 2))

    model = wrapped(bare_model())
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    config["zero_allow_untested_optimizer"] = True
    engine = deepspeed.initialize(model=model, optimizer=DistAdamW(model.parameters()), config=config)[0]
    save(folder, engine, engine.optimizer)
    other = bare_model()
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    load(folder, other, DistAdamW(other.parameters()))
    assert same(bits(other), bits(bare_model()))


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_has_the_names_of_the_bare_model(stage: int, tmp_path: Path) -> None:
    run_ranks(2, wrapped_engine, str(tmp_path), stage)


def train_engine(engine: Any, first: int, last: int) -> list[tuple[int, float, float]]:
    rows = []
    for i in range(first, last):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(i))
        x = x.chunk(dist.get_world_size())[dist.get_rank()].to(next(engine.module.parameters()).dtype)
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        clock = engine.lr_scheduler.samples
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        rows.append((clock, engine.lr_scheduler.get_last_lr()[0], float(total)))
    return rows


def engines_own(folder: str, stage: int, dtype: str) -> list[Any]:
    engine = engine_of(stage, dtype)
    train_engine(engine, 0, 4)
    engine.save_checkpoint(folder, client_state={"mine": [1, 2]})
    return train_engine(engine, 4, 9)


def engines_own_again(folder: str, stage: int, dtype: str) -> list[Any]:
    engine = engine_of(stage, dtype)
    path, client_state = engine.load_checkpoint(folder)
    assert path == f"{folder}/global_step4"
    assert client_state == {"mine": [1, 2]}
    assert (engine.global_steps, engine.global_samples) == (4, 32)
    return train_engine(engine, 4, 9)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_save_and_load(stage: int, dtype: str, tmp_path: Path) -> None:
    expected = run_ranks(2, engines_own, str(tmp_path), stage, dtype)[0]
    assert run_ranks(2, engines_own_again, str(tmp_path), stage, dtype)[0] == expected
    for other in {1, 3} - {stage}:
        for (clock, lr, loss), (right, right_lr, right_loss) in zip(
            run_ranks(1, engines_own_again, str(tmp_path), other, dtype)[0], expected, strict=True
        ):
            assert (clock, lr) == (right, right_lr)
            # Ranks' losses are added up; bf16 has 8 bits.
            assert 2 * loss == pytest.approx(right_loss, rel=1e-5 if dtype == "fp32" else 2e-2)


EXACT = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed accumulates these elsewhere
STAGES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "none": (0, "fp32", {}, {}),
    **{f"{stage} {dtype}": (stage, dtype, {}, {}) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")},
    **{f"{stage} exact": (stage, "bf16", {}, EXACT) for stage in (2, 3)},
    **{f"{stage} offload": (stage, "fp32", {"offload_optimizer": {"device": "cpu"}}, {}) for stage in (1, 2, 3)},
}


def half_an_update(folder: str, kind: str, more: int) -> list[tuple[int, float, float]]:
    stage, dtype, zero, options = STAGES[kind]
    engine = engine_of(stage, dtype, zero, gradient_accumulation_steps=2, **options)
    if more:
        train_engine(engine, 0, 4)
        engine.save_checkpoint(folder, tag="two updates")
        train_engine(engine, 4, 4 + more)
    if more == 3:  # after half an update the other half, and no step: its gradients are where an update takes them
        engine.backward(engine(torch.ones(4, 8, dtype=next(engine.module.parameters()).dtype)).float().sum())
        engine.load_checkpoint(folder, tag="two updates")
    else:
        load(f"{folder}/two updates", engine, engine.optimizer, engine.lr_scheduler)
    return train_engine(engine, 4, 10)


@pytest.mark.parametrize("kind", STAGES)
def test_deepspeeds_gradients_of_before_a_load_are_forgotten(kind: str, tmp_path: Path) -> None:
    half, whole, fresh = (run_ranks(2, half_an_update, str(tmp_path), kind, more)[0] for more in (1, 3, 0))
    assert half == fresh
    assert whole == fresh


def weights_alone(folder: str, stage: int) -> tuple[int, int]:
    engine = engine_of(stage, "fp32", {"stage3_param_persistence_threshold": 0})

    def evaluated() -> float:
        with torch.no_grad():
            return float(engine(torch.ones(4, 8)).sum())

    train_engine(engine, 0, 2)
    expected = evaluated()
    with pytest.warns(UserWarning, match="frozen weights"):
        engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    train_engine(engine, 2, 5)
    assert evaluated() != expected  # stage 3 keeps parameters whole after that
    engine.load_checkpoint(folder, load_module_only=True)
    assert evaluated() == expected
    inner = unwrap(engine.optimizer)
    return inner.updates, engine.lr_scheduler.samples


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_alone_leave_the_optimizer_as_it_is(stage: int, tmp_path: Path) -> None:
    assert run_ranks(2, weights_alone, str(tmp_path), stage) == [(5, 40)] * 2


def wrong_folder(folder: str) -> None:
    engine = engine_of(1, "fp32")
    engine.load_checkpoint(folder, tag="none")


def test_deepspeed_reads_its_own_folders_itself(tmp_path: Path) -> None:
    for error in expect_error_on_all(1, wrong_folder, str(tmp_path)):
        assert "CheckpointError" not in error
