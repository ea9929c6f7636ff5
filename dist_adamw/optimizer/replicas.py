"""Check that replicated weights and optimizer state have the same bits on all ranks.

Parameters that are compared: all under data parallelism and ZeRO-1 and -2; DTensors along the axes of their mesh that
replicate (HSDP), so none under FSDP2 without such an axis; under ZeRO-3 those that it keeps whole (the others have no
elements between passes). Optimizer state that is compared: all of it with ``shard=False``, and the replicas of a mesh
with two axes.

Buffers are not compared. Some are constants, but others are computed from each rank's own samples (BatchNorm's
statistics, which DDP overwrites with rank 0's at every forward pass; counters; codebooks; caches), and there is no way
to tell them apart. A false alarm would end a job.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

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
from dist_adamw.ranks.piggyback import Exchange
from dist_adamw.wrappers import unwrap, without_wrappers

# On two CPU ranks a comparison takes 2 % of an update of the default GPT, 15 % of an update without a model (140 % with
# thousands of small tensors), and it waits for the device. Once in a hundred updates, that is negligible.
CHECK_WEIGHTS_EVERY = 100

_PRIME = 2**48 - 59  # sums over up to 2**15 ranks fit into 64 bits
_MAX_NAMED = 3  # parameters that an error names
_SENDERS = 32  # ranks that send all their fingerprints to explain a difference
# Fields of the record.
_NEXT = "what comes next"  # one rank may save while others begin the next update
_EVERY = "check_weights_every"

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Ranks = tuple[int, ...]
Copies = dict[tuple[Ranks, str], Tensor]  # by the ranks that have a copy, and its name
Votes = dict[int, dict[int, list[int]]]  # by `_key` of a set of copies, then by digest: the ranks with that digest


def check_replicas(model: nn.Module, optimizer: Any = None, *, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if replicas of weights or optimizer state differ in any bit. Collective.

    Takes one pass over the memory and a few bytes of traffic, and allocates no copies. Call it before a save or
    anywhere in your own loop; `dist_adamw.prepare` does both.

    Args:
        model: With or without its wrapper.
        optimizer: If it is a `DistAdamW`, its replicated state is compared too; others are ignored.
        group: All ranks, in a group that can reduce CPU tensors (gloo). None: the default group, or a gloo group of
            the same ranks.

    Raises:
        AgreementError: names the rank and the parameter. Of three or more copies, a minority is taken to be wrong; of
            two, either may be.
    """
    inner = None if optimizer is None else unwrap(optimizer)
    if isinstance(inner, DistAdamW):
        inner.wait()  # parameters in flight are partly old
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
    except Exception as error:  # must reach the all-reduce below: the other ranks wait there
        problem = error
    total = torch.tensor([share, problem is not None])
    dist.all_reduce(total, group=group)
    if total[1]:
        _raise_problems(problem, group)
    if int(total[0]) % _PRIME:
        _explain(digests, {key: f"{found[key]:016x} {_kind(tensor)}" for key, tensor in copies.items()}, group)


def _raise_problems(problem: Exception | None, group: dist.ProcessGroup | None) -> NoReturn:
    """Raise an error with the problems of all ranks. Collective."""
    mine = None if problem is None else f"{type(problem).__name__}: {problem}"
    texts = collectives.all_gather_objects(mine, group)
    problems = "; ".join(f"{text} (rank {rank})" for rank, text in enumerate(texts) if text is not None)
    raise AgreementError(f"the ranks' weights could not be compared: {problems}.") from problem


class ReplicaWatch(AgreementWatch):
    """Compares a record at every update, as `AgreementWatch` does, and replicas at some of them.

    Args:
        group: As for `check_replicas`.
        record: Returns what ranks must agree on at an update; its ``"samples"``, or ``"updates"``, identifies the
            update.
        compare: Raises on every rank if replicas differ. Collective.
        every: Compare replicas at every ``every``-th update, the first included. None or 0: never.

    Collective: every rank must call each method equally often.
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
        self._samples: int | None = None  # at the last call
        self._is_agreed = False  # whether ``every`` is known to be the same on all ranks

    def _agree_once(self) -> None:
        """Raise on every rank if ``every`` differs: some would wait for a comparison that others skip. Collective."""
        if not self._is_agreed:
            agreement.check_agreement({_EVERY: self._every or 0}, self._group)
            self._is_agreed = True

    def before_update(
        self, optimizer: Any = None, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Compare the record, and replicas if they are due. A step pre-hook of the optimizer.

        If the optimizer exchanges reports at this update, these take the record along.

        Raises:
            AgreementError: on every rank; in the exchange of reports if that takes the record along.
        """
        record = {**self._record(), _NEXT: "an update"}
        before, self._samples = self._samples, record["samples" if "samples" in record else "updates"]
        # DeepSpeed steps once for each group: in all but the first of these calls the weights are partly updated.
        is_first_call = before != self._samples
        is_due = self._every is not None and self._every > 0 and self._begun % self._every == 0
        # A closure computes its gradients later; until then it is not known whether there will be reports.
        has_closure = any(map(callable, (*args, *kwargs.values())))
        exchange = None if has_closure else self._exchange_of(optimizer)
        if exchange is not None:
            self._begun += is_first_call
            compare = self._compare if is_due and is_first_call else _do_nothing
            self.check_with(exchange, {**record, _EVERY: self._every or 0}, compare)
            return
        self._agree_once()
        self.check(record)
        # All ranks must make the same decision to compare, so wait until the clocks are known to be the same.
        if is_due:
            self.settle()
        self._begun += is_first_call
        if is_due and is_first_call:
            self._compare()

    def _exchange_of(self, optimizer: Any) -> Exchange | None:
        """Return an exchange between the ranks of this watch in which ``step`` takes part. The same on every rank."""
        exchange = optimizer._report_exchange() if isinstance(optimizer, DistAdamW) else None
        if exchange is None or not exchange.is_between(collectives.world_size(self._group)):
            return None
        return exchange

    def before_save(self) -> None:
        """Compare the record and, unless ``every`` is 0, replicas, before anything is written.

        Raises:
            AgreementError: on every rank.
        """
        self._agree_once()
        self.check({**self._record(), _NEXT: "a save"})
        self.settle()
        if self._every:
            self._compare()


