"""DistAdamW through torch's database of optimizers, `optim_db`: its AdamW inputs, schedulers and error inputs.

torch ships the database, and not the tests that use it. Each check here is one of those tests' subjects, and compares
with torch's AdamW of the same arguments, by bits. Every rank has the same gradients.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

from dist_adamw import DistAdamW
from tests.third_party.swap import TORCH_ADAMW, SwappedAdamW

Make = Callable[..., Optimizer]
Check = Callable[[dict[str, Any], torch.dtype], None]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = ((3, 5), (7,), (), (0,), (2, 3, 4))


def info() -> OptimizerInfo:
    """Return torch's entry of AdamW."""
    return next(one for one in optim_db if one.name == "AdamW")


def inputs() -> list[OptimizerInput]:
    """Return all arguments for a CPU, but ``differentiable``, which DistAdamW does not have.

    torch's list has ``foreach`` only where that is faster, which a CPU is not.
    """
    found = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info(), skip=("differentiable",))
    plain = info().optim_inputs_func("cpu")
    return [*found, *(OptimizerInput([], {**one.kwargs, "foreach": True}, f"{one.desc} & foreach") for one in plain)]


# ---------------------------------------------------------------- what both optimizers are trained on


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Return parameters of several shapes."""
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], update: int) -> None:
    """Set the gradients of an update; every third one leaves out the second parameter."""
    source = torch.Generator().manual_seed(100 + update)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=source).to(param.dtype)
        param.grad = None if i == 1 and update % 3 == 2 else grad


def train(optimizer: Optimizer, updates: range) -> None:
    """Make updates."""
    for update in updates:
        set_gradients(all_params(optimizer), update)
        optimizer.step()


def all_params(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the whole state dict on every rank. Collective."""
    if isinstance(optimizer, DistAdamW):
        optimizer.consolidate_state_dict(to=None)
    return optimizer.state_dict()


