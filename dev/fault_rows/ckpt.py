"""Checkpoints: branches, damage, bad and full disks while they are written, what is not finite, readers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from dev.fault_box import SHORT, TINY, Box, Skip, expect_error, expect_ok, row, wait_until

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "MANIFEST.json",
)
RUN = "r"
KEPT_S = 75  # exit code of a run that was stopped and saved

# A run of 12 steps that asks itself, by a real signal, to stop in a step; or is killed in it.
SIGNALLED = """
import os, signal, sys
from nanochat.train import run as train
number, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
real = train.train_step
def step(plan, state, world):
    if state.step + 1 == at:
        os.kill(os.getpid(), number)
    return real(plan, state, world)
train.train_step = step
from scripts.base_train import main
main()
"""
# A run in which a function is another.
REPLACED = """
import sys
code = sys.argv.pop(1)
from nanochat.train import hooks, run as train
real = train.train_step
exec(code)
from scripts.base_train import main
main()
"""


def flags(*more: object) -> list[str]:
    """Flags of the run of 12 steps that all rows go on from or compare with."""
    cadence = ["--num-iterations=12", "--eval-every=6", f"--run={RUN}"]
    return [*TINY, *cadence, *map(str, more)]


_finished: list[Box] = []
_making = threading.Lock()


def finished(box: Box) -> None:
    """Put the run into the box, finished, with checkpoints of steps 4, 8 and 12; made once."""
    with _making:
        if not _finished:
            made = Box(Path(tempfile.mkdtemp(prefix="ckpt-finished-", dir=box.folder.parent)) / "box")
            made.tiny()
            expect_ok(made.run("base_train", *flags("--save-every=4", "--keep-last=9"), timeout=900))
            _finished.append(made)
    shutil.copytree(_finished[0].base, box.base, dirs_exist_ok=True)


def train(box: Box, *more: object, **how: Any) -> subprocess.CompletedProcess[str]:
    return box.run("base_train", *flags(*more), timeout=900, **how)


def signalled(box: Box, number: int, at: int, *more: object) -> subprocess.CompletedProcess[str]:
    return box.python(SIGNALLED, int(number), at, *flags(*more), timeout=900)


def folder(box: Box, step: int = 0) -> Path:
    place = box.base / "runs" / RUN / "checkpoints"
    return place / f"step_{step:06d}" if step else place


def names(box: Box) -> list[str]:
    return sorted(path.name for path in folder(box).iterdir())


def steps(box: Box) -> list[int]:
    return [int(name[5:]) for name in names(box) if name.startswith("step_")]


def weights(box: Box, step: int = 12) -> str:
    return hashlib.sha256((folder(box, step) / MODEL).read_bytes()).hexdigest()


def metrics(box: Box) -> list[int]:
    """The steps that metrics.jsonl tells of."""
    lines = (box.base / "runs" / RUN / "metrics.jsonl").read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if entry["kind"] == "step"]


def same_end(box: Box) -> None:
    """The weights are those of the run that was not disturbed."""
    assert weights(box) == weights(_finished[0]), "other weights at the end"


def whole(box: Box) -> None:
    """Every checkpoint is as its manifest says; compared here, for the command is tried by T24 and T29."""
    for step in steps(box):
        listed = json.loads((folder(box, step) / MANIFEST).read_text())["files"]
        for name, entry in listed.items():
            data = (folder(box, step) / name).read_bytes()
            assert len(data) == entry["bytes"], (step, name)
            assert hashlib.sha256(data).hexdigest() == entry["sha256"], (step, name)


def sign(place: Path) -> None:
    """Make the manifest fit what is there."""
    listed = {
        name: {
            "bytes": (place / name).stat().st_size,
            "sha256": hashlib.sha256((place / name).read_bytes()).hexdigest(),
        }
        for name in (MODEL, OPTIMIZER, STATE)
    }
    (place / MANIFEST).write_text(json.dumps({"format": 1, "files": listed}))


# ----------------------------------------------------------------------------------------------------
# branches and retention


@row(
    "T6",
    "--resume=4 with later checkpoints, a save each step, a signal",
    wanted="saves stay, auto takes them",
)
def t6(box: Box) -> None:
    finished(box)
    stopped = signalled(box, signal.SIGTERM, 6, "--resume=4", "--keep-last=2", "--save-every=1")
    assert stopped.returncode == KEPT_S, stopped.stderr
    assert steps(box) == [5, 6], names(box)
    assert "step_000008, step_000012" in stopped.stdout, stopped.stdout
    again = train(box, "--resume=auto", "--save-every=0")
    expect_ok(again)
    assert "step_000006" in again.stdout
    same_end(box)


@row("T7", "the same with --extend and kill -9 after a save", wanted="auto goes on on the new branch")
def t7(box: Box) -> None:
    finished(box)
    more = ["--extend", "--num-iterations=20", "--keep-last=1", "--save-every=1"]
    killed = signalled(box, signal.SIGKILL, 8, "--resume=4", *more)
    assert killed.returncode == -signal.SIGKILL
    assert steps(box)[-1] in (6, 7), names(box)
    expect_ok(train(box, *more, "--resume=auto"))
    assert metrics(box) == list(range(20))
    assert sorted(path.name for path in (folder(box) / "abandoned").iterdir()) == [
        "step_000008",
        "step_000012",
    ]


@row(
    "T8",
    "the two newest damaged, the third used, --keep-last=2",
    wanted="whole ones are kept, damaged set aside",
)
def t8(box: Box) -> None:
    finished(box)
    for step in (8, 12):
        (folder(box, step) / STATE).write_text("{}")
    stopped = signalled(box, signal.SIGTERM, 7, "--resume=auto", "--keep-last=2", "--save-every=3")
    assert stopped.returncode == KEPT_S, stopped.stderr
    assert steps(box) == [6, 7], names(box)
    whole(box)


@row("T16", "an old checkpoint cannot be removed (EIO)", wanted="said; training goes on")
def t16(box: Box) -> None:
    finished(box)
    shutil.rmtree(box.base / "runs")
    done = train(box, "--save-every=1", "--keep-last=1", env=box.faulty("rename", "/.old-step_", errno.EIO))
    expect_ok(done)
    assert box.faults_met(), "no fault was met"
    assert "step_000001 could not be deleted" in done.stdout
    assert "was not saved" not in done.stdout
    assert steps(box) == list(range(1, 13))
    same_end(box)


@row("T70", "folders with names like a step's beside it, prune", wanted="left alone; the right ones pruned")
def t70(box: Box) -> None:
    finished(box)
    for twin in ("step_0000012", "step_00001\u0662"):
        shutil.copytree(folder(box, 12), folder(box) / twin)
    expect_ok(box.run("checkpoint", "prune", RUN, "--keep-last=1"))
    assert steps(box)[0] == 12
    assert {"step_0000012", "step_00001\u0662", "step_000012"} == set(names(box))


@row("T69", "checkpoint folders that are links, pruned", wanted="targets untouched, no link stays")
def t69(box: Box) -> None:
    finished(box)
    elsewhere = box.folder / "elsewhere"
    folder(box, 8).rename(elsewhere)
    folder(box, 8).symlink_to(elsewhere)
    shutil.rmtree(folder(box, 12))
    expect_ok(train(box, "--resume=auto", "--save-every=2", "--keep-last=1"))
    assert names(box) == ["step_000012"]
    assert len(list(elsewhere.iterdir())) == 4
    same_end(box)


@row("T77", "metrics.jsonl and a step folder are links to somebody's files", wanted="untouched")
def t77(box: Box) -> None:
    finished(box)
    mine, other = box.folder / "mine.txt", box.folder / "other"
    mine.write_text("mine\n")
    other.mkdir()
    (other / "mine.txt").write_text("mine\n")
    log = box.base / "runs" / RUN / "metrics.jsonl"
    log.unlink()
    log.symlink_to(mine)
    shutil.rmtree(folder(box, 12))
    folder(box, 12).symlink_to(other)
    expect_ok(train(box, "--resume=8", "--save-every=2", "--keep-last=1"))
    assert mine.read_text() == "mine\n"
    assert [path.read_text() for path in other.iterdir()] == ["mine\n"]
    same_end(box)


# ----------------------------------------------------------------------------------------------------
# a disk that fails while a checkpoint is written


def disturbed(box: Box, ops: str, error: int, **when: Any) -> subprocess.CompletedProcess[str]:
    """The run from its start, calls on the files of its checkpoints failing."""
    finished(box)
    shutil.rmtree(box.base / "runs")
    path = when.pop("path", "step_")
    done = train(box, "--save-every=2", "--keep-last=9", env=box.faulty(ops, path, error, **when))
    assert box.faults_met(), "no fault was met"
    return done


@row(
    "T13",
    "EIO and ENOSPC once at write, fsync, close, rename of a checkpoint",
    wanted="one warning, same end",
)
def t13(box: Box) -> None:
    for op, error in (
        ("write", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("close", errno.EIO),
        ("rename", errno.EIO),
    ):
        done = disturbed(box, op, error, path="step_000004", times=1)
        expect_ok(done)
        assert done.stdout.count("was not saved") == 1, (op, done.stdout)
        assert steps(box) == [2, 6, 8, 10, 12], (op, names(box))
        whole(box)
        same_end(box)


@row("T14", "EIO at every fsync of checkpoints", wanted="three warnings, one line, earlier ones whole")
def t14(box: Box) -> None:
    done = disturbed(box, "fsync", errno.EIO, path=".tmp-step_", first=10)
    expect_error(done, "3 saves in a row have failed")
    assert done.stdout.count("was not saved") == 3, done.stdout
    assert steps(box)[0] == 2
    assert not [name for name in names(box) if name.startswith(".")]
    whole(box)


@row("T15", "short writes and EINTR in checkpoints and metrics", wanted="same end")
def t15(box: Box) -> None:
    expect_ok(disturbed(box, "write", SHORT, path="runs"))
    whole(box)
    same_end(box)
    expect_ok(disturbed(box, "write,fsync", errno.EINTR, times=5))
    whole(box)
    same_end(box)


@row(
    "T18",
    "no inodes left (ENOSPC where a file or folder is made)",
    wanted="three warnings, one line, no leftover",
)
def t18(box: Box) -> None:
    done = disturbed(box, "create,mkdir", errno.ENOSPC, path="step_", first=20)
    expect_error(done, "3 saves in a row have failed")
    assert not [name for name in names(box) if name.startswith(".")]
    whole(box)


@row("T19", "few descriptors: limits of 32 and 24, EMFILE in a save", wanted="trains; one warning")
def t19(box: Box) -> None:
    finished(box)
    for limit in (32, 24):
        shutil.rmtree(box.base / "runs")
        script = f'ulimit -n {limit}; exec "$PY" -m scripts.base_train "$@"'
        expect_ok(
            box.execute(["bash", "-c", script, "bash", *flags("--save-every=4")], env={"PY": sys.executable})
        )
        same_end(box)
    done = disturbed(box, "open", errno.EMFILE, path="step_000004", times=1)
    expect_ok(done)
    assert done.stdout.count("was not saved") == 1, done.stdout
    same_end(box)


@row("T20", "files may not grow beyond 60 kB and 9 kB", wanted="warnings, one line, no leftover")
def t20(box: Box) -> None:
    finished(box)
    for blocks in (60, 9):
        shutil.rmtree(box.base / "runs")
        script = f'ulimit -f {blocks}; exec "$PY" -m scripts.base_train "$@"'
        command = ["bash", "-c", script, "bash", *flags("--save-every=2", "--keep-last=9")]
        done = box.execute(command, env={"PY": sys.executable})
        expect_error(done, "saves in a row have failed")
        assert done.stdout.count("was not saved") == 3, done.stdout
        assert names(box) == []


@row("T21", "memory runs out in a library", wanted="one line")
def t21(box: Box) -> None:
    finished(box)
    code = "def step(*_): raise MemoryError()\ntrain.train_step = step"
    expect_error(box.python(REPLACED, code, *flags("--resume=8")), "memory")


# ----------------------------------------------------------------------------------------------------
# damage


def used_the_one_before(box: Box, done: subprocess.CompletedProcess[str], named: str) -> None:
    expect_ok(done)
    assert "checkpoint passed over" in done.stdout, done.stdout
    assert named in done.stdout, done.stdout
    assert "going on from" in done.stdout
    assert steps(box)[-1] == 12
    same_end(box)


@row("T24", "MANIFEST.json of the newest lost", wanted="named, the one before is used")
def t24(box: Box) -> None:
    finished(box)
    (folder(box, 12) / MANIFEST).unlink()
    assert MANIFEST in box.run("checkpoint", "verify", RUN).stdout
    used_the_one_before(box, train(box, "--resume=auto"), f"step_000012/{MANIFEST}")


@row("T25", "MANIFEST.json of all lost, --resume=auto", wanted="refused, nothing erased; the remedy works")
def t25(box: Box) -> None:
    finished(box)
    for step in (4, 8, 12):
        (folder(box, step) / MANIFEST).unlink()
    expect_error(train(box, "--resume=auto"), "none of its 3 checkpoints is whole", str(folder(box)))
    assert (steps(box), metrics(box)) == ([4, 8, 12], list(range(12)))
    folder(box).rename(folder(box).with_name("kept"))
    done = train(box, "--resume=auto")
    expect_ok(done)
    kept = box.base / "runs" / RUN / "metrics.1.jsonl"
    assert str(kept) in done.stdout
    assert kept.read_text().count('"kind": "step"') == 12


@row("T27", "checkpoints/ without permission, --resume=auto", wanted="refused, nothing erased")
def t27(box: Box) -> None:
    finished(box)
    limited: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            raise Skip("root sees everything here, and setpriv is not there to take that away")
        limited = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    folder(box).chmod(0)
    try:
        done = box.execute([*limited, *box.argv("base_train", *flags("--resume=auto"))])
    finally:
        folder(box).chmod(0o755)
    expect_error(done, str(folder(box)), "Permission denied")
    assert (steps(box), metrics(box)) == ([4, 8, 12], list(range(12)))


@row("T29", "a bad sector or no permission in the newest checkpoint", wanted="named, the one before is used")
def t29(box: Box) -> None:
    for op, name, error in (
        ("read", MODEL, errno.EIO),
        ("read", MANIFEST, errno.EIO),
        ("open", OPTIMIZER, errno.EACCES),
    ):
        finished(box)
        (box.base / "runs" / RUN / "summary.json").unlink()
        fault = box.faulty(op, f"step_000012/{name}", error)
        checked = box.run("checkpoint", "verify", RUN, env=fault)
        assert checked.returncode == 2
        assert f"step_000012/{name}: cannot be read" in checked.stdout, checked.stdout
        used_the_one_before(
            box, train(box, "--resume=auto", env=fault), f"step_000012/{name}: cannot be read"
        )
        shutil.rmtree(box.base / "runs")


@row("T41", "kill -9 at moments of the start of --resume=auto", wanted="same weights, same metrics")
def t41(box: Box) -> None:
    finished(box)
    shutil.rmtree(folder(box, 12))
    want = (box.base / "runs" / RUN / "metrics.jsonl").read_text().count('"kind": "step"')
    code = """
