"""Run one sequence in both worlds, and judge what came of every act."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.random.compare import differences
from tests.random.script import Act, Sequence
from tests.random.worlds import Ours, Torchs, World

SECONDS = 20.0  # that a rank waits for another one before it calls it a hang
OURS = ("RuntimeError", "ValueError", "TypeError", "CheckpointError", "AgreementError")


@dataclass(frozen=True)
class Failure:
    """A failure: neither torch's result nor an error of ours.

    Attributes:
        kind: "bits": weights, gradients, groups or state are not torch's; "refused": what torch does, without need;
            "unclear": an exception that is no sentence of ours; "changed": a sentence after something was changed;
            "one rank": not all ranks raised; "hang"; "silent": one rank acted differently, and no rank raised;
            "torch refuses": torch raises and ours does not.
        act: Its place in the sequence.
    """

    kind: str
    act: int
    what: str

    def alike(self, other: Failure | None) -> bool:
        """Return whether it is probably the same mistake."""
        if other is None or self.kind != other.kind:
            return False
        return self.kind == "bits" or self.what[:40] == other.what[:40]


@dataclass
class Outcome:
    """The result of a sequence.

    Attributes:
        sentences: The beginning of each sentence that was an answer.
        updates: How many were compared.
        invalid: The line where it ended because that fails with any optimizer, and why.
    """

    failure: Failure | None = None
    sentences: Counter[str] = field(default_factory=Counter)
    updates: int = 0
    invalid: str = ""


@dataclass(frozen=True)
class Raised:
    """An exception, as data."""

    kind: str
    text: str
    where: str  # the file of the innermost frame

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        trace = error.__traceback__
        where = ""
        while trace is not None:
            where = trace.tb_frame.f_code.co_filename
            trace = trace.tb_next
        return cls(type(error).__name__, str(error), where)

    @property
    def is_sentence(self) -> bool:
        """Whether it was written for the user, by us."""
        text = self.text.strip()
        return (
            self.kind in OURS
            and "/dist_adamw/" in self.where
            # The second is torch's own, of its constructor.
            and ((len(text.split()) >= 6 and text.endswith((".", ")"))) or text.startswith("Invalid learning rate: "))
        )

    @property
    def is_of_script(self) -> bool:
        return self.where == "<script>" or "tests/random" in self.where

    @property
    def beginning(self) -> str:
        """Return the text without numbers, to group similar ones."""
        return re.sub(r"\d+", "#", self.text[:70])

    def __str__(self) -> str:
        return f"{self.kind}: {self.text[:300]} [{self.where.rpartition('/')[2]}]"


def attempt(world: World, text: str) -> Raised | None:
    try:
        world.run(text)
    except Exception as error:
        return Raised.of(error)
    return None


def play(sequence: Sequence, folder: Path, group: Any = None) -> Outcome:
    """Run ``sequence`` up to its first failure. Collective on several ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Play(sequence, folder, group).outcome


