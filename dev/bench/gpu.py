"""What needs CUDA, one measurement after another by their worth, each kept as soon as it is made.

    python -m dev.bench.gpu [--json out/gpu.json] [--budget 540] [--depths 12 24 20]

A rented GPU is often had for ten minutes, and gone without a word. So every measurement is a process of its
own, since an error of CUDA ends all work of its process; its rows are in the file before the next one begins;
one that fails is a row with its error; and none begins that the time left is too short for. Run again on the
same commit and machine, it goes on with what is missing. With --device-type cpu all sizes are toys, which
tests this program and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dev.bench.gpu_figures import FIGURES, REPO, Row
from nanochat.common import files, machine
from nanochat.common.errors import UserError, cli
from nanochat.common.machine import Precision
from nanochat.model.attention_backends import available_backends, choose_precision

DEPTHS = (12, 24, 20)
BUDGET_S = 540.0
TOY_S = 5.0  # expected of a measurement on a CPU
SAME_MACHINE = ("device", "torch", "cuda")
STEP_TESTS = "tests/gpu/test_step_gpu.py"
SANE = [f"{STEP_TESTS}::test_the_fused_loss_equals_float64", "tests/gpu/test_train_gpu.py"]
ALL_TESTS = ([STEP_TESTS], ["tests/gpu/test_attention_gpu.py"])
SHOWN = ("depth", "dtype", "backend", "recipe", "window", "rows")


@dataclass(frozen=True)
class Measurement:
    """One entry of the list of what is measured.

    Attributes:
        name: by which the file knows it.
        figures: a key of FIGURES.
        expected_s: seconds that it takes, start and compilation included; it does not begin with less left.
        setting: arguments of the function.
    """

    name: str
    figures: str
    expected_s: float
    setting: dict[str, Any] = field(default_factory=dict)


def by_worth(depths: Sequence[int], backends: Sequence[str], fp8: bool) -> list[Measurement]:
    """All measurements, the most valuable ones first.

    Whether the machine is what it should be comes before all, then whether its results are right, then what
    a run would take; the parts of a step say why.

    Args:
        depths: the first is compiled fastest, the second is the one that counts.
        backends: of attention, the default first.
        fp8: whether the device trains in fp8.
    """
    small, large = depths[0], depths[min(1, len(depths) - 1)]
    dtypes = ("fp8", "bf16") if fp8 else ("bf16",)

    def step(depth: int, dtype: str, backend: str = backends[0], **more: Any) -> Measurement:
        name = " ".join(["step", f"d{depth}", dtype, backend, *more.values()])
        setting = {"depth": depth, "dtype": dtype, "backend": backend, **more}
        return Measurement(name, "training_step", 45 if depth < 20 else 80, setting)

    def part(figures: str, expected_s: float, **setting: Any) -> Measurement:
        shown = (f"d{value}" if key == "depth" else str(value) for key, value in setting.items())
        return Measurement(" ".join([figures, *shown]), figures, expected_s, setting)

    def tests(name: str, expected_s: float, chosen: list[str]) -> Measurement:
        return Measurement(name, "tests", expected_s, {"chosen": chosen})

    listed = [
        part("machine_rates", 20),
        *([part("fp8_rates", 12)] if fp8 else []),
        tests("sanity", 30, SANE),
        step(small, "bf16"),
        *(step(large, dtype) for dtype in dtypes),
        part("loss_of_tokens", 20, depth=large),
        *(part("mlp", 20, depth=large, dtype=dtype) for dtype in dtypes),
        *(part("attention_kernel", 25, depth=large, backend=backend) for backend in backends),
        part("optimizer_update", 40, depth=large),
        part("decoding", 25, depth=small),
        part("core_scoring", 40, depth=small),
        step(small, "bf16", recipe="speedrun-124m"),
        *(tests(f"tests {chosen[0]}", 90, chosen) for chosen in ALL_TESTS),
        *(step(depth, dtype) for depth in depths for dtype in dtypes),
        *(step(depth, "bf16", backend) for depth in depths for backend in backends[1:]),
    ]
    return list({measurement.name: measurement for measurement in listed}.values())


def in_process_of_its_own(measurement: Measurement, device: str, log: Path, limit_s: float) -> list[Row]:
    """The rows of a measurement; what its process prints is appended to a log.

    Raises:
        UserError: it failed, or took longer than the limit.
    """
    with tempfile.TemporaryDirectory() as folder, log.open("a+", encoding="utf-8") as output:
        answer = Path(folder) / "rows.json"
        task = json.dumps([os.getpid(), measurement.figures, measurement.setting, str(answer)])
        command = [sys.executable, "-m", "dev.bench.gpu", "--device-type", device, "--measure", task]
        print(f"\n== {measurement.name}", file=output, flush=True)
        begun = output.tell()
        process = subprocess.Popen(
            command, cwd=REPO, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise UserError(f"ended after {limit_s:.0f} s, when the time was up.") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            output.seek(begun)
            lines = [line.strip() for line in output if line.strip()]
            raise UserError(f"exit code {code}: {lines[-1] if lines else 'it printed nothing'}")
        rows: list[Row] = files.read_json(answer)
        return rows


class Results:
    """The file of rows: whole after every measurement, and only of one commit and machine."""

    def __init__(self, path: Path, about: dict[str, Any], commit: str | None) -> None:
        """Read what is there already; a file of another commit or machine is put aside."""
        self.path, self._about = path, {"machine": about, "commit": commit}
        self.rows: list[Row] = []
        if path.exists():
            old = files.read_json(path, dict[str, Any], advice="Move it away.")
            if _identity(old) == _identity(self._about):
                self.rows = old["rows"]
            else:
                path.replace(path.with_name(f"{path.stem}-{old.get('commit') or 'before'}{path.suffix}"))

    def has(self, name: str) -> bool:
        """Whether this was measured, and did not fail."""
        return any(row["name"] == name and "error" not in row for row in self.rows)

    def add(self, name: str, rows: list[Row]) -> None:
        """Keep the rows of a measurement in the place of earlier ones that failed."""
        self.rows = [row for row in self.rows if row["name"] != name]
        self.rows += [{"name": name, **row} for row in rows]
        files.write_json(self.path, {**self._about, "rows": self.rows})


def _identity(content: dict[str, Any]) -> tuple[Any, ...]:
    about = content.get("machine", {})
    return content.get("commit"), *(about.get(name) for name in SAME_MACHINE)


def measure_all(
    listed: Sequence[Measurement],
    results: Results,
    budget_s: float,
    measure: Callable[[Measurement, float], list[Row]],
) -> Iterator[str]:
    """Measure what is missing for as long as the budget lasts.

    Args:
        listed: in the order of their worth.
        results: where rows are kept, those of an earlier call included.
        budget_s: seconds from now; a measurement that is expected to take more than is left does not begin.
        measure: gives the rows of one measurement, within so many seconds.

    Yields:
        Lines for the console, after each measurement.
    """
    end = time.monotonic() + budget_s
    for measurement in listed:
        name, left = measurement.name, end - time.monotonic()
        if results.has(name):
            yield f"{name}: measured before"
            continue
        if left < measurement.expected_s:
            yield f"{name}: left out, needs {measurement.expected_s:.0f} s of {max(0, left):.0f} s left"
            continue
        try:
            rows = measure(measurement, left)
        except UserError as error:
            rows = [{"error": str(error)}]
        results.add(name, rows)
        yield f"{name}: {time.monotonic() - end + left:.1f} s"
        yield from (f"  {line}" for line in map(shown, rows))


def shown(row: Row) -> str:
    """A row in words.

    >>> shown({"metric": "step_time", "ours": 1.4, "unit": "s", "depth": 24, "dtype": "bf16"})
    'step_time                         1.4 s               depth 24, dtype bf16'
    >>> shown({"error": "exit code 1: out of memory"})
    'FAILED: exit code 1: out of memory'
    """
    if "error" in row:
        return f"FAILED: {row['error']}"
    setting = ", ".join(f"{name} {row[name]}" for name in SHOWN if name in row)
    return f"{row['metric']:20}{row['ours']:17,.5g} {row['unit']:14}  {setting}".rstrip()


def default_precision(device: torch.device) -> tuple[Precision, list[str], bool]:
    """How a run computes here: the precision, the attention backends with its own first, whether in fp8."""
    precision, line = choose_precision(device)
    print(line)
    others = [name for name, obstacle in available_backends(device).items() if not obstacle]
    backends = [precision.attention, *(name for name in others if name != precision.attention)]
    fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return precision, backends, fp8


def measure_here(task: str, device: torch.device) -> None:
    """Do one measurement in this process and write its rows where the task says."""
    parent, figures, setting, answer = json.loads(task)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    files.keep_compiled()
    files.write_json(Path(answer), FIGURES[figures](device, **setting))


def end_with(parent: int) -> None:
    """End this process when its parent is gone: the next call would measure beside it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def interrupted(signum: int, frame: object) -> None:
    """End as Ctrl-C does, which also ends the measurement under way."""
    raise KeyboardInterrupt


