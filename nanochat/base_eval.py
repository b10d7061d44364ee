"""Score a trained model: CORE, bits per byte, samples. Written to the run's folder, and printed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nanochat import backends, checkpoint, core_compare, core_eval, core_scoring, files, hardware, hf_model
from nanochat.checkpoint_files import STATE, folder_of
from nanochat.config import EvalArgs, TrainArgs, from_dict
from nanochat.core_compare import Combined, Difference
from nanochat.core_results import CoreResult, TaskScore, verdict
from nanochat.core_scoring import Scorer
from nanochat.core_stats import probability_above
from nanochat.core_tasks import Bundle
from nanochat.core_tokens import Encoder
from nanochat.dataloader import ValBatches
from nanochat.dataset import Corpus
from nanochat.engine import sample_texts
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.loss_eval import BpbProfile, profile_bpb
from nanochat.progress import printable
from nanochat.tokenizer import Tokenizer
from nanochat.world import World

PARTS = ("core", "bpb", "sample")
LOG_COLUMNS = 110  # of a table in a log; a terminal knows its own
SIGNIFICANT = 0.01  # p-value at which a task's difference is marked


def main(args: EvalArgs, world: World) -> None:
    """Do what is asked: score a run, compare two scored ones, or combine several.

    Raises:
        UserError: as `run`, `core_compare.compare` and `core_compare.combine`.
    """
    if args.compare:
        if len(args.compare) != 2:
            raise UserError(f"--compare {' '.join(args.compare)}: expected two runs, A and B.")
        if world.is_main:
            show_difference(args.compare, core_compare.compare(*args.compare))
    elif args.combine:
        if world.is_main:
            show_combined(core_compare.combine(args.combine))
    elif args.hf:
        run_hf(args, world)
    else:
        run(args, world)


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
    precision, reason = backends.choose_precision(world.device, args.dtype, args.attention)
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
        "loss": {},
        "samples": [],
        "examples_per_second": None,
        "dtype": str(precision.compute_dtype).removeprefix("torch."),
        "attention": precision.attention,
        "world_size": world.size,
    }
    core = None
    if bundle is not None:
        scorer = core_scoring.GPTScorer(model)
        core = _score_core(scorer, tokenizer, bundle, args, world)
        found.update(core.as_dict(), max_per_task=args.core_metric_max_per_task)
        found["core_matmul"] = matmul_use(core, scorer, precision.compute_dtype, world)
    if "bpb" in parts:
        trained = from_dict(TrainArgs, meta["plan"]["args"], folder_of(args.run, meta["step"]) / STATE)
        corpus = Corpus.open(trained.corpus)
        profiles = _score_bpb(model, tokenizer, corpus, args, bool(trained.keep_tails), world)
        found["bpb"] = {split: profile.bpb for split, profile in profiles.items()}
        found["loss"] = {split: profile.loss for split, profile in profiles.items()}
        found["bpb_profile"] = {split: profile.as_dict() for split, profile in profiles.items()}
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


def run_hf(args: EvalArgs, world: World) -> dict[str, Any]:
    """Score a model of Hugging Face with CORE, into a run folder of its own: runs can be compared to it.

    Raises:
        UserError: as `run`; the model cannot be loaded.
    """
    started = time.perf_counter()
    bundle = core_eval.find_bundle(args.eval_bundle)
    dtype, reason = hardware.choose_dtype(world.device, args.dtype)
    scorer, tokenizer = hf_model.load(args.hf, world.device, dtype)
    name = args.run or "hf-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in args.hf).strip("-.")
    folder = files.run_dir(name)
    if world.is_main:
        files.require_writable(folder)
    world.print0(f"{args.hf} on {world.device} x {world.size}, computing in {dtype} ({reason})")
    core = _score_core(scorer, tokenizer, bundle, args, world)
    found: dict[str, Any] = {
        "run": name,
        "model": args.hf,
        "samples": [],
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": world.size,
        **core.as_dict(),
        "core_matmul": matmul_use(core, scorer, dtype, world),
        "max_per_task": args.core_metric_max_per_task,
        "seconds": time.perf_counter() - started,
    }
    if world.is_main:
        files.atomic_write(folder / "core_predictions.jsonl", core.predictions_jsonl())
        files.write_json(folder / "base_eval.json", found)
        show(found, core)
        print(f"written: {folder / 'base_eval.json'}")
    world.barrier()
    return found


def _score_core(
    scorer: Scorer, tokenizer: Encoder, bundle: Bundle, args: EvalArgs, world: World
) -> CoreResult:
    def tell(score: TaskScore) -> None:
        world.print0(
            f"  {score.label:34s} {score.accuracy:.4f} of {score.examples:5d}, "
            f"centered {score.centered():+.4f}"
        )

    world.print0(f"CORE on {bundle.name}, prompts of {args.core_variant}")
    return core_eval.evaluate(
        scorer,
        tokenizer,
        bundle,
        max_per_task=args.core_metric_max_per_task,
        world=world,
        variant=args.core_variant,
        batch_tokens=args.eval_batch_tokens,
        crop_tokens=args.core_crop_tokens,
        keep_going=args.keep_going,
        on_task=tell,
    )


def matmul_use(core: CoreResult, scorer: Scorer, dtype: torch.dtype, world: World) -> dict[str, float]:
    """What the products with weights took of the time of forward passes and head, had they run as measured.

    Returns:
        "flops" of all ranks, "measured_flops_per_s" of a large product here and now on the first rank, and
        "share": the first over the second and the rank's seconds, the ranks taken to share alike.
    """
    flops = scorer.flops(core.computed_tokens, core.finished_tokens, core.scored_tokens)
    rate = hardware.speed(world.device, dtype).matmul_flops
    seconds = core.seconds_of["forward"] + core.seconds_of["scoring"]
    return {"flops": flops, "measured_flops_per_s": rate, "share": flops / world.size / (rate * seconds)}


def _score_bpb(
    model: GPT, tokenizer: Tokenizer, corpus: Corpus, args: EvalArgs, keep_tails: bool, world: World
) -> dict[str, BpbProfile]:
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
            keep_tails=keep_tails,
        )
        found[split] = profile_bpb(model, batches, token_bytes, world, tokenizer.bos_id)
        if not math.isfinite(found[split].bpb):
            raise UserError(
                f"bits per byte of {split} is not a number: the training of run {args.run!r} diverged. "
                "Score an earlier checkpoint with --step, or train again."
            )
        world.print0(
            f"bits per byte, {split}: {found[split].bpb:.4f}; nats per token: {found[split].loss:.4f}"
        )
    return found


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=LOG_COLUMNS)


def show(found: dict[str, Any], core: CoreResult | None) -> None:
    """Print the scores as a table, CORE beside GPT-2's, and the samples."""
    console = _console()
    if core is not None:
        console.print(_table(core))
        used = found["core_matmul"]
        lines = core_lines(core)
        rate = f"{used['measured_flops_per_s']:.2e} FLOP/s measured for a large one"
        lines.append(
            f"products with weights: {used['flops']:.2e} FLOP, at the {rate} "
            f"{used['share']:.0%} of the time of forward and scoring"
        )
        for line in lines:
            console.print(line, highlight=False, markup=False)
    for sample in found["samples"]:
        console.print("-" * 40, printable(sample), sep="\n", highlight=False, markup=False, emoji=False)


