"""Evaluation of a chat model: asks the items of the tasks, judges the replies, writes scores and answers.

A letter is the likeliest of an item's letters after its prompt; everything else is a reply that is judged.
Prompts of all tasks are pooled by length. A batch has one length, and the same items on any number of ranks:
no padding enters it, and an answer depends on nothing that the machine decides.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.chat import conversation, scores, tasks
from nanochat.chat.replies import ReplyEngine
from nanochat.chat.scores import Answer, ChatResult
from nanochat.chat.tasks import Row
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.state import TrainState
from nanochat.common import files, run_files
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped, requested
from nanochat.config.arguments import ChatEvalArgs, FinetuneFlags
from nanochat.config.plan import Plan
from nanochat.distributed.world import World
from nanochat.engine import Sampling
from nanochat.evaluation.base_eval import SIGNIFICANT, show, table, weights_of
from nanochat.evaluation.core.scoring import ROTARY_CONTEXTS, GPTScorer
from nanochat.evaluation.score_files import digest_of
from nanochat.model import attention_backends
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train.hooks import Hook
from nanochat.train.run_log import RunLog

BATCH_TOKENS = 16384  # of the prompts of a batch
MAX_TOKENS = 256  # of a reply, in evaluations while a model is trained
REASONS = ("context", "stop", "length", "forbidden")  # a line of zeros says that the prompt did not fit
VERDICTS = (False, True, None)
SCORES, ANSWERS = "chat_eval.json", "chat_answers.jsonl"
SETTINGS = ("max_per_task", "num_samples", "temperature", "top_k", "max_new_tokens", "tools", "seed")


@dataclass(frozen=True)
class Item:
    """An item of a task, and its prompt as text and as token ids."""

    task: str
    row: Row
    text: str
    ids: list[int]

    @property
    def is_letter(self) -> bool:
        """Whether the model's choice among letters is the answer."""
        return bool(self.row["judge"] == "letter")


@torch.no_grad()
def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    rows_by_task: Mapping[str, Sequence[Row]],
    world: World,
    *,
    sampling: Sampling,
    num_samples: int = 1,
    tools: bool = True,
    stop_requested: Callable[[], bool] = lambda: False,
) -> ChatResult:
    """Ask all items and judge the replies: a collective, which leaves the model as it was.

    An item whose prompt does not fit the context is answered wrongly.

    Args:
        model: on `world.device`; the same weights on every rank.
        tokenizer: the model's.
        rows_by_task: as `tasks.questions` gives them, the same on every rank.
        world: the batches are dealt to its ranks; all of them return the same result.
        sampling: of the replies; letters are not sampled.
        num_samples: replies to each item that does not ask for a letter.
        tools: whether replies may use the calculator.
        stop_requested: called before each batch; if it is True on any rank, all of them raise `Stopped`.

    Raises:
        UserError: a tokenizer without the special tokens of a chat, or a row that is no conversation.
    """
    conversation.require_specials(tokenizer)
    items = [_item(tokenizer, task, row) for task, rows in rows_by_task.items() for row in rows]
    engine = ReplyEngine(model, tokenizer)
    lines: list[list[list[int]]] = [[[0]] * (1 if item.is_letter else num_samples) for item in items]
    batches = list(_batches(items, num_samples, model.config.sequence_len))
    for batch in batches[world.rank :: world.size]:
        if stop_requested():
            break
        asked = [items[index] for index in batch]
        if asked[0].is_letter:
            for index, letter in zip(batch, _choose_letters(model, tokenizer, asked), strict=True):
                lines[index] = [_line(tokenizer, items[index], "stop", 1, [letter])]
            continue
        names = [f"{item.task}/{item.row['id']}" for item in asked]
        prompts = [item.ids for item in asked]
        replies = engine.replies(prompts, sampling, num_samples, tools=tools, names=names)
        for index, several in zip(batch, replies, strict=True):
            lines[index] = [
                _line(tokenizer, items[index], one.reason, sum(one.sampled), one.ids) for one in several
            ]
    if world.any_rank(stop_requested()):
        raise Stopped
    gathered = iter(_gathered([line for of_item in lines for line in of_item], world))
    answers = (
        _answer(tokenizer, item, sample, next(gathered))
        for item, of_item in zip(items, lines, strict=True)
        for sample in range(len(of_item))
    )
    return ChatResult(tuple(answers))


def _item(tokenizer: Tokenizer, task: str, row: Row) -> Item:
    """What is asked of a row: all of it but its last message, which is the reference reply."""
    asked = conversation.read(row, f"{task}: {row['id']}")[:-1]
    text = "\n\n".join(part.text for message in asked for part in message.parts)
    return Item(task, row, text, conversation.prompt(tokenizer, asked))


