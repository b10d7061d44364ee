"""P8 and P9: signals end a run cleanly; a rank that hangs, dies or goes astray is named; restarts go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files
from nanochat.common.stop_signals import STOPPED
from tests.conftest import REPO
from tests.dist.launch import command, digest, faulty, launch, lines, losses
from tests.reliability.figures import MakeFigure
from tests.tiny import command_line, tiny_corpus, train_tiny

pytestmark = pytest.mark.slow
DEADLINE_S = 4.0


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)


def left_behind(run: str) -> list[str]:
    """Processes that still have the run's name on their command line."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if f"--run={run} " in line + " "]


WAITED, SILENT = "has kept the others waiting", "gives no sign of life"
HANGS = [
    *[("hung", rank, where, WAITED) for rank in (0, 1) for where in ("loader", "forward", "collective")],
    ("hung in C, holding the interpreter", 1, "loader", SILENT),
    ("stopped", 1, "loader", SILENT),
]


@pytest.mark.parametrize(("kind", "rank", "where", "said"), HANGS, ids=lambda value: str(value))
def test_a_hung_rank_ends_the_run_with_its_name(
    kind: str, rank: int, where: str, said: str, figure: MakeFigure
) -> None:
    named = figure("P9", f"rank {rank} {kind} ({where}): named, stacks written")
    name = f"hang-{kind.split()[-1]}-{rank}-{where}"
    flags = command_line(run=name, num_iterations=1000, save_every=3, dist_timeout=DEADLINE_S)
    step = 7 if where == "collective" else 6  # the first sum after a step is before the save that is due then
    # torchrun waits 30 s for a stopped process to heed SIGTERM.
    done = launch(2, flags, program=faulty(kind, rank, step, where))
    ended = time.time()
    assert done.returncode == 1
    assert f"rank {1 - rank}: rank {rank} (" in done.stderr
    assert said in done.stderr
    assert f"at step {step if 'waiting' in said else ''}" in done.stderr  # or where it was seen last
    folder = files.run_dir(name)
    # The healthy rank has written its stack always, the hung one wherever it runs at all.
    assert "nanochat/train/run.py" in (folder / f"stack_rank{1 - rank}.txt").read_text()
    if kind != "stopped":
        assert "fault_script.py" in (folder / f"stack_rank{rank}.txt").read_text()
    dumped = (folder / f"stack_rank{1 - rank}.txt").stat().st_mtime
    last_step = (folder / "metrics.jsonl").stat().st_mtime
    took = dumped - last_step
    assert took < DEADLINE_S + 6  # a busy machine, not a promise: the figure is recorded
    assert left_behind(name) == []
    assert checkpoint_format.steps_of(name)[-1] == 6
    named.measure(round(took - DEADLINE_S, 2), f"s after the deadline of {DEADLINE_S:g} s")
    assert ended > dumped


@pytest.mark.parametrize(("kind", "said"), [("killed", "is gone"), ("an exception", "has left: OSError")])
def test_a_dead_rank_ends_the_run_with_its_name(kind: str, said: str, figure: MakeFigure) -> None:
    figure("P9", f"rank 1 of 2, {kind}: named")
    name = f"dead-{kind.split()[-1]}"
    flags = command_line(run=name, num_iterations=1000, dist_timeout=DEADLINE_S)
    done = launch(2, flags, program=faulty(kind, 1, 6))
    assert done.returncode == 1
    assert re.search(rf"rank 0: rank 1 \(.*{said}", done.stderr)
    assert left_behind(name) == []


def test_a_launch_that_loses_a_rank_restarts_and_ends_as_if_it_had_not(figure: MakeFigure) -> None:
    figure("P9", "killed under --max-restarts: same weights at the end")
    whole = command_line(run="whole", num_iterations=20, save_every=5)
    assert launch(2, whole).returncode == 0
    flags = command_line(run="parts", num_iterations=20, save_every=5)  # without --resume
    done = launch(2, flags, "--max-restarts=2", program=faulty("killed", 1, 12))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout
    assert lines("parts", "") == lines("whole", "")
    assert digest("parts", 20) == digest("whole", 20)


def test_ranks_that_differ_stop_the_run_by_name_before_they_are_saved() -> None:
    flags = command_line(run="astray", num_iterations=40, save_every=1, check_ranks_every=5)
    done = launch(3, [*flags, "--total-batch-size=384"], program=faulty("a flipped bit", 2, 12))
    assert done.returncode == 1
    told = "step 15: the weights are not the same on all ranks: rank 2 in resid_scale"
    assert told in done.stderr
    assert checkpoint_format.steps_of("astray")[-1] == 14


