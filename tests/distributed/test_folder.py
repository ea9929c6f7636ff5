"""A run's folder keeps the newest few checkpoints whole, whatever the disk does; asynchronous saves."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_adamw import (
    AgreementError,
    AsyncSaver,
    CheckpointError,
    CheckpointFolder,
    CyclicLRWithRestarts,
    DistAdamW,
    load,
    save,
)
from dist_adamw.checkpoint import save_load as checkpoint
from dist_adamw.checkpoint.manifest import damage_of
from dist_adamw.checkpoint.storage import files as storage
from dist_adamw.checkpoint.storage.files import read_whole
from dist_adamw.checkpoint.storage.index import damage, read_index
from dist_adamw.checkpoint.storage.locks import Lock
from dist_adamw.optimizer import replicas
from dist_adamw.optimizer.sharding.fingerprints import fingerprints
from tests.kills import Mode, kill_often
from tests.ranks import expect_error_on_all, run_ranks


class Job:
    """A few thousand weights under DistAdamW, sharded over all ranks."""

    def __init__(self, width: int = 30) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 2))
        self.optimizer = DistAdamW(self.model.parameters(), lr=1e-2, eps=0.1)
        self.scheduler = CyclicLRWithRestarts(self.optimizer, 10, 100, restart_period=1)
        self.optimizer.attach(self.model)

    def train(self, updates: int = 1) -> None:
        for _ in range(updates):
            self.model(torch.randn(5, 8)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    @property
    def all(self) -> tuple[nn.Module, DistAdamW, CyclicLRWithRestarts]:
        return self.model, self.optimizer, self.scheduler

    def write(self, path: Path) -> None:
        save(path, *self.all)


def keeps(root: str) -> list[list[str]]:
    job, found = Job(), []
    folder = CheckpointFolder(root, keep=2)
    for _ in range(4):
        job.train()
        folder.save(job.scheduler.samples, job.write)
        found.append(sorted(os.listdir(root)))
        dist.barrier()
    folder.save(job.scheduler.samples, job.write)  # again at the same sample
    assert folder.newest() == folder.all()[-1]
    dist.barrier()
    if dist.get_rank() == 0:
        assert [path.name for path in folder.set_aside(after=30)] == ["sample-000000040.superseded"]
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_newest_are_kept(world_size: int, tmp_path: Path) -> None:
    found = run_ranks(world_size, keeps, str(tmp_path))[0]
    names = [f"sample-{n:09d}" for n in (10, 20, 30, 40)]
    assert found[0] == ["latest", "lock", names[0]]
    assert found[-1] == ["latest", "lock", *names[2:]]
    assert sorted(os.listdir(tmp_path)) == ["latest", "lock", names[2], names[3] + ".superseded"]
    assert (tmp_path / "latest").read_text() == names[2]
    assert damage_of(tmp_path / names[2]) is None
    (tmp_path / names[2] / "manifest.json").unlink()
    assert "is not whole: manifest.json is missing" in str(damage_of(tmp_path / names[2]))


def finds_what_is_damaged(root: str) -> int:
    job, folder = Job(), CheckpointFolder(root)
    older, newest = (folder.save(n, job.write) for n in (10, 20))
    assert newest is not None
    assert folder.newest() == newest
    assert folder.newest(but=newest) == older
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    for path in files:  # of which each rank reads some
        whole = path.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        dist.barrier()
        assert str(path.parent) in str(folder.damage_of(newest))
        assert folder.newest() == older
        dist.barrier()
        if dist.get_rank() == 0:
            path.write_bytes(whole)
        dist.barrier()
    assert folder.damage_of(newest) is None
    return len(files)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_reading_and_all_find_the_damage(world_size: int, tmp_path: Path) -> None:
    assert set(run_ranks(world_size, finds_what_is_damaged, str(tmp_path))) == {world_size + 2}


def to_different_places(root: str) -> None:
    """Neither of these may look like a success, and take an older checkpoint with it."""
    rank, job = dist.get_rank(), Job()
    folder = CheckpointFolder(f"{root}/shared", keep=1)
    kept = folder.save(10, job.write)
    with pytest.raises(CheckpointError, match="different folders"):
        folder.save(20 + rank, job.write)
    with pytest.raises(AgreementError, match="folder"):
        save(f"{root}/{rank}", *job.all)
    assert folder.newest() == kept
    Path(f"{root}/of-{rank}").mkdir()
    here = os.getcwd()
    os.chdir(f"{root}/of-{rank}")  # the same name on another disk
    try:
        with pytest.raises(CheckpointError, match="does not see"):
            save("own", *job.all)
        own = CheckpointFolder("runs")
        with pytest.raises(CheckpointError, match="different folders"):
            own.save(10, job.write)
        own.root = Path("runs")  # one name on two disks
        with pytest.raises(CheckpointError, match="does not see"):
            own.save(10, job.write)
        (Path("runs") / "sample-000000010").mkdir() if rank == 0 else None
        dist.barrier()
        with pytest.raises(CheckpointError, match="missing on rank 1"):
            own.newest()
    finally:
        os.chdir(here)


def test_ranks_that_save_to_different_places_are_told(tmp_path: Path) -> None:
    run_ranks(2, to_different_places, str(tmp_path))


def failed_on_one(folder: str) -> list[str]:
    job, written = Job(), storage._write_file
    job.write(Path(folder))

    def fails(*args: Any, **kwargs: Any) -> Any:
        result = written(*args, **kwargs)
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        return result

    storage._write_file = fails
    try:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="the disk is gone"):
                job.write(Path(folder))
    finally:
        storage._write_file = written
    dist.barrier()
    return sorted(os.listdir(folder))


def test_a_save_that_failed_leaves_no_files(tmp_path: Path) -> None:
    for found in run_ranks(2, failed_on_one, str(tmp_path)):
        assert found == sorted([*read_index(tmp_path).files, "index.json"])
    assert damage(tmp_path) is None


# ---------------------------------------------------------------------------------------------- disks that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own may not be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fills_up(root: str, on_error: Any) -> int:
    """Each checkpoint takes a third of the disk, and a third one does not fit."""
    job = Job(width=1000)
    folder = CheckpointFolder(root, keep=5, on_error=on_error)
    for _ in range(4):
        job.train()
        folder.save(job.scheduler.samples, job.write)
    return job.optimizer.updates


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_is_a_sentence_and_training_lives_if_asked(world_size: int, small_disk: Path) -> None:
    for error in expect_error_on_all(world_size, fills_up, str(small_disk / "a"), "raise"):
        assert error.startswith("CheckpointError: ")
        assert os.strerror(errno.ENOSPC) in error
        assert "still there" in error
    whole = sorted((small_disk / "a").glob("sample-*"))
    assert whole
    assert all(damage_of(path) is None for path in whole)
    assert not list((small_disk / "a").glob("*.partial")), "what could not be written takes room"
    for path in whole[:-1]:
        subprocess.run(["rm", "-r", path], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_ranks(world_size, fills_up, str(small_disk / "a"), "warn") == [4] * world_size
    assert all(damage_of(path) is None for path in (small_disk / "a").glob("sample-*"))


def saves_once(root: str) -> None:
    job = Job()
    job.train()
    CheckpointFolder(root).save(10, job.write)


def becomes_read_only(disk: str) -> None:
    job = Job()
    job.train()
    folder = CheckpointFolder(disk)
    folder.save(10, job.write)
    dist.barrier()
    if dist.get_rank() == 0:  # over the other one, which has open files
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=True)
    dist.barrier()
    folder.save(20, job.write)


def test_a_read_only_folder_is_a_sentence(small_disk: Path) -> None:
    for error in expect_error_on_all(2, becomes_read_only, str(small_disk)):
        assert error.startswith("CheckpointError: ")
        assert "Read-only file system" in error
    for error in expect_error_on_all(2, saves_once, str(small_disk / "new")):
        assert "Read-only file system" in error
    subprocess.run(["umount", small_disk], check=True)
    assert damage_of(small_disk / "sample-000000010") is None


# ---------------------------------------------------------------------------------------------- two jobs


def hold(root: str, ready: Any) -> None:
    folder = CheckpointFolder(root)
    ready.set()
    time.sleep(60)
    folder.close()


@contextlib.contextmanager
def another_job(root: str) -> Iterator[Any]:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=hold, args=(root, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def takes(root: str, patience: float) -> str:
    try:
        folder = CheckpointFolder(root, patience=patience)
    except CheckpointError as error:
        return str(error)
    folder.close()
    return "taken"


def test_two_jobs_on_one_folder_refuse_each_other(tmp_path: Path) -> None:
    with another_job(str(tmp_path)) as process:
        for error in run_ranks(2, takes, str(tmp_path), 0.2):
            assert f"another job saves to {tmp_path} (process {process.pid} on " in error
        process.kill()
        assert run_ranks(2, takes, str(tmp_path), 10.0) == ["taken", "taken"]


def saves_while_another_does(path: str) -> None:
    job = Job()
    job.train()
    job.write(Path(path))
    if dist.get_rank() == 0:
        lock = Lock(Path(path))
        with pytest.raises(CheckpointError, match="another job is saving"):
            Lock(Path(path))
    dist.barrier()
    with pytest.raises(CheckpointError, match="another job is saving"):
        job.write(Path(path))
    dist.barrier()
    if dist.get_rank() == 0:
        lock.release()
    job.write(Path(path))


def test_two_saves_to_one_path_refuse_each_other(tmp_path: Path) -> None:
    run_ranks(2, saves_while_another_does, str(tmp_path))
    assert damage(tmp_path) is None


def test_a_forked_process_does_not_keep_a_lock(tmp_path: Path) -> None:
    """Fork during a save, as a data loader's workers do."""
    folder, lock = CheckpointFolder(tmp_path), Lock(tmp_path / "path")
    if not (child := os.fork()):
        time.sleep(30)
        os._exit(0)
    try:
        folder.close()
        lock.release()
        CheckpointFolder(tmp_path, patience=0.0).close()
        Lock(tmp_path / "path").release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def disagrees(root: str) -> int:
    job = Job()
    job.train()
    folder = CheckpointFolder(root, on_error="warn")
    folder.save(10, job.write)
    job.train()
    if dist.get_rank() == 1:
        job.model.get_parameter("0.weight").data[0, 0] += 1
    with pytest.raises(AgreementError, match=r"differ in '0\.weight'"):
        folder.save(20, job.write)
    return len(folder.all())


