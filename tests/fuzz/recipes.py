"""Arguments of the schedule and of the optimizer, DeepSpeed's JSON, and configurations of the main job.

Each function takes one input. It returns how it ended, or raises `Wrong`. `Values` are what hypothesis draws from.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dist_adamw import CyclicLRWithRestarts, DistAdamW, ExpReduceMaxLROnIteration, ReduceMaxLROnRestart
from dist_adamw.integrations.deepspeed.configuration import _optimizer_from_json, _scheduler_from_json
from dist_adamw.schedule.policies import POLICIES
from tests.conftest import ROOT
from tests.fuzz.judge import REFUSED, RIGHT, Tally, Wrong, check_sentence

LOOKUP = 0.05  # seconds
Arguments = dict[str, Any]

_EDGES = [
    *(0, -1, 1, 2**31, 2**63, 10**30, 10**400, -(10**400), True, False, None, math.nan, math.inf, -math.inf),
    *(-0.0, 5e-324, 2.3e-308, 1e-300, 1e300, 1.7e308, 1 - 2**-53, 1 + 2**-52, 0.999999, 1.0000001, 1e-9, 1e15),
    *("", "auto", "x", "nan", "1e999999999", "1e-999999999", "1/3", "1/0", "9" * 1500, "0x10", "1_0", " 2 ", "٣"),
    *(Fraction(1, 3), Fraction(10**300, 10**300 + 1), Fraction(-1), 1j, b"1", [], [1], (0.9, 0.99), {}, object()),
]
ANY = st.sampled_from(_EDGES) | st.floats() | st.integers() | st.fractions() | st.text(max_size=6)
NUMBER = st.floats(1e-3, 1e3) | st.floats(0, 1) | st.integers(1, 100) | st.fractions(Fraction(1, 50), 50) | ANY
COUNT = st.integers(1, 5000) | st.sampled_from([1, 10**6, 10**12, 10**18]) | ANY
LENGTH = st.sampled_from(
    ["0", "0 epochs", "1 epoch", "2.5 epochs", "300", "7 updates", "5 tokens", "50%", "1/3 epochs"]
)
BATCHES = st.dictionaries(
    st.integers(1, 5000) | LENGTH | ANY.filter(lambda key: not isinstance(key, list | dict)), COUNT, max_size=3
).map(lambda later: {0: 10, **later})
RECIPE: dict[str, st.SearchStrategy[Any]] = {
    "batch_size": COUNT | BATCHES,
    "epoch_size": COUNT,
    "restart_period": NUMBER,
    "t_mult": NUMBER | st.sampled_from([1, 2, 1.5, 0.5, 0.9, 1.1, 1.000001, 0.999]),
    "policy": st.sampled_from([*POLICIES]) | ANY,
    "policy_fn": st.none() | st.sampled_from([math.cos, lambda _: math.nan, lambda tau: 1 - tau]) | ANY,
    "min_lr": st.floats(0, 1e-3) | ANY,
    "gamma": st.floats(0.5, 1.0) | ANY,
    "triangular_step": st.floats(0, 1) | ANY,
    "min_restart_period": st.none() | NUMBER,
    "warmup_samples": st.integers(0, 5000) | ANY,
    "warmup_start_lr": st.floats(0, 1e-2) | ANY,
    "eta_on_restart_cb": st.none() | st.builds(ReduceMaxLROnRestart, st.floats(0, 1)),
    "eta_on_iteration_cb": st.none() | st.builds(ExpReduceMaxLROnIteration, st.floats(0.1, 1)),
    "normalize_weight_decay": st.sampled_from(["auto", True, False]) | ANY,
    "weight_decay_exponent": st.floats(0, 2) | ANY,
    "lr_scaling": st.sampled_from([None, "sqrt", "linear"]) | ANY,
    "stream": st.booleans(),
}
OPTIMIZER: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.floats(0, 1) | ANY,
    "betas": st.tuples(st.floats(0, 1), st.floats(0, 1)) | st.tuples(ANY, ANY) | ANY,
    "eps": st.floats(0, 1) | ANY,
    "weight_decay": st.floats(0, 1) | ANY,
    "amsgrad": st.booleans(),
    "decay_by": st.sampled_from(["lr", "schedule"]) | ANY,
    "max_grad_norm": st.none() | st.floats(0, 10) | ANY,
    "master_dtype": st.sampled_from([None, torch.float32, torch.int16]) | ANY,
    "state_dtype": st.sampled_from([None, torch.float32, torch.bfloat16]) | ANY,
    "shard": st.sampled_from(["auto", False]) | ANY,
    "fused": st.sampled_from([None, True, False]),
    "bucket_numel": st.none() | st.integers(1, 10**6) | ANY,
}

_NUMBERS = (int, float, Fraction)
_NOT_NUMBERS = {"policy", "policy_fn", "decay_by", "master_dtype", "state_dtype", "shard", "lr_scaling"}


def some_of(strategies: dict[str, st.SearchStrategy[Any]], needed: Arguments) -> st.SearchStrategy[Arguments]:
    """A few of the arguments, and the needed ones, which may be among them."""
    return st.lists(st.sampled_from(sorted(strategies)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries(
            {**{k: st.just(v) for k, v in needed.items()}, **{n: strategies[n] for n in names}}
        )
    )


def plain_ones(arguments: Arguments) -> Arguments:
    """Those that JSON can say."""
    return {k: v for k, v in arguments.items() if isinstance(v, str | int | float | list | None)}


RECIPES = st.tuples(
    some_of(RECIPE, {"batch_size": 10, "epoch_size": 100, "restart_period": 2}),
    st.just({}) | some_of(OPTIMIZER, {}),
)
PLAIN = ANY.filter(lambda value: isinstance(value, str | int | float | list | dict | None))
PLAINLY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)
JSON = st.one_of(
    st.tuples(st.just("scheduler"), some_of({k: v for k, v in RECIPE.items() if "_cb" not in k}, {}).map(plain_ones)),
    st.tuples(st.just("optimizer"), some_of(OPTIMIZER, {}).map(plain_ones)),
    st.tuples(
        st.sampled_from(["optimizer", "scheduler"]),
        st.dictionaries(
            st.sampled_from([*RECIPE, *OPTIMIZER, "params", "self", "mesh"]) | st.text(max_size=8), PLAINLY
        ),
    ),
)


def recipe(recipe: Arguments, options: Arguments) -> str:
    """Build both, or get an error; then evaluate the schedule, and update once."""
    weight = torch.nn.Parameter(torch.ones(3))
    try:
        optimizer = DistAdamW([weight], **options)
        scheduler = CyclicLRWithRestarts(optimizer, **recipe)
    except TypeError as error:
        return _of_python(error, {**recipe, **options})
    except ValueError as error:
        return check_sentence(error)
    return look_up(scheduler, recipe)


def _of_python(error: TypeError, arguments: Arguments) -> str:
    """A wrong type may be Python's to refuse; a number where one belongs, or a text, may not."""
    betas = arguments.pop("betas", (0.9, 0.9))
    right = isinstance(betas, tuple) and all(isinstance(beta, _NUMBERS) for beta in betas)
    if right and not any(isinstance(value, _NUMBERS) == (name in _NOT_NUMBERS) for name, value in arguments.items()):
        raise Wrong(f"all types are right, and there came a TypeError: {error}")
    return REFUSED


