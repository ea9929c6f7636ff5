"""Recipe files: what they read, what they refuse, and that they build what the constructors build."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from torch import nn

from dist_adamw import EMA, CyclicLRWithRestarts, DistAdamW, TrainingRecipe, from_recipe, load_recipe
from dist_adamw.recipes.decay import names_without_decay, parameter_groups
from dist_adamw.recipes.schema import SCHEMA_FILE, schema_text
from dist_adamw.recipes.sections import NOT_IN_FILES, SECTIONS
from dist_adamw.recipes.source import FileError, read_file
from tests.conftest import ROOT

COMMITTED = sorted((ROOT / "configs/recipes").glob("*.yaml"))
RECIPE = """\
# yaml-language-server: $schema=recipe.schema.json
optimizer:
  lr: 2e-3
  betas: [0.9, 0.95]
  weight_decay: 0.05
  max_grad_norm: 1.0
  state_dtype: float32
  averages: {ema: {decay: 0.9}}
  no_decay: one_dimensional
scheduler: {restart_period: 1 epoch, t_mult: 2, policy: wsd, decay_length: 20%, epoch_size: 1_000}
batch: {size: {0: 16, 2 epochs: 32}, micro_batch_size: 4}
training: {total_samples: 3 epochs}
"""


def written(folder: Path, text: str | bytes, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(recipe: Any) -> list[str]:
    """What is wrong with a recipe, without the folder of its file."""
    with pytest.raises(FileError) as raised:
        load_recipe(recipe)
    folder = f"{recipe.parent}/" if isinstance(recipe, Path) else ""
    assert str(raised.value).startswith(str(raised.value.problems[0]))
    return [str(one).removeprefix(folder) for one in raised.value.problems]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


# ---------------------------------------------------------------- what is built


def by_hand(model: nn.Module) -> tuple[DistAdamW, CyclicLRWithRestarts]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = DistAdamW(
        groups,
        lr=2e-3,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        max_grad_norm=1.0,
        state_dtype=torch.float32,
        averages={"ema": EMA(decay=0.9)},
    )
    options: dict[str, Any] = {"restart_period": "1 epoch", "t_mult": 2, "policy": "wsd", "decay_length": "20%"}
    return optimizer, CyclicLRWithRestarts(optimizer, {0: 16, "2 epochs": 32}, 1000, **options)


def train(model: nn.Module, optimizer: DistAdamW, scheduler: CyclicLRWithRestarts) -> list[torch.Tensor]:
    data = torch.Generator().manual_seed(1)
    for _ in range(8):
        model(torch.randn(16, 4, generator=data)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("kind", ["file", "text path", "mapping", "recipe", "JSON"])
def test_it_trains_as_the_constructors_do(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, RECIPE)
    data = yaml.safe_load(RECIPE)  # which makes a text of 2e-3
    given: dict[str, Any] = {"file": path, "text path": str(path), "mapping": data, "recipe": load_recipe(path)}
    given["JSON"] = written(tmp_path, json.dumps({"$schema": "x", **data}, indent="\t"), "r.json")
    model, twin = network(), network()
    optimizer, scheduler = from_recipe(given[kind], model)
    optimizer_by_hand, scheduler_by_hand = by_hand(twin)
    assert scheduler.configuration() == scheduler_by_hand.configuration()
    assert repr(optimizer) == repr(optimizer_by_hand)
    assert optimizer.averages == optimizer_by_hand.averages
    assert (optimizer.max_grad_norm, optimizer.state_dtype) == (1.0, torch.float32)
    pairs = zip(train(model, optimizer, scheduler), train(twin, *by_hand(twin)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_recipe_is_what_it_was_written_as(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, RECIPE))
    assert load_recipe(written(tmp_path, recipe.to_yaml(), "again.yaml")) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert load_recipe(recipe) is recipe
    recipe.optimizer["lr"] = 5.0  # a copy
    assert recipe.optimizer["lr"] == 2e-3
    assert recipe.total_samples == "3 epochs"


def test_the_batch_and_the_preview(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, RECIPE))
    batch = recipe.global_batch(2)
    assert (batch.size, batch.gradient_accumulation_steps) == (16, 2)
    with pytest.raises(ValueError, match=r"r\.yaml:11: batch\.size: batch_size\[0\]: .* 16 is not a multiple of"):
        recipe.global_batch(3)
    preview = recipe.preview()
    assert [row.samples for row in preview.rows] == [1000, 2000]
    assert preview.end is not None
    assert preview.end.is_at_cycle_end
    unknown = load_recipe(written(tmp_path, RECIPE.replace(", epoch_size: 1_000", "")))
    with pytest.raises(ValueError, match=r"r\.yaml:10: scheduler\.epoch_size: .* a preview needs it"):
        unknown.preview()
    assert unknown.preview(epoch_size=500).rows[0].samples == 500
    with pytest.raises(ValueError, match=r"recipe: batch: size is not there"):
        load_recipe({"optimizer": {"lr": 1.0}}).global_batch()


def test_a_preview_of_less_than_the_schedule() -> None:
    """A schedule that ends has no periods that fit better."""
    recipe = load_recipe({"scheduler": {"total_samples": 600, "epoch_size": 100}, "batch": {"size": 10}})
    end = recipe.preview(total_samples=500).end
    assert end is not None
    assert (end.cycle, end.is_at_cycle_end, end.restart_periods) == (0, False, ())


def test_changes_are_checked(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, RECIPE))
    changed = recipe.with_changes(optimizer={"lr": 1e-4}, scheduler={"min_lr": 1e-5})
    assert (changed.optimizer["lr"], changed.scheduler["min_lr"]) == (1e-4, 1e-5)
    assert changed.optimizer["betas"] == recipe.optimizer["betas"]
    assert "min_lr" not in recipe.scheduler
    with pytest.raises(ValueError, match=r"scheduler\.min_lr: min_lr must lie between 0 and the group's lr 0\.002"):
        recipe.with_changes(scheduler={"min_lr": 1.0})
    with pytest.raises(ValueError, match=r"Did you mean lr\?"):
        recipe.with_changes(optimizer={"lrs": 1.0})


def test_arguments_of_the_code_override_those_of_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, RECIPE.replace("policy: wsd, decay_length: 20%, ", "")))
    optimizer = recipe.make_optimizer(network(), lr=0.5)
    scheduler = recipe.make_scheduler(optimizer, policy_fn=lambda tau: 1 - tau)
    assert optimizer.defaults["lr"] == 0.5
    assert scheduler.schedule.policy_fn is not None
    with pytest.raises(ValueError, match=r"r\.yaml:10: scheduler\.t_mult: t_mult must be"):
        recipe.make_scheduler(optimizer, t_mult=-1)


@pytest.mark.parametrize(("section", "made"), [("optimizer", DistAdamW), ("scheduler", CyclicLRWithRestarts)])
def test_every_argument_is_a_key(section: str, made: type) -> None:
    arguments = inspect.signature(made).parameters
    keys = SECTIONS[section].model_fields
    assert keys.keys() - arguments.keys() <= {"no_decay"}
    assert arguments.keys() - keys.keys() <= {*NOT_IN_FILES, "optimizer"}
    for name in keys.keys() & arguments.keys():
        default = arguments[name].default
        assert keys[name].default == (list(default) if isinstance(default, tuple) else default)
        assert keys[name].description


# ---------------------------------------------------------------- parameters without decay


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.linear, self.bn = nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.ones(()))
        self.my_rmsnorm = nn.Linear(4, 4, bias=False)


def test_rules_without_decay() -> None:
    model = nn.ModuleDict({"a": Block(), "head": nn.Linear(4, 2)})
    norms_and_biases = {
        *("a.norm1.weight", "a.norm1.bias", "a.linear.bias", "a.bn.weight", "a.bn.bias", "head.bias"),
        "a.my_rmsnorm.weight",
    }
    assert names_without_decay(model, "none") == names_without_decay(model, None) == set()
    assert names_without_decay(model, "norms_and_biases") == norms_and_biases
    one_dimensional = (norms_and_biases - {"a.my_rmsnorm.weight"}) | {"a.gain"}
    assert names_without_decay(model, "one_dimensional") == one_dimensional
    assert names_without_decay(model, ["head.*", "*.gain"]) == {"head.weight", "head.bias", "a.gain"}
    with pytest.raises(ValueError, match=r"no parameter's name matches the pattern '\*\.biases'. Names are a\.gain,"):
        names_without_decay(model, ["*.bias", "*.biases"])
    compiled = nn.ModuleDict({"a": Block()})
    wrapped = nn.ModuleDict({"_orig_mod": compiled})
    assert names_without_decay(wrapped, ["a.gain"]) == {"_orig_mod.a.gain"}


def test_trainers_rule_is_a_part_of_ours() -> None:
    trainer_pt_utils = pytest.importorskip("transformers.trainer_pt_utils")
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # those of Trainer
    model = nn.ModuleDict({"a": Block(), "norm": nn.Linear(2, 2), "final_norm": nn.Linear(2, 2)})
    decayed = set(trainer_pt_utils.get_parameter_names(model, [nn.LayerNorm], patterns))
    names = {name for name, _ in model.named_parameters()}
    assert names_without_decay(model, "norms_and_biases") == (names - decayed) | {"a.bn.weight"}


def test_groups_have_every_parameter_once() -> None:
    model = network()
    groups = parameter_groups(model, "one_dimensional")
    assert [len(group["params"]) for group in groups] == [2, 4]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), "norms_and_biases")) == 1  # no empty group
    params = list(model.parameters())
    assert parameter_groups(params, "none") is params
    with pytest.raises(ValueError, match="chooses parameters of a model, got a list"):
        parameter_groups(params, "one_dimensional")


# ---------------------------------------------------------------- YAML and its traps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("2.", 2.0),
        (".5", 0.5),
        (".inf", float("inf")),
        ("012", 12),
        ("5_000", 5000),
        ("1:30", "1:30"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("'1'", "1"),
        ("2 epochs", "2 epochs"),
        ("20%", "20%"),
        ("1 epoch # a comment", "1 epoch"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object, tmp_path: Path) -> None:
    found = read_file(written(tmp_path, f"a: {text}\n")).data["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "r.yaml: the file is empty; a recipe has the sections optimizer, scheduler, batch, training"),
        ("# nothing\n", "r.yaml: the file is empty"),
        ("{}", "r.yaml:1: the file is empty"),
        ("- a\n", "r.yaml:1: the file has a list at its top"),
        ("hello\n", "r.yaml:1: the file has a text at its top"),
        ("optimizer:\n\tlr: 1\n", "r.yaml:2: there is a tab, and YAML is indented by spaces"),
        ("optimizer: {lr: 1}\nbatch: {size: 8}\noptimizer: {lr: 2}\n", "r.yaml:3: optimizer is there twice, first in"),
        ("batch: {size: {0: 8, 0.0: 9}}\n", "r.yaml:1: 0.0 is there twice"),
        ("optimizer: &o {lr: 1}\nscheduler: *o\n", "r.yaml:2: aliases (*name) are not supported"),
        ("optimizer: !!python/object/apply:os.system [ls]\n", "r.yaml:1: tags such as tag:yaml.org,2002:python/object"),
        ("optimizer: {lr: 1}\n---\nbatch: {size: 3}\n", "r.yaml:2: expected a single document"),
        (
            "optimizer:\n  lr:1e-3\n  eps: 1e-8\n",
            "r.yaml:3: a key is not expected here. Indent keys alike",
        ),
        ("batch: {size: {0:256}}\n", 'r.yaml:1: 0:256 has no value. Write a space after the ":"'),
        ("? [1]\n: 2\n", "r.yaml:1: a key must be text or a number"),
        ("optimizer: {1.5: 2}\n", "r.yaml:1: optimizer.1.5: there is no '1.5' in optimizer"),
        ("optimizer: {params: model}\n", "r.yaml:1: optimizer.params: params does not belong here: pass the model to"),
        ("[" * 5000, "r.yaml: the file is nested too deeply"),
        ("optimizer: {lr: [1\n", "r.yaml:2: while parsing a flow sequence"),
        ("optimizer: {lr: " + "9" * 5000 + "}", "has thousands of digits"),
        (bytes(range(256)), "r.yaml: the file is not text"),
        ("optimizer: {lr: 1} # é".encode("latin-1"), "r.yaml: the file is not text"),
        (b"x" * 1_000_001, "r.yaml: the file has 1,000,001 bytes, which is too long for settings"),
    ],
    ids=range(22),
)
def test_what_is_not_a_file_of_settings(text: str | bytes, sentence: str, tmp_path: Path) -> None:
    (said,) = problems(written(tmp_path, text))
    assert sentence in said
    assert "\n" not in said


def test_other_encodings_and_line_ends(tmp_path: Path) -> None:
    expected = load_recipe(written(tmp_path, RECIPE))
    for content in (RECIPE.encode("utf-8-sig"), RECIPE.encode("utf-16"), RECIPE.replace("\n", "\r\n").encode()):
        assert load_recipe(written(tmp_path, content)) == expected


def test_what_is_not_there(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == ["none.yaml: there is no such file."]
    assert "the file cannot be read: Is a directory" in problems(tmp_path)[0]
    for wrong in (3, None, [1]):
        with pytest.raises(ValueError, match="a recipe must be a file, a mapping or a TrainingRecipe, got a"):
            load_recipe(wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- keys and values

MISTAKES = """\
optimizer:
  lr: x
  betas: [0.9]
  averages: {e: {decy: 0.9}, f: 3, g: {dtype: fp16}}
  master_dtype: fp32
  amsgrad: yes
  lrr: 1
  restart_period: 1
  mesh: 1
  1: 2
