"""One of torch's own test files, of a checkout that the user has, with our classes in place of torch's.

The file is executed here, so that processes that its tests spawn, which import this module, replace the classes too.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import traceback
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

from tests.third_party import swap

FILE, SWAPS = "THIRD_PARTY_FILE", "THIRD_PARTY_SWAPS"  # environment variables, which spawned processes inherit
CHANGES = {"none": lambda: None, "optimizer": swap.in_torch_tests, "zero": swap.in_tests_of_zero}


def _run_ranks_on_cpu() -> None:
    """Run what torch skips without a GPU; fork the ranks, since importing torch takes longer than a test."""
    from torch.testing._internal import common_distributed

    def start(case: Any) -> None:
        case._start_processes(multiprocessing.get_context("fork").Process)

    mock.patch.object(common_distributed.MultiProcessTestCase, "_spawn_processes", start).start()
    mock.patch.object(common_distributed, "skip_if_no_gpu", lambda test: test).start()


if FILE in os.environ:
    CHANGES[os.environ[SWAPS]]()
    _run_ranks_on_cpu()
    _path = Path(os.environ[FILE])
    sys.path.insert(0, str(_path.parent))
    exec(compile(_path.read_text(), str(_path), "exec"), globals())
    globals().pop("load_tests", None)  # torch's refuses test cases of other modules than __main__


def run_tests(parts: tuple[str, ...], without: tuple[str, ...]) -> dict[str, str]:
    """Run the tests of the file whose names have one of ``parts``; return "passed", "skipped: ...", or the error.

    Collective if the process is a rank: tests run in the same order everywhere.
    """
    results: dict[str, str] = {}
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    for test in _flat(suite):
        name = test.id().removeprefix(f"{__name__}.")
        if not any(part in name for part in parts) or any(part in name for part in without):
            continue
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            results[name] = _outcome(test)
    return results


def _outcome(test: unittest.TestCase) -> str:
    result = unittest.TestResult()
    try:
        test.run(result)
    except BaseException:  # what a test of ranks raises outside of its method
        return traceback.format_exc().strip().splitlines()[-1]
    if result.skipped:
        return f"skipped: {result.skipped[0][1]}"
    problems = [*result.errors, *result.failures]
    return _last_error(problems[0][1]) if problems else "passed"


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "To execute", "This message"))]
    return next((line for line in reversed(lines) if "Error" in line or "Exception" in line), lines[-1])[:300]


def _flat(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    found: list[unittest.TestCase] = []
    for one in suite:
        found += _flat(one) if isinstance(one, unittest.TestSuite) else [one]
    return found
