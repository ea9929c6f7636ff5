"""Parameters are laid out in the order in which their gradients arrive on the first rank, from the first update on."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import operator
import pickle
import random
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW, load, save
from dist_adamw.optimizer.gradients import gradients_for_update, sources
from dist_adamw.optimizer.transport.shared_memory import SharedMemoryTransport
from tests.distributed.test_attach import WAYS, Job, attach, average_gradients
from tests.ranks import run_ranks

WIDTH, LAYERS = 24, 24
LAYER_NUMEL = WIDTH * WIDTH + WIDTH
REGISTERED: dict[str, Callable[[list[int]], object]] = {
    "as used": lambda places: None,
    "in the opposite order": lambda places: places.reverse(),
    "in any order": random.Random(0).shuffle,
}
GROUPS = ["one", "decay, no decay", "no decay, decay", "layer-wise"]


class Layers(nn.Module):
    """Layers that are registered in another order than they are used in."""

    def __init__(self, registered: str = "in the opposite order", layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        places = list(range(layers))
        REGISTERED[registered](places)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in places)
        self.used = [self.parts[place] for place in places]
        self.left_out: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        for n, part in enumerate(self.used):
            if n not in self.left_out:
                x = x + part(x).tanh()
        return x


def groups_of(model: nn.Module, kind: str) -> list[dict[str, Any]]:
    params = list(model.parameters())
    decay = {"params": [param for param in params if param.ndim > 1], "weight_decay": 0.1}
    no_decay = {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0}
    if kind == "layer-wise":
        return [{"params": [param], "lr": 1e-2 / (n + 1)} for n, param in enumerate(params)]
    both = {"decay, no decay": [decay, no_decay], "no decay, decay": [no_decay, decay]}
    return both.get(kind, [{"params": params}])


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return model(torch.randn(4, WIDTH, generator=generator)).square().mean()


def layers_in_layout(optimizer: DistAdamW, model: Layers) -> list[int]:
    """Return the layers by number of use, in the order of the layout."""
    number = {id(param): n for n, part in enumerate(model.used) for param in part.parameters()}
    params = [param for shard in optimizer.shards for param in shard.params]
    return list(dict.fromkeys(number[id(param)] for param in params if id(param) in number))


AS_USED = list(range(LAYERS))


class Link:
    """Counts the elements that have been sent."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.numel = 0
        start = SharedMemoryTransport.start_reduce

        def counted(transport: Any, k: int, parts: Sequence[Tensor]) -> Any:
            self.numel += sum(part.numel() for part in parts)
            return start(transport, k, parts)

        patch.setattr(SharedMemoryTransport, "start_reduce", counted)
        patch.setattr(sources, "_LOOK_EVERY", 1)


def shares_sent(registered: str, kind: str, way: dict[str, Any]) -> list[float]:
    """Return for each update the share of elements that were sent before the last gradient had arrived."""
    with pytest.MonkeyPatch.context() as patch:
        link = Link(patch)
        model, way = Layers(registered), dict(way)
        wrapped: Any = DistributedDataParallel(model, gradient_as_bucket_view=True) if way.pop("ddp", 0) else model
        optimizer = DistAdamW(groups_of(model, kind), bucket_numel=LAYER_NUMEL)
        attach(optimizer, wrapped, **way)
        sent_by: list[int] = []
        for param in model.parameters():
            param.register_hook(lambda _: sent_by.append(link.numel))
        shares = []
        for step in range(3):
            link.numel = 0
            loss_of(wrapped, step).backward()
            shares.append(sent_by[-1] / link.numel)
            optimizer.step()
            optimizer.zero_grad()
        return shares


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("registered", REGISTERED)
def test_nearly_all_is_sent_before_the_last_gradient_has_arrived(registered: str, kind: str) -> None:
    for _, *others in run_ranks(2, shares_sent, registered, kind, {}):
        assert min(others) >= 0.9


@pytest.mark.parametrize("way", ["ddp", "every backward"])
def test_nearly_all_is_sent_before_the_last_gradient_has_arrived_each_way(way: str) -> None:
    for _, *others in run_ranks(2, shares_sent, "in the opposite order", "decay, no decay", WAYS[way]):
        assert min(others) >= 0.9


# ---------------------------------------------------------------- nothing else changes


def job_of(way: dict[str, Any], options: dict[str, Any] | None = None) -> Job:
    options = {"eps": 0.1, **(options or {})}
    bucket_mb = 4 * LAYER_NUMEL / 2**20
    return Job(way, options, Layers(), loss_of, unused=False, bucket_numel=LAYER_NUMEL, ddp_bucket_mb=bucket_mb)


