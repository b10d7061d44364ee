"""Tasks of the chat evaluation: which items are asked, and whether a reply to one is right.

A verdict is a function of the item and the reply alone, so that evaluation and reinforcement learning agree.
Items of the made tasks are made on the spot; those of the hub's data sets come from chat corpora on the disk.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from nanochat.chat import corpus, made, sandbox
from nanochat.chat.conversation import Part
from nanochat.common.errors import UserError
from nanochat.evaluation.chat_scores import CHATCORE6

Row = Mapping[str, Any]  # a conversation that can be judged: messages, id, task, judge, answer

GROUPS: dict[str, Iterable[str]] = {"made": made.TASKS, "chatcore": CHATCORE6}
MADE_ITEMS = 400  # of a task that is made on the spot, where --max-per-task does not say

# Judged also where a reply was cut off, as karpathy/nanochat does. Elsewhere a reply that does not end is no
# answer: of a model that goes on for ever, the last number is right now and then.
EVEN_CUT_OFF = ("gsm8k", "code")
F1_BAR = 0.5
NUMBER = re.compile(r"(?<![\d.])-?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?")
FINAL = re.compile(r"#### (-?[\d.,]+)")  # GSM8K's form of a final answer
FENCED = re.compile(r"```(?:python)?[ \t]*\n(.*?)```", re.DOTALL)


def parse(text: str) -> tuple[str, ...]:
    """The names of the tasks that a flag asks for, each once, in its order.

    Raises:
        UserError: a task that does not exist, or none.
    """
    asked = [name.strip() for name in text.split(",") if name.strip()]
    names = dict.fromkeys(name for group in asked for name in GROUPS.get(group, (group,)))
    known = [*GROUPS, *made.TASKS, *CHATCORE6]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--tasks={text}: there is no task {unknown[0]}. There are {', '.join(known)}.")
    if not names:
        raise UserError(f"--tasks={text}: names no task. There are {', '.join(known)}.")
    return tuple(names)


def questions(text: str, max_per_task: int, seed: int) -> dict[str, list[Row]]:
    """The test items of the tasks that a flag asks for, by the name of the task.

    Args:
        text: names or groups of tasks, with commas.
        max_per_task: items of each; 0 means all, and `MADE_ITEMS` of a task that is made on the spot.
        seed: of the made items. Of a data set, a smaller number is always the same draw.

    Raises:
        UserError: an unknown task, or one whose data set is not on the disk.
    """
    return {name: _items(name, max_per_task, seed) for name in parse(text)}


def _items(task: str, most: int, seed: int) -> list[Row]:
    if task == "spellingbee":  # letters counted with the tool, as there; words and wordings are our own
        asked = made.examples("count", "test", most or MADE_ITEMS, seed + 1)
        return [{**row, "judge": "number", "answer": row["answer"].split()[0]} for row in asked]
    if task in made.TASKS:
        return [*made.examples(task, "test", most or MADE_ITEMS, seed)]
    rows: list[Row] = [*corpus.rows(task, "test")]
    # A draw, because the questions of MMLU are sorted by their subject.
    return random.Random(task).sample(rows, most) if 0 < most < len(rows) else rows  # noqa: S311


def right(row: Row, reply: Sequence[Part]) -> bool | None:
    """Whether a reply answers a row rightly; None where it could not be judged, as there is no sandbox."""
    text = "".join(part.text for part in reply if part.kind == "text")
    if row["judge"] == "code":
        return _passes(row, text)
    return JUDGES[row["judge"]](text, str(row["answer"]))


def _same_number(text: str, answer: str) -> bool:
    """Whether the last number of a text is the answer."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and Decimal(numbers[-1].replace(",", "")) == Decimal(answer.replace(",", ""))


def _same_final(text: str, answer: str) -> bool:
    """Whether what follows the first #### is the answer, to the letter but for commas (GSM8K's rule)."""
    found = FINAL.search(text)
    return found is not None and found[1].replace(",", "") == answer.replace(",", "")


def _overlaps(text: str, answer: str) -> bool:
    """Whether F1, the harmonic mean of precision and recall of the words, is at least `F1_BAR`."""
    said, meant = (Counter(re.findall(r"\w+", one.casefold())) for one in (text, answer))
    common = (said & meant).total()
    return common > 0 and 2 * common / (said.total() + meant.total()) >= F1_BAR


JUDGES: dict[str, Callable[[str, str], bool]] = {
    "number": _same_number,
    "gsm8k": _same_final,
    "f1": _overlaps,
    "phrase": lambda text, answer: answer.casefold() in text.casefold(),
    "exact": lambda text, answer: text.strip() == answer.strip(),
    "letter": lambda text, answer: text.strip() == answer.strip(),
}

cannot_judge_code = functools.cache(sandbox.probe)


def _passes(row: Row, text: str) -> bool | None:
    """Whether the program of a reply passes HumanEval's tests: the first fenced block, or all of the text."""
    if cannot_judge_code() is not None:
        return None
    fenced = FENCED.search(text)
    imports = [line for line in row["prompt"].splitlines() if line.startswith(("import ", "from "))]
    program = "\n".join([*imports, fenced[1] if fenced else text])
    return sandbox.run(program, row["test"], row["entry_point"]).passed
