"""Measure how the code is built: ``python -m tests.house [FOLDER]`` prints one table.

FOLDER is a package's folder, by default this one's; another checkout's gives the figures before a change.
A room is a folder of modules; an arrow is a pair of rooms of which
one imports the other.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dist_adamw"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Module:
    """One file of the package."""

    name: str  # dotted, from the package's name on
    path: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The dotted name of the folder."""
        return self.name if self.path.stem == "__init__" else self.name.rpartition(".")[0]


def read_package(package: Path) -> list[Module]:
    """Return every module below ``package``."""
    modules = []
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        modules.append(Module(name, path, text, ast.parse(text)))
    return modules


def import_pairs(modules: list[Module]) -> set[tuple[str, str]]:
    """Return (importing, imported) for all modules of the package, also where the import is inside a function."""
    names = {module.name for module in modules}
    pairs: set[tuple[str, str]] = set()
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in names else node.module for target in submodules]
            else:
                continue
            pairs.update((module.name, target) for target in targets if target in names and target != module.name)
    return pairs


def find_cycle(pairs: set[tuple[str, str]]) -> list[str]:
    """Return the names along one cycle, or an empty list."""
    below: dict[str, list[str]] = {}
    for source, target in sorted(pairs):
        below.setdefault(source, []).append(target)
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in finished:
            for target in below.get(name, []):
                if cycle := walk(target, [*path, name]):
                    return cycle
            finished.add(name)
        return []

    return next((cycle for name in sorted(below) if (cycle := walk(name, []))), [])


def is_declaration(function: Function) -> bool:
    """Return whether a function only adds to another of its name: an overload, or the setter of a property."""
    names = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any(name.split(".")[-1] in ("overload", "setter") for name in names)


def functions(tree: ast.Module) -> Iterator[tuple[Function, bool]]:
    """Yield every function, and whether it is public: reached by names without an underscore, from outside."""

    def visit(node: ast.AST, public: bool) -> Iterator[tuple[Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function) and is_declaration(child):
                continue
            if isinstance(child, Function):
                yield child, public and not child.name.startswith("_")
                yield from visit(child, False)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, public and not child.name.startswith("_"))
            else:
                yield from visit(child, public)

    yield from visit(tree, True)


def length(node: Function | ast.ClassDef) -> int:
    """Return the lines of a function or class, decorators and docstring included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def is_annotated(function: Function) -> bool:
    """Return whether all arguments but ``self`` and ``cls``, and the result, have a type."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [a for a in (arguments.vararg, arguments.kwarg) if a]
    return function.returns is not None and all(a.annotation or a.arg in ("self", "cls") for a in named)


def complexity(function: Function) -> int:
    """Return 1 + the decisions in a function, nested ones apart (McCabe's number; comprehensions and and/or count)."""
    decisions = 0
    open_nodes: list[ast.AST] = [*function.body]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, Function | ast.ClassDef):
            continue
        if isinstance(node, ast.If | ast.IfExp | ast.For | ast.While | ast.ExceptHandler | ast.Assert | ast.match_case):
            decisions += 1
        elif isinstance(node, ast.BoolOp):
            decisions += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            decisions += 1 + len(node.ifs)
        open_nodes.extend(ast.iter_child_nodes(node))
    return 1 + decisions


def count_comments(module: Module) -> int:
    """Return the lines that hold a comment."""
    with module.path.open("rb") as file:
        return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))


def measure(package: Path = PACKAGE) -> dict[str, object]:
    """Return the table, by the name of the figure."""
    modules = read_package(package)
    pairs = import_pairs(modules)
    room_of = {module.name: module.room for module in modules}
    arrows = {(room_of[source], room_of[target]) for source, target in pairs if room_of[source] != room_of[target]}
    lines = {module.name: len(module.text.splitlines()) for module in modules}
    classes = [
        (length(node), sum(isinstance(child, Function) and not is_declaration(child) for child in node.body), node.name)
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    ]
    every_function = [pair for module in modules for pair in functions(module.tree)]
    public = [
        function
        for module in modules
        if not module.path.stem.startswith("_") or module.path.stem == "__init__"
        for function, is_public in functions(module.tree)
        if is_public
    ]
    lengths = [length(function) for function, _ in every_function]
    longest = max(lines, key=lines.__getitem__)
    too_complex = sum(complexity(function) > 10 for function, _ in every_function)
    hardest = max((function for function, _ in every_function), key=complexity)
    # A package's own module opens with what it offers, so it imports the rooms below it: no arrow of the house.
    inner = {pair for pair in arrows if pair[0] != package.name}
    return {
        "files": len(modules),
        "lines": sum(lines.values()),
        "longest file": f"{lines[longest]} ({longest})",
        "largest class, lines": "{0} ({2})".format(*max(classes)),
        "largest class, methods": "{1} ({2})".format(*max(classes, key=lambda c: c[1])),
        "functions": len(lengths),
        "functions above complexity 10": f"{too_complex} ({too_complex / len(lengths):.1%})",
        "most complex function": f"{complexity(hardest)} ({hardest.name})",
        "function length, median": statistics.median(lengths),
        "function length, p90": statistics.quantiles(lengths, n=10)[-1],
        "rooms": len({module.room for module in modules}),
        "arrows between rooms": len(inner),
        "cycle of modules": " > ".join(find_cycle(pairs)) or "none",
        "cycle of rooms": " > ".join(find_cycle(inner)) or "none",
        "public functions annotated": f"{sum(map(is_annotated, public)) / len(public):.1%}",
        "public functions documented": f"{sum(ast.get_docstring(f) is not None for f in public) / len(public):.1%}",
        "comment lines": f"{sum(map(count_comments, modules)) / sum(lines.values()):.1%}",
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE, help="a package's folder")
    for name, value in measure(parser.parse_args().folder.resolve()).items():
        print(f"{name:32}{value}")


if __name__ == "__main__":
    main()
