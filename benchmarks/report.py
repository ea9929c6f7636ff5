"""Make tables and a chart from results.

Run ``python -m benchmarks.report results.jsonl [more.jsonl ...]``. Prints the tables, writes them to
``benchmarks/results/<date>-<hardware>.md`` and draws the chart next to it. If a measurement is in
the files several times, the last one counts; times are compared only within one run, the last of each workload.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import records
from benchmarks.engines import OURS
from benchmarks.groups import GROUPS
from benchmarks.host_tables import host_cost, small_model
from benchmarks.markdown import table
from benchmarks.records import Record
from benchmarks.workloads import ALLOCATED, KEPT, TITLES

RESULTS = Path(__file__).resolve().parent / "results"
CASE = ("workload", "gradients", "groups")
Case = tuple[str, str, str]
COLOURS = {OURS: "#0b6e99", "sharded": "#b9c4cc", "unsharded": "#e0cfa8"}
# Issue 3: DistAdamW's median over the fastest sharded peer's; on the GPT over unsharded DDP's too.
TARGETS = {"gpt": 0.8, "many": 0.9, "embedding": 0.8}


def of_kind(found: Sequence[Record], kind: str) -> list[Record]:
    """Return the records of one kind, the last of each measurement."""
    chosen: dict[tuple[str, ...], Record] = {}
    for record in found:
        if record["kind"] == kind:
            key = tuple(str(record.get(k)) for k in (*CASE, "engine", "case", "device", "threads"))
            chosen.pop(key, None)
            chosen[key] = record
    return list(chosen.values())


def case_of(record: Record) -> Case:
    """Return workload, gradients and groups of a record; before there were such fields, gradients were kept."""
    return record["workload"], record.get("gradients", KEPT), record.get("groups", "one")


def cases(found: Sequence[Record]) -> list[Case]:
    """Return the cases whose update phase was timed: by workload, allocated gradients first, one group first."""
    timed = {case_of(r) for r in found if r["kind"] == "update_phase" and "seconds" in r}
    return [case for case in itertools.product(TITLES, (ALLOCATED, KEPT), GROUPS) if case in timed]


def timings(found: Sequence[Record], case: Case) -> list[Record]:
    """Return the last timed run of a case: times of different runs or cases are never compared."""
    timed = [r for r in found if r["kind"] == "update_phase" and "seconds" in r and case_of(r) == case]
    return [r for r in timed if r["run"] == timed[-1]["run"]]


def ratios(record: Record, ours: Record) -> tuple[float, list[float]]:
    """Return the ratio of medians to DistAdamW's, and the quartiles of the ratios within rounds.

    Where the two disagree, the machine was not quiet.
    """
    within = [theirs / mine for theirs, mine in zip(record["seconds"], ours["seconds"], strict=True)]
    return median(record["seconds"]) / median(ours["seconds"]), quantiles(within, n=4)


def update_phase(found: Sequence[Record]) -> Iterator[str]:
    """Return the times of every case."""
    for case in cases(found):
        timed = timings(found, case)
        ours = next((r for r in timed if r["engine"] == OURS), None)
        if ours is None:
            continue
        rows = []
        for record in sorted(timed, key=lambda r: float(median(r["seconds"]))):
            low, _, high = quantiles(record["seconds"], n=4)
            ratio, within = ratios(record, ours)
            rows.append(
                [
                    record["engine"],
                    f"{median(record['seconds']):.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{ratio:.2f}",
                    " / ".join(f"{quartile:.2f}" for quartile in within),
                ]
            )
        workload, gradients, groups = case
        yield f"### {TITLES[workload]}: {ours['numel']:,} parameters, {ours['ranks']} ranks"
        yield ""
        yield f"Gradients: {gradients}. Parameter groups: {groups} ({ours.get('number_of_groups', 1)})."
        yield ""
        yield from table(["engine", "median, s", "quartiles, s", "x DistAdamW", "quartiles within rounds"], rows)
        yield ""
        yield from _verdicts(workload, timed, ours)
        yield (
            f"Commit {ours['commit']}. {len(ours['seconds'])} rounds, load average {ours['load_average']:.1f} at the "
            f"end, {ours['ranks']} of it our own. All weights agree with AdamW on one rank: largest difference "
            f"{max(r['largest_difference'] for r in timed):.1e}."
        )
        yield ""


def _verdicts(workload: str, timed: Sequence[Record], ours: Record) -> Iterator[str]:
    peers = [r for r in timed if not r["engine"].startswith(OURS)]
    sharded = min((r for r in peers if r["sharded"]), key=lambda r: float(median(r["seconds"])), default=None)
    unsharded = next((r for r in peers if not r["sharded"]), None)
    compared = [(sharded, TARGETS[workload], "the fastest sharded peer")]
    if workload == "gpt":
        compared.append((unsharded, 1.0, "unsharded"))
    for peer, target, what in compared:
        if peer is not None:
            ratio = median(ours["seconds"]) / median(peer["seconds"])
            verdict = "met" if ratio <= target else "missed"
            yield f"DistAdamW over {what}, {peer['engine']}: **{ratio:.2f}**, target {target}: {verdict}."
    yield ""


def memory(found: Sequence[Record]) -> Iterator[str]:
    """Return the peak memory by workload."""
    for workload, title in TITLES.items():
        measured = [r for r in of_kind(found, "isolated") if r["workload"] == workload and "bytes_by_rank" in r]
        rows = []
        for record in sorted(measured, key=lambda r: float(max(b["peak"] for b in r["bytes_by_rank"]))):
            largest = {k: max(b[k] for b in record["bytes_by_rank"]) for k in record["bytes_by_rank"][0]}
            named = largest["parameters"] + largest["gradients"] + largest["state"]
            formula = record.get("formula", "4N + 4N + 8N/W")  # older records do not say
            over = record.get("peak_over_formula", largest["peak"] / record["numel"] / (4 + 4 + 8 / record["ranks"]))
            cells = [largest["peak"], largest["parameters"], largest["gradients"], largest["state"]]
            cells.append(largest["peak"] - named)
            more = [record.get(key) for key in ("later_peak_over_formula", "beyond_objects_over_formula")]
            ratios_ = [f"{over:.2f}", *("-" if ratio is None else f"{ratio:.2f}" for ratio in more)]
            rows.append([record["engine"], *[f"{c / 1e6:.1f}" for c in cells], formula, *ratios_])
        if rows:
            yield f"### {title}"
            yield ""
            head = ["engine, MB per rank", "peak", "parameters", "gradients", "state", "rest of the peak"]
            yield from table([*head, "formula", "peak / formula", "later", "without objects"], rows)
            yield ""
            yield "The rest of the peak: staging, buckets, and gradients that live only until they have been sent."
            yield "Later: the peak after the first updates, in which buckets and state are laid out, over the formula."
            yield "Without objects: the peak less what tensor objects of plain torch cost beyond their elements."
            yield ""


def traffic(found: Sequence[Record]) -> Iterator[str]:
    """Return the bytes sent by every engine on every workload."""
    measured = [r for r in of_kind(found, "isolated") if "sent_per_rank" in r]
    engines = list(dict.fromkeys(r["engine"] for r in measured))
    sent: dict[tuple[str, str], float] = {}
    for record in measured:
        limit = (record["ranks"] - 1) / record["ranks"] * record["numel"] * 8
        sent[record["engine"], record["workload"]] = record["sent_per_rank"] / limit
    rows = [[e, *[f"{sent[e, w]:.3f}" if (e, w) in sent else "-" for w in TITLES]] for e in engines]
    if rows:
        yield from table(["sent per rank / f N (b_g + b_p)", *TITLES], rows)
        yield ""
        yield f"Counted at the loopback interface: {', '.join(sorted({r['network'] for r in measured}))}."
        yield "Unsharded training is at 1 as well: an all-reduce sends 2 f N b_g, and no parameters."
        yield "An all-reduce that is followed by a gather of parameters is at 1.5."
        yield ""


def local_step(found: Sequence[Record]) -> Iterator[str]:
    """Return the table of the local pass relative to copy bandwidth."""
    measured = of_kind(found, "local_step")
    rows = [
        [
            f"{r['case']}; {r['device']}, threads: {r['threads']}",
            f"{r['numel']:,}",
            f"{r['copy_gb_per_s']:.1f}",
            f"{r['in_place_gb_per_s']:.1f}",
            f"{r['pass_gb_per_s']:.1f}",
            f"{r['fraction']:.0%}",
            "{:.0%} to {:.0%}".format(*r["fraction_quartiles"]),
            f"{r['fraction_in_place']:.0%}",
        ]
        for r in measured
        if "fraction" in r
    ]
    if rows:
        head = ["pass", "elements", "copy, GB/s", "in place, GB/s", "pass, GB/s", "of copy", "quartiles", "of in place"]
        yield from table(head, rows)
        yield ""
    for record in measured:
        if "skipped" in record:
            yield f"{record['device']}: {record['skipped']}."
            yield ""


def overlap(found: Sequence[Record]) -> Iterator[str]:
    """Return the table of what sending during backward saves."""
    chosen = {(r["delay_us"], r["ranks"]): r for r in found if r["kind"] == "overlap"}
    rows = []
    for record in chosen.values():
        with_it, without = median(record["seconds"]["overlap"]), median(record["seconds"]["no overlap"])
        link = f"SIMULATED: at least {record['delay_us']:,} us a transfer" if record["delay_us"] else "as it is"
        rows.append(
            [
                f"{link}; {record['ranks']} ranks, {record['buckets']} buckets, {record['numel']:,} parameters",
                f"{with_it * 1e3:.0f}",
                f"{without * 1e3:.0f}",
                f"{record['reduce_ms']:.0f}",
                f"{record['ratio']:.3f}",
                " / ".join(f"{quartile:.2f}" for quartile in record["quartiles_within_rounds"]),
            ]
        )
    if rows:
        head = ["link", "overlap, ms", "without, ms", "of that the reduction", "ratio", "quartiles within rounds"]
        yield from table(head, rows)
        yield ""
        yield "One update: forward, backward, step. The weights had the same bits with and without overlap."
        yield ""


def training_step(found: Sequence[Record]) -> Iterator[str]:
    """Return the tables of whole training steps, the last run of each case."""
    by_case: dict[tuple[str, ...], dict[str, list[Record]]] = {}
    for record in found:
        if record["kind"] == "training_step" and "seconds" in record:
            case = tuple(str(record[k]) for k in ("ranks", "precision", "accumulation", "groups", "clip", "shape"))
            by_case.setdefault(case, {}).setdefault(record["run"], []).append(record)
    for runs in by_case.values():
        measured = list(runs.values())[-1]
        ours = next((r for r in measured if r["engine"] == OURS), None)
        if ours is not None:
            yield from _training_steps(measured, ours)


def _training_steps(measured: Sequence[Record], ours: Record) -> Iterator[str]:
    """Return the table of one case."""
    rows = []
    for record in sorted(measured, key=lambda r: float(median(r["seconds"]))):
        ratio, within = ratios(record, ours)
        took = median(record["seconds"])
        cells = [record["engine"], f"{took:.3f}", f"{record['tokens'] / took:,.0f}", f"{ratio:.2f}"]
        rows.append([*cells, " / ".join(f"{quartile:.2f}" for quartile in within)])
    case = f"{ours['ranks']} ranks, {ours['precision']}, accumulation {ours['accumulation']}"
    clipped = f", clipped to {ours['clip']}" if ours["clip"] is not None else ""
    yield f"### GPT, {case}, groups: {ours['groups']} ({ours['number_of_groups']}){clipped}"
    yield ""
    yield from table(["engine", "s/step", "tokens/s", "x DistAdamW", "quartiles within rounds"], rows)
    yield ""
    yield (
        f"{ours['numel']:,} parameters, {ours['tokens']:,} tokens a step, {len(ours['seconds'])} rounds. Losses of the "
        f"first {len(ours['losses'])} updates differ by at most {max(r['largest_difference'] for r in measured):.1e}."
    )
    yield ""


def details(found: Sequence[Record]) -> Iterator[str]:
    """Return how engines were set up, and which were left out."""
    kinds = [r for kind in ("update_phase", "isolated", "training_step") for r in of_kind(found, kind)]
    for engine, detail in {r["engine"]: r["detail"] for r in kinds if r.get("detail")}.items():
        yield f"- {engine}: {detail}"
    for engine, workload, reason in dict.fromkeys(
        (r["engine"], r.get("workload", "training steps"), r["skipped"]) for r in kinds if "skipped" in r
    ):
        yield f"- {engine} is left out on {workload}: {reason}"
    yield ""


def heading(environment: Record, commits: Sequence[str]) -> Iterator[str]:
    """Return hardware, date, versions, and every commit that was measured."""
    gpu = environment["gpu"] or "no GPU"
    memory_gb = environment["memory_bytes"] / 2**30
    yield f"# {environment['time'][:10]}, {environment['cpu']}, {environment['cores']} cores"
    yield ""
    yield f"{environment['cpu']} ({environment['simd']}), {environment['cores']} cores, {memory_gb:.0f} GiB, {gpu}."
    yield f"Commit {' and '.join(commits)}; " + ", ".join(f"{k} {v}" for k, v in environment["versions"].items()) + "."
    yield ""


def chart(found: Sequence[Record], path: Path, caption: str) -> None:
    """Draw bars of every engine's ratio to DistAdamW, one panel per workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(1, len(TITLES), figsize=(15, 4.8), layout="constrained", sharey=True)
    timed = [r for r in of_kind(found, "update_phase") if "seconds" in r]
    engines = list(dict.fromkeys(r["engine"] for r in timed))
    for axis, (workload, title) in zip(axes, TITLES.items(), strict=True):
        case = next((one for one in cases(found) if one[0] == workload), None)
        here: dict[str, Any] = {r["engine"]: r for r in timings(found, case)} if case else {}
        drawn = f"\n{case[1]} gradients, groups: {case[2]}" if case else ""
        for y, engine in enumerate(engines):
            if engine not in here or OURS not in here:
                continue
            ratio, (low, middle, high) = ratios(here[engine], here[OURS])
            colour = COLOURS[OURS if engine.startswith(OURS) else "sharded" if here[engine]["sharded"] else "unsharded"]
            axis.barh(y, ratio, color=colour)
            axis.plot([low, high], [y, y], color="black", linewidth=1)
            axis.plot([middle], [y], "o", color="black", markersize=3)
            place = (max(ratio, high), y)
            text = axis.annotate(f"{ratio:.2f}", place, (6, 0), textcoords="offset points", va="center", fontsize=9)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.axvline(1, color="#0b6e99", linewidth=0.8)
        axis.set_yticks(range(len(engines)), engines)
        axis.set_title(title + drawn, fontsize=10)
        axis.set_xlabel("time over DistAdamW's (less is faster)")
        axis.margins(x=0.15)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    axes[-1].legend(handles=handles, loc="upper right", fontsize=9)
    figure.suptitle(
        f"Update phase, ratio of medians; dots and lines: median and quartiles within rounds. {caption}", fontsize=10
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print and write the tables, and draw the chart."""
    parser = argparse.ArgumentParser(description="Tables and a chart from results.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = records.read(options.files)
    environments = [r for r in found if r["kind"] == "environment"]
    if not environments:
        raise SystemExit(
            "these files say nothing of where they were measured; pass what update_phase or local_step wrote"
        )
    environment, commits = environments[-1], list(dict.fromkeys(r["commit"] for r in environments))
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{environment['cpu']} {environment['cores']} cores".lower()).strip("-")
    path = options.into / f"{environment['time'][:10]}-{hardware}.md"
    lines = [*heading(environment, commits), "## Update phase", "", f"![ratios]({path.with_suffix('.png').name})", ""]
    lines += [
        *update_phase(found),
        "## Training step",
        "",
        *training_step(found),
        "## Overhead of the host",
        "",
        *host_cost(found),
        *small_model(found),
        "## Peak memory per rank",
        "",
        *memory(found),
    ]
    lines += ["## Bytes sent per rank", "", *traffic(found)]
    lines += ["## Overlap with backward", "", *overlap(found)]
    lines += ["## Local AdamW pass", "", *local_step(found), "## Set-up", "", *details(found)]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    options.into.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    chart(found, path.with_suffix(".png"), environment["time"][:10])
    print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
