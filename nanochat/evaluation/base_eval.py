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

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files, machine, run_files
from nanochat.common.errors import UserError
from nanochat.common.progress import printable
from nanochat.config.arguments import EvalArgs, TrainArgs, from_dict
from nanochat.data.corpus import Corpus
from nanochat.data.train_loader import ValBatches
from nanochat.distributed.world import World
from nanochat.engine import sample_texts
from nanochat.evaluation import hf_model
from nanochat.evaluation.bits_per_byte import BpbProfile, profile_bpb
from nanochat.evaluation.core import compare, evaluate, scoring
from nanochat.evaluation.core.bundle import Bundle
from nanochat.evaluation.core.compare import Combined, Difference
from nanochat.evaluation.core.prompt_tokens import Encoder
from nanochat.evaluation.core.results import CoreResult, TaskScore, verdict
from nanochat.evaluation.core.scoring import Scorer
from nanochat.evaluation.core.statistics import probability_above
from nanochat.evaluation.score_files import SCORES, ScoreFiles
from nanochat.model import attention_backends
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

PARTS = ("core", "bpb", "sample")
LOG_COLUMNS = 110  # of a table in a log; a terminal knows its own
SIGNIFICANT = 0.05  # p-value at which a difference is marked: CORE's own, and those of the tasks after Holm


def main(args: EvalArgs, world: World) -> None:
    """Do what is asked: score a run, compare two scored ones, or combine several.

    Raises:
        UserError: as `run`, `core_compare.compare` and `core_compare.combine`.
    """
    if args.compare:
        if len(args.compare) != 2:
            raise UserError(f"--compare {' '.join(args.compare)}: expected two runs, A and B.")
        if world.is_main:
            show_difference(args.compare, compare.compare(*args.compare))
    elif args.combine:
        if world.is_main:
            show_combined(compare.combine(args.combine))
    elif args.hf:
        run_hf(args, world)
    else:
        run(args, world)


def run(args: EvalArgs, world: World) -> dict[str, Any]:
    """Score a checkpoint; the main rank writes base_eval.json and core_predictions.jsonl, part by part.

    Returns:
        What base_eval.json holds: parts that were not asked for are as an earlier scoring of the same
        checkpoint left them, or null.

    Raises:
        UserError: an unknown part, run, bundle or corpus, or a folder that cannot be written.
    """
    started = time.perf_counter()
    parts = parse_parts(args.eval)
    if not args.run:
        raise UserError("--run is missing. Name the run to score, for example --run d12.")
    bundle = evaluate.find_bundle(args.eval_bundle) if "core" in parts else None
    precision, reason = attention_backends.choose_precision(world.device, args.dtype, args.attention)
    model, tokenizer, meta = checkpoint_state.load_model(
        args.run, args.step, device=world.device, precision=precision
    )
    state = checkpoint_format.folder_of(args.run, meta["step"]) / checkpoint_format.STATE
    trained = from_dict(TrainArgs, meta["plan"]["args"], state)
    corpus = Corpus.open(trained.corpus) if "bpb" in parts else None  # before hours are spent on CORE
    if world.is_main:
        files.require_writable(files.run_dir(args.run))
    world.print0(f"run {args.run}, step {meta['step']}, on {world.device} x {world.size}; {reason}")
    about = {
        "run": args.run,
        "step": meta["step"],
        "weights": _weights_of(args.run, meta["step"]),
        "dtype": str(precision.compute_dtype).removeprefix("torch."),
        "attention": precision.attention,
        "world_size": world.size,
    }
    sheet = ScoreFiles(files.run_dir(args.run) if world.is_main else None, about)
    scores: dict[str, Any] = {}
    if bundle is not None:
        scorer = scoring.GPTScorer(model)
        scores = _add_core(sheet, scorer, tokenizer, bundle, args, world, started)
    if corpus is not None:
        profiles = _score_bpb(model, tokenizer, corpus, args, bool(trained.keep_tails), world)
        found = _bpb_fields(profiles) | {"seconds": time.perf_counter() - started}
        scores = sheet.add("bpb", found)
    if "sample" in parts:
        texts = sample_texts(model, tokenizer, max_tokens=args.max_new_tokens) if world.is_main else []
        show_samples(texts if world.is_main else ())
        scores = sheet.add("sample", {"samples": texts, "seconds": time.perf_counter() - started})
    _end(sheet, world)
    return scores


