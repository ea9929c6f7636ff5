"""Make, shrink and print random programs for the clock.

A program is plain data: a configuration, and a list of actions (the methods of `clock_jobs.Job`). ``resume`` actions
split it into jobs, each of which continues from what the previous one saved.

`is_legal` excludes what Accelerate alone cannot run, and what no clock can know: a batch that is in hand but not
trained on, handed out with gradients enabled, while another batch's gradients are computed. So a second loader with an
open iterator is not combined with dropped gradients, after which its batch may be tried again. Nor is `rest_of_epoch`
with batches without a fixed size, or with rows that cannot be distinguished.
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


def jobs_of(program: Program) -> list[list[Any]]:
    """The actions of each job."""
    jobs: list[list[Any]] = [[]]
    for action in program["actions"]:
        if action[0] == "resume":
            jobs.append([])
        jobs[-1].append(action)
    return jobs


def world_of(program: Program, number: int) -> int:
    """Ranks of a job."""
    return jobs_of(program)[number][0][1]["world"] if number else program["world"]


def dispatches(program: Program) -> bool:
    """Whether rank 0 reads for all ranks."""
    return bool(program["data"]["kind"] != "map" if program["dispatch"] is None else program["dispatch"])


def make(seed: int, world: int) -> Program:
    """Return whether a user could have written the program, and no rank waits forever in it."""
    rng = random.Random(f"{seed}/{world}")
    while not is_legal(program := _draft(rng, world)):
        pass
    return program


def is_legal(program: Program) -> bool:
    """Whether Accelerate alone runs a program.

    It raises ValueError where rank 0 reads for all ranks and has no batch, and with ``even_batches=False`` ranks that
    have different numbers of batches wait for each other, as do ranks of which one leaves out what others do together.
    `prepare` refuses the latter at once, by what the loader has then, and `rest_of_epoch` needs the loader that it
    returned.
    """
    # After a forward pass without a backward pass, also an evaluation with gradients on, DDP averages in the next
    # backward pass even inside no_sync. A rank that leaves that one out alone then pairs other passes, and waits for
    # ever where rank 0 sends the next batch: also without anything of ours.
    alone = unfinished = False
    for number, actions in enumerate(jobs_of(program)):
        data, world = dict(program["data"]), world_of(program, number)
        is_prepared = True
        if number:
            data.update(batch=actions[0][1].get("batch", data["batch"]))
        if not _is_even(program, data, world):
            return False
        for name, *arguments in actions:
            if name == "grow":
                data["rows"] += arguments[0]
            elif name == "again":
                data.update(rows=arguments[0] or data["rows"], batch=arguments[1])
                is_prepared = False
            unfinished = unfinished or (name == "eval" and arguments[0] == "none")
            if name in ("epoch", "peek", "overfit"):
                options = arguments[0] if name == "epoch" else {}
                if options.get("of") != "second" and not _is_legal_loop(program, data, options, world):
                    return False
                if program["second"] is not None:
                    if program["split"] and program["second"]["batch"] % world:
                        return False
                    second = {**data, **program["second"]}
                    second["rows"] = second["rows"] or data["rows"]
                    if not _is_legal_loop(program, second, {}, world):
                        return False
                if options.get("how") == "rest" and not is_prepared:
                    return False
                at = [(k, name) for k, name, *_ in options.get("at", [])]
                # A batch of fewer rows on one rank is cut into fewer backward passes, and DDP pairs other ones.
                if world > 1 and not program["even"] and any(name == "pieces" for _, name in at):
                    return False
                if any(name == "continue_on" and sum(k == other for other, _ in at) > 1 for k, name in at):
                    return False
                alone = alone or any(name == "continue_on" for _, name in at)
                unfinished = unfinished or any(
                    event[1] == "continue_in" or event[1:3] == ["eval_end", "none"] for event in options.get("at", [])
                )
                data["rows"] += sum(event[2] for event in options.get("at", []) if event[1] == "grow")
    return not (alone and unfinished)


def _is_legal_loop(program: Program, data: dict[str, Any], options: dict[str, Any], world: int) -> bool:
    if data["kind"] != "map":
        return True
    rows, size = draws_of(data, data["rows"]), data["batch"]
    batches = rows // size if data["drop_last"] else -(-rows // size)
    if dispatches(program):
        how = options.get("how", "loader")
        return batches > (how[1] if isinstance(how, list) else 0)
    return _is_even(program, data, world)


def _is_even(program: Program, data: dict[str, Any], world: int) -> bool:
    """Whether each rank has as many batches as the others."""
    if program.get("even", True) or data["kind"] != "map" or data["drop_last"] or dispatches(program):
        return True
    part = data["batch"] // world if program["split"] else data["batch"]
    return -(-draws_of(data, data["rows"]) // part) % world == 0


def _draft(rng: random.Random, world: int) -> Program:
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
        "even": rng.random() < 0.85,
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
    resumes = rng.random() < 0.2 and data["sampler"] != "uneven batches" and "lie" not in data
    resumes = resumes and data["sampler"] not in ("replacement", "weighted")
    worlds = [world]
    if resumes:
        program["epoch_size"] = data["rows"]
        worlds += [world if rng.random() < 0.7 else 3 - world]
        if program["split"] and max(worlds) > world:
            data["batch"] *= max(worlds)
    rest = rng.random() < (0.5 if resumes else 0.15) and data["sampler"] != "uneven batches"
    program["drops"] = program["second"] is None or rng.random() < 0.5
    for number, ranks in enumerate(worlds):
        if number:
            resume = {"world": ranks, "accumulation": rng.choice([1, 2, 3, 4])}
            if not data["drop_last"] and rng.random() < 0.3:
                resume["batch"] = rng.randint(1, 8) * (max(worlds) if program["split"] else 1)
            yield ["resume", resume]
            rest = True
        epochs = rng.randint(1, 3)
        for i in range(epochs):
            stops = resumes and not number and i == epochs - 1
            yield from _between(rng, program, rest, ranks, resumes)
            yield ["epoch", _epoch(rng, program, rest, ranks, stops, resumes)]


def _between(rng: random.Random, program: Program, rest: bool, world: int, resumes: bool) -> Iterator[list[Any]]:
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
        choices += [["peek"], ["overfit", rng.randint(1, 4)]]
    if not (rest or resumes):
        choices.append(["grow", rng.randint(1, 5)])
        if data["sampler"] not in ("uneven batches", "replacement", "weighted"):
            choices.append(["again", rng.choice([None, rng.randint(5, 40)]), rng.randint(1, 8) * unit])
    if program["second"] is not None:
        choices += [["epoch", {"of": "second", "stop": rng.choice([None, None, 1, 2, 3])}]]
    yield rng.choice(choices)


def _epoch(rng: random.Random, program: Program, rest: bool, world: int, stops: bool, resumes: bool) -> dict[str, Any]:
    data = program["data"]
    rows = draws_of(data, data["rows"])
    batches = max(1, -(-rows // (data["batch"] if program["split"] else data["batch"] * world)))
    options: dict[str, Any] = {"how": "rest" if rest else "loader", "at": []}
    if not rest and batches > 1 and rng.random() < 0.1:
        options["how"] = ["skip", rng.randint(1, batches - 1)]
    if rng.random() < 0.3:
        options["stop"] = rng.randint(1, batches)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        options["at"].append([rng.randrange(batches), *_event(rng, program, rest or resumes, world)])
    if stops and rng.random() < 0.3:  # after the loop
        if rng.random() < 0.5:
            options["at"].append([batches - 1, "continue"])
    elif stops:
        options["at"].append([rng.randrange(batches), "stop", rng.choice(["end", "top"])])
        options.pop("stop", None)
    options["at"].sort(key=lambda event: event[0])
    return options


def _event(rng: random.Random, program: Program, fixed: bool, world: int) -> list[Any]:
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
    if program["drops"]:
        choices += [["sam"], ["zero"], ["zero_model"] if world == 1 else ["zero"]]
        if program["max_norm"] is not None:
            choices += [["inf", rng.choice([None, *range(world)])]] * 2
    choices += [["pieces", rng.randint(2, 4)], ["accumulate", rng.choice([1, 2, 3, 4])]]
    choices += [["continue"], ["continue_in"]] * 2
    if world > 1:
        choices += [["continue_on", rng.randrange(world)]] * 2
    if not (fixed or data["sampler"] == "shuffle"):  # torch's sampler draws some twice then
        choices.append(["grow", rng.randint(1, 4)])
    if not program["drops"]:
        choices += [["joint"], ["also"]] * 2
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
            if is_legal(candidate) and fails(candidate):
                program, smaller = candidate, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for i in range(len(program["actions"])):
        yield _without(program, "actions", i)
    for i, action in enumerate(program["actions"]):
        if action[0] != "epoch":
            continue
        for j in range(len(action[1].get("at", []))):
            yield _without(program, "actions", i, 1, "at", j)
        for name, plain in (("stop", None), ("how", "loader"), ("how", "rest")):
            if action[1].get(name, plain) not in (plain, "rest"):
                yield _with(program, plain, "actions", i, 1, name)
    plain_values = {
        "second": None,
        "dispatch": None,
        "split": False,
        "even": True,
        "cross": False,
        "loop": "accumulate",
        "optimizer": "DistAdamW",
        "steps": "each",
        "max_norm": None,
        "epoch_size": None,
        "accumulation": 1,
    }
    for name, value in plain_values.items():
        if program.get(name, value) != value:
            yield _with(program, value, name)
    data = program["data"]
    for name, value in (("sampler", "sequential"), ("form", "row"), ("workers", 0), ("kind", "map"), ("lie", 0)):
        if data.get(name, value) not in (value, "none"):
            yield _with(program, value, "data", name)
    for name in ("drop_last", "batch_sampler"):
        if data[name]:
            yield _with(program, False, "data", name)
    for rows in (data["rows"] // 2, data["rows"] - 1):
        if rows >= 2 * data["batch"]:
            yield _with(program, rows, "data", "rows")
    for batch in (2, data["batch"] - 1):
        if 0 < batch < data["batch"] and not program["split"]:
            yield _with(program, batch, "data", "batch")
    if program["accumulation"] > 2:
        yield _with(program, program["accumulation"] - 1, "accumulation")


def _with(program: Program, value: object, *path: str | int) -> Program:
    copied, place = _copy_of(program, path)
    place[path[-1]] = value
    return copied


def _without(program: Program, *path: str | int) -> Program:
    copied, place = _copy_of(program, path)
    del place[path[-1]]
    return copied


def _copy_of(program: Program, path: tuple[str | int, ...]) -> tuple[Program, Any]:
    """The copy, and what in it holds the end of ``path``."""
    place: Any = (copied := copy.deepcopy(program))
    for key in path[:-1]:
        place = place[key]
    return copied, place


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
