"""Gradients reduced to their owners: the bits of whole averages, in every way that it can be done."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dist_adamw import CyclicLRWithRestarts, DistAdamW
from dist_adamw.optimizer import transport
from dist_adamw.optimizer.gradients import ddp
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.transport import gloo
from dist_adamw.optimizer.transport.shared_memory import SharedMemoryTransport
from tests.distributed.test_optimizer import Network
from tests.ranks import expect_error_on_all, run_ranks

WORLDS = [2, 3]  # 3 ranks own uneven slices; the first test has 1 and 4, too
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"ddp": True},
    "ddp, buckets": {"ddp": True, "aside": False},
    "ddp, buckets, no overlap": {"ddp": True, "aside": False, "overlap": False},
    "ddp, buckets, own buffers": {"ddp": True, "aside": False, "view": False},
    "plain": {},
    "plain, no overlap": {"overlap": False},
    "every backward": {"reduce_every_backward": True},
    "every backward, no overlap": {"reduce_every_backward": True, "overlap": False},
}


def loss_of(model: nn.Module, step: int) -> Tensor:
    """On data that differ by rank and micro-batch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean()


def averaged(grads: list[Tensor | None]) -> list[Tensor | None]:
    """The average over ranks, added in rank order; None where no rank has a gradient."""
    size = dist.get_world_size()
    sizes = torch.tensor([0 if grad is None else grad.numel() + 1 for grad in grads])
    all_sizes = [torch.empty_like(sizes) for _ in range(size)]
    dist.all_gather(all_sizes, sizes)
    largest = torch.stack(all_sizes).amax(0).tolist()  # one more than elements, so that empty ones count
    shapes = [None if grad is None else (grad.shape, grad.dtype) for grad in grads]
    if any(n and shape is None for n, shape in zip(largest, shapes, strict=True)):
        known: list[Any] = [None] * size
        dist.all_gather_object(known, shapes)
        shapes = [next((s for s in column if s is not None), None) for column in zip(*known, strict=True)]
    elif not torch.stack(all_sizes).eq(sizes).all():
        dist.all_gather_object([None] * size, shapes)  # the others need it
    flat = torch.cat(
        [
            torch.zeros(n - 1) if grad is None else grad.float().reshape(-1)
            for n, grad in zip(largest, grads, strict=True)
            if n
        ]
    )
    columns = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(columns, flat)
    total = torch.zeros_like(flat)
    for column in columns:
        total += column
    total /= size
    result: list[Tensor | None] = []
    place = 0
    for n, known_as, grad in zip(largest, shapes, grads, strict=True):
        if known_as is None or not n:
            result.append(None)
            continue
        shape, dtype = known_as
        average = total[place : place + n - 1].view(shape).to(dtype)
        # torch's fused kernel takes for granted that a gradient has its parameter's strides.
        result.append(average if grad is None else torch.empty_like(grad).copy_(average))
        place += n - 1
    return result


def average_gradients(model: nn.Module) -> None:
    """Give the parameters of ``model`` the average over ranks of their gradients."""
    params = list(model.parameters())
    for param, average in zip(params, averaged([param.grad for param in params]), strict=True):
        param.grad = average


def attach(optimizer: DistAdamW, model: nn.Module, *, aside: bool = True, **options: Any) -> None:
    """On a CPU DDP's reducer stands aside where it can; elsewhere, or with ``aside=False``, it does not."""
    before = ddp._ASIDE
    ddp._ASIDE = before if aside else frozenset()
    try:
        optimizer.attach(model, **options)
    finally:
        ddp._ASIDE = before


