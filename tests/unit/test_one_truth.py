"""``param_groups``, ``state`` and weights are the user's: what is done to them means what it means to torch's AdamW."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_adamw import DistAdamW, load, save
from dist_adamw.optimizer.sharding.values import exact_weights
from tests.known import to_memory_format

Act = Callable[["Job"], None]


class Job:
    """A model of four weights under one optimizer, fed gradients that depend on the update alone."""

    def __init__(self, kind: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        torch.manual_seed(1)
        self.model: Any = nn.Module()
        for name, shape in {"table": (7, 5), "first": (5, 33), "bias": (33,), "scale": ()}.items():
            self.model.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.model.late = nn.Parameter(torch.randn(9), requires_grad=False)
        model = self.model
        groups = [
            {"params": [model.table, model.first]},
            {"params": [model.bias, model.scale, model.late], "lr": 3e-3},
        ]
        self.optimizer: Any = kind(groups, lr=1e-2, **options)

    def train(self, updates: range) -> None:
        for update in updates:
            for i, param in enumerate(self.model.parameters()):
                if param.requires_grad:
                    generator = torch.Generator().manual_seed(100 * update + i)
                    # In the parameter's order of memory, as autograd does it: torch's kernel goes by that.
                    param.grad = torch.empty_like(param).copy_(torch.randn(param.shape, generator=generator))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def find(self, name: str) -> tuple[dict[str, Any], int]:
        param = getattr(self.model, name)
        for group in self.optimizer.param_groups:
            for i, other in enumerate(group["params"]):
                if other is param:
                    return group, i
        raise AssertionError(name)

    def replace(self, name: str, new: Tensor) -> nn.Parameter:
        """Replace a parameter as Gaussian splatting's replace_tensor_to_optimizer, without the state."""
        group, i = self.find(name)
        param = nn.Parameter(new)
        group["params"][i] = param
        setattr(self.model, name, param)
        return param


# ---------------------------------------------------------------- what strangers do


def resize_table(job: Job) -> None:
    old = job.model.table
    job.replace("table", torch.cat([old.detach(), torch.ones(2, 5)]))
    job.optimizer.state.pop(old, None)


def resize_and_leave_state(job: Job) -> None:
    job.replace("table", torch.cat([job.model.table.detach(), torch.ones(2, 5)]))


def densify(job: Job) -> None:
    """Gaussian splatting's cat_tensors_to_optimizer."""
    for name in ("table", "bias"):
        group, i = job.find(name)
        old = group["params"][i]
        extra = torch.full((3, *old.shape[1:]), 0.5)
        stored = job.optimizer.state.get(old, None)
        stored["exp_avg"] = torch.cat((stored["exp_avg"], torch.zeros_like(extra)), dim=0)
        stored["exp_avg_sq"] = torch.cat((stored["exp_avg_sq"], torch.zeros_like(extra)), dim=0)
        del job.optimizer.state[old]
        group["params"][i] = nn.Parameter(torch.cat((old, extra), dim=0).requires_grad_(True))
        job.optimizer.state[group["params"][i]] = stored
        setattr(job.model, name, group["params"][i])


def prune(job: Job) -> None:
    """Gaussian splatting's _prune_optimizer."""
    group, i = job.find("table")
    old, mask = group["params"][i], torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
    stored = job.optimizer.state.get(old, None)
    stored["exp_avg"], stored["exp_avg_sq"] = stored["exp_avg"][mask], stored["exp_avg_sq"][mask]
    del job.optimizer.state[old]
    group["params"][i] = nn.Parameter(old[mask].requires_grad_(True))
    job.optimizer.state[group["params"][i]] = stored
    job.model.table = group["params"][i]


def reset_opacity(job: Job) -> None:
    """Gaussian splatting's replace_tensor_to_optimizer."""
    group, i = job.find("bias")
    new = job.model.bias.detach().clamp(max=0.1)
    stored = job.optimizer.state.get(group["params"][i], None)
    stored["exp_avg"], stored["exp_avg_sq"] = torch.zeros_like(new), torch.zeros_like(new)
    del job.optimizer.state[group["params"][i]]
    group["params"][i] = nn.Parameter(new.requires_grad_(True))
    job.optimizer.state[group["params"][i]] = stored
    job.model.bias = group["params"][i]