def check_bits(way: dict[str, Any], accumulation: int) -> list[list[int]]:
    job = job_of(way)
    orders = []
    for step in range(4):
        job.train(range(step, step + 1), accumulation)
        job.check()
        orders.append(layers_in_layout(job.optimizer, job.model))
    return orders


@pytest.mark.parametrize(
    ("way", "accumulation"), [*((way, 2) for way in WAYS), ("plain", 1), ("ddp, buckets", 1), ("every backward", 1)]
)
def test_the_bits_stay(way: str, accumulation: int) -> None:
    """The first pass of two is one inside of no_sync."""
    for first, second, *others in run_ranks(2, check_bits, WAYS[way], accumulation):
        # DDP's own buckets have the order of the modules in the first pass, whatever order gradients arrive in.
        assert (first == AS_USED) == ("buckets" not in way)
        assert all(order == AS_USED for order in (second, *others)) or "own buffers" in way


def check_no_whole_gradients() -> list[int]:
    def refuse(*_: object) -> None:
        raise AssertionError("whole gradients")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients_for_update, "zeros_for", refuse)
        return check_bits(WAYS["every backward"], 2)[0]


def test_averages_in_the_shard_move_without_whole_gradients() -> None:
    assert run_ranks(2, check_no_whole_gradients) == [AS_USED] * 2