def _do_nothing() -> None:
    pass


# ---------------------------------------------------------------- find replicas


def copies_on_this_rank(model: nn.Module, optimizer: Optimizer | None, world_size: int) -> Copies:
    """Return this rank's tensors of which other ranks have copies. Local."""
    everyone = tuple(range(world_size))
    params = _named_params(model)
    has_dtensors = any(is_dtensor(param) for param in params.values())
    copies = {}
    for name, param in params.items():
        if is_dtensor(param):
            copies[_ranks_with(param), name] = local_of(param)
        elif not _may_differ(param, has_dtensors):
            copies[everyone, name] = param
    if isinstance(optimizer, DistAdamW):
        copies |= _copies_of_state(optimizer, {param: name for name, param in params.items()}, everyone)
    return {(ranks, name): tensor for (ranks, name), tensor in copies.items() if len(ranks) > 1 and _has_bits(tensor)}


def _named_params(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that DDP does not ignore, by name; without wrappers' components if names stay unique."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    params: dict[str, Tensor] = {name: param for name, param in model.named_parameters() if name not in ignored}
    bare = {without_wrappers(name): param for name, param in params.items()}
    return bare if len(bare) == len(params) else params


def _may_differ(param: Tensor, has_dtensors: bool) -> bool:
    """Return whether a plain parameter may rightly differ over ranks. Local."""
    is_expert = not getattr(param, "allreduce", True)  # DeepSpeed's mark of experts
    # FSDP2 turns all trained parameters into DTensors except its ignored_params, which it does not average.
    is_ignored_by_fsdp = has_dtensors and param.requires_grad
    return is_expert or is_ignored_by_fsdp


def _has_bits(tensor: Tensor) -> bool:
    """Return whether the tensor's value is its memory: it is not meta or sparse, nor a subclass that wraps others."""
    return not (tensor.is_meta or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor))


def _ranks_with(param: DTensor) -> Ranks:
    """Return the ranks that hold the same part of ``param``, this one included. Local."""
    mesh = param.device_mesh
    here = mesh.get_coordinate()
    if here is None:
        return ()
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    # Along "tp" each rank computes the gradients of replicated parameters itself, and their last bits may differ.
    place = tuple(
        slice(None) if placement.is_replicate() and name != "tp" else at
        for at, placement, name in zip(here, param.placements, names, strict=True)
    )
    return tuple(sorted(mesh.mesh[place].flatten().tolist()))


def _copies_of_state(optimizer: DistAdamW, names: Mapping[Tensor, str], everyone: Ranks) -> Copies:
    """Return replicated moments and masters. A shard's are one flat tensor, named by its first and last parameter."""
    copies: Copies = {}
    for shard in optimizer.shards:
        first, last = (names.get(shard.params[i]) for i in (0, -1))
        if first is None or last is None:
            continue  # parameters of another model, or the partitions that ZeRO puts in their place
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
    """Return a 64-bit digest of each set of copies, by the ranks that have the set."""
    digests: dict[Ranks, Any] = {}
    for (ranks, name), tensor in copies.items():
        if ranks not in digests:
            digests[ranks] = hashlib.blake2b(digest_size=8)
        digests[ranks].update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {found[ranks, name]};".encode())
    return {ranks: int.from_bytes(digest.digest(), "big") for ranks, digest in digests.items()}


def _share_of_zero(digests: Mapping[Ranks, int]) -> int:
    """Return this rank's term of a sum over all ranks that is 0 if replicas agree.

    Of the m ranks that hold the same, each but the last adds its digest d, and the last subtracts (m - 1) d. With two
    different digests the sum is not 0; with more than two it is 0 with a chance of 1 in 2**48.
    """
    total = 0
    for ranks, value in digests.items():
        total += value * (1 - len(ranks)) if dist.get_rank() == ranks[-1] else value
    return total % _PRIME


# ---------------------------------------------------------------- explain a difference