@cli
def main() -> None:
    """Measure, print every figure as it is made, and keep it in the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("out/gpu.json"), help="the file of figures")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all of it")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="the second counts most")
    parser.add_argument("--device-type", choices=("cuda", "cpu"), default="cuda", help="cpu: toys, for tests")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    machine.grow_segments()
    device = machine.detect_device(args.device_type)
    if args.measure:
        measure_here(args.measure, device)
        return
    signal.signal(signal.SIGTERM, interrupted)
    _, backends, fp8 = default_precision(device)
    listed = by_worth(args.depths, backends, fp8)
    if device.type == "cpu":
        listed = [Measurement(one.name, one.figures, TOY_S, one.setting) for one in listed]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    results = Results(args.json, machine.describe(device), machine.provenance()["commit"])
    log = args.json.with_suffix(".log")

    def measure(measurement: Measurement, limit_s: float) -> list[Row]:
        return in_process_of_its_own(measurement, device.type, log, limit_s)

    for line in measure_all(listed, results, args.budget, measure):
        print(line, flush=True)
    missing = [measurement.name for measurement in listed if not results.has(measurement.name)]
    print(f"{len(listed) - len(missing)} of {len(listed)} measurements are in {args.json}")
    if missing:
        print("the same command goes on with what is missing")
    sys.exit(any("error" in row for row in results.rows))


if __name__ == "__main__":
    main()
