"""The trainer: it learns, it resumes to the bit after a kill, stops when asked, leaves the promised files."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.data.corpus import Corpus
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train import small_text
from nanochat.train.hooks import Hook
from tests.conftest import REPO
from tests.tiny import command_line, read_metrics, tiny_args, tiny_corpus, train_tiny

# What may differ between two runs of the same plan: the clock.
CLOCK = ("tokens_per_second", "mfu", "train_seconds", "rollout_seconds")


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)


def metrics(run: str = "tiny", kind: str = "") -> list[dict[str, Any]]:
    entries = read_metrics(files.run_dir(run) / "metrics.jsonl")
    return [
        {name: value for name, value in entry.items() if name not in CLOCK}
        for entry in entries
        if not kind or entry["kind"] == kind
    ]


def weights(run: str, step: int) -> bytes:
    folder = checkpoint_format.folder_of(run, step)
    return (folder / checkpoint_format.MODEL).read_bytes() + (
        folder / checkpoint_format.OPTIMIZER
    ).read_bytes()


def test_a_run_learns_and_leaves_its_files() -> None:
    # Batches this small scale the rates of the recipe down to a fortieth: undo it.
    rates = {"matrix_lr": 0.9, "embedding_lr": 6.0, "unembedding_lr": 0.16}
    summary = train_tiny(num_iterations=60, warmup_steps=5, eval_every=20, **rates)
    folder = files.run_dir("tiny")
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "summary.json",
    ]
    promised = "val_bpb min_val_bpb steps tokens train_seconds tokens_per_second seconds_to_first_step"
    promised += " peak_memory_bytes mfu world_size depth"
    assert set(promised.split()) <= set(summary)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("finished", 60, 60 * 256)
    scores = [entry["val_bpb"] for entry in metrics(kind="eval")]
    assert [entry["step"] for entry in metrics(kind="eval")] == [0, 20, 40, 60]
    assert scores[-1] < 0.6 * scores[0]
    assert summary["min_val_bpb"] == min(scores)
    assert [entry["step"] for entry in metrics(kind="step")] == list(range(60))


def test_loss_at_step_0_is_that_of_guessing() -> None:
    train_tiny(num_iterations=1)
    assert metrics(kind="step")[0]["loss"] == pytest.approx(math.log(300), abs=0.01)


def test_the_same_run_twice_is_the_same_to_the_bit() -> None:
    train_tiny(run="a")
    train_tiny(run="b")
    assert metrics("a") == metrics("b")
    assert weights("a", 12) == weights("b", 12)


def test_micro_batches_change_no_loss() -> None:
    train_tiny(run="a", device_batch_size=8, num_iterations=4)
    train_tiny(run="b", device_batch_size=2, num_iterations=4)
    for a, b in zip(metrics("a", "step"), metrics("b", "step"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_how_often_the_corpus_is_read_is_said() -> None:
    args = tiny_args(num_iterations=250, eval_every=0, save_every=0, keep_tails=True)
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = small_text.plan_for(args, Corpus.open("local"), tokenizer, 1)
    told = re.search(r"read it ([\d.]+) times", plan.notices[0])
    assert told
    train_tiny(num_iterations=250, eval_every=0, save_every=0, keep_tails=True)
    assert float(told[1]) == pytest.approx(metrics(kind="step")[-1]["epoch"], rel=0.15)


SOAP = {"matrix_optimizer": "soap", "soap_every": 3}


@pytest.mark.parametrize(
    ("at", "flags"),
    [(1, {}), (4, {}), (7, {}), (7, SOAP)]
    + [pytest.param(at, SOAP, marks=pytest.mark.slow) for at in (1, 3)],
)
def test_a_resumed_run_is_the_same_run_to_the_bit(
    at: int, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(run="whole", **flags)
    with monkeypatch.context() as patch:
        stop_after(at, patch)
        assert train_tiny(run="parts", **flags)["status"] == "stopped"
    train_tiny(run="parts", resume="auto", **flags)
    assert metrics("parts") == metrics("whole")
    assert weights("parts", 12) == weights("whole", 12)


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process the signal that a preemption sends, when `steps` steps are done."""
    done = 0
    real_step = train_run.train_step

    def counted(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*args)

    monkeypatch.setattr(train_run, "train_step", counted)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("soap", marks=pytest.mark.slow)])
