"""Ordinary training loops with ``reproducible=True``: torch's result, or one sentence on every rank."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare
from tests.distributed.engines import accelerator_on
from tests.distributed.test_reproducible import digest
from tests.gradient_pair import large_from
from tests.ranks import run_ranks

K = 4  # micro-batches of an update
UPDATES = 2
OPTIONS: dict[str, Any] = {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1}


class Net(nn.Module):
    """A parameter, ``scale``, is used in every second micro-batch: with two ranks on the first rank alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 17), nn.Linear(17, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, number: int) -> Tensor:
        y: Tensor = self.last(self.first(x).tanh())
        return y * self.scale if number % 2 == 0 else y


def output_of(model: nn.Module, update: int, number: int) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * update + number))
    return torch.as_tensor(model(x, number))


class Run:
    """A script's loop, for the changes below."""

    def __init__(self, way: str, net: Net | None = None, optimizers: int = 1) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.net = Net() if net is None else net
        self.model: nn.Module = self.net
        if way == "ddp":
            self.model = DistributedDataParallel(self.net, gradient_as_bucket_view=True, find_unused_parameters=True)
        elif way == "fsdp":
            fully_shard(self.net)
        # Small buckets: most parameters are in several.
        shares = [self.params] if optimizers == 1 else [self.params[:2], self.params[2:]]
        self.optimizers: list[Any] = [
            DistAdamW(params, reproducible=True, bucket_numel=64, **OPTIONS) for params in shares
        ]
        for optimizer in self.optimizers:
            optimizer.attach(self.model)
        self.optimizer = self.optimizers[0]
        self.update = self.j = 0
        self.is_last = False

    def train(self, loop: Loop) -> str:
        """Return a digest of the weights and the number of updates, or the error."""
        passes = K // self.ranks
        try:
            for n in range(UPDATES * passes):
                self.update, self.j = divmod(n, passes)
                self.is_last = self.j == passes - 1
                loop.backward(self, output_of(self.model, self.update, self.j * self.ranks + self.rank))
                loop.after_backward(self)
                if self.is_last:
                    loop.step(self)
                    loop.zero_grad(self)
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return f"{digest(self.net)} after {self.optimizer.updates}"

    @property
    def params(self) -> list[Tensor]:
        return list(self.net.parameters())


class Loop:
    """The steps of an ordinary loop."""

    def backward(self, run: Run, output: Tensor) -> None:
        output.square().mean().backward()

    def after_backward(self, run: Run) -> None:
        pass

    def step(self, run: Run) -> None:
        for optimizer in run.optimizers:
            optimizer.step()

    def zero_grad(self, run: Run) -> None:
        for optimizer in run.optimizers:
            optimizer.zero_grad()


def change(change_gradients: Callable[[Run], object], when: Callable[[Run], bool] = lambda run: run.is_last) -> Loop:
    """Return a loop that changes gradients after its last, or some other, backward passes."""

    class Changing(Loop):
        def after_backward(self, run: Run) -> None:
            if when(run):
                change_gradients(run)

    return Changing()


def on_first(change_gradients: Callable[[Run], object]) -> Loop:
    return change(change_gradients, lambda run: run.j == 0)


def do(steps: Callable[[Run], object]) -> Loop:
    """Return a loop with other steps in place of ``step()``."""

    class Stepping(Loop):
        def step(self, run: Run) -> None:
            steps(run)

    return Stepping()


def zero(zero_grad: Callable[[Run], object]) -> Loop:
    """Return a loop with another ``zero_grad()``."""

    class Zeroing(Loop):
        def zero_grad(self, run: Run) -> None:
            zero_grad(run)

    return Zeroing()


def passes(backward: Callable[[Run, Tensor], object]) -> Loop:
    """Return a loop with other backward passes."""

    class Passing(Loop):
        def backward(self, run: Run, output: Tensor) -> None:
            backward(run, output)

    return Passing()


class SkipFirst(Loop):
    """Leaves the first micro-batches out."""

    def backward(self, run: Run, output: Tensor) -> None:
        if run.j > 0:
            super().backward(run, output)


