"""The finished run has the mean of the weights of its last steps; before that nothing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint_files
from nanochat.errors import UserError
from nanochat.tail_average import TailAverage
from tests.test_train import metrics, stop_after, weights
from tests.tiny import tiny_corpus, train_tiny


def saved(run: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_files.folder_of(run, step) / checkpoint_files.MODEL)


def test_a_run_ends_with_the_mean_of_its_last_quarter(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    every = {"save_every": 1, "keep_last": 99}
    train_tiny(run="plain", **every)
    train_tiny(run="tail", tail_average=0.25, **every)
    for name, mean in saved("tail", 12).items():
        steps = torch.stack([saved("plain", step)[name] for step in (10, 11, 12)])
        torch.testing.assert_close(mean, steps.mean(0), rtol=1e-6, atol=1e-7)
        assert torch.equal(saved("tail", 11)[name], steps[1])
    scores = {run: metrics(run, "eval") for run in ("plain", "tail")}
    assert [entry["step"] for entry in scores["tail"]] == [0, 5, 10, 12]
    assert scores["tail"][:-1] == scores["plain"][:-1]
    assert scores["tail"][-1]["val_bpb"] != scores["plain"][-1]["val_bpb"]


@pytest.mark.parametrize("at", [pytest.param(7, marks=pytest.mark.slow), 10])
def test_a_resumed_run_averages_the_same_weights(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_corpus(tmp_path)
    train_tiny(run="whole", tail_average=0.4)
    with monkeypatch.context() as patch:
        stop_after(at, patch)
        train_tiny(run="parts", tail_average=0.4)
    train_tiny(run="parts", tail_average=0.4, resume="auto")
    assert weights("parts", 12) == weights("whole", 12)
    with pytest.raises(UserError, match=r"--tail-average: 0\.4 then, 0\.0 now"):
        train_tiny(run="parts", resume="auto")


def test_a_state_without_the_mean_is_refused_by_name() -> None:
    average = TailAverage({"w": torch.ones(2, 3)}, 10, 0.5)
    with pytest.raises(UserError, match=r"w\.average is missing or has another shape, expected \(2, 3\)"):
        average.load_state_tensors({"w.momentum": torch.ones(2, 3)})
    assert TailAverage({"w": torch.ones(2, 3)}, 10, 0.0).state_tensors() == {}
