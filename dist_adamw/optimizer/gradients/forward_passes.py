"""Connect backward passes to the forward passes whose outputs they begin at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dist_adamw.optimizer.gradients.weak_hooks import WeakHook


def on_backward(output: Any, *hooks: Callable[[Tensor], object]) -> None:
    """Have autograd call ``hooks`` with the gradient of each tensor in ``output``. Local.

    Args:
        output: The output of a forward pass: a tensor, or a container of tensors.
        hooks: Called in this order, before the pass reaches anything that ``output`` depends on.
    """
    if not torch.is_grad_enabled():
        return
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            for hook in hooks:
                leaf.register_hook(hook)  # type: ignore[no-untyped-call]


def is_in_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread: checkpointed segments call forward there. Local."""
    return torch._C._current_graph_task_id() != -1


class ForwardPasses:
    """Detects a second backward pass of one micro-batch, which would count as another micro-batch. Local.

    Each backward pass of an update must reach the output of a forward pass that no earlier one has reached. Or none of
    them reaches any: the script may call the module's methods in place of the module.
    """

    def __init__(self) -> None:
        self._reached: list[list[bool]] = []  # by the running backward pass; each says whether an earlier one did too
        self._kinds: set[bool] = set()  # of this update's passes: whether they reached an output

    def hook(self) -> Callable[[Tensor], object]:
        """Return the hook for the output of a forward pass."""
        return functools.partial(WeakHook(self, "_reach"), [False])

    def _reach(self, was_reached: list[bool], grad: Tensor) -> None:
        self._reached.append(was_reached)

    def end_pass(self, *, is_first: bool) -> bool:
        """Record a pass that has produced gradients; return whether it is the only one of its micro-batch so far.

        Args:
            is_first: Whether it is the first of its update.
        """
        reached, self._reached = self._reached, []
        if is_first:
            self._kinds.clear()
        self._kinds.add(bool(reached))
        is_new = not all(was_reached[0] for was_reached in reached)
        for was_reached in reached:
            was_reached[0] = True
        return len(self._kinds) == 1 and (is_new or not reached)

    def forget_pass(self) -> None:
        """Leave a pass without gradients out of account, such as that of torch.autograd.grad."""
        self._reached = []
