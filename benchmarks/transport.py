"""Measure the transport: the lower bound of any update phase on this machine.

Run ``python -m benchmarks.transport --out results.jsonl``. Two ranks on gloo by default. Every case moves the
same number of elements, in chunks; cases alternate, and each is the slowest rank's median.

ns an element is the time over all elements of the buffer (the model's gradients, or its
parameters), whatever part of them travels. Chunks are of the whole buffer too: each rank owns a W-th of
every chunk, so a message is a W-th of one long.

"messages" are `isend` and `irecv` between every two ranks, which is what DistAdamW uses on gloo; "DistAdamW's"
are its own code, with which they can be compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import ranks, records
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT, InFlightBucket
from dist_adamw.optimizer.transport.gloo import GlooTransport
from dist_adamw.optimizer.transport.layout import FlatLayout
from dist_adamw.optimizer.transport.rollcall import Channel
from dist_adamw.optimizer.transport.tree_sum import BLOCK_NUMEL

CHUNKS = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 23)
MESSAGE_CHUNKS = tuple(1 << n for n in range(18, 24))
Case = Callable[[], object]


def _others() -> list[tuple[int, int]]:
    """Return pairs of destination and source, in an order that keeps every rank busy."""
    size, rank = dist.get_world_size(), dist.get_rank()
    return [((rank + d) % size, (rank - d) % size) for d in range(1, size)]


def _message(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work


def messages_to_owners(flat: Tensor, chunk: int, depth: int) -> Case:
    """Send each rank its slice without copies, and average it there a block at a time: a reduce-scatter."""
    size, rank = dist.get_world_size(), dist.get_rank()
    parts = [part.chunk(size) for part in torch.split(flat, chunk)]
    slots = [{source: torch.empty(chunk // size) for _, source in _others()} for _ in range(depth)]

    def start(k: int) -> list[dist.Work]:
        works = []
        for to, source in _others():
            mine = slots[k % depth][source][: parts[k][rank].numel()]
            works.append(_message(dist.irecv(mine, group_src=source)))
            works.append(_message(dist.isend(parts[k][to], group_dst=to)))
        return works

    def finish(k: int, works: list[dist.Work]) -> None:
        for work in works:
            work.wait()
        own = parts[k][rank]
        terms = [own if r == rank else slots[k % depth][r][: own.numel()] for r in range(size)]
        for begin in range(0, own.numel(), BLOCK_NUMEL):
            first, second, *rest = [term[begin : begin + BLOCK_NUMEL] for term in terms]
            # In rank order: the first two into the one that is not needed any more, the last sum into place.
            total = torch.add(
                first, second, out=own[begin : begin + BLOCK_NUMEL] if not rest else _spare(first, second, rank)
            )
            for term in rest:
                total.add_(term)
            total.div_(size)
            if rest:
                own[begin : begin + BLOCK_NUMEL].copy_(total)

    def run() -> None:
        under_way: list[tuple[int, list[dist.Work]]] = []
        for k in range(len(parts)):
            if len(under_way) == depth:
                finish(*under_way.pop(0))
            under_way.append((k, start(k)))
        for item in under_way:
            finish(*item)

    return run


def _spare(first: Tensor, second: Tensor, rank: int) -> Tensor:
    return second if rank == 0 else first


def messages_from_owners(flat: Tensor, chunk: int, depth: int) -> Case:
    """Send every rank's slice to all others, received in place: an all-gather."""
    size, rank = dist.get_world_size(), dist.get_rank()
    parts = [part.chunk(size) for part in torch.split(flat, chunk)]

    def run() -> None:
        under_way: list[list[dist.Work]] = []
        for part in parts:
            if len(under_way) == depth:
                _wait(under_way.pop(0))
            works = []
            for to, source in _others():
                works.append(_message(dist.irecv(part[source], group_src=source)))
                works.append(_message(dist.isend(part[rank], group_dst=to)))
            under_way.append(works)
        for works in under_way:
            _wait(works)

    return run


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def engine_itself(flat: Tensor, chunk: int) -> dict[str, Case]:
    """Run DistAdamW's own code for both, on one parameter of the buffer's size, to see what it adds to the messages."""
    assert dist.group.WORLD is not None
    layout = FlatLayout((flat.numel(),), dist.get_world_size(), chunk)
    transport = GlooTransport(layout, [flat], group=dist.group.WORLD, replicas=None, channel=Channel(1))

    def all_buckets(start: Callable[[int], InFlightBucket], finish: Callable[[InFlightBucket], None]) -> None:
        under_way: list[InFlightBucket] = []
        for k in range(layout.num_buckets):
            if len(under_way) == MAX_IN_FLIGHT:
                finish(under_way.pop(0))
            under_way.append(start(k))
        for sent in under_way:
            finish(sent)

    return {
        f"DistAdamW's reduce, buckets of {chunk:,}": lambda: all_buckets(
            lambda k: transport.start_reduce(k, [flat[slice(*layout.bucket(k))]]),
            lambda sent: transport.finish_reduce(
                sent, [part.of(sent.parts) for part in transport.owned_parts(sent.bucket)]
            ),
        ),
        f"DistAdamW's gather, buckets of {chunk:,}": lambda: all_buckets(
            transport.start_gather, transport.finish_gather
        ),
    }


