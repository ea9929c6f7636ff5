"""Users change ``param_groups`` and ``state`` between updates, with the state sharded over ranks."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import AgreementError, DistAdamW, load, save
from tests.distributed.test_attach import averaged
from tests.ranks import expect_error_on_all, run_ranks


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Parameter(torch.randn(7, 50))
        self.first = nn.Linear(50, 41)
        self.second = nn.Linear(41, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x @ self.table[: x.shape[1]]).tanh()
        return self.second(hidden) * self.scale


class Pair:
    """DistAdamW over the ranks, and torch.optim.AdamW on copies that are fed the averages of the ranks' gradients."""

    def __init__(self, way: str, **options: Any) -> None:
        self.model, self.twin = Network(), Network()
        self.way = way
        self.run: nn.Module = self.model
        self.optimizer = self._groups(DistAdamW, self.model, bucket_numel=300, **options)
        self.reference = self._groups(torch.optim.AdamW, self.twin, fused=True)
        if way == "ddp":
            self.run = DistributedDataParallel(self.model, find_unused_parameters=True)
        elif way != "none":
            self.optimizer.attach(self.model, overlap=way != "late", reduce_every_backward=way == "shard")

    @staticmethod
    def _groups(kind: Any, model: Network, **options: Any) -> Any:
        groups = [
            {"params": [model.table, *model.first.parameters()]},
            {"params": [*model.second.parameters(), model.scale], "lr": 3e-3},
        ]
        return kind(groups, lr=1e-2, **options)

    def train(self, updates: range) -> None:
        for update in updates:
            generator = torch.Generator().manual_seed(1000 * update + dist.get_rank())
            x = torch.randn(4, 7, generator=generator)
            self.twin(x).square().mean().backward()
            for param, average in zip(
                self.twin.parameters(), averaged([p.grad for p in self.twin.parameters()]), strict=True
            ):
                param.grad = average
            if self.way == "none":
                for mine, theirs in zip(self.model.parameters(), self.twin.parameters(), strict=True):
                    mine.grad = None if theirs.grad is None else theirs.grad.clone()
            else:
                self.run(x).square().mean().backward()
            for optimizer in (self.optimizer, self.reference):
                optimizer.step()
                optimizer.zero_grad()
            for model in (self.model, self.twin):
                model.zero_grad()  # also of what is in no group

    def both(self) -> list[tuple[Any, Network]]:
        return [(self.optimizer, self.model), (self.reference, self.twin)]

    def check(self, when: str = "") -> None:
        for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            assert torch.equal(p, q), (when, name)


def resize(optimizer: Any, model: Network) -> None:
    old = model.table
    model.table = nn.Parameter(torch.cat([old.detach(), torch.ones(2, 50)]))
    optimizer.param_groups[0]["params"][0] = model.table
    optimizer.state.pop(old, None)


def remove(optimizer: Any, model: Network) -> None:
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop(1))


def move(optimizer: Any, model: Network) -> None:
    optimizer.param_groups[1]["params"].insert(1, optimizer.param_groups[0]["params"].pop(1))


def rebuild(optimizer: Any, model: Network) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": params[::-1], "lr": 2e-2})


def clear(optimizer: Any, model: Network) -> None:
    optimizer.state.clear()


def whole_moment(optimizer: Any, model: Network) -> None:
    optimizer.state[model.first.weight]["exp_avg"] = torch.linspace(0, 1, 41 * 50).view(41, 50)
    optimizer.state[model.first.weight]["step"] = torch.tensor(5.0)


def memory_of_moment(optimizer: Any, model: Network) -> None:
    state = optimizer.state[model.first.weight]
    state["exp_avg"].data = torch.zeros_like(state["exp_avg"])
    state["exp_avg_sq"].data = state["exp_avg_sq"] * 0.5


def take_out(optimizer: Any, model: Network) -> None:
    """Its state stays in ``state``, as in torch, and is used again when the parameter comes back."""
    for group in optimizer.param_groups:
        group["params"] = [param for param in group["params"] if param is not model.first.weight]