def of_another_schedule(root: str) -> None:
    job = Job()
    job.optimizer.param_groups[0]["betas"] = (0.5, 0.6) if dist.get_rank() else (0.9, 0.999)
    with pytest.raises(AgreementError, match="betas"):
        job.write(Path(root))
    with pytest.raises(AgreementError, match="betas"):
        AsyncSaver().save(root, *job.all)


def test_hyper_parameters_that_differ_are_told_before_a_save(tmp_path: Path) -> None:
    run_ranks(2, of_another_schedule, str(tmp_path / "path"))
    assert not (tmp_path / "path").exists()


def test_ranks_that_disagree_end_the_job_whatever_is_asked_for(tmp_path: Path) -> None:
    assert run_ranks(2, disagrees, str(tmp_path)) == [1, 1]


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    job = Job()
    job.train()
    for name in ("sample-000000005.partial", "sample-000000003.deleted.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() is None
    folder.save(10, job.write)
    assert sorted(os.listdir(tmp_path)) == ["latest", "lock", "sample-000000010"]


def test_a_job_that_goes_on_from_an_older_one_keeps_what_it_writes(tmp_path: Path) -> None:
    job = Job()
    job.train()
    folder = CheckpointFolder(tmp_path, keep=2)
    for samples in (300, 400, 500):
        folder.save(samples, job.write)
    saved = folder.save(100, job.write)
    assert saved is not None
    assert folder.newest() == saved
    assert (tmp_path / "latest").read_text() == saved.name
    assert len([*tmp_path.glob("*.superseded")]) == 2


def test_an_index_of_somebody_elses_is_a_file_like_any(tmp_path: Path) -> None:
    job = Job()
    job.train()

    def write(path: Path) -> None:
        job.write(path / "state")
        (path / "tokenizer").mkdir()
        (path / "tokenizer" / "index.json").write_text("{}")

    folder = CheckpointFolder(tmp_path)
    saved = folder.save(10, write)
    assert folder.newest() == saved
    assert saved is not None
    (saved / "tokenizer" / "index.json").write_text("{ }")
    assert "tokenizer/index.json has 3 bytes where 2 were written" in str(damage_of(saved))


def test_one_process_and_its_folders(tmp_path: Path) -> None:
    job = Job()
    job.train()
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"has a CheckpointFolder of .*already"):
        CheckpointFolder(tmp_path, patience=0.0)
    folder.close()
    with pytest.raises(CheckpointError, match="is closed"):
        folder.save(10, job.write)
    CheckpointFolder(tmp_path).save(10, job.write)


