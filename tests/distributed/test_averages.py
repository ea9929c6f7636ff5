"""Averages of the weights on every engine, through resumes: the bits of torch's functions, fed the same weights."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import dist_adamw
from dist_adamw import EMA, AgreementError, CheckpointError, CyclicLRWithRestarts, DistAdamW, Mean, prepare
from dist_adamw.checkpoint.storage.files import read_whole
from dist_adamw.checkpoint.storage.index import read_index
from tests.distributed.engines import accelerator_on
from tests.ranks import run_ranks

BATCH, EPOCH = 24, 120
AVERAGES = {
    "ema": EMA(decay=0.9),
    "slow": EMA(timescale="20 updates"),
    "ends": Mean(),
    "swa": Mean(every="3 updates", start="4 updates"),
    "lawa": Mean(every="2 updates", last=3),
}
RECIPE: dict[str, Any] = {"restart_period": "6 updates", "t_mult": 1}
Place = tuple[str, int]
Weights = list[Tensor]


def network() -> Any:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 2))


def whole(model: Any) -> Weights:
    """The whole weights, on any engine. Collective."""
    params = list(model.parameters())
    gathered: Any = contextlib.nullcontext()
    if hasattr(params[0], "ds_tensor"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(params)
    with gathered:
        return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def job(engine: str, first: int, last: int, saved: str, loaded: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Train updates ``first`` to ``last``; return the weights after each, and what the averages showed at the end."""
    with accelerator_on(engine, 2) as accelerator:
        model = network()
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, averages=options.get("averages", AVERAGES))
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        x = torch.randn(EPOCH, 8, generator=torch.Generator().manual_seed(5))
        micro_batch = BATCH // (2 * accelerator.num_processes)
        loader = DataLoader(TensorDataset(x, 5 * torch.sin(x[:, :2] * 3)), micro_batch)
        prepared: Any = prepare(accelerator, model, optimizer, loader, scheduler)
        model, wrapped, loader, scheduler = prepared
        if loaded is not None:
            accelerator.load_state(loaded)
        after: list[Weights] = []
        while len(after) < last - first:
            for inputs, targets in dist_adamw.rest_of_epoch(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                    wrapped.step()
                    scheduler.step()
                    wrapped.zero_grad()
                if accelerator.sync_gradients:
                    after.append(whole(model))
                if len(after) == last - first:
                    break
        shown = {}
        model.eval()
        with torch.no_grad():
            before = model(x)
            for name in options.get("shown", []):
                with wrapped.averaged(name):
                    shown[name] = (whole(model), model(x))
                    refused = [pytest.raises(RuntimeError, match=rf"inside .*averaged\('{name}'\)") for _ in range(2)]
                    with refused[0]:
                        optimizer.step()
                    with refused[1]:
                        accelerator.save_state(saved)
            assert torch.equal(model(x), before)
        assert all(map(torch.equal, whole(model), after[-1]))
        model.train()
        accelerator.save_state(saved)
        counts = {name: optimizer.contributions(name) for name in options.get("shown", [])}
        if shown:  # for inference, into the same engine
            dist_adamw.load(Path(saved) / "dist_adamw", model, average="ema")
            assert all(map(torch.equal, whole(model), shown["ema"][0]))
        return {"after": after, "shown": shown, "x": x, "counts": counts}


def ema_of(weights: list[Weights], decay: float) -> Weights:
    average = [w.clone() for w in weights[0]]
    for current in weights[1:]:
        get_ema_multi_avg_fn(decay)(average, current, torch.tensor(1))
    return average


def mean_of(weights: list[Weights]) -> Weights:
    average = [w.clone() for w in weights[0]]
    for n, current in enumerate(weights[1:], 1):
        get_swa_multi_avg_fn()(average, current, n)
    return average


def expected(after: list[Weights]) -> dict[str, tuple[Weights, int]]:
    """The averages by torch's functions, of the weights after updates 1, 2, ..., and how many each is of."""
    at: dict[str, list[int]] = {
        "ends": [6, 12, 18, 24],
        "swa": [4, 7, 10, 13, 16, 19, 22],
        "lawa": [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22],
    }
    made = {name: [after[k - 1] for k in updates if k <= len(after)] for name, updates in at.items()}
    found = {name: (mean_of(made[name]), len(made[name])) for name in ("ends", "swa")}
    found["lawa"] = (mean_of(made["lawa"][-3:]), len(made["lawa"]))
    decay = torch.exp(torch.tensor(-1 / 20, dtype=torch.float64)).item()
    return {**found, "ema": (ema_of(after, 0.9), len(after)), "slow": (ema_of(after, decay), len(after))}


def check(result: dict[str, Any], after: list[Weights]) -> None:
    for name, (average, count) in expected(after).items():
        weights, outputs = result["shown"][name]
        assert all(map(torch.equal, weights, average)), name
        assert result["counts"][name] == count, name
        model = network()
        with torch.no_grad():
            for param, value in zip(model.parameters(), average, strict=True):
                param.copy_(value)
            torch.testing.assert_close(outputs, model(result["x"]), rtol=1e-5, atol=1e-6)  # ranks' own blocking
    assert not all(map(torch.equal, result["shown"]["ema"][0], after[-1]))


CHAINS: dict[str, list[tuple[Place, int]]] = {
    "one": [(("single", 1), 3), (("DDP", 2), 7), (("FSDP2", 3), 11), (("ZeRO-2", 2), 14), (("DDP", 3), 19)],
    "two": [(("ZeRO-3", 2), 5), (("DDP", 4), 8), (("ZeRO-1", 3), 13), (("FSDP2", 2), 17), (("single", 1), 20)],
    "three": [(("FSDP2", 4), 7), (("ZeRO-3", 3), 13)],
    "four": [(("DDP", 1), 5), (("ZeRO-2", 4), 9)],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_bits_of_torch_on_every_engine_through_resumes(chain: str, tmp_path: Path) -> None:
    after: list[Weights] = []
    loaded = None
    for place, last in CHAINS[chain]:
        saved, options = str(tmp_path / str(last)), {"shown": [*AVERAGES] if last > 5 else []}
        result = run_ranks(place[1], job, place[0], len(after), last, saved, loaded, options)[0]
        after += result["after"]
        loaded = saved
        if options["shown"]:
            check(result, after)


WAYS: dict[str, dict[str, Any]] = {
    "overlap": {},
    "reduce every backward": {"attach": {"reduce_every_backward": True}},
    "deferred gather": {"attach": {"defer_gather": True}},
    "small buckets": {"options": {"bucket_numel": 64}},
    "whole state": {"options": {"shard": False}, "attach": None},
    "mesh": {"mesh": (2, 2)},
    "reproducible": {"options": {"reproducible": True}},
    "clipping": {"options": {"max_grad_norm": 0.1}},
    "two dtypes": {"double": True},
}


def attached(way: dict[str, Any]) -> None:
    model = network()
    if way.get("double"):
        model.append(nn.Linear(2, 3).double())
        model[4].register_forward_hook(lambda *call: call[2].double())
    options = {"averages": {"ema": EMA(decay=0.9), "lawa": Mean(every=None, last=2)}, **way.get("options", {})}
    if "mesh" in way:
        options["mesh"] = init_device_mesh("cpu", way["mesh"])
    optimizer = DistAdamW(model.parameters(), lr=1e-2, **options)
    if way.get("attach", {}) is not None:
        optimizer.attach(model, **way.get("attach", {}))
    series = []
    for k in range(5):
        seed = k if way.get("attach", {}) is None else 10 * k + dist.get_rank()
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.add_to_average("lawa")
        series.append(whole(model))
    for name, expected in {"ema": ema_of(series, 0.9), "lawa": mean_of(series[-2:])}.items():
        with optimizer.averaged(name):
            assert all(map(torch.equal, whole(model), expected))
    assert all(map(torch.equal, whole(model), series[-1]))
    dist_adamw.check_replicas(model, optimizer)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_attach(way: str) -> None:
    run_ranks(4 if way == "mesh" else 2, attached, WAYS[way])


def ranks_do_different_things() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.9)})
    optimizer.attach(model)
    for k in range(3):
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(k))).sum().backward()
        if k < 2:
            optimizer.step()
            optimizer.zero_grad()
    before = whole(model)
    act: Any = optimizer.step if dist.get_rank() == 1 else optimizer.averaged("ema").__enter__
    with pytest.raises(AgreementError, match=r"rank 1"):
        act()
    assert all(map(torch.equal, whole(model), before))