class Job:
    """A model trained by DistAdamW, and a twin trained by torch.optim.AdamW that is fed the same averages."""

    def __init__(
        self,
        way: dict[str, Any],
        options: dict[str, Any] | None = None,
        model: Any = None,
        loss: Callable[[nn.Module, int], Tensor] = loss_of,
        unused: bool = True,
        bucket_numel: int = 1000,
        ddp_bucket_mb: float | None = None,
    ) -> None:
        way, self.loss = dict(way), loss
        self.model: Any = Network() if model is None else model
        self.twin = copy.deepcopy(self.model)
        self.wrapped: Any = self.model
        if way.pop("ddp", False):
            self.wrapped = DistributedDataParallel(
                self.model,
                find_unused_parameters=unused,
                gradient_as_bucket_view=way.pop("view", True),
                bucket_cap_mb=ddp_bucket_mb,
            )
        options = options or {}
        self.optimizer = DistAdamW(self.model.parameters(), lr=1e-2, bucket_numel=bucket_numel, **options)
        theirs = {k: v for k, v in options.items() if k in ("eps", "amsgrad", "maximize")}
        self.reference = torch.optim.AdamW(self.twin.parameters(), lr=1e-2, fused=True, **theirs)
        self.every = way.get("reduce_every_backward", False)
        attach(self.optimizer, self.wrapped, **way)

    def train(self, steps: range, accumulation: int = 1) -> None:
        for step in steps:
            self.accumulate(step, accumulation)
            self.update()

    def accumulate(self, step: int, accumulation: int) -> None:
        for micro in range(accumulation):
            last = micro == accumulation - 1
            no_sync = getattr(self.wrapped, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if last else no_sync():
                self.loss(self.wrapped, 10 * step + micro).backward()
            self.twin_backward(10 * step + micro, last=last)

    def twin_backward(self, seed: int, *, last: bool) -> None:
        """Into the shard, every micro-batch is averaged; else their sum is."""
        params = list(self.twin.parameters())
        if self.every:
            kept = [p.grad for p in params]
            for p in params:
                p.grad = None
            self.loss(self.twin, seed).backward()
            for p, before, now in zip(params, kept, averaged([p.grad for p in params]), strict=True):
                p.grad = now if before is None else before if now is None else before + now
            return
        self.loss(self.twin, seed).backward()
        if last:
            average_gradients(self.twin)

    def update(self) -> None:
        self.optimizer.step()
        self.reference.step()
        self.optimizer.zero_grad()
        self.reference.zero_grad()

    def check(self, **tolerance: Any) -> None:
        """Same bits, or within ``tolerance``."""
        for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            if tolerance:
                torch.testing.assert_close(p, q, **tolerance)
            assert tolerance or torch.equal(p, q), f"{name} differs by {(p - q).abs().max()}"


@contextlib.contextmanager
def constants(module: Any, **values: Any) -> Iterator[None]:
    """Other sizes than the ones that pay, so that a small model takes every path."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def check_same_bits(way: dict[str, Any], accumulation: int, options: dict[str, Any], sizes: dict[str, Any]) -> None:
    with constants(gloo, **sizes):
        job = Job(way, options)
        job.train(range(8), accumulation)
        job.check()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("world_size", "eps"), [(1, 0.1), (2, 0.1), (2, 1e-8), (3, 0.1)])
def test_same_bits_as_unsharded_adamw_fed_the_averages(world_size: int, eps: float, way: str) -> None:
    run_ranks(world_size, check_same_bits, WAYS[way], 2, {"eps": eps}, {})


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_same_bits_on_four_ranks(way: str) -> None:
    run_ranks(4, check_same_bits, WAYS[way], 2, {"eps": 0.1}, {})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_large_runs_travel_from_where_they_lie(world_size: int, way: str) -> None:
    run_ranks(world_size, check_same_bits, WAYS[way], 1, {"eps": 0.1}, {"DIRECT_NUMEL": 100, "BLOCK_NUMEL": 96})


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_backends_own_collectives(world_size: int, way: str) -> None:
    """Use the transport of backends other than gloo. With more than 2 ranks the order of a sum is the backend's."""
    run_ranks(world_size, check_native, WAYS[way])


def check_native(way: dict[str, Any]) -> None:
    with constants(transport, sends_from_host=lambda *_: False):
        job = Job(way, {"eps": 0.1})
        job.train(range(8), 2)
    if dist.get_world_size() == 2:
        job.check()
    else:
        job.check(rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- DDP's reducer


class _Normed(nn.Module):
    """With buffers, and a forward that can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("three")
        return self.out(self.norm(x))


def check_gradients_in_other_memory(way: dict[str, Any]) -> None:
    job = Job(way, {"eps": 0.1})
    job.train(range(3))
    for step in range(3, 7):
        job.accumulate(step, 1)
        for param in job.model.parameters():
            if param.grad is not None:
                param.grad.data = torch.full_like(param.grad, 3.0)
        job.optimizer.zero_grad(set_to_none=step % 2 == 0)
        job.reference.zero_grad(set_to_none=step % 2 == 0)
        job.train(range(10 + step, 11 + step))
    job.check()


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "ddp, buckets, no overlap", "ddp, buckets, own buffers"])
def test_memory_of_a_gradient_that_was_replaced_and_set_to_zero(way: str) -> None:
    """DDP's reducer would otherwise send its bucket, which backward no longer writes to."""
    run_ranks(2, check_gradients_in_other_memory, WAYS[way])


def check_reducer_aside() -> None:
    torch.manual_seed(0)
    model = _Normed()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = DistAdamW(model.parameters())
    optimizer.attach(wrapped)
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    with pytest.raises(ValueError, match="three"):
        wrapped(torch.randn(3, 6))
    assert wrapped.require_backward_grad_sync
    for _ in range(2):
        with wrapped.no_sync():
            wrapped(torch.randn(4, 6, generator=generator)).sum().backward()
            assert not wrapped.require_backward_grad_sync
        wrapped(torch.randn(4, 6, generator=generator)).sum().backward()
        assert wrapped.require_backward_grad_sync
        optimizer.step()
        optimizer.zero_grad()
    # What DDP does at the first forward pass after a synchronised one: rank 0's buffers for all.
    assert model.norm.running_mean is not None
    before = model.norm.running_mean.clone()
    wrapped(torch.zeros(4, 6))
    means = [torch.empty(6) for _ in range(dist.get_world_size())]
    dist.all_gather(means, before)
    assert not torch.equal(means[0], means[1])
    dist.all_gather(means, model.norm.running_mean)
    assert torch.equal(means[0], means[1])


def test_ddp_keeps_its_word_while_its_reducer_stands_aside() -> None:
    run_ranks(2, check_reducer_aside)


def check_join(aside: bool) -> None:
    model = nn.Linear(2, 2)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = DistAdamW(model.parameters())
    attach(optimizer, wrapped, aside=aside)
    with pytest.raises(RuntimeError, match=r"join\(\) is not supported after"), wrapped.join():
        wrapped(torch.ones(1, 2))


@pytest.mark.parametrize("aside", [True, False])
def test_join_is_refused(aside: bool) -> None:
    run_ranks(2, check_join, aside)


def check_reducer_woken(view: bool) -> None:
    """accelerator.trigger_sync_in_backward does this. Without views DDP's reducer is not disabled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 50), nn.Linear(50, 3))
    job = Job({"ddp": True, "view": view}, {"eps": 0.1}, model=model, unused=False)
    for step in range(4):
        with job.wrapped.no_sync():
            loss = job.loss(job.wrapped, 10 * step)
        job.wrapped.reducer.prepare_for_backward([])
        loss.backward()
        job.twin_backward(10 * step, last=True)
        job.update()
    job.check()


@pytest.mark.parametrize("view", [True, False])
def test_a_reducer_that_is_woken_averages_nothing_twice(view: bool) -> None:
    run_ranks(2, check_reducer_woken, view)


def check_gradient_penalty(way: dict[str, Any]) -> None:
    """torch.autograd.grad reaches no parameter: nothing is sent before the backward pass that does."""

    def penalised(model: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(4, 6, generator=generator, requires_grad=True)
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + slope.square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2, bias=False))
    job = Job(way, {"eps": 0.1}, model=model, loss=penalised, unused=False)
    job.train(range(4))
    job.check()


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_a_gradient_penalty(way: str) -> None:
    run_ranks(2, check_gradient_penalty, WAYS[way])


def check_zero_gradients_at_lr_zero(attached: bool, options: dict[str, Any]) -> None:
    """A head of zeros: at the first update all that some rank owns has a gradient of zeros, and lr is 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2, bias=False))
    nn.init.zeros_(model.get_parameter("2.weight"))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = DistAdamW(model.parameters(), lr=1e-2, **options)
    if attached:
        optimizer.attach(wrapped)
    scheduler = CyclicLRWithRestarts(optimizer, 8, 80, restart_period=2, warmup_samples=32)
    for step in range(3):
        wrapped(torch.full((4, 6), 1.0 + step + dist.get_rank())).sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert (optimizer.updates, scheduler.samples) == (3, 24)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
