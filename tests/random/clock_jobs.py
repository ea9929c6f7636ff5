"""Runs one job of a random program, as a user would have written it, and writes down what happened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from dist_adamw import CheckpointError, CyclicLRWithRestarts, DistAdamW, prepare, rest_of_epoch
from dist_adamw.wrappers import unwrap
from tests.random.clock_data import Spec, dataset_of, draws_of, ids_of, inputs_of, loader_of
from tests.random.clock_programs import dispatches, jobs_of
from tests.random.clock_truth import Facts, Key, Log
from tests.ranks import _forget_accelerate

CANNOT_REACH = ("of which only whole batches", "and even_batches=False gives")


class Stop(Exception):  # noqa: N818 - the job is stopped
    """The job was saved, and ends here."""


def run_job(program: dict[str, Any], number: int, folder: str) -> Log:
    """Run the ``number``-th job of a program on this rank; its ``resume`` actions separate jobs."""
    _forget_accelerate()
    torch.manual_seed(number)
    job = Job(program, number, folder)
    job.run()
    return job.log


class Job:
    """The objects of a training script, and a log of what it does with them."""

    def __init__(self, program: dict[str, Any], number: int, folder: str) -> None:
        self.program, self.number, self.folder = program, number, folder
        self.actions = jobs_of(program)[number]
        self.is_last = number == len(jobs_of(program)) - 1
        self.saved = False
        self.log: Log = []
        self.passes = 0
        self.sources: dict[int, Any] = {}  # what each pass is a loop over
        self.data: Spec = dict(program["data"])
        self.accumulation = program["accumulation"]
        if number:
            resume = self.actions.pop(0)[1]
            self.accumulation = resume["accumulation"]
            self.data["rows"] = resume.get("rows", self.data["rows"])
            self.data["batch"] = resume.get("batch", self.data["batch"])
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._build()
        if number:
            self.accelerator.load_state(f"{folder}/{number - 1}")
            self.log.append(("clock", self.scheduler.samples))

    def _build(self) -> None:
        program = self.program
        self.accelerator = Accelerator(
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=self.accumulation, sync_with_dataloader=not program.get("cross")
            ),
            dataloader_config=DataLoaderConfiguration(
                split_batches=program.get("split", False),
                dispatch_batches=program.get("dispatch"),
                even_batches=program.get("even", True),
            ),
        )
        model: Any = nn.Linear(2, 1)
        optimizer: Any
        if program["max_norm"] is None and program.get("optimizer") == "AdamW":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        else:
            optimizer = DistAdamW(model.parameters(), lr=1e-4, max_grad_norm=program["max_norm"])
        scheduler = CyclicLRWithRestarts(optimizer, epoch_size=program["epoch_size"], restart_period=1)
        self.dataset = dataset_of(self.data)
        loader = loader_of(self.data, self.dataset)
        self.model, self.optimizer, self.loader, self.scheduler = prepare(
            self.accelerator, model, optimizer, loader, scheduler
        )
        self.hand_step = 0
        self.open: Iterator[Any] | None = None
        self.second: Any = None
        if (second := program.get("second")) is not None:
            self.second_data = {**self.data, **second}
            self.second_set = self.dataset if second["rows"] is None else dataset_of(self.second_data)
            if second["rows"] is None:
                self.second_data["rows"] = self.data["rows"]
            self.second = self.accelerator.prepare(loader_of(self.second_data, self.second_set))
        evaluated = {"kind": "map", "rows": 7, "batch": 4, "drop_last": False, "sampler": "sequential", "form": "row"}
        if "eval" in str(program["actions"]):
            self.eval_loader = self.accelerator.prepare(loader_of(evaluated, dataset_of(evaluated)))

    # ---------------------------------------------------------------- actions

    def run(self) -> None:
        """Do all actions; save at the end, where another job follows."""
        with contextlib.suppress(Stop):
            for name, *arguments in self.actions:
                getattr(self, name)(*arguments)
        self.clock()
        if not self.is_last and not self.saved:
            self.save()

    def epoch(self, options: dict[str, Any]) -> None:
        """A loop over a loader, or a part of one."""
        loader, of = self.loader, options.get("of", "first")
        number, batches = self._pass(of, options.get("how", "loader"))
        if of == "second":
            loader, self.open = self.second, None
        at: dict[int, list[Any]] = {}
        for k, name, *arguments in options.get("at", []):
            at.setdefault(k, []).append((name, *arguments))
        with self._refusals():
            for k, batch in enumerate(batches):
                key = self._out(number, k, batch)
                last = self.accelerator.gradient_state.end_of_dataloader
                self._micro_batch(batch, key, last, at.get(k, []))
                if k + 1 == options.get("stop"):
                    break
            else:
                self.log.append(("end", number))
        del batches, loader
        if self.program["steps"] == "epoch":
            self.clock()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """End the job where the rest of the epoch is refused on these ranks."""
        try:
            yield
        except CheckpointError as error:
            if not any(sentence in str(error) for sentence in CANNOT_REACH):
                raise
            self.log.append(("refused",))
            raise Stop from error

    def _pass(self, of: str, how: Any) -> tuple[int, Any]:
        """Begin a loop; return its number, and the iterable."""
        loader = self.loader if of == "first" else self.second
        data, dataset = (self.data, self.dataset) if of == "first" else (self.second_data, self.second_set)
        whole = self._pass_rows(of)
        batches, start = loader, 0 if how != "rest" else None
        if how == "rest":
            batches = rest_of_epoch(loader)
        elif how != "loader":
            batches = skip_first_batches(loader, how[1])
            # Where rank 0 draws for all, it leaves out lists of indices: one rank's batches.
            start = how[1] * (data["batch"] if dispatches(self.program) and data["kind"] == "map" else whole)
        self.passes += 1
        self.sources[self.passes] = loader if how == "rest" else batches
        is_map = data["kind"] == "map"
        once = not is_map or data["sampler"] not in ("replacement", "weighted")
        repeats = self.accelerator.num_processes > 1 and not data["drop_last"]
        is_uneven = is_map and not dispatches(self.program) and not self.program.get("even", True)
        part = whole // self.accelerator.num_processes if is_uneven and not data["drop_last"] else 0
        facts = Facts(
            draws_of(data, dataset.rows), repeats and not is_uneven, start, once, of, 0 if is_map else whole, part
        )
        self.log.append(("pass", self.passes, facts))
        return self.passes, batches

    def _pass_rows(self, of: str) -> int:
        """Rows of one micro-batch on all ranks."""
        batch = (self.data if of == "first" else self.second_data)["batch"]
        return batch if self.program.get("split") else batch * self.accelerator.num_processes

    def peek(self) -> None:
        """Look at a batch before training."""
        number, batches = self._pass("first", "loader")
        self._out(number, 0, next(iter(batches)))

    def overfit(self, steps: int) -> None:
        """One batch, trained on again and again."""
        number, batches = self._pass("first", "loader")
        batch = next(iter(batches))
        key = self._out(number, 0, batch)
        for _ in range(steps):
            with self._accumulating():
                self._backward([(batch, key)])
                self._update()

    def grow(self, rows: int) -> None:
        """Add rows to the data set."""
        self.dataset.rows += rows

    def again(self, rows: int | None, batch: int) -> None:
        """Make the training loader again: over the same data set, or one of so many rows."""
        self.data.update(batch=batch, rows=rows or self.dataset.rows)
        if rows is not None:
            self.dataset = dataset_of(self.data)
        self.loader = self.accelerator.prepare_data_loader(loader_of(self.data, self.dataset))

    def accumulate(self, steps: int) -> None:
        """Change the accumulation."""
        self.accelerator.gradient_accumulation_steps = self.accumulation = steps

    def eval(self, mode: str, stop: int | None) -> None:
        """Evaluate with no_grad around the loop ("outside"), in its body ("inside"), or not at all ("none")."""
        with torch.no_grad() if mode == "outside" else contextlib.nullcontext():
            for k, batch in enumerate(self.eval_loader):
                with torch.no_grad() if mode == "inside" else contextlib.nullcontext():
                    self._loss(batch)
                if k + 1 == stop:
                    break

    def zero(self) -> None:
        """Drop the gradients, by the optimizer inside Accelerate's, which does so at once."""
        unwrap(self.optimizer).zero_grad()
        self.log.append(("zero",))

    def zero_model(self) -> None:
        """Drop the gradients as older scripts do."""
        self.model.zero_grad()
        self.log.append(("zero",))

    def probe(self) -> None:
        """A backward pass that reaches no parameter of the optimizer."""
        (torch.ones(3, requires_grad=True) * 2).sum().backward()

    def save(self) -> None:
        """Save the job."""
        self.clock()
        self.accelerator.save_state(f"{self.folder}/{self.number}")
        self.saved = True

    def clock(self) -> None:
        """Call the scheduler, and write down what it says."""
        self.scheduler.step()
        self.log.append(("clock", self.scheduler.samples))

    # ---------------------------------------------------------------- one micro-batch

    def _out(self, number: int, k: int, batch: Any) -> Key:
        is_last = bool(self.sources[number].end_of_dataloader)
        self.log.append(("out", number, k, ids_of(batch), is_last))
        return number, k

    def _next_of_second(self) -> tuple[Any, Key]:
        """Return a batch of the second loader, which restarts when it is exhausted."""
        for _ in range(2):
            if self.open is None:
                self.open_number, batches = self._pass("second", "loader")
                self.open, self.open_k = iter(batches), -1
            if (batch := next(self.open, None)) is not None:
                self.open_k += 1
                return batch, self._out(self.open_number, self.open_k, batch)
            self.log.append(("end", self.open_number))
            self.open = None
        raise AssertionError("the second loader is empty")

    def _micro_batch(self, batch: Any, key: Key, last: bool, events: list[Any]) -> None:
        names = {name: arguments for name, *arguments in events}
        for name, *arguments in events:
            if name in ("grow", "accumulate", "probe", "eval_top"):
                getattr(self, name.removesuffix("_top"))(*arguments)
            if name == "stop" and arguments == ["top"]:
                self.log.append(("top",))
                self.save()
                raise Stop
        if "continue" in names:
            return
        if "pieces" in names:
            for part in inputs_of(batch).chunk(*names["pieces"]):
                with self._accumulating():
                    self._backward([(part, key)])
                    self._update(last)
            return
        with self._accumulating():
            if "continue_in" in names:
                self._loss(batch)
                return
            own = not self.accelerator.sync_gradients and self.program["loop"] == "accumulate"
            if own and names.get("continue_on") == [self.rank]:
                self._loss(batch)  # DDP may rebuild its buckets in a forward pass, on all ranks together
                return
            batches = [(batch, key)]
            if "joint" in names and self.second is not None:
                batches.append(self._next_of_second())
            if "grad" in names:
                inner = self.accelerator.unwrap_model(self.model)
                torch.autograd.grad(inner(_scaled(batch)).square().mean(), list(inner.parameters()))
            if "sam" in names and self._syncs(last):  # a first pass, whose gradients only move the weights
                with self.accelerator.no_sync(self.model):
                    self._backward(batches)
                self.zero()
            bad = "inf" in names and names["inf"] in ([None], [self.rank])
            self._backward(batches, bad, *names.get("cut", [1]))
            if "zero" in names and not self._syncs(last):
                self.zero()
            if "zero_model" in names and not self._syncs(last):
                self.zero_model()
            self._update(last)
        if "twice" in names and self._syncs(last):
            self._backward(batches)
            self._update(last)
        if "also" in names and self.second is not None:
            more = self._next_of_second()
            with self._accumulating():
                self._backward([more])
                self._update()
        for name, *arguments in events:
            if name == "eval_end":
                self.eval(*arguments)
            if name == "clock":
                self.clock()
            if name == "stop" and arguments == ["end"]:
                self.save()
                raise Stop

    def _accumulating(self) -> Any:
        if self.program["loop"] == "accumulate":
            return self.accelerator.accumulate(self.model)
        self.hand_step += 1
        return contextlib.nullcontext()

    def _syncs(self, last: bool) -> bool:
        """Whether an update follows this micro-batch."""
        if self.program["loop"] == "accumulate":
            return bool(self.accelerator.sync_gradients)
        return last or self.hand_step % self.accumulation == 0

    def _loss(self, batch: Any) -> Tensor:
        return self.model(_scaled(batch)).square().mean()

    def _backward(self, batches: list[tuple[Any, Key]], bad: bool = False, pieces: int = 1) -> None:
        """Add up the gradients of batches: in one backward pass, or each in so many."""
        keys = [key for _, key in batches]
        if pieces == 1:
            rows = torch.cat([_scaled(batch) for batch, _ in batches])
            loss = self.model(rows).square().mean()
            self.accelerator.backward(loss * torch.inf if bad else loss)
            self.log.append(("backward", keys, bad))
            return
        parts = [part for batch, _ in batches for part in _scaled(batch).chunk(pieces)]
        for i, part in enumerate(parts):
            final = i == len(parts) - 1 and self.accelerator.sync_gradients
            with contextlib.nullcontext() if final else self.accelerator.no_sync(self.model):
                loss = self.model(part).square().mean() / len(parts)
                self.accelerator.backward(loss * torch.inf if bad else loss)
        self.log.append(("backward", keys, bad))

    def _update(self, last: bool = False) -> None:
        """Do what a script does after each backward pass."""
        by_hand = self.program["loop"] == "hand"
        if by_hand and not self._syncs(last):
            return
        self.optimizer.step()
        syncs = self.accelerator.sync_gradients
        if syncs:
            self.log.append(("step",))
        steps = self.program["steps"]
        if steps in ("each", "twice") or (steps == "sync" and syncs):
            self.clock()
        if steps == "twice":
            self.clock()
        self.optimizer.zero_grad()
        if syncs:
            self.log.append(("zero",))


def _scaled(batch: Any) -> Tensor:
    return inputs_of(batch) / 64
