"""Programs whose numbers are known: what a clock that computes samples from lengths gets wrong."""

from __future__ import annotations

from typing import Any

from tests.random.clock_programs import Program


def program(actions: list[Any], *, world: int = 1, accumulation: int = 1, **changes: Any) -> Program:
    """A program with micro-batches of 4 rows in order; ``changes`` go to the data where they are of it."""
    data: dict[str, Any] = {
        "kind": "map",
        "rows": 40,
        "batch": 4,
        "drop_last": False,
        "sampler": "sequential",
        "form": "row",
        "draws": 0,
        "batch_sampler": False,
    }
    configuration: Program = {
        "world": world,
        "split": False,
        "dispatch": None,
        "accumulation": accumulation,
        "cross": False,
        "loop": "accumulate",
        "max_norm": None,
        "optimizer": "DistAdamW",
        "steps": "each",
        "epoch_size": None,
        "second": None,
    }
    for name, value in changes.items():
        (data if name in data else configuration)[name] = value
    return {**configuration, "data": data, "actions": actions}


def epoch(*at: list[Any], **options: Any) -> list[Any]:
    """One loop over the loader, with events at some of its micro-batches."""
    return ["epoch", {"at": list(at), **options}]


# The program, and the rows that its updates have had at its end.
TABLE: dict[str, tuple[Program, int]] = {
    "a second loader over the same data set": (
        program([epoch(of="second")], rows=64, second={"rows": None, "batch": 16, "drop_last": False}),
        64,
    ),
    "break in mid-accumulation": (program([epoch(stop=2), epoch()], accumulation=4), 48),
    "continue, and a short last batch": (program([epoch([5, "continue"])], rows=30, accumulation=4), 26),
    "a rank's last batch is padding alone": (program([epoch(), epoch()], world=2, rows=9), 18),
    "accumulation changed in mid-epoch": (program([epoch([2, "accumulate", 3])], rows=100, accumulation=2), 100),
    "data grows in epoch 1": (program([epoch(), ["grow", 2], epoch()], rows=10), 22),
    "a loader made again over other data": (program([["again", 13, 4], epoch(), epoch(), epoch()], rows=10), 39),
    "skip_first_batches of a sized stream": (
        program([epoch(how=["skip", 1])], kind="sized", rows=42, accumulation=3),
        38,
    ),
    "a sized stream resumed with another accumulation": (
        program(
            [
                epoch([3, "stop", "end"], how="rest"),
                ["resume", {"world": 1, "accumulation": 3}],
                epoch(how="rest"),
            ],
            kind="sized",
            rows=23,
            accumulation=2,
            epoch_size=23,
        ),
        23,
    ),
    "a batch cut by hand": (
        program([epoch([0, "cut", 4], [1, "cut", 4], [2, "cut", 4])], rows=24, batch=8, accumulation=4),
        24,
    ),
    "a batch cut by hand, each piece accumulated": (
        program(
            [epoch([0, "pieces", 4], [1, "pieces", 4], [2, "pieces", 4])],
            rows=24,
            batch=8,
            accumulation=4,
        ),
        24,
    ),
    "a sampler that draws more than there is": (
        program([epoch(), epoch(stop=1)], rows=10, sampler="replacement", draws=14),
        18,
    ),
    "one batch again and again": (program([["overfit", 5]]), 4),
    "a first look at a batch": (program([["peek"], epoch()], rows=10), 10),
    "an update that is skipped": (program([epoch([3, "inf", None])], rows=40, accumulation=2, max_norm=1.0), 32),
    "a skipped update, and the same batch again": (
        program([epoch([3, "inf", None], [3, "twice"])], rows=40, accumulation=2, max_norm=1.0),
        36,
    ),
    "two passes over each batch, the first one's gradients dropped": (
        program([epoch([0, "sam"], [1, "sam"], [2, "sam"])], rows=12),
        12,
    ),
    "gradients dropped in mid-accumulation": (program([epoch([1, "zero"])], rows=40, accumulation=4), 32),
    "continue on one rank of two": (program([epoch([2, "continue_on", 1])], world=2, rows=40, accumulation=2), 36),
    "padded by repeated rows, of which one rank leaves a batch out": (
        program([epoch([0, "continue_on", 0])], world=2, rows=13, accumulation=2, sampler="shuffle"),
        9,
    ),
    "dispatched and padded": (program([epoch(), epoch()], world=2, rows=13, dispatch=True), 26),
    "a stream without a length, padded": (
        program([epoch(), epoch()], world=2, rows=13, kind="stream", dispatch=False, epoch_size=13),
        26,
    ),
    "from two ranks to one": (
        program(
            [
                epoch([1, "stop", "end"], how="rest"),
                ["resume", {"world": 1, "accumulation": 1}],
                epoch(how="rest"),
                epoch(how="rest"),
            ],
            world=2,
            rows=26,
            sampler="shuffle",
            accumulation=2,
            epoch_size=26,
        ),
        52,
    ),
}
