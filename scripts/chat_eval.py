"""Score a chat model: `python -m scripts.chat_eval --run d12-sft --tasks made,chatcore`, or with torchrun."""

from __future__ import annotations

import json
import time
from typing import Any, cast

from nanochat.chat import evaluate, scores, tasks
from nanochat.chat.scores import MEANS, ChatResult
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import errors, files, run_files
from nanochat.common.errors import UserError
from nanochat.common.run_files import ChatAnswer
from nanochat.config import arguments
from nanochat.config.arguments import ChatEvalArgs
from nanochat.distributed import world
from nanochat.distributed.world import World
from nanochat.engine import Sampling
from nanochat.evaluation.base_eval import show, show_difference, table, weights_of
from nanochat.evaluation.score_files import digest_of
from nanochat.model import attention_backends
from nanochat.report import number

SCORES, ANSWERS = "chat_eval.json", "chat_answers.jsonl"
SETTINGS = ("max_per_task", "num_samples", "temperature", "top_k", "max_new_tokens", "tools", "seed")
COLUMNS = {
    "task": "{task}",
    "items": "{examples}",
    "accuracy": "{accuracy}",
    "+-": "{stderr}",
    "95 %": "{range}",
    "random baseline": "{baseline}",
    "centered": "{centered}",
    "commonest letter": "{commonest}",
}
NUMBERS = ("accuracy", "stderr", "baseline", "centered", "commonest")


@errors.cli
def main() -> None:
    """Parse; score a run, or compare two."""
    args = arguments.parse(ChatEvalArgs)
    with world.join(args.device_type, args.dist_timeout) as ranks:
        if args.compare:
            _compare(args.compare, ranks)
            return
        result = _run(args, ranks)
        if ranks.is_main:
            _show(result)
            print(f"written: {files.run_dir(args.run) / SCORES}")


def _run(args: ChatEvalArgs, world: World) -> ChatResult:
    """Score a checkpoint; the main rank writes chat_eval.json and chat_answers.jsonl.

    Scores that the files already hold of other tasks stay, if the checkpoint and the settings are the same.

    Returns:
        All that the files hold.

    Raises:
        UserError: an unknown run or task, a data set that is not there, or a folder that cannot be written.
    """
    started = time.perf_counter()
    if not args.run:
        raise UserError("--run is missing. Name the run to score, for example --run d12-sft.")
    if world.is_main:
        files.require_writable(files.run_dir(args.run))
    questions = tasks.questions(args.tasks, args.max_per_task, args.seed)
    precision, reason = attention_backends.choose_precision(world.device, args.dtype, args.attention)
    model, tokenizer, meta = checkpoint_state.load_model(
        args.run, args.step, device=world.device, precision=precision
    )
    step = meta["step"]
    world.print0(f"run {args.run}, step {step}, on {world.device} x {world.size}; {reason}")
    about: dict[str, Any] = {"run": args.run, "step": step, "weights": weights_of(args.run, step)}
    about["settings"] = {name: getattr(args, name) for name in SETTINGS}
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    result = evaluate.evaluate(
        model, tokenizer, questions, world, sampling=sampling, num_samples=args.num_samples, tools=args.tools
    )
    seconds = time.perf_counter() - started
    world.print0(f"{len(result.answers)} replies in {seconds:.1f} s")
    if world.is_main:
        kept = (one for one in _kept(args.run, about) if one["task"] not in questions)
        result = ChatResult((*kept, *result.answers))
        lines = "".join(json.dumps(answer) + "\n" for answer in result.answers)
        about |= {
            "dtype": str(precision.compute_dtype).removeprefix("torch."),
            "world_size": world.size,
            "seconds": seconds,
        }
        about["answers_sha256"] = digest_of(lines.encode())
        files.atomic_write(files.run_dir(args.run) / ANSWERS, lines)
        files.write_json(files.run_dir(args.run) / SCORES, about | result.as_dict())
    world.barrier()
    return result


def _read(run: str) -> tuple[dict[str, Any], ChatResult]:
    """What chat_eval.json says of a run, and the answers that its scores are made of.

    Raises:
        UserError: the run was not scored, or a file is damaged.
    """
    about, path = run_files.read_chat_scores(run), files.run_dir(run) / ANSWERS
    lines = run_files.read_lines(path, ChatAnswer)
    # Two files cannot be renamed as one: a kill between them leaves answers of another scoring.
    if not lines or digest_of(path.read_bytes()) != about["answers_sha256"]:
        again = f"Score it again: python -m scripts.chat_eval --run {run}"
        raise UserError(f"{path}: these are not the answers that {SCORES} is of. {again}")
    return about, ChatResult(tuple(cast(list[ChatAnswer], lines)))


def _kept(run: str, about: dict[str, Any]) -> tuple[ChatAnswer, ...]:
    """Answers on the disk of the same weights, given under the same settings."""
    try:
        old, result = _read(run)
    except UserError:  # there are none, or damaged ones
        return ()
    return result.answers if about.items() <= old.items() else ()


def _compare(runs: tuple[str, ...], world: World) -> None:
    """Print what run B has more than run A by item.

    Raises:
        UserError: not two runs, one that was not scored, or two that were asked different items.
    """
    if len(runs) != 2:
        raise UserError(f"--compare {' '.join(runs)}: expected two runs, A and B.")
    (about_a, a), (about_b, b) = map(_read, runs)
    asked_a, asked_b = (
        {(x["task"], x["id"], x["sample"], x["prompt"]) for x in one.answers} for one in (a, b)
    )
    if asked_a != asked_b:
        raise UserError(
            f"runs {runs[0]!r} and {runs[1]!r} were asked different items. Score both with the same --tasks, "
            "--max-per-task, --num-samples and --seed."
        )
    if world.is_main:
        show_difference(runs, *scores.compare(a, b))
        for name, value in about_a["settings"].items():
            if value != (other := about_b["settings"].get(name)):
                print(f"{name} was {value} for {runs[0]}, {other} for {runs[1]}")


def _show(result: ChatResult) -> None:
    """Print the scores as a table, and the means of several tasks."""
    fields = result.as_dict()
    rows, notes = [], []
    for task, one in fields["tasks"].items():
        interval = "-".join(number(end, ".3f") for end in one["interval"] or (None,))
        rows.append({"task": task, **one, "range": interval, **{name: number(one[name]) for name in NUMBERS}})
        if one["pass_at"]:
            notes.append(f"{task}: " + ", ".join(f"pass@{k} {p:.4f}" for k, p in one["pass_at"].items()))
        if one["too_long"]:
            notes.append(f"{task}: {one['too_long']} prompts are longer than the context, and count as wrong")
        if one["unjudged"]:
            notes.append(f"{task}: {one['unjudged']} replies were not judged: {tasks.cannot_judge_code()}")
    notes += [
        f"{name} {mean['value']:.4f} +- {mean['stderr']:.4f}, 95 % of resampled items from {mean['low']:.4f} "
        f"to {mean['high']:.4f}: mean of {', '.join(MEANS[name])}, centered"
        for name, mean in fields["means"].items()
        if mean is not None
    ]
    show(table("Chat tasks", [*COLUMNS], [*COLUMNS.values()], rows), *notes)


if __name__ == "__main__":
    main()
