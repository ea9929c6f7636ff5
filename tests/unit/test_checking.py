"""``check``: each kind of conflict is found once, with file, line and key; what works together has no findings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_adamw.checking.check import check, check_files
from dist_adamw.checking.deepspeed_keys import _installed_keys
from tests.conftest import ROOT

RECIPE = """\
optimizer: {lr: 1e-3, max_grad_norm: 1.0}
scheduler:
  restart_period: 1 epoch
batch: {size: 256, micro_batch_size: 8}
training: {total_samples: 15 epochs}
"""
DEEPSPEED = """\
distributed_type: DEEPSPEED
num_processes: 2
deepspeed_config:
  deepspeed_config_file: d.json
"""
JSON: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
}
OURS = {"type": "CyclicLRWithRestarts", "params": {"batch_size": "auto", "epoch_size": "auto"}}


def findings(folder: Path, recipe: str | None, accelerate: str | None, deepspeed: Any, ranks: int | None) -> list[str]:
    """Lines of the text, without the folder."""
    paths: list[Any] = []
    for name, content in (("r.yaml", recipe), ("a.yaml", accelerate), ("d.json", deepspeed)):
        path = folder / name
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        paths.append(path if content is not None and (name != "d.json" or accelerate is None) else None)
    one, two, three = paths
    text, status, data = check_files(one, two, three, ranks)
    assert status == data["status"] == (1 if data["findings"] else 0)
    json.dumps(data)
    found = check(one, two, three, ranks)
    assert [finding.as_dict() for finding in found] == data["findings"]
    lines = text.replace(f"{folder}/", "").splitlines()
    assert [line.replace(f"{folder}/", "") for line in map(str, found)] == lines[: len(found)]
    return lines[: len(found)]


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


# Name: recipe, Accelerate config, DeepSpeed JSON, ranks, and how each finding begins and ends.
CASES: dict[str, tuple[str | None, str | None, Any, int | None, list[tuple[str, str]]]] = {
    "fine": (RECIPE, DEEPSPEED, JSON, None, []),
    "fine, DDP": (RECIPE, "distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: false\n", None, None, []),
    "fine, the same norm": (RECIPE, DEEPSPEED, {**JSON, "gradient_clipping": 1.0}, None, []),
    "fine, numbers": (
        RECIPE,
        DEEPSPEED,
        {**JSON, "gradient_accumulation_steps": 16, "train_batch_size": 256},
        None,
        [],
    ),
    "fine, tensor parallel": (
        RECIPE.replace("256", "24"),
        "distributed_type: FSDP\nnum_processes: 6\nfsdp_config: {fsdp_version: 2}\n"
        "parallelism_config: {parallelism_config_tp_size: 2}\n",
        None,
        None,
        [],
    ),
    "fine, a batch schedule": (
        RECIPE.replace("256", "{0: 64, 2 epochs: 128}"),
        DEEPSPEED,
        {**JSON, "gradient_accumulation_steps": 1},
        None,
        [],
    ),
    "ranks": (RECIPE, None, None, 3, [("r.yaml:4: error: batch.size: global batch size 256", "[batch]")]),
    "ranks of the config": (
        RECIPE,
        "distributed_type: MULTI_GPU\nnum_processes: 5\n",
        None,
        None,
        [("r.yaml:4: error: batch.size: global batch size 256 is not a multiple of micro_batch_size x", "[batch]")],
    ),
    "one of a schedule": (
        RECIPE.replace("256", "{0: 256, 1000: 500}"),
        DEEPSPEED,
        JSON,
        None,
        [("r.yaml:4: error: batch.size: batch_size[1000]: global batch size 500", "496 and 512. [batch]")],
    ),
    "accumulation": (
        RECIPE,
        DEEPSPEED,
        {**JSON, "gradient_accumulation_steps": 4},
        None,
        [("d.json:5: error: gradient_accumulation_steps: gradient_accumulation_steps=4, which makes", "[batch]")],
    ),
    "accumulation left out": (
        RECIPE,
        DEEPSPEED,
        without(JSON, "gradient_accumulation_steps"),
        None,
        [
            (
                "d.json:1: error: gradient_accumulation_steps: gradient_accumulation_steps is not there, and Acc",
                "[batch]",
            )
        ],
    ),
    "accumulation of a schedule": (
        RECIPE.replace("256", "{0: 256, 1000: 512}"),
        DEEPSPEED,
        {**JSON, "gradient_accumulation_steps": 4},
        None,
        [("d.json:5: error: gradient_accumulation_steps: gradient_accumulation_steps=4", '"auto". [batch]')],
    ),
    "micro-batch": (
        RECIPE,
        DEEPSPEED,
        {**JSON, "train_micro_batch_size_per_gpu": 4},
        None,
        [("d.json:6: error: train_micro_batch_size_per_gpu: train_micro_batch_size_per_gpu=4, and micro_", "[batch]")],
    ),
    "global batch": (
        RECIPE,
        DEEPSPEED,
        {**JSON, "train_batch_size": 512},
        None,
        [("d.json:8: error: train_batch_size: train_batch_size=512, and the recipe's global batch is 256", "[batch]")],
    ),
    "a triple": (
        None,
        DEEPSPEED,
        {**JSON, "train_batch_size": 100, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2},
        None,
        [("d.json:8: error: train_batch_size: train_batch_size=100, and train_micro_batch_size_per_gpu x", "[batch]")],
    ),
    "a pair": (
        None,
        DEEPSPEED,
        {**JSON, "train_batch_size": 100, "train_micro_batch_size_per_gpu": 8},
        None,
        [("d.json:8: error: train_batch_size: train_batch_size=100 is not a multiple of 8 x 2 ranks = 16", "[batch]")],
    ),
    "no number": (
        None,
        None,
        {**JSON, "train_batch_size": "x"},
        2,
        [('d.json:8: error: train_batch_size: train_batch_size must be a whole number above 0 or "auto"', "[batch]")],
    ),
    "two clippings": (
        RECIPE,
        DEEPSPEED,
        {**JSON, "gradient_clipping": 0.5},
        None,
        [
            (
                "d.json:7: error: gradient_clipping: max_grad_norm=1.0 was given to DistAdamW and gradient_cl",
                "[clipping]",
            )
        ],
    ),
    "two clippings without a JSON": (
        RECIPE,
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  gradient_clipping: 0.3\n",
        None,
        None,
        [("a.yaml:4: error: deepspeed_config.gradient_clipping: max_grad_norm=1.0", "[clipping]")],
    ),
    "two schedulers, two optimizers": (
        RECIPE,
        DEEPSPEED,
        {**JSON, "optimizer": {"type": "AdamW", "params": {}}, "scheduler": {"type": "WarmupLR"}},
        None,
        [
            ("d.json:8: error: optimizer: there is an optimizer (AdamW) here, and the recipe has one", "[optimizer]"),
            ("d.json:12: error: scheduler: there is a scheduler (WarmupLR) here, and the recipe has", "[scheduler]"),
        ],
    ),
    "a wrong argument": (
        None,
        DEEPSPEED,
        {
            **JSON,
            "optimizer": {"type": "DistAdamW", "params": {"lr": -1}},
            "scheduler": {**OURS, "params": {"restart_periods": 1}},
        },
        None,
        [
            (
                "d.json:10: error: optimizer.params: DeepSpeed configuration, optimizer.params = {'lr': -1}",
                "[optimizer]",
            ),
            (
                "d.json:16: error: scheduler.params: DeepSpeed configuration, scheduler.params: there is no",
                "[scheduler]",
            ),
        ],
    ),
    "the engine's own Adam": (
        RECIPE,
        DEEPSPEED,
        {
            **JSON,
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "zero_force_ds_cpu_optimizer": True,
        },
        None,
        [('d.json:11: error: zero_force_ds_cpu_optimizer: "zero_force_ds_cpu_optimizer": true asks', "[optimizer]")],
    ),
    "two precisions": (
        None,
        DEEPSPEED,
        {**JSON, "bf16": {"enabled": True}, "fp16": {"enabled": True}},
        None,
        [("d.json:12: error: fp16.enabled: bf16 and fp16 are both enabled", "[precision]")],
    ),
    "precision": (
        None,
        DEEPSPEED + "mixed_precision: fp16\n",
        {**JSON, "bf16": {"enabled": True}},
        None,
        [
            ("a.yaml:5: error: mixed_precision: Accelerate refuses mixed_precision next to deepspeed_con", "[engine]"),
            ("d.json:9: error: bf16.enabled: bf16.enabled is true, and mixed_precision is fp16 in the", "[precision]"),
        ],
    ),
    "masters": (
        RECIPE.replace("lr: 1e-3", "master_dtype: float32, reproducible: true"),
        DEEPSPEED,
        JSON,
        None,
        [
            ("r.yaml:1: error: optimizer.reproducible: reproducible=True is not for DeepSpeed", "[precision]"),
            ("r.yaml:1: warning: optimizer.master_dtype: master_dtype='float32' is not for Deep", "[precision]"),
        ],
    ),
    "auto": (
        None,
        DEEPSPEED,
        {**JSON, "zero_optimization": {"stage": 2, "sub_group_size": "auto"}},
        None,
        [('d.json:4: error: zero_optimization.sub_group_size: sub_group_size="auto" is filled in neither', "[auto]")],
    ),
    "ignored keys": (
        None,
        DEEPSPEED + "  gradient_clipping: 1.0\n",
        JSON,
        None,
        [
            (
                "a.yaml:5: error: deepspeed_config.gradient_clipping: Accelerate refuses gradient_clipping next",
                "[engine]",
            )
        ],
    ),
    "mid-cycle, in epochs": (
        RECIPE.replace("15", "14"),
        None,
        None,
        None,
        [("r.yaml:5: warning: training.total_samples: training ends at epoch 14, 87.5% into cycle 3", "[mid-cycle]")],
    ),
    "mid-cycle, in samples": (
        RECIPE.replace("  restart", "  epoch_size: 1000\n  warmup_samples: 400\n  restart"),
        None,
        None,
        None,
        [("r.yaml:7: warning: training.total_samples: training ends at sample 15,000 (epoch 15)", "[mid-cycle]")],
    ),
    "MULTI_CPU": (
        RECIPE,
        "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n",
        None,
        None,
        [("a.yaml:1: error: distributed_type: accelerate launch starts one process for distributed_type", "[launch]")],
    ),
    "use_cpu": (
        RECIPE,
        "distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: yes\n",
        None,
        None,
        [("a.yaml:3: error: use_cpu: accelerate launch starts one process for use_cpu: true, and not 2.", "[launch]")],
    ),
    "fine, mpirun": (
        RECIPE,
        "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\nmpirun_config: {mpirun_hostfile: hosts}\n",
        None,
        None,
        [],
    ),
    "fp16": (
        RECIPE.replace("lr: 1e-3", "lr: 1e-3, reproducible: true"),
        "distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: fp16\n",
        None,
        None,
        [
            (
                "r.yaml:1: error: optimizer.reproducible: reproducible=True is not supported with mixed",
                "[precision]",
            )
        ],
    ),
    "NO": (
        RECIPE,
        "distributed_type: NO\nnum_processes: 2\n",
        None,
        None,
        [("a.yaml:1: error: distributed_type: accelerate launch starts one process for distributed_type", "[launch]")],
    ),
    "FSDP on a CPU": (
        RECIPE,
        "distributed_type: FSDP\nnum_processes: 2\nuse_cpu: true\nfsdp_config: {fsdp_version: 2}\n",
        None,
        None,
        [("a.yaml:3: error: use_cpu: with use_cpu: true accelerate launch does not use FSDP", "[launch]")],
    ),
    "FSDP1": (
        RECIPE,
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_state_dict_type: SHARDED_STATE_DICT}\n",
        None,
        None,
        [
            (
                "a.yaml:3: error: fsdp_config.fsdp_version: FSDP1 keeps flat parameters without names, got fsdp",
                "[engine]",
            )
        ],
    ),
    "another engine": (
        RECIPE,
        "distributed_type: MEGATRON_LM\nnum_processes: 2\n",
        None,
        None,
        [("a.yaml:1: error: distributed_type: the engine MEGATRON_LM is not supported", "[engine]")],
    ),
    "no such JSON": (
        RECIPE,
        DEEPSPEED.replace("d.json", "nope.json"),
        None,
        None,
        [("a.yaml:4: error: deepspeed_config.deepspeed_config_file: there is no file nope.json", "[file]")],
    ),
    "a JSON schedule without Accelerate": (
        None,
        None,
        {**JSON, "scheduler": {**OURS, "params": {"batch_size": {"0": 8, "100": 16}, "epoch_size": 1000}}},
        None,
        [("d.json:11: warning: scheduler.params.batch_size: batch_size is a schedule", "[batch]")],
    ),
    "misspelt keys and mistaken values": (
        "optimizer: {lrr: 3, weight_decay: -1}\nscheduler: {decay_lenght: 5%, polcy: wsd}\n",
        None,
        None,
        None,
        [
            ("r.yaml:1: error: optimizer.lrr: there is no 'lrr' in optimizer. Did you mean lr?", "[recipe]"),
            ("r.yaml:1: error: optimizer.weight_decay: Invalid weight_decay value: -1", "[recipe]"),
            ("r.yaml:2: error: scheduler.decay_lenght: there is no", "[recipe]"),
            ("r.yaml:2: error: scheduler.polcy: there is no", "[recipe]"),
        ],
    ),
    "a misspelt key with a mistaken value": (
        "training: {total_samples: 3 epochs}\nscheduler:\n  restart_perid: 1 epok\n",
        None,
        None,
        None,
        [
            ("r.yaml:3: error: scheduler.restart_perid: there is no", "[recipe]"),
            ("r.yaml:3: error: scheduler.restart_period: restart_period='1 epok' has an unknown unit", "[recipe]"),
        ],
    ),
    "an optimizer without a type": (
        RECIPE,
        DEEPSPEED,
        {**JSON, "optimizer": {"params": {"lr": 1e-3}}},
        None,
        [('d.json:8: warning: optimizer: optimizer has no "type", without which DeepSpeed ignores it', "[optimizer]")],
    ),
    "mistakes in the recipe": (
        "optimizer: {lrr: 3}\nscheduler: {x: 1}\n",
        "distributed_type: NO\nnum_processes: 2\n",
        None,
        None,
        [
            ("a.yaml:1: error: distributed_type", "[launch]"),
            ("r.yaml:1: error: optimizer.lrr: there is no 'lrr' in optimizer. Did you mean lr?", "[recipe]"),
            ("r.yaml:2: error: scheduler.x: there is no 'x' in scheduler", "[recipe]"),
        ],
    ),
}


def test_keys_that_accelerate_does_not_know(tmp_path: Path) -> None:
    found = findings(tmp_path, None, "distributed_type: MULTI_GPU\nnum_proceses: 8\n", None, None)
    assert found == [
        "a.yaml:2: error: num_proceses: there is no 'num_proceses' in an Accelerate config. "
        "Did you mean num_processes? [key]"
    ]
    (line,) = findings(tmp_path, None, "optim: {lr: 1.0e-3}\n", None, None)
    assert line.startswith("a.yaml:1: error: optim: there is no 'optim' in an Accelerate config. Pass the file")


def test_keys_that_deepspeed_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    config = {
        "_comment": "a comment",
        "gradient_cliping": 1.0,
        "zenflow": {},
        "frobnicate": 1,
        "zero_optimization": {"stage": 3, "overlap_com": True, "offload_param": {"devise": "cpu"}},
        "bf16": {"enable": True},
        "train_micro_batch_size_per_gpu": 1,
    }
    assert [line.partition(" [")[0] for line in findings(tmp_path, None, None, config, None)] == [
        "d.json:3: error: gradient_cliping: DeepSpeed has no 'gradient_cliping' here, and ignores it. "
        "Did you mean gradient_clipping?",
        "d.json:4: error: zenflow: DeepSpeed has no 'zenflow' here, and ignores it. It belongs in zero_optimization.",
        "d.json:5: error: frobnicate: DeepSpeed has no 'frobnicate' here, and ignores it. Leave it out.",
        "d.json:8: error: zero_optimization.overlap_com: DeepSpeed has no 'overlap_com' in zero_optimization, and "
        "raises. Did you mean overlap_comm?",
        "d.json:10: error: zero_optimization.offload_param.devise: DeepSpeed has no 'devise' in offload_param, and "
        "raises. Did you mean device?",
        "d.json:14: error: bf16.enable: DeepSpeed has no 'enable' in bf16, and raises. Did you mean enabled?",
    ]


def test_the_keys_are_those_of_deepspeed() -> None:
    """Every key that DeepSpeed's own classes have is known."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    keys = _installed_keys()
    assert keys is not None
    for place, model in ((("zero_optimization",), DeepSpeedZeroConfig), (("fp16",), DeepSpeedFP16Config)):
        fields = {*model.model_fields, *(one.alias for one in model.model_fields.values() if one.alias)}
        assert keys.below[place] == fields
    # From https://www.deepspeed.ai/docs/config-json, one of each part.
    assert keys.top >= {"steps_per_print", "wall_clock_breakdown", "flops_profiler", "activation_checkpointing", "aio"}
    assert keys.top >= {"tensorboard", "wandb", "csv_monitor", "comms_logger", "data_types", "compile", "checkpoint"}