def _explain(
    digests: Mapping[Ranks, int], found: Mapping[tuple[Ranks, str], str], group: dist.ProcessGroup | None
) -> NoReturn:
    """Find out which ranks and tensors differ, and raise. Collective.

    Ranks exchange a digest for each set of copies. If a set's digests differ, the first rank with each digest sends its
    fingerprints, on behalf of all ranks with that digest.
    """
    suspects = _find_suspects(digests, group)
    all_senders = sorted({ranks[0] for by_digest in suspects.values() for ranks in by_digest.values()})
    senders = all_senders[:_SENDERS]
    mine = {(ranks, name): value for (ranks, name), value in found.items() if _key(ranks) in suspects}
    sent = {sender: collectives.broadcast_object(mine, sender, group) for sender in senders}
    differing = _find_differing(sent, suspects)
    sentences = "; ".join(_sentence(odd, ranks, names) for (odd, ranks), names in differing.items())
    num_left_out = len(all_senders) - len(senders)
    more = f"; {num_left_out} more ranks differ too" if num_left_out else ""
    raise AgreementError(
        f"{sentences}{more}. Copies of weights and state must be equal on all ranks. Load an earlier checkpoint. Look "
        "for code that only some ranks run, weights that ranks load or initialize differently, or a faulty device; if "
        "ranks are meant to differ, pass check_weights_every=0."
    )


def _find_suspects(digests: Mapping[Ranks, int], group: dist.ProcessGroup | None) -> Votes:
    """Return the sets of copies with several digests, or that some of their ranks lack. Collective."""
    mine = {_key(ranks): (digest, len(ranks)) for ranks, digest in digests.items()}
    votes: Votes = {}
    sizes: dict[int, int] = {}
    for rank, report in enumerate(collectives.all_gather_objects(mine, group)):
        for key, (digest, size) in report.items():
            votes.setdefault(key, {}).setdefault(digest, []).append(rank)
            sizes[key] = size
    suspects: Votes = {}
    for key, by_digest in votes.items():
        num_voters = sum(map(len, by_digest.values()))
        if len(by_digest) > 1 or num_voters < sizes[key]:
            suspects[key] = by_digest
    return suspects


def _find_differing(
    sent: Mapping[int, Mapping[tuple[Ranks, str], str]], suspects: Votes
) -> dict[tuple[Ranks, Ranks], list[str]]:
    """Return the names of tensors that differ, by the ranks that are wrong and the ranks that should be the same.

    Args:
        sent: By sender, the fingerprints of its copies.
    """
    speakers = _speakers(suspects)
    differing: dict[tuple[Ranks, Ranks], list[str]] = {}
    for ranks, name in dict.fromkeys(key for record in sent.values() for key in record):
        values = _values_by_rank(ranks, name, sent, speakers)
        usual, count = Counter(values.values()).most_common(1)[0]
        if count == len(values):
            continue
        has_majority = count > len(values) / 2
        odd = tuple(rank for rank, value in values.items() if value != usual or not has_majority)
        differing.setdefault((odd, tuple(values)), []).append(name)
    return differing


def _speakers(suspects: Votes) -> dict[tuple[int, int], int]:
    """Return the rank that sends fingerprints for a rank, by the key of a set of copies and that rank."""
    speakers = {}
    for key, by_digest in suspects.items():
        for ranks in by_digest.values():
            for rank in ranks:
                speakers[key, rank] = ranks[0]
    return speakers


def _values_by_rank(
    ranks: Ranks,
    name: str,
    sent: Mapping[int, Mapping[tuple[Ranks, str], str]],
    speakers: Mapping[tuple[int, int], int],
) -> dict[int, str]:
    """Return the value of ``name`` on each of ``ranks``, except those whose speaker was not among the senders."""
    key = _key(ranks)
    values = {}
    for rank in ranks:
        speaker = speakers.get((key, rank))
        if speaker is None:  # this rank does not have the set
            values[rank] = "missing"
        elif speaker in sent:
            values[rank] = sent[speaker].get((ranks, name), "missing")
    return values


def _key(ranks: Ranks) -> int:
    """Return a short key for a tuple of ranks, which may be thousands."""
    return int.from_bytes(hashlib.blake2b(repr(ranks).encode(), digest_size=8).digest(), "big")


def _sentence(odd: Ranks, ranks: Ranks, names: list[str]) -> str:
    what = ", ".join(map(repr, names[:_MAX_NAMED]))
    if len(names) > _MAX_NAMED:
        what += f" and {len(names) - _MAX_NAMED} more"
    others = [rank for rank in ranks if rank not in odd]
    if not others:
        return f"{_named(ranks)} differ in {what}, and it is not known which is right"
    return f"{_named(odd)} {'differs' if len(odd) == 1 else 'differ'} from {_named(others)} in {what}"


def _named(ranks: Sequence[int]) -> str:
    """Return a text such as "rank 2", or "ranks 0, 1 and 4 more"."""
    numbers = ", ".join(map(str, ranks[:8]))
    if len(ranks) > 8:
        numbers += f" and {len(ranks) - 8} more"
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}"