def remove(job: Job) -> None:
    group, i = job.find("first")
    job.optimizer.state.pop(group["params"].pop(i))


def write_state_of_a_deleted_group(job: Job) -> None:
    group = job.optimizer.param_groups.pop(1)
    for state in job.optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    job.train(range(70, 71))
    job.optimizer.param_groups.append(group)


def set_state_in_another_memory_format(job: Job) -> None:
    table = job.model.table
    table.data = table.data.t().contiguous().t()
    moments = {key: torch.arange(35.0).view(7, 5).t().contiguous().t() / 100 for key in ("exp_avg", "exp_avg_sq")}
    job.optimizer.state[table] = {"step": torch.tensor(3.0), **moments}


def remove_and_clear_another(job: Job) -> None:
    job.optimizer.state[job.model.table] = {}
    remove(job)


def delete_group(job: Job) -> None:
    del job.optimizer.param_groups[1]


def reorder(job: Job) -> None:
    job.optimizer.param_groups.reverse()
    job.optimizer.param_groups[0]["params"].reverse()


def move(job: Job) -> None:
    group, i = job.find("first")
    job.optimizer.param_groups[1]["params"].append(group["params"].pop(i))


def rebuild(job: Job) -> None:
    """One group for everything, with other values."""
    params = [param for group in job.optimizer.param_groups for param in group["params"]]
    job.optimizer.param_groups.clear()
    job.optimizer.add_param_group({"params": params, "lr": 2e-2})


def unfreeze(job: Job) -> None:
    job.model.late.requires_grad_(True)


def clear(job: Job) -> None:
    job.optimizer.state.clear()


def clear_one(job: Job) -> None:
    job.optimizer.state[job.model.first] = {}


def pop_one(job: Job) -> None:
    job.optimizer.state.pop(job.model.first)


def new_state(job: Job) -> None:
    job.optimizer.state = defaultdict(dict)


def new_moment(job: Job) -> None:
    state = job.optimizer.state[job.model.first]
    state["exp_avg"] = torch.full_like(job.model.first, 0.01)
    state["step"] = torch.tensor(7.0)


def moment_in_a_dict_of_the_users(job: Job) -> None:
    """The entry is a plain dict, which the user keeps and changes later."""
    mine = dict(job.optimizer.state[job.model.first])
    job.optimizer.state[job.model.first] = mine
    job.train(range(50, 51))
    mine["exp_avg"] = torch.full_like(job.model.first, 0.02)


def reset_moments_in_place(job: Job) -> None:
    for state in job.optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].data.mul_(0.5)


def state_to_another_place_and_back(job: Job) -> None:
    """Frameworks do this to offload optimizer state between phases."""
    for state in job.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.clone()


def set_state(job: Job) -> None:
    job.optimizer.__setstate__({**job.optimizer.__getstate__(), "state": defaultdict(dict)})


def new_list_of_groups(job: Job) -> None:
    job.optimizer.param_groups = [{**group, "lr": 1e-4} for group in job.optimizer.param_groups]


def write_data(job: Job) -> None:
    job.model.first.data.copy_(torch.full((5, 33), 0.25))
    job.model.table.data = torch.full_like(job.model.table.data, -0.5)
    job.model.bias.data.clamp_(-0.1, 0.1)


def take_out_and_bring_back(job: Job) -> None:
    """A parameter leaves its group for two updates; its state stays in ``state``."""
    group, i = job.find("first")
    param = group["params"].pop(i)
    job.train(range(60, 62))
    job.optimizer.param_groups[1]["params"].insert(0, param)


def moment_in_other_memory(job: Job) -> None:
    """No dict is changed by that."""
    for name in ("first", "bias"):
        state = job.optimizer.state[getattr(job.model, name)]
        state["exp_avg"].data = torch.full_like(state["exp_avg"], 0.01)
        state["step"].data = torch.tensor(7.0)