import os, signal, sys
left = [int(sys.argv.pop(1))]
def hook(event, args):
    opens = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if (opens or event in ("os.rename", "os.remove")) and "runs" in str(args[0]):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from scripts.base_train import main
main()
"""
    for operation in (1, 3, 5, 6, 8):
        done = box.python(code, operation, *flags("--resume=auto", "--save-every=4", "--keep-last=9"))
        assert done.returncode == -signal.SIGKILL, (operation, done.stderr)
        assert steps(box) == [4, 8], (operation, names(box))
    expect_ok(train(box, "--resume=auto"))
    assert metrics(box) == list(range(want))
    same_end(box)


@row(
    "T56", "a number of 5,000 digits in MANIFEST.json and state.json", wanted="named, the one before is used"
)
def t56(box: Box) -> None:
    finished(box)
    for step, name in ((12, MANIFEST), (8, STATE)):
        path = folder(box, step) / name
        path.write_text(path.read_text().replace('"format": 1', '"format": ' + "9" * 5000, 1))
    used_the_one_before(box, train(box, "--resume=auto"), f"step_000012/{MANIFEST}")


@row("T59", "hostile values in state.json under a manifest that fits", wanted="refused by name or harmless")
def t59(box: Box) -> None:
    finished(box)
    path = folder(box, 12) / STATE
    good = path.read_text()
    plan = json.loads(good)["plan"]
    hostile: list[dict[str, Any]] = [
        {"step": 13},
        {"step": "12"},
        {"step": -1},
        {"step": True},
        {"step": 12.0},
        {"smoothed_loss": "nan"},
        {"train_seconds": [1]},
        {"val_bpb": {}},
        {"loader": []},
        {"loss_scale": ["a", "b"]},
        {"fingerprints": None},
        {"plan": []},
        {"plan": {**plan, "model": {**plan["model"], "n_layer": 10**9}}},
        {"format": 2},
    ]
    code = """
