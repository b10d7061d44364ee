"""Attention with a window beside full attention: time and memory of a forward and backward pass.

    python -m dev.bench.attention [--json FILE]

The window is computed by the backend `sdpa`. Full attention is PyTorch's causal kernel; "T x T mask" is the
same window as a mask on it, the usual way off Hopper. Each measurement is a process of its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import files
from nanochat.common.machine import peak_memory_bytes
from nanochat.model.attention import attention
from nanochat.model.sdpa_attention import band_mask

T, WINDOW, HEADS, HEAD_DIM = 8192, 512, 4, 128
WAYS = ("window", "full", "mask")
ROUNDS = 3


def one_pass(way: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward and backward; q, k, v (1, T, HEADS, HEAD_DIM)."""
    if way == "mask":
        mask = band_mask(T, T, WINDOW, q.device)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask)
    else:
        out = attention(q, k, v, window=WINDOW if way == "window" else T, backend="sdpa")
    out.sum().backward()


def measure(way: str) -> dict[str, float]:
    """Seconds of the quicker of two passes after a first one; bytes that a pass adds to its inputs."""
    shape = (1, T, HEADS, HEAD_DIM)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=g).bfloat16().requires_grad_() for _ in range(3))
    small = [torch.zeros(1, 64, 1, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    attention(*small, window=8, backend="sdpa").sum().backward()  # loads what both need
    before, seconds = peak_memory_bytes(), []
    for _ in range(3):
        for x in (q, k, v):
            x.grad = None
        start = time.perf_counter()
        one_pass(way, q, k, v)
        seconds.append(time.perf_counter() - start)
    return {"time": min(seconds[1:]), "memory": peak_memory_bytes() - before}


def run(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Rows `window_time` and `window_memory`, medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "dev.bench.attention", "--measure", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for way, peer in (("full", "full attention"), ("mask", "T x T mask")):
        for key, unit in (("time", "s"), ("memory", "bytes")):
            ours, theirs = (statistics.median(x[key] for x in found[who]) for who in ("window", way))
            figures = {"ours": ours, "theirs": theirs, "ratio": theirs / ours}
            rows.append({"metric": f"window_{key}", "peer": peer, **figures, "unit": unit})
    return rows


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows = run(args.rounds)
    print(f"T={T}, window {WINDOW}, {HEADS} heads of {HEAD_DIM}, bf16, forward and backward")
    for row in rows:
        figures = "".join(f"{row[who]:16,.2f}" for who in ("ours", "theirs", "ratio"))
        print(f"{row['metric']:16}{row['peer']:16}{figures}  {row['unit']}")
    if args.json:
        files.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
