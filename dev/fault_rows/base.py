"""Rows of what is typed and read back: flags, names, the base directory, files of a run, the report."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from dev.fault_box import TINY, Box, Skip, expect_error, expect_ok, row

# Many command lines in processes forked from one that has imported torch: some seconds for all of them.
EACH = """
import importlib, json, os, sys, tempfile
module = importlib.import_module(sys.argv[1])
told = []
for argv in json.loads(sys.argv[2]):
    with tempfile.TemporaryFile() as sink:
        child = os.fork()
        if not child:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            sys.argv = sys.orig_argv = [sys.argv[1], *argv]
            code = 0
            try:
                module.main()
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        sink.seek(0)
        told.append([os.waitstatus_to_exitcode(status), sink.read().decode(errors="replace")])
print(json.dumps(told))
"""


def each(box: Box, module: str, argvs: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of a command for each of many argument lists."""
    done = box.python(EACH, module, json.dumps(argvs))
    expect_ok(done)
    told = json.loads(done.stdout.splitlines()[-1])
    return [(code, text) for code, text in told]


def refused(box: Box, module: str, argvs: list[list[str]]) -> None:
    """Each argument list ends with code 2 and one line that names the flag of its last argument."""
    for argv, (code, text) in zip(argvs, each(box, module, argvs), strict=True):
        lines = text.strip().splitlines()
        assert code == 2, f"{argv[-1]!r}: exit code {code}: {text[-300:]}"
        assert len(lines) == 1, f"{argv[-1]!r}: {text[-500:]}"
        assert lines[0].startswith("error: "), f"{argv[-1]!r}: {lines[0]}"
        assert argv[-1].partition("=")[0] in lines[0], f"{argv[-1]!r}: {lines[0]}"


def taken(box: Box, module: str, argvs: list[list[str]]) -> None:
    """Each argument list ends with code 0, or with code 2 and one line."""
    for argv, (code, text) in zip(argvs, each(box, module, argvs), strict=True):
        assert "Traceback" not in text, f"{argv}: {text[-500:]}"
        assert code == 0 or (code == 2 and "error: " in text.strip().splitlines()[-1]), (
            f"{argv}: {text[-300:]}"
        )


_made: list[Path] = []
_making = threading.Lock()


def trained(box: Box) -> Path:
    """A finished run "a" with scores and a report, trained once for all rows; its folder."""
    with _making:
        if not _made:
            scratch = Path(tempfile.mkdtemp(prefix="faults-run-"))
            atexit.register(shutil.rmtree, scratch, ignore_errors=True)
            first = Box(scratch / "box")
            first.tiny()
            expect_ok(first.run("base_train", *TINY, "--num-iterations=6", "--save-every=3", "--run=a"))
            parts = [
                "--eval=core,bpb",
                "--eval-bundle=mini",
                "--core-metric-max-per-task=4",
                "--eval-tokens=512",
            ]
            expect_ok(first.run("base_eval", "--run=a", *parts, "--device-type=cpu"))
            _made.append(first.base)
    shutil.copytree(_made[0], box.base, dirs_exist_ok=True)
    return box.base / "runs" / "a"


def bounded(result: subprocess.CompletedProcess[str], name: str) -> None:
    """It worked, or it ends with one line that names the file."""
    if result.returncode:
        expect_error(result, name)
    else:
        expect_ok(result)


def changed(path: Path, **values: Any) -> str:
    """The text of a JSON file with some fields changed."""
    return json.dumps(json.loads(path.read_text("utf-8")) | values)


