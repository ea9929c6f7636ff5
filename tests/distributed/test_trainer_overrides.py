"""Trainer subclasses and arguments that shape optimizer or schedule: honoured, or refused with one sentence."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare_trainer, wrappers
from tests.distributed.test_trainer import BATCH, DECAY, EPOCH, EPOCHS, EPS, LR, Network, Noting, Samples, arguments_on
from tests.known import unwrap
from tests.ranks import run_ranks

FITS: dict[str, Any] = {"restart_period": EPOCHS, "t_mult": 1, "min_lr": 1e-5}  # training ends with a cycle
ENGINES = {1: "single", 2: "DDP"}


def layers(model: Any) -> list[dict[str, Any]]:
    """Layer-wise learning rates, as scripts for fine-tuning make them."""
    first, last = model.body[0], model.body[3]
    rest = [*model.body[1].parameters()]
    return [
        {"params": list(first.parameters()), "lr": LR / 4},
        {"params": [*rest, *last.parameters()], "lr": LR, "weight_decay": 0.0},
    ]


class LayerWise(Noting):
    """The whole method overridden."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(layers(self.model), lr=LR, weight_decay=DECAY, eps=EPS)
        return self.optimizer


class LayerWiseByClass(Noting):
    """An override as in LLaVA's trainer and others: their own groups, Trainer's class and arguments."""

    # Without model=, as older scripts have it.
    def create_optimizer(self) -> Optimizer:  # type: ignore[override]
        if self.optimizer is None:
            made, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = made(layers(self.model), **kwargs)
        return self.optimizer


class Sharded(Noting):
    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = DistAdamW(layers(self.model), lr=LR, weight_decay=DECAY, eps=EPS)
        return self.optimizer


class Extended(Noting):
    """Calls the method it overrides, and adds to it."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        optimizer = super().create_optimizer()
        optimizer.param_groups[0]["lr"] = LR / 4
        return optimizer


class ByKwargs(Noting):
    """An override as in sentence-transformers: groups through get_optimizer_cls_and_kwargs."""

    # Trainer's is static, and scripts override it so.
    def get_optimizer_cls_and_kwargs(  # type: ignore[override]
        self, args: Any, model: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        made, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return made, {**kwargs, "optimizer_dict": layers(self.model), "foreach": False}


class Momentum(Noting):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        return torch.optim.SGD, {"lr": LR, "momentum": 0.9}


class OwnSchedule(Noting):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = CyclicLRWithRestarts(wrappers.unwrap(optimizer), **FITS)
        return self.lr_scheduler


class NeverCalled(Noting):
    """An override that Trainer's own messages advise, and that transformers 5 does not call."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        raise AssertionError("called")


class Cosine(Noting):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_training_steps)
        return self.lr_scheduler