def _weights_of(run: str, step: int) -> str | None:
    """The hash of a checkpoint's weights, by which its scores are known; None if it was pruned meanwhile."""
    folder = checkpoint_format.folder_of(run, step)
    try:
        manifest = files.read_json(folder / checkpoint_format.MANIFEST)
        return str(manifest["files"][checkpoint_format.MODEL]["sha256"])
    except (UserError, KeyError, TypeError):
        return None


def _add_core(
    sheet: ScoreFiles,
    scorer: Scorer,
    tokenizer: Encoder,
    bundle: Bundle,
    args: EvalArgs,
    world: World,
    started: float,
) -> dict[str, Any]:
    """Score CORE, show it, and only then write it: a full disk takes no score from who sees the console."""
    core = _score_core(scorer, tokenizer, bundle, args, world)
    used = matmul_use(core, scorer, getattr(torch, sheet.about["dtype"]), world)
    found = core.as_dict() | {
        "max_per_task": args.core_metric_max_per_task,
        "core_matmul": used,
        "seconds": time.perf_counter() - started,
    }
    if world.is_main:
        show_core(core, used)
    return sheet.add("core", found, core.predictions_jsonl(sheet.about.get("step")))


def _bpb_fields(profiles: dict[str, BpbProfile]) -> dict[str, Any]:
    return {
        "bpb": {split: profile.bpb for split, profile in profiles.items()},
        "loss": {split: profile.loss for split, profile in profiles.items()},
        "bpb_profile": {split: profile.as_dict() for split, profile in profiles.items()},
    }


def _end(sheet: ScoreFiles, world: World) -> None:
    """Say where the scores are, or that the disk has not taken them.

    Raises:
        UserError: it has not.
    """
    if sheet.trouble:
        raise UserError(
            f"{sheet.trouble}. The scores are printed above, and could not be written. Free some space, and "
            "run the same command again."
        )
    if sheet.folder is not None:
        print(f"written: {sheet.folder / SCORES}")
    world.barrier()


def is_scored(run: str, parts: str) -> bool:
    """Whether base_eval.json has these parts of the newest checkpoint: by its step and its weights.

    Times of files say nothing about it: a clock can be set back, and a copy can be newer than what it is of.
    """
    try:
        scores = run_files.read_scores(run)
    except UserError:  # damaged, or not there
        return False
    newest = max(checkpoint_format.steps_of(run), default=scores.get("step"))
    weights = None if newest is None else _weights_of(run, newest)
    # Older versions wrote neither the weights nor the parts, and all parts at once.
    same = scores.get("step") == newest and scores.get("weights", weights) == weights
    return same and set(parse_parts(parts)) <= set(scores.get("parts", PARTS))


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
    bundle = evaluate.find_bundle(args.eval_bundle)
    dtype, reason = machine.choose_dtype(world.device, args.dtype)
    scorer, tokenizer = hf_model.load(args.hf, world.device, dtype)
    name = args.run or "hf-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in args.hf).strip("-.")
    folder = files.run_dir(name)
    if world.is_main:
        files.require_writable(folder)
    world.print0(f"{args.hf} on {world.device} x {world.size}, computing in {dtype} ({reason})")
    about = {
        "run": name,
        "model": args.hf,
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": world.size,
    }
    sheet = ScoreFiles(folder if world.is_main else None, about)
    scores = _add_core(sheet, scorer, tokenizer, bundle, args, world, started)
    _end(sheet, world)
    return scores


