"""The two worlds in which the same script runs: `Ours` with DistAdamW, `Torchs` with torch.optim.AdamW.

`Torchs` has whole state on every rank and is fed the gradients' average over ranks, added in rank order.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dist_adamw
from dist_adamw import DistAdamW
from dist_adamw.optimizer.gradients import ddp
from tests.random.reference import HYPER, Reference, average
from tests.random.script import Sequence, Spec
from tests.random.tensors import make_parameter, random_like, same_bits


class Model(nn.Module):
    """Parameters, and a loss whose gradient depends on seed and rank; with ``exact=False`` also on the weights."""

    def __init__(self, exact: bool, rank: int) -> None:
        super().__init__()
        self.exact, self.rank = exact, rank

    def forward(self, seed: int, unused: tuple[str, ...] = ()) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for name, param in self.named_parameters():
            if name in unused or not param.requires_grad:
                continue
            factor = random_like(param, f"{seed} {name} {self.rank}", bits=3)
            terms = param * factor
            if not self.exact:
                terms = terms + param * param * 0.37
            loss = loss + terms.sum().double()
        return loss


class WrongScriptError(Exception):
    """Shrinking has made a script of which nothing can be expected."""


class WrongAverageError(Exception):
    """Raised by `Ours.show_average`."""


class World:
    """A namespace with the model and its optimizers, and the helpers that a script may call."""

    def __init__(self, sequence: Sequence, folder: Path, group: Any) -> None:
        self.sequence, self.folder, self.group = sequence, folder, group
        self.rank = 0 if sequence.ranks == 1 else dist.get_rank()
        self.saved = 0
        self.is_alone = False  # whether one rank has done what others have not
        self.averaged: set[int] = set()  # ids of parameters whose gradient is an average, or was
        self.local = False  # whether the last backward pass was inside no_sync
        model = Model(sequence.exact, self.rank)
        for name, spec in sequence.params.items():
            setattr(model, name, make_parameter(spec, f"first {name}"))
        self.names: dict[str, Any] = {
            "torch": torch, "nn": nn, "copy": copy, "pickle": pickle, "rank": self.rank, "world": self,
            "noise": random_like, "Spec": Spec, "parameter": make_parameter, "find": find, "drop": drop,
            "backward": self.backward, "wrap": self.wrap, "make": self.make, "save_and_load": self.save_and_load,
            "make_alike": self.make_alike, "through_torch": self.through_torch, "through_file": through_file,
            "closure": self.closure, "halve": halve_gradient, "second": None, "show_average": self.show_average,
        }  # fmt: skip
        self.names["model"] = self.names["net"] = model
        groups = [{"params": [getattr(model, n) for n in names], **options} for names, options in sequence.groups]
        self.names["optimizer"] = self.make(groups)
        self.wrap()

    def run(self, text: str) -> None:
        if ".step(" in text:
            self.check_step()
        if "zero_grad" in text:
            self.local = False
        exec(compile(text, "<script>", "exec"), self.names)

    @property
    def model(self) -> Any:
        return self.names["model"]

    @property
    def optimizers(self) -> list[Any]:
        return [self.names[name] for name in ("optimizer", "second") if self.names[name] is not None]

    def make(self, params: Any) -> Any:
        raise NotImplementedError

    def wrap(self) -> None:
        """Let gradients be averaged as the sequence has it. Again after the model has got other parameters."""
        self.names["net"] = self.model
        self.wrapped = {id(param) for param in self.model.parameters()}

    def make_alike(self, model: nn.Module | None = None) -> Any:
        """A fresh optimizer with the groups of the present one, over the parameters of ``model``."""
        others = dict(self.model.named_parameters() if model is None else model.named_parameters())
        names = {id(param): name for name, param in self.model.named_parameters()}
        groups = []
        for group in self.names["optimizer"].param_groups:
            options = {key: group[key] for key in HYPER}
            groups.append({"params": [others[names[id(p)]] for p in group["params"]], **options})
        return self.make(groups)

    def closure(self, seed: int) -> Any:
        def again() -> float:
            self.names["optimizer"].zero_grad()
            self.backward(seed)
            return float(seed)

        return again

    def twin(self) -> Model:
        """The model of a job that begins: of the same shapes, with other values."""
        model = Model(self.sequence.exact, self.rank)
        for name, param in self.model.named_parameters():
            made = nn.Parameter(random_like(param, f"other {name}"), requires_grad=param.requires_grad)
            setattr(model, name, made)
        return model

    def backward(self, seed: int, unused: tuple[str, ...] = (), sync: bool = True) -> None:
        raise NotImplementedError

    def check_order(self, sync: bool, unused: tuple[str, ...]) -> None:
        """Refuse scripts that DDP's users must not write, and sums that are rounded in an order of their own."""
        if sync and self.sequence.way.get("ddp") and not self.is_alone:
            reached = [p for name, p in self.model.named_parameters() if p.requires_grad and name not in unused]
            known = any(id(p) in self.wrapped for p in reached)
            said = torch.tensor([known, not known, bool(reached)], dtype=torch.int32)
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.group)
            some_reach, some_do_not, some_pass = said.tolist()
            # Where no rank does, DDP fails in the next pass: it still waits for this one.
            if some_do_not and (some_reach or some_pass):
                raise WrongScriptError("the backward pass does not reach parameters that DDP knows")
        params = list(self.model.parameters())
        has = torch.tensor([p.grad is not None and bool(p.grad.any()) for p in params], dtype=torch.int32)
        if self.sequence.ranks > 1 and not self.is_alone:
            dist.all_reduce(has, op=dist.ReduceOp.MAX, group=self.group)
        nonzero = {id(p) for p, it_has in zip(params, has.tolist(), strict=True) if it_has}
        taken = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        if not nonzero & taken:
            for optimizer in self.optimizers:
                optimizer.rough = False
        self.averaged &= nonzero
        if self.averaged & taken and not (self.sequence.exact or self.is_alone) and self.sequence.ranks > 1:
            raise WrongScriptError("averages are added to")
        if sync:
            self.averaged = set(map(id, self.model.parameters()))

    def check_step(self) -> None:
        if self.local and self.sequence.ranks > 1:
            raise WrongScriptError("the last backward pass was inside no_sync")

    def save_and_load(self) -> None:
        raise NotImplementedError

    def through_torch(self, seed: int) -> None:
        raise NotImplementedError

    def show_average(self) -> None:
        """Put the average of the weights into the model for a moment, if the optimizer keeps one."""

    def average(self) -> None:
        params = list(self.model.parameters())
        averages = average([param.grad for param in params], params, self.group)
        for param, grad in zip(params, averages, strict=True):
            param.grad = grad