def cases_of_report(run: Path) -> list[tuple[str, str]]:
    """Name and contents of a file of a run, damaged in fifteen ways."""
    config, scores = run / "config.json", run / "base_eval.json"
    lines = (run / "metrics.jsonl").read_text("utf-8")
    tasks = json.loads(scores.read_text("utf-8"))["tasks"]
    label = next(iter(tasks))
    return [
        ("metrics.jsonl", lines + "[1]\n"),
        ("metrics.jsonl", lines + '{"kind": "step"}\n'),
        ("metrics.jsonl", lines + '{"kind": "sample", "step": 9}\n'),
        ("metrics.jsonl", lines + '{"kind": "step", "step": "x", "loss": 1.0}\n'),
        ("metrics.jsonl", lines + "9" * 5000 + "\n"),
        ("metrics.jsonl", lines + "[" * 50_000 + "\n"),
        ("config.json", changed(config, params=[])),
        ("config.json", changed(config, model=None)),
        ("config.json", changed(config, batch_tokens="many")),
        ("config.json", "[]"),
        ("base_eval.json", changed(scores, tasks={label: {}})),
        ("base_eval.json", changed(scores, tasks={label: tasks[label] | {"baseline": 1}})),
        ("base_eval.json", changed(scores, bpb_profile={"val": []})),
        ("base_eval.json", changed(scores, core_metric="high")),
        ("base_eval.json", "9" * 5000),
    ]


@row(
    "T51",
    "report of damaged metrics, config, base_eval (15 cases)",
    wanted="shown, or one line with the file",
)
def t51(box: Box) -> None:
    """Each case alone, each in the report command."""
    run = trained(box)
    whole = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    cases = cases_of_report(run)
    (run / "metrics.jsonl").write_bytes(whole["metrics.jsonl"] + b"\xff\n")
    bounded(box.run("report", "--run=a"), "metrics.jsonl")
    (run / "metrics.jsonl").write_bytes(whole["metrics.jsonl"])
    for name, contents in cases:
        (run / name).write_text(contents, "utf-8")
        (code, text), *_ = each(box, "scripts.report", [["--run=a"]])
        (run / name).write_bytes(whole[name])
        assert "Traceback" not in text, f"{name}, {contents[-40:]!r}: {text[-400:]}"
        assert code == 0 or (code == 2 and name in text), f"{name}, {contents[-40:]!r}: {text[-400:]}"


@row("T52", "summary.json of [], null, 3, 5,000 digits; resume", wanted="passed over in one line, made again")
def t52(box: Box) -> None:
    """Four contents, each resumed from."""
    run = trained(box)
    whole = json.loads((run / "summary.json").read_text("utf-8"))
    for contents in ("[]", "null", "3", "9" * 5000):
        (run / "summary.json").write_text(contents)
        done = box.run("base_train", *TINY, "--num-iterations=6", "--run=a", "--resume=auto")
        expect_ok(done)
        assert re.search(r"passed over: .*summary\.json", done.stdout), done.stdout
        again = json.loads((run / "summary.json").read_text("utf-8"))
        assert (again["status"], again["val_bpb"]) == (whole["status"], whole["val_bpb"])


@row("T53", "summary.json torn or empty; resume to a longer horizon", wanted="the whole checkpoint is used")
def t53(box: Box) -> None:
    """The file is derived: the checkpoint decides."""
    run = trained(box)
    for steps, contents in ((8, ""), (10, (run / "summary.json").read_text("utf-8")[:30])):
        (run / "summary.json").write_text(contents)
        flags = (f"--num-iterations={steps}", "--extend", "--run=a", "--resume=auto")
        expect_ok(box.run("base_train", *TINY, *flags))
        assert json.loads((run / "summary.json").read_text("utf-8"))["steps"] == steps


@row(
    "T57",
    "5,000 digits in tokenizer.json, manifest.json, config.json, summary.json",
    wanted="one line, file named",
)
def t57(box: Box) -> None:
    """Through the commands that read each."""
    run = trained(box)
    places = {
        box.base / "tokenizers/tiny/tokenizer.json": ("base_train", *TINY, "--run=b", "--num-iterations=2"),
        box.base / "data/tiny/manifest.json": ("base_train", *TINY, "--run=b", "--num-iterations=2"),
        run / "config.json": ("report", "--run=a"),
        run / "base_eval.json": ("report", "--run=a"),
        run / "summary.json": ("report", "--run=a"),
    }
    for path, command in places.items():
        whole = path.read_bytes()
        path.write_text('{"format": ' + "9" * 5000 + "}")
        bounded(box.run(*command), path.name)
        path.write_bytes(whole)


