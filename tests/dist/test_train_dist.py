"""Two ranks train the run that one trains: same batches, same losses, one set of files, and either goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import files
from tests.tiny import read_metrics
from tests.conftest import REPO
from tests.tiny import command_line, tiny_corpus, train_tiny

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def launch(ranks: int, module: str, *flags: str) -> str:
    done = subprocess.run(
        [*TORCHRUN, f"--nproc_per_node={ranks}", "-m", module, "--", *flags],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps_of(run: str) -> list[dict[str, Any]]:
    return [e for e in read_metrics(files.run_dir(run) / "metrics.jsonl") if e["kind"] == "step"]


@pytest.mark.slow
def test_two_ranks_train_the_run_of_one(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    train_tiny(run="one")
    launch(2, "scripts.base_train", *command_line(run="two", num_iterations=12))
    one, two = steps_of("one"), steps_of("two")
    assert [e["step"] for e in two] == list(range(12))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    summary = files.read_json(files.run_dir("two") / "summary.json")
    assert (summary["world_size"], summary["status"]) == (2, "finished")
    assert summary["val_bpb"] == pytest.approx(
        files.read_json(files.run_dir("one") / "summary.json")["val_bpb"], abs=1e-5
    )
    launch(
        2,
        "scripts.base_eval",
        *("--run=two", "--eval=core,bpb", "--eval-bundle=mini", "--core-metric-max-per-task=4"),
        *("--eval-tokens=512", "--device-type=cpu", "--dtype=float32"),
    )
    assert files.read_json(files.run_dir("two") / "base_eval.json")["world_size"] == 2


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    train_tiny(run="one")
    # Only the first 8 steps: the checkpoint of step 8 is then all that one rank has to go on from.
    launch(2, "scripts.base_train", *command_line(run="two"))
    files.remove_dir(files.checkpoints_dir("two") / "step_000012")
    (files.run_dir("two") / "summary.json").unlink()
    train_tiny(run="two", resume="auto")
    for a, b in zip(steps_of("one"), steps_of("two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
