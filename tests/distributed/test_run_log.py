"""Run logs of several ranks: equal for any number of ranks, and the first difference has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dist_adamw import DistAdamW, RunLog, prepare
from dist_adamw.cli import main
from dist_adamw.ranks.run_on_all import Ranks
from dist_adamw.run_log.digests import as_digest, position_sum
from dist_adamw.run_log.exchange import DigestExchange
from dist_adamw.run_log.log_file import FILE_NAME, leaf, read_log
from dist_adamw.run_log.parameters import LoggedParameters
from tests.distributed.engines import accelerator_on
from tests.distributed.jobs import epochs, job
from tests.distributed.test_reproducible import Model, loss_of
from tests.ranks import end_pool, expect_error_on_all, run_ranks

K = 7  # micro-batches of an update: not a multiple of 2 or 3
UPDATES = 4


def train(path: str, what: str = "") -> None:
    """Train a plain attached module, or one under DDP; ``what`` says what differs from other runs."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Model()
    optimizer = DistAdamW(model.parameters(), 1e-2, weight_decay=0.1, reproducible=True)
    updates = 0

    def flip(*_: Any) -> None:
        if what == "bit" and updates == 3:
            model.get_parameter("layers.1.bias").data[5:6].view(torch.int32)[:] ^= 1

    optimizer.register_step_post_hook(flip)
    optimizer.attach(model, defer_gather=what == "deferred")
    log = RunLog(path, model, optimizer)
    for _ in range(UPDATES):
        updates += 1
        for j in range(-(-K // ranks)):
            number = j * ranks + rank
            if number < K:
                source = 100 if what == "batch" and updates == 2 and number == 4 else number
                log.batch(torch.randn(5, generator=torch.Generator().manual_seed(100 * updates + source)))
                loss_of(model, updates, source).backward()
            else:
                optimizer.join_backward()
        optimizer.step()
        optimizer.zero_grad()
    log.close()


def diff(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["diff", str(a), str(b)])
    out, error = capsys.readouterr()
    assert not error
    return status, out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of one rank."""
    path = tmp_path_factory.mktemp("alone")
    run_ranks(1, train, str(path))
    return path


@pytest.mark.parametrize("what", ["", "deferred"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_log_for_every_number_of_ranks(
    ranks: int, what: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(ranks, train, str(tmp_path / "b"), what)
    status, text = diff(alone, tmp_path / "b", capsys)
    assert text == f"compared: 5 updates, 0 to 4\nequal\nthe runs also differ in:\n  ranks: 1 and {ranks}\n"
    assert status == 0
    assert [record.batch_count for record in read_log(alone).records.values()] == [0, K, K, K, K]
    files = [(path / FILE_NAME).read_text().splitlines()[1:] for path in (alone, tmp_path / "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_batch_of_one_rank(ranks: int, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(ranks, train, str(tmp_path / "b"), "batch")
    status, text = diff(alone, tmp_path / "b", capsys)
    assert status == 1
    assert "batches differ first at update 2: micro-batch 4 of 0 to 6\n" in text
    assert "parameters differ first at update 2: " in text
    assert "the cause: the batch\n" in text


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_bit_of_a_parameter(ranks: int, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(ranks, train, str(tmp_path / "b"), "bit")
    status, text = diff(alone, tmp_path / "b", capsys)
    assert status == 1
    assert "batches differ" not in text
    assert "parameters differ first at update 3: layers.1.bias\n" in text
    assert "more of" not in text


# ---------------------------------------------------------------- Accelerate


def accelerated(path: str, engine: str = "DDP", skip: bool = False) -> None:
    """The loop of every Accelerate user, with 6 micro-batches of 2 samples per update."""
    accumulation = 6 // dist.get_world_size()
    with accelerator_on(engine, accumulation):
        options: dict[str, Any] = {"optimizer": {"reproducible": engine == "DDP"}}
        accelerator, objects = job(accumulation, 48, loader={"batch_size": 2, "shuffle": True}, **options)
        before = RunLog(path, objects[0], objects[1]) if skip else None
        model, optimizer, loader, scheduler = prepare(accelerator, *objects)
        log = before or RunLog(path, model, optimizer)
        if skip:  # these batches are not trained on
            next(iter(loader))
            with torch.no_grad():
                model(next(iter(loader))[0])
        for _ in epochs(accelerator, model, optimizer, loader, scheduler, 2):
            pass
        log.close()


def test_prepare_tells_the_batches(tmp_path: Path) -> None:
    for ranks in (1, 2, 3):
        run_ranks(ranks, accelerated, str(tmp_path / str(ranks)))
    batches = [[r.batches for r in read_log(tmp_path / str(ranks)).records.values()] for ranks in (1, 2, 3)]
    assert batches[0] == batches[1] == batches[2]
    roots = [[r.root for r in read_log(tmp_path / str(ranks)).records.values()] for ranks in (1, 2, 3)]
    assert roots[0] == roots[1] == roots[2]
    assert len(set(roots[0])) == 8  # lr is 0 at the first update, the beginning of warm-up
    assert len(set(batches[0])) == 9  # the data is shuffled, and no two updates have the same
    assert [len(found) for found in batches[0]] == [0, *[2 * 6] * 8]
    # Batches that no backward pass takes are not logged.
    run_ranks(2, accelerated, str(tmp_path / "skip"), "DDP", True)
    log = read_log(tmp_path / "skip")
    assert [record.batch_count for record in log.records.values()][:4] == [0, 6, 6, 6]
    assert list(log.records[0].header.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def two_loaders(path: str) -> None:
    from torch.utils.data import DataLoader

    accelerator, objects = job(1, 12, loader={"batch_size": 2})
    model, optimizer, loader, scheduler = prepare(accelerator, *objects)
    second = accelerator.prepare(DataLoader(objects[2].dataset, batch_size=1))
    log = RunLog(path, model, optimizer)
    for (x, y), (z, _) in zip(loader, second, strict=False):
        accelerator.backward((model(x) - y).square().mean() + model(z).sum())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    log.close()


def test_batches_of_two_loaders_are_one_micro_batch(tmp_path: Path) -> None:
    run_ranks(2, two_loaders, str(tmp_path))
    assert [record.batch_count for record in read_log(tmp_path).records.values()] == [0, 2, 2, 2]


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-1", "ZeRO-2"])
def test_other_engines_log_the_same_batches(engine: str, tmp_path: Path) -> None:
    run_ranks(1, accelerated, str(tmp_path / "a"))
    run_ranks(2, deepspeed if engine.startswith("ZeRO") else accelerated, str(tmp_path / "b"), engine)
    one, other = (read_log(tmp_path / name).records for name in "ab")
    assert [record.batches for record in one.values()] == [record.batches for record in other.values()]
    assert one[0].root == other[0].root
    assert len({record.root for record in other.values()}) == 8  # the first update of the warm-up has lr 0


def deepspeed(path: str, engine: str, calls: bool = True) -> None:
    accumulation = 6 // dist.get_world_size()
    with accelerator_on(engine, accumulation):
        accelerator, objects = job(accumulation, 48, loader={"batch_size": 2, "shuffle": True})
        model, optimizer, loader, scheduler = prepare(accelerator, *objects)
        log = RunLog(path, model, optimizer)
        for _ in range(2):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(x), y))
                    if calls:
                        log.update()
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        log.close()


def test_deepspeed_without_update_is_warned_of(tmp_path: Path) -> None:
    run_ranks(2, not_called, str(tmp_path))


def not_called(path: str) -> None:
    with pytest.warns(UserWarning, match=r"under DeepSpeed call log.update\(\) after each update") as found:
        deepspeed(path, "ZeRO-2", False)
    assert len([one for one in found if "log.update" in str(one.message)]) == 1


# ---------------------------------------------------------------- sharded parameters


def sharded(path: str, how: str) -> list[bytes]:
    """Train under FSDP2; return digests of whole parameters, computed in one process."""
    model = Model()
    size = dist.get_world_size()
    shape, names = ((2, size // 2), ("nodes", "ranks")) if how == "HSDP" else ((size,), ("ranks",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model.layers, mesh=mesh)
    if how != "some":
        fully_shard(model, mesh=mesh)
    optimizer = DistAdamW(model.parameters(), 1e-2, shard=how != "some" and "auto")
    log = RunLog(path, model, optimizer)
    for update in range(2):
        loss_of(model, update, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    log.close()
    whole = [param.full_tensor() if hasattr(param, "full_tensor") else param for param in model.parameters()]
    return [leaf(as_digest(int(position_sum(param)))) for param in whole]


@pytest.mark.parametrize(("how", "ranks"), [("", 2), ("", 3), ("HSDP", 4), ("some", 2)])
def test_fsdp2_logs_whole_parameters(how: str, ranks: int, alone: Path, tmp_path: Path) -> None:
    found = run_ranks(ranks, sharded, str(tmp_path), how)
    log = read_log(tmp_path)
    assert log.records[2].parameters == b"".join(found[0])
    assert log.records[0].root == read_log(alone).records[0].root  # the weights of one process
    assert log.records[0].header.parameters == read_log(alone).records[0].header.parameters


def placed() -> tuple[list[int], list[int]]:
    """Sums of DTensors with any placements, and those of the whole tensors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    copy, rows, columns = Replicate(), Shard(0), Shard(1)
    places = [(columns, copy), (copy, columns), (rows, rows), (columns, rows), (copy, copy), (rows, copy)]
    whole = [torch.randn(5, 700) for _ in places]
    model = nn.ParameterList(distribute_tensor(x, mesh, place) for x, place in zip(whole, places, strict=True))
    ranks = Ranks.now()
    _, sums = DigestExchange(ranks).gather([], LoggedParameters(model, ranks).sums())
    return sums, [int(position_sum(x)) for x in whole]


def test_other_placements_are_whole_parameters_too() -> None:
    for sums, expected in run_ranks(4, placed):
        assert sums == expected


# ---------------------------------------------------------------- mistakes


def mistaken(path: str, what: str) -> None:
    model = nn.Linear(2, 2)
    optimizer: Any = DistAdamW(model.parameters())
    if what == "SGD" and dist.get_rank() == 1:
        optimizer = torch.optim.SGD(model.parameters())
    RunLog(path, model, optimizer, every=1 + (what == "every") * dist.get_rank())


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("SGD", "RunLog needs a DistAdamW, which counts its applied updates, and got SGD. .* (rank 1)"),
        ("every", "ranks passed different `every` to RunLog: [1, 2]. Pass the same."),
        ("file", "is not a run log, and nothing was written to it"),
    ],
)
def test_mistakes_are_errors_on_every_rank(what: str, sentence: str, tmp_path: Path) -> None:
    if what == "file":
        (tmp_path / FILE_NAME).write_text("mine")
    for error in expect_error_on_all(2, mistaken, str(tmp_path), what):
        assert error.startswith("ValueError: ")
        assert all(part in error for part in sentence.split(".*"))


