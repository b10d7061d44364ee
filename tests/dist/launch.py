"""Start base_train under torchrun as a person does, from tests; and read what it leaves."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files
from tests.tiny import read_metrics
from tests.conftest import REPO
from tests.test_train import CLOCK

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
TRAIN = ("-m", "scripts.base_train", "--")


def command(ranks: int, flags: list[str], *options: str, program: tuple[str, ...] = TRAIN) -> list[str]:
    """The command line of so many ranks; `options` are torchrun's."""
    return [*TORCHRUN, f"--nproc_per_node={ranks}", *options, *program, *flags]


def faulty(kind: str, rank: int, step: int, where: str = "loader") -> tuple[str, ...]:
    """A program for `command`: base_train, in which a rank meets a fault."""
    return ("-m", "tests.dist.fault_script", "--", kind, str(rank), str(step), where)


def launch(
    ranks: int, flags: list[str], *options: str, program: tuple[str, ...] = TRAIN, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(ranks, flags, *options, program=program),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def lines(run: str, kind: str = "step") -> list[dict[str, Any]]:
    """The metrics of a run without the clock."""
    entries = read_metrics(files.run_dir(run) / "metrics.jsonl")
    return [{k: v for k, v in e.items() if k not in CLOCK} for e in entries if not kind or e["kind"] == kind]


def losses(run: str) -> list[float]:
    """The training loss of every step."""
    return [entry["loss"] for entry in lines(run)]


def digest(run: str, step: int) -> str:
    """Of the weights, the moments and the place in the data at a step."""
    folder = checkpoint_format.folder_of(run, step)
    meta = files.read_json(folder / checkpoint_format.STATE)
    kept = {name: value for name, value in meta.items() if name not in ("train_seconds", "plan", "device_batch_size")}
    parts = [(folder / name).read_bytes() for name in (checkpoint_format.MODEL, checkpoint_format.OPTIMIZER)]
    return hashlib.sha256(b"".join([*parts, repr(sorted(kept.items())).encode()])).hexdigest()
