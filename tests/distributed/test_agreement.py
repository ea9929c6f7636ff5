"""Options that differ between ranks: one sentence on every rank before anything is laid out or sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import AgreementError, DistAdamW, prepare
from dist_adamw.ranks import agreement
from tests.distributed.jobs import job, model_of_two_layers
from tests.ranks import run_ranks

# By option: what rank 0 has, and the last rank.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "max_grad_norm": (None, 1.0),
    "max_grad_norm of another size": (1.0, 2.0),
    "master_dtype": (None, torch.float32),
    "state_dtype": (None, torch.float32),
    "reduce_dtype": (None, torch.bfloat16),
    "bucket_numel": (64, 128),
    "fused": (None, False),
    "decay_by": ("lr", "schedule"),
    "amsgrad": (False, True),
    "maximize": (False, True),
    "betas": ((0.9, 0.999), (0.9, 0.99)),
    "eps": (1e-8, 1e-6),
    "lr": (1e-3, 2e-3),
    "shard": ("auto", False),
}


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def optimizer_of(model: nn.Module, case: str, **more: Any) -> DistAdamW:
    name = case.split()[0]
    options = {name: OPTIONS[case][is_last()]} if case in OPTIONS else {}
    return DistAdamW(model.parameters(), **options, **more)


def by_step(case: str) -> None:
    model = model_of_two_layers()
    optimizer = optimizer_of(model, case)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    finally:
        assert all(map(torch.equal, before, model.parameters()))
        assert optimizer.updates == 0


def by_attach(case: str) -> None:
    model = model_of_two_layers()
    optimizer = optimizer_of(model, case)
    options = {case: is_last()} if case in ("reduce_every_backward", "defer_gather", "overlap") else {}
    optimizer.attach(DistributedDataParallel(model) if case == "DDP" and is_last() else model, **options)


def by_prepare(case: str) -> None:
    name = case.split()[0]
    value: Any = OPTIONS[case][is_last()] if case in OPTIONS else is_last()
    of_optimizer, of_prepare = ({name: value}, {}) if case in OPTIONS else ({}, {name: value})
    accelerator, objects = job(2, 48, optimizer=of_optimizer, width=8)
    prepare(accelerator, *objects, **of_prepare)


def messages(by: Callable[[str], None], cases: list[str]) -> list[str]:
    """Return the error of each case, caught so that ranks live on and must still be in step."""
    found = []
    for case in cases:
        with pytest.raises(AgreementError) as raised:
            by(case)
        found.append(str(raised.value))
        dist.barrier()
    return found


ATTACH = ["reduce_every_backward", "defer_gather", "overlap"]
PREPARE = ["check_weights_every", "whole_gradients"]


@pytest.mark.parametrize(
    ("by", "cases"),
    [
        (by_step, [case for case in OPTIONS if case != "shard"]),  # whole state is stepped without messages
        (by_attach, [*OPTIONS, *ATTACH]),
        (by_prepare, [*OPTIONS, *PREPARE]),
    ],
)
def test_options_that_differ_are_named_on_every_rank(by: Callable[[str], None], cases: list[str]) -> None:
    first, *others = run_ranks(3, messages, by, cases)
    assert others == [first, first]
    for case, message in zip(cases, first, strict=True):
        name = case.split()[0]
        assert message.startswith("rank 2 disagrees with rank 0: "), case
        call = "attach" if case in ATTACH else "prepare"
        assert (name if case in OPTIONS else f"{call}({name})") in message, case
        assert "alike on every rank" in message


def other_mesh() -> str:
    model = model_of_two_layers()
    two, one = (
        init_device_mesh("cpu", shape, mesh_dim_names=names) for shape, names in (((2, 2), ("a", "b")), ((4,), ("a",)))
    )
    optimizer = DistAdamW(model.parameters(), mesh=one if is_last() else two)
    with pytest.raises(AgreementError) as raised:
        optimizer.attach(model)
    return str(raised.value)


def test_another_mesh_is_named() -> None:
    for message in run_ranks(4, other_mesh):
        assert message.startswith(
            "rank 3 disagrees with rank 0: mesh is [[2, 2], ['a', 'b']] on rank 0 and [[4], ['a']]"
        )


def only_some_ranks_of_a_mesh() -> None:
    """Ranks outside of the mesh take no part, and the others do not wait for them."""
    ranks = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return
    model = model_of_two_layers()
    optimizer = DistAdamW(model.parameters(), mesh=DeviceMesh.from_group(ranks, "cpu"))
    optimizer.attach(model)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert optimizer.updates == 1


def test_only_the_ranks_of_a_mesh_are_asked() -> None:
    run_ranks(3, only_some_ranks_of_a_mesh)


# ---------------------------------------------------------------- changed later, by one rank alone


def halve_lr(optimizer: DistAdamW) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5  # a tensor in place


CHANGES: dict[str, Callable[[DistAdamW], Any]] = {
    "lr of group 1": lambda optimizer: optimizer.param_groups[1].update(lr=0.5),
    "betas of group 0": lambda optimizer: optimizer.param_groups[0].update(betas=[0.5, 0.9]),
    "weight_decay of group 0": lambda optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
    "eps of group 1": lambda optimizer: optimizer.param_groups[1].update(eps=0.5),
    "maximize of group 0": lambda optimizer: optimizer.param_groups[0].update(maximize=True),
    "lr of group 0": halve_lr,
    "max_grad_norm": lambda optimizer: setattr(optimizer, "max_grad_norm", 1.0),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"overlap": False},
    {"reduce_every_backward": True},
    {"ddp": True},
    {"ddp": True, "whole": True},
    {"ddp": True, "attached": False},
    {"attached": False},
    {"numbers": True},
    {"numbers": True, "attached": False},
    {"numbers": True, "reduce_every_backward": True},
]


def job_of(way: dict[str, Any]) -> tuple[nn.Module, DistAdamW]:
    way = dict(way)
    model: nn.Module = (layers := model_of_two_layers())
    first, last = [*layers[0].parameters()], [*layers[2].parameters()]
    lr = 0.1 if way.pop("numbers", False) else torch.tensor(0.1)  # digests of numbers alone are made in another way
    groups: list[dict[str, Any]] = [{"params": first, "lr": lr}, {"params": last}]
    optimizer = DistAdamW(groups)
    if way.pop("ddp", False):
        model = DistributedDataParallel(model)
    way.pop("whole", None)
    if way.pop("attached", True):
        optimizer.attach(model, **way)
    return model, optimizer


def changed_alone(way: dict[str, Any], change: str) -> str:
    model, optimizer = job_of(way)
    for n in range(3):
        model(torch.ones(2, 6)).sum().backward()
        if n == 1 and is_last():
            CHANGES[change](optimizer)
        if way.get("whole"):
            optimizer.gather_gradients() if n != 1 else None
        before = [param.detach().clone() for param in model.parameters()]
        try:
            optimizer.step()
        except AgreementError as error:
            assert n == 1
            assert optimizer.updates == 1
            assert all(map(torch.equal, before, model.parameters()))
            return str(error)
        optimizer.zero_grad()
    return "nothing"


def changed_alone_in_every_way(ways: list[dict[str, Any]]) -> list[str]:
    found = []
    for n, way in enumerate(ways):
        for change in list(CHANGES)[n % 2 :: 2]:
            found.append(f"{way} {change}: {changed_alone(way, change)}")
            dist.barrier()
    return found


def test_a_hyper_parameter_that_one_rank_alone_changed_is_named_before_the_update() -> None:
    first, other = run_ranks(2, changed_alone_in_every_way, WAYS)
    assert first == other
    for line in first:
        about, _, said = line.partition(": rank 1 disagrees with rank 0: ")
        assert any(about.endswith(name) and said.startswith(f"{name} is ") for name in CHANGES), line


def wrong_state_on_one_rank(way: dict[str, Any]) -> list[str]:
    said = []
    for first in (False, True):
        model, optimizer = job_of(way)
        for n in range(2):
            model(torch.ones(2, 6)).sum().backward()
            if n == 1 and is_last():
                optimizer.state[optimizer.param_groups[1]["params"][0]] = {"step": 1.0, "exp_avg": torch.zeros(3)}
            if n == 1 or not first:
                said.append(attempt(optimizer))
            optimizer.zero_grad()
        dist.barrier()
    return said


def attempt(optimizer: DistAdamW) -> str:
    try:
        optimizer.step()
    except AgreementError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("way", [{}, {"attached": False}])
def test_state_that_one_rank_alone_cannot_follow_is_an_error_on_all(way: dict[str, Any]) -> None:
    for said in run_ranks(2, wrong_state_on_one_rank, way):
        assert said[0] == ""
        for text in said[1:]:
            assert "optimizer.state has 'exp_avg' of parameter 0 of group 1" in text


# ---------------------------------------------------------------- what travels


def traffic(count: int) -> tuple[list[str], str]:
    """Collectives of a comparison of equal records, and of one that finds a difference."""
    record: dict[str, Any] = {"parameters of group 0": [[[1024, 1024], "torch.float32", True]] * count, "lr": [1e-3]}
    sent: list[str] = []
    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "broadcast")
    kept = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append(name)
            return kept[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        agreement.check_agreement(record)
        if is_last():
            record["parameters of group 0"][count // 2] = [[1024, 512], "torch.float32", True]
        with pytest.raises(AgreementError) as raised:
            agreement.check_agreement(record)
    finally:
        for name in names:
            setattr(dist, name, kept[name])
    return sent, str(raised.value)


def test_records_travel_only_when_they_differ_and_only_two_of_them() -> None:
    for sent, message in run_ranks(3, traffic, 10_000):
        assert sent == ["all_reduce", "all_reduce", "all_gather", *["broadcast_object_list"] * 2]
        assert message.startswith("rank 2 disagrees with rank 0: parameters of group 0[5000] is [[1024, 1024], ")


def in_a_subgroup() -> str:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return ""
    with pytest.raises(AgreementError) as raised:
        agreement.check_agreement({"lr": dist.get_rank()}, group)
    return str(raised.value)


def test_ranks_are_named_as_the_job_numbers_them() -> None:
    assert run_ranks(3, in_a_subgroup)[1].startswith("rank 2 disagrees with rank 1: lr is 1 on rank 1 and 2 on rank 2.")


class Counted:
    """A value that counts how often it was serialised."""

    written = 0

    def __repr__(self) -> str:
        Counted.written += 1
        return "counted"


def written_once() -> int:
    watch = agreement.AgreementWatch(None)
    Counted.written = 0
    for _ in range(3):
        watch.check({"value": Counted()})
    watch.settle()
    return Counted.written


def test_a_record_is_written_out_once() -> None:
    assert run_ranks(2, written_once) == [3, 3]
