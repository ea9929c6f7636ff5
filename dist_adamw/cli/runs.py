"""``diff``: compare the logs of two runs."""

from __future__ import annotations

from dist_adamw.cli.answer import DONE, NO, Answer


def diff(run_a: str, run_b: str) -> Answer:
    """Name the first update, and the first parameter or micro-batch, at which two runs differ.

    Args:
        run_a: The folder that was given to dist_adamw.RunLog.
        run_b: That of the other run. The same folder: compare updates before a resume with those after it.
    """
    from dist_adamw.run_log.comparison import compare_runs

    found = compare_runs(run_a, run_b)
    return Answer(str(found), found.data, DONE if found.is_equal else NO)