def clip(run: Run) -> None:
    nn.utils.clip_grad_norm_(run.params, 0.1)


def look_and_clip(run: Run) -> None:
    torch.autograd.grad(output_of(run.model, run.update, 7).sum(), [run.net.first.weight])
    clip(run)


def log_norms(run: Run) -> None:
    for param in run.params:
        assert param.grad is None or param.grad.norm() > 0
    assert nn.utils.get_total_norm([p.grad for p in run.params if p.grad is not None]) > 0.1


def add_noise(run: Run) -> None:
    for param in run.params:
        if param.grad is not None:
            param.grad.add_(0.01)


def replace(run: Run) -> None:
    for param in run.params:
        param.grad = None if param.grad is None else param.grad * 0.5


def clip_value_and_accept(run: Run) -> None:
    nn.utils.clip_grad_value_(run.params, 0.01)
    run.optimizer.accept_gradients()


def step_twice(run: Run) -> None:
    run.optimizer.step()
    run.optimizer.step()


def gather_and_step(run: Run) -> None:
    run.optimizer.gather_gradients()
    run.optimizer.step()


def skip(run: Run) -> None:
    if run.update == 1:
        run.optimizer.step()


def read_afterwards(run: Run) -> None:
    run.optimizer.step()
    log_norms(run)


def retain(run: Run, output: Tensor) -> None:
    loss = output.square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def retain_and_look(run: Run, output: Tensor) -> None:
    loss = output.square().mean()
    loss.backward(retain_graph=True)
    torch.autograd.grad(output_of(run.model, run.update, 7).sum(), [run.net.first.weight])
    loss.backward()


def two_losses(run: Run, output: Tensor) -> None:
    output.square().mean().backward(retain_graph=True)
    output.sum().backward()


def penalty_apart(run: Run, output: Tensor) -> None:
    output.square().mean().backward()
    run.net.first.weight.square().sum().backward()


def penalty_first(run: Run, output: Tensor) -> None:
    run.net.first.weight.square().sum().backward()
    output.square().mean().backward()


def look_first(run: Run, output: Tensor) -> None:
    """Differentiate without a gradient for any parameter, also while old ones are there."""
    torch.autograd.grad(output.sum(), [run.net.first.weight, run.net.last.bias], retain_graph=True)
    output.square().mean().backward()
    before = [param.grad for param in run.params]
    torch.autograd.grad(output_of(run.model, run.update, 7).sum(), [run.net.first.weight])
    assert all(param.grad is grad for param, grad in zip(run.params, before, strict=True)) or run.ranks == 1


def both_at_once(run: Run, output: Tensor) -> None:
    """Two forward passes of one micro-batch, and one backward pass."""
    again = output_of(run.model, run.update, run.j * run.ranks + run.rank)
    ((output.square().mean() + again.square().mean()) / 2).backward()


ORDINARY = Loop()
# Loops that train as another one does, by bits, on any number of ranks.
SAME: dict[str, tuple[Loop, Loop]] = {
    "norms are logged": (change(log_norms, lambda run: True), ORDINARY),
    "gradients are read after step()": (do(read_afterwards), ORDINARY),
    "no zero_grad()": (zero(lambda run: None), ORDINARY),  # an update has used the gradients
    "zeros are left": (zero(lambda run: run.optimizer.zero_grad(set_to_none=False)), ORDINARY),
    "zeros are left by the model": (zero(lambda run: run.model.zero_grad(set_to_none=False)), ORDINARY),
    "model.zero_grad()": (zero(lambda run: run.model.zero_grad()), ORDINARY),
    "gather_gradients()": (do(gather_and_step), ORDINARY),
    "torch.autograd.grad": (passes(look_first), ORDINARY),
    "two forward passes": (passes(both_at_once), ORDINARY),
    "model.zero_grad() after the first pass": (on_first(lambda run: run.model.zero_grad()), SkipFirst()),
    "model.zero_grad(False) after the first pass": (
        on_first(lambda run: run.model.zero_grad(set_to_none=False)),
        SkipFirst(),
    ),
    "optimizer.zero_grad() after the first pass": (on_first(lambda run: run.optimizer.zero_grad()), SkipFirst()),
    "model.zero_grad() before step()": (change(lambda run: run.model.zero_grad()), do(lambda run: None)),
}


