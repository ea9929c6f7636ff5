"""The reference: torch.optim.AdamW with the average of the gradients over ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.random.tensors import restrided

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
HYPER = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")


def average(grads: list[Tensor | None], shapes: list[Tensor], group: Any) -> list[Tensor | None]:
    """The average over ranks, added in rank order; None where no rank has a gradient. Collective."""
    present = torch.tensor([grad is not None for grad in grads], dtype=torch.float64)
    values = [
        torch.zeros(like.numel(), dtype=torch.float64) if grad is None else grad.double().reshape(-1)
        for grad, like in zip(grads, shapes, strict=True)
    ]
    mine = torch.cat([present, *values])
    columns = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(columns, mine, group=group)
    result: list[Tensor | None] = []
    place = len(grads)
    for i, like in enumerate(shapes):
        parts = [column[place : place + like.numel()] for column in columns]
        place += like.numel()
        if not any(column[i] for column in columns):
            result.append(None)
            continue
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        total = torch.zeros(like.numel(), dtype=wide)
        for part in parts:
            total += part.to(wide)
        whole = (total / len(columns)).view(like.shape).to(like.dtype)
        result.append(torch.empty_like(like.detach()).copy_(whole))
    return result


class Reference(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), and what DistAdamW promises beyond it, in terms of that.

    ``master_dtype`` and ``state_dtype``: the same torch update of fp32 copies, rounded afterwards.
    ``max_grad_norm``: torch's clipping of the gradients' copies. Its norm is rounded otherwise, so
    `inexact` then says that the next comparison allows for a few roundings.
    """

    inexact = False
    rough = False  # whether gradients have been clipped by a norm that is rounded otherwise
    is_attached = False
    updates = 0

    def __init__(self, params: Any, **options: Any) -> None:
        self.max_grad_norm = options.pop("max_grad_norm", None)
        self.master_dtype = options.pop("master_dtype", None)
        self.state_dtype = options.pop("state_dtype", None)
        options.pop("bucket_numel", None)
        options.pop("averages", None)  # torch's AdamW has none: see `Ours.show_average`
        super().__init__(params, fused=True, **options)

    def __getstate__(self) -> dict[str, Any]:
        self._forget_zeros()
        for param, state in self.state.items():  # what was written to the weights is in the masters of a pickle
            if state.get("master") is not None:
                state["master"] = self.effective_weight(param).clone()
        kept = ("max_grad_norm", "master_dtype", "state_dtype", "inexact", "rough", "is_attached", "updates")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        # torch rounds to the parameter's dtype, and DistAdamW keeps what is wider.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(ids, self.all_params(), strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if self.is_wide(param) and key in (*MOMENTS, "master"):
                    self.state[param][key] = value.clone()
        self.updates = max((int(s["step"]) for s in self.state.values() if "step" in s), default=0)

    def attach(self, *_: Any, **__: Any) -> None:
        """Gradients are averaged already."""

    def accept_gradients(self) -> None:
        """They always are."""

    def wait(self) -> None:
        """Nothing is under way."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        if not self.is_attached:
            return nn.utils.clip_grad_norm_(self.all_params(), max_norm)
        grads = [param.grad for param in self.all_params() if param.grad is not None]
        norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt() if grads else torch.zeros(())
        if (factor := (max_norm / (norm + 1e-6)).float()) < 1:  # also where the norm is max_norm
            self.rough = True
            for grad in grads:
                grad.mul_(factor)
        return norm.float()

    # ------------------------------------------------------------ the update

    def is_wide(self, param: Tensor) -> bool:
        """Whether weights or moments of ``param`` are kept in another dtype than its own."""
        is_short = param.dtype.itemsize == 2
        return (is_short and self.master_dtype is not None) or self.state_dtype not in (None, param.dtype)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._forget_zeros()
        params = [param for param in self.all_params() if param.grad is not None]
        for param in params:
            assert param.grad is not None
            if param.grad.is_sparse:
                raise RuntimeError("AdamW does not support sparse gradients")
            param.grad = restrided(param.grad, param)
            state = self.state.get(param, {})
            for key in MOMENTS:
                if key in state:
                    if state[key].shape != param.shape:  # torch's kernel would read what is not there
                        raise RuntimeError(f"{key} has shape {tuple(state[key].shape)}")
                    state[key] = restrided(state[key], param)
        if not params:
            return loss
        factor = self._clip_factor(params)
        if factor is None:
            self._begin_state(params)
            return loss
        self.inexact |= self.rough
        grads = [cast(Tensor, param.grad) for param in params]
        # A clipped gradient of 16 bits is not rounded to them again.
        wide = [p for p in params if self.is_wide(p) or (factor < 1 and p.dtype.itemsize == 2)]
        if wide:
            self._update_wide({id(param) for param in wide}, factor)
        if factor < 1:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad * factor
        try:
            for param in wide:
                param.grad = None
            super().step()
        finally:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        self.updates += 1
        return loss

    def state_dict(self) -> Any:
        """torch's, which fails while ``state`` has parameters that are in no group."""
        self._forget_zeros()
        return super().state_dict()

    def _forget_zeros(self) -> None:
        """Drop the zeros of a skipped update where the parameter has left its group, as DistAdamW does."""
        here = {id(param) for param in self.all_params()}
        for param, state in list(self.state.items()):
            if id(param) in here or state.get("step") != 0:
                continue
            if not any(bool(state[key].any()) for key in MOMENTS if key in state):
                del self.state[param]

    def _begin_state(self, params: list[Tensor]) -> None:
        """Return what torch's fused update leaves if a GradScaler has found infinite gradients: zeros."""
        amsgrad = {id(param): group["amsgrad"] for group in self.param_groups for param in group["params"]}
        for param in params:
            if self.state.get(param):
                continue
            has_master = param.dtype.itemsize == 2 and self.master_dtype is not None
            dtype = self.state_dtype or (torch.float32 if has_master else param.dtype)
            state = self.state[param]
            state["step"] = torch.zeros(())
            for key in MOMENTS[: 2 + amsgrad[id(param)]]:
                state[key] = torch.zeros_like(param, dtype=dtype)
            if has_master:
                state["master"] = param.detach().float()

    def _clip_factor(self, params: list[Tensor]) -> float | None:
        """Return the factor on gradients; None if the norm is not finite and the update is skipped."""
        grads = [param.grad for param in params if param.grad is not None]
        if self.max_grad_norm is None:
            return 1.0
        norm = float(torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt())
        if not norm < float("inf"):
            return None
        factor = self.max_grad_norm / (norm + 1e-6)
        self.inexact |= factor < 1
        return min(float(factor), 1.0)

    def effective_weight(self, param: Tensor) -> Tensor:
        """The fp32 weight: the master, where the user has not written another value to ``param``."""
        master = self.state.get(param, {}).get("master")
        if master is None:
            return param.detach().float()
        return torch.where(self.rounded(master, param) == param.detach(), master, param.detach().float())

    def rounded(self, master: Tensor, param: Tensor) -> Tensor:
        if self.master_dtype != torch.int16:
            return master.to(param.dtype)
        # To nearest, and away from zero where two are equally near: see `split_master_`.
        bits = restrided(master, param).contiguous().view(torch.int32)
        return ((bits + (1 << 15)) >> 16).to(torch.int16).view(torch.bfloat16).view(param.shape)

    def _update_wide(self, ids: set[int], factor: float) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if id(param) in ids]
            if not params:
                continue
            has_master = [param.dtype.itemsize == 2 and self.master_dtype is not None for param in params]
            weights = [nn.Parameter(restrided(self.effective_weight(param), param).clone()) for param in params]
            inner = torch.optim.AdamW(weights, fused=True, **{k: group[k] for k in HYPER})
            for param, weight in zip(params, weights, strict=True):
                assert param.grad is not None
                weight.grad = restrided(param.grad.float() * factor, weight)
                state = self.state.get(param, {})
                if state:
                    inner.state[weight] = {
                        "step": state["step"].clone(),
                        **{k: state[k].float().clone() for k in MOMENTS if k in state},
                    }
            inner.step()
            for param, weight, kept in zip(params, weights, has_master, strict=True):
                state = self.state[param]
                dtype = self.state_dtype or (torch.float32 if kept else param.dtype)
                state["step"] = inner.state[weight]["step"]
                for key in MOMENTS[: 2 + group["amsgrad"]]:
                    _write(state, key, inner.state[weight][key].to(dtype))
                if kept:
                    _write(state, "master", weight.detach())
                    param.copy_(self.rounded(weight.detach(), param))
                else:
                    param.copy_(weight)


def _write(state: dict[str, Any], key: str, value: Tensor) -> None:
    """Write into the existing tensor, as torch's update does: a script may hold it."""
    there = state.get(key)
    if there is not None and (there.shape, there.dtype, there.stride()) == (value.shape, value.dtype, value.stride()):
        there.copy_(value)
    else:
        state[key] = value
