"""The file of a run log: lines of text that are only ever appended.

    {"run_log": 1, "parameters": [names], "facts": {...}} <crc>         when a process begins to log, or names change
    <update> <root> <digests of parameters> <digests of batches> <crc>

``root`` has 64 bits and stands for all parameters; each parameter and each micro-batch has 16 bits. They are written in
base64, and "-" where there are none. An update number that comes again, after a resume, replaces the earlier line.
Lines whose checksum is wrong, such as the half of a line that a killed process wrote, are left out.
"""

from __future__ import annotations

import base64
import binascii
import errno
import fcntl
import json
import os
import weakref
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_adamw.errors import printable

FILE_NAME = "run_log"
_FORMAT = 1
_MARK = b'{"run_log": '
_LEAF = 2  # bytes of a parameter's or a micro-batch's digest


@dataclass(frozen=True, slots=True)
class Header:
    """What holds for the updates after it.

    Attributes:
        parameters: Names, in the model's order.
        facts: What may explain a difference, such as the version of torch, by name.
    """

    parameters: tuple[str, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """An update.

    Attributes:
        number: The number of updates so far, this one included; 0 for the weights before training.
        root: The digest of all parameters, 8 bytes; empty if they were not logged.
        parameters: 2 bytes for each parameter, or empty.
        batches: 2 bytes for each micro-batch; empty if they were not logged.
        header: The header in force.
    """

    number: int
    root: bytes
    parameters: bytes
    batches: bytes
    header: Header

    def parameter(self, i: int) -> bytes:
        """Return the digest of the i-th parameter. Local."""
        return self.parameters[_LEAF * i : _LEAF * (i + 1)]

    def batch(self, i: int) -> bytes:
        """Return the digest of the i-th micro-batch; empty if there is none. Local."""
        return self.batches[_LEAF * i : _LEAF * (i + 1)]

    @property
    def batch_count(self) -> int:
        """The number of micro-batches."""
        return len(self.batches) // _LEAF


@dataclass(slots=True)
class Log:
    """The contents of a file.

    Attributes:
        path: The file.
        records: By update number, what holds now.
        replaced: Earlier records of an update that was logged again, each with the one that replaced it.
        damaged: The number of lines left out, a half-written last one not counted.
    """

    path: Path
    records: dict[int, Record] = field(default_factory=dict)
    replaced: list[tuple[Record, Record]] = field(default_factory=list)
    damaged: int = 0


def leaf(digest: int) -> bytes:
    """Return the bytes that stand for a digest of 64 bits. Local."""
    return (digest >> 8 * (8 - _LEAF)).to_bytes(_LEAF, "big")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode() or "-"


def _bytes(text: str) -> bytes:
    return b"" if text == "-" else base64.b64decode(text, validate=True)


def _line(payload: str) -> bytes:
    return f"{payload} {zlib.crc32(payload.encode()):08x}\n".encode()


def header_line(header: Header) -> bytes:
    """Return a header as a line. Local."""
    content = {"run_log": _FORMAT, "parameters": header.parameters, "facts": header.facts}
    return _line(json.dumps(content))


def record_line(record: Record) -> bytes:
    """Return a record as a line. Local."""
    fields = (record.root, record.parameters, record.batches)
    return _line(" ".join([str(record.number), *map(_text, fields)]))


class Writer:
    """Appends lines to a run's file. Local; one process per run.

    Args:
        folder: The folder of the run; it is created.

    Raises:
        ValueError: the file is not a run log, or another process writes to it.
        OSError: it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.close = weakref.finalize(self, os.close, self._handle)
        try:
            # Forked processes, such as a loader's workers, do not inherit this lock, so none outlives the job with it.
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.close()
                raise ValueError(f"another process writes to {path}. Choose another folder.") from None
        start = os.pread(self._handle, len(_MARK), 0)
        if not _MARK.startswith(start[: len(_MARK)]):
            self.close()
            raise ValueError(f"{path} is not a run log, and nothing was written to it. Choose another folder.")
        size = os.fstat(self._handle).st_size
        self._is_torn = size > 0 and os.pread(self._handle, 1, size - 1) != b"\n"

    def write(self, line: bytes) -> None:
        """Append a line.

        Raises:
            OSError: it could not be written whole. The next line begins behind what was written.
        """
        data = b"\n" + line if self._is_torn else line
        self._is_torn = True
        if os.write(self._handle, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._is_torn = False


def read_log(path: str | Path) -> Log:
    """Read the log of a run. Local.

    Args:
        path: The run's folder, or the file.

    Raises:
        ValueError: there is no run log, or it has no updates.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise ValueError(f"{file} does not exist. Pass the folder that was given to dist_adamw.RunLog.")
    data = file.read_bytes()
    if not _MARK.startswith(data[: len(_MARK)]):
        raise ValueError(f"{file} is not a run log. Pass the folder that was given to dist_adamw.RunLog.")
    log = Log(file)
    header: Header | None = None
    number = -1
    for line in data.split(b"\n")[:-1]:  # what follows the last line feed is half a line
        if not line:
            continue
        found = _parsed(line, header, file)
        if isinstance(found, Header):
            header = found
        elif found is None:
            log.damaged += 1
        else:
            number = found.number
            _add(log, found)
    # What lies beyond the last update is from before a resume, and the run has not got there again.
    log.records = {n: record for n, record in sorted(log.records.items()) if n <= number}
    if not log.records:
        raise ValueError(f"{file} has no updates yet. Train with this log first.")
    return log


def _add(log: Log, record: Record) -> None:
    earlier = log.records.get(record.number)
    if earlier is not None:
        log.replaced.append((earlier, record))
        if not record.batches:  # the weights that a resumed run began with: the update's batches were logged before
            record = replace(record, batches=earlier.batches)
        if not record.root and earlier.header.parameters == record.header.parameters:
            record = replace(record, root=earlier.root, parameters=earlier.parameters)
    log.records[record.number] = record


def _parsed(line: bytes, header: Header | None, file: Path) -> Header | Record | None:
    """Return a line's contents; None if it is damaged.

    Raises:
        ValueError: a later version has written it.
    """
    payload, _, checksum = line.rpartition(b" ")
    if checksum != f"{zlib.crc32(payload):08x}".encode():
        return None
    if payload.startswith(b"{"):
        content = json.loads(payload)
        if content["run_log"] != _FORMAT:
            raise ValueError(
                f"{file} has format {printable(str(content['run_log']))[:20]}, and this version reads {_FORMAT}. "
                "Update dist_adamw."
            )
        return Header(tuple(content["parameters"]), content["facts"])
    if header is None:
        return None
    try:
        number, root, parameters, batches = payload.decode().split(" ")
        record = Record(int(number), _bytes(root), _bytes(parameters), _bytes(batches), header)
    except (ValueError, binascii.Error):
        return None
    is_whole = not record.parameters or len(record.parameters) == _LEAF * len(header.parameters)
    return record if is_whole else None
