"""Measure what sending gradients during backward saves: `attach(overlap=True)` and `overlap=False`.

Run ``python -m benchmarks.overlap --out results.jsonl``. Two ranks on gloo by default; a real
transformer, so that backward is computing behind which messages can hide. (`update_phase` has no computing,
and says nothing of overlap.)

Two copies of the model live in the same processes, with the same weights and data, and take turns in
random order. At the end their weights must have the same bits. Timed is one update: forward,
backward, step, zero_grad, from a barrier to the slowest rank's end.

Next to the ratio is the most that can be saved: the time of the reduction if it waits for the
end of backward. Where every core computes, moving messages takes time from computing, and there may be
nothing to save. ``--delay-us`` makes every bucket, of gradients and of parameters, travel at least that
long, without costing processor time: a SIMULATED slow link, marked as such in everything that is written.

``--chart`` draws one update of each as a timeline; ``--trace`` writes Chrome traces of one more update
of each, by torch's profiler, to be opened in ``chrome://tracing`` or Perfetto.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import ranks, records
from benchmarks.groups import RECIPE
from benchmarks.timeline import Recorder, Span, add_to_trace, draw
from dist_adamw import DistAdamW

WAYS = {"overlap": True, "no overlap": False}
VOCABULARY = 256
WARM = 2


class Language(nn.Module):
    """A small GPT that predicts the next token."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1] - 1)
        hidden = self.blocks(self.embed(tokens[:, :-1]), mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


class Trained:
    """A model and its optimizer, trained in one of WAYS. Collective to build."""

    def __init__(self, way: str, options: argparse.Namespace, recorder: Recorder) -> None:
        torch.manual_seed(0)
        self.model = Language(options.layers, options.width)
        self.optimizer = DistAdamW(self.model.parameters(), bucket_numel=options.bucket_numel, **RECIPE)
        self.optimizer.attach(self.model, overlap=WAYS[way])
        self._record = recorder

    def update(self, tokens: Tensor) -> tuple[float, list[Span]]:
        """Run one update; return its seconds on this rank and its timeline. Collective."""
        self._record.spans.clear()
        dist.barrier()
        began = time.perf_counter()
        with self._record.span("update"):
            with self._record.span("forward"):
                loss = self.model(tokens)
            with self._record.span("backward"):
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - began, list(self._record.spans)


def data(options: argparse.Namespace, update: int, rank: int) -> Tensor:
    """Return tokens that differ by rank and update, and are the same for both ways."""
    generator = torch.Generator().manual_seed(1000 * update + rank)
    return torch.randint(VOCABULARY, (options.batch, options.context + 1), generator=generator)


def check_bits(trained: dict[str, Trained]) -> None:
    """Check that both ways have the same weights on all ranks. Collective.

    Raises:
        RuntimeError: they have not.
    """
    with torch.no_grad():
        flat = {way: torch.cat([p.view(-1) for p in one.model.parameters()]) for way, one in trained.items()}
    first = flat["overlap"].clone()
    dist.broadcast(first, group_src=0)
    for way, weights in flat.items():
        if not torch.equal(weights.view(torch.int32), first.view(torch.int32)):
            raise RuntimeError(
                f"{way} on rank {dist.get_rank()} has other weights than overlap on rank 0: largest difference "
                f"{float((weights - first).abs().max()):.3g}"
            )


def span_seconds(spans: Sequence[Span], name: str) -> float:
    """Return the total time of the spans of that name."""
    return sum(span.stop - span.start for span in spans if span.name == name)


def measure(options: argparse.Namespace, rank: int, recorder: Recorder) -> tuple[records.Record, dict[str, Any]]:
    """Train both ways; return the record, and the timelines of the round closest to the median. Collective."""
    trained = {way: Trained(way, options, recorder) for way in WAYS}
    mine: dict[str, list[tuple[float, list[Span]]]] = {way: [] for way in WAYS}
    shuffle = random.Random(0)
    order = list(WAYS)
    for update in range(WARM + options.rounds):
        shuffle.shuffle(order)
        tokens = data(options, update, rank)
        for way in order:
            found = trained[way].update(tokens)
            if update >= WARM:
                mine[way].append(found)
    check_bits(trained)
    if options.trace:
        trace(options, trained, rank, data(options, WARM + options.rounds, rank))
    by_rank = ranks.gathered(mine)
    seconds = {way: [max(took[k][0] for took in _of(by_rank, way)) for k in range(options.rounds)] for way in WAYS}
    reduce = [max(span_seconds(took[k][1], "arrive") for took in _of(by_rank, "no overlap")) for k in _rounds(options)]
    within = [a / b for a, b in zip(seconds["overlap"], seconds["no overlap"], strict=True)]
    record: records.Record = {
        "kind": "overlap",
        "ranks": dist.get_world_size(),
        "numel": sum(p.numel() for p in trained["overlap"].model.parameters()),
        "buckets": sum(shard.layout.num_buckets for shard in trained["overlap"].optimizer.shards),
        "tokens": options.batch * options.context,
        "delay_us": options.delay_us,
        "simulated": options.delay_us > 0,
        "seconds": seconds,
        "reduce_ms": median(reduce) * 1e3,
        "backward_ms": median(span_seconds(spans, "backward") for _, spans in mine["no overlap"]) * 1e3,
        "ratio": median(seconds["overlap"]) / median(seconds["no overlap"]),
        "quartiles_within_rounds": quantiles(within, n=4),
    }
    drawn = {}
    for way, times in seconds.items():
        typical = min(_rounds(options), key=lambda k: abs(times[k] - median(times)))
        drawn[way] = [took[typical][1] for took in _of(by_rank, way)]
    return record, drawn


def _rounds(options: argparse.Namespace) -> range:
    return range(options.rounds)


def _of(by_rank: list[Any], way: str) -> list[list[tuple[float, list[Span]]]]:
    return [one[way] for one in by_rank]


def trace(options: argparse.Namespace, trained: dict[str, Trained], rank: int, tokens: Tensor) -> None:
    """Profile one more update of each. Collective."""
    options.trace.mkdir(parents=True, exist_ok=True)
    simulated = f"-simulated-{options.delay_us}us" if options.delay_us else ""
    for way, one in trained.items():
        path = options.trace / f"{way.replace(' ', '-')}{simulated}-rank{rank}.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            _, spans = one.update(tokens)
        profiler.export_chrome_trace(str(path))
        add_to_trace(path, spans, anchor="update")


def report(record: records.Record, drawn: dict[str, Any], chart: Path) -> None:
    """Print the record, and draw the timelines."""
    link = f"SIMULATED link, every transfer takes at least {record['delay_us']:,} us" if record["simulated"] else "gloo"
    medians = {way: median(times) * 1e3 for way, times in record["seconds"].items()}
    saved = medians["no overlap"] - medians["overlap"]
    print(f"{link}; {record['ranks']} ranks, {record['numel']:,} parameters, {record['buckets']} buckets")
    print(f"  same bits; overlap {medians['overlap']:.1f} ms, no overlap {medians['no overlap']:.1f} ms an update")
    quartiles_text = " / ".join(f"{quartile:.3f}" for quartile in record["quartiles_within_rounds"])
    print(f"  ratio of medians {record['ratio']:.3f}, quartiles within rounds {quartiles_text}")
    print(
        f"  saved {saved:.1f} ms of the {record['reduce_ms']:.1f} ms that the reduction takes after backward",
        flush=True,
    )
    panels = {f"overlap={WAYS[way]}: median {medians[way]:.0f} ms an update": drawn[way] for way in WAYS}
    draw(panels, chart, f"One update, attach(overlap=...). {link}")
    print(f"  drawn: {chart}", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of this script."""
    parser = argparse.ArgumentParser(description="What sending gradients during backward saves.")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--chart", type=Path, help="default: beside --out")
    parser.add_argument("--trace", type=Path, help="folder for Chrome traces")
    parser.add_argument("--delay-us", type=int, default=0, help="SIMULATE a link that takes at least this long")
    parser.add_argument("--ranks", type=int, default=2, help="when not started by torchrun")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=2, help="sequences a rank")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--bucket-numel", type=int, default=1 << 20)
    parser.add_argument("--timeout", type=float, default=300.0)
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    suffix = f"-overlap-simulated-{options.delay_us}us.png" if options.delay_us else "-overlap.png"
    options.chart = (options.chart or options.out.with_name(options.out.stem + suffix)).resolve()
    options.trace = options.trace.resolve() if options.trace else None
    return options


def main() -> None:
    """Start the ranks, or run as one."""
    options = parse()
    if not ranks.is_rank():
        ranks.start("benchmarks.overlap", sys.argv[1:], ranks=options.ranks, timeout=options.timeout)
        return
    recorder = Recorder(options.delay_us * 1e-6)
    with ranks.joined() as (rank, _):
        record, drawn = measure(options, rank, recorder)
        if rank == 0:
            records.append(options.out, [records.environment(), record])
            report(record, drawn, options.chart)


if __name__ == "__main__":
    main()
