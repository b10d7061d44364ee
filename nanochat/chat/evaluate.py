"""Evaluation of a chat model: asks the items of the tasks, judges the replies, writes scores and answers.

A letter is the likeliest of an item's letters after its prompt; everything else is a reply that is judged.
Prompts of all tasks are pooled by length. A batch has the same items on any number of ranks, and no padding:
an answer depends on nothing that the machine decides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nanochat.chat import conversation, tasks
from nanochat.chat.replies import ReplyEngine
from nanochat.chat.tasks import Row
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.state import TrainState
from nanochat.common import files, run_files
from nanochat.common.errors import UserError
from nanochat.common.run_files import ChatAnswer
from nanochat.common.stop_signals import Stopped, requested
from nanochat.config.arguments import ChatEvalArgs, FinetuneFlags
from nanochat.config.plan import Plan
from nanochat.distributed.world import World
from nanochat.engine import Sampling
from nanochat.evaluation.base_eval import weights_of
from nanochat.evaluation.chat_scores import ChatResult
from nanochat.evaluation.core.scoring import ROTARY_CONTEXTS, GPTScorer
from nanochat.evaluation.score_files import digest_of
from nanochat.model import attention_backends
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train.hooks import Hook
from nanochat.train.run_log import RunLog

BATCH_TOKENS = 16384  # of the prompts of a batch that asks for letters
BATCH_REPLIES = 128  # of a batch that is generated; few enough that small evaluations occupy several ranks
SETTINGS = ("max_per_task", "num_samples", "temperature", "top_k", "max_new_tokens", "tools", "seed")
MAX_TOKENS = 256  # of a reply, in evaluations while a model is trained


class Item(NamedTuple):
    """An item of a task, and its prompt as text and as token ids."""

    task: str
    row: Row
    text: str
    ids: list[int]


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
    items = [_item(tokenizer, task, row) for task, rows in rows_by_task.items() for row in rows]
    engine = ReplyEngine(model, tokenizer)
    found: dict[int, list[ChatAnswer]] = {}
    batches = list(_batches(items, num_samples, model.config.sequence_len))
    for batch in batches[world.rank :: world.size]:
        if stop_requested():
            break
        asked = [items[index] for index in batch]
        if _is_letter(asked[0]):
            for index, letter in zip(batch, _choose_letters(model, tokenizer, asked), strict=True):
                found[index] = [_answer(tokenizer, items[index], 0, [letter], 1, "stop")]
            continue
        names = [f"{item.task}/{item.row['id']}" for item in asked]
        prompts = [item.ids for item in asked]
        replies = engine.replies(prompts, sampling, num_samples, tools=tools, names=names)
        for index, several in zip(batch, replies, strict=True):
            found[index] = [
                _answer(tokenizer, items[index], sample, one.ids, sum(one.sampled), one.reason)
                for sample, one in enumerate(several)
            ]
    if world.any_rank(stop_requested()):
        raise Stopped
    gathered = _gathered(found, world)
    for index, item in enumerate(items):
        if index not in gathered:
            samples = range(1 if _is_letter(item) else num_samples)
            gathered[index] = [_answer(tokenizer, item, sample, [], 0, "context") for sample in samples]
    return ChatResult(tuple(answer for index in range(len(items)) for answer in gathered[index]))


def _item(tokenizer: Tokenizer, task: str, row: Row) -> Item:
    """What is asked of a row: all of it but its last message, which is the reference reply."""
    asked = conversation.read(row, f"{task}: {row['id']}")[:-1]
    text = "\n\n".join(part.text for message in asked for part in message.parts)
    return Item(task, row, text, conversation.prompt(tokenizer, asked))


def _is_letter(item: Item) -> bool:
    return bool(item.row["judge"] == "letter")


def _batches(items: Sequence[Item], num_samples: int, context: int) -> Iterator[list[int]]:
    """Indices of items that are asked together, the shorter first; none of what the model cannot read.

    Prompts before a letter are read beyond the context as far as rotary tables go, as karpathy/nanochat does.
    """
    lengths = [len(item.ids) for item in items]
    groups: dict[int, list[int]] = {}  # of letters by their length; 0 for all that is generated
    for index in sorted(range(len(items)), key=lengths.__getitem__):
        is_letter, length = _is_letter(items[index]), lengths[index]
        if length <= context * (ROTARY_CONTEXTS if is_letter else 1):
            groups.setdefault(length if is_letter else 0, []).append(index)
    for length, indices in groups.items():
        rows = max(1, BATCH_TOKENS // length if length else BATCH_REPLIES // num_samples)
        yield from (indices[first : first + rows] for first in range(0, len(indices), rows))


def _choose_letters(model: GPT, tokenizer: Tokenizer, items: Sequence[Item]) -> list[int]:
    """The id of the likeliest of its letters for each item; of equals, the first. Prompts have one length."""
    ids = torch.tensor([item.ids for item in items], device=model.head.weight.device)
    with GPTScorer(model).room(ids.size(1)):
        logits = model.logits(ids, last_only=True)[:, 0].cpu()
    letters = [[tokenizer.encode(letter)[0] for letter in item.row["letters"]] for item in items]
    return [of[int(values[of].argmax())] for of, values in zip(letters, logits, strict=True)]


def _answer(
    tokenizer: Tokenizer, item: Item, sample: int, ids: Sequence[int], sampled: int, reason: str
) -> ChatAnswer:
    """Judge a reply."""
    parts = conversation.parts_of(tokenizer, ids)
    is_whole = reason == "stop" or item.row["judge"] in tasks.EVEN_CUT_OFF
    return {
        "task": item.task,
        "id": item.row["id"],
        "sample": sample,
        "judge": item.row["judge"],
        "prompt": item.text,
        "reply": [{"type": part.kind, "text": part.text} for part in parts],
        "right": tasks.right(item.row, parts) if is_whole else False,
        "sampled": sampled,
        "reason": reason,
    }


def _gathered(found: dict[int, list[ChatAnswer]], world: World) -> dict[int, list[ChatAnswer]]:
    """The answers of all ranks, by the index of the item: as JSON, with spaces up to the longest."""
    data = json.dumps(list(found.items())).encode()
    size = world.max_over_ranks(len(data))
    texts = [bytes(text) for text in world.gather_ints([*data.ljust(size)])]
    return {index: answers for text in texts for index, answers in json.loads(text)}


def hooks(plan: Plan, args: FinetuneFlags, tokenizer: Tokenizer, world: World, log: RunLog) -> list[Hook]:
    """The evaluation of tasks between the steps of SFT or RL, greedy; no hook where it is not asked for.

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


def run(args: ChatEvalArgs, world: World) -> ChatResult:
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
    folder = files.run_dir(args.run)
    checkpoint_state.require_run(args.run)
    if world.is_main:
        files.require_writable(folder)
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
    result = evaluate(
        model, tokenizer, questions, world, sampling=sampling, num_samples=args.num_samples, tools=args.tools
    )
    seconds = time.perf_counter() - started
    world.print0(f"{len(result.answers)} replies in {seconds:.1f} s")
    if any(one.unjudged for one in result.tasks.values()):
        world.print0(f"programs were not judged: {tasks.cannot_judge_code()}")
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
        files.atomic_write(folder / "chat_answers.jsonl", lines)
        files.write_json(folder / "chat_eval.json", about | result.as_dict())
    world.barrier()
    return result


def _kept(run: str, about: dict[str, Any]) -> list[ChatAnswer]:
    """Answers on the disk of the same weights, given under the same settings."""
    try:
        scores, answers = run_files.read_chat_answers(run)
    except UserError:  # there are none, or damaged ones
        return []
    return answers if about.items() <= scores.items() else []
