"""Weights and state that differ between ranks stop the job on every rank, before the next save."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ParallelismConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dist_adamw import AgreementError, CyclicLRWithRestarts, DistAdamW, check_replicas, prepare, prepare_trainer
from dist_adamw.optimizer import replicas
from dist_adamw.optimizer.replicas import ReplicaWatch
from dist_adamw.optimizer.sharding.dtensors import local_of
from dist_adamw.optimizer.sharding.fingerprints import fingerprints
from dist_adamw.optimizer.sharding.memory_order import storage_order
from dist_adamw.ranks import collectives
from dist_adamw.wrappers import unwrap
from tests.distributed.engines import accelerator_on
from tests.distributed.jobs import data, model_of_two_layers
from tests.distributed.test_dtensors import sharded
from tests.distributed.test_trainer import Network, Noting, Samples, arguments_on
from tests.ranks import expect_error_on_all, run_ranks


def flip(tensor: Tensor, place: int = 0, bit: int = 0) -> None:
    """One bit of one element, fp32 or bf16."""
    integer = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    with torch.no_grad():
        bits = storage_order(local_of(tensor).detach()).view(integer)
        bits[place] ^= 1 << bit


# ---------------------------------------------------------------- fingerprints


def _swapped(tensor: Tensor, a: int, b: int) -> Tensor:
    tensor = tensor.clone()
    tensor[[a, b]] = tensor[[b, a]]
    return tensor


def _negated(tensor: Tensor, *places: int) -> Tensor:
    tensor = tensor.clone()
    tensor[list(places)] *= -1
    return tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda t: _swapped(t, 0, 1),  # inside a word
        lambda t: _swapped(t, 4, 10),  # inside a row
        lambda t: _swapped(t, 4, 4 + 256),  # inside a column
        lambda t: _swapped(t, 4, -300),  # between blocks
        lambda t: torch.cat([t[256:512], t[:256], t[512:]]),  # two rows
        lambda t: _swapped(t, -1, -4),
        lambda t: _negated(t, 1, 3),  # two top bits of words, whose sum is the same
        lambda t: _negated(t, 1, 257),
        lambda t: -t,
        lambda t: t.roll(256),
    ],
)
@pytest.mark.parametrize("numel", [1_001, 300_101])
def test_a_fingerprint_shows_where_values_lie(change: Callable[[Tensor], Tensor], numel: int) -> None:
    tensor = torch.randn(numel)
    assert fingerprints([tensor]) == fingerprints([tensor.clone()])
    assert fingerprints([tensor]) != fingerprints([change(tensor)])


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts(dtype: torch.dtype, rows: int) -> None:
    tensor = torch.randn(rows, 517).to(dtype)
    before = fingerprints([tensor])
    for place in (0, 511, 1023, tensor.numel() - 1):
        for bit in range(8 * dtype.itemsize - 1):
            flip(tensor, place, bit)
            assert fingerprints([tensor]) != before
            flip(tensor, place, bit)
    assert fingerprints([tensor]) == before


def test_a_fingerprint_is_of_the_values_alone() -> None:
    """It does not depend on the address, or on what else is compared."""
    tensor = torch.randn(70, 9)
    shifted = torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(70, 9)
    found = fingerprints([torch.empty(0), torch.tensor(3), tensor, tensor > 0, shifted])
    assert found[2] == found[4] == fingerprints([tensor])[0]
    assert len(set(found)) == 4


# ---------------------------------------------------------------- replicas, by themselves


class Everything(nn.Module):
    """Whatever a model may have."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.first.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.last.weight
        self.empty = nn.Parameter(torch.empty(0))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.nan = nn.Parameter(torch.tensor([float("nan"), float("inf"), -0.0]))
        self.whole = nn.Parameter(torch.arange(5), requires_grad=False)
        self.table = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.alike = nn.ParameterList(torch.randn(4) for _ in range(4))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each rank's buffers depend on its own samples."""
        self.seen += dist.get_rank()
        self.cache = torch.zeros(3 + dist.get_rank())
        x = self.norm(self.first(x.bfloat16()).float())
        return self.tied(self.last(x)).sum() * self.scalar + sum(p.sum() for p in self.alike)