import sys, torch
from nanochat.checkpoint import state as checkpoint
from nanochat.common import errors
from nanochat.common.machine import Precision
try:
    checkpoint.load_model("r", 12, device=torch.device("cpu"), precision=Precision(torch.float32, "sdpa"))
    print("loaded")
except errors.UserError as error:
    print(error)
"""
    script = [
        "import json, pathlib, hashlib, sys",
        "cases = json.loads(sys.argv[1]); path = pathlib.Path(sys.argv[2])",
    ]
    script += ["good = json.loads(path.read_text())", "for case in cases:"]
    script += ["    path.write_text(json.dumps({**good, **case}))"]
    script += ["    m = path.with_name('MANIFEST.json'); listed = json.loads(m.read_text())"]
    script += ["    data = path.read_bytes()"]
    script += [
        "    listed['files']['state.json'] = dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())"
    ]
    script += ["    m.write_text(json.dumps(listed))"]
    script += ["    " + line for line in code.strip().splitlines()]
    done = box.python("\n".join(script), json.dumps(hostile), path)
    expect_ok(done)
    told = done.stdout.splitlines()
    assert len(told) == len(hostile), done.stdout
    assert all(STATE in line for line in told), done.stdout
    meta = json.loads(good)
    for cursors in ([], [["a", 0, 0]], [[1 << 70, 0, 0]]):
        path.write_text(json.dumps({**meta, "loader": {**meta["loader"], "cursors": cursors}}))
        sign(path.parent)
        expect_error(train(box, "--resume=12"))


@row(
    "T60",
    "moments of other dtypes, or too many, under a manifest that fits",
    wanted="refused by the file's name",
)
def t60(box: Box) -> None:
    finished(box)
    path = folder(box, 12) / OPTIMIZER
    good = path.read_bytes()
    change = """
