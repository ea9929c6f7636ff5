"""The ``dist-adamw`` command.

A verb is a function, and its signature is its command line: parameters before ``*`` are positional, the others are
options, and the docstring is the help. `verbs.VERBS` lists all; ``command.py`` reads the line and prints the answer.
Nothing here imports torch before a verb runs, so that help and completion are quick.
"""

from dist_adamw.cli.command import main

__all__ = ["main"]
