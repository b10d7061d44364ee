"""What a run leaves and whom it tells: damaged metrics, trackers that fail, ranks that differ, growth."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from dev.fault_box import ROOT, TINY, Box, expect_ok, row, wait_until
from dev.fault_rows.runs import STOPPED, last_saved, steps_in_metrics


def finished(box: Box, *flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A run of 12 steps, started or gone on with."""
    if not (box.base / "data").exists():
        box.tiny()
    common = [*TINY, "--num-iterations=12", "--save-every=4", "--keep-last=9", "--eval-every=0", "--run=r"]
    done = box.run("base_train", *common, *flags, env=env)
    expect_ok(done)
    return done


def go_back(box: Box) -> Path:
    """Leave a run of 12 steps as if it had been killed after the checkpoint of step 8; its metrics.jsonl."""
    run = box.base / "runs" / "r"
    for path in (run / "checkpoints" / "step_000012").iterdir():
        path.unlink()
    (run / "checkpoints" / "step_000012").rmdir()
    (run / "summary.json").unlink()
    return run / "metrics.jsonl"


def weights(box: Box, run: str, step: int) -> str:
    """A hash of the weights of a checkpoint."""
    path = box.base / "runs" / run / "checkpoints" / f"step_{step:06d}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- metrics.jsonl ----------------------------------------------------------------------------------------


DAMAGE = {
    "torn": b'{"kind": "step", "step": 8, "lo',
    "NUL block": b"\0" * 4096,
    "bad UTF-8": b'{"kind": "step", "step": 8, "text": "\xff\xfe"}\n',
    "blank": b"\n\n\n",
    "NaN": b'{"kind": "step", "step": 9, "loss": NaN}\n',
    "list": b"[1, 2]\n",
    "without kind": b'{"step": 3}\n',
    "step is a text": b'{"kind": "step", "step": "3"}\n',
}


@row("T48", "metrics.jsonl: torn, NUL block, bad UTF-8, blank, NaN, list; then resume", wanted="cut back")
def t48(box: Box) -> None:
    finished(box)
    want = steps_in_metrics(box, "r")
    path = go_back(box)
    path.write_bytes(path.read_bytes() + b"".join(DAMAGE.values()))
    finished(box, "--resume=auto")
    assert steps_in_metrics(box, "r") == want
    path = go_back(box)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], DAMAGE["NUL block"], b"\n", DAMAGE["list"], *lines[1:]]))
    finished(box, "--resume=auto")
    assert steps_in_metrics(box, "r") == want
    expect_ok(box.run("report", "--run=r"))


@row("T50", "metrics.jsonl lost, then resume", wanted="goes on, and says what the curve lacks")
def t50(box: Box) -> None:
    finished(box)
    whole = weights(box, "r", 12)
    go_back(box).unlink()
    done = finished(box, "--resume=auto")
    told = [line for line in (done.stdout + done.stderr).splitlines() if "metrics.jsonl" in line]
    assert len(told) == 1, told
    assert "begins at step 8" in told[0], told
    assert steps_in_metrics(box, "r") == [8, 9, 10, 11]
    assert weights(box, "r", 12) == whole


@row("D23", "half a line at the end of metrics.jsonl (kill -9), report", wanted="a report, which tells of it")
def d23(box: Box) -> None:
    finished(box)
    path = box.base / "runs" / "r" / "metrics.jsonl"
    whole = path.read_bytes()
    for damage in (DAMAGE["torn"], DAMAGE["NUL block"], b'{"kind": "st', DAMAGE["bad UTF-8"]):
        path.write_bytes(whole + damage)
        (path.parent / "report.html").unlink()
        done = box.run("report", "--run=r")
        expect_ok(done)
        page = (path.parent / "report.html").read_text()
        assert "Left out: 1 lines" in page, "the damage is not told"


# ---- the tracker, the environment -------------------------------------------------------------------------


@row("T86", "HF_TOKEN, WANDB_API_KEY and others in the environment", wanted="in no file, on no line")
def t86(box: Box) -> None:
    secrets = {
        name: f"sesame-{number}-{name.lower()}"
        for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT"))
    }
    printed = finished(box, env=secrets)
    scored = box.run("base_eval", "--run=r", "--eval=bpb,sample", "--device-type=cpu", env=secrets)
    exported = box.run("export", "--run=r", env=secrets)
    report = box.run("report", "--run=r", env=secrets)
    for done in (printed, scored, exported, report):
        expect_ok(done)
        assert "sesame" not in done.stdout + done.stderr
    for path in box.base.rglob("*"):
        assert not path.is_file() or b"sesame" not in path.read_bytes(), path


