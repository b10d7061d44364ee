"""Scores of a trained model: CORE, bits per byte, samples; printed, and written to the run's folder.

Each part is shown before it is written, and written before the next begins: none is lost with another.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
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
from nanochat.config.arguments import EvalArgs, TrainArgs
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.engine import sample_texts
from nanochat.evaluation import bits_per_byte, hf_model
from nanochat.evaluation.core import compare, evaluate
from nanochat.evaluation.core.bundle import Bundle
from nanochat.evaluation.core.prompt_tokens import Encoder
from nanochat.evaluation.core.results import CoreResult, TaskScore, verdict
from nanochat.evaluation.core.scoring import GPTScorer, Scorer
from nanochat.evaluation.core.statistics import probability_above
from nanochat.evaluation.score_files import OF_BPB, SCORES, ScoreFiles
from nanochat.model import attention_backends
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

PARTS = ("core", "bpb", "sample")
LOG_COLUMNS = 110  # of a table in a log; a terminal knows its own
SIGNIFICANT = 0.05  # p-value at which a difference is marked: CORE's own, and those of the tasks after Holm


def main(args: EvalArgs, world: World) -> None:
    """Score a model, compare two scored runs, or combine several.

    Raises:
        UserError: as `run`, `compare.compare` and `compare.combine`.
    """
    if args.compare:
        if len(args.compare) != 2:
            raise UserError(f"--compare {' '.join(args.compare)}: expected two runs, A and B.")
        if world.is_main:
            core, *tasks = compare.compare(*args.compare)
            show_difference(args.compare, [core], tasks)
    elif args.combine:
        if world.is_main:
            show_combined(*compare.combine(args.combine))
    elif args.hf:
        _run_hf(args, world)
    else:
        run(args, world)


def run(args: EvalArgs, world: World) -> dict[str, Any]:
    """Score a checkpoint; the main rank writes base_eval.json and core_predictions.jsonl, part by part.

    Returns:
        What base_eval.json holds: parts that --eval does not name are as an earlier scoring of the same
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
    step = meta["step"]
    trained = checkpoint_state.arguments_of(meta, checkpoint_format.folder_of(args.run, step))
    corpus = Corpus.open(trained.corpus) if "bpb" in parts else None  # before hours are spent on CORE
    about = {"run": args.run, "step": step, "weights": weights_of(args.run, step)}
    about["attention"] = precision.attention
    sheet = _open_sheet(about, precision.compute_dtype, world, started)
    world.print0(f"run {args.run}, step {step}, on {world.device} x {world.size}; {reason}")
    scores: dict[str, Any] = {}
    if bundle is not None:
        scores = _add_core(sheet, GPTScorer(model), tokenizer, bundle, args, world)
    if corpus is not None:
        scores = sheet.add("bpb", _score_bpb(model, tokenizer, corpus, args, trained, world))
    if "sample" in parts:
        texts = sample_texts(model, tokenizer, world, max_tokens=args.max_new_tokens)
        for text in texts if world.is_main else ():
            show("-" * 40, printable(text))
        scores = sheet.add("sample", {"samples": texts})
    _end(sheet, world)
    return scores


def _run_hf(args: EvalArgs, world: World) -> None:
    """Score a model of Hugging Face with CORE, into a run folder of its own: runs can be compared to it."""
    started = time.perf_counter()
    bundle = evaluate.find_bundle(args.eval_bundle)
    dtype, reason = machine.choose_dtype(world.device, args.dtype)
    scorer, tokenizer = hf_model.load(args.hf, world.device, dtype)
    name = args.run or "hf-" + re.sub(r"[^\w.-]", "-", args.hf).strip("-.")
    sheet = _open_sheet({"run": name, "model": args.hf}, dtype, world, started)
    world.print0(f"{args.hf} on {world.device} x {world.size}, computing in {dtype} ({reason})")
    _add_core(sheet, scorer, tokenizer, bundle, args, world)
    _end(sheet, world)


def _open_sheet(about: dict[str, Any], dtype: torch.dtype, world: World, started: float) -> ScoreFiles:
    """The files that the scores of a model go to; refuses a folder that cannot be written."""
    folder = files.run_dir(about["run"])
    if world.is_main:
        files.require_writable(folder)
    how = {"dtype": str(dtype).removeprefix("torch."), "world_size": world.size}
    return ScoreFiles(folder if world.is_main else None, about | how, started)


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


def weights_of(run: str, step: int) -> str | None:
    """The hash of a checkpoint's weights, by which its scores are known; None if it was pruned meanwhile."""
    folder = checkpoint_format.folder_of(run, step)
    try:
        manifest = files.read_json(folder / checkpoint_format.MANIFEST)
        return str(manifest["files"][checkpoint_format.MODEL]["sha256"])
    except (UserError, KeyError, TypeError):
        return None


