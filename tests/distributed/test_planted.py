"""Files of strangers under save_state: what a pickle in them asks for is not called, whatever reads it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from dist_adamw import CheckpointError, prepare
from dist_adamw.checkpoint.storage.index import write_index
from dist_adamw.checkpoint.unpickling import nothing_executed
from dist_adamw.integrations.accelerate.state_folder import files_of
from tests.distributed.engines import environment
from tests.distributed.jobs import job
from tests.distributed.test_saved_state import engine_of, train_engine
from tests.ranks import run_ranks

HOW = r'pass load_state\(\.\.\., load_kwargs=\{"weights_only": False\}\)'


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


class Custom:
    """An object that was registered, with a state of the user's."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def plant(path: Path, proof: Path, how: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    if how == "pickle":
        path.write_bytes(pickle.dumps(Planted(proof)))
    else:
        torch.save({"state": Planted(proof)}, path, _use_new_zipfile_serialization=how == "zip")


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Scaler:
    """Stands for a GradScaler, which does nothing on a CPU."""

    def state_dict(self) -> dict[str, float]:
        return {"scale": 2.0}

    def load_state_dict(self, state: Any) -> None:
        assert state == {"scale": 2.0}


def set_up(scaler: bool = True) -> tuple[Any, Any, Any]:
    """One model that `prepare` knows, another that only Accelerate does, a custom object, a scaler."""
    accelerator, objects = job(1, 24)
    prepared = prepare(accelerator, *objects)
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    accelerator.prepare(other, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    custom = Custom({"average": torch.ones(3), "n": 3, "names": ["a", (1, 2.5)], "array": np.arange(3.0), "x": None})
    accelerator.register_for_checkpointing(custom)
    if scaler:
        accelerator.scaler = Scaler()
    return accelerator, prepared[0], custom


def plants(root: str) -> list[str]:
    """Each file that Accelerate reads, planted in three ways, with and without an index of ours."""
    rank, tried = dist.get_rank(), []
    accelerator, model, custom = set_up()
    whole = Path(root) / "whole"
    accelerator.save_state(str(whole), safe_serialization=False)
    custom.state = None
    accelerator.load_state(str(whole))
    assert torch.equal(custom.state["average"], torch.ones(3))
    assert custom.state["names"] == ["a", (1, 2.5)]
    assert np.array_equal(custom.state["array"], np.arange(3.0))
    pickles = sorted(
        path.name for path in whole.iterdir() if path.suffix in (".pkl", ".bin", ".pt") and "states" not in path.name
    )
    torch._foreach_add_([p.data for p in model.parameters()], 1.0)
    before = bits(model)
    number = 0
    for with_index in (True, False):
        for name in [*pickles, f"random_states_{rank}.pkl"]:
            for how in ("zip", "legacy", "pickle"):
                number += 1
                folder, proof = Path(root) / f"planted-{number}", Path(root) / f"proof-{number}"
                if rank == 0:
                    shutil.copytree(whole, folder)
                    if not with_index:
                        shutil.rmtree(folder / "dist_adamw")
                dist.barrier()
                if "random" in name or rank == 0:
                    plant(folder / name, proof, how)
                dist.barrier()
                if with_index:  # a stranger's index says what the stranger wants
                    _accept_files(folder, rank)
                with pytest.raises((CheckpointError, FileNotFoundError, RuntimeError)) as raised:
                    accelerator.load_state(str(folder))
                dist.barrier()
                tried.append(f"{with_index} {how} {name.rstrip('0123456789')}")
                assert not proof.exists(), f"{tried[-1]} was executed"
                assert isinstance(raised.value, CheckpointError), (tried[-1], raised.value)
                says = "is no torch.save file of" if how == "pickle" else "asks for posix.mkdir, which is neither"
                assert f"{says}" in str(raised.value), (tried[-1], raised.value)
                assert all(map(torch.equal, before, bits(model))), f"{tried[-1]} changed the model"
    return tried


def _accept_files(folder: Path, rank: int) -> None:
    if rank == 0:
        index = json.loads((folder / "dist_adamw" / "index.json").read_text())
        del index["sha256"]
        index["about"]["extra"]["files"] = files_of(folder)
        write_index(folder / "dist_adamw", index)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_file_under_save_state_is_executed(world_size: int, tmp_path: Path) -> None:
    tried = run_ranks(world_size, plants, str(tmp_path))[0]
    names = {line.split()[-1].partition(".")[0] for line in tried}
    # With an index of ours Accelerate still reads the other model, which is its second.
    assert {"custom_checkpoint_0", "scaler", "random_states_0", "optimizer", "scheduler", "pytorch_model"} <= names


def trusts(root: str) -> None:
    accelerator, _, custom = set_up(scaler=False)
    custom.state = Special(5)
    accelerator.save_state(f"{root}/special")
    custom.state = None
    with pytest.raises(CheckpointError, match=rf"asks for {__name__}\.Special, which is neither .* {HOW}"):
        accelerator.load_state(f"{root}/special")
    assert custom.state is None
    accelerator.load_state(f"{root}/special", load_kwargs={"weights_only": False})
    loaded: Any = custom.state
    assert loaded.n == 5
    custom.state = None
    with torch.serialization.safe_globals([Special]):  # torch's own way for one class
        accelerator.load_state(f"{root}/special")
    loaded = custom.state
    assert loaded.n == 5
    custom.state = None
    with environment(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"):
        accelerator.load_state(f"{root}/special")
    loaded = custom.state
    assert loaded.n == 5
    with pytest.raises(CheckpointError, match="asks for"):
        accelerator.load_state(f"{root}/special", load_kwargs={"weights_only": True})


class Special:
    def __init__(self, n: int) -> None:
        self.n = n


def test_a_user_who_trusts_a_folder_says_so(tmp_path: Path) -> None:
    run_ranks(2, trusts, str(tmp_path))


def users_hook(root: str) -> None:
    """Messages between ranks are no files: they may have any class, also while a folder is read."""
    accelerator, _, _ = set_up(scaler=False)
    accelerator.save_state(root)
    told: list[Any] = []

    def hook(models: Any, folder: str) -> None:
        objects: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(objects, Special(dist.get_rank()))
        told.extend(one.n for one in objects)

    accelerator.register_load_state_pre_hook(hook)
    accelerator.load_state(root)
    assert told == [0, 1]


def test_messages_between_ranks_go_on_while_a_folder_is_read(tmp_path: Path) -> None:
    run_ranks(2, users_hook, str(tmp_path / "checkpoint"))


# ---------------------------------------------------------------------------------------------- the guard by itself


def ways(data: bytes, folder: Path) -> Iterator[tuple[str, Any]]:
    """Unpickle as libraries do: Accelerate and DeepSpeed by torch, torch.distributed.checkpoint by pickle, others."""
    (folder / ".metadata").write_bytes(data)
    file = folder / ".metadata"
    yield "pickle.load", lambda: pickle.load(file.open("rb"))
    yield "pickle.loads", lambda: pickle.loads(data)
    yield "pickle.Unpickler", lambda: pickle.Unpickler(file.open("rb")).load()
    yield "a class of Python's own", lambda: pickle._Unpickler(file.open("rb")).load()
    yield "torch.load", lambda: torch.load(file, weights_only=False)
    yield "torch.distributed.checkpoint", lambda: FileSystemReader(folder).read_metadata()
    array = folder / "array.npy"
    np.save(array, np.array([Planted(folder / "proof")], dtype=object), allow_pickle=True)
    yield "numpy", lambda: np.load(array, allow_pickle=True)


def test_nothing_is_executed_whatever_reads_a_pickle(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for way, read in ways(pickle.dumps(Planted(proof)), tmp_path):
        for hides in ((), (Exception,)):  # as Accelerate hides what goes wrong with random states
            with (
                pytest.raises(CheckpointError, match=r"the folder asks for \S+, which .* Say so\."),
                nothing_executed("the folder", "Say so."),
                contextlib.suppress(*hides),
            ):
                read()
            assert not proof.exists(), way
    assert pickle.loads(pickle.dumps(Special(1))).n == 1, "pickle is as it was"
    with nothing_executed("the folder", "Say so.", trusted=True), nothing_executed("inside", "Say so."):
        pickle.loads(pickle.dumps(Planted(proof)))
    assert proof.exists()


def test_other_threads_unpickle_as_always() -> None:
    found: list[Any] = []
    with nothing_executed("the folder", "Say so."):
        thread = threading.Thread(target=lambda: found.append(pickle.loads(pickle.dumps(Special(2)))))
        thread.start()
        thread.join()
        assert pickle.loads(pickle.dumps({"plain": [1, 2.5, "text"]})) == {"plain": [1, 2.5, "text"]}
    assert found[0].n == 2


def deepspeeds_own(root: str) -> None:
    engine = engine_of(1, "fp32")
    train_engine(engine, 0, 2)
    type(engine).save_checkpoint(engine, root, tag="own")
    before = bits(engine.module)
    train_engine(engine, 2, 4)
    after = bits(engine.module)
    with pytest.raises(CheckpointError, match=r"asks for \S+, which .* load_checkpoint\(\.\.\., weights_only=False\)"):
        engine.load_checkpoint(root, tag="own")
    assert all(map(torch.equal, after, bits(engine.module)))
    engine.load_checkpoint(root, tag="own", weights_only=False)
    assert all(map(torch.equal, before, bits(engine.module)))


def test_a_folder_of_deepspeeds_own_is_executed_only_when_asked(tmp_path: Path) -> None:
    run_ranks(2, deepspeeds_own, str(tmp_path))
