"""``dist-adamw lr-range``: run a script that uses `dist_adamw.prepare` under a range test."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.json_text import json_text
from dist_adamw.range_test.curve import RangeResult, check_range
from dist_adamw.range_test.launching import leave_error
from dist_adamw.range_test.lr_override import LROverride
from dist_adamw.range_test.prepared import stop_watching, watch
from dist_adamw.range_test.running import RunningTest
from dist_adamw.ranks import collectives


@dataclass(frozen=True, slots=True)
class ScriptRange:
    """The options of the command.

    Attributes:
        lowest: See `lr_range`.
        highest: See there.
        updates: See there.
        divergence: See there.
        picture: The file to draw into.
        is_json: Whether stdout has one JSON document alone.

    Raises:
        ValueError: a number is out of its range.
    """

    lowest: float
    highest: float
    updates: int
    divergence: float
    picture: str
    is_json: bool = False

    def __post_init__(self) -> None:
        if (problem := check_range(self.lowest, self.highest, self.updates, self.divergence)) is not None:
            raise ValueError(problem)


class RangeTestEnded(SystemExit):
    """Ends a script without a traceback, past its ``except Exception``."""


class ScriptTest:
    """The range test of a script's loop, from its `prepare` on.

    Args:
        options: The options of the command.
    """

    def __init__(self, options: ScriptRange) -> None:
        self.stdout = sys.stdout  # for the JSON document
        self._options = options
        self._optimizer: Optimizer | None = None
        self._accelerator: Any = None
        self._test: RunningTest | None = None
        self._is_reported = False

    def prepared(self, accelerator: Any, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Begin the test. Collective."""
        if self._optimizer is not None and optimizer is not self._optimizer:
            raise ValueError(
                "dist-adamw lr-range tests one optimizer, and the script prepares another one. Use dist_adamw.lr_range "
                "in the script, around the loop that is to be tested."
            )
        accelerator.save_state = _saves_nothing("accelerator.save_state", lambda folder=None, *_, **__: folder)
        accelerator.save_model = _saves_nothing("accelerator.save_model", lambda *_, **__: None)
        if self._optimizer is not None:
            return
        self._optimizer, self._accelerator = optimizer, accelerator
        one = self._options
        self._is_main = collectives.rank() == 0  # now, since a script may destroy the process group at its end
        override = LROverride(optimizer, scheduler, one.lowest, one.highest, one.updates)
        self._test = RunningTest(override, one.updates, one.divergence, collectives.host_group())

    def backward(self, accelerator: Any, loss: Any) -> None:
        """Take a loss; end the script if the test has ended. Collective."""
        if self._test is None or accelerator is not self._accelerator:
            return
        if self._test.observe(loss, is_after_step=False):
            self.report()
            raise RangeTestEnded(0)

    def report(self) -> int:
        """Print the result, and draw the picture, on the main rank; return the exit status. Local."""
        test = self._test
        if test is None:
            _say("the script has not called dist_adamw.prepare, so there is nothing to test.", sys.stderr)
            return 2
        test.take_last_update()
        if (result := test.result) is None:
            why = test.ended_by if test.has_losses else "the script has not called accelerator.backward(loss)"
            _say(f"there is no curve: {why}.", sys.stderr)
            return 2
        if not self._is_reported and self._is_main:
            self._print(result)
        self._is_reported = True
        return 0

    def _print(self, result: RangeResult) -> None:
        is_json = self._options.is_json
        if not is_json:
            print(f"\n{result}", flush=True)
        path = None
        try:
            path = result.plot(self._options.picture)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            _say(f"no picture: {error}", sys.stderr)
        if is_json:
            facts = {one.name: getattr(result, one.name) for one in fields(result)}
            print(json_text({**facts, "written": path}), file=self.stdout, flush=True)
        elif path is not None:
            print(f"drawn in {path}", flush=True)


def run_script(script: str, args: Sequence[str], options: ScriptRange) -> int:
    """Run ``script`` as ``python script *args`` would, under a range test; return the exit status. Collective.

    ``torch.save``, safetensors' functions, the accelerator's ``save_state`` and ``save_model``, and `dist_adamw` write
    nothing meanwhile. Exceptions of the script pass through.
    """
    test = ScriptTest(options)
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [script, *args], [str(Path(script).resolve().parent)]
    watch(test)
    try:
        with _no_saves(), _script_prints_to_stderr(test) if options.is_json else contextlib.nullcontext():
            runpy.run_path(script, run_name="__main__")
    except RangeTestEnded:
        pass
    except SystemExit as ended:
        if ended.code not in (None, 0):
            leave_error(script, ended)
            raise
    except Exception as error:
        leave_error(script, error)
        raise
    finally:
        stop_watching(test)
        sys.argv, sys.path[:] = before
    collectives.end_quietly()
    return test.report()


@contextlib.contextmanager
def _script_prints_to_stderr(test: ScriptTest) -> Iterator[None]:
    """Keep stdout for the JSON document, also from processes that the script starts."""
    sys.stdout.flush()
    kept = os.dup(1)
    test.stdout = sys.stdout if sys.stdout is not sys.__stdout__ else os.fdopen(os.dup(kept), "w")
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _say(text: str, stream: Any) -> None:
    if collectives.rank() == 0:
        print(f"dist-adamw lr-range: {text}", file=stream, flush=True)


def _saves_nothing(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in place of one that saves: it says so, once."""
    was_said = False

    def save_nothing(*args: Any, **kwargs: Any) -> Any:
        nonlocal was_said
        if not was_said:
            _say(f"{name} writes nothing during a range test.", sys.stdout)
        was_said = True
        return result(*args, **kwargs)

    return save_nothing


@contextlib.contextmanager
def _no_saves() -> Iterator[None]:
    """Replace what writes checkpoints, or moves and deletes earlier ones, by functions that do not."""
    import safetensors.torch
    import torch.distributed.checkpoint

    from dist_adamw.checkpoint import async_saver, save_load
    from dist_adamw.checkpoint.folder import CheckpointFolder

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def path_of(folder: CheckpointFolder, samples: int, *_: Any, **__: Any) -> Path:
        return folder.root / f"sample-{samples:09d}"

    replaced: list[tuple[Any, str, str, Callable[..., Any]]] = [
        (torch, "save", "torch.save", nothing),
        (torch.distributed.checkpoint, "save", "torch.distributed.checkpoint.save", nothing),
        (torch.distributed.checkpoint, "async_save", "torch.distributed.checkpoint.async_save", nothing),
        (safetensors.torch, "save_file", "safetensors.torch.save_file", nothing),
        (safetensors.torch, "save_model", "safetensors.torch.save_model", nothing),
        (save_load, "write_state", "dist_adamw.save", nothing),
        (async_saver, "write_state", "AsyncSaver.save", nothing),
        (CheckpointFolder, "save", "CheckpointFolder.save", path_of),
        (CheckpointFolder, "async_save", "CheckpointFolder.async_save", path_of),
        (CheckpointFolder, "discard", "CheckpointFolder.discard", nothing),
        (CheckpointFolder, "set_aside", "CheckpointFolder.set_aside", lambda *_: []),
    ]
    before = [getattr(owner, name) for owner, name, *_ in replaced]
    for owner, name, called, instead in replaced:
        setattr(owner, name, _saves_nothing(called, instead))
    try:
        yield
    finally:
        for (owner, name, *_), original in zip(replaced, before, strict=True):
            setattr(owner, name, original)
