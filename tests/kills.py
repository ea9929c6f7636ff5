"""Kill a job repeatedly, at any instant, and check that it loses nothing.

    python -m tests.kills --kills 1000                  # any number, from any --seed on
    python -m tests.kills --kills 200 --reproducible    # and the weights have the bits of the run never killed

Ranks are forked and killed with SIGKILL, one of them or all, while they load, train, save, or save asynchronously.
After every kill the newest whole checkpoint must be at least the last one that was reported as saved; the next job, on
another engine and number of ranks, must continue from exactly there, with the lr, weight decay and losses of a run
that was never killed. With --reproducible so must the bits of the weights, after every load and every update, with
12 micro-batches an update, dropout and clipping; --same-bits compares them without the option, and finds differences.
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

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dist_adamw import AsyncSaver, CheckpointFolder, CyclicLRWithRestarts, DistAdamW, load, position, prepare, save
from dist_adamw.checkpoint.manifest import damage_of
from tests.distributed import test_resume
from tests.distributed.engines import accelerator_on, prepare_plain
from tests.distributed.test_reproducible import digest
from tests.distributed.test_resume import BATCH
from tests.ranks import run_ranks

_context = multiprocessing.get_context("forkserver")
NOWHERE, STARTING, LOADING, TRAINING, SAVING, TRAINING_BESIDE, OVER = range(-1, 6)
PHASES = ["starting", "loading", "training", "saving", "training beside a save", "at the end"]
SAVE_EVERY = 3  # updates
GIVE_UP = 60.0  # seconds
ENGINES = "single,DDP,DDP,DDP,DDP,FSDP2,FSDP2,FSDP2,ZeRO-1,ZeRO-3"  # DeepSpeed takes seconds to start: one in ten
REPRODUCIBLE_ENGINES = "single,plain,DDP,FSDP2"


@dataclass(frozen=True, slots=True)
class Mode:
    """What is trained, and compared.

    Attributes:
        reproducible: `DistAdamW`'s option, with dropout and clipping.
        same_bits: Whether weights must have the bits of the run never killed. An update then has 12 micro-batches.
    """

    reproducible: bool = False
    same_bits: bool = False

    @property
    def updates(self) -> int:
        """How many updates the run has: with 12 micro-batches each, fewer."""
        return 40 if self.same_bits else 150


@dataclass(frozen=True, slots=True)
class NeverKilled:
    """The run that is never killed.

    Attributes:
        rows: Of each update, by the samples before it.
        weights: A digest of the weights, by samples.
    """

    rows: dict[int, list[Any]]
    weights: dict[int, str]


@dataclass
class Tally:
    """The results."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    resumes: int = 0
    updates: int = 0
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- a life of one rank


def _objects(accelerator: Any, engine: str, mode: Mode) -> tuple[Any, Any, Any, Any]:
    """Return model, optimizer, loader and scheduler, prepared."""
    model: Any = test_resume.network()
    options: dict[str, Any] = {}
    if mode.reproducible:
        model.insert(2, nn.Dropout(0.1))
        options = {"reproducible": True, "max_grad_norm": 0.5}
    optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.1, **options)
    scheduler = CyclicLRWithRestarts(optimizer, **test_resume.RECIPE)
    micro_batch = 1 if mode.same_bits else BATCH // accelerator.num_processes
    order = torch.Generator().manual_seed(11)
    loader = DataLoader(test_resume.data(), micro_batch, shuffle=True, generator=order)
    return (prepare_plain if engine == "plain" else prepare)(accelerator, model, optimizer, loader, scheduler)


def _accumulation(mode: Mode, ranks: int) -> int:
    return BATCH // ranks if mode.same_bits else 1


