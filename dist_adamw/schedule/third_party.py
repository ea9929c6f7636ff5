"""What optimizers that are not ours do: wrappers, and skipped updates.

Recognises by attributes and names, so no library needs to be there.
"""

from __future__ import annotations

import gc
import re
import sys
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# Whole components of a name: a module of the user's may be called "a_orig_mod".
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")


def without_wrappers(name: str) -> str:
    """A parameter's or module's name in the model inside what compiles, checkpoints or shards it. Local."""
    return _WRAPPERS.sub("", name).removesuffix(".")


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside wrappers that keep theirs in ``.optimizer``; DeepSpeed's are no torch optimizers."""
    inner: Any = optimizer
    while (inner := getattr(inner, "optimizer", None)) is not None:
        if isinstance(inner, Optimizer):
            optimizer = inner
    return optimizer


def engine_that_shards(optimizer: Optimizer) -> Any:
    """The optimizer of DeepSpeed that steps ``optimizer`` on its own partitions; None without one. Local.

    DeepSpeed puts its flat fp32 partitions into the groups of the optimizer that it is given, and says so nowhere but
    by keeping it. So its own objects are looked through, which takes tenths of a second: ask rarely.
    """
    module = sys.modules.get("deepspeed.runtime.base_optimizer")
    base = getattr(module, "DeepSpeedOptimizer", None)
    if base is None:
        return None
    found = (candidate for candidate in gc.get_objects() if issubclass(type(candidate), base))
    return next((one for one in found if getattr(one, "optimizer", None) is optimizer), None)


def was_applied(optimizer: Optimizer) -> bool:
    """Whether the step that is just returning changed the weights. Gradients are still there."""
    if isinstance(skipped := getattr(optimizer, "step_was_skipped", None), bool):
        if skipped:
            return False
        if isinstance(getattr(optimizer, "updates", None), int):
            return True  # DistAdamW: it may have let go of the gradients by now
    # A fused torch optimizer skips inside the kernel; GradScaler leaves it the flag during step().
    found_inf = getattr(optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor) and found_inf.item():
        return False
    return any(param.grad is not None for group in optimizer.param_groups for param in group["params"])


def skip_is_known(optimizer: Optimizer) -> bool:
    """Whether `was_applied` answers at once; else it waits for the device."""
    return bool(getattr(optimizer, "skip_is_known", True))


def is_being_wrapped() -> bool:
    """Whether Accelerate's wrapper is asking: it loads what ``state_dict()`` returns into the same optimizer at once.

    ``AcceleratedOptimizer.__init__`` moves state to its device that way, and keeps nothing of it.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name == "__init__" and frame.f_globals.get("__name__") == "accelerate.optimizer":
            return True
    return False
