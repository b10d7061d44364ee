"""Decoding and prefill on a CPU, beside the plain forward pass and beside what the machine multiplies at.

    python -m dev.bench.infer [--run RUN] [--rounds N] [--json FILE]

Depth 4, heads of 128, V=32768, T=512, bf16, random weights, prompts of 64 tokens and 128 more, through
the engine as `scripts.generate` has it, at the threads that torch takes by itself. The plain forward is that
engine without the compiled step. Prefill is 512 tokens at once; beside its rate of operations stands that of
one product of 512 rows by as many weights. With --run, also what int8 weights cost a trained model in bits a
byte of its validation text, both decoded token by token. Contestants take turns; medians.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat import engine as engine_module
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.engine import Engine, Sampling
from nanochat.evaluation import bits_per_byte
from nanochat.model.decode_step import decode_step, use_weights
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache

PROMPT, ADDED, CONTEXT = 64, 128, 512
FLOORS = {"decode, 1 row": 800, "decode, 16 rows": 4000, "prefill, share of a product": 0.6}
BPB_ROWS, BPB_TOKENS = 16, 32_768


class Ids:
    """What stands for the tokenizer of a model of random weights."""

    bos_id = -1  # nothing ends a text


def random_model() -> GPT:
    """A model of depth 4 whose weights are all random."""
    plan = planning.plan(TrainArgs(depth=4, max_seq_len=CONTEXT), 32768, 1)
    model = GPT(plan.model, Precision(torch.bfloat16, "sdpa"))
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def decode_seconds(model: GPT, rows: int, plain: bool) -> float:
    """Seconds of 128 tokens in each row, after the prompts were read."""
    tokenizer: Any = Ids()
    prompts = [[1000 + 64 * row + i for i in range(PROMPT)] for row in range(rows)]
    kept = engine_module.decode_step
    if plain:
        engine_module.decode_step = lambda model: None  # type: ignore[assignment]
    try:
        steps = Engine(model, tokenizer).decode(
            prompts, [(row, 0) for row in range(rows)], Sampling(ADDED, temperature=0)
        )
        for _ in range(rows):  # the first token of each is the prompt's
            next(steps)
        began = time.perf_counter()
        for _ in steps:
            pass
        return time.perf_counter() - began
    finally:
        engine_module.decode_step = kept


def prefill_seconds(model: GPT) -> float:
    """Seconds of a prompt as long as the context."""
    ids = torch.arange(CONTEXT)[None] + 1000
    with torch.no_grad():
        began = time.perf_counter()
        model.logits(ids, KVCache(model, 1, CONTEXT), last_only=True)
        return time.perf_counter() - began


def product_seconds(operand: torch.Tensor, weights: torch.Tensor) -> float:
    """Seconds of one product."""
    began = time.perf_counter()
    operand @ weights
    return time.perf_counter() - began


def speeds(rounds: int) -> dict[str, float]:
    """Tokens a second, and shares, each the median of its turns."""
    model, eighth = random_model(), random_model()
    use_weights(eighth, "int8")
    weights = sum(p.numel() for p in model.blocks.parameters())
    operand = torch.randn(CONTEXT, 1024).bfloat16()
    matrix = torch.randn(1024, weights // 1024).bfloat16()
    contestants: dict[str, Callable[[], float]] = {
        f"{name}, {rows} row{'s' * (rows > 1)}": lambda m=one, r=rows, p=plain: decode_seconds(m, r, p)  # type: ignore[misc]
        for rows in (1, 16)
        for name, one, plain in (
            ("decode", model, False),
            ("decode in int8", eighth, False),
            ("plain forward", model, True),
        )
    }
    contestants["prefill"] = lambda: prefill_seconds(model)
    contestants["one product"] = lambda: product_seconds(operand, matrix)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, measure in contestants.items():
            if turn:
                seconds[name].append(measure())
            else:
                measure()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {}
    for name, median in medians.items():
        if "row" in name:
            found[name] = int(name.split()[-2]) * (ADDED - 1) / median
    found["prefill"] = CONTEXT / medians["prefill"]
    # The head reads one position of a prompt, so the blocks are what there is to multiply.
    found["prefill, share of a product"] = medians["one product"] / medians["prefill"]
    return found


def int8_cost(run: str) -> dict[str, float]:
    """Bits per byte of validation text, decoded token by token, with the weights as they are and in int8."""
    model, tokenizer, meta = checkpoint_state.load_model(
        run, None, device=torch.device("cpu"), precision=Precision(torch.bfloat16, "sdpa")
    )
    world = World(0, 1, torch.device("cpu"), None)
    corpus = Corpus.open(meta["plan"]["args"]["corpus"])
    batches = list(
        bits_per_byte.batches_of(
            corpus,
            tokenizer,
            TrainArgs(keep_tails=True),
            model.config.sequence_len,
            BPB_ROWS,
            world,
            BPB_TOKENS,
        )
    )
    bytes_of = torch.from_numpy(tokenizer.token_bytes())
    count = sum(int(bytes_of[targets[targets >= 0]].sum()) for _, targets in batches)
    found = {}
    for weights in ("auto", "int8"):
        use_weights(model, weights)
        nats = sum(decoded_nats(model, *batch) for batch in batches)
        found[f"bits per byte, {weights}"] = nats / count / math.log(2)
    return found


def decoded_nats(model: GPT, ids: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum of -log p of the targets that count, by steps of one token."""
    step, cache = decode_step(model), KVCache(model, len(ids), ids.size(1))
    assert step is not None
    total = 0.0
    for at in range(ids.size(1)):
        logits = step.logits(ids[:, at].tolist(), range(len(ids)), [at] * len(ids), cache)
        counted = targets[:, at] >= 0
        chosen = logits.log_softmax(-1).gather(1, targets[:, at, None].clamp(min=0))[:, 0]
        total -= float(chosen[counted].sum())
    return total


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="", help="a trained run, for the cost of int8 weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    figures: dict[str, Any] = {"commit": commit.strip(), "cores": os.cpu_count(), **speeds(args.rounds)}
    if args.run:
        figures |= int8_cost(args.run)
    for name, value in figures.items():
        said = value if not isinstance(value, float) else f"{value:,.4f}" if value < 10 else f"{value:,.0f}"
        bar = (
            f"   floor {FLOORS[name]:,}: {'met' if value >= FLOORS[name] else 'MISSED'}"
            if name in FLOORS
            else ""
        )
        print(f"{name:32} {said:>14}{bar}")
    if args.json:
        files.write_json(args.json, figures)


if __name__ == "__main__":
    main()