def test_a_job_killed_while_it_replaced_a_checkpoint(tmp_path: Path) -> None:
    job = Job()
    job.train()
    folder = CheckpointFolder(tmp_path)
    saved = folder.save(10, job.write)
    assert saved is not None
    folder.close()
    saved.rename(saved.with_name(saved.name + ".replaced"))
    assert CheckpointFolder(tmp_path).newest() == saved


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep .*1 or more.* 0"):
        CheckpointFolder(tmp_path, keep=0)
    with pytest.raises(ValueError, match=r"on_error .*'ignore'"):
        CheckpointFolder(tmp_path, on_error=cast(Any, "ignore"))


# ---------------------------------------------------------------------------------------------- beside training


def saves_beside(root: str) -> None:
    job, saver = Job(width=2000), AsyncSaver()
    folder = CheckpointFolder(f"{root}/beside", keep=9)
    seen: list[int] = []
    for _ in range(3):
        job.train()
        seen.append(job.scheduler.samples)
        save(f"{root}/at-once-{job.scheduler.samples}", *job.all)
        folder.async_save(saver, job.scheduler.samples, *job.all, extra={"seen": seen})
        job.train(2)  # the copy is of before
    saver.close()
    again = Job(width=2000)
    loaded = load(f"{root}/beside/sample-000000070", *again.all)
    assert loaded.samples == again.scheduler.samples == 70
    assert loaded.extra == {"seen": [10, 40, 70]}
    assert load(f"{root}/beside/sample-000000010", *again.all).extra == {"seen": [10]}
    load(f"{root}/beside/sample-000000070", *again.all)
    assert again.optimizer.updates == 7


