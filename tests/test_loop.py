"""What surrounds the steps: garbage waits for a call, a trace is written where one is asked for."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from nanochat.common import files
from nanochat.train.profiling import collector_held, traced
from tests.tiny import tiny_corpus, train_tiny


def test_the_collector_is_held_within_and_as_it_was_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tests keep it from letting go: see conftest.py
    gc.unfreeze()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="out"), collector_held():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        raise ValueError("out")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_without_a_path_nothing_is_traced() -> None:
    with traced(None) as step_traced:
        step_traced()


def test_a_run_leaves_a_trace_of_three_steps_where_asked(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    train_tiny(num_iterations=7, profile=True, eval_every=0, save_every=0)
    trace = json.loads((files.run_dir("tiny") / "trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if "name" in event]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    assert any("mm" in name for name in names)