def options_for_torch(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return torch's arguments: DistAdamW uses the fused kernel unless it is asked for foreach."""
    foreach = bool(kwargs.get("foreach"))
    return {**kwargs, "foreach": foreach, "fused": not foreach}


def pair(kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[Optimizer, Optimizer]:
    """Return torch's AdamW and DistAdamW with copies of the same parameters."""
    return TORCH_ADAMW(parameters(dtype), **options_for_torch(kwargs)), ours(parameters(dtype), kwargs)


def ours(params: Any, kwargs: dict[str, Any]) -> SwappedAdamW:
    """Return a DistAdamW: ``fused=False`` in torch's inputs means any implementation but the fused one."""
    return SwappedAdamW(params, **{name: value for name, value in kwargs.items() if name != "fused" or value})


def expect_equal(theirs: Any, mine: Any, what: str = "parameters") -> None:
    """Raise unless tensors have the same bits, and other values are equal."""
    if isinstance(theirs, Tensor):
        same = isinstance(mine, Tensor) and theirs.dtype == mine.dtype and torch.equal(theirs, mine)
        assert same, f"{what}: torch has {theirs}, DistAdamW {mine}"
    elif isinstance(theirs, dict):
        assert theirs.keys() <= mine.keys(), f"{what}: DistAdamW lacks {sorted(map(str, theirs.keys() - mine.keys()))}"
        for key in theirs:
            expect_equal(theirs[key], mine[key], f"{what}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(theirs) == len(mine), what
        for i, (one, other) in enumerate(zip(theirs, mine, strict=True)):
            expect_equal(one, other, f"{what}[{i}]")
    else:
        assert theirs == mine, f"{what}: torch has {theirs!r}, DistAdamW {mine!r}"


# ---------------------------------------------------------------- the checks


def same_updates(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights, and the state of parameters that have had a gradient, after six updates."""
    theirs, mine = pair(kwargs, dtype)
    train(theirs, range(6))
    train(mine, range(6))
    expect_equal(all_params(theirs), all_params(mine))
    expect_equal(whole_state(theirs)["state"], whole_state(mine)["state"], "state")


def groups(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Groups with their own lr and weight decay; one that is added later; lr that is changed in a group."""

    def run(make: Make) -> Optimizer:
        params = parameters(dtype)
        optimizer = make([{"params": params[:2], "lr": 0.02}, {"params": params[2:3], "weight_decay": 0.3}])
        train(optimizer, range(2))
        optimizer.add_param_group({"params": params[3:], "betas": (0.8, 0.9)})
        optimizer.param_groups[0]["lr"] = 0.005
        train(optimizer, range(2, 5))
        return optimizer

    expect_equal(
        all_params(run(lambda params: TORCH_ADAMW(params, **options_for_torch(kwargs)))),
        all_params(run(lambda params: ours(params, kwargs))),
    )


def schedulers(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """lr and weights under each of the schedulers that the database pairs AdamW with."""
    updates = 12  # both change lr within these: after ten epochs, and after ten without progress
    for make_schedulers in info().scheduler_inputs:
        theirs, mine = pair(kwargs, dtype)
        for optimizer in (theirs, mine):
            schedulers = [make(optimizer) for make in make_schedulers]
            for update in range(updates):
                train(optimizer, range(update, update + 1))
                for scheduler in schedulers:
                    needs_loss = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([1.0] if needs_loss else []))
            assert optimizer.param_groups[0]["lr"] < 0.5 * optimizer.defaults["lr"], "no scheduler has changed lr"
        expect_equal(theirs.param_groups[0]["lr"], mine.param_groups[0]["lr"], "lr")
        expect_equal(all_params(theirs), all_params(mine))


def state_dicts(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """A state dict loads into the other class, in both directions, also after torch.save; training goes on equally."""
    theirs, mine = pair(kwargs, dtype)
    train(theirs, range(3))
    train(mine, range(3))
    swapped = pair(kwargs, dtype)
    for source, target in ((theirs, swapped[1]), (mine, swapped[0])):
        with torch.no_grad():
            for param, value in zip(all_params(target), all_params(source), strict=True):
                param.copy_(value)
        target.load_state_dict(pickle.loads(pickle.dumps(whole_state(source))))
        if target is swapped[0]:  # DistAdamW's groups have no implementation, and torch would choose the slowest
            target.param_groups[0].update(
                {k: v for k, v in options_for_torch(kwargs).items() if k in ("foreach", "fused")}
            )
        train(target, range(3, 6))
    expect_equal(all_params(swapped[0]), all_params(swapped[1]))


def copies(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """``deepcopy`` and ``pickle`` give optimizers that go on equally, with copies of the parameters."""
    theirs, mine = pair(kwargs, dtype)
    train(theirs, range(6))
    train(mine, range(3))
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        train(copied, range(3, 6))
        expect_equal(all_params(theirs), all_params(copied))


def hooks(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Hooks of step, state_dict and load_state_dict run, in torch's order, and change what torch lets them change."""

    def run(optimizer: Optimizer) -> list[str]:
        log: list[str] = []

        def noted(name: str) -> Callable[..., None]:
            return lambda *_: log.append(name)

        optimizer.register_step_pre_hook(noted("before step"))
        optimizer.register_step_post_hook(noted("after step"))
        optimizer.register_state_dict_pre_hook(noted("before state_dict"))
        optimizer.register_state_dict_post_hook(noted("after state_dict"))
        optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1}, prepend=True)
        optimizer.register_load_state_dict_pre_hook(noted("before load"))
        optimizer.register_load_state_dict_pre_hook(lambda _, saved: {k: saved[k] for k in ("state", "param_groups")})
        optimizer.register_load_state_dict_post_hook(noted("after load"))
        train(optimizer, range(2))
        saved = whole_state(optimizer)
        log.append(f"more={saved.get('more')}")
        optimizer.load_state_dict(saved)
        train(optimizer, range(2, 4))
        return log

    theirs, mine = pair(kwargs, dtype)
    expect_equal(run(theirs), run(mine), "hooks")
    expect_equal(all_params(theirs), all_params(mine))


def nothing_to_do(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Without gradients nothing changes; with zero gradients and no weight decay neither; `zero_grad` in both forms."""
    theirs, mine = pair({**kwargs, "weight_decay": 0.0}, dtype)
    before = copy.deepcopy(all_params(mine))
    for optimizer in (theirs, mine):
        optimizer.step()
        for param in all_params(optimizer):
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert all(param.grad is not None for param in all_params(optimizer))
        optimizer.zero_grad()
        assert all(param.grad is None for param in all_params(optimizer))
    expect_equal(before, all_params(mine))
    expect_equal(all_params(theirs), all_params(mine))


def closures_and_tensor_lr(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """A closure is evaluated with gradients on, and its loss is returned; lr may be a tensor that changes in place."""
    is_foreach = bool(kwargs.get("foreach"))  # torch, too, takes a tensor lr only with another implementation
    lrs = (0.01, 0.01) if is_foreach else (torch.tensor(0.01), torch.tensor(0.01))
    optimizers = pair({**kwargs, "lr": lrs[0]}, dtype)
    optimizers[1].param_groups[0]["lr"] = lrs[1]
    returned: list[Any] = []
    for optimizer in optimizers:
        params = all_params(optimizer)

        def loss(optimizer: Optimizer = optimizer, params: list[nn.Parameter] = params) -> Tensor:
            optimizer.zero_grad()
            value = sum(param.square().sum() for param in params)
            assert isinstance(value, Tensor)
            value.backward()
            return value

        returned.append(optimizer.step(loss))  # type: ignore[arg-type]
        if isinstance(lr := optimizer.param_groups[0]["lr"], Tensor):
            lr.mul_(0.5)
        returned.append(optimizer.step(loss))  # type: ignore[arg-type]
    assert isinstance(returned[0], Tensor), f"step returned {returned[0]!r} and not the loss"
    expect_equal(returned[:2], returned[2:], "losses")
    expect_equal(all_params(optimizers[0]), all_params(optimizers[1]))


CHECKS: dict[str, Check] = {
    check.__name__.replace("_", " "): check
    for check in (same_updates, groups, schedulers, state_dicts, copies, hooks, nothing_to_do, closures_and_tensor_lr)
}


# Where DistAdamW differs from torch on purpose, and how.
OWN_ERRORS = {
    "lr as Tensor doesn't work with foreach & not capturable": "lr as a Tensor is not supported by foreach arithmetic",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "no error",  # it takes numbers
}

# ---------------------------------------------------------------- running them


def run_checks(dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, str]:
    """Run every check with every input; return "passed" or the error, by "check: input, dtype". Collective."""
    results = {}
    for dtype, (name, check), one in itertools.product(dtypes, CHECKS.items(), inputs()):
        kwargs = {key: value for key, value in one.kwargs.items() if key != "differentiable"}
        results[f"{name}: {one.desc}, {str(dtype).removeprefix('torch.')}"] = _outcome(check, kwargs, dtype)
    return results


def _outcome(check: Check, kwargs: dict[str, Any], dtype: torch.dtype) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(copy.deepcopy(kwargs), dtype)
    except Exception as error:  # the table names it
        return f"{type(error).__name__}: {error}"[:300]
    return "passed"


def run_error_inputs() -> dict[str, str]:
    """Give DistAdamW what torch's AdamW refuses: "passed" if it raises torch's type and sentence, or `OWN_ERRORS`."""
    return dict(_error_outcomes())


def _error_outcomes() -> Iterator[tuple[str, str]]:
    error_inputs: list[ErrorOptimizerInput] = info().optim_error_inputs_func(device="cpu", dtype=torch.float32)
    for one in error_inputs:
        given = one.optimizer_error_input
        params = [nn.Parameter(torch.randn(1))] if given.params is None else given.params
        outcome, own = _error_outcome(one, params, given.kwargs), OWN_ERRORS.get(given.desc)
        yield given.desc, "passed" if own is not None and own in outcome else outcome


def _error_outcome(one: ErrorOptimizerInput, params: Any, kwargs: dict[str, Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            SwappedAdamW(params, **kwargs)
        except Exception as error:  # the table names it
            if type(error) is one.error_type and re.search(one.error_regex, str(error)):
                return "passed"
            return f"{type(error).__name__}: {error}"
    return "no error"