import sys, torch
from safetensors.torch import load_file, save_file
path, kind = sys.argv[1:]
tensors = load_file(path)
name = next(name for name in tensors if name.endswith(".momentum"))
if kind == "extra":
    tensors["extra"] = torch.zeros(2)
else:
    tensors[name] = tensors[name].to(getattr(torch, kind))
save_file(tensors, path)
"""
    for kind in ("float16", "extra"):  # the others are tried in tests/test_checkpoint.py
        path.write_bytes(good)
        expect_ok(box.python(change, path, kind))
        sign(path.parent)
        expect_error(train(box, "--resume=12"), f"step_000012/{OPTIMIZER}")


# ----------------------------------------------------------------------------------------------------
# what is not finite


@row(
    "T62",
    "an update that overflows, a moment that is not finite",
    wanted="never saved; the earlier ones stay",
)
def t62(box: Box) -> None:
    finished(box)
    for what in (
        "dict(state.model.named_parameters())['blocks.1.mlp.up.weight'][3, 2] = float('inf')",
        "rule = next(s.rule for s in state.optimizer.shards if hasattr(s, 'rule')); "
        "rule.moments['momentum'][0, 3, 2] = float('nan')",
    ):
        shutil.rmtree(box.base / "runs")
        code = f"""
import torch
def step(plan, state, world):
    result = real(plan, state, world)
    if state.step == 5:
        with torch.no_grad():
            {what}
    return result