def equal_replicas() -> None:
    model = Everything()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = DistAdamW(params, lr=1e-2)
    optimizer.attach(wrapped, defer_gather=True)
    for step in range(3):
        check_replicas(wrapped, optimizer)
        wrapped(torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))).backward()
        optimizer.step()
        optimizer.zero_grad()
    check_replicas(model, optimizer)
    statistics = [torch.zeros(8) for _ in range(dist.get_world_size())]
    dist.all_gather(statistics, model.norm.running_mean)
    assert not torch.equal(*statistics[:2])  # buffers did differ


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equal_replicas_raise_nothing(world_size: int) -> None:
    run_ranks(world_size, equal_replicas if world_size > 1 else one_rank)


def one_rank() -> None:
    check_replicas(Everything(), DistAdamW(Everything().alike.parameters()))


def change(model: Everything, what: str) -> None:
    with torch.no_grad():
        if what == "swap":
            a, b = model.alike[0].clone(), model.alike[2].clone()
            model.alike[0].copy_(b)
            model.alike[2].copy_(a)
        elif what == "nan":
            model.nan.view(torch.int32)[0] ^= 1  # another nan
        elif what == "minus zero":
            model.nan[2] = 0.0
        elif what == "whole":
            model.whole[4] += 1
        elif what == "all":
            for param in model.parameters():
                param.add_(1)
        else:
            flip(model.get_parameter(what), 5)


def message_of(check: Callable[..., object], *args: Any) -> str:
    """Return the error's text, caught so that the ranks live on."""
    with pytest.raises(AgreementError) as raised:
        check(*args)
    return str(raised.value)


DIFFERENCES = {
    "first.weight": "'first.weight'",
    "first.bias": "'first.bias'",
    "last.weight": "'last.weight'",
    "table": "'table'",
    "swap": "'alike.0', 'alike.2'",
    "nan": "'nan'",
    "minus zero": "'nan'",
    "whole": "'whole'",
    "all": "'scalar', 'nan', 'whole' and 12 more",
}


def one_differs() -> list[str]:
    messages = []
    for what in DIFFERENCES:
        model = Everything()
        check_replicas(model)
        if dist.get_rank() == 1:
            change(model, what)
        messages.append(message_of(lambda model=model: check_replicas(model)))
    return messages


@pytest.mark.parametrize(
    ("world_size", "said"),
    [
        (2, "ranks 0, 1 differ in {},"),
        (3, "rank 1 differs from ranks 0, 2 in {}."),
    ],
)
def test_a_difference_is_named_on_every_rank(world_size: int, said: str) -> None:
    for messages in run_ranks(world_size, one_differs):
        for message, names in zip(messages, DIFFERENCES.values(), strict=True):
            assert message.startswith(said.format(names))


def one_of_four_differs() -> tuple[str, list[int]]:
    model = model_of_two_layers()
    if dist.get_rank() == 3:
        flip(list(model.parameters())[1])
    sent: list[int] = []
    broadcast = collectives.broadcast_object

    def counted(value: Any, rank: int, *args: Any) -> Any:
        sent.append(rank)
        return broadcast(value, rank, *args)

    with mock.patch.object(collectives, "broadcast_object", counted):
        return message_of(check_replicas, model), sent


def test_one_rank_with_each_value_explains_a_difference() -> None:
    """A thousand ranks' fingerprints of thousands of tensors would take a quarter of a minute to read."""
    for message, sent in run_ranks(4, one_of_four_differs):
        assert message.startswith("rank 3 differs from ranks 0, 1, 2 in '0.bias'.")
        assert sent == [0, 3]


def all_differ() -> str:
    model = model_of_two_layers()
    flip(next(model.parameters()), dist.get_rank())
    with mock.patch.object(replicas, "_SENDERS", 3):
        return message_of(check_replicas, model)


def test_of_very_many_different_ranks_some_are_named() -> None:
    for message in run_ranks(4, all_differ):
        assert re.match(r"ranks 0, 1, 2 differ in '0\.weight'.* 1 more rank", message)


def several_differ() -> str:
    model = model_of_two_layers()
    flip(next(model.parameters()), 0, dist.get_rank())
    if dist.get_rank() == 2:
        flip(list(model.parameters())[-1])
    return message_of(check_replicas, model)


