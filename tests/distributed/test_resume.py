"""The resume matrix: stopped on one engine and number of ranks, in mid-cycle and mid-epoch; gone on with on another.

``python -m tests.distributed.test_resume`` prints all of it; ``--ranks 2 6 12`` of other numbers of ranks, which must
divide the global batch, 12.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare, rest_of_epoch
from dist_adamw.checkpoint.storage.files import read_whole
from dist_adamw.checkpoint.storage.index import read_index
from tests.distributed.engines import accelerator_on
from tests.known import unwrap
from tests.ranks import run_ranks

BATCH, EPOCH = 12, 60
# Cycles of 1.5, 2.25 and 3.375 epochs.
RECIPE: dict[str, Any] = {"restart_period": 1.5, "t_mult": 1.5, "min_lr": 1e-5}
STOP, UPDATES = 13, 38  # after three updates of the third epoch, in the second cycle; the end is in the third
ENGINES = ["single", "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
Place = tuple[str, int]
# Per update: samples before it, lr, weight decay, mean loss, and which samples of the data it saw.
Row = tuple[int, float, float, float, tuple[int, ...]]


def network(lora: bool = False) -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 2))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"]))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(EPOCH, 8, generator=generator)
    return TensorDataset(x, 5 * torch.sin(x[:, :2] * 3), torch.arange(EPOCH))


def train(engine: str, first: int, last: int, saved: str, loaded: str | None, options: dict[str, Any]) -> list[Row]:
    """Updates ``first`` to ``last`` of a job, from the checkpoint ``loaded`` on, and a checkpoint in ``saved``."""
    seedable = DataLoaderConfiguration(use_seedable_sampler=options.get("seedable", False))
    config = {} if engine.startswith("ZeRO") else {"dataloader_config": seedable}
    if engine == "FSDP2" and options.get("lora"):
        # By size, Accelerate would wrap the ModuleDicts that PEFT keeps its layers in.
        config["fsdp"] = {"auto_wrap_policy": "no_wrap"}
    accumulation = options.get("accumulation", 1)
    with accelerator_on(engine, accumulation, **config) as accelerator:
        ranks = accelerator.num_processes
        model = network(options.get("lora", False))
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.1)
        scheduler = CyclicLRWithRestarts(optimizer, **options.get("recipe", RECIPE))
        micro_batch = options.get("batch", BATCH) // (ranks * accumulation)
        order = torch.Generator().manual_seed(11 if loaded is None else 12)
        loader = DataLoader(data(), micro_batch, shuffle=True, generator=order)
        model, wrapped, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        if loaded is not None:
            accelerator.load_state(loaded)
        if "cooldown" in options:
            scheduler.cooldown(**options["cooldown"])
        rows = list(itertools.islice(updates(accelerator, model, wrapped, loader, scheduler), last - first))
        accelerator.save_state(saved)
        assert unwrap(wrapped).updates == last
    return rows


def updates(accelerator: Any, model: Any, wrapped: Any, loader: Any, scheduler: Any) -> Iterator[Row]:
    values: list[Any] = []
    inner = unwrap(wrapped)
    hook = lambda o, *_: values.append((o.param_groups[0]["lr"], o.param_groups[0]["weight_decay"]))  # noqa: E731
    inner.register_step_pre_hook(hook)
    losses, seen = [], []
    while True:
        for x, y, indices in rest_of_epoch(loader):
            with accelerator.accumulate(model):
                before = scheduler.samples
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
            losses.append(loss.detach())
            seen.append(indices)
            if accelerator.sync_gradients:
                total = torch.stack(losses).sum() / len(losses)
                everybodys: list[Any] = [torch.cat(seen).tolist()]
                if accelerator.num_processes > 1:
                    dist.all_reduce(total)
                    everybodys = [None] * accelerator.num_processes
                    dist.all_gather_object(everybodys, torch.cat(seen).tolist())
                yield (
                    before,
                    *values[-1],
                    float(total) / accelerator.num_processes,
                    tuple(sorted(itertools.chain(*everybodys))),
                )
                losses, seen = [], []


@functools.cache
def whole(place: Place, **options: bool) -> tuple[list[Row], dict[str, Tensor]]:
    """The run that is never stopped, and its end."""
    with tempfile.TemporaryDirectory() as folder:
        rows = run_ranks(place[1], train, place[0], 0, UPDATES, folder, None, options)[0]
        return rows, tensors(folder)


def tensors(folder: str) -> dict[str, Tensor]:
    index = read_index(Path(folder) / "dist_adamw")
    return {key: read_whole(index, key) for key in index.tensors if not key.startswith("rng.")}


def stop(place: Place, folder: str) -> list[Row]:
    return run_ranks(place[1], train, place[0], 0, STOP, folder, None, {})[0]


def go_on(place: Place, loaded: str, saved: str) -> list[Row]:
    return run_ranks(place[1], train, place[0], STOP, UPDATES, saved, loaded, {})[0]


def check(rows: list[Row], expected: list[Row]) -> float:
    """The largest relative difference of the loss; the clock and what it gives must be the same bits."""
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    worst = 0.0
    for (*_, loss, seen), (*_, expected_loss, expected_seen) in zip(rows, expected, strict=True):
        assert seen == expected_seen
        worst = max(worst, abs(loss - expected_loss) / expected_loss)
    return worst


def meeting(index: int) -> tuple[Place, Place]:
    """The ``index``-th ordered pair of engines, with numbers of ranks that take turns."""
    a, b = divmod(index, len(ENGINES))
    ranks = 1 + (a + index) % 3, 1 + (b + 2 * index) % 3
    one, other = (
        (engine, 1 if engine == "single" else n) for engine, n in zip((ENGINES[a], ENGINES[b]), ranks, strict=True)
    )
    return one, other


@pytest.mark.parametrize("index", range(len(ENGINES) ** 2), ids=lambda i: "-".join(f"{e}x{n}" for e, n in meeting(i)))
def test_going_on_elsewhere(index: int, tmp_path: Path) -> None:
    before, after = meeting(index)
    rows = stop(before, str(tmp_path / "stopped"))
    rows += go_on(after, str(tmp_path / "stopped"), str(tmp_path / "end"))
    assert check(rows, whole(("single", 1))[0]) < 1e-5
    for epoch in range(UPDATES * BATCH // EPOCH):  # no sample twice, none missed
        seen = [i for row in rows[epoch * EPOCH // BATCH : (epoch + 1) * EPOCH // BATCH] for i in row[-1]]
        assert sorted(seen) == list(range(EPOCH))


@pytest.mark.parametrize("place", [("single", 1), ("DDP", 2)])
def test_stopped_at_the_end_of_an_epoch(place: Place, tmp_path: Path) -> None:
    """Stop before the loop has noticed that no batch is left; the next epoch has a different order."""
    engine, ranks = place
    stopped, end, at = str(tmp_path / "stopped"), str(tmp_path / "end"), 2 * EPOCH // BATCH
    rows = run_ranks(ranks, train, engine, 0, at, stopped, None, {})[0]
    rows += run_ranks(3, train, "DDP", at, UPDATES, end, stopped, {})[0]
    assert check(rows, whole(("single", 1))[0]) < 1e-5


@pytest.mark.parametrize("seedable", [False, True])
@pytest.mark.parametrize("place", [(engine, 1 if engine == "single" else 3) for engine in ENGINES])
def test_same_engine_and_ranks_are_the_same_bits(place: Place, seedable: bool, tmp_path: Path) -> None:
    engine, ranks = place
    stopped, end, options = str(tmp_path / "stopped"), str(tmp_path / "end"), {"seedable": seedable}
    rows = run_ranks(ranks, train, engine, 0, STOP, stopped, None, options)[0]
    rows += run_ranks(ranks, train, engine, STOP, UPDATES, end, stopped, options)[0]
    expected, last = whole(place, seedable=seedable)
    assert rows == expected
    found = tensors(end)
    assert found.keys() == last.keys()
    assert all(torch.equal(found[key], last[key]) for key in last)


def test_another_global_batch_in_mid_epoch(tmp_path: Path) -> None:
    """12 samples an update become 20: after 36 samples of an epoch, batches of 10 do not begin at one of theirs."""
    rows = stop(("DDP", 3), str(tmp_path / "stopped"))
    options = {"batch": 20, "accumulation": 1}
    more = run_ranks(2, train, "DDP", STOP, STOP + 5, str(tmp_path / "end"), str(tmp_path / "stopped"), options)[0]
    third = [i for row in rows[10:13] for i in row[-1]]
    assert sorted(third + [i for row in more[:2] for i in row[-1]][: EPOCH - 36 + 4]) != list(range(EPOCH))  # padded
    assert set(third).isdisjoint({i for row in more[:1] for i in row[-1]})
    assert set(third) | {i for row in more[:2] for i in row[-1]} == set(range(EPOCH))
    assert [row[0] for row in more] == [156, 176, 180, 200, 220]  # the second update is of what is left of the epoch
    expected = whole(("single", 1))[0]
    by_samples = {row[0]: row[1:3] for row in expected}
    lr = {samples: lr for samples, lr, *_ in more}
    assert lr[156] == by_samples[156][0]
    assert lr[180] == by_samples[180][0]


@pytest.mark.parametrize("index", range(len(ENGINES)), ids=lambda i: f"{ENGINES[i]}-{ENGINES[(i + 1) % len(ENGINES)]}")
def test_low_rank_adapters(index: int, tmp_path: Path) -> None:
    """PEFT: most weights are frozen, and the trained ones have names in wrappers."""
    engine, other = ENGINES[index], ENGINES[(index + 1) % len(ENGINES)]
    stopped, end, options = str(tmp_path / "stopped"), str(tmp_path / "end"), {"lora": True}
    rows = run_ranks(1 if engine == "single" else 2, train, engine, 0, STOP, stopped, None, options)[0]
    rows += run_ranks(1 if other == "single" else 3, train, other, STOP, UPDATES, end, stopped, options)[0]
    expected, last = whole(("single", 1), lora=True)
    assert check(rows, expected) < 1e-5
    found = tensors(end)
    assert found.keys() == last.keys()
    frozen = [name for name in last if "base_layer" in name or "original_module" in name]
    assert len(frozen) == 6
    assert all(torch.equal(found[name], last[name]) for name in frozen)


def main() -> None:
    """Print the matrix: the largest relative difference of the loss from the run that was never stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], help="divisors of 12")
    ranks = parser.parse_args().ranks
    places = [("single", 1), *((engine, n) for engine in ENGINES[1:] for n in ranks)]
    expected = whole(("single", 1))[0]
    worst = 0.0
    print("stopped on x ranks, gone on with on y ranks: " + ", ".join(f"{e} {n}" for e, n in places))
    for before in places:
        with tempfile.TemporaryDirectory() as folder:
            rows = stop(before, f"{folder}/stopped")
            cells = []
            for after in places:
                cells.append(check(rows + go_on(after, f"{folder}/stopped", f"{folder}/end"), expected))
                print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        print(f"{before[0]:8} {before[1]}  " + " ".join(f"{cell:.0e}" for cell in cells), flush=True)
        worst = max(worst, *cells)
    print(f"{len(places) ** 2} resumes; samples, lr and weight decay the same bits; the loss within {worst:.1e}")


if __name__ == "__main__":
    main()