def exchange_memory(job: Job) -> None:
    """A moment that takes another's place for two updates."""
    state = job.optimizer.state[job.model.first]
    kept = torch.full_like(job.model.first, 0.03)
    for turn in range(2):
        state["exp_avg"].data, kept = kept, state["exp_avg"].data
        job.train(range(70 + turn, 71 + turn))


def restart_and_bring_back(job: Job) -> None:
    """The moments of a parameter whose ``step`` was set to zero outlive its time outside."""
    job.optimizer.state[job.model.bias]["step"].zero_()
    group = job.optimizer.param_groups[1]
    group["params"] = [p for p in group["params"] if p is not job.model.bias]
    job.train(range(50, 51))
    job.model.bias.grad = None
    group["params"].append(job.model.bias)


def put_back_what_was_held(job: Job) -> None:
    state = job.optimizer.state[job.model.first]
    held = state["exp_avg"]
    state["exp_avg"] = torch.zeros_like(held)
    job.train(range(70, 71))
    state["exp_avg"] = held
    everything = {param: dict(entry) for param, entry in job.optimizer.state.items()}
    job.optimizer.state.clear()
    job.train(range(71, 72))
    job.optimizer.state.update(everything)


def write_to_what_was_put_there(job: Job) -> None:
    held = torch.full_like(job.model.first, 0.01)
    job.optimizer.state[job.model.first]["exp_avg"] = held
    job.train(range(70, 71))
    held.mul_(0.5)


def exchange_two(job: Job) -> None:
    job.model.other = nn.Parameter(torch.ones(7, 5))
    job.optimizer.param_groups[0]["params"].append(job.model.other)
    job.train(range(70, 71))
    one, two = (job.optimizer.state[param] for param in (job.model.table, job.model.other))
    one["exp_avg"], two["exp_avg"] = two["exp_avg"], one["exp_avg"]


def clear_and_set_amsgrad(job: Job) -> None:
    job.optimizer.state.clear()
    job.optimizer.param_groups[0]["amsgrad"] = True


def use_state_before_there_is_any(job: Job) -> None:
    """A parameter without a gradient has no entry."""
    job.model.idle = nn.Parameter(torch.ones(3))
    kind = type(job.optimizer)
    job.optimizer = kind([job.model.first, job.model.idle], lr=1e-2, **FUSED[kind])
    job.model.first.grad = torch.ones_like(job.model.first)
    job.optimizer.step()
    assert list(job.optimizer.state) == [job.model.first]


FUSED: dict[type, dict[str, Any]] = {DistAdamW: {}, torch.optim.AdamW: {"fused": True}}


def some_in_double(job: Job) -> None:
    for name in ("first", "bias"):
        param = getattr(job.model, name)
        param.data = param.data.double()
        for key in ("exp_avg", "exp_avg_sq"):  # torch leaves that to the user
            job.optimizer.state[param][key] = job.optimizer.state[param][key].double()


ACTS: list[Act] = [
    *(resize_table, resize_and_leave_state, densify, prune, reset_opacity),
    *(remove, delete_group, reorder, move, rebuild, unfreeze, take_out_and_bring_back, new_list_of_groups),
    restart_and_bring_back,
    *(clear, clear_one, pop_one, new_state, set_state, new_moment, moment_in_a_dict_of_the_users),
    *(reset_moments_in_place, state_to_another_place_and_back, write_data, some_in_double),
    *(moment_in_other_memory, exchange_memory, put_back_what_was_held, write_to_what_was_put_there, exchange_two),
    *(clear_and_set_amsgrad, use_state_before_there_is_any, remove_and_clear_another),
    *(write_state_of_a_deleted_group, set_state_in_another_memory_format),
]
AGAIN: list[Act] = [
    *(densify, move, new_moment, resize_table, reorder, unfreeze, reset_moments_in_place, rebuild, write_data),
    *(clear_one, reset_opacity, new_list_of_groups, state_to_another_place_and_back, clear, resize_and_leave_state),
]


