"""The text to train on: bytes cut into windows, with a held-out tail, and its entropy.

Every rank reads the text itself. The order of files is fixed, so all read the same.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

BYTES = 256
_CHUNK = 1 << 24
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """How much of the text is used, and how.

    Args:
        max_bytes: Bytes to read, from the beginning; null for all of them.
        held_out: Fraction at the end of the text that is never trained on.
        max_held_out_windows: Windows of it that a validation uses, evenly spaced.
    """

    max_bytes: int | None = 2_000_000
    held_out: float = 0.05
    max_held_out_windows: int = 256

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"text.max_bytes must be above 0 or null, got {self.max_bytes}.")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"text.held_out must lie between 0 and 1, got {self.held_out}.")
        if self.max_held_out_windows < 1:
            raise ValueError(f"text.max_held_out_windows must be above 0, got {self.max_held_out_windows}.")


class Windows(Dataset[Tensor]):
    """Windows of ``context + 1`` bytes; neighbours share one byte, so each byte is predicted once.

    Args:
        text: 1-D, uint8.
        context: Bytes of context.
        count: The number of windows.
        every: Distance between windows, in windows.
    """

    def __init__(self, text: Tensor, context: int, count: int, every: int = 1) -> None:
        self.text = text
        self.context = context
        self.count = count
        self.every = every

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.every * self.context
        return self.text[start : start + self.context + 1]


@dataclass(frozen=True, slots=True)
class Entropies:
    """Entropy in nats per byte, given nothing (unigram) or one byte (bigram) of the past."""

    unigram: float
    bigram: float


@dataclass(frozen=True, slots=True)
class Text:
    """A text, cut for training.

    Attributes:
        source: A description of its origin.
        size: Its length in bytes.
        digest: A checksum of the text.
        training: Windows to train on: a whole number of global batches.
        held_out: Windows from the end, never trained on.
        entropies: Entropies of the whole text.
    """

    source: str
    size: int
    digest: str
    training: Windows
    held_out: Windows
    entropies: Entropies


def load_text(path: str | None, config: TextConfig, *, context: int, global_batch: int) -> Text:
    """Read a text and cut it into windows.

    Training windows are a whole number of global batches, so that every number of ranks makes the
    same updates. Local; the same on every rank.

    Args:
        path: A file or a folder; None for the source of the running Python's standard library.
        config: How much of the text to use.
        context: Bytes of context.
        global_batch: Windows of one update.

    Raises:
        ValueError: there is no such text, or too little of it.
    """
    files, source = _find(path)
    data = _read(files, config.max_bytes)
    kept = math.ceil(len(data) * (1.0 - config.held_out))
    training = max(0, kept - 1) // context // global_batch * global_batch
    available = max(0, len(data) - kept - 1) // context
    held_out = min(available, config.max_held_out_windows)
    if not training or not held_out:
        wanted = math.ceil(max((global_batch * context + 1) / (1 - config.held_out), (context + 2) / config.held_out))
        raise ValueError(
            f"{source} is too small: {len(data):,} bytes are read, and one global batch of {global_batch} windows of "
            f"{context} bytes, plus a held-out fraction of {config.held_out:g} with at least one window, needs about "
            f"{wanted:,}. Pass more text (--data), raise text.max_bytes, or lower recipe.global_batch or model.context."
        )
    array = np.frombuffer(data, dtype=np.uint8)
    text = torch.frombuffer(data, dtype=torch.uint8)
    return Text(
        source=source,
        size=len(data),
        digest=hashlib.blake2b(data, digest_size=16).hexdigest(),
        training=Windows(text, context, training),
        held_out=Windows(text[kept:], context, held_out, every=available // held_out),
        entropies=entropies(array),
    )


def _find(path: str | None) -> tuple[list[Path], str]:
    """Return the files to read, in the same order on every machine, and a description of them."""
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in library.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(library).parts)]
        return sorted(files), f"the standard library of Python {platform.python_version()}"
    root = Path(path).expanduser()
    if root.is_file():
        return [root], str(root)
    if root.is_dir():
        files = [file for file in root.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(root))]
        return sorted(files), str(root)
    raise ValueError(f"--data {path}: there is no such file or folder. Pass one that exists, or leave --data out.")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _read(files: Iterable[Path], max_bytes: int | None) -> bytearray:
    data = bytearray()
    for path in files:
        if max_bytes is not None and len(data) >= max_bytes:
            break
        with path.open("rb") as file:
            data += file.read(-1 if max_bytes is None else max_bytes - len(data))
    return data


def entropies(text: np.ndarray) -> Entropies:
    """Return the entropy of a byte, and of a byte given the previous one, by counting. ``text`` is uint8."""
    pairs = np.zeros(BYTES * BYTES, dtype=np.int64)
    for start in range(0, len(text) - 1, _CHUNK):
        chunk = text[start : start + _CHUNK + 1].astype(np.int32)
        pairs += np.bincount(chunk[:-1] * BYTES + chunk[1:], minlength=BYTES * BYTES)
    table = pairs.reshape(BYTES, BYTES)
    return Entropies(unigram=_entropy(table.sum(0)), bigram=_entropy(table) - _entropy(table.sum(1)))


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
