"""CORE, examples per second: ours beside one example at a time (dev/bench/naive_core.py), with equal answers.

    python -m dev.bench.core [--eval-bundle PATH] [--run RUN] [--examples 20] [--json FILE]

Both score the same examples of every task with the same model, a run's or a random one of depth 4, from
reading the bundle to the last answer. They take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dev.bench import naive_core
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.distributed.world import World
from nanochat.evaluation import base_eval
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import evaluate, scoring
from nanochat.evaluation.core.bundle import Bundle
from nanochat.evaluation.core.results import CoreResult
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

VOCAB = 32768
PRECISION = Precision(torch.float32, "sdpa")
TRAIN_CHARS = 4_000_000  # of the bundle's own texts, for the vocabulary of a random model


def random_model(bundle: Bundle, depth: int) -> tuple[GPT, Tokenizer]:
    """A model of random weights, with a vocabulary trained on the bundle."""
    texts = [bundle.text(task.member)[: TRAIN_CHARS // 22] for task in core_bundle.load_tasks(bundle)]
    tokenizer = Tokenizer.train(texts, VOCAB)
    plan = planning.plan(TrainArgs(depth=depth, num_iterations=1, device_type="cpu"), tokenizer.vocab_size, 1)
    model = GPT(plan.model, PRECISION)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the recipe's zeros would make all answers alike
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model, tokenizer


def ours(model: GPT, tokenizer: Tokenizer, bundle: Bundle, examples: int, batch_tokens: int) -> CoreResult:
    """Our scores."""
    return evaluate.evaluate(
        scoring.GPTScorer(model),
        tokenizer,
        bundle,
        max_per_task=examples,
        world=World.single_process(),
        batch_tokens=batch_tokens,
    )


def theirs(
    model: GPT, tokenizer: Tokenizer, bundle: Bundle, examples: int
) -> tuple[float, list[naive_core.Answer]]:
    """The naive answers, and the seconds they took; prompts are whole, as they are by default."""
    started = time.perf_counter()
    found: list[naive_core.Answer] = []
    scorer = scoring.GPTScorer(model)
    longest = scorer.longest_tokens
    with scorer.room(longest):
        for task in core_bundle.load_tasks(bundle):
            all_of_it = core_bundle.load_examples(bundle, task)
            found += naive_core.answers(model, tokenizer, task, all_of_it, examples, longest)
    return time.perf_counter() - started, found


def compare(result: CoreResult, naive: list[naive_core.Answer]) -> tuple[int, float]:
    """Answers that differ, and the largest difference of a loss."""
    differ, largest = 0, 0.0
    for mine, other in zip(result.predictions, naive, strict=True):
        assert mine.line == other.line
        differ += mine.answer != other.answer
        pairs = zip(mine.losses, other.losses, strict=True)
        largest = max([largest, *(abs(a - b) for a, b in pairs if a == a or b == b)])
    return differ, largest


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--eval-bundle", default="mini", help="a folder, a zip, or mini")
    parser.add_argument("--run", default="", help="score this run's model; by default a random one")
    parser.add_argument("--depth", type=int, default=4, help="of the random model")
    parser.add_argument("--examples", type=int, default=20, help="of each task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--eval-batch-tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


def _tell(who: str, examples: int, seconds: float, cpu_before: float) -> float:
    """A line on one measurement; where other work shares the machine, CPU time says more. Returns it."""
    now = time.process_time()
    print(f"{who}: {examples} examples in {seconds:.1f} s, CPU {now - cpu_before:.1f} s", flush=True)
    return now


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    args = _arguments()
    bundle = evaluate.find_bundle(args.eval_bundle)
    if args.run:
        model, tokenizer, _ = checkpoint_state.load_model(
            args.run, None, device=torch.device("cpu"), precision=PRECISION
        )
    else:
        model, tokenizer = random_model(bundle, args.depth)
    mine, others = [], []
    for _ in range(args.rounds):
        cpu = time.process_time()
        result = ours(model, tokenizer, bundle, args.examples, args.eval_batch_tokens)
        mine.append(result.examples_per_second)
        cpu = _tell("ours", len(result.predictions), result.seconds, cpu)
        seconds, naive = theirs(model, tokenizer, bundle, args.examples)
        others.append(len(naive) / seconds)
        _tell("naive", len(naive), seconds, cpu)
    differ, largest = compare(result, naive)
    row: dict[str, Any] = {"metric": "examples_per_second", "peer": "naive", "unit": "examples/s"}
    row |= {"ours": statistics.median(mine), "theirs": statistics.median(others)}
    row["ratio"] = row["ours"] / row["theirs"]
    rows = [row]
    print(f"{len(naive)} examples of {len(result.tasks)} tasks, context {model.config.sequence_len}")
    print(f"ours {row['ours']:.2f}, naive {row['theirs']:.2f} examples/s: {row['ratio']:.1f} times")
    print(f"answers that differ: {differ}; largest difference of a loss: {largest:.1e}")
    print("seconds of ours:", json.dumps({name: round(s, 2) for name, s in result.seconds_of.items()}))
    used = base_eval.matmul_use(
        result, scoring.GPTScorer(model), PRECISION.compute_dtype, World.single_process()
    )
    print(f"{result.computed_tokens:,} tokens computed, {result.scored_tokens:,} scored; weights times them")
    rate = f"{used['measured_flops_per_s']:.2e} FLOP/s"
    print(f"at {rate}, as measured, are {used['share']:.0%} of the time of forward and scoring")
    rows.append(
        {"metric": "matmul_share", "peer": None, "ours": used["share"], "unit": "share of the measured rate"}
    )
    if args.json:
        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        files.write_json(args.json, {"machine": {**machine, "torch": torch.__version__}, "rows": rows})
    sys.exit(1 if largest > 1e-4 else 0)


if __name__ == "__main__":
    main()
