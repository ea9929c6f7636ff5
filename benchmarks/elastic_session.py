"""Record one elastic job with killed ranks and machines that leave and join, next to an undisturbed job.

Run from the repository's root: ``python -m benchmarks.elastic_session --csv r.csv --png docs/elastic.png``. With
``--draw`` only the picture is drawn, from the table. "Machines" are launchers on this machine, each with an address
of its own. All that is drawn is what the job wrote: its ``history.csv`` and, of its starts, its log.

With ``--reproducible`` the job is shorter, has dropout and ``DistAdamW(reproducible=True)``, and the exit status is 1
if one bit of a loss or of the final weights differs.
"""

from __future__ import annotations

import argparse
import csv
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.integration.agents import ELASTIC, Agent, rows, wait_until

JOB = [
    *["--config", str(ROOT / "configs/train/small.yaml"), "--recipe.global_batch", "12", "--recipe.micro_batch", "1"],
    *["--model", '{"layers": 2, "heads": 4, "width": 64, "context": 64}', "--text.max_bytes", "200000"],
    *["--recipe.restart_period", "0.4", "--recipe.warmup_samples", "240", "--run.tracker", "none"],
    *["--run.save_every", "480", "--run.validate_every", "0", "--recipe.lr", "3e-3"],
]
REPRODUCIBLE = [
    *["--recipe.reproducible", "true", "--model.dropout", "0.1"],
    *["--text.max_bytes", "60000", "--run.save_every", "240"],
]
TIMEOUT = 900.0
DIGEST = re.compile(r"sha256 of the weights after (\d+) updates: (\w{64})")
START = re.compile(r"(?:resuming from \S*sample-(\d+)\n(?:.*\n)*?)?global batch .* x (\d+) ranks")
COLOURS = {1: "#f3ecf7", 2: "#e3eef4", 3: "#e9f3df", 4: "#fbead2"}
MARKS = {"rank killed": "#c0392b", "machine lost": "#7d3c98", "machine joins": "#1e8449"}


@dataclass(frozen=True, slots=True)
class Update:
    """One update of the session: its row, its ranks, the event after it, and the undisturbed jobs' values.

    Attributes:
        event: One of `MARKS`, or a resume; several are separated by semicolons.
    """

    samples: int
    loss: float
    lr: float
    weight_decay: float
    ranks: int
    loss_one_rank: float
    loss_two_ranks: float
    event: str


class Session:
    """The job, its launchers, and the failures to inject.

    Args:
        folder: For all that is written.
        job: The options of the job.
    """

    def __init__(self, folder: Path, job: Sequence[str]) -> None:
        self.folder, self.job = folder, job
        self.out = folder / "session"
        self.agents: list[Agent] = []
        self.events: list[tuple[int, str]] = []

    def join(self, number: int, ranks: int) -> Agent:
        """Start a launcher."""
        port = 29700  # fixed, as it would be on machines of their own
        variables = {"NNODES": "1:3", "RDZV": f"127.0.0.1:{port}", "ADDRESS": f"127.0.0.{number}", "NPROC": str(ranks)}
        variables |= {"WAIT": "1", "GONE": "3"}
        command = [*ELASTIC, *self.job, "--out", str(self.out)]
        self.agents.append(Agent(command, self.folder / f"log{number}", variables))
        return self.agents[-1]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a line in the job's log."""
        wait_until(condition, what, self.agents[:1], TIMEOUT)

    def starts(self) -> list[tuple[int, int]]:
        """Return for each start of the job the samples it continued from, and its ranks."""
        found = START.findall(self.agents[0].text)
        return [(int(samples or 0), int(ranks)) for samples, ranks in found]

    def kill(self, agent: Agent, rank: int) -> None:
        """Kill a rank, and wait until the job continues."""
        before = len(self.starts())
        agent.signal_ranks(signal.SIGKILL, only=rank)
        self._note("rank killed")
        self._goes_on(before)

    def lose(self, agent: Agent) -> None:
        """Kill a launcher and its ranks without a signal to the job, and wait until the job continues."""
        before = len(self.starts())
        agent.close()
        self._note("machine lost")
        self._goes_on(before)

    def add(self, number: int, ranks: int) -> Agent:
        """Let a launcher join, and wait until the job continues."""
        before = len(self.starts())
        agent = self.join(number, ranks)
        self._goes_on(before)
        self.events.append((self.starts()[-1][0], "machine joins"))
        return agent

    def _note(self, event: str) -> None:
        self.events.append((int((self.out / "history.csv").read_text().splitlines()[-1].split(",")[0]), event))

    def _goes_on(self, starts: int) -> None:
        self.wait(lambda: len(self.starts()) > starts, "the job does not go on")

    def close(self) -> None:
        for agent in self.agents:
            agent.close()


