"""DeepSpeed: what its configuration has to say, what it must not, and the types that it may name.

Floor 4: knows DeepSpeed's configuration and registries; nothing below knows it. Imports it lazily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_adamw.optimizer import DistAdamW
from dist_adamw.scheduler import CyclicLRWithRestarts

Config = MutableMapping[str, Any]
T = TypeVar("T")
_CLIPPING = "gradient_clipping"
_SCHEDULER = "CyclicLRWithRestarts"
# What JSON cannot say, or the engine says.
_NOT_FOR_JSON = {
    "params": "DeepSpeed passes the parameters",
    "optimizer": "DeepSpeed passes the optimizer",
    "mesh": "DeepSpeed shares state out itself",
    "max_grad_norm": 'write "gradient_clipping" beside "optimizer"',
    "policy_fn": "a function is built in code: pass the scheduler to deepspeed.initialize or to prepare",
    "eta_on_restart_cb": "a function is built in code: pass the scheduler to deepspeed.initialize or to prepare",
    "eta_on_iteration_cb": "a function is built in code: pass the scheduler to deepspeed.initialize or to prepare",
}
_FILLED_BY_PREPARE = ("batch_size", "epoch_size")


def accumulation_of(config: Config, accumulation: int) -> int:
    """The micro-batches of an update: the configuration's, where it says. Local."""
    told = config.get("gradient_accumulation_steps", "auto")
    return accumulation if told == "auto" else int(told)


def configure(config: Config, optimizer: Optimizer | None) -> None:
    """Have the engine clip as ``optimizer`` was told to, and keep ``optimizer``. Local, before the engine is built.

    Args:
        config: DeepSpeed's; changed in place.
        optimizer: Its ``max_grad_norm`` is handed over. None: it is made later, and has none.

    Raises:
        ValueError: both name a norm, and not the same.
    """
    told = config.get(_CLIPPING, "auto")
    norm = optimizer.max_grad_norm if isinstance(optimizer, DistAdamW) else None
    if norm is not None and told not in ("auto", norm):
        raise ValueError(
            f"max_grad_norm={norm} was given to DistAdamW and gradient_clipping={told} to DeepSpeed, which clips. "
            "Name one of them, or the same norm."
        )
    if told == "auto":
        # DeepSpeed 0.19 clips to 1.0 where nothing is said, and Accelerate fills "auto" with 1.0.
        config[_CLIPPING] = norm or 0.0
    if isinstance(optimizer, DistAdamW):
        optimizer.max_grad_norm = None
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        # Else Accelerate swaps a client optimizer for DeepSpeedCPUAdam, with L2 decay.
        config["zero_force_ds_cpu_optimizer"] = False


def register_deepspeed() -> None:
    """Let a DeepSpeed JSON name ``"type": "DistAdamW"`` and ``"type": "CyclicLRWithRestarts"``. Local; call it once.

    Before ``deepspeed.initialize`` or ``accelerator.prepare``; `dist_adamw.prepare` calls it itself. The
    "params" of both are the arguments of the classes by name. ``"auto"`` for ``batch_size`` and ``epoch_size``
    is what `dist_adamw.prepare` knows; for ``lr`` and ``weight_decay`` what Accelerate or transformers fill in.

    On a machine without an accelerator it also has gloo do what DeepSpeed's shared-memory collectives would:
    those are compiled when the process group is made, and a build that was killed leaves a lock on which every later
    start waits for ever. So call it before ``Accelerator()`` there.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    try:
        import deepspeed
        from deepspeed.runtime import lr_schedules
        from deepspeed.runtime.zero import utils as zero
    except ImportError as error:
        raise ImportError("register_deepspeed() needs DeepSpeed: pip install 'dist_adamw[deepspeed]'.") from error
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed looks for names there; it has no registry.
    torch.optim.DistAdamW = _optimizer_from_json  # type: ignore[attr-defined]
    lr_schedules.CyclicLRWithRestarts = _scheduler_from_json
    if DistAdamW not in zero.ZERO_SUPPORTED_OPTIMIZERS:
        zero.ZERO_SUPPORTED_OPTIMIZERS.append(DistAdamW)
    if _SCHEDULER not in lr_schedules.VALID_LR_SCHEDULES:
        lr_schedules.VALID_LR_SCHEDULES.append(_SCHEDULER)


def names_our_types(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration asks for an optimizer or scheduler of this package. Local."""
    return any(config.get(part, {}).get("type") in ("DistAdamW", _SCHEDULER) for part in ("optimizer", "scheduler"))


def fill(config: Config, batch_size: int, epoch_size: int | None) -> None:
    """Put what the loader and the accelerator know in place of ``"auto"``. Local."""
    section = config.get("scheduler", {})
    if section.get("type") != _SCHEDULER:
        return
    told = section.setdefault("params", {})
    for name, value in zip(_FILLED_BY_PREPARE, (batch_size, epoch_size), strict=True):
        if told.get(name, "auto") == "auto" and value is not None:
            told[name] = value


def _optimizer_from_json(params: Iterable[Tensor], **told: Any) -> DistAdamW:
    for name in ("master_dtype", "state_dtype"):
        if told.get(name) is not None:
            _refuse("optimizer", name, told[name], "DeepSpeed keeps fp32 weights itself, so leave it out")
    return _made(DistAdamW, "optimizer", params, told)


def _scheduler_from_json(optimizer: Any, **told: Any) -> CyclicLRWithRestarts:
    told = {k: v for k, v in told.items() if not (k in _FILLED_BY_PREPARE and v == "auto")}
    return _made(CyclicLRWithRestarts, "scheduler", optimizer, told)


def _made(kind: Callable[..., T], section: str, first: Any, told: Mapping[str, Any]) -> T:
    """``kind(first, **told)``, where ``told`` is plain data that somebody wrote.

    Raises:
        ValueError: names the key, and says what is wrong with it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    for name, value in told.items():
        if name in _NOT_FOR_JSON:
            _refuse(section, name, value, _NOT_FOR_JSON[name])
        if value == "auto" and name not in ("shard", "normalize_weight_decay"):
            _refuse(section, name, value, "nobody has filled it in; write a value")
        if isinstance(value, str) and not (value.isidentifier() or _is_number(value)):
            _refuse(section, name, value, "text is a name or a number here")  # nor is anything imported
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={*_NOT_FOR_JSON, "master_dtype", "state_dtype"}, sub_configs=False)
    try:
        parsed = parser.parse_object(dict(told)).as_dict()
        return kind(first, **{name: parsed[name] for name in told})
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"DeepSpeed configuration, {section}.params: {error}") from error


def _refuse(section: str, name: str, value: object, why: str) -> None:
    raise ValueError(f"DeepSpeed configuration, {section}.params: {name}={value!r} cannot be: {why}.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