def run_loop(way: str, loop: Loop) -> str:
    return Run(way).train(loop)


def same(way: str, name: str) -> tuple[str, str]:
    loop, other = SAME[name]
    return run_loop(way, loop), run_loop(way, other)


@pytest.mark.parametrize(("ranks", "way"), [(1, "plain"), (2, "plain"), (2, "ddp"), (4, "plain")])
@pytest.mark.parametrize("name", SAME)
def test_loops_that_train_alike(name: str, ranks: int, way: str) -> None:
    if "first pass" in name and ranks == K:
        pytest.skip("a rank has one pass")
    ((loop, other), *rest) = run_ranks(ranks, same, way, name)
    assert re.match(r"\w{16} after [02]$", loop), loop
    assert loop == other
    assert rest == [(loop, other)] * (ranks - 1)


# Loops that give one digest on any number of ranks, and torch's weights.
def drop_first(params: list[Tensor]) -> None:
    params[0].grad = params[1].grad = None  # of ``scale``, and of the first layer


TORCH: dict[str, tuple[Loop, Callable[[list[Tensor]], object]]] = {
    "ordinary": (ORDINARY, lambda params: None),
    "some gradients are set to None": (change(lambda run: drop_first(run.params)), drop_first),
    "our clip_grad_norm_": (
        change(lambda run: run.optimizer.clip_grad_norm_(0.1)),
        lambda params: nn.utils.clip_grad_norm_(params, 0.1),
    ),
}