def bring_back(optimizer: Any, model: Network) -> None:
    optimizer.param_groups[1]["params"].append(model.first.weight)


ACTS = [resize, move, whole_moment, memory_of_moment, take_out, clear, bring_back, rebuild, remove]


def check_acts(way: str) -> None:
    pair = Pair(way)
    pair.train(range(2))
    for turn, act in enumerate(ACTS, start=1):
        for optimizer, model in pair.both():
            act(optimizer, model)
        pair.train(range(10 * turn, 10 * turn + 2))
        pair.check(act.__name__)
    assert "sharded over" in repr(pair.optimizer)


@pytest.mark.parametrize("way", ["none", "hooks", "late", "shard"])
def test_what_is_done_means_what_it_means_to_torch(way: str) -> None:
    run_ranks(3, check_acts, way)


def check_under_ddp() -> None:
    """DDP averages; a parameter that it does not know is out of the question there."""
    pair = Pair("ddp", max_grad_norm=1e9)
    pair.train(range(2))
    for turn, act in enumerate((move, whole_moment, take_out, bring_back, clear, rebuild), start=1):
        for optimizer, model in pair.both():
            act(optimizer, model)
        pair.train(range(10 * turn, 10 * turn + 1))
        pair.check()


def test_under_ddp() -> None:
    run_ranks(2, check_under_ddp)


def check_share() -> None:
    """A tensor of the share's shape is the share."""
    pair = Pair("none")
    pair.train(range(2))
    weight = pair.model.first.weight
    whole = torch.linspace(0, 1, 41 * 50)
    (shard, i), *_ = [(s, i) for s in pair.optimizer.shards for i, p in enumerate(s.params) if p is weight]
    pair.optimizer.state[weight]["exp_avg"] = torch.cat([whole[a:b] for a, b in shard.owned.ranges_of(i)])
    pair.reference.state[pair.twin.first.weight]["exp_avg"] = whole.view(41, 50).clone()
    pair.train(range(2, 4))
    pair.check()


def test_a_share_is_taken_as_the_share() -> None:
    run_ranks(2, check_share)


def check_masters_move(master_dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (70, 33, 129)]
    optimizer = DistAdamW(params, lr=1e-2, master_dtype=master_dtype, bucket_numel=64)
    for update in range(8):
        if update == 4:  # the others now lie elsewhere
            del optimizer.param_groups[0]["params"][0]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        optimizer.step()
    return [param.detach() for param in params]


def test_remainders_move_as_masters_do() -> None:
    masters, remainders = (run_ranks(2, check_masters_move, dtype)[0] for dtype in (torch.float32, torch.int16))
    assert all(map(torch.equal, masters, remainders))


