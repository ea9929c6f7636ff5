"""``dist-adamw inspect``, ``import`` and ``export``: which checkpoint a folder stands for, and whether it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, prepare, save
from tests.unit.test_cli import Capture, answer, refused, run


def job(value: float) -> tuple[nn.Module, DistAdamW]:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    model.half()
    optimizer = DistAdamW(model.parameters(), lr=0.0, master_dtype=torch.float32)
    model(torch.ones(1, 2, dtype=torch.half)).sum().backward()
    optimizer.step()
    return model, optimizer


def write(path: Path, value: float = 1.0) -> Path:
    save(path, *job(value))
    return path


def tear(path: Path) -> None:
    """Cut a byte off a checkpoint's data."""
    (file,) = path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Change a bit of a checkpoint's data."""
    (file,) = path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# ---------------------------------------------------------------- inspect


def test_inspect_is_quick_unless_asked_to_verify(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "x")
    assert "--verify reads every bit" in run(capsys, "inspect", str(path))
    assert "yes, to the last bit" in run(capsys, "inspect", "--verify", str(path))
    flip(path)
    run(capsys, "inspect", str(path))
    assert "NO: " in run(capsys, "inspect", str(path), "--verify", status=1)
    tear(path)
    assert "were written" in run(capsys, "inspect", str(path), status=1)


def test_inspect_as_json(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "x")
    found = answer(capsys, "inspect", str(path))
    assert found.pop("time") > 1e9
    assert found.pop("written_by").startswith("dist_adamw ")
    assert found.pop("files")["count"] == 1
    assert found == {
        "checkpoint": str(path),
        "whole": None,
        "verified": False,
        "problem": None,
        "engine": found["engine"],
        "world_size": 1,
        "optimizer": "DistAdamW",
        "updates": 1,
        "scheduler": None,
        "samples": None,
        "weights": {"elements": 3, "tensors": 2},
        "state": found["state"],
    }
    assert answer(capsys, "inspect", str(path), "--verify")["whole"] is True
    flip(path)
    assert answer(capsys, "inspect", str(path), "--verify", status=1)["whole"] is False


