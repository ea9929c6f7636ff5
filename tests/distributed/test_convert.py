"""Import and export: trained there and gone on with here, and the other way round; nothing is executed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import CyclicLRWithRestarts, DistAdamW, export_checkpoint, import_checkpoint, load, save
from dist_adamw.checkpoint.storage.files import read_whole
from dist_adamw.checkpoint.storage.index import read_index, write_index
from dist_adamw.checkpoint.storage.locks import Lock
from dist_adamw.cli import main
from dist_adamw.errors import CheckpointError
from tests.distributed.engines import ZERO, accelerator_on
from tests.distributed.test_deepspeed import initialize
from tests.ranks import run_ranks

BATCH, STOP, UPDATES = 12, 3, 6
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3}
Weights = dict[str, Tensor]


class Net(nn.Module):
    """Rows that no number of ranks divides, a buffer, and a parameter that is not trained."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 2))
        self.frozen = nn.Parameter(torch.full((5, 1), scale), requires_grad=False)
        self.register_buffer("scale", torch.full((2,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale * self.frozen[1]


def groups(model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Make one or two groups; of two, only the weights' decays."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if count == 1:
        return [{"params": named, "weight_decay": 0.1}]
    weights = [(name, param) for name, param in named if name.endswith("weight")]
    return [
        {"params": weights, "weight_decay": 0.1},
        {"params": [(name, param) for name, param in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


def losses(model: nn.Module, first: int, last: int) -> Iterator[Tensor]:
    """Return the losses of every update, on this rank's samples."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for update in range(first, last):
        generator = torch.Generator().manual_seed(update)
        x = torch.randn(BATCH, 6, generator=generator)[rank::size]
        yield nn.functional.mse_loss(model(x), torch.sin(3 * x[:, :2]))


def train(model: nn.Module, optimizer: Any, first: int, last: int, backward: Any = Tensor.backward) -> None:
    for loss in losses(model, first, last):
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def torch_job(first: int, last: int, count: int = 2, state: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net(1.0 if first else 1.5)
    optimizer = torch.optim.AdamW(groups(model, count), **HYPER, fused=True)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, first, last)
    return model, optimizer


@functools.cache
def never_stopped(count: int = 2) -> Weights:
    return whole(torch_job(0, UPDATES, count)[0])


def ours(engine: str, first: int, last: int, loaded: str | None, saved: str, count: int = 2) -> None:
    """DistAdamW on an engine, from one checkpoint of ours to another."""
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0} if engine in ZERO else {}
    with accelerator_on(engine, **config) as accelerator:
        model: nn.Module = Net(1.0 if first else 1.5)
        optimizer: Any = DistAdamW(groups(model, count), **HYPER)
        model, optimizer = accelerator.prepare(model, optimizer)
        if loaded is not None:
            load(loaded, model, optimizer)
        train(model, optimizer, first, last, accelerator.backward)
        save(saved, model, optimizer)


def go_on_with_ours(path: Path, engine: str, ranks: int, count: int = 2) -> Weights:
    run_ranks(ranks, ours, engine, STOP, UPDATES, str(path), str(path) + ".end", count)
    return weights_in(Path(str(path) + ".end"))


def begin_with_ours(tmp_path: Path, count: int = 2, place: tuple[str, int] = ("DDP", 2)) -> Path:
    run_ranks(place[1], ours, place[0], 0, STOP, None, str(tmp_path / "ours"), count)
    return tmp_path / "ours"


def weights_in(path: Path) -> Weights:
    index = read_index(path)
    return {key[6:]: read_whole(index, key) for key in index.tensors if key.startswith("model.")}


def check(found: Weights, count: int = 2) -> None:
    expected = never_stopped(count)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("place", [("single", 1), ("DDP", 3), ("FSDP2", 2), ("ZeRO-1", 2)])
def test_from_torch(place: tuple[str, int], tmp_path: Path) -> None:
    model, optimizer = torch_job(0, STOP)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours")
    found = go_on_with_ours(tmp_path / "ours", *place)
    check(found)
    if place == ("single", 1):
        assert all(torch.equal(found[name], value) for name, value in never_stopped().items())


def test_an_import_takes_the_clock_that_it_is_given(tmp_path: Path) -> None:
    model, optimizer = torch_job(0, STOP)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours")
    job = DistAdamW(groups(model, 2), **HYPER)
    scheduler = CyclicLRWithRestarts(job, BATCH, 10 * BATCH, 1, 2)
    load(tmp_path / "ours", model, job, on_difference="new")
    scheduler.load_state_dict({**scheduler.state_dict(), "samples": 5 * BATCH})
    assert (scheduler.samples, job.updates) == (5 * BATCH, STOP)
    assert scheduler.get_last_lr()[0] == pytest.approx((HYPER["lr"] + 1e-7) / 2)  # the middle of a cosine
    train(model, job, STOP, STOP + 1)
    scheduler.step()
    assert scheduler.samples == 6 * BATCH


def test_to_torch(tmp_path: Path) -> None:
    export_checkpoint(begin_with_ours(tmp_path), tmp_path / "theirs.pt", "torch")
    state = torch.load(tmp_path / "theirs.pt", weights_only=True)
    check(whole(torch_job(STOP, UPDATES, state=state)[0]))


def test_to_torch_and_back_is_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = torch_job(0, STOP)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again.pt", "torch")
    state = torch.load(tmp_path / "again.pt", weights_only=True)
    found = whole(torch_job(STOP, UPDATES, state=state)[0])
    assert all(torch.equal(found[name], value) for name, value in never_stopped().items())


def test_names_are_given_or_known_or_asked_for(tmp_path: Path) -> None:
    model, optimizer = torch_job(0, STOP)
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group.pop("param_names")]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(state, tmp_path / "optimizer.pt")
    files = (tmp_path / "model.pt", tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"4 parameters in 2 group.* 6 weights"):
        import_checkpoint(*files, optimizer=tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"4 parameters.* 3 names"):
        import_checkpoint(*files, optimizer=tmp_path / "optimizer.pt", names=names[:3])
    with pytest.raises(CheckpointError, match=r"exp_avg .*\[33, 6\].* body.2.bias.* \[2\]"):
        import_checkpoint(*files, optimizer=tmp_path / "optimizer.pt", names=names[::-1])
    with pytest.raises(CheckpointError, match="Pass the model's file"):
        import_checkpoint(tmp_path / "optimizer.pt", tmp_path / "ours")
    import_checkpoint(*files, optimizer=tmp_path / "optimizer.pt", names=names)
    check(go_on_with_ours(tmp_path / "ours", "single", 1))

    plain = nn.Linear(3, 3)  # one group of all the weights has their order
    optimizer = torch.optim.AdamW(plain.parameters())
    plain(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(
        {"model": {f"module.{k}": v for k, v in plain.state_dict().items()}, "optimizer": optimizer.state_dict()},
        files[0],
    )
    import_checkpoint(files[0], tmp_path / "plain")
    assert read_index(tmp_path / "plain").about["groups"][0]["names"] == ["weight", "bias"]
    assert torch.equal(weights_in(tmp_path / "plain")["weight"], plain.weight)


class Remembers(nn.Linear):
    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state_of_modules_is_imported(tmp_path: Path) -> None:
    states: dict[str, Any] = {"tensor": torch.arange(3), "data": {"amax": [1.5]}}
    for name, state in states.items():
        saved, loaded = Remembers(3, 3), Remembers(3, 3)
        model, again = nn.Sequential(saved), nn.Sequential(loaded)
        saved.state = state
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
        import_checkpoint(tmp_path / f"{name}.pt", tmp_path / name)
        load(tmp_path / name, again)
        assert torch.equal(loaded.state, state) if name == "tensor" else loaded.state == state
    save_file({"0.weight": saved.weight.detach(), "0.bias": saved.bias.detach()}, tmp_path / "x.safetensors")
    import_checkpoint(tmp_path / "x.safetensors", tmp_path / "without")
    with pytest.warns(UserWarning, match="extra state"):
        load(tmp_path / "without", again)


def test_a_tied_weight_goes_by_its_first_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["wte"].weight
    optimizer = torch.optim.AdamW(model.named_parameters())
    model["head"](model["wte"](torch.arange(5))).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours")
    load(tmp_path / "ours", model, DistAdamW(model.parameters()))
    assert list(weights_in(tmp_path / "ours")) == ["wte.weight"]

    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "copies.safetensors")
    with pytest.raises(CheckpointError, match="without names 'hat"):
        import_checkpoint(tmp_path / "copies.safetensors", tmp_path / "again", without=["hat.weight"])
    import_checkpoint(tmp_path / "copies.safetensors", tmp_path / "again", without=["head.weight"])
    load(tmp_path / "again", model)


def test_decay_means_the_same_to_torch(tmp_path: Path) -> None:
    model = Net()
    optimizer = DistAdamW(groups(model, 2), **HYPER, decay_by="schedule")
    save(tmp_path / "ours", model, optimizer)
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs.pt", "torch")
    state = torch.load(tmp_path / "theirs.pt", weights_only=True)["optimizer"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [pytest.approx(0.1 / HYPER["lr"]), 0.0]


# ---------------------------------------------------------------------------------------------- ZeroRedundancyOptimizer


def redundancy_job(first: int, last: int, loaded: str | None, saved: str) -> Weights:
    model = Net(1.0 if first else 1.5)
    wrapped = DistributedDataParallel(model)
    params = [param for param in wrapped.parameters() if param.requires_grad]
    optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **HYPER, weight_decay=0.1)
    if loaded is not None:
        state = torch.load(loaded, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    train(wrapped, optimizer, first, last)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    dist.barrier()
    return whole(model)


def test_from_zero_redundancy_optimizer(tmp_path: Path) -> None:
    run_ranks(2, redundancy_job, 0, STOP, None, str(tmp_path / "theirs.pt"))
    names = [name for name, param in Net().named_parameters() if param.requires_grad]
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours", names=names)
    check(go_on_with_ours(tmp_path / "ours", "DDP", 3, 1), 1)


def test_to_zero_redundancy_optimizer(tmp_path: Path) -> None:
    export_checkpoint(begin_with_ours(tmp_path, 1), tmp_path / "theirs.pt", "torch")
    for found in run_ranks(2, redundancy_job, STOP, UPDATES, str(tmp_path / "theirs.pt"), str(tmp_path / "end.pt")):
        check(found, 1)


# ---------------------------------------------------------------------------------------------- FSDP2


def fsdp2_job(first: int, last: int, loaded: str | None, saved: str, flat: bool = False, app: bool = False) -> Weights:
    model = Net(1.0 if first else 1.5)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.body:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(groups(model, 2), **HYPER)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    if loaded is not None:
        weights, state = get_state_dict(model, optimizer)
        dcp_load({"model": weights, "optim": state}, checkpoint_id=loaded)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, first, last)
    weights, state = get_state_dict(model, optimizer, options=options)
    content = {"model": weights, "optim": state, "ema": {"decay": 0.9}}
    dcp_save({"app": content} if app else content, checkpoint_id=saved)
    return cast(Weights, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


@pytest.mark.parametrize(("flat", "app"), [(False, False), (True, True)])
def test_from_fsdp2(flat: bool, app: bool, tmp_path: Path) -> None:
    run_ranks(3, fsdp2_job, 0, STOP, None, str(tmp_path / "theirs"), flat, app)
    with pytest.raises(CheckpointError, match="Convert it with `dist-adamw import`"):
        read_index(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    found = [(group["weight_decay"], group["names"]) for group in read_index(tmp_path / "ours").about["groups"]]
    assert found == [(0.1, ["body.0.weight", "body.2.weight"]), (0.0, ["body.0.bias", "body.2.bias"])]
    check(go_on_with_ours(tmp_path / "ours", "DDP", 2))


def test_to_fsdp2(tmp_path: Path) -> None:
    export_checkpoint(begin_with_ours(tmp_path), tmp_path / "theirs", "dcp")
    check(run_ranks(3, fsdp2_job, STOP, UPDATES, str(tmp_path / "theirs"), str(tmp_path / "end"))[0])


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


class Harmless:
    pass


def test_enums_as_python_3_11_2_pickles_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickle an enum by ``getattr`` of class and name, which is read as a name and never called."""
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    for kind in (_MEM_FORMAT_ENCODING, ZeroStageEnum):
        monkeypatch.setattr(kind, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    weights = {"weight": torch.arange(6.0)}
    dcp_save({"model": weights}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert b"getattr" in (tmp_path / "dcp" / ".metadata").read_bytes()
    torch.save({"model": weights, "stage": ZeroStageEnum.gradients}, tmp_path / "torch")
    for name in ("dcp", "torch"):
        import_checkpoint(tmp_path / name, tmp_path / f"{name}-ours")
        assert torch.equal(weights_in(tmp_path / f"{name}-ours")["weight"], weights["weight"])
    monkeypatch.setattr(Harmless, "__reduce__", lambda _: (getattr, (Bomb, "__init__")), raising=False)
    torch.save({"model": weights, "x": Harmless()}, tmp_path / "bomb")
    with pytest.raises(CheckpointError, match=r"Bomb,.* nothing is executed"):
        import_checkpoint(tmp_path / "bomb", tmp_path / "ours")


@pytest.mark.parametrize("where", ["metadata", "item", "torch"])
def test_a_bomb_does_not_go_off(where: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(proof))).close()
    assert proof.exists()  # it is one
    proof.unlink()
    source = tmp_path / "theirs"
    if where == "metadata":
        run_ranks(2, fsdp2_job, 0, STOP, None, str(source))
        metadata = pickle.loads((source / ".metadata").read_bytes())
        metadata.planner_data["x"] = Bomb(proof)
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
    elif where == "item":
        state = {
            "model": {"weight": torch.ones(1)},
            "optim": {"param_groups": [{"params": ["weight"], "lr": Bomb(proof)}]},
        }
        dcp_save(state, checkpoint_id=source, no_dist=True)
    else:
        torch.save({"model": {"weight": torch.ones(1)}, "optimizer": Bomb(proof)}, source)
    with pytest.raises(CheckpointError, match=r"asks for (io|_io|builtins)?\.?open.* nothing is executed"):
        import_checkpoint(source, tmp_path / "ours")
    assert not proof.exists()
    assert not (tmp_path / "ours").exists()


def test_metadata_that_no_save_writes(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    run_ranks(2, fsdp2_job, 0, 1, None, str(source))
    whole = (source / ".metadata").read_bytes()

    def changed(change: Callable[[Any], Any]) -> str:
        metadata = pickle.loads(whole)
        change(metadata)
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError) as error:
            import_checkpoint(source, tmp_path / "ours")
        assert not list(tmp_path.glob("ours/index.json"))
        return str(error.value)

    def move(metadata: Any, **facts: Any) -> None:
        for where, place in metadata.storage_data.items():
            if where.fqn == "model.body.0.weight":
                vars(place).update(facts)

    weight = "model.body.0.weight"
    assert "asks for tests.distributed.test_convert.Harmless, which" in changed(
        lambda metadata: metadata.planner_data.update(x=Harmless())
    )
    assert re.search(r"'\.\./x'.*outside", changed(lambda metadata: move(metadata, relative_path="../x")))
    assert "reaches beyond" in changed(lambda metadata: move(metadata, offset=1 << 40))
    assert "reaches beyond" in changed(lambda metadata: move(metadata, length=-5))
    assert f"{weight} has gaps or overlaps" in changed(
        lambda metadata: metadata.state_dict_metadata[weight].chunks.pop()
    )
    assert re.search("damaged.*KeyError", changed(lambda metadata: metadata.storage_data.clear()))


# ---------------------------------------------------------------------------------------------- DeepSpeed


def deepspeed_job(
    stage: str, first: int, last: int, loaded: str | None, saved: str | None, count: int, universal: bool = False
) -> Weights:
    from deepspeed.utils import safe_get_full_fp32_param

    model = Net(1.5)  # of frozen parameters and buffers, DeepSpeed's universal format has none
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": ZERO[stage],
        "checkpoint": {"load_universal": universal},
    }
    params = [{**group, "params": [param for _, param in group["params"]]} for group in groups(model, count)]
    engine = initialize(config, model, optimizer=torch.optim.AdamW(params, **HYPER))
    if loaded is not None:
        engine.load_checkpoint(loaded)
    for loss in losses(engine, first, last):
        engine.backward(loss)
        engine.step()
    if saved is not None:
        engine.save_checkpoint(saved)
    return {name: safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def to_universal(folder: Path) -> Path:
    """Convert DeepSpeed's folder with its own converter."""
    from deepspeed.checkpoint.ds_to_universal import main as convert

    target = folder / "universal"
    args = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    source = folder / (folder / "latest").read_text()
    convert(argparse.Namespace(input_folder=str(source), output_folder=str(target), inject_missing_state=True, **args))
    return target


@pytest.mark.parametrize(("stage", "count"), [("ZeRO-1", 2), ("ZeRO-2", 2), ("ZeRO-3", 2)])
def test_from_deepspeed(stage: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(2, deepspeed_job, stage, 0, STOP, None, str(tmp_path / "theirs"), count)
    with pytest.raises(CheckpointError, match="ds_to_universal"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    universal = to_universal(tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # it need not be there
    import_checkpoint(universal, tmp_path / "ours")
    check(go_on_with_ours(tmp_path / "ours", "DDP", 3, count), count)


@pytest.mark.parametrize(("stage", "count"), [("ZeRO-1", 2), ("ZeRO-2", 2), ("ZeRO-3", 1)])
def test_to_deepspeed(stage: str, count: int, tmp_path: Path) -> None:
    # Loading for stage 3, DeepSpeed gives every group the hyper-parameters of the first.
    export_checkpoint(begin_with_ours(tmp_path, count), tmp_path / "theirs" / "tag", "universal")
    found = run_ranks(2, deepspeed_job, stage, STOP, UPDATES, str(tmp_path / "theirs"), None, count, True)[0]
    check({**never_stopped(count), **found}, count)
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert weights_in(tmp_path / "again").keys() == never_stopped().keys()


# ---------------------------------------------------------------------------------------------- the rest


def test_safetensors(tmp_path: Path) -> None:
    model = Net().bfloat16()
    model.register_buffer("count", torch.tensor(7))
    optimizer = DistAdamW([param for param in model.parameters() if param.requires_grad], master_dtype=torch.float32)
    model(torch.ones(2, 6).bfloat16()).sum().backward()
    optimizer.step()
    save(tmp_path / "ours", model, optimizer)
    export_checkpoint(tmp_path / "ours", tmp_path / "model.safetensors", "safetensors")
    export_checkpoint(tmp_path / "ours", tmp_path / "exact.safetensors", "safetensors", master=True)
    found, exact = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "exact.safetensors")
    assert found.keys() == exact.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert exact["body.0.weight"].dtype == torch.float32
    assert not torch.equal(exact["body.0.weight"], found["body.0.weight"].float())
    assert torch.equal(exact["body.0.weight"].bfloat16(), found["body.0.weight"])

    save_file({name: value.clone() for name, value in Net(1.5).state_dict().items()}, tmp_path / "hub.safetensors")
    import_checkpoint(tmp_path / "hub.safetensors", tmp_path / "again")
    other = Net()
    load(tmp_path / "again", other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in Net(1.5).state_dict().items())
    with pytest.raises(CheckpointError, match="state of no optimizer"):
        load(tmp_path / "again", other, DistAdamW(other.parameters()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = torch_job(0, STOP)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    assert main(["import", f"{tmp_path}/theirs.pt", f"{tmp_path}/ours"]) == 0
    assert main(["export", f"{tmp_path}/ours", f"{tmp_path}/x.safetensors", "--kind=safetensors"]) == 0
    assert main(["export", f"{tmp_path}/ours", f"{tmp_path}/x.safetensors", "--kind=safetensors"]) == 2
    assert "x.safetensors exists already" in capsys.readouterr().err
    assert main(["import", f"{tmp_path}/theirs.pt", f"{tmp_path}/ours"]) == 2
    assert re.search("ours .*already", capsys.readouterr().err)
    assert main(["inspect", f"{tmp_path}/ours"]) == 0
    table = re.sub(" +", " ", capsys.readouterr().out)
    numel = sum(value.numel() for value in model.state_dict().values())
    for part in (
        "engine torch, 1 rank",
        "AdamW, 3 updates",
        f"{numel} in 6 tensors",
        "--verify reads every bit",
    ):
        assert part in table
    file = max((tmp_path / "ours").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["inspect", "--verify", f"{tmp_path}/ours"]) == 1
    assert "NO: " in capsys.readouterr().out
    assert main(["export", f"{tmp_path}/ours", f"{tmp_path}/y.safetensors", "--kind=safetensors"]) == 2
    assert "checksum" in capsys.readouterr().err
    assert not (tmp_path / "y.safetensors").exists()


OF_SGD = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def folder_of_a_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / ".metadata")


def universal_of_another_place(path: Path) -> None:
    (path / "zero").mkdir(parents=True)
    torch.save({"param_shapes": [{"../x": (1,)}], "module": {}}, path / "mp_rank_00_model_states.pt")
    torch.save({"param_groups": [{"lr": 1.0}]}, path / "zero" / "optimizer_state.pt")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "unknown kind"),
        (lambda path: path.write_bytes(b"x" * 100), r"no torch\.save file"),
        (lambda path: torch.save(torch.ones(3), path), "holds a Tensor"),
        (lambda path: torch.save({"model": {"weight": 3}}, path), "'weight'.*not a tensor"),
        (lambda path: torch.save({"model": {}, "optimizer": [3]}, path), "no state dict"),
        (
            lambda path: torch.save({"model": {"weight": torch.ones(2)}, "optimizer": OF_SGD}, path),
            "'momentum_buffer' of weight.*AdamW",
        ),
        (universal_of_another_place, r"'\.\./x'.*outside"),
        (folder_of_a_pipe, "plain file"),
        (lambda path: (path.mkdir(), (path / ".metadata").write_bytes(pickle.dumps(3))), "damaged or of another"),
        (lambda path: (path.mkdir(), (path / ".metadata").write_bytes(b"\x80\x04x")), r"\.metadata is damaged"),
    ],
)
def test_what_cannot_be_imported(make: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    make(tmp_path / "theirs")
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert re.search(sentence, str(error.value))
    assert not (tmp_path / "ours").exists()


# ---------------------------------------------------------------------------------------------- strangers' files


def test_small_files_that_would_take_much_memory(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"\x80\x02Nr" + (400_000_000).to_bytes(4, "little") + b".")
    with pytest.raises(CheckpointError, match="it numbers 400,000,000 objects in 9 bytes"):
        import_checkpoint(folder, tmp_path / "ours")
    torch.save({"w": torch.zeros(1).expand(10**13)}, tmp_path / "expanded.pt")
    with pytest.raises(CheckpointError, match=r"\[10000000000000\].*\(expand\)"):
        import_checkpoint(tmp_path / "expanded.pt", tmp_path / "ours")
    groups = [{"params": [0], "lr": torch.zeros(1).expand(10**8)}]
    torch.save({"model": {"w": torch.zeros(1)}, "optimizer": {"state": {}, "param_groups": groups}}, tmp_path / "lr.pt")
    with pytest.raises(CheckpointError, match=r"lr .*\[100000000\].*not a number"):
        import_checkpoint(tmp_path / "lr.pt", tmp_path / "ours")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_of_torch_end_in_a_sentence(seed: int, tmp_path: Path) -> None:
    model, optimizer = torch_job(0, STOP)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "whole.pt")
    whole, rng = (tmp_path / "whole.pt").read_bytes(), random.Random(seed)
    for number in range(40):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        (tmp_path / "mutated.pt").write_bytes(content)
        with contextlib.suppress(CheckpointError):
            import_checkpoint(tmp_path / "mutated.pt", tmp_path / f"ours-{number}")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch_job(0, STOP)[0].state_dict(), tmp_path / "theirs.pt")
    assert main(["import", f"{tmp_path}/theirs.pt", f"{tmp_path}/ours"]) == 0
    (tmp_path / "x.partial").write_text("mine")
    assert main(["export", f"{tmp_path}/ours", f"{tmp_path}/x", "--kind=safetensors"]) == 0
    assert (tmp_path / "x.partial").read_text() == "mine"
    for args in (
        ["export", f"{tmp_path}/ours", f"{tmp_path}/theirs.pt/x", "--kind=safetensors"],
        ["inspect", "x" * 5000],
        ["preview", "--batch_size=32", "--epoch_size=1000", "--t_mult=1e300"],
    ):
        assert main(args) == 2
        assert capsys.readouterr().err.startswith("dist-adamw: ")
    found = json.loads((tmp_path / "ours" / "index.json").read_text())
    found.pop("sha256")
    found["about"]["engine"] = "x\nwhole        yes, to the last bit\x1b[2J"
    write_index(tmp_path / "ours", found)
    main(["inspect", f"{tmp_path}/ours"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("whole") for line in lines) == 1
    assert all(map(str.isprintable, lines))


def test_weights_of_a_name_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(2)))
    save(tmp_path / "ours", model)
    with pytest.raises(CheckpointError, match=r"'__metadata__'.*safetensors"):
        export_checkpoint(tmp_path / "ours", tmp_path / "x", "safetensors")


def test_two_imports_into_one_folder(tmp_path: Path) -> None:
    torch.save(torch_job(0, STOP)[0].state_dict(), tmp_path / "theirs.pt")
    lock = Lock(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="another job is saving"):
        import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours")
    lock.release()
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours")