def _live(
    rank: int, world_size: int, rendezvous: str, engine: str, mode: Mode, beside: bool, root: str, board: str
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    # What ranks say when another one is killed is no news.
    os.dup2(os.open(os.environ.get("KILLS_STDERR", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    torch.set_num_threads(1)
    with open(board, "r+b") as file:
        phase = mmap.mmap(file.fileno(), 0)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    report = os.open(f"{root}.report", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(*what: Any) -> None:
        if rank == 0:
            os.write(report, (json.dumps(what) + "\n").encode())

    with accelerator_on("DDP" if engine == "plain" else engine, _accumulation(mode, world_size)) as accelerator:
        model, wrapped, loader, scheduler = _objects(accelerator, engine, mode)

        def weights() -> str | None:
            return digest(model) if mode.same_bits else None

        phase[rank] = LOADING
        folder, saver, saved = CheckpointFolder(root, keep=2), AsyncSaver(), 0
        path = folder.newest()
        if path is not None:
            loaded = load(path, model, wrapped, scheduler)
            position(loader).load_state_dict(loaded.extra["position"])
        say("begins", scheduler.samples, weights())
        phase[rank] = TRAINING
        for i, row in enumerate(test_resume.updates(accelerator, model, wrapped, loader, scheduler), 1):
            say("update", weights(), *row)
            if scheduler.samples >= mode.updates * BATCH:
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


def kill_often(kills: int, seed: int, engines: list[str], mode: Mode = Mode(), show: bool = True) -> Tally:
    """Run ``kills`` lives, and check after each what is left."""
    _context.set_forkserver_preload(["torch", "accelerate", "deepspeed", "dist_adamw", "tests.kills"])
    dice, tally = random.Random(seed), Tally()
    expected = run_ranks(1, _never_killed, mode)[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkpoints"
        saved = 0
        for number in tqdm(range(kills), disable=not show, unit=" kills"):
            reports = Path(f"{root}.report")
            reports.unlink(missing_ok=True)
            engine = dice.choice(engines)
            world_size = 1 if engine == "single" else dice.randint(1, 4)
            phase = _one_life(dice, number, engine, world_size, mode, root)
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
            if saved >= (mode.updates - SAVE_EVERY) * BATCH or phase == OVER:
                saved = 0
                shutil.rmtree(root, ignore_errors=True)  # the run is at its end: begin another
    return tally


def _one_life(dice: random.Random, number: int, engine: str, world_size: int, mode: Mode, root: Path) -> int:
    """Start a job, and kill it at some instant of the phase that the dice say. Returns the phase that it was in."""
    root.parent.mkdir(exist_ok=True)
    board_file, rendezvous = f"{root}.board", f"{root}.rendezvous.{number}"
    Path(board_file).write_bytes(bytes(8))
    with open(board_file, "r+b") as file:
        board = mmap.mmap(file.fileno(), 0)
    wanted = dice.choices(range(6), [1, 3, 3, 6, 3, 1])[0]
    beside = wanted == TRAINING_BESIDE or (wanted == SAVING and dice.random() < 0.3)
    args = (world_size, rendezvous, engine, mode, beside, str(root), board_file)
    ranks = [_context.Process(target=_live, args=(rank, *args), daemon=True) for rank in range(world_size)]
    for process in ranks:
        process.start()
    victim = dice.randrange(world_size)
    skip = dice.randint(0, 3) if TRAINING <= wanted < OVER else 0  # of several saves, any
    deadline = time.monotonic() + GIVE_UP
    seen, before = 0, NOWHERE
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
    # From half a millisecond, where the phase begins, to what the longest takes; a start takes longer.
    longest = 0.3 if wanted == STARTING else dice.choice([0.0, 0.0005, 0.002, 0.01, 0.03])
    time.sleep(longest * dice.random())
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


def _check(lines: list[list[Any]], saved: int, root: Path, expected: NeverKilled, tally: Tally) -> int:
    """Compare what a life said with the run that was never killed; return what must not be lost from now on."""
    for what, *told in lines:
        if what == "begins":
            samples, weights = told
            assert samples >= saved, f"went on from sample {samples}, and {saved} had been saved"
            _check_weights(samples, weights, expected)
            tally.resumes += samples > 0
        elif what == "saved":
            saved = max(saved, told[0])
        else:
            weights, samples, *values, loss, seen = told
            *right, right_loss, right_seen = expected.rows[samples]
            assert values == right, f"lr and weight decay of sample {samples} are {values}, should be {right}"
            assert seen == right_seen, f"the update at sample {samples} saw samples {seen}, should see {right_seen}"
            difference = abs(loss - right_loss) / right_loss
            assert difference < 1e-5, f"the loss at sample {samples} is {loss}, should be {right_loss}"
            _check_weights(samples + BATCH, weights, expected)
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


def _check_weights(samples: int, weights: str | None, expected: NeverKilled) -> None:
    right = expected.weights[samples]
    assert weights in (None, right), f"the digest of the weights at sample {samples} is {weights}, should be {right}"


def _never_killed(mode: Mode) -> NeverKilled:
    with accelerator_on("single", _accumulation(mode, 1)) as accelerator:
        model, wrapped, loader, scheduler = _objects(accelerator, "single", mode)
        found = NeverKilled({}, {0: digest(model)})
        for samples, *row in test_resume.updates(accelerator, model, wrapped, loader, scheduler):
            found.rows[samples] = json.loads(json.dumps(row))
            found.weights[samples + BATCH] = digest(model)
            if len(found.rows) > mode.updates:
                return found
    raise AssertionError("the loop ended")


def main() -> None:
    """Kill, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", help=f"default: {ENGINES}, or with --reproducible {REPRODUCIBLE_ENGINES}")
    parser.add_argument("--reproducible", action="store_true", help="DistAdamW(reproducible=True)")
    parser.add_argument("--same-bits", action="store_true", help="compare weights; --reproducible does")
    options = parser.parse_args()
    mode = Mode(reproducible=options.reproducible, same_bits=options.reproducible or options.same_bits)
    engines = options.engines or (REPRODUCIBLE_ENGINES if mode.same_bits else ENGINES)
    tally = kill_often(options.kills, options.seed, engines.split(","), mode)
    print(f"{sum(tally.kills.values())} kills: " + ", ".join(f"{n} while {phase}" for phase, n in tally.kills.items()))
    print(f"{tally.resumes} resumes, {tally.updates} updates, losses within {tally.worst:.1e} of the run never killed")
    exact = "nothing lost, every resume exact" + ", with the same bits" * mode.same_bits
    print("\n".join(tally.problems) or exact)
    if tally.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