def test_a_damaged_index_is_a_no(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "x")
    (path / "index.json").write_text("{")
    assert "index.json is damaged" in run(capsys, "inspect", str(path), status=1)
    assert answer(capsys, "inspect", str(path), status=1)["whole"] is False


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ("nothing", "there is no checkpoint "),
        ("file", "is a file, and a checkpoint is a folder"),
        ("empty", "has no checkpoint of dist_adamw: no index.json"),
        ("dcp", "is a folder of torch.distributed.checkpoint. Convert it with `dist-adamw import`"),
        ("deepspeed", "was written by DeepSpeed itself, as pickles"),
        ("deepspeed_latest", "was written by DeepSpeed itself, as pickles"),
    ],
)
def test_what_is_no_checkpoint(made: str, sentence: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x"
    if made == "file":
        path.touch()
    elif made != "nothing":
        inner = path / "global_step5" if made == "deepspeed_latest" else path
        inner.mkdir(parents=True)
        (inner / {"dcp": ".metadata", "empty": "x"}.get(made, "bf16_zero_pp_rank_0_optim_states.pt")).touch()
        (path / "latest").write_text("global_step5")
    for verb in (["inspect", str(path)], ["export", str(path), str(tmp_path / "y"), "--kind=torch"]):
        assert sentence in refused(capsys, *verb)


# ---------------------------------------------------------------- which one


def numbered(pattern: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for number in (5, 20, 100):
            newest = write(root / pattern.format(number), number)
        return newest

    return make


def of_a_checkpoint_folder(root: Path) -> Path:
    folder = CheckpointFolder(root)
    for number in (5, 20, 100):
        newest = folder.save(number, lambda path: save(path, *job(number)))  # noqa: B023
    folder.close()
    assert newest is not None
    return newest


def of_deepspeed(root: Path) -> Path:
    numbered("global_step{}")(root)
    (root / "latest").write_text("global_step20")
    return root / "global_step20"


def of_trainer(root: Path) -> Path:
    for number in (5, 100):
        path = write(root / f"checkpoint-{number}" / f"global_step{number}", number)
        (path.parent / "latest").write_text(path.name)
    return path


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "itself": write,
    "CheckpointFolder": of_a_checkpoint_folder,
    "a run of the main job": lambda root: of_a_checkpoint_folder(root / "checkpoints"),
    "save_state": lambda root: write(root / "dist_adamw"),
    "Accelerate": numbered("checkpoints/checkpoint_{}/dist_adamw"),
    "Accelerate's checkpoints": numbered("checkpoint_{}/dist_adamw"),
    "Trainer": of_trainer,
    "DeepSpeed": of_deepspeed,
    "DeepSpeed without latest": numbered("global_step{}"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_checkpoint_that_a_folder_stands_for(kind: str, tmp_path: Path, capsys: Capture) -> None:
    newest = FOLDERS[kind](tmp_path / "x")
    assert answer(capsys, "inspect", str(tmp_path / "x"))["checkpoint"] == str(newest)
    weights = str(tmp_path / "y.safetensors")  # the kind is the name's
    found = answer(capsys, "export", str(tmp_path / "x"), weights)
    assert found == {"checkpoint": str(newest), "written": weights, "kind": "safetensors"}


def test_a_project_that_accelerate_really_wrote(tmp_path: Path, capsys: Capture) -> None:
    config = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=config)
    model = nn.Linear(2, 1)
    optimizer = DistAdamW(model.parameters())
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    prepare(accelerator, model, optimizer, loader, CyclicLRWithRestarts(optimizer))
    accelerator.save_state()
    assert run(capsys, "inspect", str(tmp_path)).splitlines()[0].endswith("checkpoints/checkpoint_0/dist_adamw")


@pytest.mark.parametrize(("damage", "verify"), [(tear, False), (flip, True)])
def test_the_newest_whole_one(damage: Callable[[Path], None], verify: bool, tmp_path: Path, capsys: Capture) -> None:
    newest = of_a_checkpoint_folder(tmp_path / "x")
    damage(newest)
    assert main_of(capsys, tmp_path, verify) == "sample-000000020"
    (tmp_path / "x" / "sample-000000020" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "x" / "sample-000000020")
    assert main_of(capsys, tmp_path, verify) == "sample-000000005"
    damage(tmp_path / "x" / "sample-000000005")
    assert "has 2 checkpoints, and none is whole. The newest: " in refused(
        capsys, "inspect", str(tmp_path / "x"), *(["--verify"] if verify else [])
    )


def main_of(capsys: Capture, tmp_path: Path, verify: bool) -> str:
    from dist_adamw.cli import main

    assert main(["inspect", str(tmp_path / "x"), "--json", *(["--verify"] if verify else [])]) == 0
    out, error = capsys.readouterr()
    assert error.startswith("dist-adamw: passed over: ")
    return Path(json.loads(out)["checkpoint"]).name


def test_other_files_of_a_checkpoint_count(tmp_path: Path, capsys: Capture) -> None:
    """In the folder of a CheckpointFolder, Accelerate's files are in the manifest."""
    folder = CheckpointFolder(tmp_path)

    def state(path: Path) -> None:
        write(path / "dist_adamw")
        (path / "random_states_0.pkl").write_bytes(b"12345678")

    newest = folder.save(7, state)
    folder.close()
    assert newest is not None
    other = newest / "random_states_0.pkl"
    run(capsys, "inspect", "--verify", str(tmp_path))
    other.write_bytes(b"1234567x")
    run(capsys, "inspect", str(tmp_path))
    assert "random_states_0.pkl" in run(capsys, "inspect", "--verify", str(tmp_path), status=1)
    other.write_bytes(b"1")
    assert "random_states_0.pkl" in run(capsys, "inspect", str(tmp_path), status=1)
    other.unlink()
    assert "random_states_0.pkl is missing" in run(capsys, "inspect", str(tmp_path), status=1)


def test_several_models_are_named(tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "dist_adamw")
    write(tmp_path / "dist_adamw_1")
    assert "has the checkpoints of 2 models: dist_adamw, dist_adamw_1." in refused(capsys, "inspect", str(tmp_path))


def test_a_latest_that_leads_out_is_not_followed(tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "secret")
    (tmp_path / "x").mkdir()
    for name in ("../secret", str(tmp_path / "secret"), "..", ""):
        (tmp_path / "x" / "latest").write_text(name)
        assert "has no checkpoint" in refused(capsys, "inspect", str(tmp_path / "x"))


# ---------------------------------------------------------------- import and export


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--master"], torch.float32),
        (["--master", "true"], torch.float32),
        (["--master=true"], torch.float32),
        (["--no-master"], torch.float16),
        (["--no_master"], torch.float16),
        (["--master", "false"], torch.float16),
        (["--master", "--master=false"], torch.float16),
        ([], torch.float16),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_flags_are_flags(flags: list[str], dtype: torch.dtype, is_first: bool, tmp_path: Path, capsys: Capture) -> None:
    paths = [str(write(tmp_path / "x")), str(tmp_path / "y")]
    run(capsys, "export", *([*flags, *paths] if is_first else [*paths, *flags]), "--kind", "safetensors")
    assert load_file(tmp_path / "y")["weight"].dtype == dtype


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["export", "x", "y"], "name the kind of file to write: --kind torch"),
        (
            ["export", "x", "y.safetensors", "--kind=torch"],
            "y.safetensors has the suffix of another kind, got --kind torch.",
        ),
        (["export", "x", "y", "--kind=tensors"], "--kind must be torch, dcp, universal or safetensors, got 'tensors'"),
        (["export", "x", "y", "--masters"], "no option --masters. Did you mean --master?"),
        (["export", "x", "--kind=torch"], "export needs TARGET: dist-adamw export PATH TARGET."),
        (["import", "nothing.pt", "y"], "there is no nothing.pt"),
    ],
)
def test_a_mistake_is_one_sentence(args: list[str], sentence: str, capsys: Capture) -> None:
    assert sentence in refused(capsys, *args)


def test_import_describes_what_it_wrote(tmp_path: Path, capsys: Capture) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4)}, tmp_path / "theirs.pt")
    args = ["import", str(tmp_path / "theirs.pt"), str(tmp_path / "x"), "--without", "b", "--without=c"]
    found = answer(capsys, *args)
    assert found["problem"] is None
    assert found["weights"] == {"elements": 2, "tensors": 1}


def test_the_kinds_are_those_of_the_library() -> None:
    from dist_adamw.checkpoint.formats import content
    from dist_adamw.cli import checkpoints

    assert checkpoints.Kind == content.Kind