def _batches(items: Sequence[Item], num_samples: int, context: int) -> Iterator[list[int]]:
    """Indices of items of one kind and one length, without those that the model cannot read.

    Prompts before a letter are read beyond the context as far as rotary tables go, as karpathy/nanochat does.
    """
    groups: dict[tuple[bool, int], list[int]] = {}
    for index, item in enumerate(items):
        if len(item.ids) <= context * (ROTARY_CONTEXTS if item.is_letter else 1):
            groups.setdefault((item.is_letter, len(item.ids)), []).append(index)
    for (is_letter, length), indices in sorted(groups.items()):
        rows = max(1, BATCH_TOKENS // (length if is_letter else length * num_samples))
        yield from (indices[first : first + rows] for first in range(0, len(indices), rows))


def _choose_letters(model: GPT, tokenizer: Tokenizer, items: Sequence[Item]) -> list[int]:
    """The id of the likeliest of its letters for each item; of equals, the first. Prompts have one length."""
    ids = torch.tensor([item.ids for item in items], device=model.head.weight.device)
    with GPTScorer(model).room(ids.size(1)):
        logits = model.logits(ids, last_only=True)[:, 0].cpu()
    letters = [[tokenizer.encode(letter)[0] for letter in item.row["letters"]] for item in items]
    return [of[int(values[of].argmax())] for of, values in zip(letters, logits, strict=True)]


def _line(tokenizer: Tokenizer, item: Item, reason: str, sampled: int, ids: Sequence[int]) -> list[int]:
    """A judged reply as numbers, which ranks can exchange: verdict, reason, tokens sampled, then its ids."""
    verdict = tasks.right(item.row, conversation.parts_of(tokenizer, ids))
    return [VERDICTS.index(verdict), REASONS.index(reason), sampled, len(ids), *ids]


def _gathered(lines: Sequence[Sequence[int]], world: World) -> list[list[int]]:
    """The lines of all ranks, each of which has its own and zeros for those of others."""
    width = world.max_over_ranks(max(map(len, lines)))
    padded = torch.tensor([[*line, *[0] * (width - len(line))] for line in lines])
    summed: list[list[int]] = world.all_reduce_sum(padded.to(world.device)).tolist()
    return summed


def _answer(tokenizer: Tokenizer, item: Item, sample: int, line: Sequence[int]) -> Answer:
    verdict, reason, sampled, count = line[:4]
    return Answer(
        task=item.task,
        id=item.row["id"],
        sample=sample,
        judge=item.row["judge"],
        prompt=item.text,
        reply=[
            {"type": part.kind, "text": part.text}
            for part in conversation.parts_of(tokenizer, line[4 : 4 + count])
        ],
        right=VERDICTS[verdict],
        sampled=sampled,
        reason=REASONS[reason],
    )


def hooks(
    plan: Plan, args: FinetuneFlags, tokenizer: Tokenizer, world: World, log: RunLog
) -> list[Hook]:
    """The evaluation of tasks between the steps of SFT or RL: greedy, one log line each; none if not asked for.

    Raises:
        UserError: an unknown task, or one whose data set is not on the disk.
    """
    if args.chat_eval_every is None:
        return []
    questions = tasks.questions(args.chat_eval_tasks, args.chat_eval_max_per_task, 0)

    def score(state: TrainState) -> None:
        sampling = Sampling(MAX_TOKENS, temperature=0.0)
        result = evaluate(
            state.model, tokenizer, questions, world, sampling=sampling, stop_requested=requested
        )
        shown = ", ".join(f"{task} {accuracy:.3f}" for task, accuracy in result.accuracies.items())
        line = f"step {state.step:5d}/{plan.steps} | {shown}"
        log.record("chat_eval", state.step, line, scores=result.accuracies)

    return [Hook(score, args.chat_eval_every, at_start=True)]


def main(args: ChatEvalArgs, world: World) -> None:
    """Score a model, or compare two scored runs.

    Raises:
        UserError: as `run` and `read`, or runs that answered different items.
    """
    if not args.compare:
        run(args, world)
    elif len(args.compare) != 2:
        raise UserError(f"--compare {' '.join(args.compare)}: expected two runs, A and B.")
    elif world.is_main:
        _compare(*args.compare)


def run(args: ChatEvalArgs, world: World) -> None:
    """Score a checkpoint; the main rank prints its scores and writes chat_eval.json and chat_answers.jsonl.

    Scores that the files already hold of other tasks stay, if the checkpoint and the settings are the same.

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
    about = {"run": args.run, "step": meta["step"], "weights": weights_of(args.run, meta["step"])}
    about["settings"] = {name: getattr(args, name) for name in SETTINGS}
    world.print0(f"run {args.run}, step {meta['step']}, on {world.device} x {world.size}; {reason}")
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    result = evaluate(
        model, tokenizer, questions, world, sampling=sampling, num_samples=args.num_samples, tools=args.tools
    )
    if world.is_main:
        kept = [one for one in _kept(args.run, about) if one.task not in questions]
        result = ChatResult((*kept, *result.answers))
        _show(result)
        count, seconds = len(result.answers) - len(kept), time.perf_counter() - started
        print(f"{count} replies in {seconds:.1f} s, {count / seconds:.1f} per second")
        about |= {"dtype": str(precision.compute_dtype).removeprefix("torch."), "world_size": world.size}
        _write(args.run, about | {"seconds": seconds}, result)
    world.barrier()


def _write(run: str, about: dict[str, Any], result: ChatResult) -> None:
    folder = files.run_dir(run)
    lines = "".join(json.dumps(vars(answer)) + "\n" for answer in result.answers)
    files.atomic_write(folder / ANSWERS, lines)
    files.write_json(
        folder / SCORES, about | result.as_dict() | {"answers_sha256": digest_of(lines.encode())}
    )
    print(f"written: {folder / SCORES}")


def read(run: str) -> tuple[dict[str, Any], ChatResult]:
    """The scores of a run as chat_eval.json has them, and the answers that they are made of.

    Raises:
        UserError: the run was not scored, or a file is damaged.
    """
    again = f"Score it: python -m scripts.chat_eval --run {run}"
    path = files.run_dir(run) / ANSWERS
    about = run_files.read_chat_scores(run)
    lines = run_files.read_lines(path, run_files.ChatAnswerLine)
    # Two files cannot be renamed as one: a kill between them leaves answers of another scoring.
    if not lines or digest_of(path.read_bytes()) != about["answers_sha256"]:
        raise UserError(f"{path}: these are not the answers that {SCORES} is of. {again}")
    names = [field.name for field in dataclasses.fields(Answer)]
    return about, ChatResult(tuple(Answer(**{name: line[name] for name in names}) for line in lines))


def _kept(run: str, about: Mapping[str, Any]) -> tuple[Answer, ...]:
    """Answers on the disk of the same weights, given under the same settings."""
    try:
        old, result = read(run)
    except UserError:  # none there, or damaged: made again now
        return ()
    return result.answers if all(old.get(name) == value for name, value in about.items()) else ()


def _compare(run_a: str, run_b: str) -> None:
    """Print what run B has more than run A, by item; a star marks a difference that is hardly chance."""
    (about_a, a), (about_b, b) = read(run_a), read(run_b)
    asked_a, asked_b = ({(x.task, x.id, x.sample, x.prompt) for x in one.answers} for one in (a, b))
    if asked_a != asked_b:
        raise UserError(
            f"runs {run_a!r} and {run_b!r} were asked different items. Score both again with the same "
            "--tasks, --max-per-task, --num-samples and --seed."
        )
    rows = []
    for one in scores.compare(a, b):
        p, is_mean = one.p_value, one.name in scores.MEANS
        gain, star = one.second - one.first, " *" if (p if is_mean else one.p_holm) < SIGNIFICANT else ""
        holm = "" if is_mean else f"{one.p_holm:.2g}"
        rows.append(vars(one) | {"gain": gain, "p": f"{p:.2g}", "holm": holm + star})
    headings = ("task", "items", run_a, run_b, "difference", "+-", f"only {run_a}", f"only {run_b}")
    cells = ["{name}", "{pairs}", "{first:.4f}", "{second:.4f}", "{gain:+.4f}", "{stderr:.4f}"]
    cells += ["{only[0]}", "{only[1]}", "{p}", "{holm}"]
    show(
        table(f"{run_b} against {run_a}, by item", (*headings, "p", "p (Holm)"), cells, rows),
        f"* p below {SIGNIFICANT}: of a mean by itself; of a task after Holm's correction",
        *(
            f"{name}: {about_a['settings'].get(name)} of {run_a}, {value} of {run_b}"
            for name, value in about_b["settings"].items()
            if about_a["settings"].get(name) != value
        ),
    )


def _show(result: ChatResult) -> None:
    """Print the scores as a table, and the means of several tasks."""
    fields = result.as_dict()
    headings = ["task", "items", "accuracy", "+-", "95 %", "random baseline", "centered", "commonest letter"]
    cells = ["{task}", "{examples}", "{right}", "{error}", "{range}", "{baseline:.3f}", "{centre}", "{most}"]
    rows = []
    for task, one in fields["tasks"].items():
        row = {"task": task, **one, "right": "not judged", "error": "", "range": "", "centre": ""}
        if one["accuracy"] is not None:
            row |= {"right": f"{one['accuracy']:.4f}", "error": f"{one['stderr']:.4f}"}
            row |= {"range": "{:.3f}-{:.3f}".format(*one["interval"]), "centre": f"{one['centered']:+.4f}"}
        rows.append(row | {"most": "" if one["commonest"] is None else f"{one['commonest']:.2f}"})
    notes = [
        f"{name} {mean['value']:.4f} +- {mean['stderr']:.4f}, 95 % of resampled items from "
        f"{mean['low']:.4f} to {mean['high']:.4f}: mean of {', '.join(scores.MEANS[name])}, centered"
        for name, mean in fields["means"].items()
        if mean is not None
    ]
    for task, one in fields["tasks"].items():
        if one["pass_at"]:
            notes.append(f"{task}: " + ", ".join(f"pass@{k} {p:.4f}" for k, p in one["pass_at"].items()))
        if one["too_long"]:
            notes.append(f"{task}: {one['too_long']} prompts are longer than the context, and count as wrong")
        if one["unjudged"]:
            notes.append(f"{task}: {one['unjudged']} replies were not judged: {tasks.cannot_judge_code()}")
    show(table("Chat tasks", headings, cells, rows), *notes)