def assert_alike(ours: Job, theirs: Job) -> None:
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in theirs.optimizer.state.get(q, {}).items():
            assert torch.equal(ours.optimizer.state[p][key], value), (name, key)
    assert sum(map(bool, ours.optimizer.state.values())) == sum(map(bool, theirs.optimizer.state.values()))


@pytest.mark.parametrize("max_grad_norm", [None, 1e9], ids=["", "norm"])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_what_is_done_means_what_it_means_to_torch(act: Act, max_grad_norm: float | None) -> None:
    ours = Job(DistAdamW, max_grad_norm=max_grad_norm, bucket_numel=64)
    theirs = Job(torch.optim.AdamW, fused=True)
    for job in (ours, theirs):
        job.train(range(3))
        act(job)
        job.train(range(3, 6))
    assert_alike(ours, theirs)


@pytest.mark.parametrize("updates", [0, 1], ids=["at once", "with updates between"])
def test_one_after_the_other(updates: int) -> None:
    ours, theirs = Job(DistAdamW, bucket_numel=64), Job(torch.optim.AdamW, fused=True)
    for job in (ours, theirs):
        job.train(range(2))
        for turn, act in enumerate(AGAIN, start=1):
            act(job)
            job.train(range(10 * turn, 10 * turn + updates))
        job.train(range(1000, 1002))
    assert_alike(ours, theirs)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("act", [clear_one, resize_table, new_moment, move], ids=lambda act: act.__name__)
def test_copies_have_what_was_done(act: Act, way: str) -> None:
    ours, theirs = Job(DistAdamW), Job(torch.optim.AdamW, fused=True)
    jobs = []
    for job in (ours, theirs):
        job.train(range(2))
        act(job)
        again = pickle.loads(pickle.dumps(job)) if way == "pickle" else copy.deepcopy(job)
        again.train(range(2, 4))
        jobs.append(again)
    assert_alike(*jobs)


def test_a_removed_parameter_is_let_go() -> None:
    job = Job(DistAdamW)
    job.train(range(2))
    before = job.optimizer.state_bytes
    gone = weakref.ref(job.model.first)
    group, i = job.find("first")
    job.optimizer.state.pop(group["params"].pop(i))
    del job.model.first
    job.train(range(2, 4))
    gc.collect()
    assert gone() is None
    assert job.optimizer.state_bytes < before - 8 * 5 * 33


def test_values_of_the_users_own_stay_in_an_entry() -> None:
    job = Job(DistAdamW)
    job.train(range(1))
    job.optimizer.state[job.model.first]["mine"] = 3
    job.train(range(1, 3))
    assert job.optimizer.state[job.model.first]["mine"] == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"step": torch.tensor(1.0)},
            r"'exp_avg' of parameter 1 of group 0.* None.* \(5, 33\)",
        ),
        (
            {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(5, 33)},
            r"'exp_avg' of parameter 1 of group 0.* \(3,\).* \(5, 33\)",
        ),
        (
            {"step": "one", "exp_avg": torch.zeros(5, 33), "exp_avg_sq": torch.zeros(5, 33)},
            "'step' .* a number",
        ),
    ],
)
@pytest.mark.parametrize("updates", [0, 2])
def test_what_is_no_state_is_refused_before_anything_changes(entry: Any, message: str, updates: int) -> None:
    job = Job(DistAdamW)
    job.train(range(updates))
    before = copy.deepcopy(job.model.state_dict())
    job.optimizer.state[job.model.first] = entry
    with pytest.raises(ValueError, match=message):
        job.train(range(2, 3))
    assert all(torch.equal(value, before[key]) for key, value in job.model.state_dict().items())


