"""torch.compile: chosen by the device, once, with the results of a run that is not compiled."""

from __future__ import annotations

import dataclasses
import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from nanochat.common import files, machine
from nanochat.common.errors import UserError
from nanochat.config.recipes import RECIPES
from nanochat.train import run as train_run
from nanochat.train import step_metrics
from tests.tiny import read_metrics, tiny_corpus, train_tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_cache_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is as it was after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    torch._dynamo.reset()
    tiny_corpus(tmp_path)


def losses(run: str) -> list[float]:
    entries = read_metrics(files.run_dir(run) / "metrics.jsonl")
    return [entry["loss"] for entry in entries if entry["kind"] == "step"]


def test_a_cpu_is_left_uncompiled_unless_asked() -> None:
    assert machine.choose_compile(CPU)[0] is False
    assert machine.choose_compile(CPU, "off") == (False, "as asked")
    assert machine.choose_compile(torch.device("mps"))[0] is False


def test_without_a_compiler_asking_for_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--compile=on: there is no C.. compiler"):
        machine.choose_compile(CPU, "on")
    with pytest.raises(UserError, match="not supported on mps"):
        machine.choose_compile(torch.device("mps"), "on")


def test_nothing_is_compiled_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch._dynamo.testing.CompileCounter()  # type: ignore[no-untyped-call]
    graphs = []
    real_step = train_run.train_step

    def counted(*args: Any) -> Any:
        result = real_step(*args)
        graphs.append(counter.frame_count)
        return result

    train_tiny(run="plain")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        patch.setattr(train_run, "train_step", counted)
        # 15 rows of validation are three whole batches and a rest: three evaluations and two samples follow.
        train_tiny(run="compiled", compile="on", eval_tokens=450, sample_every=6)
    assert graphs[0] >= 5  # the model with and without gradients; Muon's shapes
    assert graphs == 12 * graphs[:1]
    assert counter.frame_count == graphs[0]
    assert losses("compiled") == pytest.approx(losses("plain"), abs=1e-5)


def test_windows_that_grow_are_compiled_before_the_first_step_and_that_is_no_time_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = dataclasses.replace(RECIPES["speedrun-124m"], window_multiple=4)
    monkeypatch.setitem(RECIPES, "speedrun-124m", short)
    clock = [0.0]
    counter = torch._dynamo.testing.CompileCounter()  # type: ignore[no-untyped-call]
    graphs: dict[int, int] = {}
    real_step = train_run.train_step

    def counted(plan: Any, state: Any, world: Any) -> Any:
        before = counter.frame_count
        clock[0] += 1.0 if state.step else 50.0
        result = real_step(plan, state, world)
        graphs[state.step] = counter.frame_count - before
        return result

    options: dict[str, Any] = {"recipe": "speedrun-124m", "total_batch_size": 768, "eval_every": 0}
    train_tiny(run="plain", **options)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        patch.setattr(train_run, "train_step", counted)
        patch.setattr(step_metrics, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
        summary = train_tiny(run="compiled", compile="on", **options)
    assert summary["train_seconds"] == pytest.approx(12.0)
    assert graphs[0] > 0
    assert not any(graphs[step] for step in range(1, 12))  # windows grow at 4 and 8
    assert losses("compiled") == pytest.approx(losses("plain"), abs=1e-5)


@pytest.mark.slow
def test_compiled_for_real_it_learns_the_same_and_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny(run="plain", num_iterations=5)
    train_tiny(run="compiled", num_iterations=5, compile="on")
    assert losses("compiled") == pytest.approx(losses("plain"), abs=1e-4)
    assert any((files.base_dir() / "compiled").iterdir())
    assert "compiling" in capsys.readouterr().out
