"""Forward and backward of a micro-batch with our loss, beside the same model with an unfused one.

    python -m dev.bench.loss [--json FILE]

Depth 4, T=512, V=32768, 16 rows, bf16. Unfused: all logits, in fp32 for the softcap and the cross-entropy, as
most trainers have them. Each measurement is a process of its own, in turns.
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
from nanochat.common.machine import Precision, peak_memory_bytes
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import model_config
from nanochat.model.gpt import GPT

ROWS, T, VOCAB, DEPTH = 16, 512, 32768, 4
WAYS = ("ours", "theirs")


def unfused_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """The textbook formula on all logits at once."""
    softcap = model.config.softcap
    logits = F.linear(model(ids), model.head.weight.to(model.dtype)).float()
    logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def measure(way: str) -> dict[str, float]:
    """Seconds of the quicker of two passes after a first one, bytes of the process at its peak, the loss."""
    config = model_config(TrainArgs(depth=DEPTH, max_seq_len=T), vocab_size=VOCAB, depth=DEPTH)
    model = GPT(config, Precision(torch.bfloat16, "sdpa"))
    model.init_weights(0)
    g = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(0, VOCAB, (2, ROWS, T), generator=g).unbind()
    before, seconds = peak_memory_bytes(), []
    for _ in range(3):
        start = time.perf_counter()
        loss = model.loss(ids, targets) if way == "ours" else unfused_loss(model, ids, targets)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    peak = peak_memory_bytes()
    return {"seconds": min(seconds[1:]), "memory": peak, "added": peak - before, "loss": loss.item()}


def run(rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "dev.bench.loss", "--measure", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    metrics = (
        ("pass_time", "seconds", "s"),
        ("peak_memory", "memory", "bytes"),
        ("added_memory", "added", "bytes"),
    )
    for metric, key, unit in metrics:
        ours, theirs = (statistics.median(x[key] for x in found[way]) for way in WAYS)
        figures = {"ours": ours, "theirs": theirs, "ratio": theirs / ours}
        rows.append({"metric": metric, "peer": "unfused", **figures, "unit": unit})
    return rows


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows = run(args.rounds)
    for row in rows:
        figures = "".join(f"{row[who]:18,.2f}" for who in ("ours", "theirs", "ratio"))
        print(f"{row['metric']:16}{figures}  {row['unit']}")
    if args.json:
        files.write_json(args.json, {"machine": {"torch": torch.__version__}, "rows": rows})


if __name__ == "__main__":
    main()