def check_replicated(way: dict[str, Any]) -> list[int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    job = job_of(way, {"mesh": mesh, "max_grad_norm": math.inf})
    job.train(range(3), 2)
    job.check(rtol=1e-6, atol=1e-6)  # sums over replicas come in another order
    return layers_in_layout(job.optimizer, job.model)


@pytest.mark.parametrize("way", ["ddp", "every backward"])
def test_replicas_take_the_order_of_the_first_rank_of_all(way: str) -> None:
    assert run_ranks(4, check_replicated, WAYS[way]) == [AS_USED] * 4


def check_state(way: dict[str, Any]) -> None:
    """``state`` and ``param_groups`` are those of torch, and tensors that the script holds follow."""
    job = job_of(way, {"max_grad_norm": math.inf})
    groups = [*job.optimizer.param_groups]
    params = [*groups[0]["params"]]
    loss_of(job.wrapped, 0).backward()  # lays out state, in the order of the modules
    job.twin_backward(0, last=True)
    held = [dict(job.optimizer.state[param]) for param in params]
    before = [entry["exp_avg"].shape for entry in held]
    memory = weakref.ref(job.optimizer.shards[0].moments["exp_avg"])
    job.update()
    assert memory() is None, "the state is there twice until the next backward pass"
    job.train(range(1, 3))
    assert layers_in_layout(job.optimizer, job.model) == AS_USED
    assert all(map(operator.is_, groups, job.optimizer.param_groups))
    assert all(map(operator.is_, params, job.optimizer.param_groups[0]["params"]))
    assert before != [entry["exp_avg"].shape for entry in held]
    for param, entry in zip(params, held, strict=True):
        for key, value in job.optimizer.state[param].items():
            assert value is entry[key]
    with torch.no_grad():  # what the script writes there counts
        for entry in held:
            entry["exp_avg"].zero_()
        for entry in job.reference.state.values():
            entry["exp_avg"].zero_()
    job.train(range(3, 5))
    job.check()
    job.optimizer.consolidate_state_dict(to=None)
    mine, theirs = job.optimizer.state_dict(), job.reference.state_dict()
    for i, entry in theirs["state"].items():
        assert all(torch.equal(mine["state"][i][key], entry[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_state_that_the_script_holds_follows() -> None:
    run_ranks(2, check_state, WAYS["plain"])


def check_pickled() -> None:
    job = job_of({})
    job.train(range(2))
    model, optimizer = pickle.loads(pickle.dumps((job.model, job.optimizer)))
    assert layers_in_layout(optimizer, model) == AS_USED
    optimizer.attach(model)
    for step in range(2, 4):
        job.train(range(step, step + 1))
        loss_of(model, 10 * step).backward()
        optimizer.step()
        optimizer.zero_grad()
    job.check()
    assert all(map(torch.equal, model.parameters(), job.model.parameters()))


def test_a_pickle_keeps_the_order() -> None:
    run_ranks(2, check_pickled)


def trained(folder: str, *, stops: bool) -> list[Tensor]:
    """Train, clipped by a norm that is always too large; in one job, or in one job an update."""

    def begin() -> tuple[Layers, DistAdamW]:
        model = Layers()
        optimizer = DistAdamW(groups_of(model, "decay, no decay"), max_grad_norm=1e-3, bucket_numel=LAYER_NUMEL)
        optimizer.attach(model)
        return model, optimizer

    model, optimizer = begin()
    norms: list[Any] = []
    for step in range(6):
        if stops and step:
            save(folder, model, optimizer)
            model, optimizer = begin()
            load(folder, model, optimizer)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert layers_in_layout(optimizer, model) == AS_USED
        norms.append(optimizer.grad_norm)
    save(folder, model, optimizer)
    return [*norms, *(param.detach() for param in model.parameters())]


def loaded(folder: str) -> list[Tensor]:
    model = Layers()
    load(folder, model, DistAdamW(groups_of(model, "decay, no decay"), bucket_numel=LAYER_NUMEL))
    return [param.detach() for param in model.parameters()]


def test_a_job_that_stops_has_the_bits_of_one_that_does_not(tmp_path: Path) -> None:
    """The bits of the norm depend on the layout, so the first update of a resumed job must have the same one."""
    gone_on = run_ranks(2, functools.partial(trained, stops=False), str(tmp_path / "a"))
    stopped = run_ranks(2, functools.partial(trained, stops=True), str(tmp_path / "b"))
    assert all(map(torch.equal, gone_on[0], stopped[0]))
    assert all(map(torch.equal, gone_on[0][6:], run_ranks(3, loaded, str(tmp_path / "a"))[2]))


# ---------------------------------------------------------------- what users do in the first update


def _clip(job: Job) -> None:
    for optimizer in (job.optimizer, torch.nn.utils):
        norm = 1e9  # no factor, whose last bits depend on the order of the sum
        if optimizer is job.optimizer:
            job.optimizer.clip_grad_norm_(norm)
        else:
            torch.nn.utils.clip_grad_norm_(job.twin.parameters(), norm)


def _gather(job: Job) -> None:
    job.optimizer.gather_gradients()
    assert all(map(torch.equal, _grads(job.model), _grads(job.twin)))


def _grads(model: nn.Module) -> list[Tensor]:
    return [param.grad for param in model.parameters() if param.grad is not None]


def _clamp(job: Job) -> None:
    for model in (job.model, job.twin):
        for grad in _grads(model):
            grad.clamp_(-1e-3, 1e-3)
    job.optimizer.accept_gradients()


def _step_twice(job: Job) -> None:
    job.optimizer.step()
    job.reference.step()


def _keep(job: Job) -> None:
    """Add the next pass to the averages of the update before."""
    _step_twice(job)
    loss_of(job.wrapped, 77).backward()
    before = [grad.clone() for grad in _grads(job.twin)]
    for param in job.twin.parameters():
        param.grad = None
    loss_of(job.twin, 77).backward()
    average_gradients(job.twin)
    for grad, old in zip(_grads(job.twin), before, strict=True):
        grad.add_(old)


def _save_a_folder(job: Job) -> None:
    _step_twice(job)
    job.optimizer.follow()  # as a save does
    _gather(job)


USES: dict[str, Callable[[Job], object]] = {
    "clip": _clip,
    "gather": _gather,
    "clamp": _clamp,
    "step twice": _step_twice,
    "no zero_grad": _keep,
    "save, and read gradients": _save_a_folder,
}


def check_use(use: str, way: dict[str, Any]) -> None:
    job = job_of(way)
    for step in range(3):
        job.accumulate(step, 1)
        if step == 0:
            USES[use](job)
        job.update()
        job.check(**({"rtol": 1e-6, "atol": 1e-7} if use == "no zero_grad" else {}))
        assert layers_in_layout(job.optimizer, job.model) == AS_USED


@pytest.mark.parametrize("way", ["plain", "ddp"])
@pytest.mark.parametrize("use", USES)
def test_the_first_update_serves_every_script(use: str, way: str) -> None:
    run_ranks(2, check_use, use, WAYS[way])


class Branches(Layers):
    """Ranks go different ways in the first pass."""

    def forward(self, x: Tensor) -> Tensor:
        half = len(self.used) // 2
        firsts, lasts = self.used[:half], self.used[half:]
        for part in firsts + lasts if dist.get_rank() == 0 else lasts + firsts:
            x = x + part(x).tanh()
        return x


def check_branches() -> list[int]:
    job = Job({}, {"eps": 0.1}, model=Branches(), loss=loss_of, bucket_numel=LAYER_NUMEL)
    job.train(range(3))
    job.check()
    return layers_in_layout(job.optimizer, job.model)


def test_the_first_rank_decides() -> None:
    assert run_ranks(2, check_branches) == [AS_USED] * 2


def check_left_out(left_out: Sequence[int], way: dict[str, Any]) -> list[int]:
    """Some layers are not used in the first pass, and some are frozen in all."""
    model = Layers()
    model.used[5].requires_grad_(False)
    job = Job(way, {"eps": 0.1}, model=model, loss=loss_of, bucket_numel=LAYER_NUMEL)
    for step in range(4):
        job.model.left_out = job.twin.left_out = set(left_out) if step == 0 else set()
        job.train(range(step, step + 1))
        job.check()
    return layers_in_layout(job.optimizer, job.model)


@pytest.mark.parametrize("way", ["plain", "ddp", "every backward"])
def test_what_has_not_arrived_stays_beside_its_neighbour(way: str) -> None:
    # Registered behind layers 11 and 2, in the opposite order of use.
    expected = [n for n in AS_USED if n not in (1, 5, 10)]
    expected.insert(expected.index(11) + 1, 10)
    expected.insert(expected.index(2) + 1, 1)
    assert run_ranks(2, check_left_out, [1, 10], WAYS[way]) == [expected] * 2


def check_raises(raising: Sequence[int], way: dict[str, Any]) -> list[int]:
    """Some ranks raise in the middle of their first backward pass, catch it, and go on to the update."""
    model = Layers()
    optimizer = DistAdamW(model.parameters(), eps=0.1, bucket_numel=LAYER_NUMEL)
    wrapped: Any = model
    attach(optimizer, wrapped, **way)

    def fail(grad: Tensor) -> None:
        raise ArithmeticError("a loss that is not finite")

    weight = model.used[7].weight
    assert isinstance(weight, Tensor)
    handle = weight.register_hook(fail)
    if dist.get_rank() not in raising:
        handle.remove()
    with contextlib.suppress(ArithmeticError):
        loss_of(wrapped, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()
    for step in range(1, 3):
        loss_of(wrapped, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.updates == 3
    total = torch.cat([param.detach().view(-1) for param in model.parameters()])
    others = [torch.empty_like(total) for _ in range(2)]
    dist.all_gather(others, total)
    assert torch.equal(*others)
    return layers_in_layout(optimizer, model)


@pytest.mark.parametrize("way", ["plain", "every backward"])
@pytest.mark.parametrize("raising", [[0], [1], [0, 1]])
def test_a_rank_that_raises_in_its_first_pass(raising: list[int], way: str) -> None:
    first, second = run_ranks(2, check_raises, raising, WAYS[way])
    assert first == second
    assert (first == AS_USED) == (0 not in raising)


def check_two_optimizers(way: dict[str, Any]) -> None:
    """Each of two optimizers has a half of the model, as in a GAN; and a module is attached later."""
    model, later, way = Layers(), Layers(), dict(way)
    twins = copy.deepcopy((model, later))
    wrapped: Any = DistributedDataParallel(model, gradient_as_bucket_view=True) if way.pop("ddp", 0) else model
    params = [
        [*model.parts[: LAYERS // 2].parameters()],
        [*model.parts[LAYERS // 2 :].parameters(), *later.parameters()],
    ]
    optimizers = [DistAdamW(these, lr=1e-2, eps=0.1, bucket_numel=LAYER_NUMEL) for these in params]
    for optimizer in optimizers:
        attach(optimizer, wrapped, **way)
    reference = torch.optim.AdamW([*twins[0].parameters(), *twins[1].parameters()], lr=1e-2, eps=0.1, fused=True)
    is_later = False
    for step in range(5):
        if step == 2 and wrapped is model:
            attach(optimizers[1], later, **way)
            is_later = True
        for one, other in zip((wrapped, later)[: 1 + is_later], twins, strict=False):
            loss_of(one, step).backward()
            loss_of(other, step).backward()
            average_gradients(other)
        every: list[torch.optim.Optimizer] = [*optimizers, reference]
        for one_of in every:
            one_of.step()
            one_of.zero_grad()
    for one, other in zip((model, later), twins, strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))
    if wrapped is model:
        assert layers_in_layout(optimizers[0], model) == AS_USED[LAYERS // 2 :]
        assert layers_in_layout(optimizers[1], model) == AS_USED[: LAYERS // 2]
        assert layers_in_layout(optimizers[1], later) == AS_USED


@pytest.mark.parametrize("way", ["plain", "ddp", "every backward"])
def test_several_optimizers_over_one_model(way: str) -> None:
    run_ranks(2, check_two_optimizers, WAYS[way])


# ---------------------------------------------------------------- nothing to do


def check_stays() -> None:
    """Whatever of a bucket arrives first, nothing moves, and nothing is built again."""
    model = Layers("as used")
    swapped = model.parts[3], model.parts[4] = model.parts[4], model.parts[3]
    model.used[3], model.used[4] = swapped[1], swapped[0]
    optimizer = DistAdamW(groups_of(model, "decay, no decay"), bucket_numel=2 * LAYER_NUMEL)
    optimizer.attach(model)
    loss_of(model, 0).backward()
    before = optimizer.shards[0], [*optimizer.shards[0].params]
    for step in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model, step).backward()
    assert optimizer.shards[0] is before[0]


def test_a_model_that_is_registered_as_it_is_used_stays_as_it_is() -> None:
    run_ranks(2, check_stays)