@pytest.mark.parametrize("attached", [True, False])
def test_gradients_of_zeros_on_one_rank_are_an_update(attached: bool, options: dict[str, Any]) -> None:
    run_ranks(2, check_zero_gradients_at_lr_zero, attached, options)


# ---------------------------------------------------------------- loops


def check_several_backwards(way: dict[str, Any], *, eval_between: bool) -> None:
    """Accumulating without no_sync, as DDP allows: each backward synchronises."""
    job = Job(way, {"eps": 0.1})
    for step in range(6):
        for micro in range(3):
            loss_of(job.wrapped, 10 * step + micro).backward()
            job.twin_backward(10 * step + micro, last=micro == 2)
            if eval_between:
                with torch.no_grad():
                    loss_of(job.wrapped, 5)
        job.update()
    # One rounding for each backward, not one for their sum.
    job.check(rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eval_between", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_several_backwards_without_no_sync_add_up(way: str, eval_between: bool) -> None:
    for world_size in (2, 3):
        run_ranks(world_size, functools.partial(check_several_backwards, WAYS[way], eval_between=eval_between))


def check_forward_between_backward_and_step() -> None:
    """A training-mode forward before step(), say for a log, must not spoil the averages."""
    job = Job({"ddp": True}, {"eps": 0.1})
    for step in range(4):
        job.accumulate(step, 1)
        loss_of(job.wrapped, 7)
        job.update()
    job.check(rtol=1e-5, atol=1e-7)


def test_a_forward_between_backward_and_step_changes_nothing() -> None:
    for world_size in (2, 3):
        run_ranks(world_size, check_forward_between_backward_and_step)


def check_forward_on_one_rank() -> None:
    job = Job({}, {"eps": 0.1})
    for step in range(4):
        job.accumulate(step, 1)
        if dist.get_rank() == 0:
            job.model(torch.randn(1, 3, 8, 8))
        job.update()
    job.check(rtol=1e-5, atol=1e-7)


def test_a_forward_on_one_rank_before_step_changes_nothing() -> None:
    for world_size in (2, 3):
        run_ranks(world_size, check_forward_on_one_rank)


def check_kept_gradients(way: dict[str, Any]) -> None:
    """Without zero_grad gradients add up over updates, as in torch; a second step() takes them again."""
    job = Job(way, {"eps": 0.1})
    total: list[Any] = [None] * len(list(job.twin.parameters()))
    for step in range(4):
        loss_of(job.wrapped, step).backward()
        for p in job.twin.parameters():
            p.grad = None
        loss_of(job.twin, step).backward()
        for i, average in enumerate(averaged([p.grad for p in job.twin.parameters()])):
            total[i] = average if total[i] is None else total[i] + average
        for p, grad in zip(job.twin.parameters(), total, strict=True):
            p.grad = grad
        for _ in range(1 + step % 2):
            job.optimizer.step()
            job.reference.step()
    job.check(rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("every")])