scheduler:
  restart_period: [1]
  policy: wds
  peak_factor: a
  cycle_ends: 5
  epoch_size: 2.5
  normalize_weight_decay: off
  stream: null
  lr: 3
  warmup: 3
  policy_fn: math.cos
  batch_size: 3
  decay_lenght: 10%
batch:
foo: 1
lr: 3
shedule: {}
"""
SENTENCES = """\
r.yaml:2: optimizer.lr: lr must be a number, got 'x'.
r.yaml:3: optimizer.betas: betas must be a list of 2 numbers, got [0.9].
r.yaml:4: optimizer.averages.e.decy: an average has no option 'decy'. Options are
r.yaml:4: optimizer.averages.f: f must be the options of an average, such as {decay: 0.999}, got 3.
r.yaml:4: optimizer.averages.g.dtype: dtype must be 'float32', 'bfloat16' or null, got 'fp16'.
r.yaml:5: optimizer.master_dtype: master_dtype must be 'float32', 'int16' or null, got 'fp32'.
r.yaml:6: optimizer.amsgrad: amsgrad must be true or false, got 'yes'. Write true: yes is text in YAML 1.2.
r.yaml:7: optimizer.lrr: there is no 'lrr' in optimizer. Did you mean lr?
r.yaml:8: optimizer.restart_period: restart_period belongs in scheduler, not in optimizer. Move it there.
r.yaml:9: optimizer.mesh: mesh does not belong here: a device mesh is built in code: pass it to make_optimizer.
r.yaml:10: optimizer.1: there is no 1 in optimizer. Its keys are lr, betas,
r.yaml:12: scheduler.restart_period: restart_period must be a number or a text with a unit ('2.5 epochs'), got [1].
r.yaml:13: scheduler.policy: policy must be 'cosine', 'arccosine',
r.yaml:14: scheduler.peak_factor: peak_factor must be a number or a list of numbers, got 'a'.
r.yaml:15: scheduler.cycle_ends: cycle_ends must be a list of lengths or null, got 5.
r.yaml:16: scheduler.epoch_size: epoch_size must be a whole number or null, got 2.5.
r.yaml:17: scheduler.normalize_weight_decay: normalize_weight_decay must be true, false or 'auto', got 'off'. Write
r.yaml:18: scheduler.stream: stream must be true or false, got null. Leave it out for the default.
r.yaml:19: scheduler.lr: lr belongs in optimizer, not in scheduler. Move it there.
r.yaml:20: scheduler.warmup: there is no 'warmup'. It is warmup_samples.
r.yaml:21: scheduler.policy_fn: policy_fn does not belong here: a function is built in code: pass it to make_scheduler.
r.yaml:22: scheduler.batch_size: batch_size does not belong here: write "size" under "batch".
r.yaml:23: scheduler.decay_lenght: there is no 'decay_lenght' in scheduler. Did you mean decay_length?
r.yaml:24: batch: batch must have keys and values, got null. Indent its keys below it, or leave it out.
r.yaml:25: foo: there is no 'foo'. Sections are optimizer, scheduler, batch, training.
r.yaml:26: lr: lr belongs in optimizer. Move it there.
r.yaml:27: shedule: there is no 'shedule'. Did you mean scheduler?
"""


def test_every_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    said = problems(written(tmp_path, MISTAKES))
    expected = SENTENCES.splitlines()
    assert [one[: len(start)] for one, start in zip(said, expected, strict=True)] == expected


# Sections, the key that is blamed, and a word of the sentence.
RANGES = [
    ("optimizer: {lr: -1}", "optimizer.lr", "Invalid learning rate: -1"),
    ("optimizer: {lr: .inf}", "optimizer.lr", "Invalid learning rate: inf"),
    ("optimizer: {eps: -1}", "optimizer.eps", "Invalid epsilon value"),
    ("optimizer: {lr: 1, betas: [0.9, 1]}", "optimizer.betas", "Invalid beta parameter at index 1"),
    ("optimizer: {weight_decay: -1}", "optimizer.weight_decay", "Invalid weight_decay"),
    ("optimizer: {max_grad_norm: 0}", "optimizer.max_grad_norm", "must be above 0"),
    ("optimizer: {averages: {a: {}, e: {decay: 2}}}", "optimizer.averages", "EMA's decay must be above 0"),
    ("optimizer: {averages: {step: {decay: 0.9}}}", "optimizer.averages.step", "the name of an average"),
    ("optimizer: {averages: {m: {every: 1 epok}}}", "optimizer.averages", "unknown unit"),
    ("optimizer: {bucket_numel: 0}", "optimizer.bucket_numel", "must be above 0"),
    ("optimizer: {reproducible: true, reduce_dtype: bfloat16}", "optimizer.reproducible", "sums in fp32"),
    ("scheduler: {t_mult: 2, restart_period: -1}", "scheduler.restart_period", "finite number above 0, got -1"),
    ("scheduler: {restart_period: 1 epok}", "scheduler.restart_period", "unknown unit"),
    ("scheduler: {restart_period: 1 cycle}", "scheduler.restart_period", "cannot be a share of a cycle"),
    ("scheduler: {restart_period: 1e9 tokens}", "scheduler.restart_period", "pass tokens_per_sample"),
    ("scheduler: {t_mult: 0}", "scheduler.t_mult", "above 0, got 0"),
    ("scheduler: {min_lr: 1}", "scheduler.min_lr", "must lie between 0 and"),
    ("scheduler: {warmup_samples: -3}", "scheduler.warmup_samples", ">= 0, got -3"),
    ("scheduler: {warmup_samples: 2%}", "scheduler.warmup_samples", "cannot be a share of a cycle"),
    ("scheduler: {cycle_ends: [1 epoch, 0.5]}", "scheduler.cycle_ends", "less than one sample"),
    ("scheduler: {policy: exp_range, gamma: 2}", "scheduler.gamma", "must lie in (0, 1], got 2"),
    ("scheduler: {triangular_step: 2}", "scheduler.triangular_step", "must lie in [0, 1]"),
    ("scheduler: {fit: scale}", "scheduler.fit", "needs total_samples"),
    ("scheduler: {on_difference: never}", "scheduler.on_difference", "'strict', 'checkpoint' or 'new', got 'never'"),
    ("scheduler: {epoch_size: 0}", "scheduler.epoch_size", "above 0, got 0"),
    ("scheduler: {epoch_size: 9, rewarmup: 1e9}\nbatch: {size: 3}", "scheduler.rewarmup", "too few for rewarmup"),
    ("batch: {size: 0}", "batch.size", "above 0, got 0"),
    ("batch: {size: {5: 3, 7: 3}}", "batch.size", "the first key of batch_size must be 0"),
    ("batch: {size: {0: 3, 1 epok: 4}}", "batch.size", "unknown unit"),
    ("batch: {size: {0: 3}}", "batch.size", "pass 3"),
    ("batch: {size: {0: 8, 2 epochs: 9, 1 epoch: 7}}\nscheduler: {epoch_size: 9}", "batch.size", "Sort the keys"),
    ("batch: {micro_batch_size: 0}", "batch.micro_batch_size", "a whole number above 0 or null, got 0"),
    ("training: {total_samples: 0}", "training.total_samples", "above 0"),
    ("training: {total_samples: 10%}", "training.total_samples", "cannot be a share of a cycle"),
    ("training: {total_samples: 5}\nscheduler: {total_samples: 6}", "training.total_samples", "5 here and 6 under"),
    (
        "training: {total_samples: 5 epochs}\nscheduler: {total_samples: 60, epoch_size: 10}\nbatch: {size: 5}",
        "training.total_samples",
        "'5 epochs' here and 60 under scheduler",
    ),
]


@pytest.mark.parametrize(("text", "key", "words"), RANGES, ids=[key for _, key, _ in RANGES])
def test_ranges_are_named_with_their_key(text: str, key: str, words: str, tmp_path: Path) -> None:
    (said,) = problems(written(tmp_path, text))
    assert said.startswith(f"r.yaml:{1 + text.partition(key.split('.')[0])[0].count(chr(10))}: {key}")
    assert words in said
    assert "\n" not in said


def test_a_mapping_has_no_lines() -> None:
    assert problems({"optimizer": {"lr": -1.0}}) == ["recipe: optimizer.lr: Invalid learning rate: -1.0"]
    assert problems({})[0].startswith("recipe: the file is empty; a recipe has the sections optimizer, scheduler,")


def test_the_error_survives_another_process() -> None:
    with pytest.raises(FileError) as raised:
        load_recipe({"optimizer": {"lrr": 1, "epsi": 2}})
    again = pickle.loads(pickle.dumps(raised.value))
    assert again.problems == raised.value.problems
    assert "(And 1 more: dist-adamw check lists all.)" in str(again)


# ---------------------------------------------------------------- the JSON Schema


def test_the_committed_schema_is_the_current_one() -> None:
    said = "write it with: python -m dist_adamw.recipes.schema > dist_adamw/recipes/recipe.schema.json"
    assert SCHEMA_FILE.read_text() == schema_text(), said
    Draft202012Validator.check_schema(json.loads(schema_text()))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_recipe_fulfils_it_and_loads(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--schemafile", str(SCHEMA_FILE), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    recipe = load_recipe(path)
    assert isinstance(recipe, TrainingRecipe)
    for epoch_size in (100_000, 1_281_167):
        end = recipe.preview(epoch_size=epoch_size).end
        assert end is not None
        assert end.is_at_cycle_end
    relative = path.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / relative).resolve() == SCHEMA_FILE


@pytest.mark.parametrize("text", [MISTAKES, *(text for text, _, words in RANGES if "whole number above 0 or" in words)])
def test_the_schema_refuses_wrong_types_too(text: str) -> None:
    assert [*Draft202012Validator(json.loads(schema_text())).iter_errors(yaml.safe_load(text))]


def test_the_schema_accepts_what_is_read(tmp_path: Path) -> None:
    data = read_file(written(tmp_path, RECIPE)).data
    data["batch"]["size"] = {str(key): size for key, size in data["batch"]["size"].items()}  # as editors see keys
    assert [*Draft202012Validator(json.loads(schema_text())).iter_errors(data)] == []
