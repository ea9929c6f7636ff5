"""RunLog: write digests of every update's batches and parameters to a file, for ``dist-adamw diff``."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_adamw._version import __version__
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.outcome import is_capturing
from dist_adamw.ranks.collectives import all_gather_objects, host_group, world_size
from dist_adamw.ranks.run_on_all import Ranks, first_problem
from dist_adamw.run_log import batch_sources
from dist_adamw.run_log.digests import as_digest, batch_digest
from dist_adamw.run_log.exchange import DigestExchange
from dist_adamw.run_log.log_file import Header, Record, Writer, header_line, leaf, record_line
from dist_adamw.run_log.parameters import LoggedParameters
from dist_adamw.wrappers import unwrap

# By file: the log of this process that writes to it. A second one, for another phase of training, takes its place.
_OPEN: weakref.WeakValueDictionary[str, RunLog] = weakref.WeakValueDictionary()


class RunLog:
    """Log digests of each update's batches and parameters, so that ``dist-adamw diff`` finds where two runs part.

    Once it is made, every applied update of ``optimizer`` is logged, inside its ``step()``. Under `dist_adamw.prepare`
    the batches that the loop trained on are known; in any other loop call `batch` with each. Nothing in the digests
    depends on the number of ranks or on the engine: the runs to compare may differ in both. A run that is resumed
    appends to its file, and updates that it repeats replace the earlier ones.

    Under DeepSpeed ZeRO-1 and ZeRO-2 the weights are whole only after the engine's step, so call `update` then.

    The digests are of the parameters' bits, in their logical order, not of buffers, optimizer state or fp32 masters.

    Cost: rank 0 hashes the parameters (FSDP2: each rank its shard, and a parameter that is not sharded along its first
    dimension is gathered). On one core of a CPU, 25M fp32 parameters in 200 tensors take 50 ms, and a batch of 2 x 8 x
    1024 int64 takes 0.25 ms. Ranks exchange ``8 W (2 + micro-batches of a rank)`` bytes per update, and with FSDP2 8
    bytes per parameter more. In the file an update takes 2.7 bytes per parameter and per micro-batch, and 30: 0.5 kB
    with 150 parameters and 32 micro-batches, which is 9 MB a day at one update in 5 seconds.

    Args:
        path: The run's folder, which is created. The log is the file ``run_log`` in it; rank 0 writes it.
        model: The model, with or without its wrapper, before or after ``prepare``.
        optimizer: A `DistAdamW`, with or without its wrapper.
        every: Log the parameters of each update whose number is a multiple. Batches are logged at every update.

    Raises:
        ValueError: on every rank: ``optimizer`` is not a `DistAdamW`, the file is something else, is in use or cannot
            be opened, the parameters are those of ZeRO-3 or FSDP1, or ranks pass different ``every``.

    If a line cannot be written (a full disk), rank 0 warns and training continues.

    Collective: every rank makes one, and ranks exchange digests in each applied update.
    """

    def __init__(self, path: str | Path, model: nn.Module, optimizer: Optimizer, *, every: int = 1) -> None:
        self._ranks = Ranks.now(host_group())
        self._exchange = DigestExchange(self._ranks)
        self._writer: Writer | None = None
        self._header: Header | None = None
        self._batches: list[Callable[[], int]] = []
        self._start: Record | None = None  # the weights before the first update
        self._has_begun = False
        self._has_stepped = False
        self._stepped_updates = 0  # DeepSpeed: at the last step
        self._has_warned = False
        inner = unwrap(optimizer)
        problem = None
        if (earlier := _OPEN.pop(os.path.realpath(path), None)) is not None:
            earlier.close()  # on every rank, before one may find a mistake
        try:
            self._check(inner, every)
            self._parameters = LoggedParameters(model, self._ranks)
            if self._ranks.is_main:
                self._writer = Writer(Path(path))
        except (ValueError, OSError) as error:
            problem = str(error)
        reports = all_gather_objects((problem, every), self._ranks.group)
        failed = first_problem([report[0] for report in reports])
        if failed is None and any(report[1] != every for report in reports):
            failed = f"ranks passed different `every` to RunLog: {[report[1] for report in reports]}. Pass the same."
        if failed is not None:
            self._close_file()
            raise ValueError(failed)
        assert isinstance(inner, DistAdamW)
        self._optimizer, self._every = inner, every
        self._hooks = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]
        batch_sources.add_reader(self)
        _OPEN[os.path.realpath(path)] = self

    @staticmethod
    def _check(optimizer: Optimizer, every: int) -> None:
        if not isinstance(optimizer, DistAdamW):
            raise ValueError(
                f"RunLog needs a DistAdamW, which counts its applied updates, and got {type(optimizer).__name__}. Pass "
                "the optimizer of this model."
            )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}.")

    def batch(self, batch: Any) -> None:
        """Note a batch of the next update. Local; call it on each rank before each backward pass.

        Not needed under `dist_adamw.prepare`, which knows the batches; if it is called, its batches are logged instead.
        Batches of an update that `step` skips are dropped.

        Args:
            batch: Tensors in dicts, lists and tuples of any depth. See `batch_digest` for what counts.
        """
        self._batches.append(batch_digest(batch))

    def update(self) -> None:
        """Log the update that was just applied, unless that is done. Collective.

        ``optimizer.step()`` does this by itself. Under DeepSpeed ZeRO-1 and ZeRO-2 call it after ``engine.step()``, or
        after ``accelerator.backward``.

        Raises:
            RuntimeError: on every rank: ranks have different parameters, or one cannot read them. Also if a process
                group was created after this log.
        """
        if not self._has_stepped:
            return
        self._has_stepped = False
        explicit, self._batches = self._batches, []
        start, self._start = self._start, None
        if self._optimizer.step_was_skipped:
            return
        self._has_begun = True
        source = batch_sources.source_of(self._optimizer)
        seen = explicit or ([] if source is None else list(source.batch_digests))
        number = self._optimizer.updates
        record = self._record(number, seen, with_parameters=number % self._every == 0)
        if start is not None:
            self._write(start)
        self._write(record)

    def close(self) -> None:
        """Stop logging. Local; call it on every rank. The end of the process does it too."""
        for hook in self._hooks:
            hook.remove()
        batch_sources.remove_reader(self)
        self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # ---------------------------------------------------------------- hooks

    def _before_step(self, *_: Any) -> None:
        """Note the weights before the first update. Collective then."""
        if not (self._has_begun or self._has_stepped or is_capturing()):
            self._start = self._record(self._optimizer.updates, [], with_parameters=True)

    def _after_step(self, *_: Any) -> None:
        """Log an update. Collective."""
        if is_capturing():
            return
        if self._optimizer._is_partitioned:  # DeepSpeed steps once for each group, and copies to the model later
            updates = self._optimizer.updates
            if self._has_stepped and updates > self._stepped_updates and not self._has_warned:
                self._has_warned = True
                self._warn("under DeepSpeed call log.update() after each update: the last one was not logged.")
            self._has_stepped, self._stepped_updates = True, updates
            return
        self._has_stepped = True
        self.update()

    # ---------------------------------------------------------------- records

    def _record(self, number: int, batches: list[Callable[[], int]], *, with_parameters: bool) -> Record | None:
        """Return the record of an update on rank 0, and None on the others. Collective."""
        if world_size() != self._ranks.size:
            raise RuntimeError(
                f"RunLog was made for {self._ranks.size} rank(s), and there are {world_size()} now. Make it after "
                "dist.init_process_group(), and close it before the group is destroyed."
            )
        self._optimizer.wait()  # parameters in flight are partly old
        found: list[int] = []
        sums: list[int] = []
        problem = None
        try:
            self._parameters.read()
            found = [value() for value in batches]
            sums = self._parameters.sums() if with_parameters else []
        except Exception as error:  # must reach the exchange: the other ranks wait there
            problem = error
        shared = sums if self._parameters.are_sharded else []
        numbers, totals = self._exchange.gather(found, shared, problem)
        if not self._ranks.is_main:
            return None
        digests = [as_digest(total) for total in totals or sums]
        header = self._header_now()
        # 0 is for a number that no rank has.
        leaves = [leaf(digest) if digest else b"\0\0" for digest in numbers]
        return Record(number, _root(digests), b"".join(map(leaf, digests)), b"".join(leaves), header)

    def _header_now(self) -> Header:
        names = self._parameters.names
        if self._header is not None and self._header.parameters == names:
            return self._header
        return Header(names, {**_facts(self._ranks, self._optimizer), **self._parameters.facts()})

    def _write(self, record: Record | None) -> None:
        if record is None or self._writer is None:
            return
        try:
            if record.header != self._header:
                self._writer.write(header_line(record.header))
                self._header = record.header
            self._writer.write(record_line(record))
        except OSError as error:
            self._warn(f"update {record.number} is missing in the run log: {error}. Training continues.")

    @staticmethod
    def _warn(text: str) -> None:
        warnings.warn(text, stacklevel=3)


def _root(digests: list[int]) -> bytes:
    """Return 8 bytes that stand for all ``digests``; empty if there are none."""
    data = b"".join(digest.to_bytes(8, "big") for digest in digests)
    return hashlib.blake2b(data, digest_size=8).digest() if digests else b""


def _facts(ranks: Ranks, optimizer: DistAdamW) -> dict[str, Any]:
    """Return what may explain a difference: versions, the machine and the ranks. Local."""
    return {
        "ranks": ranks.size,
        "reproducible": optimizer.reproducible,
        "threads": torch.get_num_threads(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "dist_adamw": __version__,
    }
