"""Plans: what a model is read from, what the figures are, and whether they are those of real engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import records
from benchmarks.engines import OURS
from benchmarks.models import GPT
from benchmarks.plan_accuracy import SMALL_BUCKETS, largest, measure, ratios
from benchmarks.plan_models import Uneven
from benchmarks.ranks import ROOT
from benchmarks.workloads import WORKLOADS
from dist_adamw import EMA, CyclicLRWithRestarts, DistAdamW, load_recipe
from dist_adamw.optimizer.transport.layout import FlatLayout
from dist_adamw.optimizer.transport.tree_sum import TreeSum
from dist_adamw.planning import Plan, Setup, plan, plan_command
from dist_adamw.planning.engines import ENGINES, cost_of
from dist_adamw.planning.fsdp2 import FSDP2
from dist_adamw.planning.memory import Cost, num_sums
from dist_adamw.planning.model import ModelShapes, Parameter, read_model
from dist_adamw.planning.own import DDP, ONE, TORCH_DDP
from dist_adamw.planning.text import in_units, read_bytes
from dist_adamw.planning.zero import _partitions
from tests.ranks import run_ranks

GIB = 1 << 30
TOLERANCE = 0.05
HERE = "tests.unit.test_planning"


def gpt() -> nn.Module:
    return GPT(6, 256, 8)


def loads_weights() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight.tolist()
    return model


def lazy() -> nn.Module:
    return nn.LazyLinear(4)


def needs_arguments(width: int) -> nn.Module:
    return nn.Linear(width, width)


def returns_a_number() -> int:
    return 3


def shapes() -> ModelShapes:
    with torch.device("meta"):
        return read_model(gpt())


def costs(found: Plan, ranks: int) -> dict[str, Cost]:
    return {cost.engine: cost for one in found.by_ranks if one.ranks == ranks for cost in one.costs}


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("text", "numel"),
    [("7B", 7 * 10**9), ("7e9", 7 * 10**9), ("1.3 b", 13 * 10**8), ("350M", 350 * 10**6), ("12_345", 12345)],
)
def test_a_number_of_parameters_is_a_transformer_of_exactly_as_many(text: str, numel: int) -> None:
    model = read_model(text)
    assert model.numel == numel == read_model(numel).numel
    assert f"{text} parameters, as " in model.source
    assert bool(model.layers) == (numel > 10**6)
    assert {param.dtype for param in model.parameters} == {torch.float32}


def test_a_factory_is_called_on_the_meta_device() -> None:
    model = read_model(f"{HERE}:gpt")
    real = gpt()
    assert [(param.name, param.shape) for param in model.parameters] == [
        (name, tuple(param.shape)) for name, param in real.named_parameters()
    ]
    assert model.layers == tuple(f"blocks.{n}" for n in range(6))
    assert {param.layer for param in model.parameters if param.name.startswith("blocks.4.")} == {4}
    assert {param.layer for param in model.parameters if not param.name.startswith("blocks.")} == {None}


def test_a_factory_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\nclass Nets:\n    def make():\n        return torch.nn.Linear(10**7, 10**7)\n")
    assert read_model(f"{file}:Nets.make").numel == 10**14 + 10**7  # 400 TB, and no memory for them


def test_tied_weights_count_once_and_frozen_ones_have_no_state() -> None:
    model = read_model(Uneven())
    assert sum(param.name.startswith(("tied", "again")) for param in model.parameters) == 1
    assert {param.name for param in model.parameters if not param.trained} == {"frozen.weight", "frozen.bias"}
    assert model.numel - sum(param.numel for param in model.trained) == 390 * 211


def test_a_hugging_face_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=100
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    real = transformers.LlamaForCausalLM(config)
    for place in (tmp_path, tmp_path / "config.json"):
        model = read_model(str(place))
        assert model.numel == sum(param.numel() for param in real.parameters())  # with its head, which AutoModel lacks
        assert model.layers == ("model.layers.0", "model.layers.1", "model.layers.2")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("gpt2", "'gpt2' is not a model.*Nothing is downloaded.*config.json"),
        ("", "is not a model"),
        ("0", "from 1 to 1e15, got 0"),
        (True, "from 1 to 1e15, got True"),
        (-5, "from 1 to 1e15, got -5"),
        ("no.such.module:gpt", "no.such.module cannot be imported.*module:factory"),
        ("no_such.py:gpt", "no_such.py is not a file"),
        (f"{HERE}:nothing", "has no function or class 'nothing'"),
        (f"{HERE}:HERE", "has no function or class 'HERE'"),
        (f"{HERE}:loads_weights", "loads_weights raised.*meta device.*leave out loading"),
        (f"{HERE}:needs_arguments", "needs_arguments raised TypeError.*without arguments"),
        (f"{HERE}:returns_a_number", "must return a torch.nn.Module, got 3"),
        (f"{HERE}:lazy", "weight of .*lazy has no shape yet"),
    ],
)
def test_a_model_that_cannot_be_read(model: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_model(model)


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(ValueError, match="not a configuration that transformers can build"):
        read_model(str(tmp_path))


def sharded_over_two_axes() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"weight of FSDPLinear is sharded already\..*\(HSDP\).* are not planned"):
        read_model(model)
    optimizer = DistAdamW([torch.zeros(4)], mesh=mesh)
    with pytest.raises(ValueError, match=r"a mesh of two axes \(HSDP\) is not planned, got .*copies"):
        plan("1M", scheduler=CyclicLRWithRestarts(optimizer, 32, 640, 5))


def test_meshes_of_two_axes_are_refused() -> None:
    run_ranks(2, sharded_over_two_axes)


def test_layers_by_class() -> None:
    with pytest.raises(ValueError, match=r"no module is a 'Blok'.*Block, .*GPT"):
        read_model(gpt(), layers="Blok")
    assert read_model(gpt(), layers="Linear").layers[:2] == ("blocks.0.qkv", "blocks.0.out")


def test_dtypes() -> None:
    assert {param.dtype for param in read_model(gpt(), dtype="bf16").parameters} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype must be .* got 'int4'"):
        read_model(gpt(), dtype="int4")


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("fp32", {}),
        ("fp32", {"amsgrad": True, "averages": {"ema": EMA(decay=0.9)}}),
        ("bf16", {"master_dtype": torch.float32}),
        ("bf16", {"master_dtype": torch.int16, "averages": {"ema": EMA(decay=0.9)}}),
        ("bf16", {"master_dtype": torch.int16, "state_dtype": torch.float32}),
    ],
)
def test_one_process_has_the_bytes_of_the_real_optimizer(dtype: str, options: dict[str, Any]) -> None:
    model = Uneven()
    if dtype == "bf16":
        model = model.bfloat16()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = DistAdamW(params, **options)
    model(torch.ones(1, 389, dtype=params[0].dtype)).backward()
    optimizer.step()
    memory = cost_of(ONE, read_model(model), 1, Setup(**options)).memory
    tied = model.tied.weight.nbytes
    assert memory.state == sum(one.nbytes for one in optimizer.shards)
    assert memory.gradients == sum(param.grad.nbytes for param in params if param.grad is not None)
    assert memory.parameters == sum(param.nbytes for param in model.parameters())
    assert memory.total == memory.parameters + memory.gradients + memory.state + 2 * tied  # two terms, and their sum


def test_state_is_divided_to_the_element_and_fsdp2_pads_rows() -> None:
    model = read_model(Uneven())
    layout = FlatLayout(tuple(param.numel for param in model.trained), 3)
    steps = 4 * len(model.trained)
    assert cost_of(DDP, model, 3, Setup()).memory.state == 8 * layout.shard_numel + steps
    padded = sum(-(-param.shape[0] // 3) * (param.numel // param.shape[0]) for param in model.parameters)
    assert cost_of(FSDP2, model, 3, Setup()).memory.parameters == 4 * padded


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_bytes_sent(ranks: int) -> None:
    model, f, weights = shapes(), (ranks - 1) / ranks, 4 * shapes().numel
    layers = sum(param.nbytes for param in model.parameters if param.layer is not None)
    for accumulation in (1, 4):
        plain, ordered = Setup(accumulation=accumulation), Setup(accumulation=accumulation, reproducible=True)
        expected = [
            (DDP, plain, 2 * weights),
            (DDP, ordered, (accumulation + 1) * weights),
            (TORCH_DDP, plain, 2 * weights),
            (FSDP2, plain, accumulation * (weights + layers) + weights),
            (FSDP2, ordered, accumulation * (2 * weights + layers)),
            ("ZeRO-1", plain, 3 * weights),
            ("ZeRO-2", plain, (2 * accumulation + 1) * weights),
        ]
        for engine, setup, nbytes in expected:
            assert cost_of(engine, model, ranks, setup).sent == pytest.approx(f * nbytes, rel=0.01), engine


def test_parameters_of_the_threshold_are_persistent() -> None:
    """DeepSpeed: ``param.ds_numel <= param_threshold``."""
    model = ModelShapes("two", (Parameter("a", (100,), torch.float32), Parameter("b", (101,), torch.float32)))
    cost = cost_of("ZeRO-3", model, 2, Setup(param_persistence_threshold=100))
    assert cost.memory.parameters == 4 * (50 + 51 + 100)
    gathers = 2 * 102 - 102 + 100  # b is used again at once, and a is gathered after step
    assert cost.sent == 4 * (gathers + 100 + 102) // 2


def test_zero_1_keeps_averages_of_its_partition_and_reduces_after_the_pass() -> None:
    memory = cost_of("ZeRO-1", read_model("1B"), 8, Setup(reduce_bucket_size=50_000_000)).memory
    assert memory.gradients < 4e9 / 4
    assert memory.gradients + memory.staging > 4e9


def test_options_change_what_they_should() -> None:
    model = read_model("1B")
    base = cost_of(DDP, model, 8, Setup())

    def difference(**options: Any) -> Any:
        other = cost_of(DDP, model, 8, Setup(**options))
        return {name: getattr(other.memory, name) - getattr(base.memory, name) for name in ("state", "gradients")}

    assert difference(averages={"ema": EMA(decay=0.9)})["state"] == pytest.approx(4e9 / 8, rel=1e-4)
    assert difference(reproducible=True)["gradients"] == pytest.approx(-4e9 * 7 / 8, rel=1e-4)
    assert cost_of(FSDP2, model, 8, Setup(accumulation=2)).memory.staging > 4e9  # whole gradients
    gathered = cost_of(FSDP2, model, 8, Setup(reshard_after_forward=False)).memory.staging
    assert gathered > 4e9 > cost_of(FSDP2, model, 8, Setup()).memory.staging


def test_large_numbers_are_planned_at_once() -> None:
    found = plan("1M", ranks=[8], batch_size=32 << 40, micro_batch_size=1)
    few = plan("1M", ranks=[8], batch_size=32, micro_batch_size=1)
    assert [cost.memory for cost in found.by_ranks[0].costs] == [cost.memory for cost in few.by_ranks[0].costs]
    assert plan("1M", ranks=[10**6], setup=Setup(accumulation=10**9, reproducible=True)).by_ranks[0].costs


def test_partial_sums_are_those_of_the_real_sums() -> None:
    one = torch.zeros(1)
    for rounds, terms in [(n, m) for n in range(1, 20) for m in range(1, 20)] + [(40, 24), (3, 100)]:
        sums = TreeSum(1, dtype=one.dtype, device=one.device)
        for _ in range(rounds):
            sums.add(terms, [(0, [one] * terms)])
        sums.write([(0, torch.zeros(1))], 1)
        assert num_sums(rounds, terms) == sums.num_sums, (rounds, terms)


def test_the_parameters_that_touch_a_partition() -> None:
    sizes = [3, 40, 1, 7, 100, 0, 2, 5]
    model = ModelShapes("", tuple(Parameter(str(n), (size,), torch.float32) for n, size in enumerate(sizes)))
    owners = [n for n, size in enumerate(sizes) for _ in range(size)]
    for partition in (1, 2, 3, 7, 50, 200):
        touching = [set(owners[start : start + partition]) for start in range(0, len(owners), partition)]
        found = _partitions(model, partition)
        assert {frozenset(some) for some in found.values()} == {frozenset(some) for some in touching}
        assert all(found[rank] == touching[rank] for rank in found)


def test_the_fewest_ranks_that_fit() -> None:
    found = plan("7B", ranks=[8], memory=80 * GIB, setup=Setup(activations=8 * GIB))
    by_engine = {fit.engine: fit for fit in found.fits}
    assert by_engine.keys() == ENGINES.keys()
    assert not by_engine[ONE].fits
    assert not by_engine[TORCH_DDP].fits
    assert by_engine[FSDP2].fits
    for engine, fit in by_engine.items():
        assert fit.fits == (fit.cost.memory.total <= 80 * GIB)
        if fit.fits and fit.cost.ranks > 2:
            fewer = cost_of(engine, found.model, fit.cost.ranks - 1, found.setup)
            assert fewer.memory.total > 80 * GIB
    assert "none" in str(found)


def test_the_fewest_ranks_divide_the_batch() -> None:
    found = plan("7B", ranks=[7, 8], memory=40 * GIB, batch_size=48, micro_batch_size=2, total_samples=4800)
    assert all(24 % fit.cost.ranks == 0 for fit in found.fits)
    seven, eight = found.by_ranks
    assert "48 is not a multiple of micro_batch_size x data_parallel_size = 2 x 7 = 14" in seven.problem
    assert not seven.costs
    assert eight.batch is not None
    assert eight.batch.gradient_accumulation_steps == 3
    assert found.schedule.updates == 100
    assert "48 samples = 2 per micro-batch x 3 accumulation steps x 8 ranks" in str(found)
    assert seven.problem in str(found)


# ---------------------------------------------------------------- schedules and recipes


def scheduler(**options: Any) -> CyclicLRWithRestarts:
    optimizer = DistAdamW([torch.zeros(1)], averages={"ema": EMA(decay=0.9)}, **options)
    return CyclicLRWithRestarts(optimizer, {0: 32, 6400: 64}, 640, 5, 2.0)


def test_a_scheduler_gives_restarts_updates_and_state() -> None:
    found = plan("1M", ranks=[2], scheduler=scheduler(amsgrad=True), micro_batch_size=8, total_samples="15 epochs")
    preview = scheduler().preview(total_samples="15 epochs")
    assert str(preview) in str(found)
    assert found.schedule.updates == 200 + 50
    assert found.by_ranks[0].batch is not None
    assert found.by_ranks[0].batch.size == 64  # the largest
    assert (found.setup.amsgrad, list(found.setup.averages)) == (True, ["ema"])
    assert costs(found, 2)[DDP].memory.state == pytest.approx(16 * 1_000_000 / 2, rel=0.01)


def test_a_recipe() -> None:
    recipe = load_recipe(
        {
            "optimizer": {"master_dtype": "int16", "no_decay": "norms_and_biases"},  # needs the names of a module
            "scheduler": {"epoch_size": 640, "restart_period": 5},
            "batch": {"size": 32, "micro_batch_size": 4},
            "training": {"total_samples": 6400},
        }
    )
    found = plan(f"{HERE}:gpt", ranks=[2], recipe=recipe, dtype="bf16")
    assert (found.schedule.updates, found.setup.master_dtype) == (200, torch.int16)
    assert found.by_ranks[0].batch is not None
    assert found.by_ranks[0].batch.gradient_accumulation_steps == 4
    assert plan("1M", ranks=[2], recipe=recipe, micro_batch_size=16).by_ranks[0].batch.size == 32  # type: ignore[union-attr]
    without = load_recipe({"scheduler": {"epoch_size": 640}})
    assert plan("1M", ranks=[2], recipe=without, batch_size=64, total_samples=6400).schedule.updates == 100
    with pytest.raises(ValueError, match="leave batch_size out"):
        plan("1M", recipe=recipe, batch_size=64)
    with pytest.raises(ValueError, match="not both"):
        plan("1M", recipe=recipe, scheduler=scheduler())


# ---------------------------------------------------------------- the command


def test_the_command_returns_text_and_plain_data() -> None:
    options: dict[str, Any] = {"batch_size": 64, "micro_batch_size": 4, "total_samples": "6.4e3"}
    text, data = plan_command(
        "1.3B", ranks="1,4", memory="24GiB", activations="2GiB", mixed_precision="bf16", **options
    )
    assert json.loads(json.dumps(data)) == data
    four = {engine["engine"]: engine for engine in data["ranks"][1]["engines"]}
    assert four.keys() == ENGINES.keys() - {ONE}
    for engine in four.values():
        memory = engine["memory"]
        assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
        assert memory["activations"] == 2 * GIB
        assert in_units(memory["total"]) in text
    assert data["schedule"]["updates"] == 100
    assert "Activations are as given" in text
    assert "Activations are not known here" in plan_command("1M", ranks="1")[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": "two"}, "ranks must be whole numbers.*'two'"),
        ({"ranks": "0"}, "ranks must be .*above 0, got 0"),
        ({"memory": "80 apples"}, "memory must be a size with its unit.*80 apples"),
        ({"memory": "0B"}, "memory must be .*above 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be no or bf16, got 'fp8'"),
        ({"device": "tpu"}, "device must be cuda or cpu, got 'tpu'"),
        ({"accumulation": 0}, "accumulation must be .*above 0, got 0"),
        ({"batch_size": 1.5}, "batch_size must be .*1.5"),
        ({"total_samples": "3 epochs"}, "'3 epochs' needs a recipe"),
        ({"master_dtype": "int8"}, "master_dtype must be .*'int8'"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_command("1M", **options)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("80GiB", 80 * GIB),
        ("80 GB", 80 * 10**9),
        ("1.5MiB", 3 << 19),
        ("512B", 512),
        (512, 512),
        ("512", 0),
        ("1k", 0),
        ("9" * 400 + "B", 0),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    if not nbytes:
        with pytest.raises(ValueError, match="a size with its unit"):
            read_bytes("memory", text)
    else:
        assert read_bytes("memory", text) == nbytes


def test_unknown_engines() -> None:
    with pytest.raises(ValueError, match=r"'FSDP1'\. Engines are one process, .*ZeRO-3"):
        plan("1M", engines=["FSDP1"])
    assert [fit.engine for fit in plan("1M", ranks=[2], memory=GIB, engines=[FSDP2]).fits] == [FSDP2]


# ---------------------------------------------------------------- real engines


def test_peaks_of_the_process_that_were_measured_on_cpus() -> None:
    """Resident memory of `benchmarks.isolated`, in which Python's objects are small beside the model."""
    layers = [
        Parameter(f"{n}.{k}", shape, torch.float32, layer=n)
        for n, layer in enumerate(WORKLOADS["gpt"])
        for k, shape in enumerate(layer)
    ]
    model, checked = ModelShapes("gpt", tuple(layers)), set()
    for record in records.read([ROOT / "benchmarks" / "results" / "2026-11-30-sums-inside-the-rank.jsonl"]):
        if record["kind"] == "isolated" and record["workload"] == "gpt" and record["engine"] == OURS:
            peak = max(one["peak"] for one in record["bytes_by_rank"])
            planned = cost_of(DDP, model, record["ranks"], Setup(device="cpu")).memory.total
            assert planned / peak == pytest.approx(1, abs=TOLERANCE)
            checked.add(record["ranks"])
    assert checked == {2, 4}


def measured(engine: str, model: str, setup: dict[str, Any]) -> records.Record:
    return measure(engine, model, Setup(**setup))


@pytest.mark.parametrize(("model", "accumulation"), [("GPT", 2), ("tied", 1)])
def test_one_process_is_measured_as_planned(model: str, accumulation: int) -> None:
    found = ratios(measured(ONE, model, {"accumulation": accumulation}))
    assert found["peak"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("engine", "model", "setup"),
    [
        (DDP, "GPT", {"accumulation": 2}),
        (FSDP2, "GPT", {"accumulation": 2}),
        (FSDP2, "GPT", {"reshard_after_forward": False}),
        ("ZeRO-2", "tied", {**SMALL_BUCKETS, "accumulation": 2}),
        ("ZeRO-3", "tied", SMALL_BUCKETS),
    ],
)
def test_two_ranks_are_measured_as_planned(engine: str, model: str, setup: dict[str, Any]) -> None:
    found = ratios(largest(run_ranks(2, measured, engine, model, setup)))
    assert found.keys() == {"peak", "sent"}
    for name, ratio in found.items():
        assert ratio == pytest.approx(1, abs=0.02), name
