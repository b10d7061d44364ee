"""A training step beside an unfused one and beside what this machine multiplies matrices at; the first step.

    python -m dev.bench.train [--json FILE] [--rounds N]

Depth 4, heads of 128, T=512, V=32768, micro-batches of 16 rows, 16,384 tokens a step, bf16, random tokens;
the step is that of base_train. Unfused: the same model and optimizer, with all logits of a micro-batch, in
fp32 for the softcap and the cross-entropy. Memory is what steps add to weights and moments. The first step is
that of the command base_train on the stdlib corpus, from the start of the process, with one batch of
validation before it; cold is without a cache of compiled code. Each measurement is a process of its own, in
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dev.bench import attention
from nanochat.checkpoint.state import TrainState
from nanochat.common import files, machine
from nanochat.common.machine import Precision, peak_memory_bytes
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan
from nanochat.data import corpus as corpus_module
from nanochat.data import tokenizer_texts
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.optim.loss_scale import LossScale
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run

VOCAB = 32768
ARGS = TrainArgs(
    depth=4,
    max_seq_len=512,
    total_batch_size=16_384,
    device_batch_size=16,
    num_iterations=200,
    corpus="stdlib",
)
STEPS = 3  # that count; one before them does not
FLAGS = ("depth", "max_seq_len", "total_batch_size", "device_batch_size", "corpus")
TRAIN_CHARS = 20_000_000  # for the vocabulary


class RandomBatches:
    """In the place of the loader: the same random tokens each step."""

    metrics: ClassVar[dict[str, float]] = {}

    def __init__(self, plan: Plan) -> None:
        """Draw them."""
        self.device_batch_size = plan.device_batch_size
        shape = (plan.batch_rows, plan.model.sequence_len + 1)
        self._tokens = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))

    def next_batch(self) -> list[Batch]:
        """Micro-batches."""
        parts = torch.split(self._tokens, self.device_batch_size)
        return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def unfused_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """The loss by its formula."""
    cap = model.config.softcap
    logits = F.linear(model(ids), model.head.weight.to(model.dtype)).float()
    logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def measure(way: str) -> dict[str, float]:
    """Tokens a second, bytes, and FLOP/s of a matrix product, which is measured before and after."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    plan = planning.plan(ARGS, VOCAB)
    model = GPT(plan.model, Precision(dtype, "sdpa"))
    model.init_weights(0)
    world = World.single_process()
    kinds, options = model.parameter_kinds(), MatrixOptions(plan.polar_norm_factor)
    optimizer = MuonAdamW(dict(model.named_parameters()), kinds, plan.groups, world, dtype, options)
    loader: Any = RandomBatches(plan)
    state = TrainState(0, model, optimizer, loader, LossScale(dtype, device))
    if way == "unfused":
        model.loss = lambda ids, targets: unfused_loss(model, ids, targets)  # type: ignore[method-assign]
    rates = [machine.measured_flops_per_s(device, dtype)]
    before, seconds = peak_memory_bytes(), []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        train_run.train_step(plan, state, world).loss.item()
        seconds.append(time.perf_counter() - start)
        state.step += 1
    rates.append(machine.measured_flops_per_s(device, dtype))
    return {
        "tokens_per_second": plan.batch_tokens / statistics.median(seconds[1:]),
        "peak_memory": peak_memory_bytes() - before,
        "matmul_tokens_per_second": max(rates) / plan.flops_per_token,
    }


def prepare() -> None:
    """The corpus and the tokenizer that base_train needs."""
    corpus = corpus_module.prepare("stdlib")
    texts = tokenizer_texts.columns(corpus, max_chars=TRAIN_CHARS, doc_cap=10_000)
    Tokenizer.train(texts, VOCAB).save(files.tokenizer_dir("stdlib"))


def first_step(base: Path, number: int) -> float:
    """Seconds from the start of base_train to its first step."""
    flags = [f"--{name.replace('_', '-')}={getattr(ARGS, name)}" for name in FLAGS]
    flags += [f"--run=bench{number}", "--num-iterations=1", "--eval-tokens=8192", "--sample-every=0"]
    command = [sys.executable, "-m", "scripts.base_train", *flags]
    subprocess.run(
        command, env={**os.environ, "NANOCHAT_BASE_DIR": str(base)}, check=True, capture_output=True
    )
    summary = files.read_json(base / "runs" / f"bench{number}" / "summary.json")
    return float(summary["seconds_to_first_step"])


def run_process(*flags: str, base: Path) -> str:
    """The last line that this module prints with these flags, in a process of its own."""
    command = [sys.executable, "-m", "dev.bench.train", *flags]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[-1]


def run(rounds: int, base: Path) -> list[dict[str, Any]]:
    """All rows, medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "unfused": []}
    first: dict[str, list[float]] = {"cold": [], "warm": []}
    run_process("--prepare", base=base)
    for number in range(rounds):
        for way, measured in found.items():
            measured.append(json.loads(run_process("--measure", way, base=base)))
        shutil.rmtree(base / "compiled", ignore_errors=True)
        for way, seconds in first.items():
            seconds.append(first_step(base, 2 * number + (way == "warm")))

    def median(way: str, key: str) -> float:
        return statistics.median(each[key] for each in found[way])

    def row(metric: str, peer: str | None, ours: float, theirs: float | None, unit: str) -> dict[str, Any]:
        ratio = None if theirs is None else theirs / ours if unit == "bytes" else ours / theirs
        figures = {"ours": ours, "theirs": theirs, "ratio": ratio}
        return {"metric": metric, "peer": peer, **figures, "unit": unit}

    speed, memory = "tokens_per_second", "peak_memory"
    bound = statistics.median(each["matmul_tokens_per_second"] for way in found.values() for each in way)
    return [
        row(speed, "unfused", median("ours", speed), median("unfused", speed), "tokens/s"),
        row(memory, "unfused", median("ours", memory), median("unfused", memory), "bytes"),
        row("roofline_share", "measured matmul", median("ours", speed), bound, "tokens/s"),
        row("first_step_cold", None, statistics.median(first["cold"]), None, "s"),
        row("first_step_warm", None, statistics.median(first["warm"]), None, "s"),
        *(row for row in attention.run() if row["peer"] == "full attention"),
    ]


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("ours", "unfused"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    if args.prepare:
        prepare()
        return
    with tempfile.TemporaryDirectory() as base:
        rows = run(args.rounds, Path(base))
    print(f"{'metric':20}{'peer':18}{'ours':>18}{'theirs':>18}{'ratio':>8}  unit")
    for row in rows:
        values = [" " * 18 if row[who] is None else f"{row[who]:18,.2f}" for who in ("ours", "theirs")]
        ratio = " " * 8 if row["ratio"] is None else f"{row['ratio']:8.2f}"
        print(f"{row['metric']:20}{row['peer'] or '':18}{''.join(values)}{ratio}  {row['unit']}")
    if args.json:
        description = machine.describe(torch.device("cpu"))
        files.write_json(args.json, {"machine": description, "rows": rows})


if __name__ == "__main__":
    main()
