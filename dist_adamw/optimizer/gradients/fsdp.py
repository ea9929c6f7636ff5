"""Average the micro-batches of an update under FSDP2 in an order that does not depend on the number of ranks.

FSDP2 reduce-scatters the gradients of a group of parameters in every backward pass. Here the W ranks exchange them by
an all-to-all of as many bytes, and each rank adds the W terms of a pass to the tree of `TreeSum`, which spans all
passes of an update.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.forward_passes import ForwardPasses, is_in_backward, on_backward
from dist_adamw.optimizer.gradients.fsdp_groups import GroupSum, check_group, fsdp_modules, install, param_groups_of
from dist_adamw.optimizer.gradients.refusals import changed_between_passes, second_pass
from dist_adamw.optimizer.gradients.weak_hooks import WeakHook, remove
from dist_adamw.optimizer.sharding.dtensors import is_dtensor, local_of


class _Written(NamedTuple):
    """An average that was written to ``param.grad``, and its version."""

    sums: GroupSum
    place: int  # in its group
    param: Tensor
    grad: Tensor | None
    version: tuple[int, ...]


class FSDPMicroBatches:
    """Keeps ``param.grad`` of FSDP2's parameters the average of the micro-batches since the last update.

    Each backward pass is one micro-batch on every rank: the j-th since the last update is number ``j W + r`` on rank r.
    Between passes ``param.grad`` is the average of all so far; a later pass replaces it. Gradients that are set to None
    or to zeros are discarded with all micro-batches so far.

    Attributes:
        passes: The backward passes since the last update.
        is_reached: Whether the running backward pass has reached a parameter.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._forwards = ForwardPasses()
        self.is_reached = False
        self._groups: list[GroupSum] = []
        self._ranks: list[int] = []
        self._written: list[_Written] = []
        self._is_used = False  # whether an update has used the averages
        self._is_running = False
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, remove, self._handles).atexit = False

    # ---------------------------------------------------------------- attach

    def listen(self, model: nn.Module, params: Sequence[Tensor]) -> None:
        """Sum the gradients of ``model``. Local.

        Args:
            model: A module in which ``fully_shard`` was called.
            params: The optimizer's parameters.

        Raises:
            ValueError: the module is sharded in a way whose order of additions is not known. Nothing is changed.
        """
        modules = fsdp_modules(model)
        groups = [(module, group) for module in modules for group in param_groups_of(module)]
        new = [(module, group) for module, group in groups if not self._sums_of(group)]
        self._check(model, groups, new, set(map(id, params)))
        if not new:
            return
        self._handles.append(model.register_forward_pre_hook(WeakHook(self, "before_forward")))
        self._handles.append(model.register_forward_hook(WeakHook(self, "after_whole_forward"), always_call=True))
        for module in modules:
            self._handles.append(module.register_forward_hook(WeakHook(self, "after_forward"), always_call=True))
        for module, group in new:
            sums = GroupSum(self, group)
            self._groups.append(sums)
            install(module, group, sums)

    def _sums_of(self, group: Any) -> bool:
        known = group._reduce_scatter_comm
        return isinstance(known, GroupSum) and known.belongs_to(self)

    def _check(self, model: nn.Module, groups: list[Any], new: list[Any], ours: set[int]) -> None:
        sharded = [member.sharded_param for _, group in groups for member in group.fsdp_params]
        known = set(map(id, sharded))
        for name, param in model.named_parameters():
            if id(param) in ours and param.requires_grad and id(param) not in known:
                raise ValueError(
                    f"reproducible=True needs every parameter of the model in a module that fully_shard() was called "
                    f"on, and {name} is in none."
                )
        for module, group in new:
            check_group(module, group)
        ranks = self._ranks
        for param in sharded:
            assert is_dtensor(param)
            here = dist.get_process_group_ranks(param.device_mesh.get_group())
            ranks = ranks or here
            if here != ranks:
                raise ValueError(
                    f"reproducible=True needs all modules to be sharded over the same ranks, but some are over {ranks} "
                    f"and some over {here}."
                )
        self._ranks = ranks

    def follows(self, params: Sequence[Tensor]) -> bool:
        """Return whether all DTensors in ``params`` with a gradient are parameters of the attached modules. Local."""
        known = {id(param) for sums in self._groups for _, param in sums.trainable()}
        return all(id(param) in known for param in params if is_dtensor(param) and param.grad is not None)

    # ---------------------------------------------------------------- backward passes

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Discard all micro-batches after a backward pass that raised."""
        if self._is_running and not is_in_backward():  # activation checkpointing calls forward in backward
            self._is_running = False
            self.forget()

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook the output's gradient, which marks the beginning of the backward pass."""
        on_backward(output, WeakHook(self, "backward_begins"))

    def after_whole_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Have the output show which forward pass a backward pass belongs to."""
        on_backward(output, self._forwards.hook())

    def backward_begins(self, grad: Tensor | None = None) -> None:
        """Take the average of earlier micro-batches out of ``param.grad``, to which FSDP2 would add.

        Raises:
            RuntimeError: gradients were changed since the last backward pass, or a hook would change them.
        """
        if self._is_running:
            return
        # FSDP2 has queued its callback, which reduces the last gradients, before it ran this hook.
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        if self._is_used or self._are_discarded():
            self.forget()
        elif self.passes and not self._are_as_written():
            raise changed_between_passes()
        self._is_running, self.is_reached = True, False
        for sums in self._groups:
            for _, param in sums.trainable():
                if not all(map(_only_counts, (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values())):
                    raise RuntimeError(
                        "reproducible=True under FSDP2 writes gradients when the backward pass has ended: a "
                        "post-accumulate-grad hook would not see them. Change gradients before step() instead."
                    )
                param.grad = None
            sums.begin_pass()

    def _are_as_written(self) -> bool:
        return all(w.param.grad is w.grad and _version(w.grad) == w.version for w in self._written)

    def _are_discarded(self) -> bool:
        """Return whether the user has set the gradients to zero or None."""
        grads = [local_of(w.param.grad) for w in self._written if w.param.grad is not None]
        return not self._are_as_written() and not any(bool(grad.any()) for grad in grads)

    @torch.no_grad()
    def _after_backward(self) -> None:
        if not self._is_running:
            return
        self._is_running = False
        if not self.is_reached:
            raise RuntimeError(
                "a backward pass reached no parameter, as that of torch.autograd.grad(). FSDP2 reduces zeros then, and "
                "with reproducible=True they would count as a micro-batch."
            )
        if not self._forwards.end_pass(is_first=not self.passes):
            self.forget()
            raise second_pass()
        self.passes += 1
        for sums in self._groups:
            sums.show(self.passes * len(self._ranks))
        self._written = [
            _Written(sums, index, param, param.grad, _version(param.grad))
            for sums in self._groups
            for index, param in sums.trainable()
        ]

    # ---------------------------------------------------------------- the update

    @torch.no_grad()
    def complete(self) -> None:
        """Set gradients to None of parameters that no rank has used, for which FSDP2 reduced zeros. Collective.

        Raises:
            RuntimeError: the last backward pass raised an error.
        """
        if self._is_running:
            raise RuntimeError(
                "the last backward pass raised an error, and FSDP2 has reduced only some of its gradients. With "
                "reproducible=True repeat all micro-batches of this update."
            )
        if not self.passes or self._is_used:
            return
        first = self._written[0].param
        assert is_dtensor(first)
        is_used = [w.place in w.sums.used for w in self._written]
        flags = torch.tensor(is_used, dtype=torch.int32, device=local_of(first).device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=first.device_mesh.get_group())
        for written, flag in zip(self._written, flags.tolist(), strict=True):
            if not flag and written.param.grad is written.grad:
                written.param.grad = None

    def used(self) -> None:
        """Record that an update has used the averages, so that the next backward pass begins with none. Local."""
        self._is_used = True

    @property
    def number(self) -> int:
        """The backward passes since the last update, whose gradients are still there."""
        return 0 if self._is_used or self._are_discarded() else self.passes

    def forget(self) -> None:
        """Forget all micro-batches. Local."""
        self.passes, self._is_used, self._written = 0, False, []
        for sums in self._groups:
            sums.clear()


def _only_counts(hook: Any) -> bool:
    """Return whether ``hook`` is that of `SampleCounter`, which does not read the gradient."""
    return isinstance(hook, functools.partial) and hook.func is next


def _version(grad: Tensor | None) -> tuple[int, ...]:
    # An operation on a DTensor counts in its own version, one on its local tensor in that one's.
    return () if grad is None else (grad._version, local_of(grad)._version)


def complete_gradients(micro_batches: FSDPMicroBatches | None, params: Sequence[Tensor]) -> None:
    """Make the gradients of FSDP2's parameters those of the update. Collective.

    Args:
        micro_batches: What `DistAdamW.attach` has made, if anything.
        params: The optimizer's parameters.

    Raises:
        RuntimeError: nothing is attached that adds their gradients in the right order, or the last backward pass raised
            an error. Nothing is changed.
    """
    if not any(map(is_dtensor, params)):
        return
    if micro_batches is None or not micro_batches.follows(params):
        raise RuntimeError(
            "reproducible=True needs to add the gradients of DTensor parameters itself, and some are in no attached "
            "module. Call optimizer.attach(model) after fully_shard() and before the first backward pass."
        )
    micro_batches.complete()


def why_not_join(micro_batches: FSDPMicroBatches | None) -> str:
    """Return the error of `DistAdamW.join_backward` where it is not supported. Local."""
    if micro_batches is not None:
        return (
            "join_backward() cannot take part in the collectives of FSDP2's forward and backward passes. Under FSDP2 "
            "give every rank as many micro-batches."
        )
    return (
        "join_backward() is for DistAdamW(..., reproducible=True) that is attached on several ranks. Otherwise "
        "give every rank as many micro-batches."
    )
