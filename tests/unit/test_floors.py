"""The floors of docs/design.md: imports go down, and the lower floors know no neighbour."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dist_adamw"
FLOORS = {
    "_version": 0,
    "functional": 0,
    "kernels": 0,
    "kernels._triton_code": 0,
    "kernels.mixed": 0,
    "kernels.adamw_triton": 0,
    "conventions": 0,
    "plain": 0,
    "exact_math": 0,
    "policies": 0,
    "batch": 0,
    "boxes": 0,
    "schedule": 0,
    "partition": 0,
    "plot": 0,
    "arriving": 1,
    "collectives": 1,
    "owned": 1,
    "index": 1,
    "unpickling": 1,
    "together": 1,
    "planner": 1,
    "storage": 1,
    "preview": 1,
    "exchange": 1,
    "shard": 1,
    "fingerprints": 1,
    "hooks": 2,
    "watch": 2,
    "plan": 2,
    "ddp": 2,
    "gradients": 2,
    "share": 2,
    "options": 1,
    "placement": 2,
    "optimizer": 2,
    "replicas": 2,
    "scheduler": 2,
    "held": 3,
    "random_state": 3,
    "extra_state": 3,
    "compare": 3,
    "checkpoint": 3,
    "folder": 3,
    "foreign": 3,
    "convert": 3,
    "integrations": 4,
    "integrations.deepspeed": 4,
    "integrations.loader": 4,
    "integrations.counting": 4,
    "integrations.data": 4,
    "integrations.position": 4,
    "integrations.zero": 4,
    "integrations.state": 4,
    "integrations.prepared": 4,
    "integrations.accelerate": 4,
    "integrations.trainer_arguments": 4,
    "integrations.trainer_state": 4,
    "integrations.transformers": 4,
    "cli": 5,
    "__init__": 5,
}
# On one floor, later ones may use earlier ones.
ORDER = list(FLOORS)
LAZY = {"accelerate", "deepspeed", "transformers", "matplotlib", "jsonargparse"}


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def test_every_module_has_a_floor() -> None:
    assert sorted(MODULES) == sorted(FLOORS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    for target, _ in imports(ast.parse(MODULES[name].read_text())):
        below = target.removeprefix("dist_adamw.")
        if not target.startswith("dist_adamw.") or below not in FLOORS:
            continue
        assert FLOORS[below] <= FLOORS[name], f"{name} imports {below} from a floor above"
        assert ORDER.index(below) < ORDER.index(name), f"{name} imports {below} sideways"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_neighbours_are_imported_lazily(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    for node in tree.body:  # the module's own level: what importing it imports
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target, _ in imports(ast.Module([node], [])):
                assert target.split(".")[0] not in LAZY, f"{name} imports {target} when it is imported"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_says_what_it_is_and_on_which_floor(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert text
    if name not in ("__init__", "_version"):
        assert f"Floor {FLOORS[name]}" in text
