"""Kill a job repeatedly, at any instant, and check that it loses nothing.

    python -m tests.kills --kills 1000          # any number, from any --seed on

Ranks are forked and killed with SIGKILL, one of them or all, while they load, train, save, or save asynchronously.
After every kill the newest whole checkpoint must be at least the last one that was reported as saved; the next job, on
another engine and number of ranks, must continue from exactly there, with the lr, weight decay and losses of a run
that was never killed.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_adamw.checkpoint.manifest import damage_of
from tests.distributed.test_resume import BATCH

_context = multiprocessing.get_context("forkserver")
STARTING, LOADING, TRAINING, SAVING, TRAINING_BESIDE, OVER = range(6)
PHASES = ["starting", "loading", "training", "saving", "training beside a save", "at the end"]
SAVE_EVERY, UPDATES = 3, 150
GIVE_UP = 60.0  # seconds


@dataclass
class Tally:
    """The results."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    resumes: int = 0
    updates: int = 0
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- a life of one rank


def _live(rank: int, world_size: int, rendezvous: str, engine: str, beside: bool, root: str, board: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    # What ranks say when another one is killed is no news.
    os.dup2(os.open(os.environ.get("KILLS_STDERR", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader

    from dist_adamw import AsyncSaver, CheckpointFolder, CyclicLRWithRestarts, DistAdamW, load, position, prepare, save
    from tests.distributed import test_resume
    from tests.distributed.engines import accelerator_on

    torch.set_num_threads(1)
    with open(board, "r+b") as file:
        phase = mmap.mmap(file.fileno(), 0)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    report = os.open(f"{root}.report", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(*what: Any) -> None:
        if rank == 0:
            os.write(report, (json.dumps(what) + "\n").encode())

    with accelerator_on(engine) as accelerator:
        model = test_resume.network()
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.1)
        scheduler = CyclicLRWithRestarts(optimizer, **test_resume.RECIPE)
        micro_batch = test_resume.BATCH // accelerator.num_processes
        loader = DataLoader(test_resume.data(), micro_batch, shuffle=True, generator=torch.Generator().manual_seed(11))
        model, wrapped, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        phase[rank] = LOADING
        folder, saver, saved = CheckpointFolder(root, keep=2), AsyncSaver(), 0
        path = folder.newest()
        if path is not None:
            loaded = load(path, model, wrapped, scheduler)
            position(loader).load_state_dict(loaded.extra["position"])
        say("begins", scheduler.samples)
        phase[rank] = TRAINING
        for i, row in enumerate(test_resume.updates(accelerator, model, wrapped, loader, scheduler), 1):
            say("update", *row)
            if scheduler.samples >= UPDATES * test_resume.BATCH:
                break
            if i % SAVE_EVERY:
                continue
            extra = {"position": position(loader).state_dict()}
            phase[rank] = SAVING
            if beside:
                saver.wait()  # for the one before
                say("saved", saved)
                saved = scheduler.samples
                folder.async_save(saver, saved, model, wrapped, scheduler, extra=extra)
                phase[rank] = TRAINING_BESIDE
            else:
                for _ in range(1 + scheduler.samples // BATCH % 2):  # now and then a checkpoint is replaced
                    folder.save(
                        scheduler.samples,
                        partial(save, model=model, optimizer=wrapped, scheduler=scheduler, extra=extra),
                    )
                say("saved", scheduler.samples)
                phase[rank] = TRAINING
        saver.wait()
        phase[rank] = OVER
        dist.barrier()


# ---------------------------------------------------------------------------------------------- who kills


def kill_often(kills: int, seed: int, engines: list[str], show: bool = True) -> Tally:
    """Run ``kills`` lives, and check after each what is left."""
    _context.set_forkserver_preload(["torch", "accelerate", "deepspeed", "dist_adamw", "tests.distributed.test_resume"])
    dice, tally = random.Random(seed), Tally()
    expected = _never_killed()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkpoints"
        saved = 0
        for number in tqdm(range(kills), disable=not show, unit=" kills"):
            reports = Path(f"{root}.report")
            reports.unlink(missing_ok=True)
            engine = dice.choice(engines)
            world_size = 1 if engine == "single" else dice.randint(1, 4)
            phase = _one_life(dice, number, engine, world_size, root)
            tally.kills[PHASES[phase]] += 1
            where = f"kill {number} (seed {seed}; {engine}, {world_size} ranks, {PHASES[phase]})"
            try:
                lines = [json.loads(line) for line in reports.read_text().splitlines()] if reports.exists() else []
                saved = _check(lines, saved, root, expected, tally)
            except AssertionError as problem:
                tally.problems.append(f"{where}: {problem}")
                if len(tally.problems) > 5:
                    break
                saved = 0
                shutil.rmtree(root, ignore_errors=True)
            if saved >= (UPDATES - SAVE_EVERY) * BATCH or phase == OVER:
                saved = 0
                shutil.rmtree(root)  # the run is at its end: begin anew
    return tally


def _one_life(dice: random.Random, number: int, engine: str, world_size: int, root: Path) -> int:
    """Start a job, and kill it at some instant of the phase that the dice say. Returns the phase that it was in."""
    root.parent.mkdir(exist_ok=True)
    board_file, rendezvous = f"{root}.board", f"{root}.rendezvous.{number}"
    Path(board_file).write_bytes(bytes(8))
    with open(board_file, "r+b") as file:
        board = mmap.mmap(file.fileno(), 0)
    wanted = dice.choices(range(5), [1, 3, 3, 6, 3])[0]
    beside = wanted == TRAINING_BESIDE or (wanted == SAVING and dice.random() < 0.3)
    args = (world_size, rendezvous, engine, beside, str(root), board_file)
    ranks = [_context.Process(target=_live, args=(rank, *args), daemon=True) for rank in range(world_size)]
    for process in ranks:
        process.start()
    victim = dice.randrange(world_size)
    skip = dice.randint(0, 3) if wanted >= TRAINING else 0  # of several saves, any
    deadline = time.monotonic() + GIVE_UP
    seen = before = 0
    while time.monotonic() < deadline and all(process.is_alive() for process in ranks) and board[victim] != OVER:
        now = board[victim]
        if wanted == LOADING < now:
            break  # it did not take long
        if now == wanted != before:
            seen += 1
            if seen > skip:
                break
        before = now
        time.sleep(0.0002)
    # From half a millisecond, where the phase begins, to what the longest takes.
    time.sleep(dice.choice([0.0, 0.0005, 0.002, 0.01, 0.03]) * dice.random())
    died = [process.exitcode for process in ranks if process.exitcode is not None]
    everybody = dice.random() < 0.3
    for process in ranks if everybody else [ranks[victim]]:
        process.kill()
    ranks[victim].join()
    phase = board[victim]
    if not everybody:  # the others notice, or are killed as a launcher would
        time.sleep(0.05 * dice.random())
    for process in ranks:
        process.kill()
        process.join()
    if died and phase != OVER:
        raise RuntimeError(f"a rank ended by itself: {died}; see what it says without the redirection in _live")
    return phase


def _check(lines: list[list[Any]], saved: int, root: Path, expected: dict[int, list[Any]], tally: Tally) -> int:
    """Compare what a life said with the run that was never killed; return what must not be lost from now on."""
    for what, *told in lines:
        if what == "begins":
            assert told[0] >= saved, f"went on from sample {told[0]}, and {saved} had been saved"
            tally.resumes += told[0] > 0
        elif what == "saved":
            saved = max(saved, told[0])
        else:
            samples, *values, loss, seen = told
            *right, right_loss, right_seen = expected[samples]
            assert values == right, f"lr and weight decay of sample {samples} are {values}, should be {right}"
            assert seen == right_seen, f"the update at sample {samples} saw samples {seen}, should see {right_seen}"
            difference = abs(loss - right_loss) / right_loss
            assert difference < 1e-5, f"the loss at sample {samples} is {loss}, should be {right_loss}"
            tally.worst, tally.updates = max(tally.worst, difference), tally.updates + 1
    for before in root.glob("*.replaced"):  # the next job puts it back
        if not (final := before.with_suffix("")).exists():
            before.rename(final)
    whole = [path for path in root.glob("sample-*") if path.name[7:].isdecimal() and damage_of(path) is None]
    newest = max((int(path.name[7:]) for path in whole), default=0)
    assert newest >= saved, f"the newest whole checkpoint is of sample {newest}, and {saved} had been saved"
    torn = [path for path in root.glob("sample-*") if path.name[7:].isdecimal() and path not in whole]
    assert not torn, f"a checkpoint under its final name is not whole: {torn[0]}: {damage_of(torn[0])}"
    return newest


def _never_killed() -> dict[int, list[Any]]:
    from tests.distributed import test_resume
    from tests.ranks import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        rows = run_ranks(1, test_resume.train, "single", 0, UPDATES + 1, folder, None, {})[0]
    return {row[0]: json.loads(json.dumps(row[1:])) for row in rows}


def main() -> None:
    """Kill, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    # DeepSpeed takes seconds to start, so it has one life in ten.
    parser.add_argument("--engines", default="single,DDP,DDP,DDP,DDP,FSDP2,FSDP2,FSDP2,ZeRO-1,ZeRO-3")
    options = parser.parse_args()
    tally = kill_often(options.kills, options.seed, options.engines.split(","))
    print(f"{sum(tally.kills.values())} kills: " + ", ".join(f"{n} while {phase}" for phase, n in tally.kills.items()))
    print(f"{tally.resumes} resumes, {tally.updates} updates, losses within {tally.worst:.1e} of the run never killed")
    print("\n".join(tally.problems) or "nothing lost, every resume exact")
    if tally.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
