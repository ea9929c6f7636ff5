"""Two models in one save_state: one checkpoint, of which all is loaded or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw import CheckpointError, prepare, save
from dist_adamw.checkpoint.storage.index import write_index
from tests.distributed.jobs import epochs, job
from tests.known import unwrap
from tests.ranks import run_ranks


def everything(both: list[Any]) -> list[Tensor]:
    """Weights, moments, clocks and updates of both."""
    found = []
    for model, optimizer, _, scheduler in both:
        inner: Any = unwrap(optimizer)
        found += [p.detach().clone() for p in model.parameters()]
        found += [m.clone() for shard in inner.shards for m in shard.moments.values()]
        found.append(torch.tensor([inner.updates, scheduler.samples, inner.param_groups[0]["lr"]], dtype=torch.double))
    return found


def damage(folder: Path, how: str) -> None:
    second = folder / "dist_adamw_1"
    if how == "missing":
        shutil.rmtree(second)
    elif how == "of another save":
        shutil.rmtree(second)
        shutil.copytree(folder.parent / "other" / "dist_adamw_1", second)
    elif how == "of a job without the second":
        shutil.rmtree(folder / "dist_adamw")
        shutil.copytree(folder.parent / "first alone" / "dist_adamw", folder / "dist_adamw")
    elif how == "tensors":
        file = next(second.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif how == "no moments":
        index = json.loads((second / "index.json").read_text())
        del index["sha256"]
        index["tensors"] = {k: v for k, v in index["tensors"].items() if not k.startswith("exp_avg_sq.")}
        write_index(second, index)
    elif how == "other weights":
        index = json.loads((second / "index.json").read_text())
        del index["sha256"]
        index["tensors"] = {k: v for k, v in index["tensors"].items() if not k.startswith("model.0.weight")}
        write_index(second, index)


DAMAGE = {
    "missing": "has dist_adamw, and no dist_adamw_1",
    "of another save": "not of one save",
    "of a job without the second": "not of one save",
    "tensors": "dist_adamw_1/.* .*checksum",
    "no moments": "the checkpoint has no exp_avg_sq of ",
    "other weights": "another model.* 0.weight is missing",
}


def refuses(root: str) -> list[str]:
    accelerator, first = job(1, 48, loader={"batch_size": 2})
    one = prepare(accelerator, *first)
    for _ in zip(range(3), epochs(accelerator, *one, count=2), strict=False):
        pass
    accelerator.save_state(f"{root}/first alone")
    _, second = job(1, 48, loader={"batch_size": 2}, width=24)
    both = [one, prepare(accelerator, *second)]
    for prepared in both:
        for _ in zip(range(4), epochs(accelerator, *prepared, count=2), strict=False):
            pass
    for name in ("other", "whole"):
        accelerator.save_state(f"{root}/{name}")
    saved = everything(both)
    for prepared in both:
        for _ in zip(range(2), epochs(accelerator, *prepared, count=2), strict=False):
            pass
    before = everything(both)
    assert not all(map(torch.equal, saved, before))
    done = []
    alone = Path(root) / "by dist_adamw.save"
    save(alone, both[0][0], both[0][1], both[0][3])
    with pytest.raises(CheckpointError, match=r"written by dist_adamw\.save, not by accelerator\.save_state"):
        accelerator.load_state(str(alone))
    for how, message in DAMAGE.items():
        folder = Path(root) / how
        if dist.get_rank() == 0:
            shutil.copytree(Path(root) / "whole", folder)
            damage(folder, how)
        dist.barrier()
        with pytest.raises(CheckpointError, match=message):
            accelerator.load_state(str(folder))
        assert all(map(torch.equal, before, everything(both))), f"{how}: something was loaded"
        done.append(how)
    accelerator.load_state(f"{root}/whole")
    assert all(map(torch.equal, saved, everything(both)))
    return done


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_wrong_with_the_second_is_seen_before_the_first_changes(world_size: int, tmp_path: Path) -> None:
    for done in run_ranks(world_size, refuses, str(tmp_path)):
        assert done == list(DAMAGE)


def of_an_older_release(root: str) -> None:
    accelerator, first = job(1, 48)
    _, second = job(1, 48, width=24)
    both = [prepare(accelerator, *objects) for objects in (first, second)]
    accelerator.save_state(root)
    saved = everything(both)
    for name in ("dist_adamw", "dist_adamw_1"):
        index = json.loads((Path(root) / name / "index.json").read_text())
        del index["sha256"], index["about"]["extra"]["state"], index["about"]["optimizer_class"]
        write_index(Path(root) / name, index)
    for model, *_ in both:
        torch._foreach_add_([p.data for p in model.parameters()], 1.0)
    accelerator.load_state(root)
    assert all(map(torch.equal, saved, everything(both)))


def test_a_checkpoint_without_tokens_loads(tmp_path: Path) -> None:
    run_ranks(1, of_an_older_release, str(tmp_path / "checkpoint"))
