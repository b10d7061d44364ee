"""Runs: who owns one, what it prints and logs where that fails, signals, sleep, ranks that are gone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dev.fault_box import ROOT, TINY, Box, Skip, expect_error, expect_ok, row, wait_until

LONG = [*TINY, "--num-iterations=20000", "--save-every=100000", "--eval-every=0"]
STOPPED = 75


def last_saved(box: Box, run: str) -> int:
    """The step of the newest checkpoint of a run; 0 where there is none."""
    found = sorted((box.base / "runs" / run / "checkpoints").glob("step_*/MANIFEST.json"))
    return int(found[-1].parent.name[5:]) if found else 0


def steps_in_metrics(box: Box, run: str) -> list[int]:
    """The steps that metrics.jsonl tells of, in its order."""
    text = (box.base / "runs" / run / "metrics.jsonl").read_text()
    return [entry["step"] for entry in map(json.loads, text.splitlines()) if entry["kind"] == "step"]


def expect_saved(box: Box, run: str, code: int) -> None:
    """A run that was stopped: exit code 75, nothing done since the save, a summary, a report."""
    assert code == STOPPED, f"exit code {code}: {box.output()[-600:]}"
    steps = steps_in_metrics(box, run)
    assert steps == list(range(len(steps))), "steps are missing from the metrics"
    assert last_saved(box, run) == len(steps) > 0, f"saved at {last_saved(box, run)} of {len(steps)} steps"
    folder = box.base / "runs" / run
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    assert (folder / "report.html").exists(), "no report"
    assert "Traceback" not in box.output() or "torch/distributed/run.py" in box.output(), box.output()[-600:]


@contextlib.contextmanager
def small_disk(box: Box, name: str, size: str) -> Iterator[Path]:
    """A disk of its own; Skip where mounting is not allowed."""
    place = box.folder / name
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        raise Skip("a disk that fills up needs the right to mount one")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free; the file that takes them."""
    path = disk / "fill"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return path


# ---- C, K2 to K4: what is printed and logged --------------------------------------------------------------


@row("T10", "the disk of the base directory fills while training", wanted="goes on; saves once there is room")
def t10(box: Box) -> None:
    with small_disk(box, "disk", "120m") as disk:
        box.tiny()
        shutil.copytree(box.base, disk, dirs_exist_ok=True)
        box.base = disk
        run = box.start("base_train", *LONG, "--run=f", env={"NANOCHAT_BASE_DIR": str(disk)})
        box.wait_for_step("f", 20)
        filled = fill(disk)
        wait_until(lambda: "kept and tried again" in box.output(), 60, "the full disk was not met")
        done = re.findall(r"step +(\d+)/", box.output())[-1]
        wait_until(lambda: f"step {int(done) + 20:5d}/" in box.output(), 60, "the run did not go on")
        filled.unlink()
        wait_until(lambda: "can be written again" in box.output(), 60, "the lines were not tried again")
        run.terminate()
        expect_saved(box, "f", run.wait(60))
        assert box.output().count("kept and tried again") == 1, "said more than once"


@row("B9", "the base directory is full until the end of the run", wanted="metrics lost at most, said once")
def b9(box: Box) -> None:
    with small_disk(box, "disk", "120m") as disk:
        box.tiny()
        shutil.copytree(box.base, disk, dirs_exist_ok=True)
        env = {"NANOCHAT_BASE_DIR": str(disk)}
        box.base = disk
        flags = [*TINY, "--num-iterations=300", "--save-every=0", "--eval-every=0", "--run=f"]
        run = box.start("base_train", *flags, env=env)
        box.wait_for_step("f", 20)
        filled = fill(disk)
        assert run.wait(120) == 2, box.output()[-600:]
        assert "could not be saved" in box.output().splitlines()[-1], "one line says what is lost"
        assert "step   300/300" in box.output(), "the run did not come to its end"
        assert "Traceback" not in box.output()
        filled.unlink()