def tensors(path: Path) -> dict[str, Tensor]:
    index = read_index(path)
    return {key: read_whole(index, key) for key in index.tensors if not key.startswith("rng")}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_saving_beside_training_has_the_bits_of_saving_at_once(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, saves_beside, str(tmp_path))
    for samples in (10, 40, 70):
        beside = tensors(tmp_path / f"beside/sample-{samples:09d}")
        at_once = tensors(tmp_path / f"at-once-{samples}")
        assert beside.keys() == at_once.keys()
        assert all(torch.equal(beside[key], at_once[key]) for key in at_once)
        assert damage_of(tmp_path / f"beside/sample-{samples:09d}") is None


def saves_both_ways(root: str) -> None:
    job, saver = Job(width=2000), AsyncSaver()
    job.train()
    folder = CheckpointFolder(root)
    folder.async_save(saver, 10, *job.all)
    folder.save(20, job.write)  # as on a SIGTERM
    assert [folder.samples_of(path) for path in folder.all()] == [10, 20]


def fails_once(root: str) -> list[bool]:
    job, saver = Job(), AsyncSaver()
    job.train()
    folder = CheckpointFolder(root, on_error="warn")
    found = []
    for told in (False, True):
        running = folder.async_save(saver, 10, *job.all, extra={"n": 1})
        assert running is not None
        running.wait()
        if dist.get_rank() == 0:  # the next one cannot be finished
            (Path(root) / "sample-000000020.replaced").write_text("in the way")
            (Path(root) / "sample-000000020").mkdir()
        dist.barrier()
        failing = folder.async_save(saver, 20, *job.all)
        assert failing is not None
        if told:
            with pytest.raises(CheckpointError):
                failing.wait()
        found.append(folder.async_save(saver, 30, *job.all) is not None)
        saver.wait()
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(root) / "sample-000000020.replaced").unlink()
            (Path(root) / "sample-000000020").rmdir()
        dist.barrier()
    return found


def test_a_save_waits_for_the_one_beside_training(tmp_path: Path) -> None:
    run_ranks(2, saves_both_ways, str(tmp_path))