def look_up(scheduler: CyclicLRWithRestarts, recipe: Arguments) -> str:
    """Return how it ends. Raises if lr or the decay is out of bounds, or takes too long to compute."""
    if scheduler.epoch_size is None or scheduler.batch_size is None:
        try:
            scheduler.preview()
        except ValueError as error:
            return check_sentence(error)
        raise Wrong("a schedule without a batch or an epoch")
    (base,) = scheduler._scheduled.bases()
    epoch, warmup = scheduler.epoch_size, int(recipe.get("warmup_samples", 0))
    lowest = min(base.min_lr, scheduler.schedule.warmup_start_lr if warmup else base.lr)
    highest = max(base.lr, scheduler.schedule.warmup_start_lr if warmup else 0.0)
    length = scheduler.schedule.cycle(0).length
    # A batch-size schedule may scale lr too.
    bounded = recipe.get("policy_fn") is None and len(scheduler._scheduled.recipe.batches.sizes) == 1
    edges = [math.floor(warmup + length * k) for k in (0, 1, 3)]
    far = (1, 10, 100, 1000) if recipe.get("eta_on_restart_cb") is None else ()  # that is called once a restart
    for samples in [0, 1, *edges, *(e + 1 for e in edges), *(epoch * k for k in far)]:
        if samples >= 1 << 62:
            continue
        begin = time.process_time()
        scheduler.go_to(samples=samples)
        took = time.process_time() - begin
        group = scheduler.optimizer.param_groups[0]
        lr, decay = group["lr"], group["weight_decay"]
        if not (math.isfinite(lr) and math.isfinite(decay) and decay >= 0):
            raise Wrong(f"at sample {samples} lr is {lr} and weight decay {decay}")
        scale = 1 + 1e-12
        if bounded and not lowest / scale <= lr <= highest * scale:
            raise Wrong(f"at sample {samples} lr is {lr}, not between {lowest} and {highest}")
        if took > LOOKUP:
            raise Wrong(f"looking up sample {samples} took {took:.3f} s")
    return RIGHT