def leave_and_come_back(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> tuple[Any, list[Tensor]]:
    """The only parameter with state is in no group for an update."""
    torch.manual_seed(0)
    frozen, comes, new = nn.Parameter(torch.randn(31), False), nn.Parameter(torch.randn(9, 8)), torch.randn(129)
    optimizer: Any = kind([{"params": [frozen]}, {"params": [comes]}], lr=0.01, **options)
    comes.grad = torch.randn(9, 8)
    optimizer.step()
    optimizer.param_groups.pop(1)
    optimizer.step()
    optimizer.add_param_group({"params": [comes], "lr": 0.03})
    optimizer.step()
    later = nn.Parameter(new)
    optimizer.param_groups[1]["params"] += [later]
    later.grad = torch.randn(129)
    optimizer.step()
    return optimizer, [comes, later]


def test_all_state_belongs_to_a_parameter_in_no_group_for_a_while() -> None:
    (ours, our_params), (theirs, their_params) = (
        leave_and_come_back(DistAdamW),
        leave_and_come_back(torch.optim.AdamW, fused=True),
    )
    for p, q in zip(our_params, their_params, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(ours.state[p][key], value) for key, value in theirs.state[q].items())


READINGS: dict[str, Callable[[Any, Tensor], Any]] = {
    "[]": lambda state, param: state[param],
    "get": lambda state, param: state.get(param),
    "values": lambda state, param: list(state.values())[1],
    "items": lambda state, param: next(entry for other, entry in state.items() if other is param),
    "dict": lambda state, param: dict.__getitem__(dict(state), param),
    "unpacked": lambda state, param: dict.__getitem__({**state}, param),
    "copy": lambda state, param: dict.__getitem__(state.copy(), param),
    "copy.copy": lambda state, param: dict.__getitem__(copy.copy(state), param),
    "|": lambda state, param: dict.__getitem__(state | {}, param),
    "pop": lambda state, param: state.pop(param),
    "setdefault": lambda state, param: state.setdefault(param, {}),
}


@pytest.mark.parametrize("reading", READINGS)
def test_memory_is_seen_to_change_long_after_it_was_read(reading: str) -> None:
    ours, theirs = Job(DistAdamW), Job(torch.optim.AdamW, fused=True)
    for job in (ours, theirs):
        job.train(range(2))
        entry = READINGS[reading](job.optimizer.state, job.model.first)
        if reading == "pop":
            job.optimizer.state[job.model.first] = entry
        job.train(range(2, 4))
        entry["exp_avg"].data = torch.full_like(entry["exp_avg"], 0.01)
        job.train(range(4, 6))
    assert_alike(ours, theirs)


def test_memory_of_what_was_put_into_state_is_seen_to_change() -> None:
    ours, theirs = Job(DistAdamW), Job(torch.optim.AdamW, fused=True)
    for job in (ours, theirs):
        first = job.model.first
        entry = {key: torch.zeros_like(first) for key in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(3.0)}
        job.optimizer.state[first] = entry
        job.train(range(2))
        entry["exp_avg"].data = torch.full_like(first, 0.01)
        job.train(range(2, 4))
    assert_alike(ours, theirs)


def test_memory_in_a_dict_for_state_is_seen_to_change() -> None:
    ours, theirs = Job(DistAdamW), Job(torch.optim.AdamW, fused=True)
    for job in (ours, theirs):
        job.optimizer.state = defaultdict(dict)
        job.train(range(4))
        moment = job.optimizer.state[job.model.first]["exp_avg"]
        moment.data = torch.full_like(moment, 0.01)
        job.train(range(4, 6))
    assert_alike(ours, theirs)


def test_a_state_dict_hands_out_state() -> None:
    ours, theirs = Job(DistAdamW), Job(torch.optim.AdamW, fused=True)
    for job in (ours, theirs):
        job.train(range(2))
        entry = job.optimizer.state_dict()["state"][1]
        job.train(range(2, 4))
        entry["exp_avg"].data = torch.full_like(entry["exp_avg"], 0.01)
        job.train(range(4, 6))
    assert_alike(ours, theirs)


def test_training_and_saving_do_not_read_state(tmp_path: Any) -> None:
    """Once it was read, every update compares thousands of addresses."""
    job = Job(DistAdamW, max_grad_norm=1.0)
    job.train(range(3))
    save(tmp_path / "saved", job.model, job.optimizer)
    load(tmp_path / "saved", job.model, job.optimizer)
    job.train(range(3, 5))
    assert not job.optimizer._accesses.was_read


def test_memory_of_another_shape_is_refused() -> None:
    job = Job(DistAdamW)
    job.train(range(2))
    job.optimizer.state[job.model.first]["exp_avg"].data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 of group 0.* \(3,\).*shape"):
        job.train(range(2, 3))


def test_one_tensor_for_two_parameters_is_refused() -> None:
    job = Job(DistAdamW)
    job.train(range(2))
    step = torch.tensor(3.0)
    for name in ("first", "bias"):
        job.optimizer.state[getattr(job.model, name)]["step"] = step
    with pytest.raises(ValueError, match=r"'step' of parameter 1 of group 0 .*'step' of parameter 0"):
        job.train(range(2, 3))


def test_a_state_dict_stays_the_callers() -> None:
    job = Job(DistAdamW)
    job.train(range(2))
    saved = copy.deepcopy(job.optimizer.state_dict())
    before = copy.deepcopy(saved)
    job.optimizer.load_state_dict(saved)
    job.train(range(2, 4))
    for i, entry in before["state"].items():
        assert all(torch.equal(value, saved["state"][i][key]) for key, value in entry.items())


@pytest.mark.parametrize("way", [copy.deepcopy, DistAdamW.state_dict], ids=["copy", "state dict"])
def test_state_without_maxima_is_not_copied(way: Any) -> None:
    job = Job(DistAdamW)
    job.train(range(2))
    job.optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(RuntimeError, match="amsgrad cannot be changed"):
        way(job.optimizer)
    job.optimizer.param_groups[0]["amsgrad"] = False
    saved = job.optimizer.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="parameter 0 has no max_exp_avg_sq"):
        job.optimizer.load_state_dict(saved)


