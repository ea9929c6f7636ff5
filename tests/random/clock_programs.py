"""Random programs for the clock: their making, their shrinking, and how they read.

A program is plain data: a configuration, and a list of actions (the methods of `clock_jobs.Job`). ``resume`` actions
part it into jobs, each of which goes on from what the one before has saved.

What is left out, because no clock could know it: a batch that is not trained on but is in hand, handed out with
gradients on, while another one's gradients are made. So a second loader whose iterator stays open does not meet
dropped gradients, after which its batch may be tried again. What is left out because it is the place in the data that
is looked at there, not the clock: what makes the place of a job that goes on with another number of ranks depend on
more than whole updates, and `rest_of_epoch` where batches have no fixed size.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.random.clock_data import draws_of

Program = dict[str, Any]

SAMPLERS = ["sequential", "shuffle", "shuffle", "shuffle", "replacement", "weighted", "subset"]
FORMS = ["row", "tuple", "dict", "list", "packed"]


def make(seed: int, world: int) -> Program:
    """A program that a user could have written, and that no rank waits in for ever."""
    rng = random.Random(f"{seed}/{world}")
    rows, batch = rng.randint(5, 40), rng.randint(1, 8)
    kind = rng.choices(["map", "sized", "stream"], [6, 2, 1])[0]
    dispatch = rng.choices([None, True, False], [6, 2, 2])[0]
    dispatched = dispatch or (dispatch is None and kind != "map")
    data: dict[str, Any] = {
        "kind": kind,
        "rows": rows,
        "batch": batch,
        "sampler": rng.choice(SAMPLERS + ["uneven batches"] * (world == 1)) if kind == "map" else "none",
        "form": rng.choice(FORMS[:3] if kind != "map" or dispatched else FORMS),
        "draws": rng.randint(5, 60),
        "batch_sampler": rng.random() < 0.2,
    }
    if kind == "sized" and rng.random() < 0.1:
        data["lie"] = rng.choice([-2, 3])
    if kind == "map" and rng.random() < 0.004:
        data["workers"] = 2
    program: Program = {
        "world": world,
        "data": data,
        "split": rng.random() < 0.15,
        "dispatch": dispatch,
        "accumulation": rng.choice([1, 1, 2, 2, 3, 4, 5]),
        "cross": rng.random() < 0.1,
        "loop": rng.choices(["accumulate", "hand"], [4, 1])[0],
        "max_norm": rng.choice([None, 1.0]),
        "optimizer": rng.choices(["DistAdamW", "AdamW"], [3, 1])[0],
        "steps": rng.choices(["each", "sync", "twice", "epoch"], [6, 2, 1, 1])[0],
        "epoch_size": rows if kind == "stream" or rng.random() < 0.3 else None,
        "second": None,
    }
    if program["split"]:
        data["batch"] = batch = batch * world
    data["drop_last"] = rng.random() < 0.3 and rows // 2 >= 2 * batch * world * 5
    if rng.random() < 0.4 and data["sampler"] != "uneven batches":
        size = rng.randint(1, 8) * (world if program["split"] else 1)
        program["second"] = {"rows": rng.choice([None, rng.randint(5, 40)]), "batch": size, "drop_last": False}
    program["actions"] = list(_actions(rng, program))
    return program


def _actions(rng: random.Random, program: Program) -> Iterator[list[Any]]:
    data, world = program["data"], program["world"]
    resumes = rng.random() < 0.15 and data["sampler"] != "uneven batches" and "lie" not in data
    resumes = resumes and data["sampler"] not in ("replacement", "weighted")
    if resumes:
        program["epoch_size"] = data["rows"]
        program["cross"] = program["cross"] and world == 1
    worlds = [world]
    if resumes:
        fixed = data["kind"] != "map" or program["split"] or program["cross"]
        worlds += [world if fixed or rng.random() < 0.7 else 3 - world]
    several = max(worlds) > 1
    simple = resumes and several  # the place in an epoch must be known to tell what is repeated
    rest = simple or (rng.random() < (0.5 if resumes else 0.15) and data["sampler"] != "uneven batches")
    if simple:
        program["loop"] = "accumulate"
    program["drops"] = program["second"] is None or rng.random() < 0.5
    for number, ranks in enumerate(worlds):
        if number:
            resume = {"world": ranks, "accumulation": rng.choice([1, 2, 3, 4])}
            yield ["resume", resume]
            rest = True
        for i in range(rng.randint(1, 3)):
            stops = resumes and not number and not i
            if not (stops or simple):
                yield from _between(rng, program, rest, ranks)
            yield ["epoch", _epoch(rng, program, rest, ranks, stops, simple)]
            if stops:
                break


def _between(rng: random.Random, program: Program, rest: bool, world: int) -> Iterator[list[Any]]:
    """Actions between two epochs."""
    if rng.random() < 0.6:
        return
    data = program["data"]
    unit = world if program["split"] else 1
    choices: list[list[Any]] = [
        ["eval", rng.choice(["outside", "inside", "none"]), rng.choice([None, 1, 2])],
        ["accumulate", rng.choice([1, 2, 3, 4, 5])],
        ["probe"],
    ]
    if program["drops"]:
        choices.append(["zero"])
    if not rest:
        choices += [["peek"], ["overfit", rng.randint(1, 4)], ["grow", rng.randint(1, 5)]]
        if data["sampler"] not in ("uneven batches", "replacement", "weighted"):
            choices.append(["again", rng.choice([None, rng.randint(5, 40)]), rng.randint(1, 8) * unit])
    if program["second"] is not None:
        choices += [["epoch", {"of": "second", "stop": rng.choice([None, None, 1, 2, 3])}]]
    yield rng.choice(choices)


def _epoch(rng: random.Random, program: Program, rest: bool, world: int, stops: bool, simple: bool) -> dict[str, Any]:
    data = program["data"]
    rows = draws_of(data, data["rows"])
    batches = max(1, -(-rows // (data["batch"] if program["split"] else data["batch"] * world)))
    options: dict[str, Any] = {"how": "rest" if rest else "loader", "at": []}
    skippable = not rest and not simple and (world == 1 or not program["dispatch"])
    dispatched = program["dispatch"] or (program["dispatch"] is None and data["kind"] != "map")
    if skippable and not (world > 1 and dispatched) and batches > 1 and rng.random() < 0.1:
        options["how"] = ["skip", rng.randint(1, batches - 1)]
    if rng.random() < 0.3 and not (rest and (dispatched or world > 1)):
        options["stop"] = rng.randint(1, batches)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        options["at"].append([rng.randrange(batches), *_event(rng, program, rest or simple, world, simple)])
    if stops:
        options["at"].append([rng.randrange(batches), "stop", "end" if simple else rng.choice(["end", "top"])])
        options.pop("stop", None)
    options["at"].sort(key=lambda event: event[0])
    return options


def _event(rng: random.Random, program: Program, fixed: bool, world: int, simple: bool) -> list[Any]:
    data = program["data"]
    choices: list[list[Any]] = [
        ["cut", rng.randint(2, 4)],
        ["twice"],
        ["eval_top", "outside", rng.choice([None, 1])],
        ["eval_end", rng.choice(["outside", "inside", "none"]), rng.choice([None, 1, 2])],
        ["probe"],
        ["grad"],
        ["clock"],
    ]
    if program["drops"] and not simple:
        choices += [["sam"], ["zero"], ["zero_model"] if world == 1 else ["zero"]]
        if program["max_norm"] is not None:
            choices += [["inf", rng.choice([None, *range(world)])]] * 2
    if not simple:
        choices += [["pieces", rng.randint(2, 4)], ["accumulate", rng.choice([1, 2, 3, 4])]]
        choices += [["continue"], ["continue_in"]] * 2
        if world > 1:
            choices += [["continue_on", rng.randrange(world)]] * 2
    if not (fixed or data["sampler"] == "shuffle"):  # torch's sampler draws some twice then
        choices.append(["grow", rng.randint(1, 4)])
    if not program["drops"]:
        choices += [["joint"], ["joint"] if simple else ["also"]] * 2
    return rng.choice(choices)


# ---------------------------------------------------------------------------------------------- shrinking


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 300) -> Program:
    """A smaller program that fails too."""
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for candidate in _smaller(program):
            tries -= 1
            if tries < 0:
                break
            if fails(candidate):
                program, smaller = candidate, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for i in range(len(program["actions"])):
        yield _changed(program, lambda p, i=i: p["actions"].pop(i))
    for i, action in enumerate(program["actions"]):
        if action[0] != "epoch":
            continue
        for j in range(len(action[1].get("at", []))):
            yield _changed(program, lambda p, i=i, j=j: p["actions"][i][1]["at"].pop(j))
        for name, plain in (("stop", None), ("how", "loader"), ("how", "rest")):
            if action[1].get(name, plain) not in (plain, "rest"):
                yield _changed(program, lambda p, i=i, n=name, v=plain: p["actions"][i][1].update({n: v}))
    plain_values = {
        "second": None,
        "dispatch": None,
        "split": False,
        "cross": False,
        "loop": "accumulate",
        "optimizer": "DistAdamW",
        "steps": "each",
        "max_norm": None,
        "epoch_size": None,
        "accumulation": 1,
    }
    for name, value in plain_values.items():
        if program[name] != value:
            yield _changed(program, lambda p, n=name, v=value: p.update({n: v}))
    data = program["data"]
    for name, value in (("sampler", "sequential"), ("form", "row"), ("workers", 0), ("kind", "map"), ("lie", 0)):
        if data.get(name, value) not in (value, "none"):
            yield _changed(program, lambda p, n=name, v=value: p["data"].update({n: v}))
    for name in ("drop_last", "batch_sampler"):
        if data[name]:
            yield _changed(program, lambda p, n=name: p["data"].update({n: False}))
    for rows in (data["rows"] // 2, data["rows"] - 1):
        if rows >= 2 * data["batch"]:
            yield _changed(program, lambda p, n=rows: p["data"].update(rows=n))
    for batch in (2, data["batch"] - 1):
        if 0 < batch < data["batch"] and not program["split"]:
            yield _changed(program, lambda p, n=batch: p["data"].update(batch=n))
    if program["accumulation"] > 2:
        yield _changed(program, lambda p: p.update(accumulation=p["accumulation"] - 1))


def _changed(program: Program, change: Callable[[Program], Any]) -> Program:
    copied = copy.deepcopy(program)
    change(copied)
    return copied


# ---------------------------------------------------------------------------------------------- reading


def script(program: Program) -> str:
    """The program as a sketch of a script."""
    data = {k: v for k, v in program["data"].items() if v and v != "none"}
    if data.get("sampler") not in ("replacement", "weighted"):
        data.pop("draws", None)
    options = {
        k: v for k, v in program.items() if k not in ("data", "actions", "world", "drops") and v not in (None, False)
    }
    lines = [
        f"# {program['world']} rank(s); {', '.join(f'{k}={v}' for k, v in options.items())}",
        f"loader = prepared({', '.join(f'{k}={v}' for k, v in data.items())})",
    ]
    for name, *arguments in program["actions"]:
        if name != "epoch":
            lines.append(f"{name}({', '.join(map(str, arguments))})")
            continue
        how, of = arguments[0].get("how", "loader"), arguments[0].get("of", "first")
        loader = "loader" if of == "first" else "second"
        loop = {"loader": loader, "rest": f"rest_of_epoch({loader})"}.get(
            str(how), f"skip_first_batches(loader, {how[1]})"
        )
        lines.append(f"for k, batch in enumerate({loop}):")
        lines += [
            f"    if k == {k}: {event}({', '.join(map(str, rest))})" for k, event, *rest in arguments[0].get("at", [])
        ]
        lines.append("    train(batch)")
        if arguments[0].get("stop"):
            lines.append(f"    if k == {arguments[0]['stop'] - 1}: break")
    return "\n".join(lines)