@row("T58", "deep nesting, a key twice, NaN in the same files", wanted="refused by name, or harmless")
def t58(box: Box) -> None:
    """Three kinds in each of four files."""
    run = trained(box)
    places = {
        run / "config.json": ("report", "--run=a"),
        run / "base_eval.json": ("report", "--run=a"),
        box.base / "data/tiny/manifest.json": ("tok_train", "--corpus=tiny", "--name=t2", "--vocab-size=300"),
        box.base / "tokenizers/tiny/tokenizer.json": ("tok_eval", "--tokenizer=tiny", "--corpus=tiny"),
    }
    for path, command in places.items():
        whole = path.read_text("utf-8")
        for first in ('"deep": ' + "[" * 50_000 + "]" * 50_000, '"twin": 1, "twin": 2', '"number": NaN'):
            path.write_text("{" + first + "," + whole.lstrip()[1:])
            bounded(box.run(*command), path.name)
        path.write_text(whole, "utf-8")


NONSENSE = [
    *("--matrix-lr=nan", "--matrix-lr=inf", "--matrix-lr=1e38", "--weight-decay=nan", "--weight-decay=1e38"),
    *("--final-lr-frac=nan", "--save-minutes=nan", "--dist-timeout=nan", "--dist-timeout=inf"),
    *("--target-flops=inf", "--target-param-data-ratio=inf", "--depth=100000000", "--resume=\u00b2"),
    *("--resume=\u0663", "--warmdown-ratio=nan", "--scalar-lr=inf", f"--seed={2**64}", "--max-seq-len=1e3"),
]


@row("T64", "numbers and steps that no run can use (18 flags)", wanted="one line each, nothing made")
def t64(box: Box) -> None:
    """Each flag alone, after those of a run that would work."""
    box.tiny()
    refused(box, "scripts.base_train", [[*TINY, "--num-iterations=2", "--run=m", flag] for flag in NONSENSE])
    assert not (box.base / "runs").exists()


@row("T65", "--dist-timeout=-1, --eval-tokens=-5, --embedding-lr=-1", wanted="one line each")
def t65(box: Box) -> None:
    """And three of the same kind in other commands."""
    box.tiny()
    flags = ("--dist-timeout=-1", "--eval-tokens=-5", "--embedding-lr=-1", "--keep-last=0", "--eval-every=-1")
    refused(box, "scripts.base_train", [[*TINY, "--num-iterations=2", "--run=m", flag] for flag in flags])
    flags = ("--core-metric-max-per-task=-3", "--eval-batch-tokens=-5", "--eval-tokens=-7", "--step=-1")
    refused(box, "scripts.base_eval", [["--run=m", flag] for flag in flags])


@row("T66", "run names ../x, ., /, 300 letters, a file of that name", wanted="refused")
def t66(box: Box) -> None:
    """And a name that a file has."""
    box.tiny()
    names = ("../x", ".", "..", "/", "a/b", "x" * 300)
    refused(box, "scripts.base_train", [[*TINY, "--num-iterations=2", f"--run={name}"] for name in names])
    (box.base / "runs").mkdir()
    (box.base / "runs/file").write_text("")
    expect_error(box.run("base_train", *TINY, "--num-iterations=2", "--run=file"), "file")
    assert [path.name for path in (box.base / "runs").iterdir()] == ["file"]


