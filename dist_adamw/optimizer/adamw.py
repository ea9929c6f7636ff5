"""DistAdamW: the AdamW update of state that is sharded by element over the data-parallel ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from dist_adamw.optimizer.attached_optimizer import AttachedOptimizer
from dist_adamw.optimizer.averages import check_averages
from dist_adamw.optimizer.clipping import (
    BucketGradients,
    are_all_zero,
    clip_factor,
    global_norm,
    non_zeros_on_this_rank,
    squares_on_this_rank,
)
from dist_adamw.optimizer.kernels.averaging import unless_skipped
from dist_adamw.optimizer.kernels.foreach import DecayBy
from dist_adamw.optimizer.loss_scaling import found_inf_of, is_scaler, must_leave_step_out, unscale_
from dist_adamw.optimizer.options import (
    as_number,
    check_group,
    check_hyper_parameters,
    check_lr,
    check_options,
    check_types,
    warn_of_lasting_moments,
)
from dist_adamw.optimizer.outcome import is_capturing
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.sharding.user_changes import check_once
from dist_adamw.optimizer.sharding.values import average_all, average_bucket
from dist_adamw.optimizer.sharding.watched_state import WatchedState
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT, InFlightBucket
from dist_adamw.optimizer.update_bucket import is_fused, update_bucket


class DistAdamW(AttachedOptimizer):
    """AdamW with its state sharded by element over the data-parallel ranks.

    Each of W ranks keeps 1/W of ``exp_avg`` and ``exp_avg_sq``, to the element. It updates its share of the parameters,
    which are then gathered. Given the same averaged gradients, the weights have the same bits as those of
    ``torch.optim.AdamW(fused=True)`` on one rank; without a process group it is that optimizer. Parameters keep their
    own storage.

    Args:
        params: As for any torch optimizer: parameters, ``named_parameters()`` or group dicts.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: See ``decay_by``.
        amsgrad: Divide by the running maximum of the second moment.
        maximize: Ascend instead of descend.
        decay_by: "lr" multiplies weights by 1 - lr * weight_decay (torch's convention); "schedule" by
            1 - weight_decay (the paper's), except that an update with lr == 0 does not change them.
        max_grad_norm: Clip the gradients of all groups together to this global L2 norm. Every rank skips an update
            whose norm is inf or nan. ``float("inf")`` measures the norm without clipping; None does neither.
        master_dtype: Master weights for bf16 or fp16 parameters. ``torch.float32`` keeps fp32 weights
            in the shard. ``torch.int16`` (bf16 only) keeps the 16 bits of the fp32 weights that the parameters lack:
            the same results in half the memory. None updates the parameters themselves. fp32 parameters need no
            masters.
        state_dtype: dtype of the moments: ``torch.float32``, or ``torch.bfloat16`` for half the memory.
            None: fp32 with ``master_dtype``, otherwise the parameters' dtype, as in torch.
        reduce_dtype: dtype in which gradients are averaged after `attach`. ``torch.float32`` for bf16 gradients, whose
            sum in bf16 has a relative error of 0.01 on 64 ranks with NCCL (gloo sums in fp32 anyway), at twice the
            bytes; ``torch.bfloat16`` for half the bytes of fp32 gradients. None: the gradients' dtype.
        averages: Averages of the weights to keep, `EMA` and `Mean` by name, such as ``{"ema": EMA(decay=0.999)}``: 4
            bytes for each of this rank's elements. `averaged` shows one. From JSON or YAML, dicts of their arguments.
        reproducible: Average the micro-batches of an update in one order, whatever the number of ranks, so that the
            weights have the same bits on any. See "The same bits on any number of ranks" in the README.
        shard: "auto" shards over ``mesh``, or over all ranks if ``torch.distributed`` is
            initialised at the first update. False keeps the whole state on every rank. True is
            "auto", but raises instead of running unsharded.
        mesh: Device mesh of the data-parallel ranks; default: all ranks. With two axes, state is
            replicated along the first and sharded along the second (HSDP: nodes, ranks in a node).
        fused: True for torch's fused kernel, False for foreach; None uses fused where it exists.
        bucket_numel: Elements sent together; None chooses by the size of the model and the number of ranks.

    Raises:
        ValueError: a hyper-parameter is out of range (or nan), or ``params`` is empty.

    ``step`` is collective when sharded: every rank must call it equally often. All options must be the same on all
    ranks; `attach`, ``dist_adamw.prepare`` or the first sharded `step` compares them. (`step` cannot detect that only
    some ranks have ``shard=False``, because those send nothing.) After `attach`, each gradient is reduced to its owner;
    without `attach`, gradients must be the same on every rank when `step` is called, as DDP leaves them. ``state``
    holds this rank's share, 1-D. A parameter that has not had a gradient yet has zeros there; torch has no entry.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2; sharding as in ZeRO-1,
    Rajbhandari et al., arXiv:1910.02054.
    """

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
        reduce_dtype: torch.dtype | None = None,
        reproducible: bool = False,
        averages: Mapping[str, Any] | None = None,
        shard: bool | str = "auto",
        mesh: DeviceMesh | None = None,
        fused: bool | None = None,
        bucket_numel: int | None = None,
    ) -> None:
        check_options(
            decay_by=decay_by,
            shard=shard,
            max_grad_norm=max_grad_norm,
            mesh=mesh,
            bucket_numel=bucket_numel,
            master_dtype=master_dtype,
            state_dtype=state_dtype,
            reduce_dtype=reduce_dtype,
            reproducible=reproducible,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        check_hyper_parameters(defaults)
        betas = defaults["betas"] = (as_number(betas[0]), as_number(betas[1]))
        warn_of_lasting_moments(state_dtype, betas[1])
        self.master_dtype, self.state_dtype, self.reduce_dtype = master_dtype, state_dtype, reduce_dtype
        self.averages = check_averages(averages)
        self.decay_by: DecayBy = decay_by
        self.max_grad_norm, self.reproducible = max_grad_norm, reproducible
        self.shard, self.fused, self.bucket_numel = shard, fused, bucket_numel
        self._mesh = mesh
        self._reset()
        super().__init__(params, defaults)
        self.state = WatchedState.of(self._accesses, {})

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` takes scaled gradients from a ``GradScaler`` and skips on the device. Local."""
        # Lightning reads this too, to refuse clipping, which works here. fp16 gradients are left to the scaler's error.
        if not is_scaler(sys._getframe(1).f_code) or must_leave_step_out(self):
            return False
        # After `attach` only owned elements of a gradient have a meaning, and the scaler would check all.
        is_whole = self._path is None and not self._is_partitioned
        return is_whole and all(param.dtype != torch.float16 for param in self._all_params())

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

        In a CUDA graph: capturing is not an update, and the host does not count replays, so call `recount` afterwards.
        Every replay reads a tensor ``lr`` again; ``weight_decay`` stays as captured, which with ``decay_by="lr"`` is
        right for a whole cycle.

        Raises:
            RuntimeError: a gradient is sparse, or `updates` is not known when capturing begins. Raised before anything
                changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin_update()
        unscale_(self)
        if self._collect_gradients(for_update=True):
            self._warn_of_local_gradients()
            self._check_reduce_dtype()
            self._apply(self._scheme.present(self.shards, self.param_groups))
        return loss

    def _begin_update(self) -> None:
        """Check that an update is possible, and count it as skipped until there is something to apply."""
        self.wait()  # weights in flight are the input of this update
        for group in self.param_groups:  # a scheduler or the user may have written other values
            check_types(group)
            if self.fused is False:
                check_lr(group, self.fused)
        if is_capturing() and not self.skip_is_known:
            raise RuntimeError(
                "it is not known yet whether the device applied the last update, and it cannot be asked while a CUDA "
                "graph is captured. Read optimizer.updates before torch.cuda.graph begins."
            )
        self._check_averages()
        self._outcome.begin()

    def _apply(self, shards: list[Shard]) -> None:
        """Update ``shards``, unless gradients are missing, inf or nan. Collective."""
        grads = [shard.gradients.owned() for shard in shards]
        if not any(shard.gradients.any_grad for shard in shards):
            self._settle()
            return
        if self._only_initialises(shards, grads):
            return
        clip = self._clip_factor(shards, grads)
        # Foreach arithmetic cannot skip on the device, so the host has to wait for the norm or the scaler's flag.
        may_skip = self._outcome.found_inf is not None
        must_know = may_skip and not all(is_fused(shard, self.fused) for shard in shards)
        if not (must_know and self.step_was_skipped):
            self._update_all(shards, grads, clip)
        self._gradients_were_used()

    def _update_all(self, shards: list[Shard], grads: Sequence[BucketGradients], clip: Tensor | None) -> None:
        self._consolidated = None
        moves = self._moves_of_update()
        for shard, buckets in zip(shards, grads, strict=True):
            found_inf = self._outcome.on_device(self._outcome.found_inf, shard.steps.device)
            by = unless_skipped(moves, found_inf)
            if shard.gradients.any_grad:
                shard.count_update(found_inf)
                self._update(shard, buckets, clip, by)
            else:  # its weights stay, but not its averages
                average_all(shard, by)
        if is_capturing():
            self._outcome.forget_captured()

    def _clip_factor(self, shards: list[Shard], grads: Sequence[BucketGradients]) -> Tensor | None:
        """Count this update as applied, or measure the norm that decides whether it is. Collective.

        Returns:
            The factor for gradients, 0-d fp32; None: 1.
        """
        outcome, found_inf = self._outcome, found_inf_of(self)
        if self.max_grad_norm is None:
            self._settle()
            if found_inf is not None:
                outcome.skip_if(found_inf)
            elif not is_capturing():  # a capture applies nothing
                outcome.count(self._scheme.count_update(outcome.updates, shards))
            return None
        squares = squares_on_this_rank(shards, grads, reproducible=self.reproducible)
        self._settle()  # after the squares, so that the other ranks' answer arrives while they are computed
        norm = global_norm(squares, self._ranks, reproducible=self.reproducible)
        outcome.measure(norm, found_inf)
        clip = clip_factor(norm, self.max_grad_norm)
        is_one = clip.device.type == "cpu" and clip == 1  # on a GPU the host would have to wait
        return None if is_one else clip

    def _update(
        self, shard: Shard, grads: BucketGradients, clip: Tensor | None, moves: Mapping[str, float | Tensor]
    ) -> None:
        """Update this rank's slices of ``shard``, and send each bucket while the next one is computed. Collective."""
        sent: list[InFlightBucket] = []
        may_defer = self._defer_gather and not self._is_compiled()
        clip, found_inf = (
            self._outcome.on_device(value, shard.steps.device) for value in (clip, self._outcome.found_inf)
        )
        for k, bucket in enumerate(grads):
            shard.gradients.finish_tree_sum(k)
            update_bucket(
                shard,
                k,
                bucket,
                clip=clip,
                found_inf=found_inf,
                fused=is_fused(shard, self.fused),
                decay_by=self.decay_by,
            )
            average_bucket(shard, k, moves)
            if shard.transport is None:
                continue
            if may_defer and (aside := shard.transport.gather_aside(k)) is not None:
                sent.append(aside)
                continue
            if len(sent) == MAX_IN_FLIGHT:
                shard.transport.finish_gather(sent.pop(0))
            sent.append(shard.transport.start_gather(k))
        if sent:
            self._pending.add(shard, sent, may_defer=may_defer)

    def _only_initialises(self, shards: list[Shard], grads: Sequence[BucketGradients]) -> bool:
        """Return whether this step only creates state, and is not an update. Collective while lr is 0.

        torch's get_optimizer_state_dict steps once with lr 0 and zero gradients to have state, which has been laid out
        by now. The first update of a warm-up has lr 0 too, and its gradients may be zero only on this rank, so the
        ranks decide together.
        """
        if self._outcome.updates or self._is_partitioned or is_capturing():
            return False
        if any(group["lr"] != 0 for group in self.param_groups):
            return False
        non_zeros = non_zeros_on_this_rank(shards, grads)
        self._settle()
        return are_all_zero(non_zeros, self._ranks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time. Its state is laid out at the next update.

        Raises:
            ValueError: a hyper-parameter is out of range; a parameter is there twice, is complex or has gaps in its
                memory; or ``lr`` is a tensor and no fused kernel can run. The optimizer is left unchanged.
        """
        check_hyper_parameters({**self.defaults, **param_group})
        if "betas" in param_group:
            param_group["betas"] = tuple(map(as_number, param_group["betas"]))
        super().add_param_group(param_group)
        try:
            check_once(self.param_groups)
            check_group(self.param_groups[-1], self.fused)
        except ValueError:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        text = super().__repr__()
        where = self._scheme.describe(self._ranks) if self.shards else "layout not built before the first update"
        return (
            f"{text[:-1]}    decay_by: {self.decay_by}\n    max_grad_norm: {self.max_grad_norm}\n"
            f"    shard: {self.shard} ({where}; {self.state_bytes:,} bytes here)\n)"
        )