def is_scored(run: str, parts: str) -> bool:
    """Whether base_eval.json has these parts of the newest checkpoint: by its step and its weights.

    Times of files say nothing about it: a clock can be set back, and a copy can be newer than what it is of.
    """
    try:
        scores = run_files.read_scores(run)
    except UserError:  # damaged, or not there
        return False
    newest = max(checkpoint_format.steps_of(run), default=scores.get("step"))
    weights = None if newest is None else weights_of(run, newest)
    # Older versions wrote neither the weights nor the parts, and all parts at once.
    same = scores.get("step") == newest and scores.get("weights", weights) == weights
    return same and set(parse_parts(parts)) <= set(scores.get("parts", PARTS))


def parse_parts(text: str) -> tuple[str, ...]:
    """The parts that --eval names.

    >>> parse_parts("bpb, core")
    ('bpb', 'core')

    Raises:
        UserError: a part that does not exist, or none.
    """
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts or not set(parts) <= set(PARTS):
        raise UserError(f"--eval={text}: expected some of {','.join(PARTS)}, separated by commas.")
    return parts


def _add_core(
    sheet: ScoreFiles,
    scorer: Scorer,
    tokenizer: Encoder,
    bundle: Bundle,
    args: EvalArgs,
    world: World,
) -> dict[str, Any]:
    """Score CORE, show it, and only then write it: a full disk takes no score from who sees the console."""

    def show_task(score: TaskScore) -> None:
        world.print0(
            f"  {score.label:34s} {score.accuracy:.4f} of {score.examples:5d}, "
            f"centered {score.centered():+.4f}"
        )

    world.print0(f"CORE on {bundle.name}, prompts of {args.core_variant}")
    core = evaluate.evaluate(
        scorer,
        tokenizer,
        bundle,
        max_per_task=args.core_metric_max_per_task,
        world=world,
        variant=args.core_variant,
        batch_tokens=args.eval_batch_tokens,
        crop_tokens=args.core_crop_tokens,
        keep_going=args.keep_going,
        on_task=show_task,
    )
    fields = core.as_dict() | {"max_per_task": args.core_metric_max_per_task}
    fields["core_matmul"] = matmul_use(core, scorer, getattr(torch, sheet.about["dtype"]), world)
    if world.is_main:
        show_core(core, fields)
    return sheet.add("core", fields, core.predictions_jsonl(sheet.about.get("step")))


def matmul_use(core: CoreResult, scorer: Scorer, dtype: torch.dtype, world: World) -> dict[str, float]:
    """Fraction of forward and head time that the matmul FLOPs explain at the measured matmul rate.

    Returns:
        "flops" of all ranks; "measured_flops_per_s" of a large product here and now on the first rank; and as
        "share" the roofline utilisation: the first over the second and the rank's seconds, where each rank is
        taken to do as much.
    """
    flops = scorer.flops(core.computed_tokens, core.scored_tokens)
    rate = machine.speed(world.device, dtype).matmul_flops
    seconds = core.seconds_of["forward"] + core.seconds_of["scoring"]
    return {"flops": flops, "measured_flops_per_s": rate, "share": flops / world.size / (rate * seconds)}


def _score_bpb(
    model: GPT, tokenizer: Tokenizer, corpus: Corpus, args: EvalArgs, trained: TrainArgs, world: World
) -> dict[str, dict[str, Any]]:
    token_bytes = tokenizer.token_bytes()
    fields: dict[str, dict[str, Any]] = {name: {} for name in OF_BPB}
    for split in ("train", "val"):
        length, rows = model.config.sequence_len, args.device_batch_size
        batches = bits_per_byte.batches_of(
            corpus, tokenizer, trained, length, rows, world, args.eval_tokens, split
        )
        profile = bits_per_byte.profile_bpb(model, batches, token_bytes, world, tokenizer.bos_id)
        if not math.isfinite(profile.bpb):
            raise UserError(
                f"bits per byte of {split} is not a number: the training of run {args.run!r} diverged. "
                "Score an earlier checkpoint with --step, or train again."
            )
        world.print0(f"bits per byte, {split}: {profile.bpb:.4f}; nats per token: {profile.loss:.4f}")
        for name, values in zip(OF_BPB, (profile.bpb, profile.loss, asdict(profile)), strict=True):
            fields[name][split] = values
    return fields


