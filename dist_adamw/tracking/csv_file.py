"""A tracker of Accelerate that writes a CSV file."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

_STEP = "step"
_VALUE_STEP = "step_value"  # the column of a value that is called "step"


def csv_tracker(path: str | Path) -> Any:
    """Return a tracker for ``Accelerator(log_with=...)`` that writes a CSV file. Local.

    Each call of ``accelerator.log`` adds a row, which is on disk at once: the step, and a column for each name.
    `Tracking` drops the rows that a killed job has written beyond the point of resumption; your own rows go or stay
    with those of `Tracking` next to them, whatever their steps count. Floats are written with all their digits, a dict
    has a column for each of its names, such as "loss/train", and a value called "step" has the column "step_value".

    Args:
        path: The file. Its folder is created. After a resume an existing file is continued; if `Tracking` begins from
            sample 0, that of the earlier run is kept as ``path.1``.

    Raises:
        ValueError: the file exists and is not one that this wrote.
    """
    path = Path(path).expanduser()
    if path.exists():
        read_rows(path)
    return _tracker_class()(CsvFile(path))


class CsvFile:
    """A CSV file with a column for each name that was ever logged.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: list[str] = []
        self._appended = 0  # rows of this process, the last ones
        self._file: TextIO | None = None

    def append(self, values: Mapping[str, Any], step: int | None) -> None:
        """Add a row."""
        row = {_STEP: "" if step is None else str(step)}
        for name, value in _flat(values):
            row[_VALUE_STEP if name == _STEP else name] = _as_text(value)
        is_unknown = self._file is None or not row.keys() <= set(self._names)
        if is_unknown:
            names, rows = read_rows(self.path) if self.path.exists() else ([_STEP], [])
            self._write([*names, *(name for name in row if name not in names)], rows)
        assert self._file is not None
        csv.DictWriter(self._file, self._names, lineterminator="\n").writerow(row)
        self._file.flush()
        self._appended += 1

    def drop_from(self, step: int, now: int) -> None:
        """Drop what a killed run wrote from ``step`` on; if no row of `Tracking` would stay, rename its file.

        Rows are in the order in which they were written, and those of `Tracking` show where ``step`` is. Other rows may
        have steps of any unit, so they go with the rows of `Tracking` that are before and after them. Between the last
        one that stays and the first one that goes, those are dropped whose step fits. Rows of this process stay.

        Args:
            step: The first step that comes again.
            now: The step of the row that `Tracking` is about to add.
        """
        if not self.path.exists():
            return
        names, rows = read_rows(self.path)
        size = len(rows) - self._appended
        old, own = rows[:size], rows[size:]
        known = [i for i, row in enumerate(old) if _is_of_tracking(row)]
        later = next((i for i in known if int(old[i][_STEP]) >= step), size)
        if later < size and later == known[0]:  # another run's
            self._write(names, old)
            self.close()
            self.path.rename(_free_name(self.path))
            if own:
                self._write(names, own)
            return
        last = int(old[later][_STEP]) if later < size else now
        earlier = 1 + max((i for i in known if i < later), default=-1)
        between = [
            row for row in old[earlier:later] if not (_is_number(row[_STEP]) and step <= int(row[_STEP]) <= last)
        ]
        self._write(names, [*old[:earlier], *between, *own])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, names: list[str], rows: Iterable[Mapping[str, str]]) -> None:
        """Write the file again, with ``names`` for columns; a kill leaves the old one or the new one."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        self._file, self._names = partial.open("w", newline=""), names
        writer = csv.DictWriter(self._file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._file.flush()
        os.fsync(self._file.fileno())
        partial.replace(self.path)


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a file, without a last line that a killed process left half-written.

    Raises:
        ValueError: it is not a file of `CsvFile`.
    """
    try:
        with path.open(newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}). Choose another path.") from error
    lines = text[: text.rfind("\n") + 1]
    names, *rows = csv.reader(io.StringIO(lines, newline="")) if lines else [[_STEP]]
    if not names or names[0] != _STEP:
        raise ValueError(
            f"{path} is not a file of csv_tracker: its first column is not {_STEP!r}. Choose another path."
        )
    return names, [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _free_name(path: Path) -> Path:
    """Return the first of ``path.1``, ``path.2``, ... that is free."""
    return next(free for i in itertools.count(1) if not (free := path.with_name(f"{path.name}.{i}")).exists())


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values; those of a dict inside have names such as "loss/train"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _as_text(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.tolist()
    return repr(value) if isinstance(value, float) else str(value)


def _is_of_tracking(row: Mapping[str, str]) -> bool:
    """Return whether `Tracking` has written this row, whose step is then its samples or its updates."""
    return _is_number(row[_STEP]) and row[_STEP] in (row.get("samples"), row.get("updates"))


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        int(text)
        return True
    return False


@functools.cache
def _tracker_class() -> Any:
    """Return the class, whose base is imported only now."""
    from accelerate.tracking import GeneralTracker, on_main_process

    class CsvTracker(GeneralTracker):  # type: ignore[misc]
        """Writes to a `CsvFile`, on the main rank."""

        name = "csv"
        requires_logging_directory = False

        def __init__(self, file: CsvFile) -> None:
            super().__init__()
            self._file = file

        @property
        def tracker(self) -> CsvFile:
            """The file."""
            return self._file

        @on_main_process  # type: ignore[untyped-decorator]
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            """Add a row."""
            self._file.append(values, step)

        @on_main_process  # type: ignore[untyped-decorator]
        def finish(self) -> None:
            """Close the file."""
            self._file.close()

    return CsvTracker
