"""``completion``: print a script with which a shell completes verbs, options and files."""

from __future__ import annotations

from typing import Literal

from dist_adamw.cli.answer import Answer


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> Answer:
    """Print the shell's completion script.

    Args:
        shell: bash, zsh or tcsh.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("completion needs shtab: pip install 'dist_adamw[completion]'") from error
    from dist_adamw.cli.helping import make_command_parser

    script = shtab.complete(make_command_parser(), shell)
    return Answer(script, {"shell": shell, "script": script})
