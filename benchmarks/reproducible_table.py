"""Hashes of the weights after every update of the main job, on any number of ranks and every engine.

    python -m benchmarks.reproducible_table --out r.jsonl --markdown r.md

The job is `launch/train.py` with configs/train/reproducible.yaml: a GPT with dropout, clipping, three cycles and 24
micro-batches an update, in fp32, and with bf16 weights and fp32 masters. It runs

    through ``prepare``   in one process, under DDP, as a plain module and under FSDP2, on 1, 2, 3, 4, 6 and 8 ranks
    with `join_backward`  on 5 and 7 ranks, which do not divide 24, so that Accelerate cannot deal its batches: a loop
                          by hand, with the job's model, optimizer, schedule and micro-batches
    killed twice          and resumed each time on another engine and number of ranks
    without the option    and without dropout, so that only the order of sums is left to depend on the ranks

Hashes of the first three must be those of one process, after every update; those of the last must differ. The exit
status is 1 if not, or if a run fails. Ranks are forked and share the cores; Accelerate is made to take FSDP2 on a CPU
as the tests make it. ``--only`` runs some of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

import dist_adamw
from benchmarks import markdown, records
from benchmarks.ranks import ROOT
from tests.distributed.engines import fsdp2_on_a_cpu, prepare_plain

sys.path.insert(0, str(ROOT / "launch"))

import train
from gpt import GPT, next_byte_losses
from options import Config, parse
from recipe import Recipe
from run import Checkpoints

MICRO_BATCHES = 24
RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
DTYPES = ("fp32", "bf16")
ENGINES = ("DDP", "plain", "FSDP2")
JOIN, KILLED, OFF = "plain, join_backward", "killed", "DDP, without the option"
LIVES = (("DDP", 3), ("FSDP2", 2), ("plain", 4))
# Six updates an epoch, on a text that does not depend on the version of Python.
TEXT = ("--data", str(ROOT / "tests/golden/08_lua_adamwr_authors.csv"), "--text.max_bytes", "5500")
# Updates. FSDP2's life has no end of a cycle in it: on a CPU it fails if weights are saved right after a validation.
SAVE_EVERY, DIES_AFTER = 2, (5, 7)
TIMEOUT = 300.0  # seconds, of a run
_context = multiprocessing.get_context("forkserver")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One way to run the job.

    Attributes:
        engine: One of `ENGINES`, or `JOIN`, `KILLED` or `OFF`; in one process all but FSDP2 mean the same.
        ranks: Their number, in the last life.
    """

    engine: str
    ranks: int
    dtype: str

    @property
    def reproducible(self) -> bool:
        return self.engine != OFF


def runs() -> list[Run]:
    """Return all runs; the first of each dtype is the one that others are compared with."""
    found = []
    for dtype in DTYPES:
        found.append(Run(engine="DDP", ranks=1, dtype=dtype))
        found.append(Run(engine="FSDP2", ranks=1, dtype=dtype))
        for ranks in RANKS[1:]:
            engines = ENGINES if MICRO_BATCHES % ranks == 0 else (JOIN,)
            found += [Run(engine=engine, ranks=ranks, dtype=dtype) for engine in engines]
        found.append(Run(engine=KILLED, ranks=LIVES[-1][1], dtype=dtype))
        found += [Run(engine=OFF, ranks=ranks, dtype=dtype) for ranks in RANKS if MICRO_BATCHES % ranks == 0]
    return found


# ---------------------------------------------------------------------------------------------- the job, on one rank


class Bf16Recipe(Recipe):
    """The recipe with bf16 weights, and fp32 masters in the optimizer's state."""

    __slots__ = ()

    def make_optimizer(self, model: nn.Module) -> dist_adamw.DistAdamW:
        """Return the optimizer of ``model``, which becomes bf16."""
        optimizer = super().make_optimizer(model.bfloat16())
        optimizer.master_dtype = torch.float32
        return optimizer


class RecordedJob(train.Job):
    """The main job, which appends a line per update: its number, and the hash of the weights.

    Args:
        digests: The file.
        batches: File for all micro-batches and the size of an epoch; None: they are not kept.
    """

    def __init__(self, config: Config, digests: Path, batches: Path | None) -> None:
        super().__init__(config)
        self._digests, self._batches = digests, batches
        self._seen: list[Tensor] = []

    def _micro_batch(self, windows: Tensor) -> None:
        self._seen.append(windows.clone())
        super()._micro_batch(windows)

    def _after_update(self) -> None:
        digest = train.digest_of(self.model)  # before a checkpoint is written
        _append(self._digests, self.progress.updates + 1, digest)
        super()._after_update()

    def finish(self) -> None:
        """Write the micro-batches, and draw nothing."""
        if self._batches is not None:
            torch.save({"windows": self._seen, "epoch_size": len(self.text.training)}, self._batches)
        self.checkpoints.folder.close()