@row("T67", "run name of bytes that are not UTF-8", wanted="one line, no folder left")
def t67(box: Box) -> None:
    """In training and in three commands that read a run."""
    box.tiny()
    expect_error(box.run("base_train", *TINY, "--num-iterations=2", "--run=\udcff"), "--run", r"\udcff")
    assert not (box.base / "runs").exists()
    for command in ("report", "export", "base_eval"):
        expect_error(box.run(command, "--run=caf\udce9"), "--run", r"caf\udce9")


@row("T68", "run names with newline, ESC, U+202E, NFC/NFD twins, spaces", wanted="refused, shown escaped")
def t68(box: Box) -> None:
    """New ones are refused; one that an older version made is still read."""
    names = ("a\nb", "a\x1b[31mb", "a\u202eb", "caf\u00e9", "cafe\u0301", " a", "a b")
    argvs = [[*TINY, "--num-iterations=2", f"--run={name}"] for name in names]
    refused(box, "scripts.base_train", argvs)
    for _, text in each(box, "scripts.base_train", argvs):
        assert re.fullmatch("[ -~]+", text.strip()), repr(text)
    run = trained(box)
    run.rename(run.with_name("caf\u00e9 1"))
    expect_ok(box.run("report", "--run=caf\u00e9 1"))


@row("T84", "HTML in corpus, run, sample, task, status, machine", wanted="escaped everywhere, CSP there")
def t84(box: Box) -> None:
    """An element in every text that a run leaves."""
    run = trained(box)
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    config, scores = (
        json.loads((run / name).read_text("utf-8")) for name in ("config.json", "base_eval.json")
    )
    config["args"] = dict.fromkeys(config["args"], bad)
    config["machine"] = {bad: bad}
    scores |= {"bundle": bad, "samples": [bad], "tasks": {bad: next(iter(scores["tasks"].values()))}}
    for name, value in (("config.json", config), ("base_eval.json", scores)):
        (run / name).write_text(json.dumps(value))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    (run / "summary.json").write_text(json.dumps(summary | {"status": bad}))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "sample", "step": 6, "text": bad}) + "\n")
    expect_ok(box.run("report", "--run=a"))
    page = (run / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") > 8
    assert "default-src 'none'" in page


# A user without an entry of passwd; the capability lets it read an interpreter below another's home.
STRANGER = ["setpriv", "--reuid=12345", "--clear-groups", "--inh-caps=+dac_override"]
STRANGER += ["--ambient-caps=+dac_override", "env", "-u", "HOME"]


def stranger_or_skip(box: Box) -> None:
    """Such a user can be had here, or the row is skipped."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        raise Skip("needs root and setpriv")
    if box.execute([*STRANGER, "true"]).returncode:
        raise Skip("capabilities cannot be handed on here")


@row("B11", "no home folder, no NANOCHAT_BASE_DIR: any command", wanted="set NANOCHAT_BASE_DIR")
def b11(box: Box) -> None:
    """Two commands; then what the message advises."""
    stranger_or_skip(box)
    for command in (box.argv("dataset", "--list"), box.argv("report", "--run=a")):
        nowhere = [*STRANGER, "-u", "NANOCHAT_BASE_DIR", *command]
        expect_error(box.execute(nowhere), "Set NANOCHAT_BASE_DIR")
    expect_ok(box.execute([*STRANGER, *box.argv("dataset", "--list")]))


@row("B12", "the same user with a base directory: train, --compile on", wanted="works")
def b12(box: Box) -> None:
    """Torch looks for the name of the user on its own."""
    stranger_or_skip(box)
    if not shutil.which("g++"):
        raise Skip("needs g++")
    box.tiny()
    flags = [*TINY, "--depth=1", "--num-iterations=2", "--compile=on", "--run=c"]
    done = box.execute([*STRANGER, *box.argv("base_train", *flags)], timeout=1800)
    expect_ok(done)
    assert "torch.compile is on" in done.stdout


@row(
    "B14", "NANOCHAT_BASE_DIR='~/nb', as a file of variables leaves it", wanted="expanded; no folder called ~"
)
def b14(box: Box) -> None:
    """Made there, and nothing beside it."""
    text = box.folder / "ok.jsonl"
    text.write_text("".join(json.dumps({"text": f"some words {i}"}) + "\n" for i in range(50)))
    home = box.folder / "home"
    home.mkdir()
    env = {"HOME": str(home), "NANOCHAT_BASE_DIR": "~/nb"}
    expect_ok(box.run("dataset", "--corpus=local", "--name=z", "--files", text, env=env))
    assert (home / "nb/data/z/manifest.json").is_file()
    assert not (box.folder / "~").exists()


@row("B15", "base directory: dangling link, a file, spaces and emoji, relative", wanted="works, or one line")
def b15(box: Box) -> None:
    """The corpus is made in each, or the folder is named."""
    text = box.folder / "ok.jsonl"
    text.write_text("".join(json.dumps({"text": f"some words {i}"}) + "\n" for i in range(50)))
    (box.folder / "file").write_text("")
    (box.folder / "link").symlink_to("nowhere/at/all")
    command = ("dataset", "--corpus=local", "--name=z", "--files", str(text))
    for base in ("file", "link", "caf\udce9"):
        done = box.run(*command, env={"NANOCHAT_BASE_DIR": str(box.folder / base)})
        if done.returncode or base == "file":
            expect_error(done, base.encode("ascii", "backslashreplace").decode())
    for base in (str(box.folder / "a b \U0001f600 [x]"), "below/here"):
        expect_ok(box.run(*command, env={"NANOCHAT_BASE_DIR": base}))
        assert (box.folder / base / "data/z/manifest.json").is_file()


@row(
    "B16",
    "umask 077, stdin closed, no TMPDIR, OMP_NUM_THREADS=abc, 20 columns, dumb terminal",
    wanted="works",
)
def b16(box: Box) -> None:
    """A run of two steps under each."""
    box.tiny()
    run = "$PY -m scripts.base_train $TINY --num-iterations=2"
    for number, how in enumerate(
        (
            f"umask 077; {run} <&-",
            f"OMP_NUM_THREADS=abc TMPDIR=/nowhere/at/all {run}",
            f"COLUMNS=20 TERM=dumb NO_COLOR=1 {run}",
        )
    ):
        done = box.shell(f"{how} --run=r{number}", timeout=600)
        if done.returncode:
            expect_error(done)
        else:
            expect_ok(done)


@row("B20", "too little address space: 8 GB, 2 GB, 1.2 GB", wanted="works, or ends without a checkpoint torn")
def b20(box: Box) -> None:
    """What the libraries do without memory is theirs; what is on the disk afterwards is whole."""
    box.tiny()
    for number, kilobytes in enumerate((8_000_000, 2_000_000, 1_200_000)):
        box.shell(
            f"ulimit -v {kilobytes}; $PY -m scripts.base_train $TINY --num-iterations=4 --run=v{number}"
        )
        folder = box.base / "runs" / f"v{number}" / "checkpoints"
        if folder.is_dir() and any(folder.glob("step_*")):
            expect_ok(box.run("checkpoint", "verify", f"v{number}"))


@row("D1", "--target-flops inf, and other ends of the numbers", wanted="one line")
def d1(box: Box) -> None:
    """With --dry-run, as it was found."""
    box.tiny()
    flags = ("--target-flops=inf", "--target-flops=1e400", "--target-flops=-1", "--target-flops=0")
    flags += ("--num-iterations=0", f"--num-iterations={10**30}", "--target-param-data-ratio=nan")
    refused(box, "scripts.base_train", [[*TINY, "--dry-run", flag] for flag in flags])


@row(
    "D3",
    "--target-loss inf, --matrix-lr nan, --dist-timeout inf or nan",
    wanted="refused before a model is built",
)
def d3(box: Box) -> None:
    """The single line is all that is printed."""
    box.tiny()
    flags = ("--target-loss=inf", "--matrix-lr=nan", "--dist-timeout=inf", "--dist-timeout=nan")
    flags += ("--unembedding-lr=inf", "--save-minutes=inf")
    refused(box, "scripts.base_train", [[*TINY, "--num-iterations=2", flag] for flag in flags])
    assert not (box.base / "runs").exists()


@row("D6", "--matrix-lr -1, --weight-decay -1, --final-lr-frac -3, --eval-tokens -1", wanted="one line each")
def d6(box: Box) -> None:
    """Ascent on the loss is not what anybody wants."""
    box.tiny()
    flags = (
        "--matrix-lr=-1",
        "--weight-decay=-1",
        "--final-lr-frac=-3",
        "--dist-timeout=-5",
        "--eval-tokens=-1",
    )
    flags += ("--final-lr-frac=1.5", "--unembedding-lr=-1e-9", "--soap-every=0", "--warmup-steps=-1")
    refused(box, "scripts.base_train", [[*TINY, "--num-iterations=2", flag] for flag in flags])


@row("D7", "depth 1, 3; odd shapes, batches, seeds; 1e24 steps", wanted="works, or one line")
def d7(box: Box) -> None:
    """Two steps of each."""
    box.tiny()
    kinds = (
        *(["--depth=1"], ["--depth=3"], ["--head-dim=2"], ["--head-dim=6"], ["--head-dim=100"]),
        *(["--max-seq-len=1"], ["--max-seq-len=2"], ["--max-seq-len=7", "--total-batch-size=126"]),
        *(["--max-seq-len=257", "--total-batch-size=257"], ["--total-batch-size=255"]),
        *(["--device-batch-size=3"], [f"--seed={2**64}"], [f"--seed={2**63 - 1}"]),
        *(["--num-iterations=" + "1" + "0" * 24, "--dry-run"], ["--target-flops=1e30", "--dry-run"]),
    )
    argvs = [[*TINY, "--num-iterations=2", f"--run=r{i}", *kind] for i, kind in enumerate(kinds)]
    taken(box, "scripts.base_train", argvs)


@row("D18", "empty summary.json, --resume auto", wanted="passed over")
def d18(box: Box) -> None:
    """Of a run that was stopped, so that there is something to go on with."""
    box.tiny()
    flags = [*TINY, "--num-iterations=4000", "--save-every=10", "--run=s"]
    process = box.start("base_train", *flags)
    box.wait_for_step("s", 12)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, box.output()
    (box.base / "runs/s/summary.json").write_text("")
    done = box.run("base_train", *flags, "--num-iterations=60", "--extend", "--resume=auto")
    expect_ok(done)
    assert "passed over" in done.stdout


@row("D19", "summary.json holds []: resume, report", wanted="passed over in one line")
def d19(box: Box) -> None:
    """The report says so on its page."""
    run = trained(box)
    (run / "summary.json").write_text("[]")
    expect_ok(box.run("report", "--run=a"))
    assert "summary.json: it is a list, expected an object" in (run / "report.html").read_text("utf-8")
    done = box.run("base_train", *TINY, "--num-iterations=6", "--run=a", "--resume=auto")
    expect_ok(done)
    assert "it is a list" in done.stdout


@row("D22", "arguments with a byte that is not UTF-8", wanted="one line, or recorded escaped")
def d22(box: Box) -> None:
    """Names are refused; the path of a bundle is a path."""
    box.tiny()
    expect_error(box.run("base_train", *TINY, "--num-iterations=2", "--run=caf\udce9"), r"caf\udce9")
    expect_error(box.run("base_train", *TINY[1:], "--corpus=caf\udce9"), "--corpus", r"caf\udce9")
    bundle = "--eval-bundle=caf\udce9"
    expect_ok(box.run("base_train", *TINY, "--num-iterations=2", "--run=p", bundle))
    config = (box.base / "runs/p/config.json").read_text("utf-8")
    assert r"caf\\xe9" in config, "the path is not in config.json"
