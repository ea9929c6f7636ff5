"""Type the commands of docs/first_session.md, and write into the page what comes back.

    python -m tests.docs.first_session --dist DIST

DIST is a folder with the wheel. The commands run in one shell, in an empty folder and an empty environment that they
make themselves. It takes three minutes, and needs the index of packages.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from tests.conftest import ROOT

PAGE = ROOT / "docs/first_session.md"
PICTURE = ROOT / "docs/first-session.png"
TRAIN = "torchrun --standalone --nproc-per-node 2 train.py"
INTERRUPT_AFTER = "sample 7200,"  # of the first training: in the middle of the second epoch
END = "# end"
BLOCK = re.compile(r'```(sh|text|(?:python|yaml) title="(?P<file>[\w.]+)")\n(?P<text>.*?)```\n', re.DOTALL)
INSTALL = ("python3 -m venv", ". env/bin/activate", "pip install")


def main() -> None:
    """Run the page with its environment, and rewrite it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, required=True, help="a folder with the wheel of dist_adamw")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(args.dist, Path(folder, "dist"))
        PAGE.write_text(replay(PAGE.read_text(), Path(folder), dict(os.environ), install=True))
        shutil.copy(Path(folder, "recipe.png"), PICTURE)


def replay(page: str, folder: Path, environment: dict[str, str], *, install: bool) -> str:
    """Return ``page`` with the output of its commands in its blocks of text. Progress goes to stderr.

    Args:
        page: The text of a page.
        folder: Where files are written and commands run.
        environment: Variables of the shell.
        install: Run the commands that make an environment too.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(("ACCELERATE_", "PIP_"))}
    shell = subprocess.Popen(
        ["bash", "--norc"],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = ""

    def run(block: re.Match[str]) -> str:
        nonlocal printed
        kind, text = block[1], block["text"]
        if block["file"]:
            (folder / block["file"]).write_text(text)
        elif kind == "sh":
            printed = "".join(_type(shell, command, folder) for command in _commands(text, install))
        else:
            return f"```text\n{printed or '(nothing)' + chr(10)}```\n"
        return block[0]

    try:
        return BLOCK.sub(run, page)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def _commands(block: str, install: bool) -> Iterable[str]:
    return (line for line in block.splitlines() if install or not line.startswith(INSTALL))


def _type(shell: subprocess.Popen[str], command: str, folder: Path) -> str:
    """Return what one command prints, and its exit status if that is not 0. What pip warns of is left out."""
    print(f"$ {command}", file=sys.stderr)
    keyboard, screen = _pipes(shell)
    keyboard.write(f'{command}\necho "{END} $?"\n')
    keyboard.flush()
    lines: list[str] = []
    for line in screen:
        if line.startswith(END):
            status = line.split()[-1]
            if command.startswith(INSTALL) and status == "0":
                return ""
            return "".join(lines) + ("" if status == "0" else f"[exit status {status}]\n")
        lines.append(line.replace(str(folder), "."))
        if command == TRAIN and line.startswith(INTERRUPT_AFTER):
            return "".join(lines) + _interrupt(shell)
    raise RuntimeError(f"the shell ended in {command!r}: {''.join(lines)}")


def _interrupt(shell: subprocess.Popen[str]) -> str:
    """Press Ctrl-C: SIGINT to every process of the shell's group but the shell, which waits for its job."""
    _, screen = _pipes(shell)
    os.killpg(shell.pid, signal.SIGINT)
    for line in screen:  # what the launcher says about it is not shown
        if line.startswith(END):
            break
    return "^C\n"


def _pipes(shell: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if shell.stdin is None or shell.stdout is None:
        raise RuntimeError("the shell has no pipes")
    return shell.stdin, shell.stdout


if __name__ == "__main__":
    main()
