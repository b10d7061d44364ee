"""The figures themselves: what is recorded, and the table made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dev.reliability import PROMISES, render
from nanochat.errors import UserError
from tests.reliability import record
from tests.reliability.figures import Figure, close


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
    assert lines[2] == f"| P5 | {PROMISES['P5']} | 500 | 0 | < 0.60% | 500 files |"
    assert lines[3] == f"| P12 | {PROMISES['P12']} | 2,000 | 0 | < 0.15% | 2,000 mutations (worst 290 MiB) |"
    assert lines[-1].startswith("Measured on ")


def test_failures_are_shown_and_other_json_is_refused() -> None:
    entry = {"promise": "P5", "n": 4, "failures": 1, "worst": 0, "unit": "x", "note": "", "machine": "m"}
    more = {**entry, "n": 6, "unit": "y", "note": "2 refused"}
    assert "| 10 | 1 | 10.00% | 4 x; 6 y (2 refused) |" in render([{**more, "failures": 0}, entry])
    for wrong in ([{"promise": "P5"}], ["x"], [{**entry, "promise": "x"}]):
        with pytest.raises(UserError, match="not figures"):
            render(wrong)  # type: ignore[arg-type]


def test_a_failed_trial_is_counted_written_and_fails_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setenv("NANOCHAT_RELIABILITY", str(path))
    bits, order = Figure("P5", "bits flipped", True), Figure("P2", "batches of one order", False)
    for number in range(10):
        with bits.trial(number):
            assert number != 3, "read in silence"
        with order.trial(number):
            pass
    bits.measure(7, "MiB")
    with pytest.raises(pytest.fail.Exception, match="(?s)1 of 10 failed.*3: AssertionError: read in silence"):
        close([bits, order], test_failed=False)
    by_promise = {entry["promise"]: entry for entry in json.loads(path.read_text("utf-8"))}
    assert (by_promise["P5"]["n"], by_promise["P5"]["failures"], by_promise["P5"]["worst"]) == (10, 1, 7)
    assert (by_promise["P2"]["n"], by_promise["P2"]["checks"], by_promise["P2"]["failures"]) == (1, 10, 0)
    assert len(by_promise["P5"]["library"]) == 64
    passed = Figure("P5", "bits flipped", True)
    with passed.trial():
        pass
    with pytest.raises(pytest.fail.Exception):  # the body of the test failed after its trials
        close([passed], test_failed=True)
    assert json.loads(path.read_text("utf-8"))[1]["failures"] == 1
