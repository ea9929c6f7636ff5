"""The main job's history: what is on disk after any end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

REPORT = Path(__file__).parents[2] / "launch" / "report.py"


def test_spoilt_lines_are_left_out(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("report", REPORT)
    assert spec is not None
    assert spec.loader is not None
    report = sys.modules["report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    lines = [b"samples,loss,lr,weight_decay,val_loss,seconds", b"8,1.5,0.1,0.2,,1.0", bytes(40), b"\xff\xfe,1,2"]
    lines += [b"16,1.25,0.1,0.2,1.0,2.0", b"24,1.0,0."]
    (tmp_path / "history.csv").write_bytes(b"\n".join(lines))
    assert [row.samples for row in report.read_history(tmp_path / "history.csv")] == [8, 16]
