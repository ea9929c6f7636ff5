"""Check that copies of weights and state are the same bits on all ranks that have them.

Knows parameters, the shards of `DistAdamW` and process groups; nothing of engines or files.

Which parameters have copies: under data parallelism and ZeRO-1 and -2 all; of DTensors those along the axes of their
mesh that replicate (HSDP); under FSDP2 without such an axis none, and under ZeRO-3 those that it keeps whole (the
others have no elements between two passes). Of optimizer state, what ranks do not share out: all of it with
``shard=False``, and the other copies of a mesh with two axes.

Left out are buffers, since nothing tells a constant from what each forward pass makes of its own samples (BatchNorm's
statistics, which DDP overwrites with rank 0's at every forward pass; counters; codebooks; caches), and a false alarm
ends a job.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dist_adamw.errors import AgreementError
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.sharding.dtensors import is_dtensor, local_of
from dist_adamw.optimizer.sharding.fingerprints import fingerprints
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.agreement import AgreementWatch, Record
from dist_adamw.wrappers import unwrap, without_wrappers

# On two CPU ranks a comparison takes 2 % of an update of the default GPT, 15 % of one that is nothing but AdamW and
# traffic (140 % with thousands of small tensors), and it waits for the device. A hundredth of that is not felt.
CHECK_WEIGHTS_EVERY = 100

_PRIME = 2**48 - 59  # sums over as many as 2**15 ranks fit into 64 bits
_SAID = 3  # parameters that an error names
_SENDERS = 32  # ranks that send all their fingerprints to explain a difference
_NEXT = "what comes next"  # a field: some loops save on one rank, where others go on to the next update

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Ranks = tuple[int, ...]
Copies = dict[tuple[Ranks, str], Tensor]  # by the ranks that hold the same, and its name


def check_replicas(model: nn.Module, optimizer: Any = None, *, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank when weights or optimizer state that must be the same bits are not. Collective.

    One pass over the memory, a few bytes of traffic, and no second copy of anything. Call it before a save, or
    whenever a loop of your own wants to know; `dist_adamw.prepare` does both.

    Args:
        model: With or without its wrapper.
        optimizer: A `DistAdamW`, of whose state the copies are compared too; others are left alone.
        group: All ranks, in a group that can reduce CPU tensors (gloo). None: the default group, or one beside it.

    Raises:
        AgreementError: names the rank and the parameter. Of three copies and more the odd one is wrong; of two,
            nobody can tell.
    """
    inner = None if optimizer is None else unwrap(optimizer)
    if isinstance(inner, DistAdamW):
        inner.wait()
    if collectives.world_size(group) == 1:
        return
    group = collectives.host_group() if group is None else group
    copies: Copies = {}
    found: dict[tuple[Ranks, str], int] = {}
    digests: dict[Ranks, int] = {}
    problem, share = None, 0
    try:
        copies = copies_on_this_rank(model, inner, collectives.world_size(group))
        found = dict(zip(copies, fingerprints(list(copies.values())), strict=True))
        digests = _digests(copies, found)
        share = _share_of_zero(digests)
    except Exception as error:  # without the others' knowledge they would wait for ever
        problem = error
    total = torch.tensor([share, problem is not None])
    dist.all_reduce(total, group=group)
    if total[1]:
        told = collectives.all_gather_objects(problem and f"{type(problem).__name__}: {problem}", group)
        said = "; ".join(f"{text} (rank {rank})" for rank, text in enumerate(told) if text is not None)
        raise AgreementError(f"the ranks' weights could not be compared: {said}.") from problem
    if int(total[0]) % _PRIME:
        _explain(digests, {key: f"{found[key]:016x} {_kind(tensor)}" for key, tensor in copies.items()}, group)


