"""Write the tables of docs/recipes.md, and draw its pictures, from the rows of `recipes`.

``python -m benchmarks.recipes_report benchmarks/results/recipes.jsonl --docs docs``. A table of recipes.md lies between
``<!-- table: NAME -->`` and ``<!-- end -->``, and is replaced. An experiment whose rows are not all there is left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import recipes, records
from benchmarks import recipes_pictures as pictures
from benchmarks import recipes_tables as tables
from benchmarks.recipes import Scale, Sheet
from benchmarks.recipes_training import KIND

Draw = Callable[[Path, Any, Scale], None]
SECTIONS: dict[str, tuple[Callable[[Sheet, Scale], Any], Callable[[Any, Scale], Iterator[str]], Draw]] = {
    "decay": (recipes.decay, lambda rows, _: tables.decay_table(rows), pictures.draw_decay),
    "anytime": (recipes.anytime, tables.anytime_table, pictures.draw_anytime),
    "branches": (recipes.branches, tables.branches_table, pictures.draw_branches),
    "snapshots": (recipes.snapshots, tables.snapshots_table, pictures.draw_snapshots),
}


def machine(path: Path) -> str:
    """Return on what the rows were measured, and how long it took."""
    found = records.read([path])
    environments = [one for one in found if one["kind"] == "environment"]
    rows = [one for one in found if one["kind"] == KIND]
    where = sorted({f"{one['cpu']}, torch {one['versions']['torch']}" for one in environments})
    commits = ", ".join(dict.fromkeys(one["commit"][:7] for one in environments))
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    return (
        f"{len(rows)} runs, {minutes:.0f} minutes of processor time on one core: {'; '.join(where)}; commits {commits}."
    )


def replace_table(text: str, name: str, lines: Sequence[str]) -> str:
    """Return ``text`` with another table ``name``.

    Raises:
        ValueError: it has no such table.
    """
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no '<!-- table: {name} -->' with an '<!-- end -->' after it.")
    body = "\n".join(lines)
    return pattern.sub(lambda found: f"{found[1]}{body}\n{found[2]}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all sections whose rows are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="what benchmarks.recipes has written")
    parser.add_argument("--docs", type=Path, required=True, help="the folder of recipes.md and the pictures")
    parser.add_argument("--tiny", action="store_true", help="rows of benchmarks.recipes --tiny")
    options = parser.parse_args(arguments)
    scale = recipes.TINY if options.tiny else recipes.SCALE
    page = options.docs / "recipes.md"
    text = replace_table(page.read_text(), "machine", [machine(options.rows)])
    for name, (collect, make_table, draw) in SECTIONS.items():
        try:
            rows = collect(Sheet(options.rows, may_run=False), scale)
        except LookupError as error:
            print(f"{name}: left out. {error}")
            continue
        try:
            lines = list(make_table(rows, scale))
        except tables.NotBracketedError as error:
            print(f"{name}: left out. {error}")
            continue
        text = replace_table(text, name, lines)
        draw(options.docs / f"recipes-{name}.png", rows, scale)
        print("\n".join([f"{name}:", *lines, ""]))
    page.write_text(text)


if __name__ == "__main__":
    main()