def record(folder: Path, *, reproducible: bool) -> list[Update]:
    """Run the job undisturbed, on one rank and on two, and with failures.

    Raises:
        RuntimeError: it failed; or it is reproducible, and some bit differs.
    """
    job = JOB + REPRODUCIBLE * reproducible
    launchers = {"one": [sys.executable, str(ROOT / "launch/train.py")], "two": [str(ROOT / "launch/torchrun.sh")]}
    for name, launcher in launchers.items():
        agent = Agent([*launcher, *job, "--out", str(folder / name)], folder / f"log-{name}", {"NPROC": "2"})
        try:
            if agent.wait(TIMEOUT):
                raise RuntimeError(agent.text)
        finally:
            agent.close()
    session = Session(folder, job)
    total = rows(folder / "one")

    def reach(share: float) -> None:
        session.wait(lambda: rows(session.out) >= share * total, f"{share:.0%} not reached")

    try:
        first = session.join(1, ranks=2)
        reach(0.12)
        session.kill(first, rank=1)
        reach(0.25)
        second = session.add(2, ranks=2)
        reach(0.45)
        session.kill(second, rank=3)
        reach(0.55)
        session.lose(second)
        reach(0.7)
        session.add(3, ranks=1)
        if first.wait(TIMEOUT):
            raise RuntimeError(first.text)
        updates = _updates(session)
        if reproducible:
            _check_bits(updates, [first.text, *((folder / f"log-{name}").read_text() for name in launchers)])
        return updates
    finally:
        session.close()


def _check_bits(updates: Sequence[Update], logs: Sequence[str]) -> None:
    for update in updates:
        if not update.loss == update.loss_one_rank == update.loss_two_ranks:
            raise RuntimeError(f"the losses differ: {update}")
    digests = {digest for log in logs for digest in DIGEST.findall(log)[-1:]}
    if len(digests) != 1:
        raise RuntimeError(f"the weights differ, or have no hash: {digests}")
    print("in all three jobs, after {} updates the sha256 of the weights is {}".format(*digests.pop()))


def _updates(session: Session) -> list[Update]:
    starts = session.starts()
    notes: dict[int, list[str]] = {}
    for samples, event in [*session.events, *((samples, f"resumed on {n} ranks") for samples, n in starts[1:])]:
        notes.setdefault(samples, []).append(event)
    found = []
    histories = [_history(out) for out in (session.out, session.folder / "one", session.folder / "two")]
    for ours, one, two in zip(*histories, strict=True):
        if any(ours[key] != other[key] for key in ("samples", "lr", "weight_decay") for other in (one, two)):
            raise RuntimeError(f"the schedules differ: {ours} is not {one} and {two}")
        samples = int(ours["samples"])
        ranks = next(ranks for begun, ranks in reversed(starts) if begun < samples)
        event = "; ".join(notes.get(samples, []))
        found.append(_update({**ours, "loss_one_rank": one["loss"], "loss_two_ranks": two["loss"]}, ranks, event))
    return found


def _update(row: Mapping[str, str], ranks: int, event: str) -> Update:
    return Update(
        samples=int(row["samples"]),
        loss=float(row["loss"]),
        lr=float(row["lr"]),
        weight_decay=float(row["weight_decay"]),
        ranks=ranks,
        loss_one_rank=float(row["loss_one_rank"]),
        loss_two_ranks=float(row["loss_two_ranks"]),
        event=event,
    )


def _history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open() as file:
        return list(csv.DictReader(file))