class ReplicaWatch(AgreementWatch):
    """Compares a record at every update, as `AgreementWatch` does, and replicas at some.

    Args:
        group: As of `check_replicas`.
        record: What ranks must agree on at an update; its ``"samples"``, or ``"updates"``, tell updates apart.
        compare: Raises on every rank when replicas differ. Collective.
        every: Updates between two comparisons, of which the first is at the first update. None or 0: never.

    Collective: every rank calls each method equally often.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        record: Callable[[], Record],
        compare: Callable[[], None],
        every: int | None,
    ) -> None:
        super().__init__(group)
        self._record, self._compare, self._every = record, compare, every
        self._begun = 0  # updates that all ranks are known to have begun
        self._samples: int | None = None  # of the last call
        self._is_agreed = False  # whether all ranks compare equally often

    def _agree_once(self) -> None:
        """Raise on every rank where they would not compare at the same updates, and wait for each other. Collective."""
        if not self._is_agreed:
            agreement.check_agreement({"check_weights_every": self._every or 0}, self._group)
            self._is_agreed = True

    def before_update(self, *_: Any) -> None:
        """Compare what the coming update is about to apply. A step pre-hook of the optimizer.

        Raises:
            AgreementError: on every rank.
        """
        self._agree_once()
        record = {**self._record(), _NEXT: "an update"}
        self.check(record)
        before, self._samples = self._samples, record["samples" if "samples" in record else "updates"]
        if not self._every or self._begun % self._every:
            self._begun += before != self._samples
            return
        # Whether weights are compared must not differ between ranks, so their clocks are compared first.
        self.settle()
        if before != self._samples:  # DeepSpeed steps one group after the other, with the weights half updated
            self._begun += 1
            self._compare()

    def before_save(self) -> None:
        """Compare all there is, before anything is written.

        Raises:
            AgreementError: on every rank.
        """
        self._agree_once()
        self.check({**self._record(), _NEXT: "a save"})
        self.settle()
        if self._every:
            self._compare()


# ---------------------------------------------------------------- what has copies


def copies_on_this_rank(model: nn.Module, optimizer: Optimizer | None, world_size: int) -> Copies:
    """Return the tensors of which other ranks have copies. Local."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    everyone = tuple(range(world_size))
    apart = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    params = {name: param for name, param in model.named_parameters() if name not in apart}
    bare = {without_wrappers(name): param for name, param in params.items()}
    if len(bare) == len(params):
        params = bare
    shared_out = any(is_dtensor(param) for param in params.values())
    copies = {}
    for name, param in params.items():
        if is_dtensor(param):
            copies[_ranks_with(param), name] = local_of(param)
        elif not _is_ranks_own(param, shared_out):
            copies[everyone, name] = param
    if isinstance(optimizer, DistAdamW):
        copies |= _copies_of_state(optimizer, {param: name for name, param in params.items()}, everyone)
    return {(ranks, name): tensor for (ranks, name), tensor in copies.items() if len(ranks) > 1 and _has_bits(tensor)}


def _is_ranks_own(param: Tensor, shared_out: bool) -> bool:
    """Return whether nothing keeps a plain parameter the same on all ranks. Local."""
    is_expert = not getattr(param, "allreduce", True)  # DeepSpeed's mark
    is_ignored_by_fsdp = shared_out and param.requires_grad
    return is_expert or is_ignored_by_fsdp


def _has_bits(tensor: Tensor) -> bool:
    """Return whether the tensor's memory is its value: not of meta, sparse, or a subclass that wraps others."""
    return not (tensor.is_meta or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor))


def _ranks_with(param: DTensor) -> Ranks:
    """The ranks that hold the same part of ``param``, this one included. Local."""
    mesh = param.device_mesh
    here = mesh.get_coordinate()
    if here is None:
        return ()
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    # Along "tp" each rank computes the gradient of what is replicated by itself, to the last bit or not.
    place = tuple(
        slice(None) if placement.is_replicate() and name != "tp" else at
        for at, placement, name in zip(here, param.placements, names, strict=True)
    )
    return tuple(sorted(mesh.mesh[place].flatten().tolist()))


def _copies_of_state(optimizer: DistAdamW, names: Mapping[Tensor, str], everyone: Ranks) -> Copies:
    """Moments and masters that other ranks have too. A shard's lie side by side, and are told apart by its ends."""
    copies: Copies = {}
    for shard in optimizer.shards:
        first, last = (names.get(shard.params[i]) for i in (0, -1))
        if first is None or last is None:
            continue  # another model's, or the partitions that ZeRO puts in their place
        ranks: Ranks = ()
        if is_dtensor(shard.params[0]):
            ranks = _ranks_with(shard.params[0])
        elif shard.process_group is None:
            ranks = everyone
        elif optimizer.replica_group is not None:
            ranks = tuple(sorted(dist.get_process_group_ranks(optimizer.replica_group)))
        of = first if first == last else f"{first} to {last}"
        copies |= {(ranks, f"{name} of {of}"): tensor for name, tensor in shard.moments.items()}
    return copies


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _digests(copies: Copies, found: Mapping[tuple[Ranks, str], int]) -> dict[Ranks, int]:
    """By ranks that hold the same, 64 bits of all that they hold."""
    digests: dict[Ranks, Any] = {}
    for (ranks, name), tensor in copies.items():
        if ranks not in digests:
            digests[ranks] = hashlib.blake2b(digest_size=8)
        digests[ranks].update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {found[ranks, name]};".encode())
    return {ranks: int.from_bytes(digest.digest(), "big") for ranks, digest in digests.items()}


