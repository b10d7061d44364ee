"""Runs: who owns one, what it prints and logs where that fails, signals, sleep, ranks that are gone."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dev.fault_box import TINY, Box, Skip, expect_error, expect_ok, row, wait_until

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
    assert "Traceback" not in box.output(), box.output()[-600:]


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
        "nanochat.dataset --list",
        "scripts.tok_train --corpus=tiny --vocab-size=280 --name=piped",
        "scripts.base_eval --run=r --eval=bpb,sample --device-type=cpu",
        "scripts.generate --run=r --max-new-tokens=5000 the",
        "nanochat.report --run=r",
        "nanochat.checkpoint list r",
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
    expect_ok(box.shell("$PY -m nanochat.dataset --list >&-"))


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
