"""`prepare` with any objects, in one process: order, what belongs together, what is not clear."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader, TensorDataset

import dist_adamw
from dist_adamw import CyclicLRWithRestarts, DistAdamW
from dist_adamw.integrations.accelerate.objects import find_roles

Objects = list[Any]
step_lr = functools.partial(StepLR, step_size=1)
restarts = functools.partial(CyclicLRWithRestarts, restart_period=1)


def loader(size: int = 4, *, shuffle: bool = False, length: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(length, 3)), size, shuffle=shuffle)


def trained(
    make: Callable[..., Optimizer] = DistAdamW, schedule: Callable[..., LRScheduler] = restarts
) -> tuple[nn.Module, Optimizer, Any]:
    model = nn.Linear(3, 1)
    optimizer = make(model.parameters(), lr=1e-2)
    return model, optimizer, schedule(optimizer)


def prepare(*objects: Any, **options: Any) -> tuple[Any, ...]:
    return dist_adamw.prepare(Accelerator(cpu=True), *objects, **options)


def update(model: nn.Module, optimizer: Optimizer, scheduler: Any, batch: Any) -> None:
    model(batch[0]).square().mean().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- what passes through, and the order


def test_an_evaluation_loader_is_prepared_as_accelerate_does() -> None:
    model, optimizer, scheduler = trained()
    prepared = prepare(model, optimizer, loader(4), loader(2, length=7), scheduler)
    assert [type(one) for one in prepared] == [
        *(nn.Linear, AcceleratedOptimizer, DataLoaderShard, DataLoaderShard, CyclicLRWithRestarts)
    ]
    assert (scheduler.batch_size, scheduler.epoch_size) == (4, 16)  # the first loader's
    *_, train, evaluation, _ = prepared
    for batch in train:
        update(prepared[0], prepared[1], scheduler, batch)
        with torch.no_grad():
            assert [len(x) for (x,) in evaluation] == [2, 2, 2, 1]
    assert scheduler.samples == 16  # evaluation does not count
    assert dist_adamw.position(train).epoch == 1
    with pytest.raises(ValueError, match="not known"):
        dist_adamw.position(evaluation)


def test_any_order_and_anything_else() -> None:
    model, optimizer, scheduler = trained()
    teacher, criterion, config = nn.Linear(3, 1).requires_grad_(False), nn.MSELoss(), {"width": 3}
    train, *evaluation = loader(4, shuffle=True), loader(2), loader(8)
    given = [train, None, scheduler, teacher, *evaluation, optimizer, config, model, criterion]
    prepared = prepare(*given)
    assert len(prepared) == len(given)
    assert [prepared[i] for i in (1, 2, 3, 7, 8, 9)] == [None, scheduler, teacher, config, model, criterion]
    assert [one.total_batch_size for one in (prepared[0], *prepared[4:6])] == [4, 2, 8]
    assert scheduler.batch_size == 4
    assert prepared[6].optimizer is optimizer


def test_by_name_as_before() -> None:
    model, optimizer, scheduler = trained()
    prepared = prepare(scheduler=scheduler, model=model, dataloader=loader(), optimizer=optimizer)
    assert prepared[0] is model
    assert prepared[3] is scheduler


def test_a_scheduler_of_torchs() -> None:
    model, optimizer, scheduler = trained(schedule=step_lr)
    prepared = prepare(model, optimizer, loader(), loader(2), scheduler)
    assert isinstance(prepared[4], AcceleratedScheduler)


# ---------------------------------------------------------------- several that are trained


@pytest.mark.parametrize("swapped", [False, True])
def test_a_gan_in_one_call(swapped: bool) -> None:
    generator, discriminator = trained(), trained()
    optimizers = [generator[1], discriminator[1]]
    given = [generator[0], discriminator[0], *reversed(optimizers), loader(), loader(2), generator[2], discriminator[2]]
    if swapped:
        given[-2:] = given[:-3:-1]
    roles = find_roles("NO", given)
    models = {id(given[one.scheduler]): given[one.model] for one in roles.trained}
    assert models == {id(generator[2]): generator[0], id(discriminator[2]): discriminator[0]}
    prepared = prepare(*given)
    assert [*prepared[:2]] == given[:2]
    assert [one.optimizer for one in prepared[2:4]] == given[2:4]
    for _, _, scheduler in (generator, discriminator):
        assert (scheduler.batch_size, scheduler.epoch_size) == (4, 16)


def test_each_has_its_own_clock_and_the_data_one_position() -> None:
    """The generator is updated at every second batch; it has half the samples, and nothing comes twice."""
    one, two = trained(), trained()
    *_, batches, generator_lr, critic_lr = prepared = prepare(one[0], two[0], one[1], two[1], loader(2), one[2], two[2])
    seen = []
    for number, batch in enumerate(batches, 1):
        update(prepared[1], prepared[3], critic_lr, batch)
        if number % 2 == 0:
            update(prepared[0], prepared[2], generator_lr, batch)
        seen.append(dist_adamw.position(batches).state_dict())
    assert (generator_lr.samples, critic_lr.samples) == (8, 16)
    assert [(state["epoch"], state["samples"]) for state in seen if state] == [(0, 2 * i) for i in range(1, 8)] + [
        (1, 0)
    ]


def test_a_batch_that_is_accumulated_for_all_comes_again() -> None:
    one, two = trained(), trained()
    *_, batches, _, _ = prepared = prepare(one[0], two[0], one[1], two[1], loader(2), one[2], two[2])
    batch = next(batches_of := iter(batches))
    for model in prepared[:2]:
        model(batch[0]).mean().backward()
    assert dist_adamw.position(batches).state_dict()["samples"] == 0  # type: ignore[index]
    for optimizer in prepared[2:4]:
        optimizer.step()
    assert dist_adamw.position(batches).state_dict()["samples"] == 2  # type: ignore[index]
    batches_of.close()


@pytest.mark.parametrize("later", [False, True])
def test_a_batch_that_is_accumulated_for_one_and_updated_another_is_not_saved(later: bool, tmp_path: Path) -> None:
    one, two = trained(), trained()
    accelerator = Accelerator(cpu=True)
    given = one[0], two[0], one[1], two[1], loader(2), one[2], two[2]
    *_, batches, _, _ = prepared = dist_adamw.prepare(accelerator, *given)
    batches_of = iter(batches)
    for updates_critic in (not later, later):
        batch = next(batches_of)
        if updates_critic:
            update(prepared[1], prepared[3], two[2], batch)
        prepared[0](batch[0]).mean().backward()
    message = (
        r"optimizer 1 of 2 \(DistAdamW\) has accumulated .* that optimizer 2 of 2 .*Save after the step\(\) of opt"
    )
    with pytest.raises(ValueError, match=message):
        accelerator.save_state(str(tmp_path / "state"))
    assert not (tmp_path / "state").exists()
    if later:
        prepared[2].zero_grad()
    else:
        prepared[2].step()
    accelerator.save_state(str(tmp_path / "state"))
    assert dist_adamw.position(batches).state_dict()["samples"] == 4  # type: ignore[index]
    batches_of.close()


@pytest.mark.parametrize("reloads", [False, True])
def test_two_calls_that_share_a_loader_share_its_position(reloads: bool, tmp_path: Path) -> None:
    def job() -> tuple[Accelerator, Any, Callable[[Any], None]]:
        torch.manual_seed(1)
        accelerator, one, two = Accelerator(cpu=True), trained(), trained()
        generator = dist_adamw.prepare(accelerator, one[0], one[1], loader(2, shuffle=True), one[2])
        critic = dist_adamw.prepare(accelerator, two[0], two[1], generator[2], two[2])
        assert critic[2] is generator[2]

        def train(batch: Any) -> None:
            update(critic[0], critic[1], critic[3], batch)
            update(generator[0], generator[1], generator[3], batch)

        return accelerator, critic[2], train

    accelerator, batches, train = job()
    seen, now = [], []
    for _ in range(2):
        for batch in batches:
            train(batch)
            seen.append(batch[0])
            if len(seen) == 11:
                accelerator.save_state(str(tmp_path / "state"))
    if not reloads:
        accelerator, batches, train = job()
    accelerator.load_state(str(tmp_path / "state"))
    assert (dist_adamw.position(batches).epoch, dist_adamw.position(batches).samples) == (1, 6)
    for batch in dist_adamw.rest_of_epoch(batches):
        train(batch)
        now.append(batch[0])
    assert torch.equal(torch.cat(now), torch.cat(seen[11:]))
    assert dist_adamw.position(batches).epoch == 2


def test_another_phase_on_the_same_loader_begins_at_its_first_sample() -> None:
    accelerator, (model, optimizer, scheduler) = Accelerator(cpu=True), trained()
    model, optimizer, batches, scheduler = dist_adamw.prepare(accelerator, model, optimizer, loader(), scheduler)
    for batch in batches:
        update(model, optimizer, scheduler, batch)
    model(batch[0]).mean().backward()  # never used
    second = DistAdamW(model.parameters())
    model, optimizer, batches, scheduler = dist_adamw.prepare(accelerator, model, second, batches, restarts(second))
    optimizer.zero_grad()
    assert dist_adamw.position(batches).epoch == 0
    for number, batch in enumerate(dist_adamw.rest_of_epoch(batches), 1):
        update(model, optimizer, scheduler, batch)
        assert dist_adamw.position(batches).samples == 4 * number


def test_a_batch_schedule_that_a_load_brings_for_one_of_two_is_refused() -> None:
    accelerator, first, second = Accelerator(cpu=True), trained(), trained()
    dist_adamw.prepare(accelerator, first[0], second[0], first[1], second[1], loader(), first[2], second[2])
    theirs = trained()[1]
    saved = CyclicLRWithRestarts(theirs, {0: 4, 8: 8}, 16, restart_period=1).state_dict()
    for scheduler in (first[2], second[2]):
        with pytest.raises(ValueError, match=r"batch_size \{0: 4, 8: 8\} is a schedule, which would change .* of all"):
            scheduler.load_state_dict(saved, on_difference="checkpoint")
        with pytest.raises(ValueError, match=r"batch_size \{0: 4, 8: 8\} is a schedule"):
            scheduler.batch_size = {0: 4, 8: 8}


def test_two_optimizers_of_one_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    ours, theirs = DistAdamW(model[0].parameters()), SGD(model[1].parameters(), lr=0.1)
    schedulers = restarts(ours), step_lr(theirs)
    prepared = prepare(model, ours, theirs, loader(), *schedulers)
    assert prepared[0] is model
    assert prepared[4] is schedulers[0]
    assert isinstance(prepared[5], AcceleratedScheduler)


def test_torchs_optimizer_may_have_no_scheduler() -> None:
    (model, optimizer, scheduler), other = trained(), nn.Linear(3, 1)
    prepared = prepare(model, other, optimizer, SGD(other.parameters(), lr=0.1), loader(), scheduler)
    assert isinstance(prepared[3], AcceleratedOptimizer)


def test_a_part_of_the_model_may_be_passed_too() -> None:
    model, optimizer, scheduler = trained()
    whole = nn.Sequential(model, nn.ReLU())
    places = [
        find_roles("NO", [*pair, optimizer, loader(), scheduler]).trained[0].model for pair in ([whole, nn.ReLU()],)
    ]
    assert places == [0]
    optimizer.add_param_group({"params": (last := nn.Linear(1, 1)).parameters()})
    whole.append(last)
    assert find_roles("NO", [model, whole, optimizer, loader(), scheduler]).trained[0].model == 1


# ---------------------------------------------------------------- what is not clear


def batch_schedules() -> Objects:
    (model, optimizer, _), other = trained(), trained()
    scheduler = CyclicLRWithRestarts(optimizer, {0: 4, 8: 8}, restart_period=1)
    return [model, other[0], optimizer, other[1], loader(), scheduler, other[2]]


def one_for_two() -> Objects:
    models = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = DistAdamW([p for model in models for p in model.parameters()])
    return [*models, optimizer, loader(), restarts(optimizer)]


def two_for_one() -> Objects:
    model, optimizer, scheduler = trained()
    return [model, optimizer, loader(), scheduler, step_lr(optimizer)]


def unscheduled() -> Objects:
    one, two = trained(), trained()
    return [one[0], two[0], one[1], two[1], loader(), one[2]]


def of_another() -> Objects:
    one, two = trained(), trained()
    return [one[0], two[0], one[1], two[1], loader(), one[2], trained()[2]]


def without_a_model() -> Objects:
    one = trained()
    return [nn.Linear(3, 1), nn.Linear(3, 1), one[1], loader(), one[2]]


def shared() -> Objects:
    one = trained()
    return [one[0], nn.Sequential(one[0]), one[1], loader(), one[2]]


def prepared_already() -> Objects:
    model, optimizer, scheduler = trained()
    return [model, optimizer, loader(), AcceleratedScheduler(scheduler, optimizer)]


def evaluation_first() -> Objects:
    model, optimizer, scheduler = trained()
    return [model, optimizer, loader(2), loader(shuffle=True), scheduler]


def without(*kinds: type) -> Objects:
    model, optimizer, scheduler = trained()
    given = [model, optimizer, loader(), scheduler]
    return [None if isinstance(one, kinds) else one for one in given]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (
            lambda: without(nn.Module),
            r"model is missing: pass prepare a torch module, got NoneType, DistAdamW, DataLoader",
        ),
        (lambda: without(Optimizer), r"optimizer is missing: pass prepare a DistAdamW or"),
        (lambda: without(DataLoader), r"data loader is missing: pass prepare a torch DataLoader"),
        (lambda: [*without(DataLoader), [torch.ones(1)]], r"torch DataLoader, got list\."),
        (lambda: without(LRScheduler), r"scheduler is missing: .*not prepared yet, got Linear, DistAdamW"),
        (
            prepared_already,
            "got AcceleratedScheduler",
        ),
        (one_for_two, r"DistAdamW \(object 3\) trains Linear \(object 1\) and Linear \(object 2\).*nn\.ModuleDict"),
        (
            two_for_one,
            r"CyclicLRWithRestarts \(object 4\) and StepLR \(object 5\) drive the same DistAdamW \(object 2\)",
        ),
        (unscheduled, r"no scheduler drives the DistAdamW \(object 4\).*LambdaLR"),
        (of_another, r"CyclicLRWithRestarts \(object 7\) drives another DistAdamW"),
        (without_a_model, r"DistAdamW \(object 3\) has no parameter of any of the 2 models"),
        (shared, r"in both Linear \(object 1\) and Sequential \(object 2\)"),
        (batch_schedules, r"batch-size schedule of CyclicLRWithRestarts \(object 6\).*all 2 optimizers"),
        (
            evaluation_first,
            r"DataLoader \(object 3\) does not shuffle, and DataLoader \(object 4\) does\. Pass the training loader",
        ),
    ],
)
def test_what_is_not_clear_is_refused(objects: Callable[[], Objects], message: str) -> None:
    accelerator, given = Accelerator(cpu=True), objects()
    with pytest.raises(ValueError, match=message) as raised:
        dist_adamw.prepare(accelerator, *given)
    assert "\n" not in str(raised.value)
    assert accelerator._models == accelerator._optimizers == accelerator._dataloaders == []
    assert [one for one in given if isinstance(one, CyclicLRWithRestarts) and one.epoch_size is not None] == []


@pytest.mark.parametrize(("engine", "cure"), [("FSDP", "Call prepare for each"), ("DEEPSPEED", "Use DDP")])
def test_engines_that_take_one_model(engine: str, cure: str) -> None:
    one, two = trained(), trained()
    given = [one[0], two[0], one[1], two[1], loader(), one[2], two[2]]
    with pytest.raises(ValueError, match=rf"one model at a time under {engine}, got 2\. {cure}"):
        find_roles(engine, given)