def find(optimizer: Any, param: Tensor) -> tuple[dict[str, Any], int]:
    """The group of ``param`` and its place there."""
    for group in optimizer.param_groups:
        for i, other in enumerate(group["params"]):
            if other is param:
                return group, i
    raise LookupError("it is in no group")


def drop(optimizer: Any, param: Tensor) -> None:
    """Take ``param`` out of its group, in place."""
    group, i = find(optimizer, param)
    del group["params"][i]


def halve_gradient(param: Tensor) -> None:
    """A hook of the user's."""
    assert param.grad is not None
    param.grad.mul_(0.5)


def through_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Torchs(World):
    """The reference."""

    def make(self, params: Any) -> Any:
        optimizer = Reference(params, **self.sequence.options)
        optimizer.is_attached = self.sequence.is_attached
        return optimizer

    def backward(self, seed: int, unused: tuple[str, ...] = (), sync: bool = True) -> None:
        self.check_order(sync, unused)
        loss = self.model(seed, unused)
        if not loss.requires_grad:
            return
        self.local = not sync
        loss.backward()
        if self.sequence.ranks > 1 and sync:
            self.average()

    def save_and_load(self) -> None:
        model, before, old = self.twin(), self.model, self.names["optimizer"]
        optimizer = self.make_alike(model)
        with torch.no_grad():
            for p, q in zip(model.parameters(), before.parameters(), strict=True):
                p.copy_(q)
        for p, q in zip(optimizer.all_params(), old.all_params(), strict=True):
            if old.state.get(q):
                optimizer.state[p] = copy.deepcopy(old.state[q])
                if "master" in optimizer.state[p]:
                    optimizer.state[p]["master"] = old.effective_weight(q).clone()
        optimizer.updates = max((int(s["step"]) for s in optimizer.state.values()), default=0)
        self.names.update(model=model, optimizer=optimizer, second=None)
        self.wrap()

    def through_torch(self, seed: int) -> None:
        optimizer = self.names["optimizer"]
        optimizer.state_dict()  # raises where ours does
        optimizer.zero_grad()
        self.backward(seed)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())