def _score_core(
    scorer: Scorer, tokenizer: Encoder, bundle: Bundle, args: EvalArgs, world: World
) -> CoreResult:
    def tell(score: TaskScore) -> None:
        world.print0(
            f"  {score.label:34s} {score.accuracy:.4f} of {score.examples:5d}, "
            f"centered {score.centered():+.4f}"
        )

    world.print0(f"CORE on {bundle.name}, prompts of {args.core_variant}")
    return evaluate.evaluate(
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
    rate = machine.speed(world.device, dtype).matmul_flops
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


def show_core(core: CoreResult, used: dict[str, float]) -> None:
    """Print CORE as a table, what follows from it, and how fast it was."""
    console = _console()
    console.print(_table(core))
    rate = f"{used['measured_flops_per_s']:.2e} FLOP/s measured for a large one"
    speed = (
        f"products with weights: {used['flops']:.2e} FLOP, at the {rate} "
        f"{used['share']:.0%} of the time of forward and scoring"
    )
    for line in (*core_lines(core), speed):
        console.print(line, highlight=False, markup=False)


def show_samples(texts: Sequence[str]) -> None:
    """Print what the model writes."""
    console = _console()
    for text in texts:
        console.print("-" * 40, printable(text), sep="\n", highlight=False, markup=False, emoji=False)


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
    if length := core.describe_length():
        lines.append(length)
    if core.unkept:
        lines.append(f"warning: tokens of prompts were not kept for the next time ({core.unkept})")
    return lines


def _table(core: CoreResult) -> Table:
    table = Table(title=f"CORE, {core.bundle}", box=SIMPLE)
    table.add_column("task")
    for heading in ("shots", "examples", "accuracy", "+-", "95 %", "random baseline", "centered"):
        table.add_column(heading, justify="right")
    for task in core.tasks:
        table.add_row(
            task.label,
            str(task.task.shots),
            str(task.examples),
            f"{task.accuracy:.4f}",
            f"{task.stderr:.4f}",
            "-".join(f"{end:.3f}" for end in task.interval),
            f"{task.baseline(core.version) / 100:.3f}",
            f"{task.centered(core.version):+.4f}",
        )
    return table


def show_difference(runs: Sequence[str], found: Sequence[Difference]) -> None:
    """Print what run B has more than run A; a star marks a difference that is hardly chance."""
    table = Table(title=f"{runs[1]} against {runs[0]}, by example", box=SIMPLE)
    table.add_column("task")
    sides = ("difference", "+-", f"only {runs[0]}", f"only {runs[1]}", "p", "p (Holm)")
    for heading in ("examples", runs[0], runs[1], *sides):
        table.add_column(heading, justify="right")
    whole, *tasks = found
    for row in found:
        adjusted = row.p_value if row is whole else row.p_holm
        table.add_row(
            row.name,
            str(row.pairs),
            f"{row.first:.4f}",
            f"{row.second:.4f}",
            f"{row.second - row.first:+.4f}",
            f"{row.stderr:.4f}",
            str(row.only_first),
            str(row.only_second),
            f"{row.p_value:.3f}{' *' if row is whole and adjusted < SIGNIFICANT else ''}",
            "" if row is whole else f"{adjusted:.3f}{' *' if adjusted < SIGNIFICANT else ''}",
        )
    console = _console()
    console.print(table)
    above = probability_above(whole.second - whole.first, whole.stderr, 0.0)
    for line in (
        f"* p below {SIGNIFICANT}: of CORE by itself; of a task after Holm's correction for {len(tasks)}",
        f"CORE of {runs[1]} is {whole.second - whole.first:+.4f} +- {whole.stderr:.4f} from that of "
        f"{runs[0]}: higher with probability {above:.3f}, before the spread between seeds.",
    ):
        console.print(line, highlight=False, markup=False)


def show_combined(found: Combined) -> None:
    """Print the mean of several seeds."""
    console = _console()
    for name, value in zip(found.runs, found.values, strict=True):
        console.print(f"  {name:30s} CORE {value:.4f}", highlight=False, markup=False)
    n = len(found.runs)
    for claim in found.claims:
        judged = f": {claim.verdict}" if claim.verdict else ""
        console.print(
            f"CORE {found.mean:.4f} +- {claim.stderr:.4f}, {claim.what} of {n} runs{judged}",
            highlight=False,
            markup=False,
        )
