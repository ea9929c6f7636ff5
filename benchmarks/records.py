"""Write and read results as JSON lines, with the environment in which they were measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import ROOT

Record = dict[str, Any]
PACKAGES = ("torch", "accelerate", "deepspeed", "fairscale", "numpy")


def append(path: Path, records: Sequence[Record]) -> None:
    """Add ``records`` to a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read(paths: Sequence[Path]) -> list[Record]:
    """Return the records of ``paths``, each with the run and commit of the environment record before it.

    A last line that was cut off is left out.
    """
    found: list[Record] = []
    for path in paths:
        run = {"run": str(path), "commit": "unknown"}
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                if record["kind"] == "environment":
                    run = {"run": record["time"], "commit": record["commit"]}
                found.append({**record, **run})
    return found


def environment() -> Record:
    """Return hardware, versions, commit and time."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "kind": "environment",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "commit": _commit(),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit, and whether the package differs from it."""
    try:
        sha = _git("rev-parse", "--short=12", "HEAD")
        return sha + (" with changes in dist_adamw/" if _git("status", "--porcelain", "dist_adamw") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    command = ["git", "--no-optional-locks", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