def test_every_difference_has_its_own_ranks() -> None:
    for message in run_ranks(3, several_differ):
        assert "ranks 0, 1, 2 differ in '0.weight', and it is not known" in message
        assert "; rank 2 differs from ranks 0, 1 in '2.bias'." in message


def other_shape() -> str:
    model = model_of_two_layers(20 + (dist.get_rank() == 0))
    if dist.get_rank() == 2:
        model.register_parameter("more", nn.Parameter(torch.ones(3)))
    return message_of(check_replicas, model)


def test_another_shape_and_a_missing_parameter_differ_too() -> None:
    for message in run_ranks(3, other_shape):
        assert "rank 0 differs from ranks 1, 2 in '0.weight', '0.bias', '2.weight' and 1 more" in message
        assert "rank 2 differs from ranks 0, 1 in 'more'" in message


def left_out(how: str) -> None:
    """Parameters that are meant to differ."""
    model = model_of_two_layers()
    model.own = nn.Parameter(torch.full((3,), float(dist.get_rank())))
    if how == "DDP":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["own"])
        check_replicas(DistributedDataParallel(model))
    elif how == "FSDP2":
        fully_shard(model, ignored_params={model.own})
        check_replicas(model)
    else:
        model.own.allreduce = False  # type: ignore[attr-defined]
        check_replicas(model)


@pytest.mark.parametrize("how", ["DDP", "FSDP2", "an expert of DeepSpeed"])
def test_what_ranks_have_of_their_own_is_left_out(how: str) -> None:
    run_ranks(2, left_out, how)


def hsdp(what: str) -> str:
    """Ranks 0 and 2, and 1 and 3, hold the same."""
    model = sharded("hsdp")
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))).sum().backward()
        optimizer.step()
        check_replicas(model, optimizer)
    if dist.get_rank() == 3 and what == "weights":
        flip(model.get_parameter("0.weight"))
    if dist.get_rank() == 3 and what == "moments":
        flip(optimizer.state[model.get_parameter("2.weight")]["exp_avg"])
    return message_of(check_replicas, model, optimizer)


@pytest.mark.parametrize(("what", "said"), [("weights", "'0.weight'"), ("moments", "'exp_avg of 0.weight to 4.bias'")])
def test_hsdp(what: str, said: str) -> None:
    for message in run_ranks(4, hsdp, what):
        assert message.startswith(f"ranks 1, 3 differ in {said}, and it is not known")


def fully_sharded() -> None:
    """No two ranks hold the same, so there is nothing to compare."""
    model = sharded("fsdp2")
    flip(model.get_parameter("0.weight"), 0, dist.get_rank())
    check_replicas(model)


def test_fsdp2_alone_has_no_copies() -> None:
    run_ranks(2, fully_sharded)


def state(how: str) -> str:
    model = model_of_two_layers()
    options: dict[str, Any] = {"shard": False}
    if how == "mesh":
        options = {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "ranks"))}
    optimizer = DistAdamW(model.parameters(), lr=1e-2, **options)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    check_replicas(model, optimizer)
    if dist.get_rank() == 1:
        flip(optimizer.shards[0].moments["exp_avg_sq"])
    return message_of(check_replicas, model, optimizer)


@pytest.mark.parametrize(
    ("how", "world_size", "said"),
    [("whole", 3, "rank 1 differs from ranks 0, 2 in "), ("mesh", 4, "ranks 1, 3 differ in ")],
)
def test_copies_of_state(how: str, world_size: int, said: str) -> None:
    for message in run_ranks(world_size, state, how):
        assert message.startswith(f"{said}'exp_avg_sq of 0.weight to 2.bias'")


# ---------------------------------------------------------------- in a training job

Job = tuple[Accelerator, nn.Module, Any, Any, CyclicLRWithRestarts]
HSDP: dict[str, Any] = {"dp_replicate_size": 2, "dp_shard_size": 2}