def changed_meanwhile(root: str) -> None:
    job, saver, go, seen = Job(), AsyncSaver(), threading.Event(), [1]
    saver._thread.submit(go.wait)  # as where the disk is slow
    saving = saver.save(root, *job.all, extra={"seen": seen})
    seen.append(2)
    go.set()
    saving.wait()
    assert load(root, *job.all).extra == {"seen": [1]}
    with pytest.raises(CheckpointError, match="only plain data"):  # now, and not with the next
        saver.save(root, *job.all, extra={"seen": object()})


def test_what_is_saved_beside_training_does_not_change_with_it(tmp_path: Path) -> None:
    run_ranks(2, changed_meanwhile, str(tmp_path))


def one_rank_waits(root: str) -> None:
    job, saver = Job(), AsyncSaver()
    for _ in range(2):
        (Path(root) / "file").write_text("in the way")
        running = saver.save(f"{root}/file/checkpoint", *job.all)
        if dist.get_rank() == 0:
            with pytest.raises(CheckpointError):
                running.wait()
        with pytest.raises(CheckpointError, match="could not write"):  # of the one before; nobody waits for ever
            saver.save(f"{root}/next", *job.all)
    saver.save(f"{root}/next", *job.all).wait()
    folder = CheckpointFolder(f"{root}/runs")
    first = folder.async_save(saver, 10, *job.all)
    folder.close()  # waits
    assert first is not None
    assert first.done
    assert CheckpointFolder(f"{root}/runs").newest() == Path(f"{root}/runs/sample-000000010")


def test_an_error_that_one_rank_knows_reaches_all(tmp_path: Path) -> None:
    run_ranks(2, one_rank_waits, str(tmp_path))
    assert damage(tmp_path / "next") is None


def test_a_last_save_that_failed_is_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    script = "import sys, dist_adamw, torch; dist_adamw.AsyncSaver().save(sys.argv[1], torch.nn.Linear(1, 1))"
    if_dropped, at_the_end = (
        script,
        script.replace("dist_adamw.Async", "s = dist_adamw.Async").replace(").save", "); s.save"),
    )
    for code in (if_dropped, at_the_end):
        ended = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "file" / "x")], capture_output=True, text=True, timeout=60
        )
        assert "a checkpoint was lost" in ended.stderr


@pytest.mark.filterwarnings("ignore:no checkpoint after sample")
def test_a_failed_save_costs_no_other(tmp_path: Path) -> None:
    assert run_ranks(2, fails_once, str(tmp_path)) == [[True, True]] * 2


def fails_beside(root: str) -> None:
    job, saver = Job(), AsyncSaver()
    job.train()
    Path(root).mkdir(exist_ok=True)
    (Path(root) / "here").write_text("a file")
    saver.save(Path(root) / "here" / "inside", *job.all)
    job.train()
    saver.save(Path(root) / "next", *job.all)


def test_a_save_beside_training_that_failed_is_told_by_the_next(tmp_path: Path) -> None:
    for error in expect_error_on_all(2, fails_beside, str(tmp_path / "root")):
        assert error.startswith("CheckpointError: could not write")
        assert "NotADirectoryError" in error
    assert not (tmp_path / "root" / "next").exists()


# ---------------------------------------------------------------------------------------------- kills


def test_killed_at_any_instant_nothing_is_lost() -> None:
    """``python -m tests.kills --kills 1000`` is the long version."""
    tally = kill_often(12, 7, ["single", "DDP", "FSDP2"], show=False)
    assert not tally.problems
    assert tally.resumes
    assert tally.updates
    assert len(tally.kills) > 1


def test_killed_at_any_instant_a_reproducible_run_has_the_bits_of_one_never_killed() -> None:
    """``python -m tests.kills --kills 200 --reproducible`` is the long version; ``--same-bits`` alone fails."""
    mode = Mode(reproducible=True, same_bits=True)
    tally = kill_often(6, 7, ["single", "plain", "DDP", "FSDP2"], mode, show=False)
    assert not tally.problems
    assert tally.resumes
    assert tally.updates


# ---------------------------------------------------------------------------------------------- one rank or process


def not_for_rank_1(folder: str) -> None:
    """A rank's machine has not mounted the folder, or may not read it."""
    job, isdir = Job(), os.path.isdir
    save(folder, *job.all)
    hidden = mock.patch.object(os.path, "isdir", lambda path: dist.get_rank() == 0 and isdir(path))
    with hidden, pytest.raises(CheckpointError, match="missing on rank 1"):
        load(folder, *job.all)


