"""A run with differential attention is the same run however it is cut, and whatever the number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files
from tests.dist.launch import digest, lines, losses
from tests.dist.world import train_world
from tests.reliability.figures import MakeFigure
from tests.reliability.test_resume import furthest, parameters
from tests.tiny import tiny_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks: 0.3 s a world, 5 s if spawned"),
]
STEPS = 20
COMMON: dict[str, Any] = {
    "device_batch_size": 1,
    "eval_every": 10,
    "save_every": 1000,
    "keep_last": 99,
    "num_iterations": STEPS,
    "warmup_steps": 0,  # so that the shares move
}


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)


@pytest.mark.parametrize("kind", ["diff1", "diff2"])
def test_stopped_and_resumed_it_is_the_same_run_bit_for_bit(kind: str, tmp_path: Path, figure: MakeFigure) -> None:
    cut = figure("P1", f"runs of 2 ranks with {kind}, cut and resumed: bits")
    common = {**COMMON, "attention_kind": kind}
    train_world(2, tmp_path, run="whole", **common)
    for at in (1, 9):
        run = f"cut{at}"
        with cut.trial(f"cut at {at}"):
            train_world(2, tmp_path, stop_at=at, run=run, **common)
            assert files.read_json(files.run_dir(run) / "summary.json")["status"] == "stopped"
            assert checkpoint_format.steps_of(run) == [at]
            train_world(2, tmp_path, run=run, resume="auto", **common)
            assert lines(run, "") == lines("whole", "")
            assert digest(run, STEPS) == digest("whole", STEPS)


@pytest.mark.parametrize("kind", ["diff1", "diff2"])
def test_any_number_of_ranks_and_changes_of_it_train_the_same_model(
    kind: str, tmp_path: Path, figure: MakeFigure
) -> None:
    same = figure("P2", f"runs with {kind} on 2 ranks, and on 1, 2 and 1")
    common = {**COMMON, "attention_kind": kind}
    train_world(1, tmp_path, run="whole", **common)
    train_world(2, tmp_path, run="on2", check_ranks_every=5, **common)
    for index, size in enumerate((1, 2, 1)):
        train_world(size, tmp_path, stop_at=(7, 14, None)[index], run="on121", resume="auto", **common)
    whole = parameters("whole", STEPS)
    name = next(name for name in whole if ".differential." in name)
    assert whole[name].abs().max() > 0
    for run in ("on2", "on121"):
        with same.trial(run):
            gap = max(abs(a - b) for a, b in zip(losses(run), losses("whole"), strict=True))
            same.measure(gap, "loss")
            assert gap < 1e-5
            assert furthest(parameters(run, STEPS), whole) < 1e-4
