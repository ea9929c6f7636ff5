"""Gradients belong to someone, and may be changed or read by others: torch's result, or one sentence on every rank."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare, save
from tests.distributed.test_attach import WAYS, attach, average_gradients
from tests.known import grad_of, to_memory_format
from tests.ranks import expect_error_on_all, run_ranks

WIDTH = 8


def ours(params: Any, **options: Any) -> DistAdamW:
    return DistAdamW(params, **{"lr": 1e-2, "eps": 0.1, "bucket_numel": 200, **options})


def theirs(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=1e-2, eps=0.1, fused=True)


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, WIDTH))


def wrap(model: nn.Module, **options: Any) -> Any:
    return DistributedDataParallel(model, **{"gradient_as_bucket_view": True, **options})


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(4, WIDTH, generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).square().mean()


def same(model: nn.Module, twin: nn.Module, what: str = "") -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), f"{what}: {name} differs by {(p - q).abs().max()}"


class Pair:
    """A model trained by DistAdamW, and a twin in DDP trained by torch's AdamW."""

    def __init__(self, way: dict[str, Any], model: nn.Module | None = None) -> None:
        way = dict(way)
        self.bare = layers() if model is None else model
        self.twin = wrap(copy.deepcopy(self.bare))
        view = way.pop("view", True)
        self.model: Any = wrap(self.bare, gradient_as_bucket_view=view) if way.pop("ddp", False) else self.bare
        self.way = way
        self.optimizer: Any = ours(self.bare.parameters())
        self.reference: Any = theirs(self.twin.parameters())
        attach(self.optimizer, self.model, **way)

    def both(self, use: Callable[[Any, Any], object]) -> None:
        """Do to ours and to the twin what a training script does."""
        use(self.model, self.optimizer)
        use(self.twin, self.reference)

    def backward(self, step: int) -> None:
        self.both(lambda model, _: loss_of(model, step).backward())

    def train(self, steps: range, between: Callable[[Any], object] = lambda model: None) -> None:
        for step in steps:
            self.backward(step)
            self.both(lambda model, _: between(model))
            self.both(lambda model, optimizer: (optimizer.step(), optimizer.zero_grad()))

    def check(self, what: str = "") -> None:
        same(self.bare, self.twin.module, what)


# ---------------------------------------------------------------- a model that belongs to its own DDP


def orders(u: Any, t: Any, step: int) -> Iterator[Tensor]:
    """The backward passes of one update, in some order."""
    kind = step % 3
    if kind == 0:
        yield loss_of(u, step)
        yield loss_of(t, step)
    elif kind == 1:
        yield loss_of(t, step)
        yield loss_of(u, step)
    else:
        yield loss_of(u, step) + loss_of(t, step + 7)


def check_not_attached(way: dict[str, Any], *, accumulate: bool, log: bool) -> None:
    way = dict(way)
    u, t = layers(1), layers(2)
    u_twin, t_twin = copy.deepcopy(u), wrap(copy.deepcopy(t))
    t_ddp = wrap(t)
    u_wrapped: Any = wrap(u) if way.pop("ddp", False) else u
    optimizer = ours([*u.parameters(), *t.parameters()])
    reference = theirs([*u_twin.parameters(), *t_twin.parameters()])
    attach(optimizer, u_wrapped, **way)
    for step in range(9):
        if accumulate:
            with t_ddp.no_sync(), t_twin.no_sync():
                loss_of(t_ddp, 50 + step).backward()
                loss_of(t_twin, 50 + step).backward()
        for loss in orders(u_wrapped, t_ddp, step):
            loss.backward()
        for loss in orders(u_twin, t_twin, step):
            loss.backward()
        average_gradients(u_twin)
        if log:  # two collections of one update
            optimizer.clip_grad_norm_(1e9)
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    same(u, u_twin, "U")
    same(t, t_twin.module, "T")


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "plain, no overlap", "every backward"])
def test_a_model_in_a_ddp_that_is_not_attached_belongs_to_that_ddp(way: str) -> None:
    for world_size, accumulate, log in ((2, False, True), (3, True, False)):
        run_ranks(world_size, _call, check_not_attached, WAYS[way], {"accumulate": accumulate, "log": log})


def _call(function: Callable[..., Any], way: dict[str, Any], options: dict[str, Any]) -> Any:
    return function(way, **options)