@pytest.mark.parametrize("updates", [0, 2])
def test_half_a_state_is_not_copied(updates: int) -> None:
    job = Job(DistAdamW)
    job.train(range(updates))
    job.optimizer.state[job.model.first] = {"step": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 of group 0.* None"):
        copy.deepcopy(job.optimizer)


def test_data_of_another_size_is_refused() -> None:
    job = Job(DistAdamW)
    job.train(range(2))
    job.model.table.data = torch.zeros(8, 5)
    with pytest.raises(ValueError, match=r"\(8, 5\) has 40 .*state has 35"):
        job.train(range(2, 3))


def test_a_group_of_another_kind_is_refused() -> None:
    job = Job(DistAdamW)
    job.train(range(2))
    move(job)
    job.optimizer.param_groups[1]["amsgrad"] = True
    with pytest.raises(RuntimeError, match="amsgrad cannot be changed"):
        job.train(range(2, 3))


def test_a_replaced_parameter_is_no_partition_of_deepspeed() -> None:
    job = Job(DistAdamW, max_grad_norm=1.0)
    job.train(range(2))
    resize_table(job)
    job.train(range(2, 3))
    assert "state whole" in repr(job.optimizer)


# ---------------------------------------------------------------- weights beside exact ones


def half_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(37, 41), nn.Linear(41, 3)).bfloat16()


def half_train(model: nn.Module, optimizer: Any, updates: range) -> None:
    for update in updates:
        for i, param in enumerate(model.parameters()):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * update + i)).bfloat16()
        optimizer.step()


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "copy": lambda p: p.data.copy_(torch.linspace(-1, 1, p.numel()).view_as(p)),
    "assign": lambda p: setattr(p, "data", torch.full_like(p.data, 0.25)),
    "clamp": lambda p: p.data.clamp_(-0.05, 0.05),
    "multiply": lambda p: p.detach().mul_(0.5),
    "fill": lambda p: nn.init.constant_(p, 0.25),
    "zero": lambda p: p.data.mul_((torch.arange(p.numel()) % 2).view_as(p)),
    "infinity": lambda p: p.data.view(-1)[:2].copy_(torch.tensor([float("inf"), -float("inf")])),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("bucket_numel", [100, None])
