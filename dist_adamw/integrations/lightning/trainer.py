"""``prepare_lightning``: count samples, compare ranks and save shards in Lightning's Trainer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dist_adamw.integrations.lightning.checks import check_strategy
from dist_adamw.integrations.lightning.fit import Fit
from dist_adamw.optimizer.replicas import CHECK_WEIGHTS_EVERY
from dist_adamw.schedule.saved import OnDifference, check_on_difference

T = TypeVar("T")
_LIBRARIES = ("lightning.pytorch", "pytorch_lightning")  # two packages with the same classes


def prepare_lightning(
    trainer: T,
    *,
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
    on_difference: OnDifference | None = None,
) -> T:
    """Make Lightning's ``trainer.fit()`` count samples, compare ranks, and save every rank's share of the optimizer.

    The module stays as it is: its ``configure_optimizers`` returns a `DistAdamW` (or any torch optimizer) and a
    `CyclicLRWithRestarts` with ``"interval": "step"``. ``batch_size`` and ``epoch_size`` are filled in from the
    training loader, ``accumulate_grad_batches``, ``limit_train_batches`` and the ranks. Samples are counted as
    Lightning hands batches out, without those that ``DistributedSampler`` repeats.

    On one device and under DDP a checkpoint is Lightning's file without optimizer state, and a folder next to it, in
    which every rank writes its share; ``trainer.fit(ckpt_path=...)`` loads both on any number of ranks. With several
    optimizers, and under ModelParallelStrategy (FSDP2), checkpoints are Lightning's own.

    Args:
        trainer: Of ``lightning.pytorch`` or ``pytorch_lightning``, before ``fit()``.
        check_weights_every: See `dist_adamw.prepare`. Ranks also compare before each checkpoint.
        on_difference: The schedule with which a resumed run continues if the checkpoint's differs: see
            ``CyclicLRWithRestarts.load_state_dict``. None: the scheduler's own setting, by default "strict".

    Returns:
        ``trainer``.

    Raises:
        ImportError: Lightning is not installed.
        ValueError: it is not a Lightning Trainer or was prepared before, or its strategy is not supported (FSDP1,
            DeepSpeed). ``fit()`` raises it before training, on every rank, if the schedule steps once an epoch, a size
            is not known or differs from the loader's, or a callback would replace the schedule.

    Gradients are DDP's averages, whole on every rank, so all of Lightning's hooks see torch's values. To send a third
    less, call ``optimizer.attach(self.trainer.model)`` in ``on_train_start``, and clip by ``max_grad_norm``.

    Local. ``fit()`` is collective: ranks compare their schedule and hyper-parameters at every update.
    """
    if on_difference is not None:
        check_on_difference(on_difference)
    library = _library_of(trainer)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, _Hooks) for callback in callbacks):
        raise ValueError("prepare_lightning was already called for this Trainer. Call it once, with all arguments.")
    check_strategy(trainer.strategy)  # type: ignore[attr-defined]
    # First, so that other callbacks see the sizes, and the clock as it is before a batch.
    callbacks.insert(0, _make_callback(library, check_weights_every, on_difference))
    return trainer


def _library_of(trainer: Any) -> str:
    for cls in type(trainer).__mro__:
        for library in _LIBRARIES:
            if cls.__name__ == "Trainer" and cls.__module__.startswith(f"{library}."):
                return library
    if not any(importlib.util.find_spec(library.partition(".")[0]) for library in _LIBRARIES):
        raise ImportError("prepare_lightning() needs Lightning: pip install 'dist_adamw[lightning]'.")
    raise ValueError(
        f"prepare_lightning takes a Trainer of lightning.pytorch or pytorch_lightning, got {type(trainer).__name__}."
    )


class _Hooks:
    """The hooks of the callback, which Lightning calls on every rank."""

    def __init__(self, library: str, every: int | None, on_difference: OnDifference | None) -> None:
        self._options = (library, every, on_difference)
        self._fit: Fit | None = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _make_callback, self._options  # for strategy="ddp_spawn"; a job's own objects begin in `setup`

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Prepare the strategy and the loops for a fit, before optimizers and loaders are made."""
        if stage == "fit":
            _, every, on_difference = self._options
            self._fit = Fit(trainer, module, every, on_difference)

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Check what ``configure_optimizers`` returned, before a checkpoint is loaded."""
        if self._fit is not None:
            self._fit.follow_optimizers()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        if self._fit is not None:
            self._fit.handed_out(batch)

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        """Count a backward pass of an engine that has its own gradients."""
        if self._fit is not None:
            self._fit.backward_begins()

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        """Finish that backward pass."""
        if self._fit is not None:
            self._fit.backward_ends()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Read the ranks' last comparison."""
        if self._fit is not None:
            self._fit.settle()


def _make_callback(library: str, every: int | None, on_difference: OnDifference | None) -> Any:
    base: Any = importlib.import_module(library).Callback
    return type("DistAdamWCallback", (_Hooks, base), {})(library, every, on_difference)
