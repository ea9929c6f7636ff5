"""Mistakes in the "params" of a DeepSpeed JSON: each is a sentence that names the section and the key."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_adamw import EMA, CyclicLRWithRestarts, DistAdamW, Mean
from dist_adamw.integrations.deepspeed.configuration import _optimizer_from_json, _scheduler_from_json


def optimizer_from(told: dict[str, Any]) -> DistAdamW:
    return _optimizer_from_json([torch.nn.Parameter(torch.ones(3))], **told)


def scheduler_from(told: dict[str, Any]) -> CyclicLRWithRestarts:
    return _scheduler_from_json(optimizer_from({}), **{"batch_size": 10, "epoch_size": 100, **told})


MAKE = {"optimizer": optimizer_from, "scheduler": scheduler_from}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('{"lr": 3}', "lr", 3.0),
        ('{"lr": "1e-3"}', "lr", 1e-3),  # as PyYAML reads 1e-3
        ('{"betas": [0.8, 0]}', "betas", (0.8, 0.0)),
        ('{"amsgrad": true}', "amsgrad", True),
    ],
)
def test_what_an_optimizer_section_says_is_taken(text: str, name: str, value: Any) -> None:
    assert optimizer_from(json.loads(text)).param_groups[0][name] == value


def test_averages_are_taken_from_an_optimizer_section() -> None:
    made = optimizer_from(json.loads('{"averages": {"ema": {"decay": 0.9}, "last": {"last": 3, "every": "1 epoch"}}}'))
    assert made.averages == {"ema": EMA(decay=0.9), "last": Mean(last=3, every="1 epoch")}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('{"restart_period": 2}', "restart_period", 2),
        ('{"restart_period": "1/3"}', "restart_period", "1/3"),
        ('{"min_restart_period": null}', "min_restart_period", None),
        ('{"restart_period": "7 updates"}', "restart_period", "7 updates"),
        ('{"cycle_ends": ["1 epoch", 300]}', "cycle_ends", ["1 epoch", 300]),
        ('{"peak_factor": [1, 0.5]}', "peak_factor", [1.0, 0.5]),
        ('{"policy": "wsd", "decay_length": "20%"}', "decay_length", "20%"),
        ('{"policy": "triangular2"}', "policy", "triangular2"),
        ('{"lr_scaling": "sqrt"}', "lr_scaling", "sqrt"),
        ('{"normalize_weight_decay": "auto"}', "normalize_weight_decay", "auto"),
        ('{"batch_size": "auto"}', "epoch_size", 100),
    ],
)
def test_what_a_scheduler_section_says_is_taken(text: str, name: str, value: Any) -> None:
    assert scheduler_from(json.loads(text)).configuration()[name] == value


@pytest.mark.parametrize(
    ("section", "text", "message"),
    [
        # misspelt, of another optimizer or scheduler, or no option at all
        ("optimizer", '{"weight_decy": 1}', "no 'weight_decy' ... did you mean 'weight_decay'?"),
        ("optimizer", '{"torch_adam": true}', "no 'torch_adam' ... lr, betas, eps"),
        ("optimizer", '{"self": 1}', "no 'self'"),
        ("optimizer", '{"defaults": {}}', "no 'defaults'"),
        ("optimizer", '{"lr.x": 1}', "no 'lr.x' ... did you mean 'lr'?"),
        ("scheduler", '{"restart_perod": 1}', "no 'restart_perod' ... did you mean 'restart_period'?"),
        ("scheduler", '{"total_num_steps": 9}', "no 'total_num_steps'"),
        # another type
        ("optimizer", '{"lr": null}', "lr=None ... number"),
        ("optimizer", '{"lr": true}', "lr=True ... number"),
        ("optimizer", '{"betas": [0.9]}', "betas=[0.9] ... 2 numbers"),
        ("optimizer", '{"betas": ["a", 0]}', "betas=['a', 0] ... 2 numbers"),
        ("optimizer", '{"amsgrad": 1}', "amsgrad=1 ... true or false"),
        ("optimizer", '{"bucket_numel": 1.5}', "bucket_numel=1.5 ... whole number"),
        (
            "scheduler",
            '{"restart_period": [1]}',
            "restart_period=[1] ... number",
        ),
        ("scheduler", '{"batch_size": 1.5}', "batch_size=1.5 ... whole number"),
        ("scheduler", '{"batch_size": {"micro_batch_size": 2}}', "batch_size ... 'micro_batch_size'"),
        ("scheduler", '{"policy": 3}', "policy=3 ... text"),
        ("scheduler", '{"stream": "maybe"}', "stream='maybe' ... true or false"),
        # text for a number
        ("optimizer", '{"lr": "fast"}', "lr='fast' ... number"),
        ("optimizer", '{"eps": ""}', "eps='' ... number"),
        ("scheduler", '{"warmup_samples": "ten"}', "warmup_samples ... number above 0, got 'ten'"),
        ("scheduler", '{"restart_period": "long"}', "restart_period ... finite ... 'long'"),
        ("scheduler", '{"cycle_ends": "3 epochs"}', "cycle_ends='3 epochs' ... a list"),
        ("scheduler", '{"peak_factor": ["x"]}', "peak_factor=['x'] ... a number or a list"),
        # out of range
        ("optimizer", '{"lr": -1}', "{'lr': -1}: Invalid learning rate: -1.0"),
        ("optimizer", '{"lr": NaN}', "{'lr': nan}: Invalid learning rate: nan"),
        ("optimizer", '{"weight_decay": -0.1}', "{'weight_decay': -0.1}: Invalid weight_decay value: -0.1"),
        ("optimizer", '{"betas": [2, 0.9]}', "{'betas': [2, 0.9]}: Invalid beta ... 2.0"),
        ("optimizer", '{"bucket_numel": 0}', "bucket_numel ... got 0"),
        ("optimizer", '{"eps": 1' + "0" * 400 + "}", "is wrong ... a number"),
        ("scheduler", '{"gamma": 2}', "gamma ... (0, 1] ... 2.0"),
        ("scheduler", '{"min_lr": 5}', "min_lr ... 0.001, got 5.0"),
        ("scheduler", '{"epoch_size": 0}', "epoch_size ... whole number ... got 0"),
        ("scheduler", '{"weight_decay_exponent": -1e308}', "weight_decay_exponent ... [0, 10] ... -1e+308"),
        # no such choice
        ("optimizer", '{"decay_by": "cycle"}', "decay_by='cycle' ... 'lr'"),
        ("optimizer", '{"shard": "some"}', "shard ... 'some'"),
        ("scheduler", '{"policy": "cosin"}', "unknown policy 'cosin' ... cosine"),
        (
            "scheduler",
            '{"lr_scaling": "cubic"}',
            "lr_scaling='cubic' ... 'sqrt'",
        ),
        # "auto" that was never resolved
        ("optimizer", '{"lr": "auto"}', "lr='auto' ... never resolved"),
        ("optimizer", '{"weight_decay": "auto"}', "weight_decay='auto' ... never resolved"),
        ("scheduler", '{"t_mult": "auto"}', "t_mult='auto' ... never resolved"),
        # what JSON cannot say, or DeepSpeed says
        ("optimizer", '{"params": []}', "params=[] ... passes the parameters"),
        ("optimizer", '{"mesh": null}', "mesh=None ... DeepSpeed shards state"),
        (
            "optimizer",
            '{"master_dtype": "float32"}',
            "master_dtype='float32' ... keeps fp32 weights",
        ),
        ("optimizer", '{"state_dtype": null}', "state_dtype=None ... state in fp32"),
        (
            "optimizer",
            '{"max_grad_norm": 1}',
            'max_grad_norm=1 ... "gradient_clipping"',
        ),
        ("scheduler", '{"optimizer": 1}', "optimizer=1 ... passes the optimizer"),
        ("scheduler", '{"policy_fn": "math.cos"}', "policy_fn='math.cos' ... a function"),
        (
            "scheduler",
            '{"eta_on_restart_cb": null}',
            "eta_on_restart_cb=None ... a function",
        ),
        (
            "scheduler",
            '{"eta_on_iteration_cb": {}}',
            "eta_on_iteration_cb={} ... a function",
        ),
    ],
)
def test_a_mistake_is_a_sentence_that_names_it(section: str, text: str, message: str) -> None:
    told = json.loads(text)
    with pytest.raises(ValueError, match=rf"^DeepSpeed configuration, {section}\.params") as raised:
        MAKE[section](told)
    assert all(part in str(raised.value) for part in message.split(" ... "))
    assert next(iter(told)) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "shape", ["{}", "{}.Thing", '{{"class_path": "{}.Thing"}}', '{{"class_path": "{}.Thing", "x": 1}}']
)
@pytest.mark.parametrize(
    ("section", "key"), [("optimizer", "lr"), ("scheduler", "batch_size"), ("scheduler", "policy")]
)
def test_an_import_path_is_not_imported(
    section: str, key: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "would_do_harm.py").write_text("Thing = float\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = shape.format("would_do_harm")
    value = json.loads(path) if path.startswith("{") else path
    with pytest.raises(ValueError, match=rf"DeepSpeed configuration, {section}\.params"):
        MAKE[section]({key: value})
    assert "would_do_harm" not in sys.modules


KEYS = [
    *optimizer_from({}).defaults,
    *scheduler_from({})._scheduled.recipe.options,
    "shard",
    "mesh",
    "fused",
    "batch_size",
    "epoch_size",
]
KEYS += ["min_lr", "stream", "verbose", "lr_scaling", "normalize_weight_decay", "params", "optimizer", "master_dtype"]
# Half-precision floats: an exact schedule of t_mult=0.999999999 would have billions of cycles before its floor.
NUMBERS = st.integers(-10, 1000) | st.floats(width=16) | st.sampled_from([10**400, -(10**400), 1e300, math.inf])
SCALARS = (
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["auto", "1e-3", "1/2", "1/0", "lr", "sqrt", "os.system"])
)
VALUES = st.recursive(
    SCALARS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(MAKE)), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=3))
def test_any_dictionary_builds_or_is_refused_in_words(section: str, told: dict[str, Any]) -> None:
    refusal = None
    try:
        MAKE[section](told)
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith(f"DeepSpeed configuration, {section}.params")