def check_ddp_inside() -> None:
    """attach() of a plain module, of which a part is in a DDP module already."""
    plain, inner = layers(1), wrap(layers(2))
    outer = nn.Sequential(plain, inner)
    twin = nn.Sequential(copy.deepcopy(plain), wrap(copy.deepcopy(inner.module)))
    optimizer, reference = ours(outer.parameters()), theirs(twin.parameters())
    optimizer.attach(outer)
    for step in range(4):
        loss_of(outer, step).backward()
        loss_of(twin, step).backward()
        average_gradients(twin[0])
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    same(outer, twin)


def test_a_ddp_module_inside_of_an_attached_module_averages_its_own() -> None:
    run_ranks(2, check_ddp_inside)


# ---------------------------------------------------------------- changed between backward and step


def replace(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    for p in model.parameters():
        p.grad = change(grad_of(p))


def replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.data = p.grad.data * 0.5


def scale_data(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.data.mul_(1 / (1 + dist.get_rank()))


def on_one_rank(model: nn.Module) -> None:
    if dist.get_rank() == 1:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def then_forward(model: nn.Module) -> None:
    """The change is followed by another backward pass of the same update."""
    scale_data(model)
    loss_of(model, 99).backward()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "p.grad = f(p.grad)": lambda model: replace(model, lambda grad: grad / grad.norm()),
    "p.grad.data = x": replace_data,
    "p.grad.data.mul_(c)": scale_data,
    "in place, on one rank": on_one_rank,
    "in place, then another backward": then_forward,
}


def check_changed(way: dict[str, Any]) -> dict[str, str]:
    said = {}
    for name, change in CHANGES.items():
        pair = Pair(way)
        pair.train(range(1))
        loss_of(pair.model, 5).backward()
        change(pair.model)
        before = [p.detach().clone() for p in pair.bare.parameters()]
        try:
            pair.optimizer.step()
            said[name] = "applied"
        except RuntimeError as error:
            said[name] = str(error)
        assert all(map(torch.equal, pair.bare.parameters(), before)) or said[name] == "applied"
        assert pair.optimizer.updates == 1 or said[name] == "applied"
        pair.optimizer.zero_grad()
    return said


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain"])
def test_changed_gradients_are_refused_on_every_rank(way: str) -> None:
    for rank, said in enumerate(run_ranks(2, check_changed, WAYS[way])):
        for name, sentence in said.items():
            for word in ("gradients were changed", "accept_gradients()", "gather_gradients()", "max_grad_norm"):
                assert word in sentence, (rank, name, sentence)


def check_accepted(way: dict[str, Any]) -> None:
    pair = Pair(way)

    def clamp(model: nn.Module) -> None:
        replace(model, lambda grad: grad.clamp(-0.01, 0.01))
        if model is pair.model:
            pair.optimizer.accept_gradients()

    if way.get("overlap", True):
        pair.train(range(3), clamp)
        pair.check("accepted")
    else:  # they would be clamped before they are averaged
        loss_of(pair.model, 0).backward()
        with pytest.raises(RuntimeError, match="local until step"):
            clamp(pair.model)
        pair.optimizer.zero_grad()

    def drop_some(model: nn.Module) -> None:
        """A gradient set to None is not used, as in torch."""
        next(iter(model.parameters())).grad = None

    pair.train(range(3, 6), drop_some)
    pair.check("dropped")

    def zero(model: nn.Module) -> None:
        model.zero_grad(set_to_none=False)
        loss_of(model, 33).backward()

    pair.train(range(6, 8), zero)
    pair.check("set to zero")


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "plain, no overlap"])
def test_changes_that_may_be(way: str) -> None:
    run_ranks(2, check_accepted, WAYS[way])