class Ours(World):
    """DistAdamW."""

    def make(self, params: Any) -> Any:
        return DistAdamW(params, **self.sequence.options)

    def wrap(self) -> None:
        """Wrap the model by the sequence's ``way``.

        ddp: in DistributedDataParallel; attached: `attach`; aside: whether DDP's reducer may stand aside; else the
        options of `attach`. Neither ddp nor attached: the user averages gradients by hand.
        """
        super().wrap()
        way = dict(self.sequence.way)
        net = self.model
        if way.pop("ddp", False) and any(param.requires_grad for param in net.parameters()):
            net = DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=True)
        self.names["net"] = net
        aside = way.pop("aside", True)
        if not way.pop("attached", False):
            return
        before = ddp._ASIDE
        ddp._ASIDE = before if aside else frozenset()
        try:
            for optimizer in self.optimizers:
                optimizer.attach(net, **way)
        finally:
            ddp._ASIDE = before

    def backward(self, seed: int, unused: tuple[str, ...] = (), sync: bool = True) -> None:
        self.check_order(sync, unused)
        net = self.names["net"]
        if not any(p.requires_grad and name not in unused for name, p in self.model.named_parameters()):
            return
        self.local = not sync
        without = contextlib.nullcontext if sync else getattr(net, "no_sync", contextlib.nullcontext)
        with without():
            net(seed, unused).backward()
        if sync and self.sequence.ranks > 1 and not (self.sequence.way.get("ddp") or self.sequence.is_attached):
            self.average()

    def save_and_load(self) -> None:
        self.saved += 1
        path = self.folder / f"{self.sequence.number.replace(' ', '-')}-{self.saved}"
        dist_adamw.save(path, self.model, self.names["optimizer"], group=self.group)
        model = self.twin()
        optimizer = self.make_alike(model)
        dist_adamw.load(path, model, optimizer, random_state=False, group=self.group)
        self.names.update(model=model, optimizer=optimizer, second=None)
        self.wrap()

    def show_average(self) -> None:
        """All ranks see the same average; afterwards weights are what they were."""
        optimizer = self.names["optimizer"]
        if not optimizer.contributions("ema"):
            return
        before = [param.detach().clone() for param in self.model.parameters()]
        with optimizer.averaged("ema"):
            if self.sequence.ranks > 1:
                dist_adamw.check_replicas(self.model, group=self.group)
        if not all(map(same_bits, before, self.model.parameters())):
            raise WrongAverageError("the weights are others after the block")

    def through_torch(self, seed: int) -> None:
        ours = self.names["optimizer"]
        groups = [{"params": g["params"], **{k: g[k] for k in HYPER}} for g in ours.param_groups]
        theirs = torch.optim.AdamW(groups, fused=True)
        theirs.load_state_dict(ours.state_dict())
        for group in theirs.param_groups:
            group["fused"] = True
        theirs.zero_grad()
        self.backward(seed)
        theirs.step()
        theirs.zero_grad()
        self.names["optimizer"] = self.make([{**group, "params": list(group["params"])} for group in groups])
        self.names["optimizer"].load_state_dict(theirs.state_dict())