def test_gradients_that_nobody_zeroes_add_up(way: str) -> None:
    for world_size in (2, 3):
        run_ranks(world_size, check_kept_gradients, WAYS[way])


def check_new_storage(way: dict[str, Any]) -> None:
    job = Job(way, {"eps": 0.1})
    job.train(range(2))
    for p in job.model.parameters():
        p.data = p.data.clone()
    job.train(range(2, 4), 2)
    job.optimizer.load_state_dict(copy.deepcopy(job.optimizer._share_state_dict()))
    job.train(range(4, 6), 2)
    job.check()


@pytest.mark.parametrize("way", WAYS)
def test_new_storage_and_loaded_state_in_mid_run(way: str) -> None:
    run_ranks(2, check_new_storage, WAYS[way])


def check_discarded(way: dict[str, Any]) -> None:
    """Dropped gradients are gone, whichever code dropped them."""
    job = Job(way, {"eps": 0.1})
    for step in range(4):
        for thrower in (job.optimizer, job.model):
            loss_of(job.wrapped, 500 + step).backward()
            if not (job.every and thrower is job.model):  # then the averages are the optimizer's
                thrower.zero_grad()
            else:
                job.optimizer.zero_grad()
        job.accumulate(step, 2)
        job.update()
    job.check()


@pytest.mark.parametrize("way", WAYS)
def test_discarded_gradients_are_forgotten(way: str) -> None:
    run_ranks(2, check_discarded, WAYS[way])


def check_sent_during_backward(way: dict[str, Any]) -> tuple[int, int]:
    """Buckets sent until backward was over, and by the update."""
    sent: list[int] = []
    start = SharedMemoryTransport.start_reduce

    def counted(self: Any, k: int, parts: Any) -> Any:
        sent.append(k)
        return start(self, k, parts)

    SharedMemoryTransport.start_reduce = counted  # type: ignore[method-assign]
    try:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(300, 300) for _ in range(8)])
        way = dict(way)
        wrapped: Any = DistributedDataParallel(model, gradient_as_bucket_view=True) if way.pop("ddp", 0) else model
        optimizer = DistAdamW(model.parameters(), bucket_numel=100_000)
        attach(optimizer, wrapped, **way)
        inside = 0
        for _ in range(3):
            sent.clear()
            loss = wrapped(torch.randn(2, 300)).sum()
            seen: list[int] = []
            handle = model.get_parameter("0.bias").register_hook(lambda _, seen=seen: seen.append(len(sent)))
            loss.backward()
            handle.remove()
            inside = seen[0]
            optimizer.step()
            optimizer.zero_grad()
    finally:
        SharedMemoryTransport.start_reduce = start  # type: ignore[method-assign]
    return inside, len(sent)


