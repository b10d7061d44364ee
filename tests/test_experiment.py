"""The bench: what stands in its file, the order of runs, the report, and a real experiment that is killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dev import experiment_file, experiment_report, experiment_results, experiment_runs
from dev.experiment_results import Point, Result
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config import plan as planning
from tests import tiny
from tests.conftest import REPO

MINIMAL = """
question = "Which?"
seeds = [3, 5]
[flags]
corpus = "prose"
depth = 4
keep_tails = true
[variants.first]
[variants.second]
matrix-lr = 0.03
compile = "off"
[variants.branch]
revision = "main"
"""


def write(folder: Path, text: str = MINIMAL, name: str = "try.toml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_a_file_becomes_runs_of_base_train(tmp_path: Path) -> None:
    experiment = experiment_file.read(write(tmp_path))
    assert experiment.name == "try-d4"
    second = experiment.run(experiment.variants[1], 5)
    assert second.name == "try-d4-second-s5"
    assert second.arguments() == [
        "--corpus=prose",
        "--depth=4",
        "--keep-tails",
        "--matrix-lr=0.03",
        "--compile=off",
        "--run=try-d4-second-s5",
        "--seed=5",
        "--resume=auto",
    ]
    assert experiment_runs.command_of(second, 1)[1:3] == ["-m", "scripts.base_train"]
    launched = experiment_runs.command_of(second, 8)
    assert "--nproc_per_node=8" in launched
    assert launched[launched.index("--") + 1 :] == second.arguments()
    assert [variant.revision for variant in experiment.variants] == [None, None, "main"]


def test_the_depth_of_the_command_line_names_another_experiment(tmp_path: Path) -> None:
    experiment = experiment_file.read(write(tmp_path), depth=6)
    assert experiment.name == "try-d6"
    assert "--depth=6" in experiment.run(experiment.variants[0], 3).arguments()


def test_runs_take_turns_seed_by_seed(tmp_path: Path) -> None:
    experiment = experiment_file.read(write(tmp_path, MINIMAL.replace("[3, 5]", "[3, 5, 6, 9]")))
    order = [(run.seed, run.variant.name) for run in experiment.order()]
    assert order == [
        *((3, name) for name in ("first", "second", "branch")),
        *((5, name) for name in ("second", "branch", "first")),
        *((6, name) for name in ("branch", "first", "second")),
        *((9, name) for name in ("first", "second", "branch")),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[3, 5]", "[3, 3]", "seeds is"),
        ("[3, 5]", "[]", "seeds is missing or empty"),
        ("[3, 5]", '["3"]', "seeds is"),
        ("[3, 5]", "3", "expected list"),
        ('corpus = "prose"\n', "", "lacks corpus"),
        ("depth = 4\n", "", "lacks depth"),
        ("matrix-lr = 0.03", "depth = 5", "sets depth"),
        ("matrix-lr = 0.03", "seed = 5", "which the experiment gives itself"),
        ("matrix-lr = 0.03", "matrix-lr = [0.03]", "matrix-lr is"),
        ('revision = "main"', "revision = 3", "revision is 3"),
        ("[variants.second]", '[variants."../second"]', "not a usable name"),
        ("question", "queston", "unknown field 'queston'"),
        ("[flags]", "[flags", "not a TOML file"),
        ("seeds", "ranks = 0\nseeds", "ranks is 0"),
    ],
)
def test_a_mistake_in_the_file_is_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, MINIMAL.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        experiment_file.read(path)
    assert message in str(error.value)


def result(*points: tuple[int, float, float]) -> Result:
    curve = tuple(Point(step, 256 * step, seconds, bpb) for step, seconds, bpb in points)
    return Result(points[-1][2], curve, 1000.0, 10**9, None)


def test_the_way_to_the_target_is_interpolated_between_validations() -> None:
    curve = result((0, 0.0, 8.0), (10, 5.0, 4.0), (20, 11.0, 3.0), (30, 17.0, 3.5), (40, 23.0, 2.0))
    assert curve.to_target(3.25) == pytest.approx((17.5, 5.0 + 0.75 * 6.0))
    assert curve.to_target(3.0) == pytest.approx((20.0, 11.0))
    assert curve.to_target(8.5) == (0.0, 0.0)
    assert curve.to_target(1.9) is None


def fake_run(name: str, bpb: float, commit: str | None = None, status: str = "finished") -> None:
    """The files of a run, as base_train leaves them."""
    folder = files.run_dir(name)
    provenance = {"provenance": {"commit": commit}} if commit else {}
    files.write_json(folder / "config.json", {"args": {"seed": 0}, "batch_tokens": 512, **provenance})
    summary = {"status": status, "val_bpb": bpb, "peak_memory_bytes": 2_000_000}
    files.write_json(folder / "summary.json", summary)
    lines = [
        {"kind": "eval", "step": 0, "val_bpb": bpb + 2, "train_seconds": 0.0},
        {"kind": "step", "step": 0, "tokens_per_second": 100.0},
        {"kind": "step", "step": 1, "tokens_per_second": 300.0},
        {"kind": "step", "step": 2, "tokens_per_second": 310.0},
        {"kind": "eval", "step": 40, "val_bpb": bpb, "train_seconds": 8.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def test_the_report_gives_differences_errors_and_verdicts(tmp_path: Path) -> None:
    text = MINIMAL.replace("[3, 5]", "[0, 1, 2]").replace(
        "[variants.branch]\nrevision", "[variants.idle]\ncorpus_"
    )
    experiment = experiment_file.read(write(tmp_path, text.replace('corpus_ = "main"', "")))
    for seed, luck in enumerate((0.0, 0.5, 0.1)):
        fake_run(f"try-d4-first-s{seed}", 2.0 + luck, commit="abc")
        fake_run(f"try-d4-second-s{seed}", 1.8 + luck + 0.001 * seed, commit="abd")
    fake_run("try-d4-idle-s0", 2.0)
    fake_run("try-d4-idle-s1", 9.0, status="stopped")
    outcome = experiment_results.collect(experiment)
    first, second, idle = outcome.rows
    assert outcome.target_bpb == 2.5  # the worst of the first variant: all of its runs reach it
    assert (first.verdict, second.verdict, idle.verdict) == ("", "better", "")
    assert second.comparison is not None
    assert second.comparison.difference == pytest.approx(-0.199)
    assert list(second.steps) == pytest.approx([40 * s for s in (1.3 / 2, 1.801 / 2, 1.402 / 2)])
    assert len(idle.results) == 1
    assert outcome.commits == ["abc", "abd"]
    report = experiment_report.markdown(outcome, difference=0.05)
    row = next(line for line in report.splitlines() if line.startswith("| second"))
    assert "| 3 | 2.0010 +- 0.1529 |" in row
    assert "| -0.1990 +- 0.0006 |" in row
    assert "| better |" in row
    assert "300 +- 0" in row
    assert "| 1 of 3 |" in report
    assert "A difference of 0.0500 needs " not in report  # not all variants have two seeds yet: no scatter
    fake_run("try-d4-idle-s1", 2.5)
    report = experiment_report.markdown(experiment_results.collect(experiment), difference=0.05)
    assert "A difference of 0.0500 needs " in report
    told = experiment_report.to_json(outcome)
    assert told["variants"][1]["comparison"]["verdict"] == "better"
    assert told["variants"][2]["comparison"]["p"] is None
    files.write_json(tmp_path / "out.json", told)  # refuses NaN


def test_the_curves_are_drawn_and_the_same_data_give_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    experiment = experiment_file.read(write(tmp_path))
    for name in ("first", "second"):
        fake_run(f"try-d4-{name}-s3", 2.0)
    outcome = experiment_results.collect(experiment)
    for name in ("a.svg", "b/a.svg"):
        experiment_report.draw(outcome, tmp_path / name)
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert text == (tmp_path / "b" / "a.svg").read_text("utf-8")
    assert ">first<" in text
    assert ">second<" in text
    assert ">branch<" not in text  # it has no run


def test_a_run_that_was_begun_with_other_flags_is_not_taken_for_done(tmp_path: Path) -> None:
    experiment = experiment_file.read(write(tmp_path))
    run = experiment.run(experiment.variants[0], 3)
    plan: dict[str, Any] = {"args": {"depth": 4, "matrix_lr": None, "seed": 3, "new_flag": 1}}
    assert not experiment_runs.is_done(run, plan)
    fake_run(run.name, 2.0)
    folder = files.run_dir(run.name)
    files.write_json(folder / "config.json", {"args": {"depth": 4, "matrix_lr": None, "seed": 9}})
    assert experiment_runs.is_done(run, plan)
    files.write_json(folder / "config.json", {"args": {"depth": 4, "matrix_lr": 0.5}})
    with pytest.raises(UserError, match="matrix_lr 0.5 then, None now"):
        experiment_runs.is_done(run, plan)


def test_a_run_that_another_process_is_at_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = experiment_file.read(write(tmp_path, MINIMAL.replace("[3, 5]", "[3]")))
    folder = experiment_file.folder_of(experiment.name)
    folder.mkdir(parents=True)
    plans: dict[str, dict[str, Any]] = {variant.name: {"args": {}} for variant in experiment.variants}
    queue = experiment_runs.Queue(experiment, plans, {v.name: REPO for v in experiment.variants}, threads=1)
    locks = [(folder / f"{run.name}.lock").open("w") for run in queue.waiting]
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    for _ in range(2):
        queue.start(3)
        assert (len(queue.waiting), queue.under_way) == (3, [])
    assert capsys.readouterr().out.count("another process is at it") == 3
    fake_run("try-d4-first-s3", 2.0)  # it came to its end
    queue.start(3)
    assert [run.variant.name for run in queue.waiting] == ["second", "branch"]


# -----------------------------------------------------------------------------
# A real one


def real_file(folder: Path, steps: int, seeds: str = "[0, 1]", extra: str = "") -> Path:
    """Two learning rates on the tiny corpus of the tests."""
    lines = []
    for flag in tiny.command_line(num_iterations=steps, run="", seed=0, eval_every=10):
        name, _, value = flag.removeprefix("--").partition("=")
        if name not in ("seed", "run"):
            lines.append(f'{name} = "{value}"')
    text = "\n".join(
        [
            'question = "Does a larger learning rate help the tiny model?"',
            f"seeds = {seeds}",
            "keep_checkpoints = false",
            "[flags]",
            *lines,
            "[variants.low]",
            "matrix-lr = 0.001",
            "[variants.high]",
            "matrix-lr = 0.02",
            extra,
        ]
    )
    return write(folder, text, "real.toml")


Bench = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Starts the command; what still runs when a test fails is asked to stop, and stops its runs."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dev.experiment", str(path), *flags]
        piped = subprocess.PIPE
        process = subprocess.Popen(command, cwd=REPO, stdout=piped, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate()


def started(name: str) -> dict[str, int]:
    """How often each run of an experiment was started, from its console."""
    folder = experiment_file.folder_of(name)
    return {path.stem: path.read_text("utf-8").count("model: depth") for path in sorted(folder.glob("*.log"))}


def wait_for(run: str, step: int, seconds: float = 600.0) -> None:
    """Until a run has come so far."""
    metrics = files.run_dir(run) / "metrics.jsonl"
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        if metrics.exists() and metrics.read_text("utf-8").count('"kind": "step"') >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not come to step {step}")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes on a quiet machine
def test_a_real_experiment_is_killed_and_stopped_and_goes_on_with_what_is_left(
    tmp_path: Path, bench: Bench
) -> None:
    tiny.tiny_corpus(tmp_path)
    path = real_file(tmp_path, steps=60)
    names = [f"real-d2-{variant}-s{seed}" for seed in (0, 1) for variant in ("low", "high")]

    killed = bench(path)  # by a machine that goes away: the bench and the run under way
    wait_for("real-d2-high-s0", 20)
    before = files.read_json(files.run_dir("real-d2-low-s0") / "summary.json")
    for child in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(killed.pid)], capture_output=True, text=True
    ).stdout.split():
        os.kill(int(child), signal.SIGKILL)
    killed.kill()
    killed.communicate()

    stopped = bench(path)  # by a person
    wait_for("real-d2-high-s1", 20)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=600)
    assert stopped.returncode == 75, output
    assert "4 runs, 1 of them done" in output
    assert "real-d2-high-s1: stopped" in output

    last = bench(path, "--json", str(tmp_path / "out.json"))
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    assert "4 runs, 2 of them done" in output
    assert files.read_json(files.run_dir("real-d2-low-s0") / "summary.json") == before  # kept as it was
    assert started("real-d2") == dict(zip(sorted(names), [2, 2, 1, 1], strict=True))
    for name in names:
        metrics = (files.run_dir(name) / "metrics.jsonl").read_text("utf-8")
        steps = [json.loads(line) for line in metrics.splitlines()]
        assert [entry["step"] for entry in steps if entry["kind"] == "step"] == list(range(60))
        assert not files.checkpoints_dir(name).exists()
    assert "going on from" in (experiment_file.folder_of("real-d2") / "real-d2-high-s1.log").read_text(
        "utf-8"
    )
    told = files.read_json(tmp_path / "out.json")
    assert [len(variant["runs"]) for variant in told["variants"]] == [2, 2]
    assert told["variants"][1]["comparison"]["verdict"] in ("better", "not told apart")
    assert (tmp_path / "real-d2.svg").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_revision_runs_by_its_own_code_and_its_worktree_goes_when_all_is_done(
    tmp_path: Path, bench: Bench
) -> None:
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    tiny.tiny_corpus(tmp_path)
    path = real_file(tmp_path, steps=12, seeds="[0]", extra='[variants.head]\nrevision = "HEAD"')
    process = bench(path, "--jobs", "2")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout
    config = files.read_json(files.run_dir("real-d2-head-s0") / "config.json")
    assert config["provenance"]["commit"] == head[:12]  # and no +: nothing is changed there
    assert not list(experiment_file.folder_of("real-d2").glob("code-*"))
    listed = subprocess.run(["git", "worktree", "list"], cwd=REPO, capture_output=True, text=True).stdout
    assert str(tmp_path) not in listed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_base_train_refuses_is_said_before_anything_is_trained(tmp_path: Path, bench: Bench) -> None:
    tiny.tiny_corpus(tmp_path)
    for extra, message in (
        ("[variants.wrong]\nmatrix-learning-rate = 1", "variant 'wrong': base_train refuses it"),
        ('[variants.longer]\nnum-iterations = "13"', "'low' on 3,072"),
    ):
        process = bench(real_file(tmp_path, steps=12, extra=extra))
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 2
        assert message in output
    assert not list((files.base_dir() / "runs").glob("*"))


@pytest.mark.parametrize(
    "path", sorted((REPO / "dev" / "experiments").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_experiments_at_hand_ask_for_runs_that_base_train_accepts(path: Path) -> None:
    experiment = experiment_file.read(path)
    tokens = set()
    for variant in (
        each for each in experiment.variants if each.revision is None
    ):  # others parse for themselves
        args = arguments.parse(arguments.TrainArgs, experiment.run(variant, experiment.seeds[0]).arguments())
        tokens.add(planning.plan(args, vocab_size=8192).tokens)
    assert len(tokens) == 1
