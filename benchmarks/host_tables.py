"""Tables of overhead: what the host spends on an update, and a whole step of a small model.

``python -m benchmarks.host_tables r.jsonl`` prints them alone; `report` has them too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles

from benchmarks import records
from benchmarks.engines import OURS
from benchmarks.markdown import table
from benchmarks.records import Record

Case = tuple[int, ...]


def by_case(found: Sequence[Record], kind: str, fields: Sequence[str]) -> dict[Case, dict[str, Record]]:
    """Return the records of ``kind`` by the values of ``fields`` and by engine, the last run of each case."""
    cases: dict[Case, dict[str, Record]] = {}
    for record in found:
        if record["kind"] == kind:
            case = tuple(record[field] for field in fields)
            if any(other["run"] != record["run"] for other in cases.get(case, {}).values()):
                cases[case] = {}
            cases.setdefault(case, {})[record["engine"]] = record
    return dict(sorted(cases.items()))


def host_cost(found: Sequence[Record]) -> Iterator[str]:
    """Return the milliseconds of processor time of an update, and of its backward pass alone."""
    cases = by_case(found, "host_cost", ("tensors", "groups", "ranks"))
    engines = list(dict.fromkeys(name for case in cases.values() for name in case))
    rows = [
        [f"{tensors:,} / {groups} / {ranks:,}", *(_update(of.get(name)) for name in engines)]
        for (tensors, groups, ranks), of in cases.items()
    ]
    if rows:
        yield from table(["ms, tensors / groups / ranks", *engines], rows)
        yield ""
        yield "Medians of processor time: backward + step with zero_grad. A fake process group, which sends nothing."
        yield ""
    schedules = by_case(found, "scheduler_cost", ("groups",))
    engines = list(dict.fromkeys(name for case in schedules.values() for name in case))
    rows = [
        [str(groups), *(f"{median(of[name]['seconds']) * 1e6:.1f}" if name in of else "-" for name in engines)]
        for (groups,), of in schedules.items()
    ]
    if rows:
        yield from table(["us of scheduler.step(), groups", *engines], rows)
        yield ""


def _update(record: Record | None) -> str:
    if record is None:
        return "-"
    ms = {part: median(seconds) * 1e3 for part, seconds in record["seconds"].items()}
    return f"{ms['backward']:.2f} + {ms['step'] + ms['zero_grad']:.2f}"


def small_model(found: Sequence[Record]) -> Iterator[str]:
    """Return the times of a whole step of a small model, by number of groups."""
    rows = []
    for (groups, ranks), of in by_case(found, "small_model", ("number_of_groups", "ranks")).items():
        if len(of) < 2:
            continue
        ours, theirs = of[OURS], next(record for name, record in of.items() if name != OURS)
        cells = [f"{groups}, {ranks} ranks"]
        for field in ("seconds", "cpu_seconds"):
            within = [a / b for a, b in zip(ours[field], theirs[field], strict=True)]
            cells += [f"{median(record[field]) * 1e3:.2f}" for record in (ours, theirs)]
            cells.append(" / ".join(f"{quartile:.2f}" for quartile in quantiles(within, n=4)))
        rows.append(cells)
    if rows:
        head = ["groups", "DistAdamW, ms", "Accelerate, ms", "ratio, quartiles within rounds"]
        yield from table([*head, "processors, ms", "Accelerate's, ms", "ratio"], rows)
        yield ""
        yield "A step of 64 tensors through `prepare`, beside Accelerate with DDP, AdamW and torch's schedule."
        yield ""


def main() -> None:
    """Print the tables of the files that are named."""
    found = records.read(list(map(Path, sys.argv[1:])))
    print("\n".join([*host_cost(found), *small_model(found)]))


if __name__ == "__main__":
    main()