@pytest.mark.parametrize(
    ("way", "overlaps"),
    [
        ("ddp", True),
        ("plain", True),
        ("every backward", True),
        ("plain, no overlap", False),
        ("every backward, no overlap", False),
    ],
)
def test_buckets_are_sent_while_backward_goes_on(way: str, overlaps: bool) -> None:
    for inside, total in run_ranks(2, check_sent_during_backward, WAYS[way]):
        assert total == 8  # 722,400 elements in buckets of 100,000
        assert inside >= 5 if overlaps else inside == 0


def check_sent_without_messages(way: dict[str, Any]) -> tuple[int, int]:
    """Disable announcements between ranks, as over NCCL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankMessages, "open", lambda self, groups, tag, device: None)
        return check_sent_during_backward(way)


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_buckets_are_sent_during_backward_also_where_ranks_send_no_messages(way: str) -> None:
    for inside, total in run_ranks(2, check_sent_without_messages, WAYS[way]):
        assert total == 8
        assert inside >= (1 if "buckets" in way else 5)  # DDP's own are larger


def check_gradients_are_let_go() -> None:
    job = Job(WAYS["every backward"])
    job.accumulate(0, 2)
    assert all(p.grad is None for p in job.model.parameters())
    job.update()


def test_every_backward_lets_go_of_the_gradients() -> None:
    run_ranks(2, check_gradients_are_let_go)


READERS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    "a reference held before": lambda model, held: [p.detach().clone() for p in held],
    "data": lambda model, held: [p.data.clone() for p in held],
    "an address": lambda model, held: [(p.data_ptr(), p.detach().clone()) for p in held],
    "state_dict": lambda model, held: {k: v.clone() for k, v in model.state_dict().items()},
    "deepcopy": lambda model, held: list(copy.deepcopy(model).parameters()),
    "pickle": lambda model, held: list(pickle.loads(pickle.dumps(held))),
    "several at once": lambda model, held: torch.cat([p.reshape(-1) for p in reversed(held)]),
    "foreach": lambda model, held: torch._foreach_mul(held[::-1], 1.0),
    "evaluation": lambda model, held: model.eval()(torch.ones(1, 3, 8, 8)).clone(),
    "what is written over": lambda model, held: [p.mul_(1.0).clone() for p in held],
}


def check_readers(way: dict[str, Any], name: str) -> int:
    """A reader sees what it sees where step() waits, to the bit."""
    jobs = [Job({**way, "defer_gather": defer}, {"eps": 0.1}) for defer in (True, False)]
    held = [list(job.model.parameters()) for job in jobs]
    under_way = 0
    for step in range(4):
        seen = []
        for job, params in zip(jobs, held, strict=True):
            job.accumulate(step, 1)
            job.optimizer.step()
            if job is jobs[0]:
                under_way += len(job.optimizer._pending.buckets)
            job.optimizer.zero_grad()
            with torch.no_grad():
                seen.append(READERS[name](job.model, params))
            assert all(type(p) is nn.Parameter for p in params) or name == "evaluation"
            job.model.train()
            job.twin.zero_grad()
        for a, b in zip(*(flattened(x) for x in seen), strict=True):
            assert torch.equal(a, b)
    return under_way


def flattened(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values.detach()]
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else []
    return [tensor for item in items for tensor in flattened(item)]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_nobody_reads_an_old_value_while_parameters_travel(way: str, reader: str) -> None:
    for under_way in run_ranks(2, check_readers, WAYS[way], reader):
        assert under_way > 0  # something was travelling when it was read


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_deferred_gathers_leave_the_same_bits(way: str) -> None:
    run_ranks(3, check_same_bits, {**WAYS[way], "defer_gather": True}, 2, {"eps": 0.1}, {"DIRECT_NUMEL": 100})


def check_deferred_and_compiled() -> None:
    model = nn.Linear(30, 30)
    optimizer = DistAdamW(model.parameters(), bucket_numel=300)
    compiled: Any = torch.compile(model, backend="eager")
    optimizer.attach(compiled, defer_gather=True)
    model.weight.grad = torch.ones_like(model.weight)
    model.bias.grad = torch.ones_like(model.bias)
    optimizer.step()
    assert type(model.weight) is nn.Parameter
    assert not optimizer._pending.buckets


def test_compiled_modules_get_their_parameters_at_once() -> None:
    """Another class of parameters would cause a recompilation."""
    run_ranks(2, check_deferred_and_compiled)


def check_clock(way: dict[str, Any]) -> list[int]:
    job = Job(way, {"max_grad_norm": 1.0})
    scheduler = CyclicLRWithRestarts(job.optimizer, 8, 100, restart_period=2)
    clock = []
    for step in range(4):
        job.accumulate(step, 2)
        if step == 2:  # inf on one rank's own element, which every rank must learn of
            loss_of(job.wrapped, 99).mul(math.inf if dist.get_rank() == 1 else 1.0).backward()
        job.optimizer.step()
        scheduler.step()
        job.optimizer.zero_grad()
        job.optimizer.step()  # without gradients: not an update
        scheduler.step()
        clock.append(scheduler.samples)
    return [*clock, job.optimizer.updates]


@pytest.mark.parametrize("way", WAYS)
def test_the_clock_counts_applied_updates(way: str) -> None:
    assert run_ranks(2, check_clock, WAYS[way]) == [[8, 16, 16, 24, 3]] * 2


# ---------------------------------------------------------------- what is in a model


class Branches(nn.Module):
    """Which branches are used depends on rank and step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.branches = nn.ModuleList(nn.Linear(9, 9) for _ in range(5))
        self.never = nn.Linear(3, 3)
        self.always = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        which = int(x.abs().sum() * 1000)
        for i, branch in enumerate(self.branches):
            if which >> i & 1:
                x = branch(x).tanh() + x
        return x


