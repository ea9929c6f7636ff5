"""Compute the SHA-256 of files, a block at a time."""

from __future__ import annotations

import hashlib
from typing import Any, BinaryIO

BLOCK = 1 << 22  # bytes read, written and hashed at a time: the extra memory of a save or a load


def sha256_of(file: BinaryIO) -> str:
    """Return the checksum of a file from its current position to its end. Local."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


class HashedWriter:
    """Write to an unbuffered file, and compute the checksum of the written data. Local."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Write all of ``data``, which has the buffer protocol."""
        self._digest.update(data)
        rest = memoryview(data)
        # When a disk fills up, one write is short, and only the next raises the error.
        while rest:
            rest = rest[self._file.write(rest) :]

    def sha256(self) -> str:
        """Return the checksum of everything written."""
        return self._digest.hexdigest()