class _Play:
    def __init__(self, sequence: Sequence, folder: Path, group: Any) -> None:
        self.sequence, self.group = sequence, group
        self.outcome = Outcome()
        self.ours, self.theirs = Ours(sequence, folder, group), Torchs(sequence, folder, group)
        self.risks: list[Act] = []  # since the last update, of both optimizers where there are two
        for i, act in enumerate(sequence.acts):
            self.at = i
            self.outcome.failure = self.run_alone(i) if act.alone else self.do(i, act)
            if self.outcome.failure is not None or self.outcome.invalid or act.alone:
                return

    def exchange(self, mine: Any) -> list[Any]:
        """Return every rank's report. Collective."""
        if self.sequence.ranks == 1:
            return [mine]
        everyone: list[Any] = [None] * self.sequence.ranks
        try:
            dist.all_gather_object(everyone, mine, group=self.group)
        except RuntimeError as error:
            raise TimeoutError(f"act {self.at}: the other rank hangs, and this one has: {mine}") from error
        return everyone

    def do(self, i: int, act: Act) -> Failure | None:
        if act.may_refuse:
            self.risks.append(act)
        before = self.updates()
        error = attempt(self.ours, act.text)
        errors = self.exchange(error)
        raised = [e for e in errors if e is not None]
        if raised and len(raised) < len(errors):
            return Failure("one rank", i, " | ".join(map(str, errors)))
        if error is None:
            return self.check_done(i, act, before)
        if error.is_of_script or not self.risks:
            return self.check_both_refuse(i, act, error)
        return self.check_refused(i, act, error)

    def updates(self) -> list[int]:
        return [o.updates for world in (self.ours, self.theirs) if (o := world.names["optimizer"]) is not None]

    def check_done(self, i: int, act: Act, before: list[int]) -> Failure | None:
        theirs = attempt(self.theirs, act.text)
        if theirs is not None:
            if theirs.is_of_script and act.may_refuse:
                return None
            return Failure("torch refuses", i, str(theirs))
        is_update = act.label == "step" and self.updates() != before  # without a gradient nothing is looked at
        if act.label == "step second" or (is_update and self.ours.names["second"] is None):
            self.risks = []
        if act.label == "step":
            self.outcome.updates += 1
            ours, torchs = (now - then for now, then in zip(self.updates(), before, strict=True))
            if ours != torchs:
                return Failure("bits", i, f"updates grew by {ours}, torch's by {torchs}")
        inexact = any(optimizer.inexact for optimizer in self.theirs.optimizers)
        return self.look(i) if act.look or inexact else None

    def look(self, i: int, kind: str = "bits", what: str = "", gradients: bool = True) -> Failure | None:
        found = self.exchange(differences(self.ours, self.theirs, gradients=gradients))
        texts = [f"rank {rank}: {', '.join(texts)}" for rank, texts in enumerate(found) if texts]
        return Failure(kind, i, f"{what}{'; '.join(texts)}") if texts else None

    def check_both_refuse(self, i: int, act: Act, error: Raised) -> Failure | None:
        """Torch, too, must raise: with our sentence, or as it does itself."""
        if error.is_sentence and (failure := self.look(i, "changed", f"{error} ", gradients=False)) is not None:
            return failure
        theirs = attempt(self.theirs, act.text)
        alike = theirs is not None and theirs.kind == error.kind
        if error.is_of_script:
            if alike:
                self.outcome.invalid = f"{act.text}: {theirs}"
                return None
            return Failure("unclear", i, str(error))
        if theirs is None or not (error.is_sentence or (alike and error.where == theirs.where)):
            return Failure("refused" if error.is_sentence else "unclear", i, str(error))
        self.outcome.sentences[error.beginning] += 1
        if ".step(" in act.text:  # torch has updated the groups before the one that it refuses
            self.outcome.invalid = f"{act.text}: {theirs}"
            return None
        return self.look(i, "changed", f"{error} ")

    def check_refused(self, i: int, act: Act, error: Raised) -> Failure | None:
        """Check that weights and state have not changed, undo the cause, and check that training continues."""
        if not error.is_sentence:
            return self.check_both_refuse(i, act, error)
        # A closure has been called by then, and a backward pass has been refused half-way.
        if (failure := self.look(i, "changed", f"{error} ", gradients=False)) is not None:
            return failure
        self.outcome.sentences[error.beginning] += 1
        risks, self.risks = self.risks, []
        lines = ["optimizer.zero_grad()", "if second is not None: second.zero_grad()", "model.zero_grad()"]
        lines += [risk.undo for risk in reversed(risks) if risk.undo]
        for line in lines:
            problems = self.exchange([attempt(world, line) for world in (self.ours, self.theirs)])
            if any(problem is not None for pair in problems for problem in pair):
                return Failure("unclear", i, f"{line} after {error}: {problems}")
        return self.look(i, "changed", f"{error} ")

    def run_alone(self, i: int) -> Failure | None:
        """Rank 1 alone does act ``i``. From there on this is no training of torch's, and every rank must say so soon.

        Ranks do not wait for each other here, as they would not in a training script.
        """
        acts = self.sequence.acts[i:]
        self.ours.is_alone = True
        error = attempt(self.ours, acts[0].text) if self.ours.rank == 1 else None
        for act in acts[1:]:
            error = error or attempt(self.ours, act.text)
        errors = self.exchange(error)
        raised = [e for e in errors if e is not None]
        text = " | ".join(map(str, errors))
        if not raised:
            return Failure("silent", i, acts[0].text)
        if len(raised) < len(errors):
            return Failure("one rank", i, text)
        self.outcome.sentences.update(e.beginning for e in raised[:1])
        return None if all(e.is_sentence for e in raised) else Failure("unclear", i, text)


# ---------------------------------------------------------------- on several ranks

_groups: list[Any] = []


class SequenceFailedError(AssertionError):
    """Fail on every rank, so that the pool of ranks, whose messages may be out of step, is discarded."""


def play_on_ranks(sequences: list[Sequence], folder: Path) -> list[Outcome]:
    """Run ``sequences``. Collective.

    Raises:
        SequenceFailedError: says which one, and how, as JSON.
    """
    if not _groups:
        _groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=SECONDS)))
    outcomes = []
    for n, sequence in enumerate(sequences):
        try:
            outcome = play(sequence, folder, _groups[0])
        except TimeoutError as error:
            raise SequenceFailedError(json.dumps([n, "hang", 0, str(error)])) from error
        if (failure := outcome.failure) is not None:
            raise SequenceFailedError(json.dumps([n, failure.kind, failure.act, failure.what]))
        outcomes.append(outcome)
    torch.manual_seed(0)
    return outcomes