def deepspeed(section: str, told: Arguments) -> str:
    """Build from the "params" of a DeepSpeed JSON."""
    optimizer = DistAdamW([torch.nn.Parameter(torch.ones(3))])
    try:
        if section == "optimizer":
            _optimizer_from_json([torch.nn.Parameter(torch.ones(3))], **told)
        else:
            scheduler = _scheduler_from_json(optimizer, **{"batch_size": 10, "epoch_size": 100, **told})
            if scheduler._scheduled.recipe.is_known:
                look_up(scheduler, {k: v for k, v in told.items() if k == "warmup_samples"})
    except ValueError as error:
        return check_sentence(error, f"DeepSpeed configuration, {section}.params")
    return RIGHT


def judge(kind: str, count: int, of_seed: int, progress: Callable[[], object]) -> Tally:
    """Draw ``count`` inputs of a kind."""
    tally = Tally(kind)
    function: Any = {"recipes": recipe, "json": deepspeed}[kind]

    @seed(of_seed)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given({"recipes": RECIPES, "json": JSON}[kind])
    def each(arguments: tuple[Any, Any]) -> None:
        tally.judge(lambda: f"{kind}: {arguments!r}", lambda: function(*arguments))
        progress()

    each()
    return tally


# ---------------------------------------------------------------------------------------------- configurations

_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
_PYTHON = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [CANARY]]"
_VALUES = [
    *("{0: 8, 16: 4}", "{0: 8, 1 epoch: 16}", "{1: 8, 2: 9}", "{0: 8, 2: x}", "{0: 8, 1e3: 5}", "{0: 8, .nan: 5}"),
    *("null", "true", "0", "-1", "1e400", ".nan", ".inf", "-.inf", "1e-3", "9" * 1500, "0x7f", "1_000", "2024-01-01"),
    *('"text"', "''", "[]", "[1, 2]", "{}", "{x: 1}", "~", "!!binary aGk=", "!!set {a}", "!!float 3", "!!int x"),
    *("&a [*a]", "*nowhere", "!!python/name:os.system", _PYTHON, "${oc.env:HOME}", '"\\0"', '"\\uD800"', "é", "|\n  x"),
    *(
        "{class_path: os.system}",
        "{class_path: pathlib.Path, init_args: {}}",
        "@CANARY",
        "- 1",
        "key: value",
        "[" * 3000,
    ),
]
_KEYS = ["recipe.lr", "recipe.betas", "recipe.policy", "recipe.t_mult", "recipe.restart_period", "recipe.max_grad_norm"]
_KEYS += ["recipe.cycles", "recipe.gamma", "recipe.warmup_samples", "recipe.decay_by", "run.keep", "run.overwrite"]
_KEYS += ["recipe.global_batch"] * 3
_KEYS += ["model.width", "model.heads", "model.dropout", "text.max_bytes", "text.held_out", "data", "out", "resume"]
_KEYS += ["model", "recipe", "run", "text", "recipe.nothing", "nothing", "recipe.lr.x", "config", "run.tracker"]


