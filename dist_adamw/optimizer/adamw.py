"""DistAdamW: AdamW whose state is sharded by element over the data-parallel ranks.

Knows parameters, gradients and process groups; nothing of schedules, Accelerate or files.

Glossary:
    shard   the state of parameters of one group, dtype and device, and this rank's share of it
    piece   a run of one parameter's elements that this rank owns, inside one bucket
    staging one or two buckets of memory through which updated parameters travel
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, ParamsT

from dist_adamw.optimizer.gradients.paths import end_unless_everywhere, gather_from_owners
from dist_adamw.optimizer.gradients.reducer import GradientPath
from dist_adamw.optimizer.kernels import triton as adamw_triton
from dist_adamw.optimizer.kernels.foreach import (
    DecayBy,
    adamw_update_,
    can_fuse,
    check_hyper_parameters,
    norm_parts,
    sum_of_squares,
)
from dist_adamw.optimizer.kernels.mixed import mixed_adamw_update_
from dist_adamw.optimizer.options import OptionsDigest, describe_options
from dist_adamw.optimizer.pending import ArrivingParameter, can_guard, guard, release
from dist_adamw.optimizer.placement import (
    AMSGRAD_CHANGED,
    Bell,
    Changes,
    Entry,
    Flag,
    Shown,
    Snapshot,
    State,
    arrange,
    carry_state,
    check_changes_alike,
    check_new_state,
    check_once,
    find_changes,
)
from dist_adamw.optimizer.sharding.dtensors import is_dtensor, local_of
from dist_adamw.optimizer.sharding.engines import engine_that_shards
from dist_adamw.optimizer.sharding.fingerprints import fingerprints
from dist_adamw.optimizer.sharding.memory_order import axes_in_memory
from dist_adamw.optimizer.sharding.shard import MASTERS, MOMENTS, Shard, peek
from dist_adamw.optimizer.state_dict import (
    WholeState,
    check_entries,
    check_share,
    describe_share,
    gather_state,
    is_being_wrapped,
    stamps_of,
)
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT, InFlightBucket
from dist_adamw.plain_data import plain
from dist_adamw.ranks import agreement, collectives

StateDict = dict[str, Any]
_OPTIONS = ("decay_by", "max_grad_norm", "shard", "fused", "bucket_numel", "master_dtype", "state_dtype")


def _check_dtypes(
    master_dtype: torch.dtype | None, state_dtype: torch.dtype | None, betas: tuple[float, float]
) -> None:
    if master_dtype not in (None, torch.float32, torch.int16):
        raise ValueError(
            f"master_dtype must be torch.float32, torch.int16 (remainders of bf16) or None, got {master_dtype!r}."
        )
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {state_dtype!r}.")
    if state_dtype == torch.bfloat16 and 1 - betas[1] < 2**-8:
        warnings.warn(
            f"with state_dtype=torch.bfloat16 and betas[1]={betas[1]} exp_avg_sq never shrinks: what {betas[1]} takes "
            "off is less than half of bf16's last bit. Choose betas[1] <= 0.996.",
            stacklevel=3,
        )


def _number(value: float | Tensor) -> float:
    """``value``, out of a tensor of one element."""
    return float(value) if isinstance(value, Tensor) else value


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor for gradients, 0-d fp32. The constant is torch.nn.utils.clip_grad_norm_'s."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32)


def _capturing() -> bool:
    """Return whether a CUDA graph is being captured. A torch without CUDA raises when it is asked."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _pointed_at(tensor: Any, view: Tensor) -> Tensor:
    """Return ``tensor``, pointed at ``view``, where it can show it: the user may hold it and write to it later."""
    if type(tensor) is not Tensor or type(view) is not Tensor or tensor.requires_grad or tensor.is_inference():
        return view
    if (tensor.shape, tensor.dtype, tensor.device) != (view.shape, view.dtype, view.device):
        return view
    tensor.data = view
    return tensor


class _Arriving:
    """Buckets of updated parameters on their way.

    The parameters hold it until they are there, and not the optimizer: one that the user has replaced must end at once,
    or its hooks would still take the next gradients.
    """

    def __init__(self) -> None:
        self.buckets: list[tuple[Shard, InFlightBucket]] = []

    @torch.no_grad()
    def wait(self) -> None:
        """Wait until all are there."""
        while self.buckets:
            self._receive()

    @torch.no_grad()
    def wait_for(self, param: Tensor) -> None:
        """Wait until ``param`` is there: it is about to be read."""
        while self.buckets and type(param) is ArrivingParameter:
            self._receive()

    def _receive(self) -> None:
        shard, sent = self.buckets.pop(0)
        assert shard.transport is not None
        shard.transport.finish_gather(sent)
        coming = {id(param) for other, rest in self.buckets if other is shard for param in shard.members(rest.bucket)}
        release([param for param in shard.members(sent.bucket) if id(param) not in coming])


_last_tag = 0


def _new_tag(groups: Iterable[dist.ProcessGroup]) -> int:
    """A number that no path of these ranks has had, the same on all of them. Collective."""
    global _last_tag
    tag = _last_tag + 1
    for group in groups:
        tag = max(collectives.all_gather_objects(tag, group))
    _last_tag = tag
    return tag