def test_an_average_is_shown_by_all_ranks_or_none() -> None:
    run_ranks(2, ranks_do_different_things)


def ranks_show_different_averages(engine: str) -> None:
    with accelerator_on(engine, 1) as accelerator:
        model = network()
        optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.9), "slow": EMA(decay=0.99)})
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        loader = DataLoader(TensorDataset(torch.randn(EPOCH, 8)), BATCH // 2)
        prepared: Any = prepare(accelerator, model, optimizer, loader, scheduler)
        model, wrapped, loader, scheduler = prepared
        for (inputs,) in loader:
            accelerator.backward(model(inputs).square().mean())
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
        before = whole(model)
        with pytest.raises(AgreementError, match=r"the average to show is .*ema.* rank 0.*slow.* rank 1"):
            wrapped.averaged("slow" if dist.get_rank() else "ema").__enter__()
        assert all(map(torch.equal, whole(model), before))


@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "ZeRO-2"])
def test_all_ranks_show_the_same_average(engine: str) -> None:
    run_ranks(2, ranks_show_different_averages, engine)


def options_differ() -> None:
    optimizer = DistAdamW(network().parameters(), averages={"ema": EMA(decay=0.9 + 0.01 * dist.get_rank())})
    with pytest.raises(AgreementError, match=r"averages.*0\.9.*0\.91"):
        optimizer.attach(network())


