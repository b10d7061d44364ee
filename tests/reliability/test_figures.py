"""The figures themselves: what is recorded, and the table made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dev.reliability import render
from nanochat.errors import UserError
from tests.reliability import record


def test_figures_are_recorded_only_where_asked_and_newer_ones_replace_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reliability.json"
    monkeypatch.delenv("NANOCHAT_RELIABILITY", raising=False)
    record("P5", n=1, failures=0, worst=0, unit="files")
    assert not path.exists()
    monkeypatch.setenv("NANOCHAT_RELIABILITY", str(path))
    record("P12", n=2000, failures=0, worst=290, unit="mutations", note="worst: MiB")
    record("P5", n=10, failures=1, worst=0, unit="files")
    record("P5", n=500, failures=0, worst=0, unit="files")
    entries = json.loads(path.read_text("utf-8"))
    assert [(e["promise"], e["n"]) for e in entries] == [("P12", 2000), ("P5", 500)]
    lines = render(entries).splitlines()
    assert lines[2] == "| P5 | files | 500 | 0 | < 0.6% |  |  |"
    assert lines[3] == "| P12 | mutations | 2,000 | 0 | < 0.1% | 290 | worst: MiB |"
    assert lines[-1].startswith("Measured on ")


def test_failures_are_shown_and_other_json_is_refused() -> None:
    entry = {"promise": "P5", "n": 4, "failures": 1, "worst": 0, "unit": "x", "note": "", "machine": "m"}
    assert "| 4 | 1 | 25.00% |" in render([entry])
    for wrong in ([{"promise": "P5"}], ["x"], [{**entry, "promise": "x"}]):
        with pytest.raises(UserError, match="not figures"):
            render(wrong)  # type: ignore[arg-type]
