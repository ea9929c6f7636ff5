"""Refuse uses of torch schedulers that do not work with a count of samples."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR

_CONSTRUCTORS = {cls.__init__.__code__: cls.__name__ for cls in (SequentialLR, ChainedScheduler)}
_NOT_ONE_OF_SEVERAL = (
    "{} cannot drive CyclicLRWithRestarts, which sets lr by its count of samples: factors of other schedulers would "
    "be lost, and updates from before a milestone counted at once. Use it alone: it has a warm-up (warmup_samples, "
    "warmup_start_lr), decays (eta_on_restart_cb, eta_on_iteration_cb) and accepts your own curve (policy_fn)."
)


_OF_TIMM = (
    "{} counts samples itself, so it has no step_update(num_updates). Call step() after every optimizer.step() in its "
    "place, leave out step(epoch, metric), and save and load its state_dict()."
)


class ExplainsMissing:
    """A base class whose error for a method of timm's schedulers says what to call instead."""

    if not TYPE_CHECKING:  # else a type checker would accept any name

        def __getattr__(self, name: str) -> Any:
            if name == "step_update":
                raise AttributeError(_OF_TIMM.format(type(self).__name__))
            return object.__getattribute__(self, name)  # raises again, from inside a property too


def refuse_container(caller: CodeType) -> None:
    """Raise ValueError if ``caller`` is the constructor of SequentialLR or ChainedScheduler."""
    container = _CONSTRUCTORS.get(caller)
    if container is not None:
        raise ValueError(_NOT_ONE_OF_SEVERAL.format(container))


def refuse_fixed_accumulation() -> None:
    """Raise ValueError if Accelerate's wrapper calls ``step`` and accumulates: nothing would change that."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.optimizer":
        frame = frame.f_back
    if frame is None:
        return
    state: Any = sys.modules["accelerate.state"]
    steps = state.GradientState().num_steps
    if steps > 1:
        raise ValueError(
            f"batch_size is a schedule, and accelerator.prepare alone accumulates {steps} micro-batches in every "
            "update. Pass model, optimizer, data loader and scheduler to dist_adamw.prepare, which changes that."
        )


def refuse_epochs(positional: Sequence[Any], others: Mapping[str, Any]) -> None:
    """Raise ValueError if ``step`` got other arguments than ``samples``, such as torch's old ``step(epoch)``."""
    if not others and positional in ((), (None,)):  # step(None) is torch's step() in full
        return
    given = ", ".join([*map(repr, positional), *(f"{name}={value!r}" for name, value in others.items())])
    # Not a TypeError: DeepSpeed's engine catches that and calls step(train_batch_size).
    raise ValueError(
        f"step({given}) is not understood: this scheduler counts samples, not epochs. Call step() after every "
        "optimizer.step(), or step(samples=<real samples of these updates, all ranks together>), and not after epochs."
    )
