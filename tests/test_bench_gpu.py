"""The bench of a GPU: its order, its file, its budget, and every measurement at toy size on this CPU."""

from __future__ import annotations

import doctest
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dev.bench import gpu, gpu_figures
from dev.bench.gpu import Measurement, Results, by_worth, measure_all
from nanochat.common.errors import UserError
from nanochat.config.arguments import TrainArgs
from tests.conftest import REPO

CPU = torch.device("cpu")
HERE: dict[str, Any] = {"device": "a GPU", "torch": "2.15.0", "cuda": "13.2"}
LISTED = [Measurement(name, "mlp", 10.0) for name in ("first", "second", "third")]


def made(measurement: Measurement, left_s: float) -> list[dict[str, Any]]:
    """One row, without measuring."""
    return [{"metric": "mlp_time", "ours": 1.0, "unit": "s"}]


def names(path: Path) -> list[str]:
    return [row["name"] for row in json.loads(path.read_text("utf-8"))["rows"]]


def test_the_most_valuable_measurements_come_first() -> None:
    listed = [measurement.name for measurement in by_worth((12, 24, 20), ["varlen", "sdpa"], True)]
    assert len(listed) == len(set(listed))
    assert listed[:6] == [
        "machine_rates",
        "fp8_rates",
        "sanity",
        "step d12 bf16 varlen",
        "step d24 fp8 varlen",
        "step d24 bf16 varlen",
    ]
    for earlier, later in (
        ("loss_of_tokens d24", "attention_kernel d24 sdpa"),
        ("mlp d24 fp8", "optimizer_update d24"),
        ("core_scoring d12", "step d20 fp8 varlen"),
        ("step d20 bf16 varlen", "step d12 bf16 sdpa"),
    ):
        assert listed.index(earlier) < listed.index(later)


def test_the_examples_in_the_documentation() -> None:
    assert doctest.testmod(gpu).failed == 0


def test_what_counts_most_fits_the_budget() -> None:
    listed = by_worth((12, 24, 20), ["varlen", "flex", "sdpa"], True)
    counts = next(i for i, measurement in enumerate(listed) if measurement.figures == "decoding")
    assert sum(measurement.expected_s for measurement in listed[:counts]) < gpu.BUDGET_S


@pytest.mark.parametrize(
    ("depth", "recipe", "tokens"),
    [
        (12, TrainArgs.recipe, 524_288),
        (24, TrainArgs.recipe, 1_048_576),
        (20, TrainArgs.recipe, 1_048_576),
        (12, "speedrun-124m", 393_216),
    ],
)
def test_a_step_on_one_gpu_is_the_share_of_one_of_eight(depth: int, recipe: str, tokens: int) -> None:
    plan = gpu_figures.step_plan(gpu_figures.FULL, depth, recipe=recipe)
    assert plan.world_size == 1
    assert plan.tokens_at(plan.steps - 1) == plan.batch_tokens == tokens // 8


def test_rows_are_in_the_file_before_the_next_measurement(tmp_path: Path) -> None:
    path, seen = tmp_path / "gpu.json", []

    def measure(measurement: Measurement, left_s: float) -> list[dict[str, Any]]:
        if measurement.name == "third":
            raise KeyboardInterrupt  # as a signal does
        seen.append(names(path) if path.exists() else [])
        return made(measurement, left_s)

    with pytest.raises(KeyboardInterrupt):
        list(measure_all(LISTED, Results(path, HERE, "c1"), 100.0, measure))
    assert seen == [[], ["first"]]
    assert names(path) == ["first", "second"]


def test_a_second_call_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path, measured = tmp_path / "gpu.json", []

    def measure(measurement: Measurement, left_s: float) -> list[dict[str, Any]]:
        measured.append(measurement.name)
        if measurement.name == "second" and measured.count("second") == 1:
            raise UserError("exit code 1: out of memory")
        return made(measurement, left_s)

    first = list(measure_all(LISTED, Results(path, HERE, "c1"), 100.0, measure))
    assert "  FAILED: exit code 1: out of memory" in first
    assert names(path) == ["first", "second", "third"]
    second = list(measure_all(LISTED, Results(path, HERE, "c1"), 100.0, measure))
    assert measured == ["first", "second", "third", "second"]
    assert second[0] == "first: measured before"
    assert sorted(names(path)) == ["first", "second", "third"]
    assert not any("error" in row for row in json.loads(path.read_text("utf-8"))["rows"])