def test_ranks_keep_the_same_averages() -> None:
    run_ranks(2, options_differ)


def of_another_job(folder: str) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages={"swa": Mean()})
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, EPOCH, **RECIPE)
    before = whole(model)
    with pytest.raises(
        CheckpointError, match=r"these averages of the weights: ema: EMA.*; and this optimizer keeps: swa: Mean"
    ):
        dist_adamw.load(folder, model, optimizer, scheduler)
    assert all(map(torch.equal, whole(model), before))


def save_with_ema(folder: str) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.9)})
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, EPOCH, **RECIPE)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    dist_adamw.save(folder, model, optimizer, scheduler)


def test_a_checkpoint_with_other_averages_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(3, save_with_ema, str(tmp_path))
    run_ranks(2, of_another_job, str(tmp_path))


def without_prepare() -> None:
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.5)})
    series = []
    for k in range(3):
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(k))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        series.append(whole(model))
    with pytest.raises(RuntimeError, match=r"under FSDP2 averaged\(\) needs the model.*use_model"):
        optimizer.averaged("ema").__enter__()
    optimizer.use_model(model)
    with torch.no_grad():
        before = model(torch.ones(4, 8))
    with optimizer.averaged("ema"):
        assert all(map(torch.equal, whole(model), ema_of(series, 0.5)))
        with torch.no_grad():
            assert not torch.equal(model(torch.ones(4, 8)), before)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(4, 8)), before)


def test_fsdp2_without_prepare() -> None:
    run_ranks(2, without_prepare)


def in_bf16(engine: str) -> tuple[list[Tensor], list[Tensor]]:
    """The masters' average by the engine's state, and what the model showed, of a run in bf16."""
    with accelerator_on(engine, 1, bf16={"enabled": True}) as accelerator:
        model = network()
        optimizer = DistAdamW(model.parameters(), lr=1e-2, averages={"ema": EMA(decay=0.5)})
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        x = torch.randn(EPOCH, 8, generator=torch.Generator().manual_seed(5))
        loader = DataLoader(TensorDataset(x), BATCH // accelerator.num_processes)
        prepared: Any = prepare(accelerator, model, optimizer, loader, scheduler)
        model, wrapped, loader, scheduler = prepared
        for (inputs,) in loader:
            accelerator.backward(model(inputs.bfloat16()).float().square().mean())
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
        before = whole(model)
        with wrapped.averaged("ema"):
            shown = whole(model)
        assert all(map(torch.equal, whole(model), before))
        with tempfile.TemporaryDirectory() as folder:
            everybodys = [folder]
            dist.broadcast_object_list(everybodys)
            dist_adamw.save(everybodys[0], model, wrapped, scheduler)
            index = read_index(Path(everybodys[0]))
            names = [name for name, _ in network().named_parameters()]
            saved = [read_whole(index, f"ema.{name}") for name in names]
            dist.barrier()
        return saved, shown


@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-3"])
def test_deepspeed_in_bf16_shows_the_rounded_average_of_fp32_weights(engine: str) -> None:
    saved, shown = run_ranks(2, in_bf16, engine)[0]
    assert shown[0].dtype == torch.bfloat16
    assert all(torch.equal(average.bfloat16(), weight) for average, weight in zip(saved, shown, strict=True))
    assert not all(torch.equal(average, average.bfloat16().float()) for average in saved)