def test_a_folder_that_one_rank_does_not_see_is_an_error_on_all(tmp_path: Path) -> None:
    run_ranks(2, not_for_rank_1, str(tmp_path))


def cannot_compare(folder: str) -> None:
    job = Job()

    def fails(tensors: Any) -> Any:
        if dist.get_rank() == 1:
            raise MemoryError("no room for sums")
        return fingerprints(tensors)

    said = r"not be compared.* MemoryError: no room for sums \(rank 1\)"
    with mock.patch.object(replicas, "fingerprints", fails), pytest.raises(AgreementError, match=said):
        save(folder, *job.all)
    save(folder, *job.all)


def test_a_comparison_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    run_ranks(2, cannot_compare, str(tmp_path))


def loads_while_another_saves(folder: str) -> int:
    """Files that a later save removes between the check and the reading."""
    job, make_room = Job(), checkpoint._make_room
    job.train(3)
    expected = [p.detach().clone() for p in job.model.parameters()]
    moments = [m.clone() for shard in job.optimizer.shards for m in shard.moments.values()]
    save(folder, *job.all)
    job.train(2)

    def saved_meanwhile(*args: Any) -> Any:
        dist.barrier()
        for path in Path(folder).glob("*.safetensors") if dist.get_rank() == 0 else ():
            path.unlink()
        dist.barrier()
        return make_room(*args)

    with mock.patch.object(checkpoint, "_make_room", saved_meanwhile):
        loaded = load(folder, *job.all)
    assert all(torch.equal(p, q) for p, q in zip(job.model.parameters(), expected, strict=True))
    found = [m for shard in job.optimizer.shards for m in shard.moments.values()]
    assert all(torch.equal(p, q) for p, q in zip(found, moments, strict=True))
    assert loaded.samples is not None
    return loaded.samples


def test_a_load_reads_what_it_has_checked(tmp_path: Path) -> None:
    assert run_ranks(2, loads_while_another_saves, str(tmp_path)) == [30, 30]


def fails_when_it_reads(folder: str) -> None:
    job = Job()
    save(folder, *job.all)
    gone = mock.patch.object(checkpoint, "_read", side_effect=OSError("the disk is gone"))
    with gone, pytest.raises(CheckpointError, match=r"the disk is gone.*half loaded"):
        load(folder, *job.all)
    load(folder, *job.all)


def test_a_load_that_fails_half_way_says_so(tmp_path: Path) -> None:
    run_ranks(2, fails_when_it_reads, str(tmp_path))


def test_what_lies_beside_a_checkpoint_is_part_of_it(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)

    def write(path: Path) -> None:
        save(path, model)
        (path / "mine.json").write_text("{}")
        (path / "deeper").mkdir()
        (path / "deeper" / "manifest.json").write_text("[]")
        (path / "mine.json").chmod(0o444)

    folder = CheckpointFolder(tmp_path)
    found = folder.save(10, write)
    assert found is not None
    assert damage_of(found) is None
    for name, content in {"mine.json": "{}", "deeper/manifest.json": "[]"}.items():
        (found / name).chmod(0o644)
        (found / name).write_text("{ ")
        assert f"{name} has 2 bytes" in str(damage_of(found))
        (found / name).unlink()
        assert "is missing" in str(damage_of(found))
        (found / name).write_text(content)
        assert damage_of(found) is None
    folder.close()


@pytest.mark.parametrize("name", ["lock", "latest.partial"])
def test_links_of_strangers_are_not_written_through(name: str, tmp_path: Path) -> None:
    root, victim = tmp_path / "root", tmp_path / "victim"
    root.mkdir()
    victim.write_text("precious")
    (root / name).symlink_to(victim)
    with contextlib.suppress(CheckpointError):
        folder = CheckpointFolder(root)
        folder.save(10, lambda path: save(path, nn.Linear(2, 2)))
        assert not (root / "latest").is_symlink()
        folder.close()
    assert victim.read_text() == "precious"


def test_links_in_a_checkpoint_are_not_written_through(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "checkpoint"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "index.json.partial").symlink_to(victim)
    save(folder, nn.Linear(2, 2))
    assert victim.read_text() == "precious"
    load(folder, nn.Linear(2, 2))