def configuration(rng: random.Random, folder: Path) -> tuple[list[str], str]:
    """A YAML file and a command line with something wrong, and what is wrong."""
    canary = str(folder / "canary")
    value = lambda: rng.choice(_VALUES).replace("CANARY", canary)  # noqa: E731
    text = rng.choice(sorted((ROOT / "configs/train").glob("*.yaml"))).read_text()
    lines = text.splitlines()
    arguments: list[str] = []
    how = rng.choice(["bytes", "value", "value", "line", "tag", "bomb", "command line", "command line", "twice"])
    if how == "bytes":
        content = bytearray(text.encode())
        from tests.fuzz.mutations import BYTES

        rng.choice(BYTES)(content, rng)
        (folder / "config.yaml").write_bytes(content)
        return ["--config", str(folder / "config.yaml")], f"bytes {bytes(content)!r}"
    if how in ("value", "tag", "twice"):
        n = rng.randrange(len(lines))
        key = lines[n].partition(":")[0]
        lines[n] = f"{key}: {value() if how != 'tag' else _PYTHON.replace('CANARY', canary)}"
        if how == "twice":
            lines.append(lines[n])
    elif how == "line":
        lines.insert(rng.randrange(len(lines) + 1), rng.choice([f"  {value()}", f"{rng.choice(_KEYS)}: {value()}"]))
    elif how == "bomb":
        lines = [_BOMB, *lines, "data: *i", "model: *i" if rng.random() < 0.5 else ""]
    else:
        for _ in range(rng.choice([1, 1, 2])):
            arguments += [f"--{rng.choice(_KEYS)}", value()][: rng.choice([1, 2, 2, 2])]
    (folder / "config.yaml").write_text("\n".join(lines), errors="surrogatepass")
    return ["--config", str(folder / "config.yaml"), *arguments], f"{how}: {arguments or lines}"


def configure(arguments: list[str], folder: Path) -> str:
    """Read a configuration, and build the recipe that it asks for."""
    from options import parse

    try:
        config = parse(arguments)
        model = torch.nn.Linear(2, 2)
        scheduler = config.recipe.make_scheduler(config.recipe.make_optimizer(model))
        scheduler.batch_size, scheduler.epoch_size = config.recipe.global_batch, 1000
        config.shaping()
    except ValueError as error:
        end = check_sentence(error)
    else:
        end = RIGHT
        if not (type(config.recipe.lr) is float and type(config.model.width) is int and type(config.run.keep) is int):
            raise Wrong(f"of other types than promised: {config}")
    if (folder / "canary").exists():
        raise Wrong("the configuration was executed")
    return end


def judge_configurations(count: int, of_seed: int, first: int, folder: Path, progress: Callable[[], object]) -> Tally:
    tally = Tally("configs")
    for i in range(first, first + count):
        arguments, how = configuration(random.Random(f"{of_seed} {i}"), folder)
        again = f"--only configs --seed {of_seed} --first {i} --inputs 1"
        tally.judge(
            functools.partial("{}: {}".format, again, how[:300]), functools.partial(configure, arguments, folder)
        )
        progress()
    return tally
