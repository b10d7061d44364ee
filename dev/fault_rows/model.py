"""Rows of the numbers of a run: the same bits whatever the machine does, and nothing else after a resume."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from dev.fault_box import TINY, Box, expect_error, expect_ok, row

SHORT = [*TINY, "--num-iterations=8", "--save-every=4", "--keep-last=9"]

# base_train on a machine that has little memory to give at this minute.
STARVED = """
from nanochat.common import machine
machine.available_memory_bytes = lambda device: 4 * 10**6
from scripts.base_train import main
main()
"""


def weights(box: Box, run: str, step: int = 8) -> str:
    """The hash of the weights of a checkpoint."""
    folder = box.base / "runs" / run / "checkpoints" / f"step_{step:06d}"
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def cut(box: Box, run: str, as_run: str, step: int = 8) -> Path:
    """A copy of a run as it was before its checkpoint of `step`; returns its folder."""
    folder = box.base / "runs" / as_run
    shutil.copytree(box.base / "runs" / run, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{step:06d}")
    (folder / "summary.json").unlink()
    return folder


def torchrun(box: Box, *options: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """One rank, launched by torchrun."""
    program = ["-m", "scripts.base_train", "--", *flags]
    return box.execute([sys.executable, "-m", "torch.distributed.run", *options, *program])


@row("T22", "resume while less memory is free, rows of a micro-batch by memory", wanted="the same bits")
def t22(box: Box) -> None:
    box.tiny()
    flags = [flag for flag in SHORT if not flag.startswith(("--device-batch", "--total-batch"))]
    flags.append("--total-batch-size=1024")
    expect_ok(box.run("base_train", *flags, "--run=whole"))
    cut(box, "whole", "cut")
    expect_ok(box.python(STARVED, *flags, "--run=cut", "--resume=auto"))
    assert weights(box, "cut") == weights(box, "whole"), "other bits"


@row("T23", "OMP_NUM_THREADS of 1, 2 and 4 at width 128", wanted="the same bits")
def t23(box: Box) -> None:
    box.tiny()
    wide = ["--aspect-ratio=64", "--head-dim=64", "--num-iterations=4"]
    for threads in ("1", "2", "4"):
        env = {"OMP_NUM_THREADS": threads}
        expect_ok(box.run("base_train", *SHORT, *wide, f"--run=t{threads}", env=env))
    assert len({weights(box, f"t{threads}", 4) for threads in (1, 2, 4)}) == 1, "other bits"


@row("T94", "tokenizer.json swapped: generate, eval, export, resume", wanted="each refused")
def t94(box: Box) -> None:
    box.tiny()
    expect_ok(box.run("base_train", *SHORT, "--run=a"))
    expect_ok(box.run("tok_train", "--corpus=tiny", "--name=tiny", "--vocab-size=290", "--overwrite"))
    cpu = ("--device-type=cpu", "--dtype=float32")
    expect_error(box.run("generate", "--run=a", *cpu, "the cat"), "tokenizer")
    expect_error(box.run("base_eval", "--run=a", "--eval=bpb", *cpu), "tokenizer")
    expect_error(box.run("export", "--run=a"), "tokenizer")
    expect_error(box.run("base_train", *SHORT, "--run=a", "--resume=4"), "tokenizer hash", "then", "now")


@row(
    "T95", "resume with other dtype, recompute, micro-batch, eval tokens", wanted="dtype refused, rest taken"
)
def t95(box: Box) -> None:
    box.tiny()
    expect_ok(box.run("base_train", *SHORT, "--run=a"))
    cut(box, "a", "b")
    again = ("base_train", *SHORT, "--run=b", "--resume=auto")
    said = expect_error(box.run(*again, "--dtype=bfloat16"), "--dtype: 'float32' then, 'bfloat16' now")
    assert "Give the same arguments" in said, said
    free = ("--recompute=block", "--eval-tokens=256", "--on-nonfinite=skip", "--save-every=2")
    expect_ok(box.run(*again, *free))
    assert weights(box, "b") == weights(box, "a"), "what is free has changed the weights"
    cut(box, "a", "c")
    done = box.run("base_train", *SHORT, "--run=c", "--resume=auto", "--device-batch-size=2")
    expect_ok(done)
    assert "micro-batches of 2 rows, of 4 before" in done.stdout, done.stdout


@row("T99", "four runs at once in one base directory", wanted="the same bits, nothing left over")
def t99(box: Box) -> None:
    box.tiny()
    started = [box.start("base_train", *SHORT, f"--run=r{i}") for i in range(4)]
    assert [process.wait(240) for process in started] == [0, 0, 0, 0], box.output(0)[-300:]
    assert len({weights(box, f"r{i}") for i in range(4)}) == 1, "other bits"
    left = [str(path) for path in box.base.rglob(".tmp-*")]
    assert not left, left


@row("T103", "--rdzv-id used again without --resume", wanted="goes on and says so; nothing erased")
def t103(box: Box) -> None:
    box.tiny()
    options = ("--nnodes=1", "--nproc_per_node=1", "--rdzv-id=job7", "--rdzv-backend=c10d")
    options += ("--rdzv-endpoint=localhost:0",)
    expect_ok(torchrun(box, *options, flags=[*SHORT, "--run=a"]))
    before, folder = weights(box, "a"), box.base / "runs/a"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints/step_000008")
    done = torchrun(box, *options, flags=[*SHORT, "--run=a"])
    expect_ok(done)
    assert "going on from" in done.stdout, done.stdout[-500:]
    assert weights(box, "a") == before, "other bits"


@row("T104", "config.json torn, then resume by python and by torchrun", wanted="goes on")
def t104(box: Box) -> None:
    box.tiny()
    expect_ok(box.run("base_train", *SHORT, "--run=a"))
    for name in ("b", "c"):
        config = cut(box, "a", name) / "config.json"
        config.write_bytes(config.read_bytes()[:300])
    expect_ok(box.run("base_train", *SHORT, "--run=b", "--resume=auto"))
    expect_ok(torchrun(box, "--standalone", "--nproc_per_node=1", flags=[*SHORT, "--run=c", "--resume=auto"]))
    assert weights(box, "b") == weights(box, "c") == weights(box, "a"), "other bits"


@row("B21", "python -O, -OO, -P, -W error; PYTHONHASHSEED", wanted="the same bits")
def b21(box: Box) -> None:
    box.tiny()
    argv = box.argv("base_train", *SHORT)
    options = [[], ["-O"], ["-OO"], ["-P"] if sys.version_info >= (3, 11) else [], ["-W", "error"]]
    for i, option in enumerate(options):
        done = box.execute([argv[0], *option, *argv[1:], f"--run=r{i}"], env={"PYTHONHASHSEED": str(i)})
        expect_ok(done)
    assert len({weights(box, f"r{i}") for i in range(len(options))}) == 1, "other bits"


@row("B22", "no git on the path; a checkout of another owner", wanted="trains, commit unknown")
def b22(box: Box) -> None:
    box.tiny()
    empty = box.folder / "bin"
    empty.mkdir()
    for run, env in (("a", {"PATH": str(empty)}), ("b", {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"})):
        expect_ok(box.run("base_train", *SHORT, f"--run={run}", env=env))
        config = json.loads((box.base / "runs" / run / "config.json").read_text())
        assert config["provenance"]["commit"] is None, config["provenance"]


@row("D17", "folder renamed, base moved, cadence and rows changed; --resume of odd values", wanted="clean")
def d17(box: Box) -> None:
    box.tiny()
    expect_ok(box.run("base_train", *SHORT, "--run=a"))
    cut(box, "a", "other name")
    moved = box.folder / "moved"
    shutil.move(box.base, moved)
    env = {"NANOCHAT_BASE_DIR": str(moved)}
    again = ("base_train", *SHORT, "--run=other name")
    for odd in ("Auto", "-1", "²", "1e3"):
        shown = ascii(odd)[1:-1]
        expect_error(box.run(*again, f"--resume={odd}", env=env), f"--resume={shown}", "expected")
    for absent in ("7", "10"):
        expect_error(box.run(*again, f"--resume={absent}", env=env), f"step {absent}", "There are: 4")
    expect_ok(box.run(*again, "--resume=4", "--eval-every=3", "--device-batch-size=2", env=env))