def check_hooks(way: dict[str, Any]) -> None:
    """Hooks registered after attach() see what they see under DDP: local gradients, before the average."""
    pair = Pair(way)

    def in_place(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    def clipped(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = p.grad.clamp(-0.01, 0.01)

    for kind in ("grad", "post", "post, new"):
        handles: list[Any] = []
        for model in (pair.bare, pair.twin.module):
            for p in model.parameters():
                if kind == "grad":
                    handles.append(p.register_hook(lambda grad: grad.clamp(-0.02, 0.02)))
                else:
                    hook = in_place if kind == "post" else clipped
                    handles.append(p.register_post_accumulate_grad_hook(hook))
        pair.train(range(3))
        pair.check(kind)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain"])
def test_hooks_registered_after_attach(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(2, check_hooks, WAYS[way])


# ---------------------------------------------------------------- whole gradients


def conv() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 40, 2), nn.Flatten(), nn.Linear(40, 8))
    return to_memory_format(model, torch.channels_last)


def check_gathered(way: dict[str, Any]) -> None:
    for model in (None, conv()):
        pair = Pair(way, model)

        def reads(model: Any, pair: Pair = pair) -> None:
            if model is pair.model:
                pair.optimizer.gather_gradients()
                pair.optimizer.gather_gradients()  # once is enough
            norms = torch.stack([p.grad.norm() for p in model.parameters()])
            for i, p in enumerate(model.parameters()):  # gradient surgery: of all, and alike on every rank
                p.grad = p.grad / (1 + norms.flip(0)[i])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        def compares(model: Any, pair: Pair = pair) -> None:
            if model is pair.twin:
                pair.optimizer.gather_gradients()
                for p, q in zip(pair.bare.parameters(), pair.twin.parameters(), strict=True):
                    assert torch.equal(grad_of(p), grad_of(q))
                    assert grad_of(p).stride() == p.stride()

        pair.train(range(3), compares)
        pair.check("read")
        pair.train(range(3, 6), reads)
        pair.check("changed")

        def accumulates(model: Any, pair: Pair = pair) -> None:
            if model is pair.model:
                pair.optimizer.gather_gradients()
            loss_of(model, 77).backward()

        if not way.get("reduce_every_backward"):
            pair.train(range(6, 8), accumulates)
            for p, q in zip(pair.bare.parameters(), pair.twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # one more rounding


@pytest.mark.parametrize("way", WAYS)
def test_gather_gradients_leaves_what_ddp_leaves(way: str) -> None:
    run_ranks(2, check_gathered, WAYS[way])


def sharpness_aware(model: Any, optimizer: Any, step: int) -> None:
    """SAM, written for DDP, without no_sync; the only line for DistAdamW is gather_gradients."""
    loss_of(model, step).backward()
    if isinstance(optimizer, DistAdamW):
        optimizer.gather_gradients()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        moves = [0.05 * p.grad / norm for p in model.parameters()]
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)
    optimizer.zero_grad()
    loss_of(model, step).backward()
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.sub_(move)
    optimizer.step()
    optimizer.zero_grad()


def check_sam(way: dict[str, Any]) -> None:
    pair = Pair(way)
    for step in range(5):
        pair.both(partial(sharpness_aware, step=step))
    pair.check()


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_sam_without_no_sync(way: str) -> None:
    run_ranks(2, check_sam, WAYS[way])


# ---------------------------------------------------------------- a second optimizer on the same module


def check_second(way: dict[str, Any], second: str, *, keep: bool) -> None:
    """Phase 2 of a fine-tune: other optimizers continue with the same module."""
    pair = Pair(way)
    pair.train(range(2))
    first = pair.optimizer if keep else None
    unfrozen = list(pair.bare.parameters()) if second != "half" else list(pair.bare.get_submodule("4").parameters())
    twins = list(pair.twin.module.parameters()) if second != "half" else list(pair.twin.module[4].parameters())
    if second == "same":
        attach(pair.optimizer, pair.model, **pair.way)
    elif second == "torch":
        pair.optimizer = theirs(pair.bare.parameters())
    else:
        pair.optimizer = ours(unfrozen)
        attach(pair.optimizer, pair.model, **pair.way)
    if second != "same":
        pair.reference = theirs(twins)
    gc.collect()
    for step in range(2, 5):
        pair.backward(step)
        pair.both(lambda model, optimizer: (optimizer.step(), model.zero_grad()))
    if "ddp" in way or second != "torch" or keep:  # a plain module has no averages without an attached optimizer
        pair.check(f"{second}, {'kept' if keep else 'deleted'}")
    if first is not None and second == "ours":  # back to the first; its state is two updates old, so is torch's
        again = theirs(pair.twin.parameters())
        fresh = ours(pair.bare.parameters())
        attach(fresh, pair.model, **pair.way)
        for step in range(5, 7):
            pair.backward(step)
            for o in (pair.optimizer, fresh, pair.reference, again):  # both take the same gradients
                o.step()
            pair.both(lambda model, _: model.zero_grad())
        pair.check("two optimizers, one after the other")


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain"])
def test_a_second_optimizer_on_the_same_module(way: str) -> None:
    run_ranks(2, check_all_seconds, WAYS[way])


def check_all_seconds(way: dict[str, Any]) -> None:
    for second in ("ours", "half", "torch", "same"):
        for keep in (True, False):
            check_second(way, second, keep=keep)


def check_copied(way: dict[str, Any]) -> None:
    """A copy of a DDP module, such as an EMA, belongs to no optimizer, and may be trained by DDP itself."""
    pair = Pair(way)
    pair.train(range(1))
    copied, twin = copy.deepcopy(pair.model), copy.deepcopy(pair.twin)
    optimizers = theirs(copied.parameters()), theirs(twin.parameters())
    for step in range(3):
        for model, optimizer in zip((copied, twin), optimizers, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(copied, twin)
    pair.train(range(1, 3))
    pair.check()


def test_copies_of_attached_modules_are_free() -> None:
    for way in ("ddp", "ddp, buckets"):
        run_ranks(2, check_copied, WAYS[way])


def check_no_sync_of_two() -> None:
    """Two optimizers share a plain module, and its no_sync."""
    model: Any = layers()
    twin = wrap(layers())
    optimizers = [ours(model[0].parameters()), ours([*model[2].parameters(), *model[4].parameters()])]
    for optimizer in optimizers:
        optimizer.attach(model)
    reference = theirs(twin.parameters())
    for step in range(3):
        with model.no_sync(), twin.no_sync():
            loss_of(model, step).backward()
            loss_of(twin, step).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(grad_of(p), grad_of(q))  # local ones
        loss_of(model, 10 + step).backward()
        loss_of(twin, 10 + step).backward()
        for o in (*optimizers, reference):
            o.step()
            o.zero_grad()
    same(model, twin.module)


def test_optimizers_that_share_a_plain_module_share_no_sync() -> None:
    run_ranks(2, check_no_sync_of_two)


class _Order(nn.Module):
    """Runs its layers in an order of the rank's own, so that gradients of two optimizers come in another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts if dist.get_rank() else reversed(self.parts):
            x = part(x)
        return x


def check_other_order(way: dict[str, Any]) -> None:
    model = _Order()
    twin = copy.deepcopy(model)
    way = dict(way)
    wrapped: Any = wrap(model) if way.pop("ddp", False) else model
    optimizers = [ours(part.parameters(), bucket_numel=64) for part in model.parts]
    for optimizer in optimizers:
        attach(optimizer, wrapped, **way)
    reference = theirs(twin.parameters())
    for step in range(3):
        loss_of(wrapped, step).backward()
        loss_of(twin, step).backward()
        average_gradients(twin)
        for o in (*optimizers, reference):
            o.step()
            o.zero_grad()
    same(model, twin)


def test_two_optimizers_whose_gradients_come_in_another_order_on_another_rank() -> None:
    for way in ("ddp", "plain", "every backward"):
        run_ranks(2, check_other_order, WAYS[way])


def check_closure_elsewhere() -> str:
    pair = Pair(WAYS["ddp"])
    other = torch.optim.SGD(pair.bare.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="gather_gradients") as raised:
        other.step(lambda: float(loss_of(pair.model, 0).backward() or 0.0))
    return str(raised.value)


def test_another_optimizers_closure_is_refused() -> None:
    for said in run_ranks(2, check_closure_elsewhere):
        assert said.startswith("SGD.step(closure)")


# ---------------------------------------------------------------- a rank alone


def check_skips_alone(way: dict[str, Any], leaves_some: bool) -> None:
    """Rank 1 rejects its loss of update 2 after backward, and continues with the next batch."""
    pair = Pair(way)
    if leaves_some:  # DDP averages these
        del pair.optimizer.param_groups[0]["params"][:2]
    for step in range(5):
        loss_of(pair.model, step).backward()
        if step == 2 and dist.get_rank() == 1:
            pair.optimizer.zero_grad()
            continue
        pair.optimizer.step()
        pair.optimizer.zero_grad()


@pytest.mark.parametrize(
    ("way", "leaves_some"),
    [
        *((way, False) for way in ("ddp", "ddp, buckets", "plain", "plain, no overlap", "every backward")),
        ("ddp", True),
        ("ddp, buckets", True),
    ],
)
def test_a_rank_that_alone_skips_an_update_is_an_error_on_all(way: str, leaves_some: bool) -> None:
    began = time.monotonic()
    for error in expect_error_on_all(3, check_skips_alone, WAYS[way], leaves_some):
        assert error.startswith("AgreementError: ranks are out of step: rank "), error
        assert "skipped a step()" in error, error
    assert time.monotonic() - began < 30


def check_skips_alone_after_freezing() -> None:
    """A bucket waits for a frozen parameter, so that nothing is sent in backward, and DDP asks who used what."""
    bare = layers()
    optimizer = ours(bare.parameters())
    for frozen in (False, True):
        if frozen:
            bare[4].bias.requires_grad_(False)
        model = wrap(bare, find_unused_parameters=True)
        attach(optimizer, model, aside=False)
        for step in range(3):
            loss_of(model, step).backward()
            if frozen and step == 1 and dist.get_rank() == 1:
                optimizer.zero_grad()
                continue
            optimizer.step()
            optimizer.zero_grad()


def test_a_rank_that_alone_skips_an_update_after_a_parameter_was_frozen() -> None:
    for error in expect_error_on_all(2, check_skips_alone_after_freezing):
        assert "skipped a step()" in error, error


def check_saves_alone(way: dict[str, Any], call: str, folder: str) -> None:
    """The main rank alone saves after update 2, as scripts do that have a `torch.save` there."""
    pair = Pair(way)
    for step in range(4):
        loss_of(pair.model, step).backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        if step == 1 and dist.get_rank() == 0:
            if call == "save":
                save(folder, pair.model, pair.optimizer)
            else:
                pair.optimizer.consolidate_state_dict()


@pytest.mark.parametrize("call", ["save", "consolidate_state_dict"])
@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_a_rank_that_alone_saves_is_an_error_on_all(way: str, call: str, tmp_path: Path) -> None:
    began = time.monotonic()
    for error in expect_error_on_all(3, check_saves_alone, WAYS[way], call, str(tmp_path)):
        assert error.startswith("AgreementError: ranks are out of step: rank "), error
        assert "called on every rank" in error, error
    assert time.monotonic() - began < 30


def check_leaves_before_backward(way: dict[str, Any]) -> None:
    pair = Pair(way)
    for _ in range(2):
        loss = loss_of(pair.model, 0)
        loss.backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()
    loss = loss_of(pair.model, 1)
    del pair.optimizer.param_groups[0]["params"][0]
    loss.backward()


def test_a_parameter_that_leaves_between_forward_and_backward_of_ddp_is_an_error() -> None:
    for error in expect_error_on_all(2, check_leaves_before_backward, WAYS["ddp"]):
        assert error.startswith("RuntimeError: a parameter left"), error


# ---------------------------------------------------------------- neither attach nor DDP


def check_warned(kind: str) -> list[str]:
    model = layers()
    wrapped = wrap(model) if kind == "DDP" else model
    optimizer = ours(model.parameters(), shard=False if kind == "whole" else "auto")
    if kind == "attached":
        optimizer.attach(model)
    said = []
    for step in range(4):
        loss_of(wrapped, step if kind != "same data" else 0).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [f"{step}: {w.message} {w.filename}" for w in caught]
        optimizer.zero_grad()
    return said


def test_gradients_that_nothing_averages_are_said_once() -> None:
    for said in run_ranks(2, check_warned, "plain"):
        assert len(said) == 1
        for word in ("1: gradients differ over the 2 ranks", "optimizer.attach(model)", "test_whose_gradients.py"):
            assert word in said[0]
    for kind in ("DDP", "attached"):
        assert run_ranks(2, check_warned, kind) == [[], []]


def check_starts_alike(way: dict[str, Any]) -> None:
    norm: Any = nn.BatchNorm1d(WIDTH)
    model = nn.Sequential(layers(dist.get_rank()), norm)
    norm.running_mean.fill_(dist.get_rank())
    twin = wrap(copy.deepcopy(model))
    optimizer, reference = ours(model.parameters()), theirs(twin.parameters())
    optimizer.attach(model, **way)
    assert float(norm.running_mean.sum()) == 0
    for step in range(3):
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    same(model, twin.module)


def test_attach_of_a_plain_module_gives_every_rank_the_first_ones_values() -> None:
    for way in ("plain", "every backward"):
        run_ranks(2, check_starts_alike, WAYS[way])


# ---------------------------------------------------------------- Accelerate


def objects(shard: Any = "auto", model: Any = None, optimizer: Any = None) -> Any:
    torch.manual_seed(0)
    model = layers() if model is None else model
    optimizer = ours(model.parameters(), shard=shard) if optimizer is None else optimizer
    data = TensorDataset(torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0)))
    inner = getattr(optimizer, "optimizer", optimizer)
    scheduler = CyclicLRWithRestarts(inner, None, None, restart_period=50)
    return model, optimizer, DataLoader(data, batch_size=4), scheduler


def epoch(
    accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, scheduler: Any, clip: bool = False
) -> None:
    for (x,) in loader:
        accelerator.backward(model(x).square().mean())
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), 0.02)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def check_second_prepare(kind: str) -> None:
    """The second phase of a fine-tune, against one with DDP's all-reduce."""
    results = []
    for whole in (False, True):
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True)
        model, optimizer, loader, scheduler = prepare(accelerator, *objects(), whole_gradients=whole)
        epoch(accelerator, model, optimizer, loader, scheduler)
        if kind == "returned":
            again = objects(model=model, optimizer=optimizer)
        else:
            first = optimizer if kind == "kept" else None
            del optimizer
            if first is None:
                accelerator._optimizers.clear()
            gc.collect()
            again = objects(model=model)
        model, optimizer, loader, scheduler = prepare(accelerator, *again, whole_gradients=whole)
        epoch(accelerator, model, optimizer, loader, scheduler)
        results.append([p.detach().clone() for p in model.parameters()])
        epoch(accelerator, model, optimizer, loader, scheduler, clip=True)
        with tempfile.TemporaryDirectory() as folder:
            where = [folder]
            dist.broadcast_object_list(where)
            accelerator.save_state(where[0])
            dist.barrier()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ["returned", "kept", "deleted"])