def check(chunk: int = 1 << 18) -> None:
    """Check that every case gives averages and whole buffers, in uneven chunks too. Collective.

    Raises:
        RuntimeError: a case has left other numbers than averages of all ranks everywhere.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    numel = 2 * chunk * size + 32 * size
    average = (size + 1) / 2
    for name in ("messages", "DistAdamW's own"):
        flat = torch.full((numel,), 1.0 + rank)
        if name == "messages":
            messages_to_owners(flat, chunk * size, 2)()
            messages_from_owners(flat, chunk * size, 2)()
        else:
            for case in engine_itself(flat, chunk * size).values():
                case()
        if not torch.allclose(flat, torch.full_like(flat, average)):
            raise RuntimeError(
                f"{name}: expected {average} everywhere on rank {rank}, got {sorted(set(flat.tolist()))[:5]}"
            )


def reduce_to_owners(flat: Tensor, chunk: int, depth: int) -> Case:
    """Run all_to_all_single chunk by chunk, up to ``depth`` in flight, and a local sum: a reduce-scatter."""
    size, rank = dist.get_world_size(), dist.get_rank()
    received = [torch.empty(chunk) for _ in range(depth)]
    parts = torch.split(flat, chunk)

    def finish(part: Tensor, slot: Tensor, work: dist.Work) -> None:
        work.wait()
        share = part.numel() // size
        mine = part[rank * share : (rank + 1) * share]
        others = [slot[r * share : (r + 1) * share] for r in range(size)]
        torch.add(others[0], others[1], out=mine)
        for other in others[2:]:
            mine.add_(other)

    def run() -> None:
        under_way: list[tuple[Tensor, Tensor, dist.Work]] = []
        for k, part in enumerate(parts):
            if len(under_way) == depth:
                finish(*under_way.pop(0))
            slot = received[k % depth][: part.numel()]
            under_way.append((part, slot, dist.all_to_all_single(slot, part, async_op=True)))
        for item in under_way:
            finish(*item)

    return run


def broadcasts(flat: Tensor, chunk: int) -> Case:
    """Broadcast every rank's slice of every chunk asynchronously: an all-gather."""

    def run() -> None:
        slices = [(r, s) for part in torch.split(flat, chunk) for r, s in enumerate(part.chunk(dist.get_world_size()))]
        for work in [dist.broadcast(s, group_src=r, async_op=True) for r, s in slices]:
            work.wait()

    return run


def all_reduce(flat: Tensor, chunk: int) -> Case:
    """All-reduce all chunks asynchronously, as DDP does with its buckets."""

    def run() -> None:
        for work in [dist.all_reduce(part, async_op=True) for part in torch.split(flat, chunk)]:
            work.wait()

    return run


