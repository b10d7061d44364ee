"""Import time of every door of the library, in a process of its own: the median of some runs.

    python -m dev.bench.imports [--runs 3]

A door is a module that other folders import: the `__init__` of its folder names it. One that needs torch
takes as long as torch. The first import is not counted: it reads files that later ones find in memory.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMED = """
import importlib, sys, time
began = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - began, int("torch" in sys.modules))
"""


def listed(folder: Path, what: str) -> list[str]:
    """The names that the docstring of a folder of the library lists behind a word, such as "Doors"."""
    tree = ast.parse((folder / "__init__.py").read_text("utf-8"))
    text = " ".join((ast.get_docstring(tree) or "").split())
    names = re.search(rf"{what}: ([\w, ]+)\.", text)
    return names[1].split(", ") if names else []


def doors() -> list[str]:
    """The modules that the `__init__` of each folder names as doors."""
    folders = sorted(path.parent for path in (ROOT / "nanochat").rglob("__init__.py"))
    return [
        ".".join((*folder.relative_to(ROOT).parts, name))
        for folder in folders
        for name in listed(folder, "Doors")
    ]


def seconds(module: str) -> tuple[float, bool]:
    """Time of one import in a new process, and whether torch came with it."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED, module], cwd=ROOT, capture_output=True, text=True, check=True
    )
    time, torch = done.stdout.split()
    return float(time), torch == "1"


def main() -> None:
    """Print a line a door, as it is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="imports of each door")
    runs = parser.parse_args().runs
    for door in doors():
        times = [seconds(door) for _ in range(runs + 1)][1:]
        torch = "torch" if times[0][1] else ""
        print(f"{statistics.median(time for time, _ in times):6.2f} s  {torch:5}  {door}", flush=True)


if __name__ == "__main__":
    main()
