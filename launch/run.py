"""Agreement of ranks on errors, stop signals, and checkpoints for a long job.

A run's folder holds its checkpoints, each named by the samples it was trained on:

    checkpoints/sample-000001234/
        ...             the files of accelerator.save_state
        progress.json   the job's progress, as plain data
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

import dist_adamw
from dist_adamw.checkpoint.folder import CheckpointFolder

T = TypeVar("T")
NEWEST = "newest"
_PROGRESS = "progress.json"


class JobError(ValueError):
    """An error that every rank raises, with one sentence."""


def everywhere(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; if it fails on any, raise its error on all. Collective.

    Raises:
        JobError: ``action`` raised anything on some rank.
    """
    result, problem = _attempt(action)
    problems = [p for p in gather_object([problem]) if p is not None]
    if problems:
        raise JobError(problems[0])
    return result  # type: ignore[return-value]


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run ``action`` on the main rank; return its result or raise its error on all ranks. Collective.

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
    except Exception as error:  # from a library: if it were raised here, the other ranks would wait forever
        return None, f"{type(error).__name__}: {error}"


# -------------------------------------------------------------------- stopping


class StopSignals:
    """Record SIGINT and SIGTERM in place of exiting.

    A launcher may send a signal to each rank several times, and to some ranks later than to others, so the handler
    only records it, and the ranks agree by summing their `flags`.
    """

    numbers = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: set[int] = set()
        launched = {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        self._launcher = os.getppid() if launched else None
        for number in self.numbers:
            signal.signal(number, lambda received, _: self._received.add(received))

    def flags(self) -> list[float]:
        """Return one number per signal: 1 if this rank has received it."""
        # With a single process, accelerate launch exits on SIGTERM without forwarding it, so a new parent process
        # counts as the signal.
        if self._launcher is not None and os.getppid() != self._launcher:
            self._received.add(signal.SIGTERM)
        return [float(number in self._received) for number in self.numbers]

    def agreed(self, sums: list[float]) -> signal.Signals | None:
        """Return the signal that some rank has received, from the sums of the ranks' flags."""
        return next((number for number, total in zip(self.numbers, sums, strict=True) if total), None)


# -------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """A job's progress, saved with a checkpoint.

    Attributes:
        samples: Global samples of the applied updates.
        updates: Applied updates.
        config: The job's configuration, as plain data.
        text: Digest of the text.
    """

    samples: int = 0
    updates: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    text: str = ""


class Snapshots:
    """The weights of each cycle's end, for ensembles and for inference. The constructor is collective.

    Args:
        out: The run's folder, shared by all machines.
    """

    def __init__(self, out: Path) -> None:
        self.folder = CheckpointFolder(out / "snapshots", keep=None)

    def save(self, samples: int, model: nn.Module) -> None:
        """Write the weights alone, which `dist_adamw.load` and ``dist-adamw export`` read. Collective.

        Raises:
            CheckpointError: they could not be written.
        """
        self.folder.save(samples, lambda path: dist_adamw.save(path, model))

    def each(self, model: nn.Module) -> Iterator[Path]:
        """Load one after the other into ``model``, the newest last, and yield its folder. Collective."""
        for path in self.folder.all():
            dist_adamw.load(path, model, random_state=False)
            yield path


class Checkpoints:
    """The checkpoints of one run.

    Args:
        accelerator: The accelerator that prepared the objects to save.
        out: The run's folder, shared by all machines.
        keep: How many of the newest to keep.
    """

    def __init__(self, accelerator: Accelerator, out: Path, keep: int) -> None:
        self.accelerator = accelerator
        self.folder = CheckpointFolder(out / "checkpoints", keep)

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint, then delete the oldest ones. Collective.

        Raises:
            CheckpointError: it could not be written; older ones are kept.
        """

        def write(path: Path) -> None:
            self.accelerator.save_state(str(path))
            if self.accelerator.is_main_process:
                (path / _PROGRESS).write_text(json.dumps(vars(progress), indent=1))

        saved = self.folder.save(progress.samples, write)
        assert saved is not None
        return saved

    def find(self, wanted: str) -> tuple[Path, Progress]:
        """Return the checkpoint to resume from, checked to the last byte. Collective.

        Args:
            wanted: `NEWEST`, or a checkpoint's folder.

        Raises:
            JobError: there is none, or it is damaged; the message names the newest whole one.
        """
        path = on_main(self.accelerator, lambda: self._named(wanted))
        if problem := self.folder.damage_of(path):
            other = self.folder.newest(but=path)
            advice = f"The newest whole one is {other}." if other else "There is no other whole one: start a new run."
            raise JobError(f"{problem} {advice}")
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