WANDB = """
import atexit, os, re, sys, time
class Run:
    def log(self, *args, **options):
        {log}
    def finish(self):
        pass
def init(**options):
    {init}
    return Run()
"""


def tracked(box: Box, code: str, run: str, mode: str = "online") -> subprocess.CompletedProcess[str]:
    """A short run that logs to a module wandb with this code."""
    modules = box.folder / f"modules-{run}"
    modules.mkdir()
    (modules / "wandb.py").write_text(code)
    env = {"PYTHONPATH": f"{modules}{os.pathsep}{ROOT}"}
    flags = [*TINY, "--num-iterations=12", "--eval-every=0", f"--wandb={mode}", f"--run={run}"]
    done = box.run("base_train", *flags, env=env, timeout=90)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-600:]
    assert done.returncode == 0, f"{run}: exit code {done.returncode}: {done.stderr[-400:]}"
    assert steps_in_metrics(box, run) == list(range(12)), run
    assert last_saved(box, run) == 12, run
    return done


@row(
    "T97",
    "wandb: exit hook hangs; sys.exit in init; takes stdout; chdir, environ; holds the interpreter",
    wanted="the run is as without it; a failure is said once",
)
def t97(box: Box) -> None:
    box.tiny()
    hook = "atexit.register(time.sleep, 1000)"
    hostile = "os.chdir('/'); os.environ.clear(); sys.stdout = sys.stderr = open(os.devnull, 'w')"
    for run, init, log, said in (
        ("hook", hook, "pass", 0),
        ("exits", "sys.exit(3)", "pass", 1),
        ("hostile", hostile, "pass", 0),
        ("dies", "os.kill(os.getpid(), 9)", "pass", 1),
        ("holds", "pass", "re.match('(a*)*b', 'a' * 40)", 1),
    ):
        done = tracked(box, WANDB.format(init=init, log=log), run)
        assert done.stdout.count("going on without it") == said, f"{run}: {done.stdout[-400:]}"
        assert "step    12/12" in done.stdout, f"{run}: {done.stdout[-400:]}"


@row("B35", "wandb offline; online without a key; a broken or absent install", wanted="unharmed, said once")
def b35(box: Box) -> None:
    box.tiny()
    for mode in ("offline", "online"):
        seen = box.folder / f"seen-{mode}"
        works = WANDB.format(
            init=f"assert options['mode'] == {mode!r}", log=f"open({str(seen)!r}, 'a').write('x')"
        )
        done = tracked(box, works, mode, mode)
        assert len(seen.read_text()) >= 12
        assert "going on without it" not in done.stdout
    for run, code in (
        ("no-key", WANDB.format(init="raise RuntimeError('api_key not configured')", log="pass")),
        ("broken", "import a_module_that_is_not_there"),
        ("absent", "raise ModuleNotFoundError('No module named wandb')"),
        ("syntax", "def init(:"),
    ):
        done = tracked(box, code, run)
        assert done.stdout.count("going on without it") == 1, f"{run}: {done.stdout[-400:]}"


# ---- ranks that differ ------------------------------------------------------------------------------------


# base_train in which rank 1 meets a fault; its code has `train`, `rank`, and `mark`, which says so.
ON_RANK = """
import os, sys
from pathlib import Path
import torch
from nanochat.train import run as train
rank = int(os.environ["RANK"])
def mark():
    (Path(os.environ["MARKS"]) / "met").write_text("met")
{fault}
from scripts.base_train import main
main()
"""


