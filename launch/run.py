"""What a long job needs around its training loop: agreeing, stopping when told to, checkpoints.

Part of the main job. Knows Accelerate and folders; nothing of models, text or schedules.

A run's folder holds its checkpoints, each named by the samples it was trained on:

    checkpoints/sample-000001234/
        ...             what accelerator.save_state writes
        progress.json   where the job stood, as plain data
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from dist_adamw.checkpoint.folder import CheckpointFolder

T = TypeVar("T")
NEWEST = "newest"
_PROGRESS = "progress.json"


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
        config: The job's configuration, as plain data.
        text: Digest of the text.
    """

    samples: int = 0
    updates: int = 0
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
        self.folder = CheckpointFolder(out / "checkpoints", keep)

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint, then delete the oldest ones. Collective.

        Raises:
            CheckpointError: it could not be written; the older ones are still there.
        """

        def write(path: Path) -> None:
            self.accelerator.save_state(str(path))
            if self.accelerator.is_main_process:
                (path / _PROGRESS).write_text(json.dumps(vars(progress), indent=1))

        saved = self.folder.save(progress.samples, write)
        assert saved is not None
        return saved

    def find(self, wanted: str) -> tuple[Path, Progress]:
        """The checkpoint to resume from, checked to the last byte. Collective.

        Args:
            wanted: `NEWEST`, or the folder of one checkpoint.

        Raises:
            JobError: there is none, or it is damaged; the newest whole one is named.
        """
        path = on_main(self.accelerator, lambda: self._named(wanted))
        if problem := self.folder.damage_of(path):
            other = self.folder.newest(but=path)
            cure = f"The newest whole one is {other}." if other else "There is no other whole one: start afresh."
            raise JobError(f"{problem} {cure}")
        return path, on_main(self.accelerator, lambda: self._progress(path))

    def _named(self, wanted: str) -> Path:
        if wanted != NEWEST:
            if not Path(wanted).is_dir():
                raise ValueError(f"--resume {wanted}: there is no such folder. --resume alone takes the newest.")
            return Path(wanted)
        if not (found := self.folder.all()):
            raise ValueError(f"there is no checkpoint in {self.folder.root} to resume from. Start without --resume.")
        return found[-1]

    def _progress(self, path: Path) -> Progress:
        try:
            return Progress(**json.loads((path / _PROGRESS).read_text()))
        except TypeError as error:
            raise ValueError(f"{path / _PROGRESS} is of another version of this job: {error}.") from error