def made(
    kind: type[Noting], folder: str, ranks: int, prepared: dict[str, Any] | None = None, **options: Any
) -> tuple[Noting, list[str]]:
    """A Trainer that has trained; what dist_adamw has warned of."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with arguments_on(ENGINES[ranks], folder, **options) as args, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        trainer = kind(Network(), args, train_dataset=Samples())
        own = kind in (OwnSchedule, Cosine)
        prepare_trainer(trainer, **{"scheduler": None if own else FITS, **(prepared or {})})
        trainer.train()
    return trainer, [str(one.message) for one in caught if "override" in str(one.message)]


HONOURED: list[tuple[type[Noting], dict[str, Any], type[Optimizer], bool]] = [
    (LayerWise, {}, torch.optim.AdamW, True),
    (LayerWiseByClass, {"optimizer": {"decay_by": "schedule"}}, DistAdamW, False),
    (Sharded, {}, DistAdamW, False),
    (Extended, {"optimizer": {"decay_by": "schedule"}}, DistAdamW, False),
    (ByKwargs, {"optimizer": {"decay_by": "schedule"}}, DistAdamW, False),
    (Momentum, {}, torch.optim.SGD, True),
    (OwnSchedule, {}, DistAdamW, False),
    (NeverCalled, {}, DistAdamW, True),
]


def honoured(folder: str, ranks: int) -> list[list[float]]:
    weights: list[list[float]] = []
    for kind, prepared, optimizer, warned in HONOURED:
        trainer, messages = made(kind, folder, ranks, prepared)
        inner = wrappers.unwrap(trainer.optimizer)
        assert type(inner) is optimizer, kind
        assert bool(messages) == warned, (kind, messages)
        scheduler = trainer.lr_scheduler
        assert type(scheduler) is CyclicLRWithRestarts
        assert scheduler.optimizer is inner
        assert scheduler.samples == EPOCH * EPOCHS
        bases = [base.lr for base in scheduler._scheduled.bases()]
        layered = kind not in (Momentum, OwnSchedule, NeverCalled)
        assert bases == ([LR / 4, LR] if layered else [LR, LR]), kind
        if prepared:
            assert unwrap(inner).decay_by == "schedule"
        if ranks > 1 and isinstance(inner, DistAdamW):
            assert inner._path is not None, kind
        weights.append([p.detach().double().sum().item() for p in unwrap_model(trainer).parameters()])
    return weights


def unwrap_model(trainer: Any) -> nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model_wrapped)


def test_overrides_are_honoured(tmp_path: Path) -> None:
    found = {ranks: run_ranks(ranks, honoured, str(tmp_path), ranks)[0] for ranks in (1, 2)}
    layer_wise, by_class, sharded, *_ = found[1]
    assert sharded == layer_wise  # torch's AdamW and ours, the same groups and schedule: the same bits
    assert by_class != layer_wise  # decays by the schedule


REFUSED: list[tuple[type[Noting], dict[str, Any], dict[str, Any], str]] = [
    (Noting, {}, {"optim": "adafactor"}, r"optim='adafactor'.*optimizer_cls_and_kwargs"),
    (Noting, {}, {"optim_args": "a=1"}, r"optim_args='a=1'.*optimizer=\{\.\.\.\}"),
    (Noting, {}, {"optim_target_modules": ["body"]}, r"optim_target_modules=\['body'\]"),
    (Noting, {}, {"lr_scheduler_type": "cosine"}, r"lr_scheduler_type='cosine'.*scheduler=\{"),
    (Noting, {}, {"lr_scheduler_kwargs": {"num_cycles": 2}}, r"lr_scheduler_kwargs=\{'num_cycles': 2\}"),
    (Noting, {}, {"warmup_steps": 0.1}, "warmup_steps=0.1.*warmup_samples"),
    (Cosine, {"scheduler": FITS}, {}, "Cosine overrides create_scheduler.* scheduler="),
    (Noting, {"on_difference": "newer"}, {}, "on_difference must be .*'newer'"),
]
# Seen when the optimizer is made: train() raises before it trains.
REFUSED_BY_TRAIN: list[tuple[type[Noting], dict[str, Any], str]] = [
    (LayerWise, {"optimizer": {"decay_by": "schedule"}}, r"LayerWise's override made a AdamW .*decay_by"),
    (Sharded, {"optimizer": {"decay_by": "schedule"}}, r"Sharded's override made a DistAdamW .*decay_by"),
    (Momentum, {"optimizer": {"amsgrad": True}}, "Momentum's override made a SGD .*amsgrad"),
    (Cosine, {}, "CosineAnnealingLR .*CyclicLRWithRestarts"),
]


def refused(folder: str, ranks: int) -> None:
    for kind, prepared, options, message in REFUSED:
        AcceleratorState._reset_state(reset_partial_state=True)
        with arguments_on(ENGINES[ranks], folder, **options) as args:
            trainer = kind(Network(), args, train_dataset=Samples())
            with pytest.raises(ValueError, match="(?s)" + message):
                prepare_trainer(trainer, **prepared)
    for kind, prepared, message in REFUSED_BY_TRAIN:
        with pytest.raises(ValueError, match="(?s)" + message):
            made(kind, folder, ranks, prepared)


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    for ranks in (1, 2):
        run_ranks(ranks, refused, str(tmp_path), ranks)


def set_by_hand(folder: str) -> None:
    """After prepare_trainer: the optimizer is used, as Trainer does it; a scheduler must be ours."""
    for options, message in (({}, None), ({"decay_by": "schedule"}, "trainer.optimizer was set.* AdamW")):
        AcceleratorState._reset_state(reset_partial_state=True)
        with arguments_on("single", folder) as args:
            trainer = prepare_trainer(
                Noting(Network(), args, train_dataset=Samples()), scheduler=FITS, optimizer=options
            )
            trainer.optimizer = torch.optim.AdamW(layers(trainer.model), lr=LR)
            if message is not None:
                with pytest.raises(ValueError, match=message):
                    trainer.train()
                continue
            trainer.train()
            assert type(wrappers.unwrap(trainer.optimizer)) is torch.optim.AdamW
            assert trainer.lr_scheduler.samples == EPOCH * EPOCHS
    with arguments_on("single", folder) as args:
        with pytest.raises(ValueError, match="reproducible=True is not supported under Trainer"):
            prepare_trainer(
                Noting(Network(), args, train_dataset=Samples()), scheduler=FITS, optimizer={"reproducible": True}
            )
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler=FITS)
        with pytest.raises(ValueError, match=r"already called .*Trainer"):
            prepare_trainer(trainer, scheduler=FITS)
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, 5)
        with pytest.raises(ValueError, match=r"CosineAnnealingLR .*CyclicLRWithRestarts"):
            trainer.train()


def test_what_is_set_by_hand(tmp_path: Path) -> None:
    run_ranks(1, set_by_hand, str(tmp_path))


def searched(folder: str, ranks: int) -> list[tuple[float, int | None, int, bool]]:
    """A hyper-parameter search: new models and accelerators, arguments that change after prepare_trainer."""
    found = []
    with arguments_on(ENGINES[ranks], folder) as args:
        trainer = Noting(None, args, train_dataset=Samples(), model_init=Network)
        prepare_trainer(trainer, scheduler=FITS)
        for lr, batch in ((LR, 8), (LR / 8, 4)):
            trainer.args.learning_rate = lr
            trainer.args.per_device_train_batch_size = trainer._train_batch_size = batch // ranks
            trainer.create_accelerator_and_postprocess()  # as the search does for every trial
            trainer.train()
            scheduler, is_attached = trainer.lr_scheduler, unwrap(trainer.optimizer)._path is not None
            found.append((scheduler._scheduled.bases()[0].lr, scheduler.batch_size, scheduler.samples, is_attached))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_search_changes_the_arguments(ranks: int, tmp_path: Path) -> None:
    expected = [(LR, 8, EPOCH * EPOCHS, ranks == 2), (LR / 8, 4, EPOCH * EPOCHS, ranks == 2)]
    assert run_ranks(ranks, searched, str(tmp_path), ranks) == [expected] * ranks


def resumed(folder: str, engine: str, on_difference: Any, period: float) -> tuple[float, float] | str:
    save: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}
    with arguments_on(engine, folder, **save) as args:
        trainer = Noting(Network(), args, train_dataset=Samples())
        prepare_trainer(trainer, scheduler={**FITS, "restart_period": period}, on_difference=on_difference)
        try:
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-8" if period != EPOCHS else None)
        except ValueError as error:
            return str(error)
        return trainer.notes.rows[0][1][0], trainer.notes.rows[-1][1][0]


@pytest.mark.parametrize("engine", ["single", "ZeRO-1"])
def test_on_difference(engine: str, tmp_path: Path) -> None:
    run = functools.partial(resumed, str(tmp_path), engine)
    ranks = 1 if engine == "single" else 2
    run_ranks(ranks, run, None, EPOCHS)
    (refusal,) = {*run_ranks(ranks, run, None, 1.5)}
    assert "restart_period was" in refusal
    (old,), (new,) = ({*run_ranks(ranks, run, choice, 1.5)} for choice in ("checkpoint", "new"))
    assert isinstance(old, tuple)
    assert isinstance(new, tuple)
    # Training goes on at sample 60, of a cycle of 132 or of 66.
    assert old[0] > LR / 2 > LR / 10 > new[0]


def warned(folder: str, period: float, options: dict[str, Any]) -> list[str]:
    AcceleratorState._reset_state(reset_partial_state=True)
    with arguments_on("single", folder, **options) as args, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        trainer = Noting(Network(), args, train_dataset=Samples())
        prepare_trainer(trainer, scheduler={"restart_period": period, "t_mult": 1})
    return [f"{Path(one.filename).name}: {one.message}" for one in caught if "training ends" in str(one.message)]


def warned_of(folder: str) -> list[list[str]]:
    cases: list[tuple[float, dict[str, Any]]] = [
        (3, {}),
        (1.25, {}),
        (3, {"max_steps": 9}),
        (2, {"max_steps": 12}),
        (1, {"num_train_epochs": 0.5}),
    ]
    return [warned(folder, period, options) for period, options in cases]


def test_training_that_ends_in_mid_cycle_is_warned_of(tmp_path: Path) -> None:
    fits, inside, steps, whole, half = run_ranks(1, warned_of, str(tmp_path))[0]
    assert fits == whole == []
    assert "restart_period=1 or restart_period=1.5 " in inside[0]
    assert inside[0].startswith("test_trainer_overrides.py")
    # 9 updates of 8 samples, of which the sixth has 4
    assert f"ends at sample {EPOCH + 3 * BATCH} " in steps[0]
    assert "ends at sample 22 " in half[0]