def check_unused(way: dict[str, Any], bucket_numel: int) -> None:
    job = Job(way, {"eps": 0.1}, model=Branches(), loss=branch_loss, bucket_numel=bucket_numel)
    for step in range(30):
        job.accumulate(step, 1)
        job.update()
    job.check()
    assert all("exp_avg" not in job.reference.state[p] for p in job.twin.get_submodule("never").parameters())


def branch_loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return model(torch.randn(2, 9, generator=generator)).square().mean()


@pytest.mark.parametrize("bucket_numel", [1000, 100])  # everything together, or branches apart
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_unused_on_some_ranks(world_size: int, way: str, bucket_numel: int) -> None:
    run_ranks(world_size, check_unused, WAYS[way], bucket_numel)


def check_unfreezing(way: dict[str, Any]) -> None:
    """Frozen layers that thaw, and a group that is added, after updates have been made."""
    job = Job(way, {"eps": 0.1})
    job.model.hidden.requires_grad_(False)
    job.twin.hidden.requires_grad_(False)
    extra = [nn.Parameter(torch.ones(33)) for _ in range(2)]
    job.train(range(3))
    job.model.hidden.requires_grad_(True)
    job.twin.hidden.requires_grad_(True)
    job.train(range(3, 6), 2)
    for model, optimizer, param in zip((job.model, job.twin), (job.optimizer, job.reference), extra, strict=True):
        model.scale2 = param
        optimizer.add_param_group({"params": [param], "lr": 0.1})
        model.forward = functools.partial(_with_extra, model)
    job.train(range(6, 9), 2)
    # What thawed has no hook yet, so its micro-batches are added up before they are averaged.
    job.check(**({"rtol": 1e-5, "atol": 1e-7} if job.every else {}))


def _with_extra(model: Any, x: Tensor) -> Tensor:
    return type(model).forward(model, x) * model.scale2.mean()


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("ddp")])
def test_unfreezing_and_added_groups(way: str) -> None:
    """DDP itself does not follow parameters that are unfrozen or added later."""
    run_ranks(2, check_unfreezing, WAYS[way])


