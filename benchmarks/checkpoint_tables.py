"""Print the tables of `benchmarks.checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median, quantiles

from benchmarks import records
from benchmarks.markdown import table

OURS = "dist_adamw.save"


def memory_table(found: Sequence[records.Record]) -> list[str]:
    """Return the table of peaks relative to training's."""
    head = ["peak of the largest rank, over training's", "ranks", "training, MB", "save", "load", "load, fresh job"]
    head += ["AsyncSaver", "updates beside it"]
    by_key: dict[tuple[str, int], dict[str, int]] = {}
    for record in found:
        if record["kind"] == "checkpoint memory":
            peaks = by_key.setdefault((record["engine"], record["ranks"]), {})
            peaks |= {k: v for k, v in record["peak_bytes"].items() if k not in peaks}
    rows = []
    for (engine, size), peaks in by_key.items():
        over = ["save", "load", "load, fresh", "AsyncSaver", "AsyncSaver, updates beside it"]
        training = peaks["training"]
        rows.append([engine, str(size), f"{training / 1e6:.0f}", *(f"{peaks[of] / training:.2f}" for of in over)])
    return table(head, rows)


def time_tables(found: Sequence[records.Record]) -> Iterator[str]:
    """Return the table of seconds, ratios and fractions of the limits."""
    timed = {r["what"]: r for r in found if r["kind"] == "checkpoint time"}
    # The fastest round: other jobs on the machine only make rounds slower.
    limits = {name: min(r["seconds"]) for name, r in timed.items() if r["is"] == "limit"}
    for kind, ours in (("save", OURS), ("load", "dist_adamw.load")):
        rows = []
        for name, record in sorted(timed.items(), key=lambda item: median(item[1]["seconds"])):
            if record["is"] != kind:
                continue
            took = median(record["seconds"])
            low, _, high = quantiles(record["seconds"], n=4)
            is_async = record["until_written"] is not None
            limit = limits["memcpy" if is_async else "write and fsync"] / took if kind == "save" else None
            rows.append(
                [
                    name,
                    f"{took:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{took / median(timed[ours]['seconds']):.2f}",
                    "" if limit is None else f"{limit:.2f} of {'memcpy' if is_async else 'write'}",
                    f"{median(record['until_written']):.3f}" if is_async else "",
                    "" if record["written"] is None else f"{record['written'] / 1e6:.1f}",
                ]
            )
        head = [f"{kind}: training stands still", "median, s", "quartiles, s", f"x {ours}", "limit", "until written, s"]
        yield from table([*head, "MB"], rows)
        yield ""
    rows = []
    for name, record in timed.items():
        if record["is"] == "limit":
            took = limits[name]
            rows.append(
                [name, f"{took:.3f}", f"{median(record['seconds']):.3f}", f"{record['nbytes'] / took / 1e9:.2f}"]
            )
    yield from table(["limit, all ranks at once", "fastest, s", "median, s", "GB/s, fastest"], rows)
    yield ""
    rows = []
    for name, record in timed.items():
        if record["updates"]:
            plain = median(t for one in record["updates"] for t in one["plain"])
            beside = median(t for one in record["updates"] for t in one["beside"])
            extra = median(sum(one["beside"]) - len(one["beside"]) * median(one["plain"]) for one in record["updates"])
            count = median(len(one["beside"]) for one in record["updates"])
            rows.append([name, f"{plain:.3f}", f"{beside:.3f}", f"{beside / plain:.2f}", f"{count:g}", f"{extra:.2f}"])
    head = ["updates beside it", "without, s", "beside it, s", "ratio", "updates until it is done", "they cost, s"]
    yield from table(head, rows)


def report(found: Sequence[records.Record], workload: str) -> None:
    """Print the tables of one workload."""
    where = next(record for record in reversed(found) if record["kind"] == "environment")
    found = [record for record in found if record.get("workload") == workload]
    print(
        f"\n{workload}, {found[0]['numel']:,} parameters; {where['cpu']}, {where['cores']} cores, "
        f"torch {where['versions']['torch']}, commit {where['commit']}, {where['time']}\n"
    )
    if any(record["kind"] == "checkpoint memory" for record in found):
        print("\n".join(memory_table(found)), "\n")
    if timed := [record for record in found if record["kind"] == "checkpoint time"]:
        print(f"{timed[0]['ranks']} ranks, {len(timed[0]['seconds'])} rounds, load {timed[0]['load_average']:.1f}\n")
        print("\n".join(time_tables(found)))