@row("T11", "the disk of the console log fills (> log)", wanted="trains to its end, all in the metrics")
def t11(box: Box) -> None:
    box.tiny()
    with small_disk(box, "disk", "8k") as disk, (disk / "log").open("w") as log:
        flags = [*TINY, "--num-iterations=150", "--save-every=0", "--eval-every=0", "--run=g"]
        done = box.run("base_train", *flags, capture_output=False, stdout=log, stderr=subprocess.PIPE)
        expect_ok(done)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "standard output" in done.stderr, done.stderr
    assert steps_in_metrics(box, "g") == list(range(150))
    assert last_saved(box, "g") == 150


@row("B8", "a command's output goes to a full disk", wanted="the work is done; exit code 2 and one line")
def b8(box: Box) -> None:
    box.tiny()
    with small_disk(box, "disk", "4k") as disk, (disk / "log").open("w") as log:
        fill(disk)
        how = {"capture_output": False, "stdout": log, "stderr": subprocess.PIPE}
        done = box.run("tok_train", "--corpus=tiny", "--vocab-size=290", "--name=again", **how)
        expect_error(done, "standard output", "No space left")
        assert (box.base / "tokenizers" / "again" / "tokenizer.json").exists()


@row("T35", "| head: the reader of stdout goes away", wanted="the run goes on, said once on stderr")
def t35(box: Box) -> None:
    box.tiny()
    done = box.shell(
        "set -o pipefail; F='--num-iterations=60 --save-every=0 --run=h';"
        "$PY -m scripts.base_train $TINY $F | head -3"
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    assert done.stderr.count("nobody reads standard output any more") == 1, done.stderr
    assert last_saved(box, "h") == 60
    assert steps_in_metrics(box, "h") == list(range(60))


@row("B7", "other commands | head -1", wanted="the work is done, no traceback")
def b7(box: Box) -> None:
    box.tiny()
    box.run("base_train", *TINY, "--num-iterations=3", "--run=r")
    commands = (
        "scripts.dataset --list",
        "scripts.tok_train --corpus=tiny --vocab-size=280 --name=piped",
        "scripts.base_eval --run=r --eval=bpb,sample --device-type=cpu",
        "scripts.generate --run=r --max-new-tokens=5000 the",
        "scripts.report --run=r",
        "scripts.checkpoint list r",
    )
    for command in commands:
        done = box.shell(f"$PY -u -m {command} | true; exit ${{PIPESTATUS[0]}}", timeout=60)
        assert done.returncode == 0, f"{command}: {done.returncode} {done.stderr}"
        assert done.stderr == "", f"{command}: {done.stderr}"
    assert (box.base / "tokenizers" / "piped" / "tokenizer.json").exists()
    assert (box.base / "runs" / "r" / "base_eval.json").exists()


@row("T36", "stdout, stderr or all of them closed at the start", wanted="trains")
def t36(box: Box) -> None:
    box.tiny()
    for number, closed in enumerate((">&-", "2>&-", "<&-", "<&- >&- 2>&-")):
        flags = f"--num-iterations=3 --run=c{number}"
        done = box.shell(f"exec 8>&1; $PY -m scripts.base_train $TINY {flags} {closed}; echo code $? >&8")
        assert "code 0" in done.stdout, f"{closed}: {done.stdout} {done.stderr}"
        assert last_saved(box, f"c{number}") == 3, closed
        lines = (box.base / "runs" / f"c{number}" / "metrics.jsonl").read_text().splitlines()
        assert all(line.startswith("{") for line in lines), "the console wrote into the metrics"


@row("B1", "tok_train >&-, base_train >&-", wanted="exit code 0")
def b1(box: Box) -> None:
    box.tiny()
    expect_ok(box.shell("$PY -m scripts.tok_train --corpus=tiny --vocab-size=280 --name=x >&-"))
    expect_ok(box.shell("$PY -m scripts.base_train $TINY --num-iterations=2 --run=x >&-"))
    expect_ok(box.shell("$PY -m scripts.dataset --list >&-"))


@row("T37", "stderr closed", wanted="trains")
def t37(box: Box) -> None:
    box.tiny()
    expect_ok(box.shell("$PY -m scripts.base_train $TINY --num-iterations=2 --run=x 2>&-"))


@row("B3", "a console of ASCII, Latin-1 or cp1252: base_train", wanted="exit code 0, letters replaced")
def b3(box: Box) -> None:
    text = box.folder / "t.txt"
    text.write_text(
        "\n".join(
            f"caf\u00e9 \u4f60\u597d \U0001f600 na\u00efve {i} \u2014 \u0142\u00f3d\u017a"
            for i in range(4000)
        )
    )
    expect_ok(box.run("dataset", "--corpus=local", "--name=u", "--files", text, env={"PYTHONUTF8": "1"}))
    expect_ok(box.run("tok_train", "--corpus=u", "--vocab-size=300"))
    flags = [flag for flag in TINY if not flag.startswith(("--corpus", "--sample"))]
    flags += ["--corpus=u", "--num-iterations=3", "--sample-every=1", "--keep-tails"]
    for encoding in ("ascii", "latin-1", "cp1252"):
        env = {"PYTHONIOENCODING": encoding}
        expect_ok(box.run("base_train", *flags, f"--run={encoding}", env=env))
        expect_ok(
            box.run("base_eval", f"--run={encoding}", "--eval=sample,bpb", "--device-type=cpu", env=env)
        )


@row("B4", "PYTHONIOENCODING=ascii generate 'hi (emoji)'", wanted="exit code 0")
def b4(box: Box) -> None:
    box.tiny()
    box.run("base_train", *TINY, "--num-iterations=2", "--run=r")
    for encoding in ("ascii", "latin-1:strict", "cp1252"):
        how: dict[str, Any] = {"env": {"PYTHONIOENCODING": encoding}}
        done = box.run("generate", "--run=r", "--max-new-tokens=4", "hi \U0001f600", **how)
        expect_ok(done)
        assert done.stdout.startswith("hi ?"), done.stdout


@row("B6", "LC_ALL=C and POSIX", wanted="exit code 0")
def b6(box: Box) -> None:
    box.tiny()
    for locale in ("C", "POSIX"):
        env = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        expect_ok(box.run("base_train", *TINY, "--num-iterations=2", f"--run={locale}", env=env))


# ---- H, K9: one owner of a run ----------------------------------------------------------------------------


def second_is_refused(box: Box, *flags: str) -> None:
    """Start a long run and the same again with `flags`; the second is refused, the first unhurt."""
    box.tiny()
    first = box.start("base_train", *LONG, "--save-every=25", "--keep-last=2", "--run=two")
    box.wait_for_step("two", 60 if "--resume=auto" in flags else 5)
    second = box.run("base_train", *LONG, "--run=two", *flags)
    line = expect_error(second, "run 'two' is in use by process", f"process {first.pid} ", "--run")
    assert "on host" in line, line
    before = len(steps_in_metrics(box, "two"))
    box.wait_for_step("two", before + 30)
    first.terminate()
    expect_saved(box, "two", first.wait(60))
    expect_ok(box.run("base_train", *TINY, "--num-iterations=2", "--run=another"))  # the remedy


@row("T38", "two trainers started anew on one run", wanted="the second is refused, with the first one's name")
def t38(box: Box) -> None:
    second_is_refused(box)


@row("T39", "a second trainer --resume=auto while the first lives", wanted="the second is refused")
def t39(box: Box) -> None:
    second_is_refused(box, "--resume=auto")


@row("T40", "the first prunes what the second verifies", wanted="the second is refused before it looks")
def t40(box: Box) -> None:
    box.tiny()
    box.start("base_train", *LONG, "--save-every=2", "--keep-last=1", "--run=p")
    box.wait_for_step("p", 10)
    for _ in range(3):
        expect_error(box.run("base_train", *LONG, "--run=p", "--resume=auto"), "in use by process")


@row("D15", "a second run of the name, another seed, before the first checkpoint", wanted="refused")
def d15(box: Box) -> None:
    second_is_refused(box, "--seed=1")


@row("D16", "--resume=auto twice at once", wanted="one goes on, the other is refused")
def d16(box: Box) -> None:
    box.tiny()
    expect_ok(box.run("base_train", *TINY, "--num-iterations=4", "--run=r"))
    flags = [*LONG, "--run=r", "--resume=auto", "--extend"]
    both = [box.start("base_train", *flags) for _ in range(2)]
    wait_until(lambda: any(p.poll() is not None for p in both), 60, "none was refused")
    refused = next(number for number, p in enumerate(both) if p.poll() is not None)
    assert both[refused].returncode == 2, box.output(refused)
    assert "in use by process" in box.output(refused), box.output(refused)
    box.wait_for_step("r", 30)
    both[1 - refused].terminate()
    assert both[1 - refused].wait(60) == STOPPED


# ---- G, K, K10: signals -----------------------------------------------------------------------------------


def stop_in_mid_run(box: Box, run: str, *numbers: signal.Signals, step: int = 20, pause: float = 0.0) -> None:
    """Start a run, send it signals when it has come to a step, and expect it saved."""
    process = box.start("base_train", *LONG, f"--run={run}")
    box.wait_for_step(run, step)
    for number in numbers:
        if process.poll() is None:
            process.send_signal(number)
        time.sleep(pause)
    code = process.wait(120)
    out = box._started.index(process)
    assert code == STOPPED, f"{numbers[0].name}: exit code {code}: {box.output(out)[-600:]}"
    expect_saved(box, run, code)


@row("D10", "SIGHUP in mid-run: the terminal is closed, ssh dropped", wanted="saved, 75; under nohup ignored")
def d10(box: Box) -> None:
    box.tiny()
    stop_in_mid_run(box, "h", signal.SIGHUP)
    command = ["nohup", *box.argv("base_train", *TINY, "--num-iterations=200", "--run=n")]
    with (box.folder / "nohup.txt").open("w") as out:
        process = subprocess.Popen(command, env=box.env, cwd=box.folder, stdout=out, stderr=out)
        box.wait_for_step("n", 20)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 0, "nohup was not respected"
    assert last_saved(box, "n") == 200


@row("T34", "SIGHUP when the terminal itself is gone", wanted="saved, 75")
def t34(box: Box) -> None:
    box.tiny()
    ours, theirs = os.openpty()
    how = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = box.start("base_train", *LONG, "--run=t", **how)
    os.close(theirs)
    reader = threading.Thread(target=_read_until_closed, args=(ours,), daemon=True)
    reader.start()
    box.wait_for_step("t", 20)
    os.close(ours)  # whoever prints gets EIO from here on
    process.send_signal(signal.SIGHUP)
    expect_saved(box, "t", process.wait(120))


def _read_until_closed(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1 << 16):
            pass


@row("D11", "SIGUSR2, SIGXCPU, SIGUSR1 in mid-run; SIGQUIT ends at once", wanted="saved, 75")
def d11(box: Box) -> None:
    box.tiny()
    for number in (signal.SIGUSR2, signal.SIGXCPU, signal.SIGUSR1):
        stop_in_mid_run(box, number.name, number)
    process = box.start("base_train", *LONG, "--run=q")
    box.wait_for_step("q", 5)
    process.send_signal(signal.SIGQUIT)
    assert process.wait(60) == -signal.SIGQUIT


@row("T31", "SIGTERM, SIGUSR1, SIGINT, SIGHUP while it imports, plans, hashes", wanted="75, no traceback")
def t31(box: Box) -> None:
    box.tiny()
    for number, seconds in ((15, 0.4), (10, 0.8), (2, 1.5), (1, 2.5), (15, 4.0), (2, 0.4)):
        process = box.start("base_train", *LONG, "--run=early")
        time.sleep(seconds)
        process.send_signal(number)
        code = process.wait(120)
        out = box.output(len(box._started) - 1)
        assert code == STOPPED, f"signal {number} after {seconds} s: exit code {code}: {out[-400:]}"
        assert "Traceback" not in out, out[-600:]
        assert "before the first step" in out or last_saved(box, "early"), out[-400:]
        shutil.rmtree(box.base / "runs", ignore_errors=True)


@row("D12", "Ctrl-C while importing, planning, training, evaluating", wanted="75 or 130, no traceback")
def d12(box: Box) -> None:
    box.tiny()
    stop_in_mid_run(box, "t", signal.SIGINT)
    shutil.rmtree(box.base / "runs" / "t")
    process = box.start(
        "base_train", *TINY, "--num-iterations=20", "--eval-every=1", "--eval-tokens=2000000", "--run=e"
    )
    box.wait_for_step("e", 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == STOPPED, box.output(1)[-400:]
    for seconds in (0.3, 1.0, 3.0):
        process = box.start("dataset", "--corpus=stdlib", "--name=s")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
        assert code in (0, 130, -2), f"dataset: {code}"
    left = [path for path in (box.base / "data").iterdir() if path.name not in ("tiny", "s")]
    assert not [path for path in left if not path.name.startswith(".")], left


@row("D13", "Ctrl-Z for some seconds and fg, one rank", wanted="goes on")
def d13(box: Box) -> None:
    box.tiny()
    process = box.start("base_train", *TINY, "--num-iterations=150", "--run=z")
    box.wait_for_step("z", 20)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) == 0
    assert last_saved(box, "z") == 150


@row("T32", "SIGTERM twice within 50 ms; 40 times every 50 ms", wanted="saved, 75, report")
def t32(box: Box) -> None:
    box.tiny()
    stop_in_mid_run(box, "twice", signal.SIGTERM, signal.SIGTERM, pause=0.05)
    stop_in_mid_run(box, "many", *[signal.SIGTERM] * 60, pause=0.05)


@row("T30", "SIGTERM while the loader waits for a shard under way", wanted="saved, 75, within seconds")
def t30(box: Box) -> None:
    waiting_run(box, ranks=1)


def waiting_run(box: Box, ranks: int) -> None:
    """Train on a corpus whose second shard is on its way for ever, until the loader waits; then stop it."""
    expect_ok(box.python(SHARDS, str(box.base)))
    expect_ok(box.run("tok_train", "--corpus=fineweb-edu", "--vocab-size=300"))
    stage = box.base / "data" / "fineweb-edu" / ".tmp-fetch.1"
    stage.mkdir()
    (box.base / "data" / "fineweb-edu" / "shard_00001.parquet").unlink()
    ended = threading.Event()
    beat = threading.Thread(target=_keep_fresh, args=(stage, ended), daemon=True)
    beat.start()
    try:
        flags = [flag for flag in LONG if not flag.startswith("--corpus")] + [
            "--corpus=fineweb-edu",
            "--run=w",
        ]
        process = box.start("base_train", *flags) if ranks == 1 else torchrun(box, ranks, *flags)
        wait_until(lambda: "waiting for it" in box.output(), 180, "the loader did not come to the shard")
        steps = -1
        while steps != (steps := len(steps_in_metrics(box, "w"))):
            time.sleep(1.0)  # until it stands still
        began = time.monotonic()
        process.terminate()
        code = process.wait(60)
        assert time.monotonic() - began < 28, "a scheduler would have killed it"
        expect_saved(box, "w", STOPPED if code == 1 and ranks > 1 else code)
    finally:
        ended.set()
        beat.join()


def _keep_fresh(stage: Path, ended: threading.Event) -> None:
    while not ended.wait(0.5):
        with contextlib.suppress(OSError):
            os.utime(stage)


# A corpus as the hub has it, of three small shards.
SHARDS = """
import random, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from nanochat.data import parquet_shards
from nanochat.data.corpus import Corpus
folder = Path(sys.argv[1]) / "data" / "fineweb-edu"
folder.mkdir(parents=True)
names = []
for number, split in enumerate(("train", "train", "val")):
    words = random.Random(number)
    choices = "the cat sat on a mat and saw two dogs".split()
    texts = [" ".join(words.choices(choices, k=30)) for _ in range(256)]
    path = folder / f"shard_{number:05d}.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=16)
    names.append(parquet_shards.describe(path, split))
Corpus(folder, "fineweb-edu", "karpathy/fineweb-edu-100b-shuffle@x", names).write_manifest(folder)
"""


# ---- J: ranks ---------------------------------------------------------------------------------------------


def torchrun(box: Box, ranks: int, *flags: str) -> subprocess.Popen[str]:
    """Start base_train on several ranks of this machine, in a process group of its own."""
    out = (box.folder / f"out-{len(box._started)}.txt").open("w")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "scripts.base_train", "--", *flags]
    process = subprocess.Popen(
        command,
        env=box.env,
        cwd=ROOT,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    box._started.append(process)
    return process


def slept(box: Box, timeout_s: float, sleep_s: float) -> None:
    """Two ranks and torchrun are stopped for longer than the time-out, and go on."""
    box.tiny()
    flags = [*TINY, "--num-iterations=60", "--save-every=100000", f"--dist-timeout={timeout_s:g}", "--run=s"]
    process = torchrun(box, 2, *flags)
    box.wait_for_step("s", 10)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(sleep_s)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(200) == 0, "\n".join(re.findall(r"(?m)^(?:rank|error|warning).*", box.output()))
    assert last_saved(box, "s") == 60
    assert steps_in_metrics(box, "s") == list(range(60))
    assert not list((box.base / "runs" / "s").glob("stack_rank*")), "stacks are left of a run that ended well"


@row("T43", "all ranks and torchrun stopped longer than the time-outs, then continued", wanted="goes on")
def t43(box: Box) -> None:
    slept(box, timeout_s=6, sleep_s=45)  # gloo's own would be 36 s


@row("D14", "Ctrl-Z for longer than --dist-timeout and fg, two ranks", wanted="goes on")
def d14(box: Box) -> None:
    slept(box, timeout_s=4, sleep_s=9)


@row("T44", "one of two ranks stopped for less than the time-out", wanted="goes on")
def t44(box: Box) -> None:
    box.tiny()
    process = torchrun(box, 2, *TINY, "--num-iterations=60", "--dist-timeout=60", "--run=o")
    box.wait_for_step("o", 10)
    worker = max(workers(process))
    os.kill(worker, signal.SIGSTOP)
    time.sleep(5)
    os.kill(worker, signal.SIGCONT)
    assert process.wait(200) == 0, box.output()[-1500:]
    assert last_saved(box, "o") == 60


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


@row("T33", "Ctrl-C to the whole group under torchrun", wanted="saved, both ranks at one step")
def t33(box: Box) -> None:
    box.tiny()
    process = torchrun(box, 2, *LONG, "--run=c")
    box.wait_for_step("c", 20)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(120)
    expect_saved(box, "c", STOPPED)  # torchrun's own code is 1 whatever its workers say


@row("T42", "kill -9 of torchrun alone", wanted="the workers end, and say why")
def t42(box: Box) -> None:
    box.tiny()
    process = torchrun(box, 2, *LONG, "--run=k")
    box.wait_for_step("k", 20)
    ranks = workers(process)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(lives, ranks)), 60, "workers are left")
    expect_free(box, "k")


def lives(pid: int) -> bool:
    """Whether a process of this id runs; one that nobody has waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def expect_free(box: Box, run: str) -> None:
    """Nobody holds the lock of a run any more."""
    done = box.run("base_train", *TINY, "--num-iterations=2", f"--run={run}")
    assert "in use" not in done.stderr, done.stderr