class Kinds(nn.Module):
    """Tied, scalar, empty and bf16 parameters, in two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.bf16 = nn.Parameter(torch.randn(50).bfloat16())
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)).tanh() * self.scalar).sum() + (self.bf16.float() * x.mean()).sum()


def kinds_loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    loss = model(torch.randn(2, 16, generator=generator))
    return loss + model.get_parameter("empty").sum()


def check_kinds(way: dict[str, Any]) -> None:
    job = Job(way, {"eps": 0.1}, model=Kinds(), loss=kinds_loss)
    job.train(range(10), 2)
    job.check()


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("ddp")])
@pytest.mark.parametrize("world_size", [2, 3])
def test_tied_scalar_empty_and_bf16_parameters(world_size: int, way: str) -> None:
    run_ranks(world_size, check_kinds, WAYS[way])


def check_more_ranks_than_elements() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    twin = copy.deepcopy(model)
    optimizer, reference = DistAdamW(model.parameters(), lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    optimizer.attach(model)
    for step in range(4):
        x = torch.tensor([[float(dist.get_rank() + step)]])
        model(x).square().mean().backward()
        twin(x).square().mean().backward()
        average_gradients(twin)
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-7)


def test_more_ranks_than_elements() -> None:
    run_ranks(4, check_more_ranks_than_elements)


# ---------------------------------------------------------------- company


def check_two_optimizers(ddp: bool) -> None:
    """Two of ours and one of torch's share a model; two more models are trained beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 4))
    twin = copy.deepcopy(model)
    wrapped: Any = DistributedDataParallel(model, gradient_as_bucket_view=True) if ddp else model

    def optimizers(m: Any, kind: Any) -> list[Any]:
        made = [kind(m[0].parameters(), lr=0.01), kind(m[2].parameters(), lr=0.02)]
        return [*made, torch.optim.SGD(m[4].parameters(), lr=0.1)] if ddp else made

    ours, theirs = optimizers(model, DistAdamW), optimizers(twin, functools.partial(torch.optim.AdamW, fused=True))
    for optimizer in ours[:2]:
        optimizer.attach(wrapped)
    for step in range(5):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(3, 8, generator=generator)
        wrapped(x).square().mean().backward()
        twin(x).square().mean().backward()
        average_gradients(twin)
        for optimizer in (*ours, *theirs):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) or (not ddp and p.shape[0] == 4)


@pytest.mark.parametrize("ddp", [True, False])
def test_several_optimizers_share_a_model(ddp: bool) -> None:
    run_ranks(2, check_two_optimizers, ddp)


def check_neighbours() -> None:
    """Closures, an EMA copy of the model, gradient checkpointing and torch.compile."""
    job = Job({}, {"eps": 0.1})
    ema = torch.optim.swa_utils.AveragedModel(job.model)
    for step in range(3):

        def closure(step: int = step) -> float:
            job.optimizer.zero_grad()
            job.accumulate(step, 1)
            return 1.5

        assert job.optimizer.step(closure) == 1.5
        job.reference.step()
        job.reference.zero_grad()
        ema.update_parameters(job.model)
        ema.module(torch.randn(4, 3, 8, 8)).sum().backward()  # a copy is nobody's business
        job.check()


def test_closures_and_copies_of_the_model() -> None:
    run_ranks(2, check_neighbours)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
        return x


def checkpointed_loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return model(torch.randn(2, 40, generator=generator).requires_grad_()).square().mean()


def check_checkpointed(way: dict[str, Any], reentrant: bool) -> None:
    job = Job(way, {"eps": 0.1}, model=Checkpointed(reentrant=reentrant), loss=checkpointed_loss, unused=False)
    job.train(range(5), 2)
    job.check()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_gradient_checkpointing(way: str, reentrant: bool) -> None:
    run_ranks(2, check_checkpointed, WAYS[way], reentrant)


def check_compiled(way: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    twin, way = copy.deepcopy(model), dict(way)
    compiled: Any = torch.compile(model, backend="aot_eager")
    if way.pop("ddp", False):
        compiled = DistributedDataParallel(compiled, gradient_as_bucket_view=True)
    optimizer = DistAdamW(model.parameters(), lr=0.01)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, fused=True)
    attach(optimizer, compiled, **way)
    for step in range(4):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(3, 12, generator=generator)
        compiled(x).square().mean().backward()
        twin(x).square().mean().backward()
        average_gradients(twin)
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # a compiled pass may round otherwise


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "every backward"])
def test_compiled_modules(way: str) -> None:
    run_ranks(2, check_compiled, WAYS[way])


# ---------------------------------------------------------------- topologies


