"""Compute SHA-256 of files, a block at a time."""

from __future__ import annotations

import hashlib
from typing import Any, BinaryIO

BLOCK = 1 << 22  # bytes read, written and summed at a time; also what a save or a load takes beside the tensors


def sha256_of(file: BinaryIO) -> str:
    """Return the checksum of a file, from where it is read next to its end. Local."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


class HashedWriter:
    """Write to an unbuffered file, and compute the checksum of what was written. Local."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Write all of ``data``, which has the buffer protocol."""
        self._digest.update(data)
        rest = memoryview(data)
        # A disk that fills up takes a part, and says why with the next.
        while rest:
            rest = rest[self._file.write(rest) :]

    def sha256(self) -> str:
        """Return the checksum of all that was written."""
        return self._digest.hexdigest()