def native(flat: Tensor) -> dict[str, Case]:
    """Run gloo's own reduce-scatter and all-gather, in one piece."""
    share = flat.chunk(dist.get_world_size())[dist.get_rank()].clone()
    whole = torch.empty_like(flat)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return {
        "reduce_scatter, native": lambda: scatter(share, flat),
        "all_gather, native": lambda: gather(whole, share),
    }


def memory(flat: Tensor) -> dict[str, Case]:
    """Run the local work that no update can avoid: copies, in one piece and in many, and AdamW."""
    target, half = torch.empty_like(flat), flat.numel() // dist.get_world_size()
    small, small_target = torch.split(flat, 1024), torch.split(target, 1024)
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(half) for _ in range(4))
    step = torch.ones(())
    adamw: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
    return {
        "memcpy, all elements": lambda: target.copy_(flat),
        "foreach copy, all elements in runs of 1,024": lambda: torch._foreach_copy_(list(small_target), list(small)),
        "sum of two, 1/W of the elements": lambda: torch.add(flat[:half], target[:half], out=target[:half]),
        "fused AdamW, 1/W of the elements": lambda: torch._fused_adamw_(
            [param], [grad], [exp_avg], [exp_avg_sq], [], [step], amsgrad=False, maximize=False, **adamw
        ),
    }


def measure(numel: int, rounds: int) -> list[records.Record]:
    """Time every case. Collective."""
    size = dist.get_world_size()
    check()
    flat = torch.zeros(-(-numel // (32 * size)) * 32 * size)  # slices are equal, and begin where lines of memory do
    cases: dict[str, Case] = {}
    for nominal in MESSAGE_CHUNKS:
        chunk = -(-nominal // (32 * size)) * 32 * size
        for depth in (1, 2, 4):
            cases[f"messages + sum, chunks of {chunk:,}, {depth} under way"] = messages_to_owners(flat, chunk, depth)
        for depth in (1, 2, 4):
            cases[f"messages in place, chunks of {chunk:,}, {depth} under way"] = messages_from_owners(
                flat, chunk, depth
            )
        cases |= engine_itself(flat, chunk)
    for nominal in CHUNKS:
        chunk = -(-nominal // (32 * size)) * 32 * size
        for depth in (1, 2, 4):
            cases[f"all_to_all + sum, chunks of {chunk:,}, {depth} under way"] = reduce_to_owners(flat, chunk, depth)
        cases[f"broadcasts, chunks of {chunk:,}"] = broadcasts(flat, chunk)
        cases[f"all_reduce, chunks of {chunk:,}"] = all_reduce(flat, chunk)
    cases |= native(flat) | memory(flat)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for k in range(1 + rounds):
        for name, case in cases.items():
            dist.barrier()
            began = time.perf_counter()
            case()
            if k:
                seconds[name].append(time.perf_counter() - began)
    numel = flat.numel()
    by_rank = ranks.gathered({name: median(times) for name, times in seconds.items()})
    fastest = ranks.gathered({name: min(times) for name, times in seconds.items()})
    return [
        {
            "kind": "transport",
            "case": name,
            "numel": numel,
            "ranks": dist.get_world_size(),
            "ns_per_element": max(one[name] for one in by_rank) / numel * 1e9,
            "fastest_ns_per_element": max(one[name] for one in fastest) / numel * 1e9,
        }
        for name in cases
    ]


def main() -> None:
    """Start the ranks, or run as one."""
    parser = argparse.ArgumentParser(description="What the transport can do.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--numel", type=int, default=1 << 24, help="a multiple of ranks x the largest chunk is best")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--timeout", type=float, default=600.0)
    options = parser.parse_args()
    if not ranks.is_rank():
        ranks.start("benchmarks.transport", sys.argv[1:], ranks=options.ranks, timeout=options.timeout)
        return
    with ranks.joined() as (rank, _):
        found = measure(options.numel, options.rounds)
        if rank == 0:
            records.append(options.out, [records.environment(), *found])
            for record in found:
                print(f"{record['case']:60} {record['ns_per_element']:7.2f} ns an element")


if __name__ == "__main__":
    main()
