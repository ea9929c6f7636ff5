"""Everything worth knowing from one machine with a GPU, the most informative first, within 20 minutes.

``python -m benchmarks.gpu_session --out results/session`` needs torch (2.11 or later), pytest and Triton, and one GPU.
Each part is a process with a time limit, so that a crash ends only that part. Results are appended to results.jsonl,
and session.md is rewritten after each part. `gpu_parts` says how
each part measures.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts, records
from benchmarks.gpu_parts import Session
from benchmarks.ranks import ROOT

# Most informative first, with the most seconds that each may take.
PARTS: dict[str, tuple[Callable[[Session], None], float]] = {
    "tests": (gpu_parts.tests, 240),
    "steps": (gpu_parts.steps, 300),
    "clip": (gpu_parts.clip, 120),
    "train": (gpu_parts.train, 120),
    "profile": (gpu_parts.profile, 120),
    "ranks": (gpu_parts.ranks, 300),
}


def environment(session: Session) -> dict[str, Any]:
    """Return the machine, with the GPU's driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.memory", "--format=csv,noheader"]
    try:
        cards = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        cards = []
    return {**records.environment(), "device": session.device.type, "cards": cards, "cuda": torch.version.cuda}


def conduct(session: Session, parts: list[str], minutes: float) -> None:
    """Run each part in a separate process."""
    end = time.monotonic() + 60 * minutes
    records.append(session.results, [environment(session)])
    for part in parts:
        limit = min(PARTS[part][1], end - time.monotonic())
        if limit <= 0:
            session.record("part", part=part, rc="no time left", seconds=0.0)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_session", *session.arguments(), "--part", part]
        began = time.monotonic()
        log = (session.results.parent / f"{part}.log").open("w")
        with log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                rc: Any = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                rc = f"ended after {limit:.0f} s"
        session.record("part", part=part, rc=rc, seconds=round(time.monotonic() - began, 1))
        write_markdown(session)


def write_markdown(session: Session) -> None:
    """Write all results so far as tables."""
    found = records.read([session.results])
    machine = next(r for r in found if r["kind"] == "environment")
    lines = [f"# {', '.join(machine['cards']) or machine['cpu']}", ""]
    lines += [
        f"torch {machine['versions']['torch']}, CUDA {machine['cuda']}, {machine['time']}, {machine['commit']}",
        "",
    ]
    for kind in dict.fromkeys(r["kind"] for r in found if r["kind"] != "environment"):
        rows = [{k: v for k, v in r.items() if k not in ("kind", "run", "commit")} for r in found if r["kind"] == kind]
        names = list(dict.fromkeys(name for row in rows for name in row if name != "tail"))
        lines += [f"## {kind}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in names)} |" for row in rows] + [""]
        lines += [f"```\n{row['tail']}\n```\n" for row in rows if "tail" in row]
    (session.results.parent / "session.md").write_text("\n".join(lines))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of this script."""
    parser = argparse.ArgumentParser(description="Everything worth knowing from one machine with a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and few rounds: does every part run?")
    parser.add_argument("--dry-run", action="store_true", help="the same as --device cpu --small")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=(*PARTS, "rank"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    if options.dry_run:
        options.device, options.small = "cpu", True
    return options


def main(argv: list[str] | None = None) -> None:
    """Conduct a session, or run one part of it."""
    options = parse(argv)
    session = Session(options)
    if options.part is None:
        options.out.mkdir(parents=True, exist_ok=True)
        conduct(session, options.only, options.minutes)
    else:
        (gpu_parts.rank if options.part == "rank" else PARTS[options.part][0])(session)


if __name__ == "__main__":
    main()
