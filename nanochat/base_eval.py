"""Score a trained model: CORE, bits per byte, samples. Written to the run's folder, and printed."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nanochat import attention, checkpoint, core_eval, files
from nanochat.config import EvalArgs, TrainArgs, from_dict
from nanochat.core_results import GPT2_CORE, CoreResult, TaskScore
from nanochat.core_tasks import Bundle
from nanochat.dataloader import ValBatches
from nanochat.dataset import Corpus
from nanochat.engine import sample_texts
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import Tokenizer
from nanochat.world import World

PARTS = ("core", "bpb", "sample")
LOG_COLUMNS = 110  # of a table in a log; a terminal knows its own
CORE_TASKS = 22  # another suite must not be compared to that bar


def run(args: EvalArgs, world: World) -> dict[str, Any]:
    """Score a checkpoint; the main rank writes base_eval.json and core_predictions.jsonl.

    Returns:
        What base_eval.json holds; parts that were not asked for are null.

    Raises:
        UserError: an unknown part, run, bundle or corpus, or a folder that cannot be written.
    """
    started = time.perf_counter()
    parts = parse_parts(args.eval)
    if not args.run:
        raise UserError("--run is missing. Name the run to score, for example --run d12.")
    bundle = core_eval.find_bundle(args.eval_bundle) if "core" in parts else None
    precision, reason = attention.choose_precision(world.device, args.dtype, args.attention)
    model, tokenizer, meta = checkpoint.load_model(
        args.run, args.step, device=world.device, precision=precision
    )
    folder = files.run_dir(args.run)
    if world.is_main:
        files.require_writable(folder)
    world.print0(f"run {args.run}, step {meta['step']}, on {world.device} x {world.size}; {reason}")
    found: dict[str, Any] = {
        "run": args.run,
        "step": meta["step"],
        "core_metric": None,
        "core_stderr": None,
        "tasks": {},
        "bpb": {},
        "samples": [],
        "examples_per_second": None,
        "dtype": str(precision.compute_dtype).removeprefix("torch."),
        "attention": precision.attention,
        "world_size": world.size,
    }
    core = _score_core(model, tokenizer, bundle, args, world) if bundle is not None else None
    if core is not None:
        found.update(core.as_dict(), max_per_task=args.core_metric_max_per_task)
    if "bpb" in parts:
        corpus = from_dict(TrainArgs, meta["plan"]["args"]).corpus
        found["bpb"] = _score_bpb(model, tokenizer, Corpus.open(corpus), args, world)
    if "sample" in parts and world.is_main:
        found["samples"] = sample_texts(model, tokenizer, max_tokens=args.max_new_tokens)
    found["seconds"] = time.perf_counter() - started
    if world.is_main:
        if core is not None:
            files.atomic_write(folder / "core_predictions.jsonl", core.predictions_jsonl())
        files.write_json(folder / "base_eval.json", found)
        show(found, core)
        print(f"written: {folder / 'base_eval.json'}")
    world.barrier()
    return found


def parse_parts(text: str) -> tuple[str, ...]:
    """What --eval asks for.

    >>> parse_parts("bpb, core")
    ('bpb', 'core')

    Raises:
        UserError: a part that does not exist, or none.
    """
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UserError(f"--eval={text}: expected some of {','.join(PARTS)}, separated by commas.")
    return parts


def _score_core(model: GPT, tokenizer: Tokenizer, bundle: Bundle, args: EvalArgs, world: World) -> CoreResult:
    def tell(score: TaskScore) -> None:
        world.print0(
            f"  {score.label:34s} {score.accuracy:.4f} of {score.examples:5d}, centered {score.centered:+.4f}"
        )

    world.print0(f"CORE on {bundle.name}")
    return core_eval.evaluate(
        model,
        tokenizer,
        bundle,
        max_per_task=args.core_metric_max_per_task,
        world=world,
        batch_tokens=args.device_batch_size * model.config.sequence_len,
        on_task=tell,
    )


def _score_bpb(
    model: GPT, tokenizer: Tokenizer, corpus: Corpus, args: EvalArgs, world: World
) -> dict[str, float]:
    token_bytes = tokenizer.token_bytes()
    found = {}
    for split in ("train", "val"):
        batches = ValBatches(
            corpus,
            tokenizer,
            sequence_len=model.config.sequence_len,
            rows=args.device_batch_size,
            world=world,
            max_tokens=args.eval_tokens,
            split=split,
        )
        found[split] = evaluate_bpb(model, batches, token_bytes, world)
        if not math.isfinite(found[split]):
            raise UserError(
                f"bits per byte of {split} is not a number: the training of run {args.run!r} diverged. "
                "Score an earlier checkpoint with --step, or train again."
            )
        world.print0(f"bits per byte, {split}: {found[split]:.4f}")
    return found


def show(found: dict[str, Any], core: CoreResult | None) -> None:
    """Print the scores as a table, CORE beside GPT-2's, and the samples."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_COLUMNS)
    if core is not None:
        console.print(_table(core))
        bar = f" (GPT-2 1558M: {GPT2_CORE})" if len(core.tasks) == CORE_TASKS else ""
        console.print(f"CORE {core.core_metric:.4f} +- {core.core_stderr:.4f}{bar}", highlight=False)
        console.print(
            f"{len(core.predictions)} examples, {core.examples_per_second:.1f} per second", highlight=False
        )
        cropped = sum(task.cropped_prompts for task in core.tasks)
        if cropped:
            console.print(
                f"{cropped} prompts were cropped to the last {core.crop_tokens} tokens", highlight=False
            )
    for sample in found["samples"]:
        console.print("-" * 40, sample, sep="\n", highlight=False, markup=False)


def _table(core: CoreResult) -> Table:
    table = Table(title=f"CORE, {core.bundle}", box=SIMPLE)
    table.add_column("task")
    for heading in ("shots", "examples", "accuracy", "+-", "guessing", "centered"):
        table.add_column(heading, justify="right")
    for task in core.tasks:
        table.add_row(
            task.label,
            str(task.shots),
            str(task.examples),
            f"{task.accuracy:.4f}",
            f"{task.stderr:.4f}",
            f"{task.baseline_percent / 100:.3f}",
            f"{task.centered:+.4f}",
        )
    return table