def write(path: Path, updates: Sequence[Update]) -> None:
    """Write the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Update)], lineterminator="\n")
        writer.writeheader()
        for update in updates:
            row = asdict(update)
            writer.writerow({k: repr(v) if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> list[Update]:
    """Read the table."""
    with path.open() as file:
        return [_update(row, int(row["ranks"]), row["event"]) for row in csv.DictReader(file)]


def draw(path: Path, updates: Sequence[Update]) -> None:
    """Draw loss, its difference from an undisturbed one, and lr over samples; bands are numbers of ranks."""
    from matplotlib.figure import Figure

    samples = [update.samples for update in updates]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    loss, difference, lr = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1.8, 1.8])
    for axis in (loss, difference, lr):
        _bands(axis, updates, labelled=axis is loss)
        axis.spines[["top", "right"]].set_visible(False)
    loss.plot(samples, [update.loss for update in updates], color="#58a6d1", linewidth=2.6, label="this job")
    one = [update.loss_one_rank for update in updates]
    loss.plot(samples, one, color="black", linewidth=0.6, label="one rank, undisturbed")
    loss.set_ylabel("training loss, nats per byte")
    ours, two = (_differences([getattr(u, name) for u in updates], one) for name in ("loss", "loss_two_ranks"))
    difference.plot(samples, two, color="#e0912f", linewidth=2.2, label="two ranks, undisturbed")
    difference.plot(samples, ours, color="#0b6e99", linewidth=0.9, label="this job")
    difference.set_ylabel("difference from\none rank, relative")
    difference.set_yscale("symlog", linthresh=1e-9)  # it has a zero
    difference.set_ylim(-3e-10, 1e-3)
    difference.set_yticks([0, 1e-9, 1e-7, 1e-5, 1e-3])
    difference.legend(loc="upper right", ncols=2, framealpha=1.0, fontsize=9)
    lr.plot(samples, [update.lr for update in updates], color="#0b6e99", linewidth=1.6)
    lr.set_ylabel("lr")
    lr.set_xlabel("samples (a colour begins at the checkpoint that the ranks went on from)")
    loss.set_xlim(0, samples[-1])
    loss.legend(loc="upper right", framealpha=1.0, fontsize=9)
    events = [event for update in updates for event in update.event.split("; ")]
    told = ", ".join(f"{events.count(event)} x {event}" for event in MARKS)
    loss_too = "to the last bit" if max(ours) == 0 else f"within {max(ours):.1e}"
    same = f"lr and weight decay are the same as undisturbed, the loss {loss_too}"
    figure.suptitle(f"One job of {len(updates)} updates: {told}.\nEvery update is there once; {same}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _differences(losses: Sequence[float], expected: Sequence[float]) -> list[float]:
    """Return relative differences."""
    return [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]


def _bands(axis: Any, updates: Sequence[Update], *, labelled: bool) -> None:
    """Colour each start's part of the curve, and mark the event that ended it."""
    resumes = [update.samples for update in updates if "resumed" in update.event]
    edges = [0, *resumes, updates[-1].samples]
    ranks = {update.samples: update.ranks for update in updates}
    step = updates[0].samples
    seen = set()
    for begin, end in pairwise(edges):
        axis.axvspan(begin, end, color=COLOURS[ranks[begin + step]], linewidth=0)
        if labelled:
            text = f"{ranks[begin + step]} ranks"
            axis.annotate(text, ((begin + end) / 2, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
    for update in updates:
        for event in update.event.split("; "):
            if event in MARKS:
                label = event if labelled and event not in seen else None
                seen.add(event)
                axis.axvline(update.samples, color=MARKS[event], linewidth=1.3, linestyle="--", label=label)


def main() -> None:
    """Record and draw, or draw only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True, help="the table: written, or read with --draw")
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--reproducible", action="store_true", help="DistAdamW(reproducible=True)")
    parser.add_argument("--draw", action="store_true", help="draw what was recorded")
    options = parser.parse_args()
    if not options.draw:
        with tempfile.TemporaryDirectory() as folder:
            write(options.csv, record(Path(folder), reproducible=options.reproducible))
    draw(options.png, read(options.csv))


if __name__ == "__main__":
    main()