def test_what_is_written_reaches_fp32_masters(write: str, bucket_numel: int | None) -> None:
    """A master whose rounding is not the parameter is replaced by the parameter; otherwise it keeps its bits."""
    model = half_model()
    optimizer = DistAdamW(model.parameters(), lr=1e-3, master_dtype=torch.float32, bucket_numel=bucket_numel)
    half_train(model, optimizer, range(3))
    weights = [nn.Parameter(optimizer.state[p]["master"].clone()) for p in model.parameters()]
    reference = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    for p, w in zip(model.parameters(), weights, strict=True):
        reference.state[w] = {key: optimizer.state[p][key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        before = p.detach().clone()
        WRITES[write](p)
        with torch.no_grad():
            w.copy_(torch.where(p == before, w, p.float()))
    for update in range(3, 5):
        for i, w in enumerate(weights):
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(10 * update + i)).bfloat16().float()
        reference.step()
    half_train(model, optimizer, range(3, 5))
    for p, w in zip(model.parameters(), weights, strict=True):
        assert torch.equal(optimizer.state[p]["master"], w)
        assert torch.equal(p, w.bfloat16())


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_stays_written_beside_remainders(write: str) -> None:
    """To the parameter's own rounding: a remainder is below that, and no written weight becomes NaN with it."""
    model = half_model()
    optimizer = DistAdamW(model.parameters(), lr=1e-3, master_dtype=torch.int16)
    half_train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        WRITES[write](p)
    written = [p.detach().clone() for p in model.parameters()]
    half_train(model, optimizer, range(3, 5))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), written, strict=True))


@pytest.mark.parametrize("master", [torch.float32, torch.int16])
@pytest.mark.parametrize("into", [torch.float32, torch.int16])
def test_a_save_after_a_write_holds_what_the_model_shows(master: torch.dtype, into: torch.dtype, tmp_path: Any) -> None:
    model = half_model()
    optimizer = DistAdamW(model.parameters(), lr=1e-3, master_dtype=master)
    half_train(model, optimizer, range(3))
    with torch.no_grad():
        for p in model.parameters():
            p.data.fill_(0.25)
    save(tmp_path / "c", model, optimizer)
    again = half_model()
    other = DistAdamW(again.parameters(), lr=1e-3, master_dtype=into)
    load(tmp_path / "c", again, other)
    for p in again.parameters():
        assert torch.equal(p, torch.full_like(p, 0.25))
        # Beside a remainder a weight is known to the parameter's rounding.
        allowed = 0.0 if master == torch.float32 else 2**-10
        assert float((optimizer_weights(other, p) - 0.25).abs().max()) <= allowed


def optimizer_weights(optimizer: DistAdamW, param: Tensor) -> Tensor:
    (shard,) = optimizer.shards
    return exact_weights(shard, next(i for i, other in enumerate(shard.params) if other is param))


def test_a_state_dict_after_a_write_holds_what_the_model_shows() -> None:
    model = half_model()
    optimizer = DistAdamW(model.parameters(), lr=1e-3, master_dtype=torch.float32)
    half_train(model, optimizer, range(3))
    for p in model.parameters():
        p.data.fill_(0.25)
    for entry in optimizer.state_dict()["state"].values():
        assert torch.equal(entry["master"], torch.full_like(entry["master"], 0.25))


def test_another_memory_format_is_followed() -> None:
    ours, theirs = (nn.Conv2d(3, 5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer, reference = DistAdamW(ours.parameters()), torch.optim.AdamW(theirs.parameters(), foreach=False)
    for step in range(4):
        if step == 2:
            to_memory_format(ours, torch.channels_last)
        for model, opt in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], reference.state[q]["exp_avg"])


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("group", [0, 1])
def test_a_parameter_that_was_put_into_groups_twice_is_refused(group: int, updates: int) -> None:
    job = Job(DistAdamW)
    job.train(range(updates))
    before = copy.deepcopy(job.model.state_dict())
    job.optimizer.param_groups[group]["params"].append(job.model.table)
    with pytest.raises(ValueError, match=rf"parameter 0 of group 0 and parameter \d of group {group} .* twice"):
        job.train(range(2, 3))
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())
    job.optimizer.param_groups[group]["params"].pop()
    job.train(range(2, 3))
