"""Manage one run's checkpoints: keep the newest few, delete older ones, and let one job save at a time.

    checkpoints/
        sample-000001234/      a checkpoint, and whatever else was written with it
            manifest.json      sizes and checksums of the other files; written last
        sample-000002468/
        latest                 the name of the newest; updated last
        lock                   held by the job that saves here

A checkpoint has a temporary name until all of it is written, so a reader sees a whole one or none.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.checkpoint.async_saver import AsyncSaver, Saving
from dist_adamw.checkpoint.manifest import MANIFEST, damage_of, file_facts
from dist_adamw.checkpoint.storage.index import (
    check_alike,
    sync_folder,
    write_text,
)
from dist_adamw.checkpoint.storage.locks import JobLock
from dist_adamw.errors import CheckpointError
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import Ranks
from dist_adamw.schedule.batch import check_positive_int

_NAME = re.compile(r"sample-([0-9]+)")
_LATEST = "latest"
_PARTIAL, _REPLACED, _ASIDE = ".partial", ".replaced", ".superseded"
# Names that an interrupted save or deletion leaves behind; any other folder is the user's and is never touched.
_LEFT_OVER = re.compile(r"sample-[0-9]+(\.deleted)?(\.partial|\.replaced)")
_MOST_SAMPLES = 1 << 62


class CheckpointFolder:
    """The folder of a run's checkpoints, each named by the samples it was trained on.

    Args:
        root: The folder; created if missing, and the same on every rank.
        keep: How many of the newest to keep; None: all, such as the weights of each cycle's end.
        every: Samples from one save to the next, for `is_due`.
        on_error: When a checkpoint cannot be written (a full disk, a folder that became read-only): "raise", or
            "warn" and train on. Older checkpoints are kept either way.
        patience: Seconds to wait until another job that saves here ends, such as the one that this job restarts.
        group: A gloo group for messages between ranks; default: the default group, or one next to it if that is NCCL.

    Raises:
        CheckpointError: another job saves to it, or it cannot be created; on every rank.

    The constructor is collective, and so are `newest`, `damage_of`, `save` and `async_save`; other methods are local.
    """

    def __init__(
        self,
        root: str | Path,
        keep: int | None = 3,
        *,
        every: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        patience: float = 10.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be 1 or more, or None for all, got {keep!r}: a run cannot resume without one.")
        if every is not None:
            every = check_positive_int("every", every)
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error must be 'raise' or 'warn', got {on_error!r}.")
        self.root, self.keep, self.every, self.on_error = Path(root).absolute(), keep, every, on_error
        self._ranks = ranks = Ranks.now(collectives.host_group() if group is None else group)
        self._lock: JobLock | None = None
        self._running: Saving | None = None
        self._saved_at: int | None = None  # samples of the last save, or of the checkpoint that the job resumed from
        self._damaged: set[str] = set()  # names of checkpoints that `newest` skipped
        self._closed = False
        ranks.run(lambda: self._take(patience) if ranks.is_main else None)

    def _take(self, patience: float) -> None:
        """Lock the folder, and finish the renames that a killed job began."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = JobLock(self.root, patience)
        for before in self._left(_REPLACED):  # a job was killed between the two renames of `_commit`
            final = before.with_name(before.name.removesuffix(_REPLACED))
            if final.exists():
                shutil.rmtree(before, ignore_errors=True)
            else:
                before.rename(final)

    def close(self) -> None:
        """Wait for an asynchronous save, then release the lock; the end of the process releases it too.

        Raises:
            CheckpointError: that save failed, was not reported yet, and ``on_error="raise"``.
        """
        self._closed = True
        running, self._running = self._running, None
        try:
            if running is not None and not running.reported:
                running.wait()
        except CheckpointError as error:
            self._failed(_final(running.path), error)  # type: ignore[union-attr]
        finally:
            if self._lock is not None:
                self._lock.release()

    # ---------------------------------------------------------------- what there is

    def all(self) -> list[Path]:
        """Return finished checkpoints, oldest first, without checking that they are whole.

        They are ordered by samples, however many digits a name has. Of two names with the same number (other releases
        and tools pad differently), the one that `save` writes comes last.
        """
        if not self.root.is_dir():
            return []
        keyed = []
        for path in self.root.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                samples = int(match[1])
                keyed.append((samples, path.name == _name(samples), path))
        return [path for _, _, path in sorted(keyed)]

    def samples_of(self, path: Path) -> int:
        """Return the samples that a checkpoint of this folder was trained on."""
        match = _NAME.fullmatch(path.name)
        assert match is not None
        return int(match[1])

    def newest(self, but: Path | None = None) -> Path | None:
        """Return the newest checkpoint that is whole to the last bit, leaving out ``but``; None if there is none.

        Waits for an asynchronous save. Collective: each rank reads its part of the files.
        """
        if self._running is not None:
            self._running.join()  # it deletes old checkpoints when it finishes
        # Ranks follow the main rank's listing: on a network file system theirs may be out of date.
        listed = self._ranks.run(lambda: self.all() if self._ranks.is_main else [])
        found: list[Path] = self._ranks.gather(listed)[0]
        others = (path for path in reversed(found) if but is None or path.name != but.name)
        for path in others:
            if self.damage_of(path) is None:
                return path
            self._damaged.add(path.name)
        return None

    def damage_of(self, path: Path) -> str | None:
        """Return what is wrong with a checkpoint, as a sentence; None if it is whole. Collective: see `newest`."""
        ranks = self._ranks
        ranks.check()
        check_alike(path, ranks.group)  # with node-local disks no checkpoint would be whole, and the job would restart
        problems = ranks.gather(damage_of(path, ranks.rank, ranks.size))
        return next((problem for problem in problems if problem is not None), None)

    # ---------------------------------------------------------------- writing

    def is_due(self, samples: int) -> bool:
        """Return whether ``samples`` has passed a multiple of ``every`` since the last save. Use in every micro-batch::

            if folder.is_due(scheduler.samples):
                folder.save(scheduler.samples, accelerator.save_state)

        One save is due for each multiple, even if it fails. The first call sets where the job begins, so that no save
        is due right after a resume: make it before the first update, or at most ``every`` samples later.

        Args:
            samples: The samples that the state was trained on; the same on every rank.

        Raises:
            ValueError: ``every`` was not given.

        Collective in the first call, local in all others.
        """
        if self.every is None:
            raise ValueError("is_due needs CheckpointFolder(..., every=<samples>), and every is None.")
        if self._saved_at is None:
            listed = self._ranks.run(lambda: self.all() if self._ranks.is_main else [])
            known: list[Path] = self._ranks.gather(listed)[0]
            before = [self.samples_of(path) for path in known if path.name not in self._damaged]
            # Later ones belong to a run that this job went back on.
            self._saved_at = max((n for n in before if n <= samples), default=0)
        return samples // self.every > self._saved_at // self.every

    def save(self, samples: int, write: Callable[[Path], object]) -> Path | None:
        """Let ``write`` fill a folder, and make that the newest checkpoint. Collective.

        Args:
            samples: The samples that the state was trained on. A checkpoint with the same number is replaced.
            write: Called on every rank with the folder: `dist_adamw.save`, ``accelerator.save_state``, or a function
                that writes more files too. It may be collective.

        Returns:
            The checkpoint; None if it could not be written and ``on_error="warn"``.

        Raises:
            CheckpointError: it could not be written; on every rank.
        """
        final = self._begin(samples)
        try:
            self._wait_for_the_last()
            self._ranks.run(self._sweep)
            self._ranks.run(lambda: write(_partial(final)))
            self._ranks.run(lambda: self._commit(final) if self._ranks.is_main else None)
        except CheckpointError as error:
            self._failed(final, error)
            return None
        return final

    def async_save(
        self,
        saver: AsyncSaver,
        samples: int,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
    ) -> Saving | None:
        """Do as `save`, from a copy in host memory, while training continues. Collective.

        Returns:
            The running save; None if this or the previous save failed and ``on_error="warn"``.
        """
        final = self._begin(samples)
        try:
            self._wait_for_the_last()
            self._ranks.run(self._sweep)
            self._running = saver.save(
                _partial(final),
                model,
                optimizer,
                scheduler,
                extra=extra,
                then=lambda: self._commit(final) if self._ranks.is_main else None,
            )
        except CheckpointError as error:
            self._failed(final, error)
            return None
        return self._running

    def _wait_for_the_last(self) -> None:
        """Wait for an asynchronous save; report its error once. Collective."""
        running, self._running = self._running, None
        if running is not None and (error := running.pending_error(self._ranks)) is not None:
            self._failed(_final(running.path), error)

    def _begin(self, samples: int) -> Path:
        if self._closed:
            raise CheckpointError(f"the CheckpointFolder of {self.root} is closed. Create another one.")
        if type(samples) is not int or samples < 0:
            raise CheckpointError(f"samples must be a whole number >= 0, got {samples!r}.")
        if samples > _MOST_SAMPLES:
            raise CheckpointError(f"samples must be at most 2**62 = {_MOST_SAMPLES}, got {samples}.")
        self._saved_at = samples  # before writing: a failed save is retried at the next multiple, not at every update
        final = self.root / _name(samples)
        # The root may be relative to a rank's own working directory, and samples may differ between ranks.
        folders = self._ranks.gather(str(final))
        if len(set(folders)) > 1:
            raise CheckpointError(f"ranks save to different folders: {', '.join(sorted(set(folders)))}. Pass the same.")
        return final

    def _sweep(self) -> None:
        """Remove what a killed job or a failed save left behind."""
        if self._ranks.is_main:
            for left in self._left(_PARTIAL):
                shutil.rmtree(left, ignore_errors=True)

    def _left(self, suffix: str) -> list[Path]:
        """Return our folders with that suffix."""
        return [path for path in self.root.glob(f"*{suffix}") if _LEFT_OVER.fullmatch(path.name) and path.is_dir()]

    def _commit(self, final: Path) -> None:
        partial = _partial(final)
        write_text(partial / MANIFEST, json.dumps(dict(file_facts(partial)), indent=1))
        before = final.with_name(final.name + _REPLACED)
        # A rename cannot replace a folder that is not empty, so the old checkpoint is moved away first.
        if final.exists():
            final.rename(before)
        try:
            partial.rename(final)
        except OSError:
            if before.exists():
                before.rename(final)
            raise
        sync_folder(self.root)  # the rename must be on disk before anything older is deleted
        shutil.rmtree(before, ignore_errors=True)
        self._damaged.discard(final.name)
        self.set_aside(self.samples_of(final))  # later ones exist if the job resumed from an older checkpoint
        for old in self._no_longer_kept(final):
            _away(old)
        try:
            write_text(self.root / _LATEST, final.name)
        except OSError as error:  # no failure: `newest` goes by the folders' names, and `latest` is for other tools
            warnings.warn(f"{self.root / _LATEST} could not be written: {error}.", stacklevel=2)

    def _no_longer_kept(self, final: Path) -> list[Path]:
        """Return checkpoints older than the newest ``keep`` undamaged ones; never ``final``. Local."""
        found = [path for path in self.all() if path != final]
        # One with the same samples under another name counts as replaced, as one with the same name would be.
        others = [path for path in found if self.samples_of(path) != self.samples_of(final)]
        whole = [path for path in others if path.name not in self._damaged]
        if self.keep is None:
            return [path for path in found if path not in others]
        others_to_keep = self.keep - 1
        kept = others[others.index(whole[-others_to_keep:][0]) :] if others_to_keep and whole else []
        return [path for path in found if path not in kept]

    def _failed(self, final: Path, error: CheckpointError) -> None:
        if self._ranks.is_main:
            shutil.rmtree(_partial(final), ignore_errors=True)
        if self.on_error == "raise":
            raise error
        if self._ranks.is_main:
            warnings.warn(f"no checkpoint after sample {final.name.partition('-')[2]}: {error}", stacklevel=3)

    # ---------------------------------------------------------------- changing one's mind

    def discard(self) -> None:
        """Delete every checkpoint."""
        (self.root / _LATEST).unlink(missing_ok=True)
        for path in self.all():
            _away(path)

    def set_aside(self, after: int) -> list[Path]:
        """Rename checkpoints of more than ``after`` samples: a job that continues from there writes its own."""
        aside = []
        for path in self.all():
            if self.samples_of(path) > after:
                aside.append(_free_name(path.with_name(path.name + _ASIDE)))
                path.rename(aside[-1])
        if aside and (left := self.all()):
            write_text(self.root / _LATEST, left[-1].name)
        return aside


def _name(samples: int) -> str:
    return f"sample-{samples:09d}"  # padded only so that a directory listing is sorted


def _free_name(path: Path) -> Path:
    """Return ``path``, or the first of path-2, path-3 and so on that does not exist."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _partial(final: Path) -> Path:
    return final.with_name(final.name + _PARTIAL)


def _final(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(_PARTIAL))


def _away(path: Path) -> None:
    """Delete a checkpoint under another name, so that no reader takes it for a whole one meanwhile."""
    gone = path.with_name(f"{path.name}.deleted{_PARTIAL}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