def against_torch(way: str, name: str) -> str:
    loop, change_gradients = TORCH[name]
    run = Run(way)
    found = run.train(loop)
    net = Net()
    params: list[Tensor] = list(net.parameters())
    optimizer = torch.optim.AdamW(params, **OPTIONS)
    for update in range(UPDATES):
        for number in range(K):
            (output_of(net, update, number).square().mean() / K).backward()
        change_gradients(params)
        optimizer.step()
        optimizer.zero_grad()
    for param, expected in zip(run.params, params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize("name", TORCH)
def test_loops_that_torch_trains_alike(name: str) -> None:
    (expected,) = run_ranks(1, against_torch, "plain", name)
    for ranks, way in ((2, "plain"), (2, "ddp"), (4, "plain")):
        assert run_ranks(ranks, against_torch, way, name) == [expected] * ranks


def skipping() -> str:
    return run_loop("plain", do(skip))


def test_an_update_that_is_skipped() -> None:
    (expected,) = run_ranks(1, skipping)
    assert expected.endswith("after 1")
    assert run_ranks(2, skipping) == [expected] * 2


CHANGED = "RuntimeError: gradients were changed after backward"
SECOND = "RuntimeError: a backward pass went through no forward pass .* call backward\\(\\) once"
GATHERED = "RuntimeError: a backward pass began while averages from gather_gradients"
NOT_REFUSED = "\\w{16} after"
# Loops, and the sentence on several ranks and in one process.
REFUSED: dict[str, tuple[Loop, str, str]] = {
    "clip_grad_norm_": (change(clip), CHANGED, NOT_REFUSED),
    "clip_grad_norm_ in every pass": (change(clip, lambda run: True), CHANGED, "RuntimeError: gradients were changed"),
    "clip_grad_norm_ in the first pass": (on_first(clip), CHANGED, "RuntimeError: gradients were changed"),
    "clip_grad_norm_ after torch.autograd.grad": (change(look_and_clip), CHANGED, NOT_REFUSED),
    "noise": (change(add_noise), CHANGED, NOT_REFUSED),
    "other tensors": (change(replace), CHANGED, NOT_REFUSED),
    "None in the first pass": (on_first(lambda run: drop_first(run.params)), CHANGED, "RuntimeError: .* were changed"),
    "clip_grad_value_ and accept_gradients()": (change(clip_value_and_accept), CHANGED, NOT_REFUSED),
    "model.zero_grad(False) before step()": (
        change(lambda run: run.model.zero_grad(set_to_none=False)),
        CHANGED,
        NOT_REFUSED,
    ),
    "retain_graph": (passes(retain), SECOND, SECOND),
    "two losses": (passes(two_losses), SECOND, SECOND),
    "retain_graph, and torch.autograd.grad in between": (passes(retain_and_look), SECOND, SECOND),
    "a penalty apart": (passes(penalty_apart), SECOND, SECOND),
    "a penalty apart, first": (passes(penalty_first), SECOND, SECOND),
    "gather_gradients() after the first pass": (
        on_first(lambda run: run.optimizer.gather_gradients()),
        GATHERED,
        NOT_REFUSED,
    ),
    "two steps": (do(step_twice), "RuntimeError: step\\(\\) was called twice", NOT_REFUSED),
}


def refused(way: str, name: str) -> str:
    return run_loop(way, REFUSED[name][0])


@pytest.mark.parametrize(("ranks", "way"), [(1, "plain"), (2, "plain"), (2, "ddp")])
@pytest.mark.parametrize("name", REFUSED)
def test_loops_that_are_refused(name: str, ranks: int, way: str) -> None:
    _, on_several, on_one = REFUSED[name]
    errors = run_ranks(ranks, refused, way, name)
    assert len(set(errors)) == 1
    assert re.match(on_one if ranks == 1 else on_several, errors[0]), errors[0]


def alone(change_gradients: Callable[[Run], object], rank: int) -> str:
    """Change gradients on one rank alone."""
    return run_loop("plain", change(change_gradients, lambda run: run.is_last and run.rank == rank))


def drop_some(run: Run) -> None:
    drop_first(run.params)


def test_a_change_on_one_rank_is_refused_on_all() -> None:
    first, second = run_ranks(2, alone, clip, 1)
    assert first.startswith("RuntimeError: gradients were changed after backward on another rank.")
    assert second.startswith(f"{CHANGED}.")
    for error in run_ranks(2, alone, drop_some, 1):
        assert error.startswith("AgreementError: gradients were set to None between backward and step() on some"), error


@pytest.mark.parametrize("name", ["retain_graph", "two losses"])
def test_what_fsdp2_refuses(name: str) -> None:
    for error in run_ranks(2, refused, "fsdp", name):
        assert re.match(REFUSED[name][2], error), error


# ---------------------------------------------------------------- param.grad


def own_gradients(way: str) -> None:
    """Compare ``param.grad`` with what autograd returns, by bits, in every pass."""
    run = Run(way)
    twin = copy.deepcopy(run.net)
    held: list[tuple[Tensor, Tensor]] = []

    class Comparing(Loop):
        def after_backward(self, run: Run) -> None:
            number = run.j * run.ranks + run.rank
            twin.load_state_dict(run.net.state_dict())
            twin_params = list(twin.parameters())
            expected = torch.autograd.grad(
                output_of(twin, run.update, number).square().mean(), twin_params, allow_unused=True
            )
            for param, grad in zip(run.params, expected, strict=True):
                if grad is None:
                    assert (param.grad is None) == (run.rank % 2 == 1 or run.j == 0)
                    continue
                assert param.grad is not None
                assert torch.equal(param.grad, grad)
                held.append((param.grad, grad))

    assert re.match(NOT_REFUSED, run.train(Comparing()))
    for kept, value in held:  # the tensors that a script keeps are not written to
        assert torch.equal(kept, value)


@pytest.mark.parametrize(("ranks", "way"), [(2, "plain"), (2, "ddp"), (4, "plain")])
def test_after_backward_each_rank_has_its_own_gradient(ranks: int, way: str) -> None:
    run_ranks(ranks, own_gradients, way)


class Wide(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))

    def forward(self, x: Tensor, number: int) -> Tensor:
        y: Tensor = self.middle(nn.functional.pad(x, (0, 58)))
        return super().forward(y[:, :6], number)


