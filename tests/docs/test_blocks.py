"""Every code block of README.md and the pages runs, or is named with the test that runs it."""

from __future__ import annotations

import ast
import logging
import os
import re
import socket
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from tests.conftest import ROOT
from tests.docs.blocks import PAGES, commands, language, page_folder, read
from tests.docs.commands import ELSEWHERE, STATUS

DOCUMENTS = {page: read(page) for page in PAGES}
PROGRAMS = "dist-adamw|python|pip|make|torchrun|accelerate|deepspeed"
LANGUAGES = {"python", "sh", "json", "yaml", "text"}


def launched(page: str) -> bool:
    """Return whether a page's blocks are those of a script that a launcher starts."""
    return page in {f"docs/{name}.md" for name in ("engines/ddp", "engines/fsdp2", "engines/deepspeed", "migration")}


def rank_zero_of_one() -> dict[str, str]:
    """Return what a launcher would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in alone.items()}}


@pytest.mark.parametrize("page", [page for page, document in DOCUMENTS.items() if list(document.examples())])
def test_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page_folder(tmp_path))
    for name, value in rank_zero_of_one().items():
        if launched(page):
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    ours, root = logging.getLogger("dist_adamw"), logging.getLogger()
    level, handlers = ours.level, [*root.handlers]
    try:
        with mock.patch.dict(os.environ):
            for example in DOCUMENTS[page].examples():
                example.evaluate()
    finally:
        ours.setLevel(level)
        root.handlers[:] = handlers
        if dist.is_initialized():
            dist.destroy_process_group()


def test_no_block_is_left_out() -> None:
    """A fence that the reader of blocks misses, or an indented command, would never run."""
    count: Counter[str] = Counter()
    for page, document in DOCUMENTS.items():
        fences = re.findall(r"^ *```", document.text, re.MULTILINE)
        visible = [example for example in document.examples() if "language" in example.region.lexemes]
        assert len(fences) == 2 * len(visible), page
        prose = re.sub(r"^```.*?^```$", "", document.text, flags=re.MULTILINE | re.DOTALL)
        indented = re.findall(rf"^    (?:{PROGRAMS}) .*", prose, re.MULTILINE)
        assert not indented, f"{page}: put {indented} into a ```sh block"
        assert {language(example) for example in document.examples()} <= LANGUAGES, page
        count.update(language(example) for example in visible)
    print(f"{count.total()} blocks on {len(DOCUMENTS)} pages: {dict(count)}; {len(ELSEWHERE)} commands run elsewhere")
    assert count["python"] >= 40  # the pages are found


def test_a_reader_sees_what_a_page_needs() -> None:
    """Hidden code makes the blocks of a page impossible to copy."""
    hidden = {page for page in PAGES if "invisible-code-block" in DOCUMENTS[page].text}
    assert hidden <= {"README.md", "docs/lightning.md", "docs/plan.md"}


def test_commands_that_run_elsewhere_are_on_a_page_and_have_a_test() -> None:
    shown = {
        command
        for document in DOCUMENTS.values()
        for example in document.examples()
        if language(example) == "sh"
        for command in commands(example)
    }
    assert set(ELSEWHERE) | set(STATUS) <= shown
    for place in {place for place in ELSEWHERE.values() if not place.startswith("by hand: ")}:
        path, _, name = place.partition("::")
        functions = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, place