class DistAdamW(Optimizer):
    """AdamW with its state sharded by element over the data-parallel ranks.

    Each of W ranks keeps 1/W of ``exp_avg`` and ``exp_avg_sq``, to the element; after its share is
    updated, the parameters are gathered. Given the same averaged gradients, the weights are the
    same bits as ``torch.optim.AdamW(fused=True)`` gives on one rank. Without a process group it is
    that optimizer. Parameters keep their own storage.

    Args:
        params: As for any torch optimizer: parameters, ``named_parameters()`` or group dicts.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: See ``decay_by``.
        amsgrad: Divide by the running maximum of the second moment.
        maximize: Ascend instead of descend.
        decay_by: "lr": weights are multiplied by 1 - lr * weight_decay (torch's convention).
            "schedule": by 1 - weight_decay (the paper's); an update with lr == 0 still leaves
            them alone.
        max_grad_norm: Clip the gradient of all groups together to this global L2 norm. An
            update whose norm is inf or nan is skipped on every rank. ``float("inf")`` measures
            without clipping; None does neither.
        master_dtype: Of the weights that are updated, where parameters are bf16 or fp16: ``torch.float32``
            keeps fp32 weights in the shard; ``torch.int16``, for bf16 alone, keeps the 16 bits that
            they have beyond the parameters, to the same bits in half the memory. None updates the
            parameters themselves. fp32 parameters need none.
        state_dtype: Of the moments: ``torch.float32``, or ``torch.bfloat16`` for half the memory. None:
            fp32 beside ``master_dtype``, else the parameters' dtype, as in torch.
        shard: "auto" shards over ``mesh``, or all ranks when ``torch.distributed`` is
            initialised at the first update. False keeps whole state on every rank. True is
            "auto" that refuses to run unsharded.
        mesh: Device mesh of the data-parallel ranks; default: all ranks. With two axes state is
            replicated along the first and sharded along the second (HSDP: nodes, ranks in a node).
        fused: True for torch's fused kernel, False for foreach; None takes fused where it runs.
        bucket_numel: Elements that travel together; None: what suits the model and the ranks.

    Raises:
        ValueError: a hyper-parameter is out of range (or nan), or ``params`` is empty.

    ``step`` is collective when sharded: every rank calls it equally often. All options must be the same on all ranks;
    `attach`, ``dist_adamw.prepare`` or the first sharded `step` compares them (the last cannot see ``shard=False`` of
    some ranks alone, whose `step` sends nothing). Gradients are reduced to
    their owners after `attach`; without it they must be the same on every rank by then, which is
    what DDP's all-reduce leaves behind. A rank finds its share in ``state``, 1-D, and zeros of a
    parameter that has had no gradient yet, where torch has no entry.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2; sharding as in ZeRO-1,
    Rajbhandari et al., arXiv:1910.02054.
    """

    # Of an unpickled optimizer, whose __init__ has not run.
    _tag = 0
    _mesh: DeviceMesh | None = None
    _path: GradientPath | None = None
    _unattached_updates = 0
    gathers_from_owners = True  # where another optimizer reduces gradients of these parameters to their owners
    _defer_gather = False
    _is_agreed = False  # whether ranks have compared their options
    _attached: Sequence[weakref.ref[nn.Module]] = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decay_by: DecayBy = "lr",
        max_grad_norm: float | None = None,
        master_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        shard: bool | str = "auto",
        mesh: DeviceMesh | None = None,
        fused: bool | None = None,
        bucket_numel: int | None = None,
    ) -> None:
        if decay_by not in ("lr", "schedule"):
            raise ValueError(f"decay_by must be 'lr' or 'schedule', got {decay_by!r}.")
        if shard not in (True, False, "auto"):
            raise ValueError(f"shard must be True, False or 'auto', got {shard!r}.")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm must be above 0 or None, got {max_grad_norm!r}.")
        if mesh is not None and mesh.ndim > 2:
            raise ValueError(f"mesh must have one axis or two, got {mesh.ndim}: {mesh}. Pass mesh['axis name'].")
        if bucket_numel is not None and bucket_numel < 1:
            raise ValueError(f"bucket_numel must be above 0, got {bucket_numel!r}.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        check_hyper_parameters(defaults)
        betas = defaults["betas"] = (_number(betas[0]), _number(betas[1]))
        _check_dtypes(master_dtype, state_dtype, betas)
        self.master_dtype, self.state_dtype = master_dtype, state_dtype
        self.decay_by: DecayBy = decay_by
        self.max_grad_norm = max_grad_norm
        self.shard = shard
        self.fused = fused
        self.bucket_numel = bucket_numel
        self._mesh = mesh
        self._reset()
        super().__init__(params, defaults)
        self.state = State.of(self._bell, {})

    def _reset(self) -> None:
        """Forget the layout and what happened so far."""
        self.shards: list[Shard] = []
        self._placed: set[int] = set()  # ids: hashing a tensor costs ten times as much
        self._seen: Snapshot | None = None  # what the shards stand for
        self._shown: dict[int, Shown] = {}  # by id of parameter, what its entry in ``self.state`` was given
        if not hasattr(self, "_bell"):
            self._bell = Bell()  # rung when the user changes ``self.state``
        self._moved: list[Shard] = []  # shards whose parameters have other memory, as far as `_differs` has looked
        self._aside: list[Shard] = []  # of one parameter each that is in no group, but still in ``state``
        self._flag: Flag | None = None
        self._lacking: list[int] | None = None  # numbers of parameters without a gradient, where ranks compare them
        self._options = OptionsDigest()
        self._updates = 0
        self._found_inf: Tensor | None = None
        self._read: tuple[Tensor, torch.cuda.Event] | None = None  # the same on the host, once the event is over
        self._grad_norm: Tensor | None = None
        self._skipped = False
        self._arriving = _Arriving()
        # Whether an engine has sharded the parameters: then this rank updates what it finds, and sends nothing.
        self._shared_out: Literal["no", "dtensors", "partitions"] = "no"
        self._updates_of: dict[int, int] = {}  # by id of shard, where an engine steps one at a time
        self._consolidated: WholeState | None = None  # until state changes

    # ---------------------------------------------------------------- what happened so far

    @property
    def updates(self) -> int:
        """Applied updates so far; a skipped one does not count. Local."""
        self._resolve()
        return self._updates

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `step` left the weights alone: gradients were inf or nan, or there were none. Local.

        On an accelerator with ``max_grad_norm`` this waits until the device has come that far.
        """
        self._resolve()
        return self._skipped

    @property
    def skip_is_known(self) -> bool:
        """Whether `step_was_skipped` and `updates` are known without waiting for a device. Local."""
        return self._found_inf is None or self._read is None

    @property
    def grad_norm(self) -> Tensor | None:
        """Global gradient norm of the last update before clipping, 0-d; None without max_grad_norm."""
        return self._grad_norm

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the state; None when nothing is sharded. Local."""
        if self.shard is False or self._shared_out != "no" or not collectives.initialized():
            return None
        group = self._mesh.get_group(self._mesh.ndim - 1) if self._mesh is not None else dist.group.WORLD
        return group if collectives.world_size(group) > 1 else None

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that own the same elements as this one, in other copies of the state. Local."""
        if self.process_group is None or self._mesh is None or self._mesh.ndim == 1:
            return None
        group = self._mesh.get_group(0)
        return group if collectives.world_size(group) > 1 else None

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank, padding included. Local."""
        return sum(shard.nbytes for shard in self.shards)

    def _resolve(self) -> None:
        """Ask the device whether the last update was applied; free once asked."""
        if self._found_inf is not None:
            flag = self._found_inf
            if self._read is not None:
                flag, arrived = self._read
                arrived.synchronize()
                self._read = None
            self._skipped = bool(flag.item())
            self._found_inf = None
            self._updates += not self._skipped

    # ---------------------------------------------------------------- the update

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply one update. Collective when sharded.

        Args:
            closure: Re-evaluates the model and returns the loss.

        In a CUDA graph: capturing is not an update, and replays pass the host by, so `recount` afterwards. A
        tensor as ``lr`` is read again by every replay; ``weight_decay`` is the captured one, which under
        ``decay_by="lr"`` is that of a whole cycle.

        Raises:
            RuntimeError: a gradient is sparse, or `updates` is not known where capturing begins. Nothing has been
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.wait()
        if self.fused is False:  # a scheduler or the user may have put a tensor there since
            for group in self.param_groups:
                self._check_lr(group)
        capturing = _capturing()
        if capturing and not self.skip_is_known:
            raise RuntimeError(
                "the device has not said yet whether it applied the last update, and cannot be asked while a CUDA "
                "graph is captured. Read optimizer.updates before torch.cuda.graph begins."
            )
        self._resolve()
        self._skipped = True  # until there is something to apply
        if not self._collect_gradients():
            return loss
        self._warn_of_local_gradients()
        shards = self._present()
        grads = [shard.owned_grads() for shard in shards]
        if not any(shard.any_grad for shard in shards):
            self._settle_flag()
            return loss
        if self._only_initialises(shards, grads):
            return loss
        if self.max_grad_norm is None:
            clip: Tensor | None = None
            self._settle_flag()
            self._skipped = capturing
            if not capturing:
                self._count(shards)
        else:
            clip = self._measure(shards, grads, self.max_grad_norm)
            if clip.device.type == "cpu" and clip == 1:  # free to ask there
                clip = None
            if not all(map(self._is_fused, shards)) and self.step_was_skipped:
                if self._path is not None:
                    self._path.used()
                return loss  # foreach arithmetic cannot skip by itself
        self._consolidated = None
        for shard, buckets in zip(shards, grads, strict=True):
            if not shard.any_grad:
                continue
            shard.count_update(self._found_inf)
            self._update(shard, buckets, clip)
        if self._path is not None:
            self._path.used()
        if capturing:
            self._found_inf = None  # nothing has been applied, and nothing skipped
        return loss

    def _present(self) -> list[Shard]:
        """The shards of the parameters in the groups. DeepSpeed puts its partitions there one after the other."""
        if self._shared_out != "partitions":
            return self.shards
        here = {id(param) for param in self._all_params()}
        return [shard for shard in self.shards if id(shard.params[0]) in here]

    def _count(self, shards: list[Shard]) -> None:
        """One update more; where an engine steps one partition at a time, only with the first that has had as many."""
        if self._shared_out != "partitions":
            self._updates += 1
            return
        for shard in shards:
            if id(shard) not in self._updates_of:
                self._updates_of[id(shard)] = int(shard.steps.max())
            self._updates_of[id(shard)] += 1
            self._updates = max(self._updates, self._updates_of[id(shard)])

    def _only_initialises(self, shards: list[Shard], grads: Sequence[list[list[Tensor | None]]]) -> bool:
        """Whether this is no update: torch's get_optimizer_state_dict steps with lr 0 and gradients of zeros, once.

        State has been laid out by now, which is all that it wants. The first update of a warm-up has lr 0 too, and
        gradients that may be zero on this rank alone, so the ranks decide together. Collective while lr is 0.
        """
        if self._updates or self._shared_out == "partitions" or _capturing():
            return False
        if any(group["lr"] != 0 for group in self.param_groups):
            return False
        alike: dict[Any, Tensor] = {}
        for shard, buckets in zip(shards, grads, strict=True):
            found = alike.setdefault(shard.shard_axes, torch.zeros((), dtype=torch.int32, device=shard.steps.device))
            for grad in (grad for bucket in buckets for grad in bucket if grad is not None):
                torch.maximum(found, grad.any().to(found), out=found)
        self._settle_flag()
        for spread, found in alike.items():
            for group in self._ranks_of(spread):
                dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return not any(bool(found) for found in alike.values())

    def _ranks_of(self, spread: tuple[Any, ...] | None) -> list[dist.ProcessGroup]:
        """Over which ranks the elements of a shard are shared out: one group after the other."""
        if spread is None:
            return [] if self.process_group is None else [self.process_group]
        mesh, axes = spread
        return [mesh.get_group(axis) for axis in axes]

    def _collect_gradients(self) -> bool:
        """Follow what the user did, and have the averages of what this rank owns. Whether there is any. Collective."""
        changed = self._shared_out != "partitions" and self._differs()
        if self._path is None:
            gather_from_owners(None, self._all_params())
            if self.process_group is not None and not self._is_agreed:
                self._check_alike()  # nothing has been changed or sent yet
            self._follow(changed)
            return True
        if self._path.is_whole:
            self._follow(changed)
            return self._path.take_whole()
        group = self.process_group
        assert group is not None
        if not self._path.complete(
            group,
            self.replica_group,
            has_changes=changed,
            options=self._digest_options(),
            check_changes=self._check_changes_alike,
        ):
            return False
        self._follow(changed, is_agreed=self._path.asks_for_changes)
        self._path.arrive()
        return True

    def _warn_of_local_gradients(self) -> None:
        """Compare gradients once, at the second update, where it is not known that something averages them.

        Collective then; costs one pass over the gradients.
        """
        group = self.process_group
        if self._path is not None or group is None or self._unattached_updates > 1 or _capturing():
            return
        self._unattached_updates += 1
        if self._unattached_updates == 1:
            return
        self._settle_flag()
        grads = [param.grad for param in self._all_params() if param.grad is not None]
        value = agreement.fingerprint({"": fingerprints([grad for grad in grads if grad.layout == torch.strided])})
        device = self.shards[0].steps.device if dist.get_backend(group) != "gloo" and self.shards else None
        extremes = torch.tensor([value, -value], device=device)
        for ranks in (group, self.replica_group):
            if ranks is not None:
                dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=ranks)
        most, minus_least = extremes.tolist()
        if most != -minus_least:
            warnings.warn(
                f"gradients differ over the {collectives.world_size(group)} ranks before the second update: nothing "
                "averages them, and each rank updates its share by its own gradients alone. Call "
                "optimizer.attach(model) before training, use dist_adamw.prepare, or wrap the model in "
                "DistributedDataParallel. Ranks that train apart on purpose need shard=False.",
                stacklevel=5,  # the step() of the script
            )

    def _shards_by_now(self) -> list[Shard]:
        """The shards; of every parameter that requires a gradient where there were none. Local."""
        self.wait()
        if not self._is_laid_out:
            self._place_newcomers()
        for shard in self.shards:
            if shard.has_left_device():
                shard.refresh()
                self._seen = None  # what is shown is of the old device: the next update looks closer
        return self.shards

    def attach(
        self,
        model: nn.Module,
        *,
        overlap: bool = True,
        reduce_every_backward: bool = False,
        defer_gather: bool = False,
    ) -> None:
        """Reduce each gradient to the rank that owns it, in place of an all-reduce. Collective.

        Call it once per module, after ``DistributedDataParallel`` or ``.to()``; `dist_adamw.prepare`
        does. Per update each rank sends ``f N (b_g + b_p)`` bytes, f = (W - 1) / W, where an
        all-reduce sends ``f N (2 b_g + b_p)``.

        A ``DistributedDataParallel`` module keeps working as before, with ``no_sync``,
        ``find_unused_parameters`` and several optimizers; on a GPU build it with
        ``gradient_as_bucket_view=True``, or nothing overlaps. Its ``join()`` is not supported. A plain
        module gets its gradients averaged by this alone; it then has a ``no_sync()`` of its own, and
        every rank has the first one's parameters and buffers from now on, as DDP does it.

        After backward ``param.grad`` holds the average in this rank's own elements and local
        values in the others. For a norm use ``max_grad_norm`` or `clip_grad_norm_`; to read or change whole
        gradients, call `gather_gradients` first; after a change that treats every element alike (a clamp), call
        `accept_gradients`. Other changes between backward and `step` are refused, as far as they can be seen: by
        another tensor or address in ``param.grad``, its version counter, and on a CPU a sample of the values. A
        gradient set to None is not used, as in torch; ranks must set the same ones.

        Of a plain module only this optimizer's parameters are averaged: those of another optimizer, torch's say, are
        that one's user's to average.

        Parameters of this optimizer in a DDP module that is not attached belong to that DDP; parameters in no
        attached module are averaged in `step` where ranks' gradients differ. The optimizer that was attached last
        has a module's gradients; another one that steps on the same parameters gets whole ones, by one more gather.
        Every rank makes the same backward passes and updates: over gloo, a rank that skips a `step` alone is an error.

        Args:
            model: Its parameters are some of this optimizer's, or all.
            overlap: Send during backward. The same bits either way.
            reduce_every_backward: Reduce every micro-batch into the shard, ``no_sync`` or not, and
                let go of ``param.grad``, which is None after backward. Gradients then take
                ``b_g N / W`` bytes and what is on its way, instead of ``b_g N``; with A
                micro-batches an update sends ``f N (A b_g + b_p)``. Plain modules only.
                Every rank's backward passes must reach the module equally often, and what is not wanted is
                forgotten by this optimizer's ``zero_grad``, not by the module's; ``zero_grad(set_to_none=False)``
                leaves zeros in ``param.grad``, as in torch.
            defer_gather: Let `step` return while the last buckets of parameters travel. Whoever reads
                one of them, by any reference and in any torch function, waits for it then. Not for
                compiled modules, whose parameters are waited for as ever.

        Raises:
            ValueError: the module is wrapped so that this cannot be.
            AgreementError: ranks have other parameters, buffers or options. On every rank, before anything is sent.
        """
        if any(is_dtensor(param) for param in model.parameters()):
            return  # the engine that shards the parameters reduces their gradients
        options = {"overlap": overlap, "reduce_every_backward": reduce_every_backward, "defer_gather": defer_gather}
        wrapped = isinstance(model, DistributedDataParallel)
        self._check_alike({f"attach({name})": value for name, value in options.items()} | {"attach to DDP": wrapped})
        group = self.process_group
        if group is None:
            several = collectives.initialized() and collectives.world_size() > 1
            if several and not isinstance(model, DistributedDataParallel):
                raise ValueError(
                    "attach() needs sharded state, and this optimizer has shard=False: nothing would average the "
                    "gradients. Leave shard='auto', or wrap the model in DistributedDataParallel."
                )
            return
        if isinstance(model, DistributedDataParallel) and not self._shares_with(model.process_group):
            raise ValueError(
                f"the module is averaged over ranks {dist.get_process_group_ranks(model.process_group)}, and the "
                f"optimizer's state is shared over {self._ranks()}: gradients would be averaged over those alone. Give "
                "DistAdamW a mesh of all these ranks (two axes to replicate state), or do without attach()."
            )
        collectives.end_quietly()
        groups = [group] if self.replica_group is None else [group, self.replica_group]
        if self._path is None:
            self._path = GradientPath(
                self._all_params,
                self._shards_by_now,
                self.gather_gradients,
                overlap=overlap,
                into_shard=reduce_every_backward,
            )
            self._tag = _new_tag(groups)
            for shard in self.shards:
                shard.retag(self._tag)
            self._path.messages.open(groups, self._tag)
        elif (self._path.overlap, self._path.into_shard, self._defer_gather) != (
            overlap,
            reduce_every_backward,
            defer_gather,
        ):
            raise ValueError("attach() was called before with other options. Pass the same for every module.")
        self._defer_gather = defer_gather
        if not isinstance(model, DistributedDataParallel):
            self._make_alike(model)
        others = end_unless_everywhere(self._path, model)  # held: none may go on one rank alone before `listen`
        self._check_gradients_before(model)
        self._path.listen(model)
        del others
        self._attached = [*(ref for ref in self._attached if ref() not in (None, model)), weakref.ref(model)]

    def _check_gradients_before(self, model: nn.Module) -> None:
        """Refuse gradients of before `attach` that are not averages. Collective.

        Raises:
            ValueError: ranks have different ones. On every rank.
            RuntimeError: they are parts of averages that an optimizer left which is gone. On every rank.
        """
        assert self._path is not None
        ids = set(map(id, self._all_params())) - self._path.listening
        params = [param for param in model.parameters() if id(param) in ids]
        if not any(collectives.all_gather_objects(any(p.grad is not None for p in params), self.process_group)):
            return
        gather_from_owners(self._path, params)
        found = fingerprints([p.grad for p in params if p.grad is not None and p.grad.layout == torch.strided])
        if len(set(map(tuple, collectives.all_gather_objects(found, self.process_group)))) > 1:
            raise ValueError(
                "attach() of a module whose gradients differ over ranks: they may be local ones, or averages of which "
                "another optimizer left a part on each rank. Call zero_grad() before attach()."
            )

    def _make_alike(self, model: nn.Module) -> None:
        """Give every rank the first one's parameters and buffers. Collective.

        Raises:
            AgreementError: they have other shapes.
        """
        tensors = {
            name: tensor.detach()
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
            if not (tensor.is_meta or is_lazy(tensor))
        }
        record = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}
        for ranks in (self.process_group, self.replica_group):
            if ranks is not None:
                agreement.check_agreement(record, ranks)
                collectives.broadcast_from_first(list(tensors.values()), ranks)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, parameters: Iterable[Tensor] | None = None
    ) -> Tensor:
        """Clip gradients by their global norm, as ``torch.nn.utils.clip_grad_norm_`` does. Collective.

        For loops that clip between backward and `step`; ``max_grad_norm`` costs less. After
        `attach`, torch's function would take the norm of local gradients.

        Args:
            max_norm: The norm is scaled down to this.
            norm_type: The p of the norm; may be inf.
            parameters: Whose gradients; default: all of this optimizer. Others' are taken as they are.

        Returns:
            The norm before clipping, 0-d.
        """
        params = self._all_params() if parameters is None else list(parameters)
        gather_from_owners(self._path, params)
        if self._path is None or self._path.is_whole:
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        ours = {id(param) for param in self._all_params()}
        chosen = {id(param) for param in params}
        # Those of other optimizers are whole on every rank.
        foreign = [p.grad for p in params if id(p) not in ours and p.grad is not None]
        self._collect_gradients()
        self._settle_flag()
        owned = [
            grad
            for shard in self.shards
            for k, bucket in enumerate(shard.owned_grads())
            for piece, grad in zip(shard.owned_pieces(k), bucket, strict=True)
            if grad is not None and id(shard.params[piece.param]) in chosen
        ]
        device = self.shards[0].params[0].device if self.shards else params[0].device
        total = norm_parts(owned, norm_type) if owned else torch.zeros((), dtype=torch.float64, device=device)
        assert self.process_group is not None
        largest = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
        dist.all_reduce(total, op=largest, group=self.process_group)
        if foreign:
            theirs = norm_parts(foreign, norm_type).to(total.device)
            total = torch.maximum(total, theirs) if norm_type == math.inf else total + theirs
        norm = total if norm_type == math.inf else total.pow(1.0 / norm_type)
        for grads in (owned, foreign):
            if grads:
                torch._foreach_mul_(grads, _clip_factor(norm, max_norm))
        self._path.accept_changes()
        return norm.to(torch.float32)

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Let every ``param.grad`` be the whole gradient, averaged over all ranks. Collective.

        After `attach` a rank has the averages of the elements that it owns, and local values elsewhere. Call this after
        backward and before whatever reads gradients: SAM's first pass, norms of layers for a log, gradient surgery.
        What is then written to ``param.grad``, the same on every rank, is what `step` takes. Sends ``f N b_g`` bytes.

        Without `attach` gradients are left as they are: DDP has averaged them.
        """
        if self._path is None or self._path.is_whole:
            return
        has_gradients = self._collect_gradients()
        self._settle_flag()
        if has_gradients:
            self._path.make_whole()

    def accept_gradients(self) -> None:
        """Let gradients be what they are now, after a change that treats all elements alike. Local; on every rank.

        After `attach`, `step` refuses gradients that were changed since backward, because a norm
        taken of them is not the model's. Clamping each element, for example, is right.
        """
        if self._path is not None:
            self._path.accept_changes()

    def _ranks(self) -> list[int]:
        """Over which gradients are averaged: all of the mesh."""
        if self._mesh is not None:
            return sorted(int(rank) for rank in self._mesh.mesh.flatten())
        return sorted(dist.get_process_group_ranks(dist.group.WORLD))

    def _shares_with(self, group: dist.ProcessGroup) -> bool:
        """Return whether gradients that `attach` averages are averaged over the ranks of ``group``. Local."""
        return self._ranks() == sorted(dist.get_process_group_ranks(group))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what `attach` has reduced is forgotten too. Every rank alike."""
        if self._path is not None:
            self._path.look_at_siblings()
        super().zero_grad(set_to_none)
        if self._path is not None:
            self._path.discard(leave_zeros=not set_to_none)

    def _is_fused(self, shard: Shard) -> bool:
        return can_fuse(shard.params[0]) if self.fused is None else self.fused

    def _update(self, shard: Shard, grads: list[list[Tensor | None]], clip: Tensor | None) -> None:
        travelling: list[InFlightBucket] = []  # while the next bucket is computed
        for k, bucket in enumerate(grads):
            live = [i for i, grad in enumerate(bucket) if grad is not None]
            chosen = [cast(Tensor, bucket[i]) for i in live]
            if chosen:
                self._update_bucket(shard, k, live, chosen, clip)
            if shard.transport is not None:
                if len(travelling) == MAX_IN_FLIGHT:
                    shard.transport.finish_gather(travelling.pop(0))
                travelling.append(shard.transport.start_gather(k))
        if not travelling:
            return
        self._arriving.buckets += [(shard, sent) for sent in travelling]
        if not self._defer_gather or self._reader_is_compiled():
            self.wait()
            return
        for sent in travelling:
            params = shard.members(sent.bucket)
            if not all(map(can_guard, params)):
                self.wait()
                return
            guard(params, self._arriving.wait_for)

    def _reader_is_compiled(self) -> bool:
        """Whether a compiled module reads the parameters: it would be recompiled for another class of them."""
        compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
        return any(
            isinstance(module, compiled) or module._compiled_call_impl is not None
            for ref in self._attached
            if (model := ref()) is not None
            for module in model.modules()
        )

    @torch.no_grad()
    def wait(self) -> None:
        """Wait until every parameter has its new value.

        Needed only with ``defer_gather``, and then only before parameters are read in a way that
        passes by Python: an address taken before `step`, a ``torch.jit.ScriptModule``, a collective
        that is given the parameter itself.
        """
        self._arriving.wait()

    def _update_bucket(self, shard: Shard, k: int, live: list[int], grads: list[Tensor], clip: Tensor | None) -> None:
        """One pass over what this rank owns of bucket ``k``: of its pieces, the ``live`` ones."""
        group, fused = shard.group, self._is_fused(shard)
        hyper: dict[str, Any] = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}
        hyper["decay_by"] = self.decay_by
        params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters = shard.operands(k, live)
        state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        one_pass = fused and clip is not None and params[0].dtype != torch.float64
        if not (shard.is_mixed or one_pass):
            if clip is not None:
                grads = [grad * clip.to(grad.dtype) for grad in grads]
            adamw_update_(
                params, *state, grads=grads, fused=fused, found_inf=self._found_inf if fused else None, **hyper
            )
        elif params[0].is_cuda and adamw_triton.available(params[0].device):
            flat = shard.moments
            adamw_triton.flat_adamw_update_(
                shard.table(k, live, grads),
                flat.get("master", flat.get("remainder")),
                flat["exp_avg"],
                flat["exp_avg_sq"],
                flat.get("max_exp_avg_sq"),
                shard.steps,
                scale=clip,
                found_inf=self._found_inf,
                **hyper,
            )
        else:
            mixed_adamw_update_(params, grads, masters, *state, scale=clip, found_inf=self._found_inf, **hyper)

    def _measure(self, shards: list[Shard], grads: Sequence[list[list[Tensor | None]]], max_norm: float) -> Tensor:
        """Set the global norm and whether it is finite; return the clip factor, 0-d fp32. Collective."""
        device = shards[0].steps.device
        norm = self._sum_of_squares(shards, grads, device).sqrt()
        self._grad_norm = norm.to(torch.float32)
        self._found_inf = (~torch.isfinite(norm)).to(torch.float32)
        if device.type == "cuda" and not _capturing():
            flag = torch.empty((), dtype=torch.float32, pin_memory=True)
            flag.copy_(self._found_inf, non_blocking=True)
            self._read = (flag, torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._read[1].record()
        return _clip_factor(norm, max_norm)

    def _sum_of_squares(
        self, shards: list[Shard], grads: Sequence[list[list[Tensor | None]]], device: torch.device
    ) -> Tensor:
        """Of all elements of all gradients, each counted once, 0-d fp64. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        alike: dict[Any, list[Tensor]] = {}  # what is sharded over the same ranks
        for shard, buckets in zip(shards, grads, strict=True):
            owned = [grad for bucket in buckets for grad in bucket if grad is not None]
            alike.setdefault(shard.shard_axes, []).extend(owned)
        parts = {
            spread: sum_of_squares(owned).to(device) if owned else torch.zeros_like(total)
            for spread, owned in alike.items()
        }
        self._settle_flag()
        for spread, squares in parts.items():
            for group in self._ranks_of(spread):
                collectives.all_reduce_sum(squares, group)
            total += squares
        return total

    # ---------------------------------------------------------------- layout

    def announce_save(self) -> None:
        """Raise where, after `attach`, a rank goes on with training and does not save (gloo). Collective.

        Raises:
            AgreementError: names the rank and what it does. On every rank.
        """
        if self._path is not None:
            self._path.announce_save()

    def follow(self) -> None:
        """Do what the user's changes to ``param_groups``, ``state`` and weights mean, as `step` would. Collective.

        `dist_adamw.save` calls it, so that what is saved is what the model and the optimizer show.

        Raises:
            ValueError: something in ``state`` is no state of its parameter. Nothing has been changed then.
            AgreementError: ranks have made other changes. On every rank.
        """
        self.wait()
        if self._shared_out != "partitions":
            if self._is_laid_out:
                self._apply_changes(self._differs(), newcomers=False)
                self._settle_flag()
            else:
                self._place_newcomers(gradients=False)
        for shard in self.shards:
            shard.follow_weights()

    def _follow(self, changed: bool, *, is_agreed: bool = False) -> None:
        """Follow the user's changes, and give places to parameters that have their first gradient. Collective.

        Args:
            changed: Whether `_differs` on this rank.
            is_agreed: Whether the ranks are known to have made the same changes.
        """
        if self._shared_out == "partitions":
            self._follow_partitions()
        elif self._is_laid_out:
            self._apply_changes(changed, newcomers=True, is_agreed=is_agreed)
        else:
            if not is_agreed:
                self._raise_flag(bool(self.state), gradients=True)
                self._settle_flag()  # the user may have put something into ``state`` that is none, on one rank
            self._place_newcomers()

    def _follow_alone(self) -> None:
        """Follow the user's changes without the other ranks. Local.

        Raises:
            RuntimeError: ranks must do it together.
            ValueError: the user put something into ``state`` that is no state of its parameter.
        """
        if self._shared_out == "partitions":
            return
        if not self._is_laid_out:
            check_new_state(self.param_groups, self.state, ())
            return
        for shard in self.shards:
            shard.follow_weights()
        if not self._differs():
            self._check_amsgrad()
            return
        if self.process_group is None:
            self._apply_changes(True, newcomers=False)
            return
        changes = self._find_changes()
        if changes.removed or changes.reset or changes.given or self._is_rearranged(changes):
            raise RuntimeError(
                "param_groups or state were changed since the last update, and ranks follow that together: at the next "
                "step(), or in dist_adamw.save. Call one of them before state_dict()."
            )

    @property
    def _is_laid_out(self) -> bool:
        """Whether there is state: also of parameters that are all in no group now."""
        return bool(self.shards or self._aside)

    def _differs(self) -> bool:
        """Return whether ``param_groups``, ``state`` or the ranks are not what the shards stand for. Local."""
        if not self._is_laid_out:
            return False
        self._moved = self.shards
        if self._seen is None or self._seen.differs(self.param_groups, self.state):
            return True
        group = self.process_group
        self._moved = [shard for shard in self.shards if shard.has_moved()]
        return any(shard.process_group is not group for shard in self.shards) or not all(
            shard.fits() for shard in self._moved
        )

    def _find_changes(self) -> Changes:
        are_local = self._path is not None and not self._path.is_whole
        shards = [*self.shards, *self._aside]
        may_wait = self.process_group is None
        return find_changes(self.param_groups, self.state, shards, self._shown, are_local=are_local, may_wait=may_wait)

    def _apply_changes(self, changed: bool, *, newcomers: bool, is_agreed: bool = False) -> None:
        """Follow the user's changes; where state is sharded, once all ranks are known to have made the same.

        Args:
            changed: Whether `_differs` on this rank.
            newcomers: Give places to parameters with a first gradient, too.
            is_agreed: Whether the ranks are known to have made the same changes.
        """
        before = [shard.process_group for shard in (*self.shards, *self._aside)]
        if self.process_group is not before[0] and before[0] is not None:
            raise RuntimeError(
                "the process group is not the one that the optimizer's state is shared over. Save with "
                "accelerator.save_state, and load in a job that begins with the new group."
            )
        if newcomers and not changed:
            assert self._seen is not None
            changed = any(param.grad is not None for param in self._seen.waiting)
        if not is_agreed:
            self._raise_flag(changed, gradients=newcomers)
        changes = (self._settle_flag() or self._find_changes()) if changed else None
        if changes is not None:
            self._take_from_state(changes)
            self._take_back_zeros(changes)
            self._placed = set(changes.kept)
            self._place_newcomers(gradients=newcomers)
            self._arrange(changes)
        for shard in self._moved:
            if shard.has_moved() and any(shard is other for other in self.shards):
                shard.refresh()
                self._show(shard)
                changed = True
        if changed:
            self._consolidated = None
            self._remember()
        self._check_amsgrad()

    def _check_amsgrad(self) -> None:
        """Refuse a change that leaves state without maxima, or maxima without a use. Local, or after `_raise_flag`.

        Raises:
            RuntimeError: says when it can be set.
        """
        if any(shard.group["amsgrad"] != shard.has_maxima for shard in self.shards):
            self._settle_flag()  # on one rank alone, it is a disagreement
            raise RuntimeError(AMSGRAD_CHANGED)

    def _take_from_state(self, changes: Changes) -> None:
        """Let shards have what the user put into ``state``, or took out of it. Local."""
        written = {id(shard): shard for shard, _ in (*changes.reset, *(home for home, _ in changes.given))}
        for shard in written.values():
            shard.renew()
        for shard, i in changes.reset:
            shard.reset(i)
        for (shard, i), given in changes.given:
            shard.put(i, given)
        # Without a snapshot, state is on another device since.
        for shard in written.values() if self._seen is not None else self.shards:
            for i, param in enumerate(shard.params):
                if id(param) in changes.kept or peek(self.state, param):  # others have left, and their entry with them
                    self._show_one(shard, i)

    def _take_back_zeros(self, changes: Changes) -> None:
        """Take out of ``state`` what torch would not have: zeros of parameters that left before an update.

        Collective where state is shared and such a parameter has left.
        """
        given = {(id(shard), i) for (shard, i), _ in changes.given}
        left = [(shard, i) for shard, i in changes.removed if (id(shard), i) not in given and not shard.steps[i]]
        if not left:
            return
        entries = [peek(self.state, shard.params[i]) or {} for shard, i in left]
        # A user may have set ``step`` alone to zero. Ranks must decide alike: one rank's moments may all be zero.
        stays = torch.tensor(
            [any(bool(entry[key].any()) for key in MOMENTS if key in entry) for entry in entries], dtype=torch.int32
        )
        groups = self._groups_that_agree()
        if self.process_group is not None and not groups:  # ranks that cannot ask each other all drop it
            stays.zero_()
        for group in groups:
            dist.all_reduce(stays, op=dist.ReduceOp.MAX, group=group)
        for (shard, i), entry, it_stays in zip(left, entries, stays.tolist(), strict=True):
            shown = self._shown[id(shard.params[i])].values
            if entry and not it_stays and all(shown.get(key) is value for key, value in entry.items()):
                del self.state[shard.params[i]]

    # ---------------------------------------------------------------- agreement

    def _raise_flag(self, changed: bool, *, gradients: bool) -> None:
        """Tell the other ranks of changes, and of hyper-parameters. Nothing waits for the answer yet. Collective.

        Args:
            changed: Whether there are changes on this rank.
            gradients: Tell them also which parameters have a gradient: whole ones are averages, on every rank alike.
        """
        if groups := self._groups_that_agree():
            digest = self._digest_options()
            self._lacking = [i for i, p in enumerate(self._all_params()) if p.grad is None] if gradients else None
            if self._lacking:
                digest = agreement.fingerprint({"": [digest, *self._lacking]})
            self._flag = Flag(changed, digest, groups)

    def _settle_flag(self) -> Changes | None:
        """Before anything is changed or sent: whether ranks are alike. Collective.

        Returns:
            This rank's changes, if some rank has any.

        Raises:
            AgreementError: some rank has other changes, or other hyper-parameters. On every rank.
        """
        flag, self._flag = self._flag, None
        found = self._check_changes_alike() if flag is not None and flag.wait() else None
        self._lacking = None
        return found

    def _check_changes_alike(self) -> Changes:
        options = {name: plain(getattr(self, name)) for name in _OPTIONS} | describe_options(self.param_groups)
        if self._lacking is not None:
            options["parameters without a gradient"] = ", ".join(map(str, self._lacking)) or "none"
        groups = self._groups_that_agree()
        try:
            changes = self._find_changes()
        except (ValueError, RuntimeError) as error:  # perhaps on this rank alone
            # Not stored beyond this block: its traceback would hold this optimizer until garbage is collected.
            check_changes_alike(str(error), options, groups)
            raise
        check_changes_alike(changes, options, groups)
        return changes

    def _digest_options(self) -> int:
        limit = -1.0 if self.max_grad_norm is None else self.max_grad_norm
        return self._options.of(self.param_groups, (limit, self.decay_by == "lr", self.fused is None, bool(self.fused)))

    def _groups_that_agree(self) -> list[dist.ProcessGroup]:
        """The ranks that must make the same changes, in groups that can reduce a tensor of the host. Collective."""
        group, replicas = self.process_group, self.replica_group
        if group is None:
            return []
        if collectives.serves_host(group):
            return [group] if replicas is None else [group, replicas]
        host = collectives.host_group() if self._mesh is None else None
        return [] if host is None else [host]

    # ---------------------------------------------------------------- placing

    def _place_newcomers(self, *, gradients: bool = True) -> None:
        """Give places to parameters that have none yet, but state. Local.

        Args:
            gradients: To those that have a gradient, too; where state is sharded, at the first update to all that
                require one.

        Raises:
            ValueError: a parameter is in the groups twice, or the user put something into ``state`` that is no state of
                one of them. Nothing has changed then.
        """
        everyone = not self.shards and self.process_group is not None
        newcomers = [
            param
            for param in self._all_params()
            if id(param) not in self._placed
            and (
                bool(peek(self.state, param))
                or (gradients and (param.grad is not None or (everyone and param.requires_grad)))
            )
        ]
        if newcomers:
            check_once(self.param_groups)
            check_new_state(self.param_groups, self.state, self._placed)
            self._init_state(newcomers)

    def _init_state(self, params: Iterable[Tensor], *, are_shares: bool = False) -> None:
        """Lay out the state of ``params``, from ``self.state`` where it has some, else zeros. Local.

        The first update does this for every parameter that requires a gradient, loading for those
        that have state. Every rank places the same parameters in the same order.

        Args:
            are_shares: What ``self.state`` has is this rank's share, not the whole.
        """
        chosen = {id(param) for param in params} - self._placed
        self._detect_engine_sharding(chosen)
        if chosen and self.shard is True and self.process_group is None and self._shared_out == "no":
            raise RuntimeError(
                "shard=True, but there is one rank or torch.distributed is not initialised. "
                "Launch several ranks, or leave shard='auto'."
            )
        made = [self._make_shard(group, together) for group, together in arrange(self.param_groups, chosen)]
        for shard in made:
            for i, param in enumerate(shard.params):
                shard.adopt(i, peek(self.state, param) or {}, is_share=are_shares)
            self._show(shard)
            self._placed.update(map(id, shard.params))
        self.shards += made
        self._consolidated = None
        self._remember()

    def _make_shard(self, group: dict[str, Any], together: list[Tensor]) -> Shard:
        return Shard(
            together,
            group=group,
            process_group=self.process_group,
            replicas=self.replica_group,
            max_bucket_numel=self.bucket_numel,
            lean=self._is_lean,
            tag=self._tag,
            master_dtype=self.master_dtype,
            state_dtype=self.state_dtype,
        )

    def _arranged(self, changes: Changes | None = None) -> list[tuple[dict[str, Any], list[Tensor]]]:
        return arrange(self.param_groups, self._placed if changes is None else changes.kept.keys())

    def _is_rearranged(self, changes: Changes) -> bool:
        """Return whether other parameters than now should share a shard. Local."""
        wanted = self._arranged(changes)
        return len(wanted) != len(self.shards) or not all(
            self._is_right(shard, *together) for shard, together in zip(self.shards, wanted, strict=True)
        )

    def _is_right(self, shard: Shard, group: dict[str, Any], together: list[Tensor]) -> bool:
        """Return whether ``shard`` is what a new one of these parameters would be. Local."""
        return (
            shard.process_group is self.process_group
            and len(shard.params) == len(together)
            and all(map(operator.is_, shard.params, together))
            and shard.has_maxima == group["amsgrad"]
            and (not shard.has_moved() or shard.fits())
        )

    def _arrange(self, changes: Changes) -> None:
        """Have the shards that a job resumed here would have, with the state that there is. Collective.

        Gradients stay where they are: `GradientPath.arrive` sees that there are other shards.
        """
        before = {id(shard.params[0]): shard for shard in self.shards}
        shards, made = [], []
        for group, together in self._arranged():
            shard = before.get(id(together[0]))
            if shard is None or not self._is_right(shard, group, together):
                shard = self._make_shard(group, together)
                made.append(shard)
            shard.group = group
            shards.append(shard)
        aside = [self._aside_shard(shard, i) for shard, i in changes.removed if self._stays_in_state(shard, i)]
        old = [shard for shard in (*self.shards, *self._aside) if not any(shard is kept for kept in (*shards, *aside))]
        carry_state(old, [*made, *aside])
        for shard, i in changes.removed:
            self._shown.pop(id(shard.params[i]), None)
        self.shards, self._aside = shards, aside
        for shard in (*made, *aside):
            self._show(shard)

    def _stays_in_state(self, shard: Shard, i: int) -> bool:
        """Whether the user left the state of a parameter that is in no group: as in torch, it may come back. Local."""
        param = shard.params[i]
        return bool(peek(self.state, param)) and shard.has_numel_of(i)

    def _aside_shard(self, shard: Shard, i: int) -> Shard:
        """A shard of a parameter that is in no group. It is neither updated nor sent. Local."""
        if any(shard is aside for aside in self._aside):
            return shard
        return self._make_shard(shard.group, [shard.params[i]])

    def _lay_out(self, params: Iterable[Tensor]) -> None:
        """Forget all state, and lay out zeros for ``params``, which are then filled in. Local.

        `recount` when that is done. Every rank lays out the same parameters in the same order.
        """
        self.wait()
        self.state.clear()
        self._reset()
        if self._path is not None:
            self._path.forget_layout()
        self._init_state(params)

    def _follow_partitions(self) -> None:
        """DeepSpeed shows its partitions one after the other, so what is in the groups is not all there is. Local."""
        if self.shards and self._seen is not None and self.state is not self._seen.state:
            params = [param for shard in self.shards for param in shard.params]
            self.shards, self._placed = [], set()
            self._updates_of.clear()
            self._init_state(params)
        for shard in self._present():
            if shard.has_moved():
                shard.refresh()
                self._show(shard)
        self._place_newcomers()

    def _detect_engine_sharding(self, chosen: set[int]) -> None:
        """Detect engine-managed sharding: by DTensors, and by asking DeepSpeed. Local.

        Raises:
            RuntimeError: state of other parameters is sharded over the ranks already; or clipping would be
                by the norm of a part.
        """
        before = self._shared_out
        for param in self._all_params():
            if id(param) not in chosen:
                continue
            if is_dtensor(param):
                self._shared_out = "dtensors"
            elif not isinstance(param, nn.Parameter) and before != "partitions" and engine_that_shards(self):
                self._shared_out = "partitions"
                break
        if self._shared_out != before and any(shard.process_group is not None for shard in self.shards):
            self._shared_out = before
            raise RuntimeError(
                "parameters that an engine has sharded came to an optimizer that shares others' state over the ranks "
                "itself. Give each kind an optimizer of its own."
            )
        if self._shared_out == "partitions" and self.max_grad_norm is not None:
            raise RuntimeError(
                f"max_grad_norm={self.max_grad_norm} would clip each of the engine's partitions by its own norm. "
                'Set "gradient_clipping" in the DeepSpeed configuration and leave max_grad_norm=None; '
                "dist_adamw.prepare does it for you."
            )

    def _show(self, shard: Shard) -> None:
        """Let ``self.state`` show what ``shard`` holds."""
        for i in range(len(shard.params)):
            self._show_one(shard, i)

    def _show_one(self, shard: Shard, i: int) -> None:
        param = shard.params[i]
        views = shard.state_of(i)
        entry = peek(self.state, param)
        if entry is None:
            entry = Entry.of(self._bell, {})
            dict.__setitem__(self.state, param, entry)  # not as a user puts it there: see `Bell`
        values = {key: _pointed_at(entry.get(key), view) for key, view in views.items()}
        entry.update(values)  # the user may have more in it
        self._shown[id(param)] = Shown.of(values)

    def _remember(self) -> None:
        """The shards agree with ``param_groups`` and ``state``. Local."""
        self._seen = Snapshot(self.param_groups, self.state, self._placed, self._shown.values(), self._bell)

    def _layout_record(self) -> dict[str, Any]:
        """Return what ranks must have alike: the constructor's options, groups and shapes. Local."""
        record: dict[str, Any] = {name: plain(getattr(self, name)) for name in _OPTIONS}
        record["mesh"] = None if self._mesh is None else [list(self._mesh.shape), list(self._mesh.mesh_dim_names or ())]
        for i, group in enumerate(self.param_groups):
            record[f"hyper-parameters of group {i}"] = {name: plain(group.get(name)) for name in self.defaults}
            record[f"parameters of group {i}"] = [
                [list(p.shape), str(p.dtype), p.requires_grad] for p in group["params"]
            ]
        return record

    def _check_alike(self, more: Mapping[str, Any] | None = None) -> None:
        """Raise on every rank where options, groups or shapes are not the same on all. Collective.

        Every rank of the job takes part, whatever it was told to share with; of a mesh of some ranks, those.
        """
        self._is_agreed = True
        mesh = self._mesh
        groups: list[dist.ProcessGroup | None] = [None]
        if mesh is not None and mesh.size() < collectives.world_size():
            groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
        record = {**self._layout_record(), **(more or {})}
        for group in groups:
            agreement.check_agreement(record, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time. Its state is laid out at the next update.

        Raises:
            ValueError: a hyper-parameter is out of range, a parameter is there twice, is complex or has gaps in its
                memory, or ``lr`` is a tensor where no fused kernel runs. The optimizer is as it was then.
        """
        check_hyper_parameters({**self.defaults, **param_group})
        if "betas" in param_group:
            param_group["betas"] = tuple(map(_number, param_group["betas"]))
        super().add_param_group(param_group)
        try:
            check_once(self.param_groups)
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse parameters that cannot be updated. Local."""
        for param in group["params"]:
            if is_lazy(param):
                continue
            if param.is_complex():
                raise ValueError(
                    f"DistAdamW does not support complex parameters, got {param.dtype}. Register "
                    "torch.view_as_real(parameter) instead."
                )
            if param.layout == torch.strided:
                axes_in_memory(local_of(param))
        self._check_lr(group)

    def _check_lr(self, group: dict[str, Any]) -> None:
        """Refuse what torch refuses of foreach arithmetic. Local."""
        if isinstance(group["lr"], Tensor) and not (
            self.fused or (self.fused is None and all(map(can_fuse, group["params"])))
        ):
            raise ValueError(
                f"lr as a Tensor is not supported by foreach arithmetic (fused={self.fused}), got {group['lr']!r}. "
                "Pass a float, or fused=True."
            )

    # ---------------------------------------------------------------- state dicts and pickling

    def state_dict(self) -> StateDict:
        """The state as torch's optimizers give it: all of it, in the parameters' shapes. Local.

        It loads into ``torch.optim.AdamW`` and the other way round, and into a `DistAdamW` on any number of ranks.
        When the state is sharded, this rank has 1/W of it: call `consolidate_state_dict` before, on every rank.

        Raises:
            RuntimeError: the state is sharded, and this rank has not consolidated it since it last changed.
        """
        if not self._has_a_share or is_being_wrapped():
            return self._share_state_dict()
        whole = self._whole_state()
        state_dict = super().state_dict()
        params = {param: i for i, param in enumerate(self._all_params())}
        state_dict["state"] = {params[param]: dict(state) for param, state in whole.items() if param in params}
        return state_dict

    @property
    def _has_a_share(self) -> bool:
        return bool(self.shards) and self.shards[0].process_group is not None

    def _share_state_dict(self) -> StateDict:
        """`state_dict` of what this rank owns; of a share ``"share"`` says which, and ``state`` has it 1-D. Local."""
        self._follow_alone()
        state_dict = super().state_dict()
        state_dict["state"] = {key: dict(entry) for key, entry in state_dict["state"].items()}
        if (share := describe_share(self.shards, self._all_params())) is not None:
            state_dict["share"] = share
        return state_dict

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Copy the whole state to one rank, for its next `state_dict`. Collective when sharded, else nothing.

        As ``torch.distributed.optim.ZeroRedundancyOptimizer`` has it: call it on every rank, then ``state_dict()`` on
        rank ``to``. The copy is in host memory, 8 bytes for each fp32 parameter (12 with masters), until the next
        update; `dist_adamw.save` writes the same without it.

        Args:
            to: The receiving rank, counted among those that share the state. None: every rank.

        Raises:
            ValueError: there is no such rank.
        """
        self.wait()
        self.announce_save()
        ranks = self._here()[1]
        if to is not None and not 0 <= to < ranks:
            raise ValueError(f"to must be a rank from 0 to {ranks - 1}, or None for every rank, got {to!r}.")
        self.follow()
        if self._has_a_share:
            self._consolidated = gather_state(self.shards, to, self.state)

    def _whole_state(self) -> dict[Tensor, StateDict]:
        """Return what `consolidate_state_dict` has gathered.

        Raises:
            RuntimeError: nothing, or state has changed since, or another rank has it.
        """
        rank, ranks = self._here()
        known = self._consolidated
        if known is not None and known.stamps == stamps_of(self.shards, self.state) and not self._differs():
            if known.states is not None:
                return known.states
            problem = f"the state was consolidated on rank {known.to}, and this is rank {rank}"
        else:
            problem = (
                f"rank {rank} of {ranks} has its own share of the state, which was not consolidated since it changed"
            )
        raise RuntimeError(
            f"{problem}. Call optimizer.consolidate_state_dict(to=<rank>) on every rank, and then state_dict() on that "
            "rank; or save with dist_adamw.save on every rank (accelerator.save_state does after dist_adamw.prepare, "
            "Trainer after prepare_trainer); or make DistAdamW(shard=False), which has whole state on every rank."
        )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict`, or ``torch.optim.AdamW``'s, returned. Local.

        Of a whole state this rank keeps its share.

        Raises:
            ValueError: groups or shapes do not match, or it is another rank's share. The
                optimizer is as it was then.
        """
        self._check_loadable(state_dict)
        self.wait()
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(saved, self._all_params(), strict=True):  # torch has rounded all to the parameter's dtype
            given = state_dict["state"].get(i, {})
            self.state[param].update({key: given[key] for key in (*MOMENTS, *MASTERS) if key in given})
            if not self.state[param]:
                del self.state[param]
        self._reset()
        if self._path is not None:
            self._path.forget_layout()
        self._adopt(state_dict.get("share"))

    def _adopt(self, share: Mapping[str, Any] | None) -> None:
        """Lay out what is in ``self.state``: whole state, or this rank's share."""
        # The caller's tensors stay the caller's: `_show_one` points those that it finds at the shards.
        ours = {
            param: {key: value.detach() if isinstance(value, Tensor) else value for key, value in entry.items()}
            for param, entry in self.state.items()
        }
        self.state = State.of(self._bell, ours)
        params = self._all_params()
        if share is None:
            self._init_state([param for param in params if peek(self.state, param)])
        else:
            for members in share["shards"]:
                self._init_state([params[i] for i in members], are_shares=True)
        self.recount()

    def recount(self) -> None:
        """Set `updates` to what state says, after a load or replays of a CUDA graph. Waits for the device. Local."""
        self._updates = max((int(shard.steps.max()) for shard in self.shards), default=0)
        self._updates_of.clear()
        self._consolidated = None

    def _check_loadable(self, state_dict: StateDict) -> None:
        if (share := state_dict.get("share")) is not None:
            check_share(share, self._all_params(), self._here(), self.bucket_numel, self._is_lean)
        check_entries(state_dict, self._all_params())

    @property
    def _is_lean(self) -> bool:
        return self._path is not None and self._path.into_shard

    def _here(self) -> tuple[int, int]:
        """This rank and the world size that state is shared over."""
        group = self.process_group
        return (0, 1) if group is None else (collectives.rank(group), collectives.world_size(group))

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        self._follow_alone()
        options = {name: getattr(self, name) for name in _OPTIONS}
        return {**super().__getstate__(), "options": options, "share": describe_share(self.shards, self._all_params())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        share = state.pop("share", None)
        for name, value in state.pop("options", {}).items():
            setattr(self, name, value)
        unpickled = not hasattr(self, "shards")  # __init__ has not run
        if unpickled:
            self._reset()
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
        if unpickled:
            if share is not None:
                check_share(share, self._all_params(), self._here(), self.bucket_numel, self._is_lean)
            self._adopt(share)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._mesh is not None:
            raise ValueError("a DistAdamW with a mesh cannot be pickled or copied. Use state_dict().")
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        text = super().__repr__()
        if not self.shards:
            where = "layout not built before the first update"
        elif self._shared_out == "dtensors":
            where = "state shared out as the parameters are, which are DTensors"
        elif self._shared_out == "partitions":
            where = "state of the partitions that the engine gives this rank"
        elif self.process_group is None:
            where = "state whole on this rank"
        else:
            where = f"state sharded over {collectives.world_size(self.process_group)} ranks"
        return (
            f"{text[:-1]}    decay_by: {self.decay_by}\n    max_grad_norm: {self.max_grad_norm}\n"
            f"    shard: {self.shard} ({where}; {self.state_bytes:,} bytes here)\n)"
        )