def test_a_second_prepare(kind: str) -> None:
    run_ranks(2, check_second_prepare, kind)


def check_gradients_left(way: dict[str, Any]) -> list[str]:
    """The first optimizer is gone, and its gradients, half averages, are still there."""
    pair = Pair(way)
    loss_of(pair.model, 0).backward()
    pair.optimizer.step()
    del pair.optimizer
    gc.collect()
    second = ours(pair.bare.parameters())
    with pytest.raises(RuntimeError, match="zero_grad") as raised:
        attach(second, pair.model, **pair.way)
    pair.model.zero_grad()
    attach(second, pair.model, **pair.way)
    loss_of(pair.model, 1).backward()
    second.step()
    return [str(raised.value)]


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain"])
def test_gradients_that_a_dead_optimizer_left_are_refused(way: str) -> None:
    run_ranks(2, check_gradients_left, WAYS[way])


def check_local_gradients_before_attach() -> None:
    model = layers()
    loss_of(model, 0).backward()
    optimizer = ours(model.parameters())
    with pytest.raises(ValueError, match=r"may be local ones.* Call zero_grad\(\)"):
        attach(optimizer, model)
    average_gradients(model)
    attach(optimizer, model)


def test_local_gradients_before_attach_are_refused() -> None:
    run_ranks(2, check_local_gradients_before_attach)


