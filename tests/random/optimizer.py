"""``python -m tests.random.optimizer``: see ``--help``. Its exit status is 1 when something differed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from tqdm import tqdm

from tests.random.actions import BETWEEN, GRADIENTS, draw
from tests.random.play import Failure, Outcome, play, play_on_ranks
from tests.random.script import Sequence
from tests.random.shrink import shrink
from tests.ranks import RankError, end_pool, run_ranks_within

TOGETHER = 20  # sequences in a job of several ranks
TIMEOUT = 120.0  # of such a job


@dataclass
class Tally:
    """The results of many sequences."""

    sequences: int = 0
    updates: int = 0
    invalid: int = 0
    sentences: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Sequence, Failure]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.sequences += 1
        self.updates += outcome.updates
        self.sentences += outcome.sentences
        self.invalid += bool(outcome.invalid)

    def join(self, other: Tally) -> None:
        self.sequences += other.sequences
        self.updates += other.updates
        self.invalid += other.invalid
        self.sentences += other.sentences
        self.failures += other.failures


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def outcome_of(sequence: Sequence, folder: Path) -> Outcome:
    """Run one sequence, on as many ranks as it wants."""
    return outcomes_of([sequence], folder)[0]


def outcomes_of(sequences: list[Sequence], folder: Path) -> list[Outcome]:
    """Run sequences; after one that fails on several ranks, the others are run in another job."""
    if sequences[0].ranks == 1:
        return [play(sequence, folder) for sequence in sequences]
    try:
        results = run_ranks_within(TIMEOUT, sequences[0].ranks, play_on_ranks, sequences, folder)
        return results[0]
    except RankError as error:
        n, failure = _failure_of(error)
        if n is None and len(sequences) > 1:  # a hang, who knows in which
            return [outcome for sequence in sequences for outcome in outcomes_of([sequence], folder)]
        n = n or 0
        before = outcomes_of(sequences[:n], folder) if n else []
        after = outcomes_of(sequences[n + 1 :], folder) if n + 1 < len(sequences) else []
        return [*before, Outcome(failure), *after]


def _failure_of(error: RankError) -> tuple[int | None, Failure]:
    for text in error.errors.values():
        if text.startswith("SequenceFailedError: "):
            n, kind, act, what = json.loads(text.partition(": ")[2])
            return n, Failure(kind, act, what)
    kind = "hang" if any(text.startswith("Timeout") for text in error.errors.values()) else "error"
    return None, Failure(kind, 0, " | ".join(text[:300] for text in error.errors.values()))


def judge(sequences: list[Sequence], folder: Path, progress: Callable[[int], object] | None = None) -> Tally:
    """Run all of them."""
    tally = Tally()
    alone = [s for s in sequences if any(act.alone for act in s.acts)]
    others = [s for s in sequences if not any(act.alone for act in s.acts)]
    size = 1 if sequences[0].ranks == 1 else TOGETHER
    batches = [others[i : i + size] for i in range(0, len(others), size)] + [[s] for s in alone]
    for batch in batches:
        outcomes = outcomes_of(batch, folder)
        if batch[0] in alone:
            end_pool(batch[0].ranks)
        for sequence, outcome in zip(batch, outcomes, strict=True):
            tally.add(outcome)
            if outcome.failure is not None:
                tally.failures.append((sequence, outcome.failure))
        if progress is not None:
            progress(len(batch))
    return tally


def shortest(sequence: Sequence, failure: Failure, folder: Path, seconds: float = 30.0) -> tuple[Sequence, Failure]:
    """Return a shorter sequence that fails in the same way."""
    last = [failure]

    def fails(candidate: Sequence) -> bool:
        found = outcome_of(candidate, folder).failure
        if failure.alike(found):
            assert found is not None
            last[0] = found
            return True
        return False

    acts = sequence.acts[: failure.act + 1] if failure.kind != "hang" else sequence.acts
    if not fails(sequence.with_acts(acts)):
        return sequence, failure
    acts = shrink(acts, lambda some: fails(sequence.with_acts(some)), seconds=seconds)
    looking = [replace(act, look=True) for act in acts]
    if fails(sequence.with_acts(looking)):
        acts = looking
    sequence = sequence.with_acts(acts)
    for simpler in _simpler(sequence):
        if fails(simpler):
            return _also_simpler(simpler, fails), last[0]
    return _also_simpler(sequence, fails), last[0]


def _simpler(sequence: Sequence) -> list[Sequence]:
    plain = {"master_dtype": sequence.options["master_dtype"]} if "master_dtype" in sequence.options else {}
    groups = [(names, {"lr": 0.01, "eps": 0.1}) for names, _ in sequence.groups]
    return [replace(sequence, options={}, groups=groups), replace(sequence, options=plain, groups=groups)]


def _also_simpler(sequence: Sequence, fails: Callable[[Sequence], bool]) -> Sequence:
    for name in list(sequence.params):
        params = {other: spec for other, spec in sequence.params.items() if other != name}
        groups = [([n for n in names if n != name], options) for names, options in sequence.groups]
        candidate = replace(sequence, params=params, groups=[group for group in groups if group[0]])
        if params and candidate.groups and fails(candidate):
            sequence = candidate
    return sequence


def report(tally: Tally, folder: Path, shrunk: int, seconds: float) -> None:
    kinds = Counter(failure.kind for _, failure in tally.failures)
    print(f"{tally.sequences:,} sequences, {tally.updates:,} updates compared, {len(tally.failures):,} differ", end="")
    print(f": {dict(kinds)}" if kinds else "")
    print(f"  {tally.invalid:,} ended early, at a line that fails with any optimizer")
    for sentence, count in tally.sentences.most_common():
        print(f"  refused {count:6,} times: {sentence}")
    seen: Counter[str] = Counter()
    for sequence, failure in tally.failures:
        about = f"{failure.kind}, {sequence.acts[min(failure.act, len(sequence.acts) - 1)].label}"
        seen[about] += 1
    for about, count in seen.most_common():
        print(f"  {count:6,} {about}")
    for sequence, failure in tally.failures[:100]:
        print(
            f"  sequence {sequence.number}, {sequence.way}: {failure.kind} at act {failure.act}: {failure.what[:240]}"
        )
    causes: Counter[str] = Counter()
    for sequence, failure in tally.failures[:shrunk]:
        short, how = shortest(sequence, failure, folder, seconds)
        cause = f"{how.kind}: " + ", ".join(
            dict.fromkeys(act.label for act in short.acts if act.label not in ("backward", "step", "zero_grad"))
        )
        causes[cause] += 1
        if causes[cause] <= 2:
            print(f"\n{'-' * 100}\n{short.readable()}\n=> {how.kind}: {how.what}")
    if causes:
        print("\ncauses, shrunk:")
        for cause, count in causes.most_common():
            print(f"  {count:4} {cause}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.random.optimizer",
        description="Random sequences of what users do to an optimizer, with DistAdamW and with torch.optim.AdamW.",
    )
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first sequence")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--shrink", type=int, default=20, help="how many failures are shrunk and printed")
    parser.add_argument("--seconds", type=float, default=30.0, help="for shrinking each")
    parser.add_argument("--without", default="", help="acts to leave out, by the names in actions.py: read,clip")
    options = parser.parse_args()
    without = frozenset(filter(None, options.without.split(",")))
    if unknown := without - {name for _, name in [*BETWEEN, *GRADIENTS]} - {"alone"}:
        parser.error(f"--without: no such acts: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, _interrupt)  # what has been found by then is shown
    begin = time.monotonic()
    numbers = range(options.first, options.first + options.sequences)
    with tempfile.TemporaryDirectory() as name, tqdm(total=len(numbers), unit=" sequences", mininterval=5) as bar:
        folder = Path(name)
        tally = Tally()
        size = 100 if options.ranks == 1 else TOGETHER
        try:
            for start in range(numbers.start, numbers.stop, size):
                some = range(start, min(start + size, numbers.stop))
                tally.join(judge([draw(options.seed, i, options.ranks, without) for i in some], folder, bar.update))
                bar.set_postfix(differ=len(tally.failures))
        except KeyboardInterrupt:
            print("interrupted")
        bar.close()
        report(tally, folder, options.shrink, options.seconds)
    print(f"{time.monotonic() - begin:.0f} s")
    return int(bool(tally.failures))


if __name__ == "__main__":
    raise SystemExit(main())