@contextlib.contextmanager
def job_on(engine: str, every: int, kind: Callable[..., torch.optim.Optimizer] = DistAdamW) -> Iterator[Job]:
    """A prepared job, of two groups (ZeRO steps them one after the other)."""
    config: dict[str, Any] = {"gradient_clipping": 0.0} if engine.startswith("ZeRO") else {}
    if engine == "HSDP":
        engine, config = "FSDP2", {"parallelism_config": ParallelismConfig(**HSDP)}
    with accelerator_on(engine, 1, **config) as accelerator:
        model = model_of_two_layers()
        groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
        optimizer = kind(groups, lr=1e-2)
        scheduler = CyclicLRWithRestarts(optimizer, restart_period=2)
        loader = DataLoader(data(96), batch_size=2)
        yield accelerator, *prepare(accelerator, model, optimizer, loader, scheduler, check_weights_every=every)


def spoil(model: nn.Module, optimizer: Any, what: str) -> None:
    groups = unwrap(optimizer).param_groups
    if what == "lr":
        groups[0]["lr"] *= -1
    if what == "betas":
        groups[-1]["betas"] = (0.8, 0.999)
    if what == "weights":
        flip(list(model.parameters())[2], 1)


def trained(engine: str, what: str, at: int, every: int) -> int:
    """Train, and spoil something on the last rank during update ``at``; returns the updates after at most two more."""
    with job_on(engine, every) as (accelerator, model, optimizer, loader, scheduler):
        update = 0
        for x, y in loader:
            if update == at and dist.get_rank() == dist.get_world_size() - 1:
                spoil(model, optimizer, what)
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            update += 1
            if what and update > at + 2:
                break
        return update


ENGINES = [("DDP", 2), ("DDP", 3), ("HSDP", 4), ("ZeRO-1", 2), ("ZeRO-2", 2)]