def _share_of_zero(digests: Mapping[Ranks, int]) -> int:
    """Return this rank's term of a sum over all ranks that is 0 when replicas agree.

    Of the m ranks that hold the same, each but the last adds its digest d, and the last takes off (m - 1) d. If one
    digest differs, or there are two different ones, it is not 0; if there are more, it is with a chance of 1 in 2**48.
    """
    total = 0
    for ranks, value in digests.items():
        total += value * (1 - len(ranks)) if dist.get_rank() == ranks[-1] else value
    return total % _PRIME


# ---------------------------------------------------------------- who differs


def _explain(
    digests: Mapping[Ranks, int], found: Mapping[tuple[Ranks, str], str], group: dist.ProcessGroup | None
) -> None:
    """Find out who differs in what, and raise. Collective.

    Ranks exchange a digest for each set of copies. Of sets that differ, one rank with each digest sends what it found.
    """
    reports = collectives.all_gather_objects({_key(ranks): (of, len(ranks)) for ranks, of in digests.items()}, group)
    voters: dict[int, dict[int, list[int]]] = {}  # by set of copies and digest, the ranks that have it
    sizes: dict[int, int] = {}
    for rank, report in enumerate(reports):
        for key, (digest, size) in report.items():
            voters.setdefault(key, {}).setdefault(digest, []).append(rank)
            sizes[key] = size
    suspects = {
        key: by_digest
        for key, by_digest in voters.items()
        if len(by_digest) > 1 or sum(map(len, by_digest.values())) < sizes[key]
    }
    all_senders = sorted({ranks[0] for by_digest in suspects.values() for ranks in by_digest.values()})
    senders = all_senders[:_SENDERS]
    mine = {(ranks, name): value for (ranks, name), value in found.items() if _key(ranks) in suspects}
    sent = {sender: collectives.broadcast_object(mine, sender, group) for sender in senders}
    speaks_for = {
        (key, rank): ranks[0] for key, by_digest in suspects.items() for ranks in by_digest.values() for rank in ranks
    }
    differing: dict[tuple[Ranks, Ranks], list[str]] = {}  # by who is wrong, and the ranks that should be the same
    for ranks, name in dict.fromkeys(key for record in sent.values() for key in record):
        # A rank without this set has no speaker, and is missing it; one whose speaker has not sent is left out.
        speakers = {rank: speaks_for.get((_key(ranks), rank)) for rank in ranks}
        values = {
            rank: "missing" if speaker is None else sent[speaker].get((ranks, name), "missing")
            for rank, speaker in speakers.items()
            if speaker is None or speaker in sent
        }
        usual, count = Counter(values.values()).most_common(1)[0]
        if count == len(values):
            continue
        is_known = count > len(values) / 2
        odd = tuple(rank for rank, value in values.items() if value != usual or not is_known)
        differing.setdefault((odd, tuple(values)), []).append(name)
    more = (
        f"; {len(all_senders) - len(senders)} more ranks have others still" if len(all_senders) > len(senders) else ""
    )
    raise AgreementError(
        f"{'; '.join(_sentence(odd, ranks, names) for (odd, ranks), names in differing.items())}{more}. Load a "
        "checkpoint from before. Look for code that only some ranks run, weights that ranks read or draw differently, "
        "or a faulty device; where ranks are meant to differ, pass check_weights_every=0."
    )


def _key(ranks: Ranks) -> int:
    """A short name of a set of ranks, of which there may be thousands."""
    return int.from_bytes(hashlib.blake2b(repr(ranks).encode(), digest_size=8).digest(), "big")


def _sentence(odd: Ranks, ranks: Ranks, names: list[str]) -> str:
    what = ", ".join(map(repr, names[:_SAID])) + (f" and {len(names) - _SAID} more" if len(names) > _SAID else "")
    others = [rank for rank in ranks if rank not in odd]
    if not others:
        return f"{_named(ranks)} differ in {what}, and nothing tells which is right"
    return f"{_named(odd)} {'differs' if len(odd) == 1 else 'differ'} from {_named(others)} in {what}"


def _named(ranks: Sequence[int]) -> str:
    """Such as "rank 2", or "ranks 0, 1 and 4 more"."""
    said = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {said}"