def on_ranks(box: Box, fault: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Train on two ranks of which one meets a fault."""
    script = box.folder / "faulty_train.py"
    script.write_text(ON_RANK.format(fault=fault))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        "--",  # torchrun takes --run for the beginning of an option of its own
    ]
    common = [*TINY, "--num-iterations=20", "--save-every=100", "--eval-every=0"]
    done = box.execute([*command, *common, *flags], env={"MARKS": str(box.folder)})
    assert done.returncode == 0, done.stderr[-600:]
    return done


@row(
    "T45",
    "gradient of one rank times 3, stale, or zero",
    wanted="as is said: weights are compared, and equal",
)
def t45(box: Box) -> None:
    """No rank can know another's gradient: it is of other text. The claim is that weights stay equal."""
    box.tiny()
    fault = """
from nanochat.model.gpt import GPT
real = GPT.loss
def loss(self, *args, **options):
    found = real(self, *args, **options)
    if rank == 1 and isinstance(found, torch.Tensor) and found.requires_grad:
        mark()
        return found * 3
    return found
GPT.loss = loss
"""
    on_ranks(box, fault, "--check-ranks-every=1", "--run=g")
    assert last_saved(box, "g") == 20
    assert (box.folder / "met").exists(), "the fault was not met"
    told = box.run("base_train", "--help").stdout
    assert "comparisons of weights over ranks" in " ".join(told.split())


@row(
    "T46",
    "a flipped bit in a rank's copy of a matrix that another rank owns",
    wanted="mended by the next step",
)
def t46(box: Box) -> None:
    box.tiny()
    fault = """
from nanochat.data.train_loader import TrainLoader
real_step, real_batch, at = train.train_step, TrainLoader.next_batch, []
def train_step(plan, state, *rest):
    at[:] = [state]
    return real_step(plan, state, *rest)
def next_batch(self, *args, **options):
    if rank == 1 and at and at[0].step == 7 and not (Path(os.environ["MARKS"]) / "met").exists():
        matrices = [p for name, p in at[0].model.named_parameters() if p.dim() == 2 and "0" in name]
        matrices[0].detach().view(torch.int32)[0, 0] ^= 1 << 3
        mark()
    return real_batch(self, *args, **options)
train.train_step, TrainLoader.next_batch = train_step, next_batch
"""
    on_ranks(box, fault, "--check-ranks-every=1", "--run=f")
    assert (box.folder / "met").exists(), "the fault was not met"
    assert last_saved(box, "f") == 20


@row("T47", "--check-ranks-every=1", wanted="the same weights; under 250 ns a parameter")
def t47(box: Box) -> None:
    box.tiny()
    for run, flags in (("with", ["--check-ranks-every=1"]), ("without", [])):
        on_ranks(box, "", *flags, f"--run={run}")
    assert weights(box, "with", 20) == weights(box, "without", 20)
    code = (
        "import time, torch; from nanochat.distributed.weight_check import digest; "
        "x = torch.randn(4_000_000); digest(x); "
        "began = time.process_time(); digest(x); print((time.process_time() - began) / 4e6 * 1e9)"
    )
    assert float(box.python(code).stdout) < 250


# ---- long runs --------------------------------------------------------------------------------------------


def usage(pid: int) -> tuple[float, int, int]:
    """MB of memory, descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return (
        int(fields["VmRSS"].split()[0]) / 1024,
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
        int(fields["Threads"]),
    )


def least_usage(process: subprocess.Popen[str], box: Box, run: str, step: int) -> tuple[float, int, int]:
    """The least of each in 20 looks from a step on: a save under way has a thread and a file of its own."""
    seen = []
    for look in range(20):
        box.wait_for_step(run, step + look * 3)
        seen.append(usage(process.pid))
    memory, descriptors, threads = zip(*seen, strict=True)
    return min(memory), min(descriptors), min(threads)


@row("T101", "soak: saves, validations and samples over hundreds of steps", wanted="no growth")
def t101(box: Box) -> None:
    """Hundreds of steps for thousands: what leaks at each save or step shows in either."""
    box.tiny()
    flags = [flag for flag in TINY if not flag.startswith("--sample-every")]
    flags += ["--num-iterations=20000", "--save-every=10", "--eval-every=50", "--sample-every=100", "--run=s"]
    process = box.start("base_train", *flags)
    early = least_usage(process, box, "s", 250)
    late = least_usage(process, box, "s", 900)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == STOPPED
    assert late[0] - early[0] < 10, f"memory: {early[0]:.1f} -> {late[0]:.1f} MB"
    assert late[1:] == early[1:], f"descriptors, threads: {early[1:]} -> {late[1:]}"
    size = (box.base / "runs" / "s" / "metrics.jsonl").stat().st_size
    assert size / len(steps_in_metrics(box, "s")) < 1000
    wait_until(lambda: not (box.base / "runs" / "s" / ".lock").exists(), 10, "the lock was not freed")
