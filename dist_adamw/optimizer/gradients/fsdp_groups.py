"""One of FSDP2's parameter groups: its reduce-scatter, replaced by an all-to-all and a sum in a fixed order.

No other module knows how FSDP2 is built. torch offers ``FSDPModule.set_custom_reduce_scatter``, but does not call it
for a single rank, nor say which parameters had a gradient.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.weak_hooks import WeakHook, remove
from dist_adamw.optimizer.sharding.cuts import cut_of, is_cut_by_rows
from dist_adamw.optimizer.sharding.dtensors import as_dtensor, is_dtensor, local_of
from dist_adamw.optimizer.transport.tree_sum import TreeSum


class Passes(Protocol):
    """The backward passes of an update, see `FSDPMicroBatches`."""

    passes: int
    is_reached: bool

    def backward_begins(self) -> None:
        """Begin a pass, unless it has begun."""


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules in ``model`` that ``fully_shard`` was called on. Local."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def param_groups_of(module: Any) -> list[Any]:
    """Return FSDP2's groups of parameters of one of its modules, at most one before torch 2.13. Local."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


class GroupSum:
    """The sum of the gradients of one of FSDP2's parameter groups, and the reduce-scatter that FSDP2 calls for it.

    Args:
        owner: The backward passes of the update.
        group: FSDP2's ``FSDPParamGroup``.

    Attributes:
        used: Indices in the group of the parameters that have had a gradient on this rank since the last update.
    """

    def __init__(self, owner: Passes, group: Any) -> None:
        self.used: set[int] = set()
        self._owner, self._group = weakref.ref(owner), weakref.ref(group)
        self._sums: TreeSum | None = None
        self._made_for: tuple[Any, ...] = ()
        self._event: Any = None  # on an accelerator, recorded after the last term was added
        self._hooked: dict[int, weakref.ref[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, remove, self._handles).atexit = False

    def belongs_to(self, owner: Passes | None) -> bool:
        """Return whether ``owner`` made it; None: whether its owner no longer exists. Local."""
        return self._owner() is owner

    @property
    def _members(self) -> list[Any]:
        group = self._group()
        return [] if group is None else group.fsdp_params

    def trainable(self) -> list[tuple[int, Tensor]]:
        """Return the parameters that require a gradient, in the order of a term, and their indices. Local."""
        sharded = [(index, member.sharded_param) for index, member in enumerate(self._members)]
        return [(index, param) for index, param in sharded if param.requires_grad]

    def begin_pass(self) -> None:
        """Have FSDP2 reduce the gradients of the backward pass that begins. Local."""
        group = self._group()
        if group is None:
            return
        group.reduce_grads = True  # set_requires_gradient_sync(False) would add up micro-batches in another order
        self.hook_parameters()

    def hook_parameters(self) -> None:
        """Have unsharded parameters call `gradient_came`. Local; after a forward pass."""
        for index, member in enumerate(self._members):
            whole = getattr(member, "_unsharded_param", None)  # exists from the first forward pass on
            known = self._hooked.get(index)
            if whole is not None and whole.requires_grad and (known is None or known() is not whole):
                self._hooked[index] = weakref.ref(whole)
                self._handles.append(whole.register_post_accumulate_grad_hook(_Arrival(self, index)))

    def gradient_came(self, index: int) -> None:
        """Note that backward has reached a parameter. Local."""
        if (owner := self._owner()) is not None:
            owner.backward_begins()  # no output's hook has, if forward was another method than the module
            owner.is_reached = True
        self.used.add(index)

    # ---------------------------------------------------------------- what FSDP2 calls

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for the input or the output of a reduction. Local."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Add the terms of all ranks. Collective.

        Args:
            output_tensor: Gets zeros: the average is written when the backward pass ends.
            input_tensor: For each rank, the elements that it owns, 1-D.
            group: The ranks, in the order of the micro-batches' numbers.
            op: Not used.
            async_op: Not used.
        """
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received.view(torch.uint8), input_tensor.view(torch.uint8), group=group)
        self._add(list(received.chunk(group.size())))
        output_tensor.zero_()

    def after_reduction(self, output: Tensor) -> None:
        """Add the term of the only rank, for which FSDP2 calls no reduce-scatter. Local."""
        self._add([output])

    @torch.no_grad()
    def _add(self, terms: list[Tensor]) -> None:
        owner, like = self._owner(), terms[0]
        assert owner is not None
        owner.backward_begins()
        before = owner.passes * len(terms)
        sums = self._sum_of(like)
        if sums.count > before:
            raise RuntimeError(
                "FSDP2 has reduced a module twice in one backward pass, because forward called it more than once. With "
                "reproducible=True, call fully_shard() on a module around all the calls."
            )
        if sums.count < before:  # it had no gradient in earlier passes
            zero = like.new_zeros(()).expand_as(like)
            sums.add(before - sums.count, [(0, [zero] * (before - sums.count))])
        sums.add(len(terms), [(0, terms)])
        if like.device.type != "cpu":
            self._event = torch.get_device_module(like.device).current_stream(like.device).record_event()

    def _sum_of(self, like: Tensor) -> TreeSum:
        numel = sum(cut_of(param).chunk for _, param in self.trainable())
        wide = torch.promote_types(like.dtype, torch.float32)
        wanted = (numel, wide, like.device)
        if like.numel() != numel or (self._sums and self._sums.count and self._made_for != wanted):
            raise RuntimeError(
                f"FSDP2 has reduced {like.numel()} elements of a module that has {numel} with requires_grad. With "
                "reproducible=True, requires_grad and dtypes may change only between an update and the next backward "
                "pass, and before torch 2.13 every pass must use all parameters."
            )
        if self._sums is None or self._made_for != wanted:
            self._sums, self._made_for = TreeSum(numel, dtype=wide, device=like.device), wanted
        return self._sums

    # ---------------------------------------------------------------- the averages

    def show(self, count: int) -> None:
        """Write the average of ``count`` micro-batches to ``param.grad``. Local."""
        if self._sums is None or not self._sums.count:
            return
        if self._event is not None:
            torch.get_device_module(self._made_for[2]).current_stream(self._made_for[2]).wait_event(self._event)
        offset, runs = 0, []
        for _, param in self.trainable():
            if param.grad is None:
                assert is_dtensor(param)
                param.grad = as_dtensor(torch.empty_like(local_of(param)), param)
            if (flat := local_of(param.grad).view(-1)).numel():
                runs.append((offset, flat))
            offset += cut_of(param).chunk
        self._sums.write(runs, count)

    def clear(self) -> None:
        """Forget all terms. Local."""
        self.used.clear()
        if self._sums is not None:
            self._sums.clear()


class _Arrival(WeakHook):
    """A hook of an unsharded parameter, which calls `GroupSum.gradient_came`."""

    def __init__(self, owner: GroupSum, index: int) -> None:
        super().__init__(owner, "gradient_came")
        self._index = index

    def __call__(self, *args: Any) -> Any:
        """Pass on the parameter's index."""
        return super().__call__(self._index)


def check_group(module: Any, group: Any) -> None:
    """Refuse a parameter group of FSDP2 that adds gradients in another way than one reduce-scatter. Local.

    Raises:
        ValueError: says in which.
    """
    known = group._reduce_scatter_comm
    if not hasattr(module, "set_custom_reduce_scatter") or not hasattr(module, "set_force_sum_reduction_for_comms"):
        problem = f"torch {torch.__version__}, whose reduce-scatter cannot be replaced,"
    elif len(param_groups_of(module)) > 1:
        problem = "a module whose parameters shard_placement_fn puts on several meshes"
    elif group.fsdp_params and group.fsdp_params[0].sharded_param.device_mesh.ndim > 1:
        problem = "a mesh of several axes (HSDP, or tensor parallelism)"
    elif not all(is_cut_by_rows(member.sharded_param) for member in group.fsdp_params):
        problem = "parameters that are not sharded along their first dimension"
    elif any(member.offload_to_cpu for member in group.fsdp_params):
        problem = "CPUOffloadPolicy"
    elif isinstance(known, GroupSum) and not known.belongs_to(None):
        problem = "a second optimizer that is attached to the same module"
    elif not isinstance(known, GroupSum) and type(known).__name__ != "DefaultReduceScatter":
        problem = "set_custom_reduce_scatter() and other replacements of the reduce-scatter"
    elif group._all_reduce_hook is not None:
        problem = "set_all_reduce_hook()"
    elif group.gradient_divide_factor is not None:
        problem = "set_gradient_divide_factor()"
    else:
        return
    raise ValueError(f"reproducible=True does not support {problem} under FSDP2. Leave it out, or reproducible=False.")


def install(module: Any, group: Any, sums: GroupSum) -> None:
    """Replace the reduce-scatter of ``group`` until the owner of ``sums`` no longer exists. Local."""
    names = (
        "_reduce_scatter_comm",
        "_all_reduce_hook",
        "gradient_divide_factor",
        "force_sum_reduction_for_comms",
        "reduce_scatter_unused_params",
    )
    before = {name: getattr(group, name) for name in names if hasattr(group, name)}
    owner = sums._owner()
    weakref.finalize(owner, _restore, weakref.ref(group), before).atexit = False
    module.set_custom_reduce_scatter(sums)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # a factor of 1 otherwise asks for a premultiplied sum
    if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13
        module.set_reduce_scatter_unused_params(True, recurse=False)
    if group.fsdp_params and group.fsdp_params[0].sharded_param.device_mesh.size() == 1:
        module.set_all_reduce_hook(WeakHook(sums, "after_reduction"))


def _restore(group: weakref.ref[Any], before: dict[str, Any]) -> None:
    if (found := group()) is not None:
        for name, value in before.items():
            setattr(found, name, value)