def different_models() -> None:
    """One rank has a parameter more: only FSDP2's sums would be of different lengths."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    exchange = DigestExchange(Ranks.now())
    assert len(model) == 2
    exchange.gather([1] * 5, [1] * (2 + dist.get_rank()))


def test_different_numbers_of_parameters() -> None:
    for error in expect_error_on_all(2, different_models):
        assert "ranks log different numbers of parameters: [2, 3]." in error


def unreadable(path: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = DistAdamW(model.parameters(), shard=False)
    log = RunLog(path, model, optimizer)
    if dist.get_rank() == 0:
        model.bias = nn.Parameter(torch.ones(2, device="meta"))
    model.weight.grad = torch.ones(2, 2)
    try:
        optimizer.step()
    finally:
        log.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_cannot_read_its_parameters(ranks: int, tmp_path: Path) -> None:
    first, *others = expect_error_on_all(ranks, unreadable, str(tmp_path))
    assert first.startswith("RuntimeError: rank 0 could not hash an update for RunLog: ")
    for error in others:
        assert error == "RuntimeError: rank 0 could not hash an update for RunLog: see the error of that rank."


def later_group(path: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = DistAdamW(model.parameters(), shard=False)
    log = RunLog(path, model, optimizer)
    dist.destroy_process_group()
    model(torch.ones(2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"RunLog was made for 2 rank\(s\), and there are 1 now"):
        optimizer.step()
    log.close()


def test_a_group_that_is_gone(tmp_path: Path) -> None:
    try:
        run_ranks(2, later_group, str(tmp_path))
    finally:
        end_pool(2)


def counts(per_rank: list[int]) -> list[int]:
    exchange = DigestExchange(Ranks.now())
    rank = dist.get_rank()
    mine = [2**64 - 1 - 10 * rank - j for j in range(per_rank[rank])]
    found, _ = exchange.gather(mine, [])
    assert exchange.gather(mine, [2**63, 7])[0] == found
    return found


@pytest.mark.parametrize("per_rank", [[1, 1], [3, 3], [3, 2], [0, 0], [0, 2]])
def test_micro_batches_are_numbered_over_ranks(per_rank: list[int]) -> None:
    expected = [0] * max((2 * (count - 1) + rank + 1 for rank, count in enumerate(per_rank) if count), default=0)
    for rank, count in enumerate(per_rank):
        for j in range(count):
            expected[2 * j + rank] = 2**64 - 1 - 10 * rank - j
    assert run_ranks(2, counts, per_rank) == [expected] * 2
