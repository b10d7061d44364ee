"""The scripts: each starts in three ways from any directory, and answers bad input in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

NAMES = sorted(path.stem for path in (REPO / "scripts").glob("*.py") if path.stem != "__init__")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
WAYS = {
    "module": lambda name: ["-m", f"scripts.{name}"],
    "file": lambda name: [str(REPO / "scripts" / f"{name}.py")],
    "torchrun-file": lambda name: [*TORCHRUN, str(REPO / "scripts" / f"{name}.py")],
    "torchrun-module": lambda name: [*TORCHRUN, "-m", f"scripts.{name}"],
}


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_scripts_of_the_design_are_there() -> None:
    assert {"tok_train", "tok_eval", "base_train", "base_eval", "generate"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_parses_plans_and_calls(name: str) -> None:
    """Nothing in a script is worth a test of its own, because nothing in it decides."""
    lines = (REPO / "scripts" / f"{name}.py").read_text("utf-8").splitlines()
    assert len(lines) <= 80
    assert "@errors.cli" in lines
    assert lines[-2:] == ['if __name__ == "__main__":', "    main()"]


# Each start of torch takes seconds, so that most pairs are for --slow.
FAST = {
    ("module", "tok_train"),
    ("module", "base_train"),
    ("file", "base_train"),
    ("torchrun-file", "base_train"),
}
STARTS = [
    pytest.param(way, name, marks=() if (way, name) in FAST else pytest.mark.slow)
    for way in WAYS
    for name in NAMES
]


@pytest.mark.parametrize(("way", "name"), STARTS)
def test_every_script_starts_in_every_way_from_any_directory(way: str, name: str, tmp_path: Path) -> None:
    result = run([*WAYS[way](name), "--help"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:")
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []  # no file, and no base directory


BAD = [
    (["-m", "scripts.dataset", "--corpus", "nowhere"], "nowhere"),
    (["-m", "scripts.report", "--run", "nowhere"], "nowhere"),
    (["-m", "scripts.report", "--run", "../up"], "../up"),
    (["-m", "scripts.tok_train", "--corpus", "nowhere"], "nowhere"),
    (["-m", "scripts.tok_eval", "--tokenizer", "nowhere"], "nowhere"),
    (["-m", "scripts.base_train", "--corpus", "stdlib", "--depth", "4"], "tokenizer"),
    (["-m", "scripts.base_eval", "--run", "nowhere", "--eval", "bpb"], "nowhere"),
    (["-m", "scripts.generate", "--run", "nowhere", "Hello"], "nowhere"),
]


@pytest.mark.parametrize(
    ("arguments", "named"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], named: str, tmp_path: Path) -> None:
    result = run(arguments, tmp_path)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: .+\n", result.stderr), result.stderr
    assert named in result.stderr


def test_an_unknown_flag_is_exit_code_2(tmp_path: Path) -> None:
    result = run(["-m", "scripts.report", "--nonsense"], tmp_path)
    assert result.returncode == 2
    assert "--nonsense" in result.stderr


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("core_download", "checkpoint", "report")]
    + ["dataset"],
)
def test_commands_that_were_modules_of_the_library_still_are(name: str, tmp_path: Path) -> None:
    old, new = (run(["-m", f"{top}.{name}", "--help"], tmp_path) for top in ("nanochat", "scripts"))
    assert old.returncode == new.returncode == 0, old.stderr
    assert old.stdout.partition("\n\n")[2] == new.stdout.partition("\n\n")[2] != ""