def check_shared_in_shard() -> None:
    """Two optimizers on one parameter, and no param.grad."""
    pair = Pair(WAYS["every backward"])
    first, second = pair.optimizer, ours(pair.bare.get_submodule("0").parameters())
    second.attach(pair.model, reduce_every_backward=True)
    twin = theirs(pair.twin.module[0].parameters())
    pair.both(lambda model, _: loss_of(model, 0).backward())
    for o in (first, pair.reference, second, twin):
        o.step()
    pair.check("the one that lets go comes last")
    for o in (first, second, pair.reference):
        o.zero_grad()
    loss_of(pair.model, 1).backward()
    second.step()
    with pytest.raises(RuntimeError, match="before that one's"):
        first.step()


def test_gradients_that_another_optimizer_has_let_go_of_are_missed() -> None:
    run_ranks(2, check_shared_in_shard)


def changes_alone(what: str, when: str, way: dict[str, Any]) -> None:
    pair = Pair(way)
    for step in range(3):
        if when == "between":
            loss_of(pair.model, step).backward()
        if step == 1 and dist.get_rank() == 1:
            if what == "add":
                pair.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(300))]})
            elif what == "remove":
                del pair.optimizer.param_groups[0]["params"][0]
            else:
                pair.optimizer.param_groups[0]["params"][0] = nn.Parameter(
                    pair.bare.get_parameter("0.weight").detach().clone()
                )
        if when != "between":
            loss_of(pair.model, step).backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()