@pytest.mark.parametrize(("engine", "world_size"), [*ENGINES, ("FSDP2", 2), ("ZeRO-3", 2), ("ZeRO-2 offload", 2)])
def test_a_healthy_job_goes_on(engine: str, world_size: int) -> None:
    assert set(run_ranks(world_size, trained, engine, "", 0, 3)) == {96 // (2 * world_size)}


def compares_at_other_updates() -> None:
    every = 0 if dist.get_rank() == 1 else 3
    ReplicaWatch(None, lambda: {"samples": 0}, lambda: None, every).before_update()


def test_ranks_that_compare_at_other_updates_are_told() -> None:
    for error in expect_error_on_all(2, compares_at_other_updates):
        assert error.startswith(
            "AgreementError: rank 1 disagrees with rank 0: check_weights_every is 3 on rank 0 and 0 on"
        )


def _odd(engine: str, world_size: int) -> str:
    if engine == "HSDP":
        return "ranks 1, 3 differ in "
    return "rank 2 differs from ranks 0, 1 in " if world_size == 3 else "ranks 0, 1 differ in "


@pytest.mark.parametrize(("engine", "world_size"), ENGINES)
def test_weights_that_differ_at_an_update_stop_it(engine: str, world_size: int) -> None:
    for message in run_ranks(world_size, message_of, trained, engine, "weights", 6, 3):
        assert message.startswith(f"{_odd(engine, world_size)}'2.weight'")


def test_weights_are_compared_when_they_were_told_to_be() -> None:
    """DDP gathers the owners' weights at the next update, so nothing is left of it at update 6."""
    assert run_ranks(2, trained, "DDP", "weights", 5, 3) == [8, 8]
    assert run_ranks(2, trained, "DDP", "weights", 6, 0) == [9, 9]


@pytest.mark.parametrize("what", ["lr", "betas"])
@pytest.mark.parametrize(("engine", "world_size"), [("DDP", 3), ("HSDP", 4), ("ZeRO-2", 2), ("ZeRO-3", 2)])
def test_hyper_parameters_that_differ_stop_it(engine: str, world_size: int, what: str) -> None:
    for message in run_ranks(world_size, message_of, trained, engine, what, 4, 0):
        assert message.startswith(f"rank {world_size - 1} disagrees with rank 0: ")
        assert _named(engine, what) in message


def _named(engine: str, what: str) -> str:
    if engine == "DDP":  # the optimizer itself compares, before the update
        return f"{what} of group "
    return "lr is [" if what == "lr" else "'betas': [0.8, 0.999]"


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("what", ["weights", "betas"])
@pytest.mark.parametrize(("engine", "world_size"), [("DDP", 2), ("HSDP", 4), ("ZeRO-2", 2)])
def test_nothing_is_saved_afterwards(engine: str, world_size: int, what: str, tmp_path: Path) -> None:
    """The folder of the save before is as it was: after the update 1, not 2."""
    saved = tmp_path / "saved"
    folders = (str(saved), str(tmp_path))
    for message in run_ranks(world_size, message_of, save_and_spoil, engine, what, *folders):
        said = f"{_odd(engine, world_size)}'2.weight'" if what == "weights" else "disagrees with rank 0"
        assert said in message
    before = torch.load(tmp_path / "before.pt", weights_only=True)
    assert len(before) > 1
    assert {name: list(value) for name, value in contents(saved).items()} == before


def save_and_spoil(engine: str, what: str, saved: str, notes: str) -> None:
    with job_on(engine, 100) as (accelerator, model, optimizer, loader, scheduler):
        for update, (x, y) in enumerate(loader):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if update == 1:
                accelerator.save_state(saved)
                dist.barrier()
                if dist.get_rank() == 0:
                    noted = {name: list(value) for name, value in contents(Path(saved)).items()}
                    torch.save(noted, Path(notes) / "before.pt")
            if update == 2:
                if dist.get_rank() == dist.get_world_size() - 1:
                    spoil(model, optimizer, what)
                accelerator.save_state(saved)


def other_optimizer(what: str) -> None:
    """torch's AdamW under DDP: weights are never gathered, so a difference stays."""
    with job_on("DDP", 3, torch.optim.AdamW) as (accelerator, model, optimizer, loader, scheduler):
        for update, (x, y) in enumerate(loader):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if update == 3 and dist.get_rank() == 1:
                spoil(model, optimizer, what)
            assert update < 7


@pytest.mark.parametrize(("what", "said"), [("weights", "'2.weight'"), ("lr", "lr is [")])
def test_other_optimizers_are_watched_too(what: str, said: str) -> None:
    for message in run_ranks(2, message_of, other_optimizer, what):
        assert said in message


def one_rank_saves() -> None:
    watch = ReplicaWatch(None, lambda: {"samples": 3}, lambda: None, 5)
    if dist.get_rank() == 0:
        watch.before_save()
    for _ in range(2):
        watch.before_update()


def test_a_save_on_one_rank_is_no_hang() -> None:
    for message in run_ranks(2, message_of, one_rank_saves):
        assert "is 'a save' on rank 0 and 'an update' on rank 1" in message


# ---------------------------------------------------------------- Trainer


def trainer_job(engine: str, what: str, at: int, folder: str, **options: Any) -> None:
    class Spoiling(Noting):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == at and dist.get_rank() == 1:
                spoil(model, self.optimizer, what)
            return super().training_step(model, *args, **kwargs)

    with arguments_on(engine, folder, **options) as args:
        trainer = Spoiling(Network(), args, train_dataset=Samples())
        prepare_trainer(trainer, scheduler={"restart_period": 2}, check_weights_every=4).train()


TRAINERS = ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"]


@pytest.mark.parametrize("what", ["lr", "betas"])
@pytest.mark.parametrize("engine", TRAINERS)
def test_trainer_watches_hyper_parameters(engine: str, what: str, tmp_path: Path) -> None:
    """From update 5 on; the checkpoint of update 5 is there, the one of update 6 is not."""
    options = {"save_strategy": "steps", "save_steps": 1}
    for message in run_ranks(2, message_of, with_options, engine, what, 5, str(tmp_path), options):
        assert message.startswith("rank 1 disagrees with rank 0: ")
        assert _named(engine, what) in message
    assert (tmp_path / "checkpoint-5").is_dir()
    assert not (tmp_path / "checkpoint-6").exists()


@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2"])
def test_trainer_compares_weights(engine: str, tmp_path: Path) -> None:
    for message in run_ranks(2, message_of, with_options, engine, "weights", 8, str(tmp_path), {}):
        assert message.startswith("ranks 0, 1 differ in 'body.1.weight'")


def test_trainer_compares_at_its_end(tmp_path: Path) -> None:
    """Nothing comes after the last update, which had another lr on one rank."""
    for message in run_ranks(2, message_of, with_options, "ZeRO-2", "lr", 17, str(tmp_path), {}):
        assert "lr is [" in message


def with_options(engine: str, what: str, at: int, folder: str, options: dict[str, Any]) -> None:
    trainer_job(engine, what, at, folder, **options)