def show(*parts: Table | str) -> None:
    """Print tables and lines as they are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_COLUMNS)
    for part in parts:
        console.print(part, highlight=False, markup=False, emoji=False)


def table(
    title: str, headings: Sequence[str], cells: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> Table:
    """A table of formatted fields; cells gives the format of each column."""
    made = Table(title=title, box=SIMPLE)
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left")
    for row in rows:
        made.add_row(*(cell.format_map(row) for cell in cells))
    return made


def show_core(core: CoreResult, fields: Mapping[str, Any]) -> None:
    """Print CORE as a table, what follows from it, and how fast it was."""
    headings = ("task", "shots", "examples", "accuracy", "+-", "95 %", "random baseline", "centered")
    cells = ["{task}", "{shots}", "{examples}", "{accuracy:.4f}", "{stderr:.4f}"]
    cells += ["{interval[0]:.3f}-{interval[1]:.3f}", "{baseline:.3f}", "{centered:+.4f}"]
    rows = ({"task": label, **task} for label, task in fields["tasks"].items())
    lines = [f"left out: {message}" for message in core.faults.values()]
    if core.faults:
        lines.append("CORE is not reported: a task is missing")
    else:
        lines.append(
            "CORE {core_metric:.4f} +- {core_stderr:.4f}, 95 % of resampled examples from "
            "{core_bootstrap[low]:.4f} to {core_bootstrap[high]:.4f}; baselines v1 {core_v1:.4f}, "
            "v2 {core_v2:.4f}".format_map(fields)
        )
    if judged := verdict(fields["tasks"], core.variant, core.core_metric, core.core_stderr):
        lines.append(f"This is {judged}.")
    seconds = ", ".join(f"{part} {seconds:.1f}" for part, seconds in core.seconds_of.items())
    lines += [
        f"{len(core.predictions)} examples, {core.examples_per_second:.1f} per second",
        f"{core.computed_tokens:,} tokens computed in {core.seconds:.1f} s: {seconds}",
        *filter(None, [core.describe_length()]),
        "matrix products: {flops:.2e} FLOP, at the rate of a large one, {measured_flops_per_s:.2e} FLOP/s, "
        "{share:.0%} of the time of forward and scoring".format_map(fields["core_matmul"]),
    ]
    show(table(f"CORE, {core.bundle}", headings, cells, rows), *lines)


def show_difference(
    runs: Sequence[str], means: Sequence[compare.Difference], tasks: Sequence[compare.Difference]
) -> None:
    """Print what run B has more than run A, of means and of tasks; a star marks what is hardly chance."""
    headings = ("task", "examples", *runs, "difference", "+-", f"only {runs[0]}", f"only {runs[1]}")
    cells = ["{name}", "{pairs}", "{first:.4f}", "{second:.4f}", "{gain:+.4f}", "{stderr:.4f}"]
    cells += ["{only[0]}", "{only[1]}", "{p}", "{holm}"]

    def shown(p: float, is_tested: bool) -> str:
        return f"{p:.3g}" + (" *" if is_tested and p < SIGNIFICANT else "")

    rows = [
        vars(one)
        | {"gain": one.second - one.first, "p": shown(one.p_value, one in means)}
        | {"holm": "" if one in means else shown(one.p_holm, True)}
        for one in (*means, *tasks)
    ]
    notes = [
        f"* p below {SIGNIFICANT}: of a mean by itself; of a task after Holm's correction for {len(tasks)}"
    ]
    for mean in means:
        gain = mean.second - mean.first
        above = probability_above(gain, mean.stderr, 0.0)
        notes.append(
            f"{mean.name} of {runs[1]} is {gain:+.4f} +- {mean.stderr:.4f} from that of {runs[0]}: "
            f"higher with probability {above:.3f}, before the spread between seeds."
        )
    title = f"{runs[1]} against {runs[0]}, by example"
    show(table(title, (*headings, "p", "p (Holm)"), cells, rows), *notes)


def show_chat(fields: Mapping[str, Any]) -> None:
    """Print the scores of chat tasks, as chat_eval.json has them, and the means of several tasks."""
    headings = ("task", "items", "accuracy", "+-", "95 %", "random baseline", "centered", "commonest letter")
    names = ("accuracy", "stderr", "range", "baseline", "centered", "commonest")
    rows, notes = [], []
    for task, one in fields["tasks"].items():
        numbers = {name: "-" if one.get(name) is None else f"{one[name]:.4f}" for name in names}
        if one["interval"]:
            numbers["range"] = "{:.3f}-{:.3f}".format(*one["interval"])
        rows.append({"task": task, "examples": one["examples"], **numbers})
        if one["pass_at"]:
            notes.append(f"{task}: " + ", ".join(f"pass@{k} {p:.4f}" for k, p in one["pass_at"].items()))
        if one["too_long"]:
            notes.append(f"{task}: {one['too_long']} prompts are longer than the context, and count as wrong")
        if one["unjudged"]:
            notes.append(f"{task}: {one['unjudged']} replies could not be judged, see docs/chat.md")
    notes += [
        f"{name} {mean['value']:.4f} +- {mean['stderr']:.4f}, 95 % of resampled items from {mean['low']:.4f} "
        f"to {mean['high']:.4f}: mean of {', '.join(mean['tasks'])}, centered"
        for name, mean in fields["means"].items()
        if mean is not None
    ]
    cells = ["{task}", "{examples}", *(f"{{{name}}}" for name in names)]
    show(table("Chat tasks", headings, cells, rows), *notes)


def show_combined(values: Mapping[str, float], claims: Sequence[compare.Claim]) -> None:
    """Print the mean of several seeds."""
    show(*(f"  {name:30s} CORE {value:.4f}" for name, value in values.items()))
    for claim in claims:
        mean = f"CORE {claim.mean:.4f} +- {claim.stderr:.4f}, {claim.what} of {len(values)} runs"
        show(": ".join(filter(None, [mean, claim.verdict])))
