"""The figures themselves: what is recorded, and the table made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dev.reliability import PROMISES, render
from nanochat.common.errors import UserError
from tests.reliability.figures import Figure, close

ENTRY = {
    "promise": "P5",
    "unit": "files",
    "n": 500,
    "checks": 500,
    "failures": 0,
    "worst": 0,
    "note": "",
    "machine": "m",
    "commit": "0123456789",
    "library": "",
}


def test_figures_are_recorded_only_where_asked_and_newer_ones_replace_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reliability.json"
    made = Figure("P5", "files", True)
    with made.trial():
        pass
    monkeypatch.delenv("NANOCHAT_RELIABILITY", raising=False)
    close([made], "passed")
    assert not path.exists()
    monkeypatch.setenv("NANOCHAT_RELIABILITY", str(path))
    close([made, Figure("P12", "mutations", True)], "passed")
    for _ in range(9):
        with made.trial():
            pass
    close([made], "passed")
    entries = json.loads(path.read_text("utf-8"))
    assert [(e["promise"], e["n"]) for e in entries] == [("P12", 1), ("P5", 10)]
    close([Figure("P9", "a test that was skipped", True)], "skipped")
    assert len(json.loads(path.read_text("utf-8"))) == 2


def test_the_table_counts_one_order_once_and_bounds_only_what_was_tried_often() -> None:
    order = {**ENTRY, "promise": "P2", "unit": "orders of batches", "n": 1, "checks": 2400}
    worst = {
        **ENTRY,
        "promise": "P12",
        "unit": "mutations",
        "n": 2000,
        "checks": 2000,
        "worst": 290,
        "note": "MiB",
    }
    lines = render([ENTRY, order, worst]).splitlines()
    once = "1 | 0 | too few to bound | 1 orders of batches, 2,400 checks of one order |"
    assert lines[2] == f"| P2 | {PROMISES['P2']} | {once}"
    assert lines[3] == f"| P5 | {PROMISES['P5']} | 500 | 0 | < 0.60% | 500 files |"
    assert lines[4] == f"| P12 | {PROMISES['P12']} | 2,000 | 0 | < 0.15% | 2,000 mutations (worst 290 MiB) |"
    assert lines[-1] == "Measured on m, at 0123456."


def test_failures_are_shown_and_other_json_is_refused() -> None:
    entry = {**ENTRY, "n": 4, "checks": 4, "failures": 1, "unit": "x"}
    assert "| 10 | 1 | 10.00% | 4 x; 6 y |" in render([{**ENTRY, "n": 6, "checks": 6, "unit": "y"}, entry])
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
        close([bits, order], "passed")
    by_promise = {entry["promise"]: entry for entry in json.loads(path.read_text("utf-8"))}
    assert (by_promise["P5"]["n"], by_promise["P5"]["failures"], by_promise["P5"]["worst"]) == (10, 1, 7)
    assert (by_promise["P2"]["n"], by_promise["P2"]["checks"], by_promise["P2"]["failures"]) == (1, 10, 0)
    assert len(by_promise["P5"]["library"]) == 64
    passed = Figure("P5", "bits flipped", True)
    with passed.trial():
        pass
    with pytest.raises(pytest.fail.Exception):  # the body of the test failed after its trials
        close([passed], "failed")
    assert json.loads(path.read_text("utf-8"))[1]["failures"] == 1
