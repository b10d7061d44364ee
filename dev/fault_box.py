"""What a row of dev/faults.py works with: a base directory, the commands of the project, and expectations."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

# A run that steps in milliseconds, on the corpus that `Box.tiny` makes.
TINY = [
    "--corpus=tiny",
    "--depth=2",
    "--aspect-ratio=16",
    "--head-dim=16",
    "--max-seq-len=32",
    "--total-batch-size=128",
    "--device-batch-size=4",
    "--eval-tokens=512",
    "--sample-every=0",
    "--device-type=cpu",
    "--dtype=float32",
]


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "near", "red", "house", "while"]


class Skip(Exception):
    """This machine cannot try the row; the message says why."""


@dataclass(frozen=True)
class Row:
    """One fault: its name, what is tried, what is wanted, and the function that tries it."""

    id: str
    what: str
    wanted: str
    function: Callable[[Box], None]


ROWS: dict[str, Row] = {}


def row(id: str, what: str, *, wanted: str) -> Callable[[Callable[[Box], None]], Callable[[Box], None]]:
    """Register a function as the row `id`."""

    def register(function: Callable[[Box], None]) -> Callable[[Box], None]:
        assert id not in ROWS, f"two rows are named {id}"
        ROWS[id] = Row(id, what, wanted, function)
        return function

    return register


class Box:
    """A scratch folder with a base directory in it; every process that was started ends with it."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and an empty base directory."""
        self.folder, self.base = folder, folder / "base"
        self.base.mkdir(parents=True)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")} | {
            "NANOCHAT_BASE_DIR": str(self.base),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._started: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End what still runs, and delete the folder."""
        for process in self._started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def argv(self, command: str, *flags: Any) -> list[str]:
        """The command line of a command: "base_train", "dataset", ..."""
        return [sys.executable, "-m", f"scripts.{command}", *map(str, flags)]

    def run(
        self, command: str, *flags: Any, env: dict[str, str] | None = None, timeout: float = 240, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in the scratch folder; `how` goes to subprocess.run."""
        return self.execute(self.argv(command, *flags), env=env, timeout=timeout, **how)

    def execute(
        self, argv: list[str], *, env: dict[str, str] | None = None, timeout: float = 240, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run any program to its end, in the scratch folder, with the environment of the box."""
        how = {"capture_output": True, "cwd": self.folder} | how
        return subprocess.run(
            argv, env=self.env | (env or {}), timeout=timeout, text=True, errors="replace", **how
        )

    def python(self, code: str, *args: Any, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process of its own."""
        return self.execute([sys.executable, "-c", code, *map(str, args)], **how)

    def shell(self, script: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a bash script; $PY is the interpreter and $TINY the flags of a tiny run."""
        names = {"PY": sys.executable, "TINY": " ".join(TINY)} | how.pop("env", {})
        return self.execute(["bash", "-c", script], env=names, **how)

    def start(
        self, command: str, *flags: Any, env: dict[str, str] | None = None, **how: Any
    ) -> subprocess.Popen[str]:
        """Start a command in a process group of its own; its output goes to files unless `how` says else."""
        out = self.folder / f"out-{len(self._started)}.txt"
        how = {"cwd": self.folder, "stdout": out.open("w"), "stderr": subprocess.STDOUT} | how
        process = subprocess.Popen(
            self.argv(command, *flags), env=self.env | (env or {}), start_new_session=True, text=True, **how
        )
        self._started.append(process)
        return process

    def output(self, number: int = 0) -> str:
        """What the process that was started as number `number` has printed so far."""
        return (self.folder / f"out-{number}.txt").read_text("utf-8", errors="replace")

    def faulty(self, ops: str, path: str, error: int, **when: Any) -> dict[str, str]:
        """The environment under which calls on some files fail, for `env`; see `failing_calls`."""
        return failing_calls(self.folder, ops, path, error, **when)

    def faults_met(self) -> list[str]:
        """The calls that `faulty` has made fail so far, as "operation path"."""
        log = self.folder / FAULT_LOG
        return log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []

    def tiny(self) -> None:
        """Put a small corpus and its tokenizer, both named tiny, into the base directory."""
        shutil.copytree(_tiny_base(), self.base, dirs_exist_ok=True)

    def wait_for_step(self, run: str, step: int, timeout: float = 120) -> None:
        """Wait until the metrics of a run have so many lines."""
        path = self.base / "runs" / run / "metrics.jsonl"

        def reached() -> bool:
            return path.exists() and path.read_bytes().count(b"\n") >= step

        wait_until(reached, timeout, f"{run} did not come to step {step}")


_made: list[Path] = []
_making = threading.Lock()


def _tiny_base() -> Path:
    """A base directory with the corpus and the tokenizer, made once for all rows of this process."""
    with _making:
        if not _made:
            holder = tempfile.TemporaryDirectory(prefix="faults-tiny-")
            _holders.append(holder)
            box = Box(Path(holder.name) / "box")
            text = box.folder / "tiny.jsonl"
            texts = (
                " ".join(WORDS[(i * 7 + k * k) % len(WORDS)] for k in range(5 + i % 50)) for i in range(400)
            )
            text.write_text("".join(json.dumps({"text": f"{words}."}) + "\n" for words in texts))
            expect_ok(box.run("dataset", "--corpus=local", "--name=tiny", "--files", text))
            expect_ok(box.run("tok_train", "--corpus=tiny", "--vocab-size=300"))
            _made.append(box.base)
    return _made[0]


_holders: list[Any] = []


FAULT_LOG = "faults.log"
SHORT = 0  # in place of an error: reads and writes do half of what was asked


def failing_calls(
    folder: Path,
    ops: str,
    path: str,
    error: int,
    *,
    first: int = 1,
    times: int = 0,
    when: Path | None = None,
) -> dict[str, str]:
    """The environment of a process in which calls on some files fail as on a bad or full disk.

    Args:
        folder: gets faults.log, a line for every call that failed.
        ops: of open, create (an open that makes the file where it is absent), read, write, fsync, close,
            rename, unlink, mkdir, truncate, with commas.
        path: the calls are on paths with this in them (of a rename: either name).
        error: such as errno.ENOSPC; SHORT for reads and writes that do half.
        first: the first such call of a process that fails, from 1.
        times: how many fail; 0 for all from then on.
        when: a file; calls count only while it is there.

    Raises:
        Skip: this is not Linux, or there is no C compiler.
    """
    return {
        "LD_PRELOAD": str(_shim()),
        "FAULT_OPS": ops,
        "FAULT_PATH": path,
        "FAULT_ERRNO": str(error),
        "FAULT_FIRST": str(first),
        "FAULT_TIMES": str(times),
        "FAULT_WHEN": str(when or ""),
        "FAULT_LOG": str(folder / FAULT_LOG),
    }


@functools.cache
def _shim() -> Path:
    """dev/fault_shim.c as a library, compiled once for this process."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        raise Skip("calls are made to fail by a shim that needs Linux and a C compiler")
    holder = tempfile.TemporaryDirectory(prefix="faults-shim-")
    _holders.append(holder)
    library = Path(holder.name) / "fault_shim.so"
    source = ROOT / "dev" / "fault_shim.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise Skip(f"the shim cannot be compiled here: {built.stderr.strip()[-200:]}")
    return library


def wait_until(true: Callable[[], bool], timeout: float, otherwise: str) -> None:
    """Look every 50 ms; an AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"{otherwise} within {timeout:g} s"
        time.sleep(0.05)


def expect_ok(result: subprocess.CompletedProcess[str]) -> None:
    """Exit code 0, and no traceback on the way."""
    assert result.returncode == 0, f"exit code {result.returncode}: {_tail(result)}"
    assert "Traceback" not in (result.stderr or ""), _tail(result)


def expect_error(result: subprocess.CompletedProcess[str], *words: str) -> str:
    """Exit code 2 and one line that begins with "error:" and has all the words; returns that line."""
    lines = (result.stderr or "").strip().splitlines()
    assert result.returncode == 2, f"exit code {result.returncode}, expected 2: {_tail(result)}"
    assert "Traceback" not in result.stderr, _tail(result)
    assert lines, "nothing on stderr"
    assert "error:" in lines[-1], f"no line of error: {_tail(result)}"
    for word in words:
        assert word in lines[-1], f"{word!r} is not in: {lines[-1]}"
    return lines[-1]


def _tail(result: subprocess.CompletedProcess[str]) -> str:
    text = (result.stderr or "") + (result.stdout or "")
    return " | ".join(text.strip().splitlines()[-4:])[-600:]