@pytest.mark.parametrize(
    ("what", "when", "way"),
    [
        *((what, when, {}) for what in ("add", "replace") for when in ("before", "between")),
        ("remove", "before", {"ddp": True, "overlap": False}),  # DDP averages what is left to it, in backward
        ("remove", "before", {"ddp": True, "aside": False}),
    ],
)
def test_parameters_changed_on_one_rank_alone(what: str, when: str, way: dict[str, Any]) -> None:
    for error in expect_error_on_all(2, changes_alone, what, when, way):
        assert "has other parameters" in error, error


def skips_alone_under_accelerate() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, scheduler = prepare(accelerator, *objects())
    for step, (x,) in enumerate(loader):
        accelerator.backward(model(x).square().mean())
        if step == 1 and accelerator.process_index == 1:
            optimizer.zero_grad()
            continue
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def test_a_rank_that_alone_skips_an_update_of_a_prepared_loop() -> None:
    for error in expect_error_on_all(2, skips_alone_under_accelerate):
        assert error.startswith("AgreementError: ranks are out of step: rank "), error


def saves_alone_under_accelerate(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, scheduler = prepare(accelerator, *objects())
    for step, (x,) in enumerate(loader):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 1 and accelerator.is_main_process:
            accelerator.save_state(folder)


def test_save_state_on_the_main_rank_alone(tmp_path: Path) -> None:
    for error in expect_error_on_all(2, saves_alone_under_accelerate, str(tmp_path)):
        assert "called on every rank" in error, error


def local_sgd(shard: Any, every: int | None) -> list[float]:
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, scheduler = prepare(accelerator, *objects(shard), check_weights_every=every)
    found = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2, enabled=True) as local:
        for (x,) in loader:
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            first = next(model.parameters()).detach().sum()
            others = [torch.zeros_like(first) for _ in range(2)]
            dist.all_gather(others, first)
            found.append(float(others[0] - others[1]))
            local.step()
    return found