def check_replicated(way: dict[str, Any]) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    job = Job(way, {"eps": 0.1, "mesh": mesh, "max_grad_norm": math.inf})
    job.train(range(10), 2)
    job.check(rtol=1e-5, atol=1e-7)  # two pairs are added, not four in a row
    assert job.optimizer.grad_norm is not None
    return job.optimizer.state_bytes, sum(p.numel() for p in job.model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_sharded_in_a_node_and_replicated_across(way: str) -> None:
    for nbytes, numel in run_ranks(4, check_replicated, WAYS[way]):
        assert numel * 4 <= nbytes <= numel * 4 + 8 * (31 * 9 + 32) + 40  # half of two moments, padding, steps


# ---------------------------------------------------------------- clipping


def check_clipped(way: dict[str, Any], norm_type: float, by_hand: bool) -> list[float]:
    options: dict[str, Any] = {"eps": 0.1}
    job = Job(way, options if by_hand else {**options, "max_grad_norm": 0.05})
    norms = []
    for step in range(8):
        job.accumulate(step, 2)
        expected = torch.nn.utils.clip_grad_norm_(job.twin.parameters(), 0.05, norm_type)
        if by_hand:
            norm = job.optimizer.clip_grad_norm_(0.05, norm_type)
            torch.testing.assert_close(norm, expected)
        job.update()
        if not by_hand:
            torch.testing.assert_close(job.optimizer.grad_norm, expected)
        norms.append(float(expected))
    job.check(rtol=1e-5, atol=1e-7)  # the norm is summed in another order
    return norms


@pytest.mark.parametrize(("norm_type", "by_hand"), [(2.0, False), (2.0, True), (math.inf, True), (3.0, True)])
@pytest.mark.parametrize("way", WAYS)
def test_clipping_is_by_the_global_norm(way: str, norm_type: float, by_hand: bool) -> None:
    for world_size in (2, 3):
        norms = run_ranks(world_size, check_clipped, WAYS[way], norm_type, by_hand)[0]
        assert max(norms) > 0.05  # so something was clipped


def check_touched(way: dict[str, Any]) -> None:
    job = Job(way)
    job.accumulate(0, 1)
    torch.nn.utils.clip_grad_norm_(job.model.parameters(), 0.001)
    before = [p.detach().clone() for p in job.model.parameters()]
    try:
        job.optimizer.step()
    finally:
        assert all(torch.equal(p, q) for p, q in zip(job.model.parameters(), before, strict=True))


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("every")])
def test_gradients_changed_by_hand_are_refused(way: str) -> None:
    for error in expect_error_on_all(2, check_touched, WAYS[way]):
        assert error.startswith("RuntimeError: gradients were changed")
        assert "clip_grad_norm_" in error


# ---------------------------------------------------------------- refusals


def check_second_backward_of_one_forward() -> None:
    job = Job({})
    loss = loss_of(job.wrapped, 0)
    loss.backward(retain_graph=True)
    loss.backward()


def test_a_second_backward_of_one_forward_is_named() -> None:
    for error in expect_error_on_all(2, check_second_backward_of_one_forward):
        assert re.search(r"shape \(.*arrived after", error)
        assert "no_sync()" in error


def attach_what_cannot_be(case: str) -> None:
    model = nn.Linear(4, 4)
    if case == "every backward":
        DistAdamW(model.parameters()).attach(DistributedDataParallel(model), reduce_every_backward=True)
    elif case == "unsharded":
        DistAdamW(model.parameters(), shard=False).attach(model)
    elif case == "other options":
        optimizer = DistAdamW(model.parameters())
        optimizer.attach(model)
        optimizer.attach(nn.Linear(2, 2), overlap=False)
    elif case == "other ranks":
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("node", "local"))
        DistAdamW(model.parameters(), mesh=mesh["local"]).attach(
            DistributedDataParallel(
                model, process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True)
            )
        )
    elif case == "both":
        optimizer = DistAdamW([*model.parameters(), *(other := nn.Linear(2, 2)).parameters()])
        optimizer.attach(model)
        optimizer.attach(DistributedDataParallel(other))
    elif case == "ranks differ":
        DistAdamW(nn.Linear(4, 4 + dist.get_rank()).parameters()).attach(model)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("every backward", "reduce_every_backward=True.*without DistributedDataParallel"),
        ("unsharded", r"attach\(\) needs sharded"),
        ("other options", r"attach\(\).*other options"),
        ("other ranks", r"averages over ranks .*over \[0, 1\].*state"),
        ("both", "DistributedDataParallel.* and to a plain"),
        ("ranks differ", "rank 1 disagrees with rank 0: parameters of group 0"),
    ],
)
def test_what_cannot_be_attached_is_refused(case: str, words: str) -> None:
    for error in expect_error_on_all(2, attach_what_cannot_be, case):
        assert re.search(words, error)
