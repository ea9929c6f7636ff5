"""The order of packages in docs/design.md: imports go down, and neighbours are imported where they are used."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator

import pytest

import dist_adamw
from tests.house import PACKAGE, Module, find_cycle, import_pairs, measure, read_package

# Lowest first: a package may import itself and those above it in this list.
ORDER = [
    "errors",
    "json_text",
    "logs",
    "plain_data",
    "_version",
    "_moved",
    "wrappers",
    "ranks",
    "schedule",
    "optimizer.kernels",
    "optimizer.transport",
    "optimizer.sharding",
    "optimizer.gradients",
    "optimizer",
    "recipes",
    "run_log",
    "tracking",
    "checkpoint.storage",
    "checkpoint",
    "checkpoint.formats",
    "range_test",
    "integrations",
    "integrations.deepspeed",
    "integrations.accelerate",
    "integrations.transformers",
    "integrations.lightning",
    "checking",
    "planning",
    "cli",
    "",  # dist_adamw itself
]
# They forward, and import nothing until they are asked.
OLD_PATHS = ["batch", "hooks", "policies", "scheduler", "storage"]
LAZY = {
    "accelerate",
    "deepspeed",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "pytorch_lightning",
    "shtab",
    "transformers",
    "uniplot",
}

MODULES = {module.name: module for module in read_package(PACKAGE)}
PAIRS = import_pairs(list(MODULES.values()))


def package_of(module: Module) -> str:
    """The entry of ORDER that a module belongs to; modules at the top are packages of their own."""
    if module.path.parent == PACKAGE and module.path.stem != "__init__":
        return module.path.stem
    return module.room.removeprefix("dist_adamw").removeprefix(".")


def targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module


def test_every_module_is_in_a_package_of_the_order() -> None:
    assert {package_of(module) for module in MODULES.values()} == {*ORDER, *OLD_PATHS}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    here = package_of(MODULES[name])
    for source, target in PAIRS:
        if source != name:
            continue
        there = package_of(MODULES[target])
        if here in OLD_PATHS:
            assert there == "_moved"
        else:
            assert ORDER.index(there) <= ORDER.index(here), f"{name} imports {target} from a package above"


def test_no_modules_import_each_other() -> None:
    assert find_cycle(PAIRS) == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_neighbours_are_imported_lazily(name: str) -> None:
    for node in MODULES[name].tree.body:  # the module's own level: what importing it imports
        for target in targets(node):
            assert target.split(".")[0] not in LAZY, f"{name} imports {target} when it is imported"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(MODULES[name].tree)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("batch", "GlobalBatch"),
        ("policies", "arccosine"),
        ("scheduler", "CyclicLRWithRestarts"),
        ("storage", "Reader"),
        ("hooks", "WeakHook"),
    ],
)
def test_old_paths_forward(path: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"dist_adamw\.{path}\.{name} .*moved.* dist_adamw\."):
        value = getattr(importlib.import_module(f"dist_adamw.{path}"), name)
    assert value.__name__ == name
    assert getattr(dist_adamw, path) is importlib.import_module(f"dist_adamw.{path}")
    with pytest.raises(AttributeError):
        importlib.import_module(f"dist_adamw.{path}").no_such_name  # noqa: B018


def test_the_house_stays_within_its_limits() -> None:
    figures = {name: str(value) for name, value in measure().items()}
    numbers = {name: float(text.split()[0].rstrip("%")) for name, text in figures.items() if text[0].isdigit()}
    assert numbers["longest file"] <= 450, figures
    assert numbers["largest class, lines"] <= 300, figures
    assert numbers["largest class, methods"] <= 25, figures
    assert numbers["functions above complexity 10"] <= 0.03 * numbers["functions"], figures
    assert numbers["public functions annotated"] == numbers["public functions documented"] == 100, figures
    assert figures["cycle of rooms"] == "none"