train.train_step = step
"""
        done = box.python(REPLACED, code, *flags("--save-every=2", "--keep-last=1"))
        expect_error(done, "after step 6", "is not finite", "nothing is saved")
        assert steps(box) == [4], names(box)
        whole(box)
        expect_ok(train(box, "--resume=auto"))
        same_end(box)


@row("T63", "a validation that is NaN", wanted="null in state.json and summary.json; the run goes on")
def t63(box: Box) -> None:
    finished(box)
    shutil.rmtree(box.base / "runs")
    code = """
from types import SimpleNamespace
hooks.evaluate = lambda *_: SimpleNamespace(bpb=float("nan"), loss=float("nan"))
"""
    done = box.python(REPLACED, code, *flags("--save-every=2", "--on-nonfinite=skip"))
    expect_ok(done)
    assert "was not saved" not in done.stdout
    assert json.loads((folder(box, 12) / STATE).read_text())["val_bpb"] is None
    assert json.loads((box.base / "runs" / RUN / "summary.json").read_text())["val_bpb"] is None
    same_end(box)


# ----------------------------------------------------------------------------------------------------
# who reads


@row("T87", "modes of written files under umask 022 and 002", wanted="those of the umask, tensors included")
def t87(box: Box) -> None:
    finished(box)
    for umask in ("022", "002"):
        shutil.rmtree(box.base / "runs")
        script = f'umask {umask}; exec "$PY" -m scripts.base_train "$@"'
        expect_ok(box.execute(["bash", "-c", script, "bash", *flags()], env={"PY": sys.executable}))
        for path in (box.base / "runs").rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                mode = path.stat().st_mode & 0o777
                assert mode == 0o666 & ~int(umask, 8), f"{path.name}: {mode:o}"


@row("D24", "a reader beside a trainer that prunes", wanted="every load succeeds")
def d24(box: Box) -> None:
    box.tiny()
    more = ["--num-iterations=100000", "--save-every=2", "--keep-last=1", "--eval-every=0"]
    trainer = box.start("base_train", *flags(*more))
    wait_until(lambda: folder(box).is_dir() and bool(steps(box)), 120, "no checkpoint")
    code = """
import torch
from nanochat.checkpoint import state as checkpoint
from nanochat.common.machine import Precision
seen, how = set(), {"device": torch.device("cpu"), "precision": Precision(torch.float32, "sdpa")}
for _ in range(150):
    seen.add(checkpoint.load_model("r", None, **how)[2]["step"])
print(len(seen))
"""
    read = box.python(code)
    assert trainer.poll() is None, box.output()[-600:]
    expect_ok(read)
    assert read.stdout.splitlines() == [read.stdout.strip()], read.stdout
    assert int(read.stdout) > 5, "the trainer stood still"
