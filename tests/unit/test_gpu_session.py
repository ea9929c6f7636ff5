"""The session for a machine with a GPU runs to its end, in small on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_session, records
from benchmarks.gpu_parts import Session

KINDS = {"steps": {"bandwidth", "step"}}


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in gpu_session.PARTS if part != "tests"])
def test_every_part_of_the_session_runs(part: str, tmp_path: Path) -> None:
    """In this process, since starting one for each part is what takes time; "tests" is below."""
    session = Session(gpu_session.parse(["--out", str(tmp_path), "--dry-run"]))
    gpu_session.PARTS[part][0](session)
    found = records.read([session.results])
    assert {record["kind"] for record in found} == KINDS.get(part, {part})
    assert not [record for record in found if "error" in record]


@pytest.mark.slow
def test_a_session_runs_its_parts_as_programs(tmp_path: Path) -> None:
    gpu_session.main(["--out", str(tmp_path), "--dry-run", "--only", "tests"])
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    log = (tmp_path / "tests.log").read_text()
    assert {record["kind"] for record in found} == {"environment", "part", "tests"}, log
    assert found[-1]["kind"] == "part"
    assert [record["rc"] for record in found if "rc" in record] == [0, 0], log
    assert "## part" in (tmp_path / "session.md").read_text()


def test_a_part_that_fails_or_takes_too_long_does_not_end_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_session.PARTS, "steps", (gpu_session.PARTS["steps"][0], 0.2))
    gpu_session.main(["--out", str(tmp_path), "--dry-run", "--only", "steps", "clip", "--minutes", "0.003"])
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["rc"] for record in found if record["kind"] == "part"] == ["ended after 0 s", "no time left"]