def test_somebody_elses_index_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match=r"index\.json .*another program"):
        save(tmp_path, nn.Linear(2, 2))
    assert (tmp_path / "index.json").read_text() == '{"mine": 1}'


def test_a_lock_stays_with_the_process_that_took_it(tmp_path: Path) -> None:
    script = f"""
import os, sys, time
from dist_adamw import CheckpointFolder
folder = CheckpointFolder({str(tmp_path)!r})
if os.fork() == 0:
    sys.exit()  # with finalizers
os.wait()
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print("ready", flush=True)
time.sleep(30)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            with pytest.raises(CheckpointError, match="another job saves to"):
                CheckpointFolder(tmp_path, patience=0.2)
            holder.kill()  # its child lives on
            holder.wait()
            CheckpointFolder(tmp_path, patience=5).close()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_disk_that_takes_a_part_of_a_block_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    class Short:
        """Write as to a disk that is almost full."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            return self.file.write(memoryview(data)[: max(1, len(data) // 2)])

        def fileno(self) -> int:
            return self.file.fileno()

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def open_short(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(path, mode, *args, **kwargs)
        return Short(file) if mode == "xb" else file

    model = nn.Linear(50, 50)
    monkeypatch.setattr(Path, "open", open_short)
    save(tmp_path, model)
    assert damage(tmp_path) is None


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    found = [folder.save(n, lambda path: save(path, nn.Linear(2, 2))) for n in (10, 20)]
    assert found[1] is not None
    (found[1] / "manifest.json").write_text("{")
    assert folder.newest() == found[0]
    folder.save(30, lambda path: save(path, nn.Linear(2, 2)))
    assert [path.name for path in folder.all() if damage_of(path) is None] == ["sample-000000010", "sample-000000030"]
    folder.close()


def test_nothing_deletes_what_was_superseded(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=5)
    for samples in (10, 30, 20, 30, 20):
        folder.save(samples, lambda path: save(path, nn.Linear(2, 2)))
    names = ["sample-000000010", "sample-000000020", "sample-000000030.superseded", "sample-000000030.superseded-2"]
    assert sorted(path.name for path in tmp_path.glob("sample-*")) == names
    folder.discard()
    assert not (tmp_path / "latest").exists()
    with pytest.raises(CheckpointError, match=r"samples .*whole number.* -1"):
        folder.save(-1, lambda path: save(path, nn.Linear(2, 2)))
    (tmp_path / "somebody.partial").mkdir()
    folder.save(40, lambda path: save(path, nn.Linear(2, 2)))
    assert (tmp_path / "somebody.partial").is_dir()
    folder.close()


def test_a_loop_of_links_is_damage(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    found = [folder.save(n, lambda path: save(path, nn.Linear(2, 2))) for n in (10, 20)]
    assert found[1] is not None
    (found[1] / "index.json").unlink()
    (found[1] / "manifest.json").write_text('{"loop/": {}}')
    (found[1] / "loop").symlink_to("loop")
    assert folder.newest() == found[0]
    folder.close()


def newest_while_saving(root: str) -> list[bool]:
    job, folder, saver = Job(200), CheckpointFolder(root, keep=1), AsyncSaver()
    found = []
    for n in range(1, 25):
        folder.async_save(saver, n, *job.all)
        found.append(folder.newest() is not None)
    folder.close()
    saver.close()
    return found


def test_newest_waits_for_a_save_that_is_under_way(tmp_path: Path) -> None:
    assert all(map(all, run_ranks(2, newest_while_saving, str(tmp_path))))


def elsewhere(root: str) -> None:
    saver, here = AsyncSaver(), os.getcwd()
    os.chdir(root)
    try:
        with_a_relative_path = CheckpointFolder("runs")
        saving = saver.save("beside", nn.Linear(2000, 500))
        (Path(root) / "other").mkdir()
        os.chdir("other")
        saving.wait()
        with_a_relative_path.save(10, lambda path: save(path, nn.Linear(2, 2)))
    finally:
        os.chdir(here)
        with_a_relative_path.close()
        saver.close()
    assert damage(Path(root) / "beside") is None
    assert sorted(path.name for path in Path(root, "runs").iterdir()) == ["latest", "lock", "sample-000000010"]


def test_relative_paths_stay_where_they_were(tmp_path: Path) -> None:
    run_ranks(1, elsewhere, str(tmp_path))