def test_ranks_that_agree_go_on() -> None:
    assert launch(2, command_line(run="same", check_ranks_every=1)).returncode == 0
    assert len(losses("same")) == 12


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_preempted_run_saves_its_step_and_resumes_to_the_same_end(ranks: int, figure: MakeFigure) -> None:
    """SIGTERM goes to torchrun, as a scheduler sends it; alone, to the process."""
    stops = figure("P8", f"signals on {ranks} ranks: saved, same weights at the end")
    common = {"num_iterations": 250, "save_every": 1000, "eval_every": 1000}
    flags = command_line(run="parts", **common, resume="auto")
    alone = [sys.executable, "-m", "scripts.base_train", *flags]
    asked = command(ranks, flags) if ranks > 1 else alone
    seconds = []
    for part, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
        if ranks > 1 and number == signal.SIGUSR1:
            break  # torchrun does not pass it on: Slurm sends it to the workers
        process = subprocess.Popen(asked, cwd=REPO, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if re.match(rf"step +{20 + 30 * part}/250", line):
                    break
            started = time.monotonic()
            process.send_signal(number)
            rest = process.stdout.read()
            code = process.wait(60)
        finally:
            process.kill()
        seconds.append(time.monotonic() - started)
        stopped = int(re.findall(r"stopped by a signal after step (\d+)", rest)[0])
        assert code == (1 if ranks > 1 else STOPPED)  # torchrun's own code is 1 whatever its workers say
        assert checkpoint_format.steps_of("parts")[-1] == stopped
        assert (files.read_json(files.run_dir("parts") / "summary.json")["status"]) == "stopped"
    done = subprocess.run(asked, cwd=REPO, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = command_line(run="whole", **common)
    if ranks > 1:
        assert launch(ranks, whole).returncode == 0
    else:
        train_tiny(run="whole", **common)
    assert lines("parts", "") == lines("whole", "")
    assert digest("parts", 250) == digest("whole", 250)
    for took in seconds:  # all of them led to the one end that was compared
        with stops.trial():
            stops.measure(round(took, 1), "s from the signal to the exit")


def test_workers_that_are_stopped_leave_with_75() -> None:
    flags = command_line(run="stopped", num_iterations=1000)
    done = launch(2, flags, program=faulty("preempted", 1, 7))
    assert f"exitcode  : {STOPPED}" in done.stderr  # torchrun ends the other while it leaves
    assert checkpoint_format.steps_of("stopped")[-1] == 8


@pytest.mark.parametrize("where", ["eval", "save"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_amid_a_validation_or_a_save_costs_nothing(
    ranks: int, where: str, figure: MakeFigure
) -> None:
    """One rank alone gets it; all leave at the same step, and what was measured is measured again."""
    figure("P8", f"a signal amid a {where}, {ranks} ranks: same end")
    common = {"num_iterations": 20, "save_every": 5, "eval_every": 5, "eval_tokens": 4096}
    flags = command_line(run="parts", **common)
    rank = ranks - 1 if where == "eval" else 0  # rank 0 writes
    program = faulty("preempted", rank, 10, where)
    alone = [sys.executable, *program, *flags]
    asked = command(ranks, flags, program=program) if ranks > 1 else alone
    done = subprocess.run(asked, cwd=REPO, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == (1 if ranks > 1 else STOPPED), done.stderr[-2000:]
    stopped = checkpoint_format.steps_of("parts")[-1]
    assert stopped == 10 if where == "eval" else 10 <= stopped < 20
    assert files.read_json(files.run_dir("parts") / "summary.json")["status"] == "stopped"
    assert launch(ranks, [*flags, "--resume=auto"]).returncode == 0
    assert launch(ranks, command_line(run="whole", **common)).returncode == 0
    assert lines("parts", "") == lines("whole", "")
    assert digest("parts", 20) == digest("whole", 20)


def test_a_machine_that_is_lost_leaves_a_smaller_run_that_goes_on(figure: MakeFigure) -> None:
    """--nnodes=1:2: one of two machines vanishes with its workers; the other goes on alone from a save."""
    figure("P9", "one machine of --nnodes=1:2 lost: the other goes on")
    flags = command_line(run="elastic", num_iterations=400, save_every=5, dist_timeout=20)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1"]
    agent += [
        "--max-restarts=3",
        "--rdzv-id=elastic",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
    ]
    # The first holds the rendezvous: without that said, it is whichever comes first.
    conf = "--rdzv-conf=last_call_timeout=5,join_timeout=60,is_host="
    first, second = (
        subprocess.Popen(
            [*agent, conf + holds, *("-m", "scripts.base_train", "--"), *flags],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for holds in ("true", "false")
    )
    try:
        deadline = time.monotonic() + 120
        while max(checkpoint_format.steps_of("elastic"), default=0) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert files.read_json(files.run_dir("elastic") / "config.json")["world_size"] == 2
        lost = max(checkpoint_format.steps_of("elastic"))
        # A machine takes its agent and its workers along; the other one holds the rendezvous.
        children = subprocess.run(
            ["pgrep", "-P", str(second.pid)], capture_output=True, text=True, check=True
        )
        for process_id in (second.pid, *map(int, children.stdout.split())):
            os.kill(process_id, signal.SIGKILL)
        out, _ = first.communicate(timeout=240)
    finally:
        for process in (first, second):
            process.kill()
    assert first.returncode == 0, out[-3000:]
    summary = files.read_json(files.run_dir("elastic") / "summary.json")
    assert (summary["status"], summary["world_size"]) == ("finished", 1)
    assert f"going on from {checkpoint_format.folder_of('elastic', lost).parent}" in out
    assert [entry["step"] for entry in lines("elastic")] == list(range(400))