def core_lines(core: CoreResult) -> list[str]:
    """What is said below the table."""
    lines = [f"left out: {message}" for message in core.faults.values()]
    metric, stderr, boot = core.core_metric, core.core_stderr, core.bootstrapped()
    if metric is None or stderr is None or boot is None:
        lines.append("CORE is not reported: a task is missing")
    else:
        lines.append(
            f"CORE {metric:.4f} +- {stderr:.4f}, 95 % of resampled examples from {boot['low']:.4f} to "
            f"{boot['high']:.4f}; baselines v1 {core.core(1):.4f}, v2 {core.core(2):.4f}"
        )
    if judged := verdict((task.label for task in core.tasks), core.variant, metric, stderr):
        lines.append(f"This is {judged}.")
    lines.append(f"{len(core.predictions)} examples, {core.examples_per_second:.1f} per second")
    shares = ", ".join(f"{part} {seconds:.1f}" for part, seconds in core.seconds_of.items())
    lines.append(f"{core.computed_tokens:,} tokens computed in {core.seconds:.1f} s: {shares}")
    if cropped := sum(task.cropped_prompts for task in core.tasks):
        lines.append(f"{cropped} prompts were cropped to the last {core.crop_tokens} tokens")
    return lines


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
            f"{task.baseline(core.version) / 100:.3f}",
            f"{task.centered(core.version):+.4f}",
        )
    return table


def show_difference(runs: Sequence[str], found: Sequence[Difference]) -> None:
    """Print what run B has more than run A; a star marks a task's difference that is hardly chance."""
    table = Table(title=f"{runs[1]} against {runs[0]}, by example", box=SIMPLE)
    table.add_column("task")
    for heading in (
        "examples",
        runs[0],
        runs[1],
        "difference",
        "+-",
        f"only {runs[0]}",
        f"only {runs[1]}",
        "p",
    ):
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(
            row.name,
            str(row.pairs),
            f"{row.first:.4f}",
            f"{row.second:.4f}",
            f"{row.second - row.first:+.4f}",
            f"{row.stderr:.4f}",
            str(row.only_first),
            str(row.only_second),
            f"{row.p_value:.3f}{' *' if row.p_value < SIGNIFICANT else ''}",
        )
    console = _console()
    console.print(table)
    whole = found[0]
    above = probability_above(whole.second - whole.first, whole.stderr, 0.0)
    console.print(
        f"CORE of {runs[1]} is {whole.second - whole.first:+.4f} +- {whole.stderr:.4f} from that of "
        f"{runs[0]}: higher with probability {above:.3f}, before the spread between seeds.",
        highlight=False,
        markup=False,
    )


def show_combined(found: Combined) -> None:
    """Print the mean of several seeds."""
    console = _console()
    for name, value in zip(found.runs, found.values, strict=True):
        console.print(f"  {name:30s} CORE {value:.4f}", highlight=False, markup=False)
    judged = f": {found.verdict}" if found.verdict else ""
    console.print(
        f"CORE {found.mean:.4f} +- {found.stderr:.4f}, mean and standard error of {len(found.runs)} runs"
        f"{judged}",
        highlight=False,
        markup=False,
    )