def test_local_sgd_is_refused_with_shared_state_and_served_with_whole() -> None:
    for error in expect_error_on_all(2, local_sgd, "auto", 0):
        assert error.startswith("RuntimeError: step() inside no_sync()")
        assert "shard=False" in error
    for apart in run_ranks(2, local_sgd, False, 0):
        assert len(apart) == 4
        assert all(apart)  # each rank trains by itself between two averages


def check_clipped_after_a_parameter_was_replaced() -> None:
    """Of a parameter that DDP's buckets announce, and that has no shard before the update."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    optimizer = ours(model.parameters())
    net = wrap(model)
    attach(optimizer, net, aside=False)
    loss = net(torch.full((2, 4), 1.0 + dist.get_rank())).sum()
    loss.backward()
    weight = nn.Parameter(torch.ones(2, 4))
    model[0] = nn.Linear(4, 2, bias=False)
    model[0].register_parameter("weight", weight)
    optimizer.param_groups[0]["params"] = [weight]
    net = wrap(model)
    attach(optimizer, net, aside=False)
    net(torch.full((2, 4), 1.0 + dist.get_rank())).square().sum().backward()
    nn.utils.clip_grad_norm_([weight], 0.25)
    optimizer.step()


def test_a_gradient_clipped_after_its_parameter_was_replaced_is_refused() -> None:
    for error in expect_error_on_all(2, check_clipped_after_a_parameter_was_replaced):
        assert "gradients were changed" in error