@pytest.mark.parametrize(("machine", "commit"), [(HERE, "c2"), ({**HERE, "device": "another GPU"}, "c1")])
def test_figures_of_another_commit_or_machine_are_put_aside(
    tmp_path: Path, machine: dict[str, Any], commit: str
) -> None:
    path = tmp_path / "gpu.json"
    list(measure_all(LISTED, Results(path, HERE, "c1"), 100.0, made))
    results = Results(path, machine, commit)
    assert not results.rows
    assert not path.exists()
    assert names(tmp_path / "gpu-c1.json") == ["first", "second", "third"]


def test_what_the_time_left_is_too_short_for_is_left_out(tmp_path: Path) -> None:
    listed = [Measurement("long", "mlp", 60.0), Measurement("short", "mlp", 5.0)]
    results = Results(tmp_path / "gpu.json", HERE, "c1")
    lines = list(measure_all(listed, results, 30.0, made))
    assert lines[0].startswith("long: left out, needs 60 s of ")
    assert results.has("short")
    assert not results.has("long")


def test_a_process_that_fails_tells_its_last_line(tmp_path: Path) -> None:
    broken = Measurement("broken", "training_step", 1.0, {"depth": 2, "dtype": "bf16", "backend": "none"})
    with pytest.raises(UserError, match="exit code 2: .*--attention=none"):
        gpu.in_process_of_its_own(broken, "cpu", tmp_path / "gpu.log", 100.0)
    with pytest.raises(UserError, match="ended after 0 s"):
        gpu.in_process_of_its_own(broken, "cpu", tmp_path / "gpu.log", 0.2)


@pytest.mark.parametrize(
    ("figures", "setting", "metrics"),
    [
        ("machine_rates", {}, ["peak_flops", "matmul_square", "matmul_block", "memory_rate", "launch_time"]),
        ("training_step", {"dtype": "bf16"}, ["step_time", "tokens_per_second", "mfu", "peak_memory"]),
        ("training_step", {"dtype": "bf16", "recipe": "speedrun-124m"}, ["step_time"]),
        ("loss_of_tokens", {}, ["loss_time", "head_products_time"]),
        ("mlp", {"dtype": "bf16"}, ["mlp_time", "mlp_products_time"]),
        ("attention_kernel", {"backend": "sdpa"}, ["attention_time"]),
        ("optimizer_update", {}, ["optimizer_time"]),
        ("decoding", {}, ["decoding", "decoding"]),
        ("core_scoring", {}, ["core_scoring_first", "core_scoring"]),
    ],
)
def test_every_measurement_runs_on_this_cpu(
    figures: str, setting: dict[str, Any], metrics: list[str]
) -> None:
    depth = {} if figures == "machine_rates" else {"depth": 2}
    rows = gpu_figures.FIGURES[figures](CPU, **depth, **setting)
    assert [row["metric"] for row in rows][: len(metrics)] == metrics
    assert all(row["ours"] > 0 for row in rows)
    json.dumps(rows)


def test_the_batches_of_a_step_are_those_of_the_plan() -> None:
    plan = gpu_figures.step_plan(gpu_figures.TOY, 2)
    loader = gpu_figures.RandomBatches(plan, CPU)
    batches = loader.next_batch()
    assert sum(len(batch.inputs) for batch in batches) == plan.batch_rows
    assert torch.equal(batches[0][0][:, 1:], batches[0][1][:, :-1])
    rows = gpu_figures.training_step(CPU, 2, "bf16")
    assert rows[0]["tokens"] == plan.batch_tokens
    assert rows[0]["backend"] == "sdpa"


def command(path: Path) -> list[str]:
    toys = ["--device-type", "cpu", "--depths", "2", "--json", str(path)]
    return [sys.executable, "-m", "dev.bench.gpu", *toys]


@pytest.mark.slow
def test_the_command_survives_a_kill_and_goes_on(tmp_path: Path) -> None:
    path, environment = tmp_path / "gpu.json", {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(command(path), cwd=REPO, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = names(path)
    assert set(before) == {"machine_rates"}
    again = [*command(path), "--budget", "40"]
    done = subprocess.run(again, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    assert "machine_rates: measured before" in done.stdout.splitlines()
    assert "of 12 measurements are in" in done.stdout
    assert "sanity" in names(path)
    assert names(path)[: len(before)] == before