def gradient_bytes(way: str) -> tuple[int, int, int]:
    """Return bytes of gradients: of one set, the most during backward, and of those that are left after it."""
    with large_from(4096):
        run = Run(way, Wide())
    most: list[int] = []
    left: list[int] = []

    def storages(_: Any = None) -> int:
        grads = [param.grad for param in run.params if param.grad is not None]
        return sum({grad.untyped_storage().data_ptr(): grad.untyped_storage().nbytes() for grad in grads}.values())

    for param in run.params:
        param.register_post_accumulate_grad_hook(lambda _: most.append(storages()))
    result = run.train(change(lambda run: left.append(storages()), lambda run: True))
    assert re.match(NOT_REFUSED, result)
    return sum(param.nbytes for param in run.params), max(most), max(left)


def test_no_more_than_one_set_of_gradients_stays() -> None:
    for one_set, most, left in run_ranks(2, gradient_bytes, "plain"):
        assert 0.99 * one_set <= left <= one_set  # a rank may not use ``scale``
        assert most <= 1.2 * one_set, most / one_set


def without_its_optimizer() -> str:
    """Train by torch's optimizer with the gradients that a deleted one has left."""
    run = Run("plain")
    output_of(run.model, 0, run.rank).sum().backward()
    other = torch.optim.AdamW(run.params, **OPTIONS)
    del run.optimizers, run.optimizer
    try:
        other.step()
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_gradients_of_an_optimizer_that_no_longer_exists_are_refused() -> None:
    for error in run_ranks(2, without_its_optimizer):
        assert re.search("reduced to their owners for an attached DistAdamW that no longer exists", error), error


def use_once(name: str) -> bool:
    """Return whether an update has changed a parameter that only the update before it uses."""
    run = Run("plain")
    scale = run.net.scale
    for update in range(2):
        before = scale.clone()
        for number in range(run.rank, K, run.ranks):
            output_of(run.model, update, 2 * number + update).square().mean().backward()
        run.optimizer.step()
        SAME[name][0].zero_grad(run)
    return not torch.equal(scale, before)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("zeros are left", True), ("zeros are left by the model", True), ("no zero_grad()", False)],
)
def test_zeros_count_as_gradients_as_in_torch(name: str, changes: bool) -> None:
    for ranks in (1, 2, 4):
        assert run_ranks(ranks, use_once, name) == [changes] * ranks


# ---------------------------------------------------------------- Accelerate


def clip_in_every_pass(engine: str) -> str:
    with accelerator_on(engine, K // dist.get_world_size()) as accelerator:
        net: Any = Net()
        optimizer: Any = DistAdamW(net.parameters(), reproducible=True, **OPTIONS)
        scheduler: Any = CyclicLRWithRestarts(optimizer, restart_period=1)
        loader: Any = DataLoader(TensorDataset(torch.ones(8, 6)), 1)
        model, optimizer, loader, scheduler = prepare(accelerator, net, optimizer, loader, scheduler)
        try:
            for (x,) in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(x, 0).sum())
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
        except RuntimeError as error:
            return str(error)
        return "trained"


@pytest.mark.parametrize(("ranks", "engine"), [(1, "single"), (2, "DDP")])
def test_accelerators_clip_grad_norm_in_every_pass_is_refused(ranks: int, engine: str) -> None:
    for error in run_ranks(ranks, clip_in_every_pass, engine):
        assert error.startswith("gradients were changed"), error


# ---------------------------------------------------------------- two optimizers


def two_optimizers(changes: bool) -> str:
    """Train by two optimizers; perhaps clip the gradients of the second."""
    run = Run("plain", optimizers=2)
    return run.train(change(lambda run: nn.utils.clip_grad_norm_(run.params[2:], 0.01)) if changes else ORDINARY)


def test_two_optimizers() -> None:
    (expected,) = run_ranks(1, run_loop, "plain", ORDINARY)
    assert run_ranks(2, two_optimizers, False) == [expected] * 2
    for error in run_ranks(2, two_optimizers, True):
        assert error.startswith(CHANGED)