def check_one_rank_alone(way: str, what: str) -> None:
    model = Network()
    optimizer = Pair._groups(DistAdamW, model, bucket_numel=300, max_grad_norm=1.0 if what == "moment" else None)
    run = DistributedDataParallel(model) if way == "ddp" else model
    if way == "hooks":
        optimizer.attach(model)

    def train() -> None:
        run(torch.ones(4, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    if dist.get_rank() == 1:
        {"replace": resize, "clear": clear, "move": move, "moment": whole_moment}[what](optimizer, model)
    before = copy.deepcopy(model.state_dict())
    try:
        train()
    finally:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["none", "hooks", "ddp"])
@pytest.mark.parametrize("what", ["replace", "clear", "move", "moment"])
def test_a_rank_that_does_it_alone_is_an_error_on_all(way: str, what: str) -> None:
    if (way, what) == ("ddp", "replace"):
        pytest.skip("DDP waits for the gradient of the parameter that it knows")
    for error in expect_error_on_all(2, check_one_rank_alone, way, what):
        if "AgreementError" in error and "has other parameters" in error:
            continue  # seen before, in the message that goes with gradients
        assert "AgreementError: rank 1 disagrees with rank 0" in error
        assert re.search(r"optimizer\.param_groups.* 'nothing' on rank 0", error)


def check_empty_share_replaced() -> list[str]:
    """Rank 0 has nothing of ``scale``, and replaces what it has of its state; then rank 1 does."""
    said = []
    for alone in (0, 1):
        pair = Pair("none")
        pair.train(range(2))
        state = pair.optimizer.state[pair.model.scale]
        assert state["exp_avg"].numel() == dist.get_rank()
        if dist.get_rank() == alone:
            state["exp_avg"].data = torch.zeros_like(state["exp_avg"])
        for param in pair.model.parameters():
            param.grad = torch.ones_like(param)
        with pytest.raises(AgreementError) as raised:
            pair.optimizer.step()
        said.append(str(raised.value))
        dist.barrier()
    return said


def test_memory_of_an_empty_share_that_one_rank_alone_replaced_is_an_error_on_all() -> None:
    first, other = run_ranks(2, check_empty_share_replaced)
    assert first == other
    for text, other_rank in zip(first, (1, 0), strict=True):
        assert "parameter 2 of group 1 has another exp_avg'" in text, text
        assert f"'nothing' on rank {other_rank}" in text, text


def check_state_dict() -> None:
    pair = Pair("none")
    pair.train(range(2))
    pair.optimizer.consolidate_state_dict(to=None)
    assert pair.optimizer.state_dict()["state"]
    move(pair.optimizer, pair.model)
    pair.optimizer.state_dict()


def test_state_that_is_about_to_change_is_not_handed_out() -> None:
    for error in expect_error_on_all(2, check_state_dict):
        assert "not consolidated" in error


def check_save(folder: str) -> None:
    """Saved before the update that would have exchanged the shares."""
    pair = Pair("hooks")
    pair.train(range(2))
    for optimizer, model in pair.both():
        resize(optimizer, model)
        move(optimizer, model)
    save(folder, pair.model, pair.optimizer)
    again = Pair("none")
    for optimizer, model in again.both():
        resize(optimizer, model)
        move(optimizer, model)
    load(folder, again.model, again.optimizer)
    again.twin.load_state_dict(pair.twin.state_dict())
    again.reference.load_state_dict(copy.deepcopy(pair.reference.state_dict()))
    for job in (pair, again):
        job.train(range(2, 4))
        job.check()


def test_a_save_exchanges_them_too(tmp_path: Path) -> None:
    run_ranks(2, check_save, str(tmp_path / "c"))


# ---------------------------------------------------------------- gradual unfreezing


def unfreezing(folder: str, stops: bool) -> list[Tensor]:
    """A layer a phase, clipped by a norm that is always too large; in one job, or in one job a phase."""

    def job() -> tuple[Network, DistAdamW]:
        model = Network().requires_grad_(False)
        optimizer = DistAdamW(model.parameters(), lr=1e-2, max_grad_norm=1e-3, bucket_numel=300)
        optimizer.attach(model)
        return model, optimizer

    model, optimizer = job()
    layers: list[Any] = [lambda m: m.second, lambda m: m.first, lambda m: m]
    for phase, layer in enumerate(layers):
        if stops and phase:
            model, optimizer = job()
            for earlier in layers[:phase]:
                earlier(model).requires_grad_(True)
            load(folder, model, optimizer)
        layer(model).requires_grad_(True)
        for update in range(8):
            generator = torch.Generator().manual_seed(1000 * (10 * phase + update) + dist.get_rank())
            model(torch.randn(4, 7, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if stops:
            save(folder, model, optimizer)
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_job_that_stopped_while_unfreezing_has_the_bits_of_one_that_did_not(world_size: int, tmp_path: Path) -> None:
    gone_on = run_ranks(world_size, unfreezing, str(tmp_path / "a"), False)
    stopped = run_ranks(world_size, unfreezing, str(tmp_path / "b"), True)
    for one, other in zip(gone_on[0], stopped[0], strict=True):
        assert torch.equal(one, other)
