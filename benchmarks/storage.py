"""Compare storage layers for torch.distributed.checkpoint: time, and memory besides the tensors.

python -m benchmarks.storage
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from tqdm import tqdm

from dist_adamw.checkpoint.storage.files import Reader, Writer

ROUNDS, TENSORS, NUMEL = 5, 300, 1 << 18
LAYERS: dict[str, tuple[Callable[[str], Any], Callable[[str], Any]]] = {
    "FileSystemWriter": (FileSystemWriter, FileSystemReader),
    "HuggingFaceStorageWriter": (
        lambda folder: HuggingFaceStorageWriter(folder, save_distributed=True),
        HuggingFaceStorageReader,
    ),
    "dist_adamw.storage": (Writer, Reader),
}


class Peak(threading.Thread):
    """A thread that samples the peak resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = self.before = self._now()
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Take samples until stopped."""
        while not self._over.wait(0.001):
            self.bytes = max(self.bytes, self._now())

    def stop(self) -> float:
        """Return the peak in MB above the start."""
        self._over.set()
        self.join()
        return (self.bytes - self.before) / 1e6

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured(action: Callable[[], object]) -> tuple[float, float]:
    """Return seconds, and MB above the start."""
    peak, begin = Peak(), time.perf_counter()
    action()
    return time.perf_counter() - begin, peak.stop()


def main() -> None:
    """Time the layers in turn, and print medians."""
    tensors = {f"t{i}": torch.randn(NUMEL) for i in range(TENSORS)}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in LAYERS}
    for name in tqdm([*LAYERS] * ROUNDS):
        writer, reader = LAYERS[name]
        with tempfile.TemporaryDirectory() as folder:
            out = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
            as_it_is = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
            planner, into = DefaultSavePlanner(**as_it_is), DefaultLoadPlanner(**as_it_is)
            saved = measured(partial(save, tensors, storage_writer=writer(folder), planner=planner, no_dist=True))
            loaded = measured(partial(load, out, storage_reader=reader(folder), planner=into, no_dist=True))
            assert all(torch.equal(out[key], tensors[key]) for key in tensors)
        found[name].append((*saved, *loaded))
    print(f"{TENSORS * NUMEL * 4 / 1e6:.0f} MB in {TENSORS} tensors, one process, medians of {ROUNDS} rounds")
    for name, rows in found.items():
        save_s, save_mb, load_s, load_mb = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:26} save {save_s:5.2f} s, {save_mb:4.0f} MB more; load {load_s:5.2f} s, {load_mb:4.0f} MB more")


if __name__ == "__main__":
    main()