def test_a_killed_process_resumes_to_the_bit(optimizer: str, base_dir: Path) -> None:
    train_tiny(run="whole", num_iterations=40, matrix_optimizer=optimizer)
    flags = command_line(run="parts", num_iterations=40, resume="auto", matrix_optimizer=optimizer)
    command = [sys.executable, "-m", "scripts.base_train", *flags]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint_format.steps_of("parts") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 4 <= checkpoint_format.steps_of("parts")[-1] < 40
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL, timeout=200)
    assert weights("parts", 40) == weights("whole", 40)
    assert [entry["step"] for entry in metrics("parts", "step")] == list(range(40))


def test_a_finished_run_resumes_to_nothing() -> None:
    train_tiny()
    before = weights("tiny", 12)
    assert train_tiny(resume="auto")["status"] == "finished"
    assert weights("tiny", 12) == before


def test_a_run_that_exists_is_not_started_over() -> None:
    train_tiny()
    with pytest.raises(UserError, match="has checkpoints already"):
        train_tiny()


def test_nan_never_reaches_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    clean: dict[str, torch.Tensor] = {}
    real_step = train_run.train_step

    def poisoned(plan: Any, state: Any, world: Any) -> Any:
        if state.step == 3:
            clean.update({name: p.detach().clone() for name, p in state.model.named_parameters()})
            nan = torch.full((4, 32, 32), math.nan)
            hook = state.model.embed.register_forward_hook(lambda *_: nan)
            result = real_step(plan, state, world)
            hook.remove()
            after = dict(state.model.named_parameters())
            assert all(torch.equal(after[name], clean[name]) for name in clean)
            return result
        return real_step(plan, state, world)

    monkeypatch.setattr(train_run, "train_step", poisoned)
    with pytest.raises(UserError, match="step 3: loss nan"):
        train_tiny()
    assert clean


def poison(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss of these steps be nan."""
    real_step = train_run.train_step

    def poisoned(plan: Any, state: Any, world: Any) -> Any:
        real_loss = state.model.loss
        if state.step in steps:
            state.model.loss = lambda *batch: real_loss(*batch) * math.nan
        result = real_step(plan, state, world)
        state.model.__dict__.pop("loss", None)
        return result

    monkeypatch.setattr(train_run, "train_step", poisoned)


def test_on_request_a_step_that_is_not_finite_is_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(range(3, 5), monkeypatch)
    summary = train_tiny(on_nonfinite="skip")
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("finished", 12, 2)
    taken = metrics(kind="step")
    assert [entry["step"] for entry in taken] == [0, 1, 2, *range(5, 12)]
    assert [entry["skipped_steps"] for entry in taken] == [0, 0, 0] + 7 * [2]
    assert all(math.isfinite(entry["smoothed_loss"]) for entry in taken)
    assert [entry["step"] for entry in metrics(kind="skip")] == [3, 4]
    assert "first in the gradient of embed.weight" in metrics(kind="skip")[0]["reason"]
    told = capsys.readouterr().out
    assert "step 3: loss nan" in told
    assert "| skipped 2" in told


def test_ten_bad_steps_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(range(1, 12), monkeypatch)
    with pytest.raises(UserError, match="step 10: .* as were the 9 steps before it"):
        train_tiny(on_nonfinite="skip")


def test_the_metrics_have_the_size_of_each_kind_of_update() -> None:
    train_tiny(num_iterations=2)
    for entry in metrics(kind="step"):
        found = {name for name in entry if name.startswith("update_rms_")}
        kinds = ["matrix", "embedding", "value_embedding", "unembedding", "resid", "x0", "smear"]
        assert found == {f"update_rms_{kind}" for kind in kinds}
        assert all(0 < entry[name] < 1 for name in found)


@pytest.mark.parametrize(
    ("every", "at_start", "expected"),
    [(4, False, [4, 8, 10]), (4, True, [0, 4, 8, 10]), (0, False, [10]), (5, False, [5, 10])],
)
def test_cadence_of_hooks(every: int, at_start: bool, expected: list[int]) -> None:
    hook = Hook(lambda state: None, every, at_start)
    assert [step for step in range(11) if hook.due(step, 10)] == expected