@pytest.mark.parametrize("argument", ["recipe", "accelerate_config", "deepspeed"])
def test_a_file_of_another_kind(argument: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "a.yaml").write_text(DEEPSPEED)
    (tmp_path / "d.json").write_text(json.dumps(JSON))
    kinds = {
        "recipe": "a recipe",
        "accelerate_config": "an Accelerate config",
        "deepspeed": "a DeepSpeed configuration",
    }
    files = dict(zip(kinds, ("r.yaml", "a.yaml", "d.json"), strict=True))
    for other in kinds.keys() - {argument}:
        given: dict[str, Any] = {argument: tmp_path / files[other]}
        sentence = f"this is {kinds[other]}, and not {kinds[argument]}. Pass {kinds[argument]}"
        with pytest.raises(ValueError, match=sentence):
            check(**given)


@pytest.mark.parametrize("name", CASES)
def test_findings(name: str, tmp_path: Path) -> None:
    *files, expected = CASES[name]
    found = findings(tmp_path, *files)
    assert [
        (line[: len(start)], line[-len(end) :]) for line, (start, end) in zip(found, expected, strict=True)
    ] == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("optimizer: {lr: [\n", "r.yaml:2: while parsing a flow node"),
        ("- a\n", "r.yaml:1: the file has a list at its top"),
        (None, "r.yaml: there is no such file."),
    ],
)
def test_what_cannot_be_read(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "r.yaml").write_text(content)
    text, status, data = check_files(tmp_path / "r.yaml")
    assert (status, data["findings"]) == (2, [])
    assert sentence in text


def test_nothing_to_check_and_no_ranks() -> None:
    assert check_files() == check_files(None, None, None, 4)
    assert "there is nothing to check" in check_files()[0]
    assert "ranks must be a whole number above 0, got 0" in check_files({"batch": {"size": 8}}, ranks=0)[0]


def test_it_says_what_it_found_right(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    text, status, _ = check_files(tmp_path / "r.yaml", ROOT / "configs/accelerate/cpu_2.yaml")
    assert status == 0
    assert "256 samples = 8 per micro-batch x 16 accumulation steps x 2 ranks" in text
    assert "training ends at epoch 15, at the end of cycle 3" in text


def test_the_committed_files_have_no_findings() -> None:
    recipes = sorted((ROOT / "configs/recipes").glob("*.yaml"))
    for config in sorted((ROOT / "configs/accelerate").glob("*.yaml")):
        for recipe in (None, *recipes):
            # The recipe has masters, which DeepSpeed keeps itself: a warning that is meant.
            found = [
                one for one in check(recipe, config) if (one.severity, one.key) != ("warning", "optimizer.master_dtype")
            ]
            assert found == [], (config, recipe)
    for path in sorted((ROOT / "configs/deepspeed").glob("*.json")):
        assert check(deepspeed=path) == [], path
