"""The file of bytes and kernels of a training step: figures that may fall, and may not grow unnoticed.

    python -m tests.gpuless.ratchet                        # small models, beside what the file has
    python -m tests.gpuless.ratchet --write                # and writes it
    python -m tests.gpuless.ratchet --write d24 d24-fp8    # only these, in several minutes each

The file is dev/bench/bytes.json: {"torch": version, "steps": {name: step}}. A step is an answer of
`bytes_probes.step` (its docstring says what the kinds of kernels are):

    "shape": {"depth", "width", "vocabulary", "rows", "tokens" of a micro-batch on one rank,
              "micro_batches" of a step, "ranks", "attention": the backend}
    "batches": {"forward" | "loss" | "backward": {kind: {"kernels": launches, "gb": gigabytes}}}
    "copies": {kind: {"kernels", "gb"}}
    "update": {kind: {"kernels", "gb"}}, not of every step

A step moves the sum of them. Gigabytes of elementwise passes grow with tokens x
width x depth, those of the loss with tokens x vocabulary, those of the update with the parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPO
from tests.gpuless import pretended

FILE = REPO / "dev" / "bench" / "bytes.json"
STEPS: dict[str, dict[str, Any]] = {
    "d2-fp8": {"depth": 2, "fp8": True, "updates": False},
    "d4": {"depth": 4},
    "d4-fp8": {"depth": 4, "fp8": True},
    "d24": {"depth": 24},
    "d24-fp8": {"depth": 24, "fp8": True},
}
GROWTH = 1.01
NOTHING_GB = 0.001  # a figure below this may grow by as much
TIMEOUT = 1800.0  # seconds


def count(gpu: dict[str, str], *names: str) -> list[dict[str, Any]]:
    """Steps as they are now, on the pretended device."""
    asked = [STEPS[name] for name in names]
    return pretended.probe(gpu, "bytes_probes.steps", TIMEOUT, asked=asked)  # type: ignore[no-any-return]


def complaints(gpu: dict[str, str], *names: str) -> list[str]:
    """What has grown in these steps since the file was written, in words."""
    held = written()["steps"]
    found = zip(names, count(gpu, *names), strict=True)
    return [f"{name} {line}" for name, now in found for line in grown(held[name], now)]


def written() -> dict[str, Any]:
    """What the file holds."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def version() -> str:
    """Major and minor version of torch, whose compiler decides on what is fused."""
    return ".".join(torch.__version__.split(".")[:2])


def flat(step: dict[str, Any], prefix: str = "") -> dict[str, dict[str, float]]:
    """{"next forward fused": {"kernels", "gb"}, ...} of a step."""
    found = {}
    for key, value in step.items():
        if "gb" in value:
            found[prefix + key] = value
        elif key != "shape":
            found |= flat(value, f"{prefix}{key} ")
    return found


def grown(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The figures that are more than a hundredth above those of before, in words."""
    old, found = flat(before), []
    for name, row in flat(now).items():
        was = old.get(name, {"kernels": 0, "gb": 0.0})
        if row["kernels"] > was["kernels"] * GROWTH:
            found.append(f"{name}: {row['kernels']} kernels instead of {was['kernels']}")
        if row["gb"] > was["gb"] * GROWTH + NOTHING_GB:
            found.append(f"{name}: {row['gb']:.3f} GB instead of {was['gb']:.3f}")
    return found


def table(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines of a step's figures, with what they were."""
    old, lines = flat(before), [name]
    for key, row in flat(now).items():
        was = old.get(key, {"kernels": 0, "gb": 0.0})
        lines.append(
            f"  {key:28} {row['kernels']:6,} kernels ({was['kernels']:6,})  "
            f"{row['gb']:9.3f} GB ({was['gb']:9.3f})"
        )
    return lines


def main(arguments: list[str]) -> None:
    """Count steps, print them, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "names", nargs="*", default=["d2-fp8", "d4", "d4-fp8"], choices=list(STEPS), metavar="STEP"
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(arguments)
    if lacking := pretended.missing():
        sys.exit(f"cannot pretend a GPU: {lacking}")
    with tempfile.TemporaryDirectory() as folder:
        gpu = pretended.build(Path(folder))
        for name in args.names:
            (now,) = count(gpu, name)
            held = written().get("steps", {})
            print(*table(name, held.get(name, {}), now), sep="\n", flush=True)
            if args.write:  # each as it is counted
                file = {"torch": version(), "steps": {**held, name: now}}
                FILE.write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
