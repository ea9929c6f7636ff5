"""save_state and load_state after prepare: every share, any number of ranks, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CheckpointError, CyclicLRWithRestarts, DistAdamW, prepare
from dist_adamw.checkpoint.storage.index import damage, read_index, write_index
from tests.distributed.jobs import RECIPE, Row, epochs, job
from tests.known import to_memory_format, unwrap
from tests.ranks import expect_error_on_all, run_ranks


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def save_then_go_on(
    folder: str, accumulation: int, save_at: int, bucket_numel: int = 1
) -> tuple[list[Row], list[Tensor]]:
    options = {"bucket_numel": bucket_numel}  # 1: every rank owns several runs of a parameter
    accelerator, objects = job(accumulation, 48, loader={"batch_size": 2}, optimizer=options)
    prepared = prepare(accelerator, *objects)
    rows = []
    for i, row in enumerate(epochs(accelerator, *prepared, count=4)):
        rows.append(row)
        if i + 1 == save_at:
            accelerator.save_state(folder)
    return rows[save_at:], weights(prepared[0])


def load_and_go_on(folder: str, accumulation: int, done: int) -> tuple[list[Row], list[Tensor], int]:
    accelerator, objects = job(accumulation, 48, loader={"batch_size": 2})
    prepared = prepare(accelerator, *objects)
    accelerator.load_state(folder)
    model, optimizer, loader, scheduler = prepared
    assert scheduler.batch_size is not None
    per_epoch = 48 // scheduler.batch_size
    rest = accelerator.skip_first_batches(loader, done % per_epoch * accumulation)
    rows = list(epochs(accelerator, model, optimizer, rest, scheduler, count=1))
    rows += epochs(accelerator, *prepared, count=4 - done // per_epoch - 1)
    return rows, weights(model), objects[1].state_bytes


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("bucket_numel", [1, 1 << 23])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(world_size: int, bucket_numel: int, tmp_path: Path) -> None:
    accumulation = 6 // world_size
    gone_on = run_ranks(world_size, save_then_go_on, str(tmp_path), accumulation, 6, bucket_numel)
    resumed = run_ranks(world_size, load_and_go_on, str(tmp_path), accumulation, 6)
    for (rows, end), (rows_again, end_again, _) in zip(gone_on, resumed, strict=True):
        assert rows_again == rows
        assert all(torch.equal(a, b) for a, b in zip(end, end_again, strict=True))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_resuming_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    gone_on = run_ranks(before, save_then_go_on, str(tmp_path), 6 // before, 6)[0]
    for rows, end, _ in run_ranks(after, load_and_go_on, str(tmp_path), 6 // after, 6):
        assert rows == gone_on[0]
        for a, b in zip(gone_on[1], end, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # gradients are averaged in another order


def test_files_on_disk_are_a_whole(tmp_path: Path) -> None:
    run_ranks(3, save_then_go_on, str(tmp_path), 2, 6)
    folder = tmp_path / "dist_adamw"
    index = read_index(folder)
    files = sorted(p.name for p in folder.iterdir())
    assert files == sorted(["index.json", *index.files])
    assert [name[16:] for name in files[:-1]] == [f"-{r:05d}.safetensors" for r in range(3)]
    assert damage(folder) is None
    kinds = {key.partition(".")[0] for key in index.tensors}
    assert kinds == {"model", "exp_avg", "exp_avg_sq", "rng"}
    for name in index.files:  # anybody can look into them
        with safe_open(folder / name, framework="pt") as file:
            assert len(list(file.keys())) > 6
    # Accelerate's own files of the same things, which are pickles, are not there.
    assert not [p for p in tmp_path.glob("*") if p.name.startswith(("optimizer", "scheduler", "model", "pytorch"))]


def load_only(folder: str, width: int) -> str:
    accelerator, objects = job(2, 48, loader={"batch_size": 2}, width=width)
    model, _optimizer, *_ = prepare(accelerator, *objects)
    before = weights(model)
    try:
        accelerator.load_state(folder)
    except ValueError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)), "something was loaded"
        assert not objects[1].state, "something was loaded"
        return f"{type(error).__name__}: {error}"
    return "loaded"


def break_(folder: Path, how: str) -> None:
    folder = folder / "dist_adamw"
    index = folder / "index.json"
    share = max(folder.glob("*-00001.safetensors"))
    content = bytearray(share.read_bytes())
    text = index.read_text()
    if how == "truncated":
        share.write_bytes(content[:-7])
    elif how == "flipped":
        content[-3] ^= 4
        share.write_bytes(content)
    elif how == "missing":
        share.unlink()
    elif how == "a link":
        share.rename(folder.parent / "elsewhere")
        share.symlink_to(folder.parent / "elsewhere")
    elif how == "no index":
        index.unlink()
    elif how == "torn index":
        index.write_text(text[:-20])
    elif how == "flipped index":
        index.write_text(re.sub(r'"samples": (\d+)', lambda found: f'"samples": {int(found[1]) + 8}', text))
    elif how == "version":
        index.write_text(text.replace('"version": 2', '"version": 99', 1))
    elif how == "foreign":
        index.write_text('{"weight_map": {}}')
    elif how == "outside":
        changed = json.loads(text.replace(f'"{share.name}', f'"../{share.name}'))
        del changed["sha256"]
        write_index(folder, changed)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"-00001\.safetensors.* damaged: it has"),
        ("flipped", r"-00001\.safetensors.*checksum"),
        ("missing", r"-00001\.safetensors cannot be read"),
        ("a link", r"-00001\.safetensors cannot be read"),
        ("no index", r"index\.json is missing"),
        ("torn index", r"index\.json is damaged"),
        ("flipped index", r"index\.json.*checksum"),
        ("version", "version 99.* version 2"),
        ("foreign", "not an index"),
        ("outside", r"no save makes.*'\.\./"),
    ],
)
def test_a_damaged_checkpoint_is_named_on_every_rank(how: str, message: str, tmp_path: Path) -> None:
    run_ranks(2, save_then_go_on, str(tmp_path), 2, 2)
    break_(tmp_path, how)
    for world_size in (2, 1):
        for error in run_ranks(world_size, load_only, str(tmp_path), 20):
            assert error.startswith("CheckpointError: ")
            assert re.search(message, error)


def test_files_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    run_ranks(2, save_then_go_on, str(tmp_path / "a"), 2, 2)
    run_ranks(2, save_then_go_on, str(tmp_path / "b"), 2, 3)
    ours, theirs = (max((tmp_path / x / "dist_adamw").glob("*-00001.safetensors")) for x in "ab")
    ours.write_bytes(theirs.read_bytes())
    assert "checksum" in run_ranks(1, load_only, str(tmp_path / "a"), 20)[0]


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    run_ranks(2, save_then_go_on, str(tmp_path), 2, 2)
    for error in run_ranks(2, load_only, str(tmp_path), 21):
        assert re.search(r"another model.*0\.weight.*\[20, 6\] there.*\[21, 6\] here", error)
    assert run_ranks(2, load_only, str(tmp_path), 20) == ["loaded", "loaded"]


def save_where_one_rank_cannot(folder: str) -> None:
    accelerator, objects = job(2, 48)
    prepared = prepare(accelerator, *objects)
    next(iter(epochs(accelerator, *prepared, count=1)))
    accelerator.save_state(folder)


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "dist_adamw").write_text("a file where the folder should be")
    for error in expect_error_on_all(2, save_where_one_rank_cannot, str(tmp_path)):
        assert error.startswith("CheckpointError: ")
        assert "FileExistsError" in error


def prepare_then_save(folder: str, how: str) -> int:
    """Save before the first update of a job that has state all the same."""
    accelerator, (model, adamw, loader, scheduler) = job(1, 24)
    for p in adamw.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    if how == "updated before":
        scheduler.epoch_size, scheduler.batch_size = 24, dist.get_world_size()
        adamw.step()
    elif how == "loaded torch":
        source = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        source.step()
        adamw.load_state_dict(source.state_dict())
    elif how == "loaded share":
        other = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        other.step()
        adamw.load_state_dict(other._share_state_dict())
    prepared = prepare(accelerator, model, adamw, loader, scheduler)
    accelerator.save_state(folder)
    adamw.state.clear()
    adamw._reset()
    accelerator.load_state(folder)
    del prepared
    return adamw.updates


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("how", ["updated before", "loaded torch", "loaded share"])
def test_saving_before_the_first_update_keeps_what_was_loaded(how: str, world_size: int, tmp_path: Path) -> None:
    assert run_ranks(world_size, prepare_then_save, str(tmp_path), how) == [1] * world_size


def prepare_again_after_free_memory(folder: str) -> None:
    accelerator, objects = job(2, 48)
    prepare(accelerator, *objects)
    accelerator.free_memory()
    accelerator.step = 0
    _, objects = job(2, 48)
    prepared = prepare(accelerator, *objects)
    next(iter(epochs(accelerator, *prepared, count=1)))
    accelerator.save_state(folder)
    assert (Path(folder) / "dist_adamw" / "index.json").exists()
    assert not (Path(folder) / "dist_adamw_1").exists(), "what Accelerate forgot was saved too"
    accelerator.load_state(folder)
    assert objects[1].updates == 1


def test_preparing_again_after_free_memory(tmp_path: Path) -> None:
    run_ranks(2, prepare_again_after_free_memory, str(tmp_path))


def two_models(folder: str, how: str) -> list[Any]:
    """One accelerator with two sets of objects, such as generator and discriminator, one of them ahead."""
    accelerator, first = job(1, 48, loader={"batch_size": 2})
    _, second = job(1, 48, loader={"batch_size": 2}, width=24)
    both = [prepare(accelerator, *objects) for objects in (first, second)]
    if how == "save":
        for prepared, count in zip(both, (5, 9), strict=True):
            for _ in zip(range(count), epochs(accelerator, *prepared, count=2), strict=False):
                pass
        accelerator.save_state(folder)
    elif how == "load":
        accelerator.load_state(folder)
    else:  # what is wrong with one keeps both from being loaded
        torch._foreach_add_([p.data for model, *_ in both for p in model.parameters()], 1.0)
        before = [weights(model) for model, *_ in both]
        with pytest.raises(CheckpointError, match="not a position"):
            accelerator.load_state(folder)
        for (model, *_), kept in zip(both, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(kept, weights(model), strict=True))
    return [
        (
            scheduler.samples,
            optimizer.param_groups[0]["lr"],
            [w.tolist() for w in weights(model)],
            unwrap(optimizer).updates,
        )
        for model, optimizer, _, scheduler in both
    ]


def test_two_models_of_one_accelerator(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    saved = run_ranks(2, two_models, str(folder), "save")
    assert sorted(path.name for path in folder.glob("dist_adamw*")) == ["dist_adamw", "dist_adamw_1"]
    first, second = saved[0]
    assert (first[0], second[0]) == (20, 36)
    for world_size in (1, 2, 3):
        for found in run_ranks(world_size, two_models, str(folder), "load"):
            assert found == saved[0]
    index = json.loads((folder / "dist_adamw" / "index.json").read_text())
    del index["sha256"]
    index["about"]["extra"]["position"] = "here"
    write_index(folder / "dist_adamw", index)
    run_ranks(2, two_models, str(folder), "refused")


def save_that_fails(folder: str) -> None:
    accelerator, objects = job(1, 24)
    prepared = prepare(accelerator, *objects)
    rows = epochs(accelerator, *prepared, count=1)
    next(rows)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    hook = accelerator.register_save_state_pre_hook(fail)
    with pytest.raises(CheckpointError, match="no space left"):
        accelerator.save_state(folder)
    hook.remove()
    next(rows)
    assert objects[1]._share_state_dict()["state"], "a later state dict lost the moments"


def test_a_save_that_failed_leaves_state_dicts_whole(tmp_path: Path) -> None:
    run_ranks(2, save_that_fails, str(tmp_path))


def load_where_one_rank_sees_nothing(folder: str) -> None:
    accelerator, objects = job(2, 48, loader={"batch_size": 2})
    prepare(accelerator, *objects)
    accelerator.load_state(folder if dist.get_rank() == 0 else folder + "-elsewhere")


def test_a_folder_that_one_rank_does_not_see_is_an_error_on_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    run_ranks(2, save_then_go_on, str(folder), 2, 2)
    shutil.copytree(folder, tmp_path / "checkpoint-elsewhere", ignore=shutil.ignore_patterns("dist_adamw"))
    for error in expect_error_on_all(2, load_where_one_rank_sees_nothing, str(folder)):
        assert "missing on rank 1" in error


def conv_job(folder: str, memory_format: torch.memory_format, save: bool) -> list[Tensor]:
    accelerator = Accelerator()
    model = to_memory_format(nn.Conv2d(3, 4, 3), memory_format)
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 5, 5)), batch_size=2)
    model_, optimizer_, loader_, _ = prepare(accelerator, model, optimizer, loader, scheduler)
    if not save:
        accelerator.load_state(folder)
        return weights(model)
    for (x,) in loader_:
        accelerator.backward(model_(x).square().mean())
        optimizer_.step()
        scheduler.step()
        optimizer_.zero_grad()
    accelerator.save_state(folder)
    return weights(model)


def test_a_checkpoint_loads_into_another_memory_format(tmp_path: Path) -> None:
    expected = run_ranks(2, conv_job, str(tmp_path), torch.channels_last, True)[0]
    for ours in run_ranks(2, conv_job, str(tmp_path), torch.contiguous_format, False):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


class Counter:
    def __init__(self) -> None:
        self.n = 5

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def hooks_and_objects(folder: str) -> list[Any]:
    accelerator, objects = job(2, 48)
    model, *_ = prepare(accelerator, *objects)
    seen: list[Any] = []
    accelerator.register_save_state_pre_hook(lambda models, weights, path: seen.append((len(models), len(weights))))
    accelerator.register_load_state_pre_hook(lambda models, path: seen.append(len(models)))
    accelerator.save_state(folder)
    before = weights(model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    changed = weights(model)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    with pytest.raises(CheckpointError, match=r"0 custom objects.* 1 .*registered"):
        accelerator.load_state(folder)
    assert all(torch.equal(a, b) for a, b in zip(changed, weights(model), strict=True))
    accelerator._custom_objects.clear()
    accelerator.load_state(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    return seen


def test_hooks_see_the_models_and_missing_objects_change_nothing(tmp_path: Path) -> None:
    assert run_ranks(2, hooks_and_objects, str(tmp_path)) == [[(1, 1), 1]] * 2


def goes_on_by_itself(folder: str, resumes: bool = True) -> tuple[Any, str]:
    """A job that begins with load_state(), and the name of what it saves."""
    accelerator, objects = job(1, 48, loader={"batch_size": 2})
    accelerator.project_configuration = ProjectConfiguration(folder, automatic_checkpoint_naming=True, total_limit=1)
    prepared = prepare(accelerator, *objects)
    if resumes:
        accelerator.load_state()
    name = Path(accelerator.save_state()).name
    dist.barrier()
    return prepared, name


def keeps_one(folder: str) -> list[Any]:
    """With automatic names and a limit of one, the previous checkpoint is kept next to the new folder."""
    accelerator, objects = job(1, 48, loader={"batch_size": 2})
    accelerator.project_configuration = ProjectConfiguration(folder, automatic_checkpoint_naming=True, total_limit=1)
    model, optimizer, loader, scheduler = prepare(accelerator, *objects)
    checkpoints, seen = Path(folder) / "checkpoints", []
    hook = accelerator.register_save_state_pre_hook(
        lambda *_: seen.append([damage(path / "dist_adamw") for path in sorted(checkpoints.glob("*_[0-9]"))])
    )
    for _ in range(3):
        accelerator.save_state()
        dist.barrier()
    hook.remove()
    before = weights(model)
    for _ in epochs(accelerator, model, optimizer, loader, scheduler, count=1):
        pass
    accelerator.load_state()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    left = [path.name for path in checkpoints.iterdir()]
    dist.barrier()
    _, again = goes_on_by_itself(folder)
    assert (checkpoints / again).is_dir(), "what was saved last has been deleted"
    return [[len(found) for found in seen], seen[1][0], seen[2][0], left, accelerator.project_configuration.total_limit]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_limit_of_one_never_leaves_none(world_size: int, tmp_path: Path) -> None:
    expected = [[1, 2, 2], None, None, ["checkpoint_2"], 1]
    for found in run_ranks(world_size, keeps_one, str(tmp_path)):
        assert found == expected
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_3"]
    # One that begins anew has the number 0, which is not the oldest.
    for _, name in run_ranks(world_size, begins_anew, str(tmp_path)):
        assert (tmp_path / "checkpoints" / name).is_dir()


def begins_anew(folder: str) -> tuple[None, str]:
    return None, goes_on_by_itself(folder, resumes=False)[1]


def saved_twice(folder: str) -> None:
    accelerator, objects = job(1, 48, loader={"batch_size": 2})
    model, *_ = prepare(accelerator, *objects)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    accelerator.save_state(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(Path(folder) / "dist_adamw", Path(folder) / "before")
    dist.barrier()
    counter.n = 1
    accelerator.save_state(folder)
    (Path(folder) / "log.txt").write_text(str(dist.get_rank()))  # grows as it likes
    accelerator.load_state(folder)
    dist.barrier()
    if dist.get_rank() == 0:  # as a kill leaves it between Accelerate's files and ours
        shutil.rmtree(Path(folder) / "dist_adamw")
        shutil.move(Path(folder) / "before", Path(folder) / "dist_adamw")
    dist.barrier()
    torch._foreach_add_([p.data for p in model.parameters()], 1.0)
    before = weights(model)
    with pytest.raises(CheckpointError, match=r"not of one save.*custom_checkpoint_0.pkl"):
        accelerator.load_state(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_files_of_two_saves_to_one_folder_are_told_apart(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, saved_twice, str(tmp_path / "checkpoint"))


def says_beside(folder: str, extra: Any) -> str:
    accelerator, objects = job(2, 48)
    model, *_ = prepare(accelerator, *objects)
    accelerator.save_state(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        found = json.loads((Path(folder) / "dist_adamw" / "index.json").read_text())
        del found["sha256"]
        found["about"]["extra"] = extra
        write_index(Path(folder) / "dist_adamw", found)
    dist.barrier()
    torch._foreach_add_([p.data for p in model.parameters()], 1.0)  # so that it shows when something is loaded
    before = weights(model)
    with pytest.raises(CheckpointError) as raised:
        accelerator.load_state(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    return str(raised.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], r"damaged.*save_state.* \[\]"),
        ({"files": []}, r"damaged.*save_state.* \{'files': \[\]\}"),
        ({"files": 4}, r"damaged.*save_state.* \{'files': 4\}"),
        ({"position": "here"}, "not a position"),
        ({"files": {"../other": [1, ""]}}, r"not of one save.*\.\./other"),
    ],
)
def test_what_stands_beside_the_tensors_is_checked_before_anything_changes(
    extra: Any, message: str, tmp_path: Path
) -> None:
    for said in run_ranks(2, says_beside, str(tmp_path / "checkpoint"), extra):
        assert re.search(message, said)


def killed_in_save_state(folder: str) -> str:
    _, first = goes_on_by_itself(folder, resumes=False)
    dist.barrier()
    if dist.get_rank() == 0:
        torn = Path(folder) / "checkpoints" / "checkpoint_1"
        torn.mkdir()
        shutil.copy(Path(folder) / "checkpoints" / first / "random_states_0.pkl", torn)
    dist.barrier()
    with pytest.warns(UserWarning, match="checkpoint_1 .*is incomplete") as told:
        name = goes_on_by_itself(folder)[1]
    assert [one.filename for one in told if "is incomplete" in str(one.message)] == [__file__]
    return name


def test_a_checkpoint_that_was_not_written_to_the_end_is_passed_by(tmp_path: Path) -> None:
    assert run_ranks(2, killed_in_save_state, str(tmp_path)) == ["checkpoint_2"] * 2


def one_rank_cannot_write_its_random_state(folder: str) -> None:
    accelerator, objects = job(2, 48)
    prepare(accelerator, *objects)
    if dist.get_rank() == 1:
        (Path(folder) / "random_states_1.pkl").mkdir(parents=True)
    dist.barrier()
    accelerator.save_state(folder)


def test_what_one_rank_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    for error in expect_error_on_all(2, one_rank_cannot_write_its_random_state, str(tmp_path)):
        assert error.startswith("CheckpointError: ")
        assert error.endswith("(rank 1)")
