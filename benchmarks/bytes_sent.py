"""Count the bytes that a rank sends per update, where `DistAdamW` hands them over.

    python -m benchmarks.bytes_sent --out r.jsonl

Counted are tensors given to torch.distributed (of a collective on W ranks (W - 1)/W of the buffer, of an all-reduce
twice that), what is written to shared memory (a gradient for the rank that reads it; a parameter once, for all, which
counts W - 1 times), and messages through pipes. ``--by`` chooses the transport: shared memory, messages between pairs
of ranks (gloo between hosts), or the backend's collectives (as NCCL's, here on gloo).

In units of N x 4 bytes, an update sends f = (W - 1)/W of gradients and as much of parameters; with reproducible=True of
gradients f for every backward pass. The exit status is 1 if the count is more than 1% beside that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from benchmarks import markdown, ranks, records
from benchmarks.engines import OURS, REPRODUCIBLE, Engine, build
from benchmarks.workloads import CONSTANT, WORKLOADS, Workload
from dist_adamw.optimizer import transport
from dist_adamw.optimizer.transport.pipes import WIDTH, Pipes
from dist_adamw.optimizer.transport.shared_memory import SharedMemoryTransport

SHARED, MESSAGES, COLLECTIVES = "shared memory", "messages", "collectives"
WARM, COUNTED = 3, 2  # updates
SIZES, ACCUMULATION = (2, 4), (1, 4)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the bytes that this rank sends, by what they are handed to."""
    found: Counter[str] = Counter()
    size = dist.get_world_size()

    def count(owner: Any, name: str, of: Callable[..., float]) -> Any:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            found[name] += round(of(result, *args))
            return result

        return mock.patch.object(owner, name, counting)

    def gathered(_: object, self: Any, k: int, *__: object) -> int:
        if self._slots is None:
            return 0  # it was sent in messages
        pieces = self._slices[k][self._rank].pieces
        return (size - 1) * sum(piece.numel for piece in pieces) * self._like.itemsize

    share = (size - 1) / size
    with contextlib.ExitStack() as stack:
        for name in ("isend", "send"):
            stack.enter_context(count(dist, name, lambda _, tensor, *__: tensor.nbytes))
        stack.enter_context(count(dist, "all_to_all_single", lambda _, out, *__: share * out.nbytes))
        stack.enter_context(count(dist, "all_reduce", lambda _, tensor, *__: 2 * share * tensor.nbytes))
        for names, place in ((("reduce_scatter_single", "reduce_scatter_tensor"), 1), (("all_gather_single",), 0)):
            for name in filter(lambda name: hasattr(dist, name), names):
                stack.enter_context(count(dist, name, lambda _, *args, place=place: share * args[place].nbytes))
        stack.enter_context(count(SharedMemoryTransport, "_outgoing", lambda outgoing, *_: sum(map(nbytes, outgoing))))
        stack.enter_context(count(SharedMemoryTransport, "start_gather", gathered))
        stack.enter_context(count(Pipes, "post", lambda *_: (size - 1) * 8 * WIDTH))
        yield found


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.nbytes


def update(engine: Engine, accumulation: int) -> None:
    """Make one update. Collective."""
    engine.backward_passes(accumulation)
    engine.step()
    engine.forward()


def measure(name: str, workload: Workload, by: str, accumulation: int) -> records.Record:
    """Count the bytes of an engine's updates. Collective."""
    host = {"sends_from_host": lambda *_: False} if by == COLLECTIVES else {}
    with contextlib.ExitStack() as stack:
        for attribute, value in host.items():
            stack.enter_context(mock.patch.object(transport, attribute, value))
        stack.enter_context(mock.patch.dict(os.environ, {"DIST_ADAMW_SHARED_MEMORY": str(int(by == SHARED))}))
        engine = build(name, workload)
        for _ in range(WARM):
            update(engine, accumulation)
        with counted() as found:
            for _ in range(COUNTED):
                update(engine, accumulation)
    size = dist.get_world_size()
    sent = sum(sum(one.values()) for one in ranks.gathered(found)) / COUNTED / size
    gradients = accumulation if name == REPRODUCIBLE else 1
    return {
        "kind": "bytes_sent",
        "engine": name,
        "by": by,
        "ranks": size,
        "accumulation": accumulation,
        "numel": workload.numel,
        "sent_per_rank": sent,
        "sent": sent / (4 * workload.numel),
        "expected": (size - 1) / size * (gradients + 1),
        "of_rank_0": {key: value / COUNTED for key, value in found.items()},
    }


def work(options: argparse.Namespace) -> None:
    """Run one rank."""
    with ranks.joined() as (rank, _):
        workload = Workload.named(options.workload, rank=rank, gradients=CONSTANT)
        for by in options.by:
            for accumulation in ACCUMULATION:
                for name in (OURS, REPRODUCIBLE):
                    found = measure(name, workload, by, accumulation)
                    if rank == 0:
                        records.append(options.out, [found])


def table(found: list[records.Record]) -> list[str]:
    """Return the bytes in Markdown."""
    rows = []
    for by in dict.fromkeys(record["by"] for record in found):
        for size in SIZES:
            row = [f"{by}, {size} ranks"]
            for accumulation in ACCUMULATION:
                for name in (OURS, REPRODUCIBLE):
                    case = (by, size, accumulation, name)
                    row += [
                        f"{record['sent']:.3f}"
                        for record in found
                        if (record["by"], record["ranks"], record["accumulation"], record["engine"]) == case
                    ]
            rows.append(row)
    head = [f"{kind}, {accumulation}" for accumulation in ACCUMULATION for kind in ("plain", "reproducible")]
    return markdown.table(["transport", *head], rows)


def main() -> int:
    """Start the ranks, or run as one; return 1 if more or less is sent than should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt")
    parser.add_argument(
        "--by", nargs="+", choices=(SHARED, MESSAGES, COLLECTIVES), default=[SHARED, MESSAGES, COLLECTIVES]
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds, for each number of ranks")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if ranks.is_rank():
        work(options)
        return 0
    before = len(records.read([options.out])) if options.out.exists() else 0
    records.append(options.out, [records.environment()])
    for size in SIZES:
        ranks.start("benchmarks.bytes_sent", sys.argv[1:], ranks=size, timeout=options.timeout)
    found = [record for record in records.read([options.out])[before:] if record["kind"] == "bytes_sent"]
    print("\n".join(table(found)))
    wrong = [record for record in found if abs(record["sent"] / record["expected"] - 1) > 0.01]
    for record in wrong:
        print(f"sent {record['sent']:.3f}, and should be {record['expected']:.3f}: {record}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