def _append(path: Path, update: int, digest: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with path.open("a") as file:
            file.write(json.dumps([update, digest]) + "\n")


def configuration(run: Run, out: Path) -> Config:
    """Return the options of a run."""
    options = ["--config", str(ROOT / "configs/train/reproducible.yaml"), "--out", str(out), "--resume", "auto"]
    options += ["--run.overwrite", "false", "--run.validate_every", "0", *TEXT]
    if run.engine == KILLED:
        options += ["--run.save_every", str(SAVE_EVERY * MICRO_BATCHES)]
    if not run.reproducible:
        options += ["--recipe.reproducible", "false", "--model.dropout", "0"]
    config = parse(options)
    if run.dtype == "bf16":
        fields = {field.name: getattr(config.recipe, field.name) for field in dataclasses.fields(Recipe)}
        config = dataclasses.replace(config, recipe=Bf16Recipe(**fields))
    return config


def through_prepare(config: Config, engine: str, digests: Path, batches: Path | None) -> None:
    """Run the main job."""
    with contextlib.ExitStack() as stack:
        if engine == "FSDP2":
            stack.enter_context(fsdp2_on_a_cpu())
            wrap = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
            os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", **wrap)
        elif engine == "plain":
            stack.enter_context(mock.patch.object(dist_adamw, "prepare", prepare_plain))
        if config.run.save_every == 0:  # it would save at the end of each cycle
            stack.enter_context(mock.patch.object(Checkpoints, "save", lambda _, progress: progress.samples))
        job = RecordedJob(config, digests, batches)
        job.train()
        job.finish()


def by_hand(config: Config, engine: str, digests: Path, batches: Path | None) -> None:
    """Train on the micro-batches of the main job, on a number of ranks that need not divide an update's."""
    assert batches is not None
    kept = torch.load(batches, weights_only=True)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    set_seed(config.run.seed)
    model = GPT(config.model)
    optimizer = config.recipe.make_optimizer(model)
    scheduler = config.recipe.make_scheduler(optimizer)
    scheduler.batch_size, scheduler.epoch_size = MICRO_BATCHES, kept["epoch_size"]
    optimizer.attach(model)
    for update in range(len(kept["windows"]) // MICRO_BATCHES):
        for first in range(0, MICRO_BATCHES, ranks):
            if first + rank < MICRO_BATCHES:
                windows = kept["windows"][update * MICRO_BATCHES + first + rank]
                next_byte_losses(model, windows).mean().backward()
            else:
                optimizer.join_backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        _append(digests, update + 1, train.digest_of(model))


def _rank(rank: int, run: Run, engine: str, ranks: int, rendezvous: str, folder: Path, batches: Path) -> None:
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    one_process = ranks == 1 and engine != "FSDP2"
    if not one_process:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    job = by_hand if engine == JOIN else through_prepare
    keeps = engine == JOIN or (one_process and run.reproducible)
    engine = "DDP" if engine == OFF else engine
    job(configuration(run, folder / "out"), engine, folder / "digests", batches if keeps else None)


# ---------------------------------------------------------------------------------------------- who starts them


def measure(run: Run, folder: Path, batches: Path) -> records.Record:
    """Run the job; return its record.

    Raises:
        RuntimeError: a rank failed, or the job did not end in time.
    """
    folder.mkdir()
    began = time.monotonic()
    lives: Sequence[tuple[str, int]] = LIVES if run.engine == KILLED else [(run.engine, run.ranks)]
    rows: list[tuple[int, str]] = []
    resumes: list[str] = []
    for number, (engine, ranks) in enumerate(lives):
        (folder / "digests").unlink(missing_ok=True)
        is_last = number == len(lives) - 1
        _one_life(run, engine, ranks, folder, batches, dies_at=None if is_last else DIES_AFTER[number])
        found = [json.loads(line) for line in (folder / "digests").read_text().splitlines()]
        if number:
            resumes.append(f"after update {found[0][0] - 1} on {ranks} ranks ({engine})")
            if found[0][0] == 1:
                raise RuntimeError(f"{run} began at the beginning, and should have resumed")
        rows += found
    return {
        "kind": "reproducible_table",
        **dataclasses.asdict(run),
        "reproducible": run.reproducible,
        "resumes": resumes,
        "seconds": time.monotonic() - began,
        "digests": rows,
    }


def _one_life(run: Run, engine: str, ranks: int, folder: Path, batches: Path, dies_at: int | None) -> None:
    """Run the job to its end, or until an update; then kill all of its ranks."""
    rendezvous = tempfile.mktemp(dir=folder)
    args = (run, engine, ranks, rendezvous, folder, batches)
    started = [_context.Process(target=_rank, args=(rank, *args), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    try:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and all(process.exitcode in (None, 0) for process in started):
            if dies_at is not None and _reached(folder / "digests") >= dies_at:
                return
            if dies_at is None and all(process.exitcode == 0 for process in started):
                return
            time.sleep(0.02)
        ended = [process.exitcode for process in started]
        text = (folder / f"log{next((rank for rank, code in enumerate(ended) if code), 0)}").read_text(errors="replace")
        raise RuntimeError(f"{run} failed, or did not end in {TIMEOUT:g} s; its ranks' exit codes are {ended}:\n{text}")
    finally:
        for process in started:
            process.kill()
            process.join()


def _reached(digests: Path) -> int:
    lines = digests.read_text().splitlines() if digests.exists() else []
    return json.loads(lines[-1])[0] if lines else 0


# ---------------------------------------------------------------------------------------------- what they say


def problems_of(found: Sequence[records.Record]) -> list[str]:
    """Return what is wrong with the hashes."""
    problems = []
    for dtype in {record["dtype"]: None for record in found}:
        expected = dict(_first(found, dtype)["digests"])
        last: dict[str, int] = {}
        for record in (record for record in found if record["dtype"] == dtype):
            name = f"{record['engine']}, {record['ranks']} ranks, {dtype}"
            if record["reproducible"]:
                wrong = [update for update, digest in record["digests"] if digest != expected.get(update)]
                if wrong:
                    problems.append(f"{name}: another hash than in one process, first after update {wrong[0]}")
                if missing := expected.keys() - dict(record["digests"]).keys():
                    problems.append(f"{name}: no hash of update {min(missing)}")
            else:
                same = last.setdefault(record["digests"][-1][1], record["ranks"])
                if same != record["ranks"]:
                    problems.append(f"{name}: the hash of {same} ranks, without the option")
    return problems


def _first(found: Sequence[records.Record], dtype: str) -> records.Record:
    return next(record for record in found if record["dtype"] == dtype)


def report(environment: records.Record, found: Sequence[records.Record]) -> str:
    """Return the tables in Markdown."""
    versions = environment["versions"]
    lines = [
        "# The same bits on any number of ranks",
        "",
        f"{environment['cpu']}, {environment['cores']} cores, torch {versions['torch']}, accelerate "
        f"{versions['accelerate']}, Python {versions['python']}, {environment['simd']}, "
        f"commit {environment['commit']}, {environment['time'][:10]}. Configuration: configs/train/reproducible.yaml "
        "with a shorter text.",
        "",
        "    python -m benchmarks.reproducible_table --out r.jsonl --markdown r.md",
        "",
        "In a cell: how many updates have the hash that they have in one process.",
    ]
    for dtype in {record["dtype"]: None for record in found}:
        reference = _first(found, dtype)
        expected = dict(reference["digests"])
        head = [f"{dtype}, ranks", *map(str, RANKS)]
        cells: dict[str, dict[int, str]] = {}
        for record in (record for record in found if record["dtype"] == dtype and record["engine"] != KILLED):
            digests = dict(record["digests"])
            same = sum(digests[update] == digest for update, digest in expected.items())
            text = f"{same} of {len(expected)}" if record["reproducible"] else digests[max(digests)][:8]
            cells.setdefault(record["engine"], {})[record["ranks"]] = text
        named = {"DDP": "DDP (1: one process)", OFF: f"{OFF}: hash"}
        rows = [[named.get(name, name), *(row.get(n, "") for n in RANKS)] for name, row in cells.items()]
        what = "bf16 weights, fp32 masters" if dtype == "bf16" else "fp32"
        lines += ["", f"**{what}**; sha256 after update {len(expected)}: `{max(reference['digests'])[1]}`", ""]
        lines += markdown.table(head, rows)
        for record in found:
            if record["dtype"] == dtype and record["engine"] == KILLED:
                same = sum(digest == expected[update] for update, digest in record["digests"])
                lines += ["", f"Begun on {LIVES[0][1]} ranks ({LIVES[0][0]}), killed twice, resumed"]
                lines += [" and ".join(record["resumes"]) + ":"]
                lines += [f"{same} of {len(record['digests'])} hashes, repeated updates included."]
    return "\n".join([*lines, ""])


def main() -> int:
    """Run everything; return 1 if a hash is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("--only", help="engines to run besides one process, separated by semicolons; default: all")
    options = parser.parse_args()
    # Not this module, which multiprocessing imports again as the main one.
    _context.set_forkserver_preload(["accelerate", "accelerate.tracking", "jsonargparse", "tests.distributed.engines"])
    wanted: Callable[[Run], bool] = lambda run: options.only is None or run.engine in options.only.split(";")  # noqa: E731
    chosen = [run for run in runs() if wanted(run) or (run.engine, run.ranks) == ("DDP", 1)]
    environment = records.environment()
    records.append(options.out, [environment])
    found: list[records.Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, run in enumerate(bar := tqdm(chosen, unit=" runs")):
            bar.set_description(f"{run.engine}, {run.ranks} ranks, {run.dtype}")
            found.append(measure(run, Path(folder) / str(number), Path(folder) / f"batches-{run.dtype}"))
            records.append(options.out, found[-1:])
            for problem in problems_of(found):
                tqdm.write(problem)
    text = report(environment, found)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text)
    problems = problems_of(found)
    print("\n".join(problems) or "Hashes that must agree do, and those that must differ do.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
