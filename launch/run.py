"""What a long job needs around its training loop: agreeing, stopping when told to, checkpoints.

Part of the main job. Knows Accelerate and folders; nothing of models, text or schedules.

A run's folder holds its checkpoints, each named by the samples it was trained on:

    checkpoints/sample-000001234/
        ...             what accelerator.save_state writes
        progress.json   where the job stood, as plain data
        manifest.json   sizes and checksums of all the others; written last

It has another name until all of it is written, so a reader sees a whole checkpoint or none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from dist_adamw.checkpoint import file_fingerprint

T = TypeVar("T")
NEWEST = "newest"
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_FOLDER = re.compile(r"sample-(\d+)")


class JobError(ValueError):
    """Something that every rank knows, and a sentence about it."""


def everywhere(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; where it fails on one, all raise its sentence. Collective.

    Raises:
        JobError: ``action`` raised anything on some rank.
    """
    result, problem = _attempt(action)
    problems = [p for p in gather_object([problem]) if p is not None]
    if problems:
        raise JobError(problems[0])
    return result  # type: ignore[return-value]


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run ``action`` on the main rank; all ranks get its result, or raise its sentence. Collective.

    Raises:
        JobError: ``action`` raised anything.
    """
    outcome: list[Any] = [_attempt(action) if accelerator.is_main_process else None]
    result, problem = broadcast_object_list(outcome)[0]
    if problem is not None:
        raise JobError(problem)
    return result  # type: ignore[no-any-return]


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except (ValueError, OSError) as error:
        return None, str(error)
    except Exception as error:  # of a library; without the others' knowledge they would wait for ever
        return None, f"{type(error).__name__}: {error}"


# -------------------------------------------------------------------- stopping


class StopSignals:
    """Remembers SIGINT and SIGTERM instead of dying of them.

    A launcher may send a signal to each rank several times, and to some ranks later than to
    others: nothing is done in the handler, and the ranks agree by adding up their `flags`.
    """

    numbers = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: set[int] = set()
        launched = {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        self._launcher = os.getppid() if launched else None
        for number in self.numbers:
            signal.signal(number, lambda received, _: self._received.add(received))

    def flags(self) -> list[float]:
        """One number per signal: 1 where this rank has received it."""
        # accelerate launch dies of a SIGTERM without a word to its only process: the loss of
        # the launcher is then the signal.
        if self._launcher is not None and os.getppid() != self._launcher:
            self._received.add(signal.SIGTERM)
        return [float(number in self._received) for number in self.numbers]

    def agreed(self, sums: list[float]) -> signal.Signals | None:
        """The signal that some rank has received, from the ranks' flags added up."""
        return next((number for number, total in zip(self.numbers, sums, strict=True) if total), None)


# -------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """Where a job stands: what a checkpoint tells besides weights and states.

    Attributes:
        samples: Global samples of the updates applied.
        updates: Updates applied.
        epoch: Passes over the text that are complete.
        windows: Global samples drawn in this epoch.
        config: The job's configuration, as plain data.
        text: Digest of the text.
    """

    samples: int = 0
    updates: int = 0
    epoch: int = 0
    windows: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    text: str = ""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        accelerator: Saves and loads the objects it has prepared.
        out: The run's folder; every machine sees the same.
        keep: How many of the newest to keep.
    """

    def __init__(self, accelerator: Accelerator, out: Path, keep: int) -> None:
        self.accelerator = accelerator
        self.folder = out / "checkpoints"
        self.keep = keep

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first. Local."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if _FOLDER.fullmatch(path.name) and path.is_dir())

    def discard(self) -> None:
        """Delete every checkpoint. Local."""
        for path in self.all():
            shutil.rmtree(path)

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint, then delete the oldest ones. Collective.

        Raises:
            JobError: it could not be written; the older ones are still there.
        """
        final = self.folder / f"sample-{progress.samples:09d}"
        partial = final.with_name(final.name + ".partial")
        on_main(self.accelerator, self._sweep)
        everywhere(lambda: self.accelerator.save_state(str(partial)))
        on_main(self.accelerator, lambda: self._finish(partial, final, progress))
        return final

    def _sweep(self) -> None:
        """Remove what a killed job has left half-written."""
        for partial in self.folder.glob("*.partial"):
            shutil.rmtree(partial)

    def _finish(self, partial: Path, final: Path, progress: Progress) -> None:
        (partial / _PROGRESS).write_text(json.dumps(vars(progress), indent=1))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {path.relative_to(partial).as_posix(): _synced(path) for path in files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        _synced(partial / _MANIFEST)
        partial.rename(final)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)

    def find(self, wanted: str) -> tuple[Path, Progress]:
        """The checkpoint to resume from, checked to the last byte. Local.

        Args:
            wanted: `NEWEST`, or the folder of one checkpoint.

        Raises:
            ValueError: there is none, or it is damaged; an older whole one is named.
        """
        if wanted != NEWEST:
            path = Path(wanted)
            if not path.is_dir():
                raise ValueError(f"--resume {wanted}: there is no such folder. --resume alone takes the newest.")
            if problem := damage(path):
                raise ValueError(f"{problem} {self._alternative(path)}")
        elif found := self.all():
            path = found[-1]
            if problem := damage(path):
                raise ValueError(f"{problem} {self._alternative(path)}")
        else:
            raise ValueError(f"there is no checkpoint in {self.folder} to resume from. Start without --resume.")
        return path, Progress(**json.loads((path / _PROGRESS).read_text()))

    def _alternative(self, damaged: Path) -> str:
        older = (path for path in reversed(self.all()) if path.name < damaged.name and not damage(path))
        path = next(older, None)
        return f"Resume from an older one: --resume {path}" if path else "There is no older whole one: start afresh."

    def set_aside(self, after: int) -> list[Path]:
        """Rename checkpoints of more than ``after`` samples: the resumed job will write its own. Local."""
        later = [path for path in self.all() if int(_FOLDER.fullmatch(path.name)[1]) > after]  # type: ignore[index]
        aside = [path.with_name(path.name + ".superseded") for path in later]
        for path, new in zip(later, aside, strict=True):
            shutil.rmtree(new, ignore_errors=True)
            path.rename(new)
        return aside


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as a sentence; None when it is whole. Local."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        for name, expected in manifest.items():
            if (found := file_fingerprint(checkpoint / name)) != expected:
                what = "its checksum is another one" if found["bytes"] == expected["bytes"] else "it is torn"
                return (
                    f"the checkpoint {checkpoint} is damaged: {name} has {found['bytes']:,} bytes where "
                    f"{expected['bytes']:,} were written, and {what}."
                )
    except FileNotFoundError as error:
        return f"the checkpoint {checkpoint} is not whole: {Path(error.filename).name} is missing."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}."
    return None


def _synced(path: Path) -> dict[str, Any]:
    """Have the disk hold a file, and return its fingerprint."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return file_fingerprint(path)
