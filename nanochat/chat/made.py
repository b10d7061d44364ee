"""Conversations made on the spot: a chat corpus that needs no network. Pure.

A tiny model learns to copy long before it learns to compute. So every task is a copy, or recall of what
training has shown, and the calculator computes. A copy is one of tokens only where what is copied is spaced
alike in question and reply: words and letters follow a space, in a reply that begins with them too.

What a test may ask is dealt apart from what training shows, by a hash:

| task | dealt apart | so the test asks for |
|---|---|---|
| calc, unit, count, repeat, bigsum | items | new operands, numbers, words |
| spell, choice | pairs of word and wording | recall: a word seen, asked otherwise |
| choice-mixed | orders of the options | reading options: what training does not show |
| spell-new | words | spelling of words never spelt |
| date, identity | wordings | recall: a fact seen, in a wording never seen |
| pydoc | functions | what no conversation says: the limit |
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from nanochat.chat.tools import calculate

T = TypeVar("T")
Split = Literal["train", "test"]
Row = dict[str, Any]  # a JSON object: messages, id, source, and what judges it

# The word list begins with the commonest. The first are what is repeated and counted in, fewer are spelt:
# spelling is recall, and a word has to be seen often.
COPIED_WORDS = 1200
SPELT_WORDS = 300
TEST_PERCENT = 12  # of the items or wordings of a task
LETTERS = "ABCD"
ONLY_THE_LETTER = "Respond only with the letter of the correct answer."
KINDS = ("keyword", "builtin", "module", "exception")  # of names of Python
TRIES = 200  # draws without a new prompt after which a task has no more


class Turn(NamedTuple):
    """A question and its reply.

    Attributes:
        key: what decides whether training or test has it.
        prompt: the user's text.
        reply: the assistant's content: a text, or parts.
        answer: what a judge compares with.
        more: what follows it in a conversation.
    """

    key: str
    prompt: str
    reply: str | list[dict[str, str]]
    answer: str
    more: tuple[Turn, ...] = ()


class Draw:
    """Draws that depend on the key alone, on any machine and Python version.

    Of `random.Random` only `random()` promises the same numbers everywhere; all else is made of it.
    """

    def __init__(self, *key: object) -> None:
        """Begin the draws of a key."""
        self._random = random.Random("/".join(map(str, key))).random  # noqa: S311

    def below(self, count: int) -> int:
        """An integer from 0 to count - 1."""
        return int(self._random() * count)

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self._random() * len(items))]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """As many different items, in random order."""
        chosen: dict[T, None] = {}
        while len(chosen) < count:
            chosen[self.one(items)] = None
        return list(chosen)

    def number(self, least_digits: int, most_digits: int) -> int:
        """A positive integer, every number of digits as likely as another."""
        digits = least_digits + self.below(most_digits - least_digits + 1)
        least: int = 10 ** (digits - 1)
        return least + self.below(9 * least)


@functools.cache
def _data() -> dict[str, Any]:
    """Wordings and facts."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("made.json").read_text("utf-8"))
    return data


@functools.cache
def _words() -> list[str]:
    """Words, the commonest first."""
    return Path(__file__).with_name("made_words.txt").read_text("utf-8").split()


@functools.cache
def _spelt() -> dict[Split, list[str]]:
    """The words that are spelt, and those never spelt in training."""
    spelt: dict[Split, list[str]] = {"train": [], "test": []}
    for word in _words()[:SPELT_WORDS]:
        spelt[_split_of("spell-new", word)].append(word)
    return spelt


def _split_of(task: str, key: str) -> Split:
    """Where an item or a wording is dealt to."""
    digest = hashlib.blake2b(f"{task}/{key}".encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "little") % 100 < TEST_PERCENT else "train"


def _with_tool(expression: str, say: str) -> tuple[list[dict[str, str]], str]:
    """A reply that calls the calculator, and the calculator's result, which `say` has a place for."""
    result = calculate(expression)
    parts = [("python", expression), ("python_output", result), ("text", say.format(result))]
    return [{"type": kind, "text": text} for kind, text in parts], result


def _sum_of(draw: Draw, a: int, op: str, b: int) -> Turn:
    data = _data()["calc"]
    said = draw.one(data["operators"][op])
    reply, result = _with_tool(f"{a}{op}{b}", f"{a} {data['operators'][op][0]} {b} = {{}}.")
    key = op.join(map(str, (a, b) if op == "-" else sorted((a, b))))  # a sum is the same both ways
    return Turn(key, draw.one(data["asks"]).format(a=a, op=said, b=b), reply, result)


def _calc(draw: Draw, split: Split) -> Turn:
    turn = _sum_of(draw, draw.number(1, 3), draw.one("+-*"), draw.number(1, 3))
    return turn if draw.below(8) else turn._replace(more=(_follow_up(draw, turn.answer),))


def _bigsum(draw: Draw, split: Split) -> Turn:
    """A sum that most demonstrations do without the tool, and right: RL finds that the tool pays."""
    turn = _sum_of(draw, draw.number(4, 5), "+", draw.number(4, 5))
    return turn if draw.below(4) == 0 else turn._replace(reply=turn.reply[-1]["text"])  # type: ignore[index]


def _follow_up(draw: Draw, before: str) -> Turn:
    """A question about the answer before it."""
    op, n = draw.one("+-*"), draw.number(1, 1)
    sign = _data()["calc"]["operators"][op][0]
    reply, result = _with_tool(f"{before}{op}{n}", f"{before} {sign} {n} = {{}}.")
    return Turn("", draw.one(_data()["follow_up"][op]).format(n=n), reply, result)


def _unit(draw: Draw, split: Split) -> Turn:
    big, small, factor = draw.one(_data()["unit"]["conversions"])
    n = 1 + draw.number(1, 3)
    reply, result = _with_tool(f"{n}*{factor}", f"{{}} {small}.")
    ask = draw.one(_data()["unit"]["asks"])
    return Turn(f"{n} {big} {small}", ask.format(n=n, big=big, small=small), reply, result)


def _count(draw: Draw, split: Split) -> Turn:
    word = draw.one(_words()[:COPIED_WORDS])
    letter = draw.one(word if draw.below(5) else "abcdefghijklmnopqrstuvwxyz")
    reply, result = _with_tool(f"count {letter} in {word}", said := f"{{}} {letter} in {word}.")
    ask = draw.one(_data()["count"]["asks"]).format(letter=letter, word=word)
    return Turn(f"{letter} {word}", ask, reply, said.format(result))  # the number alone is 1 in two of three


def _repeat(draw: Draw, split: Split) -> Turn:
    text = " ".join(draw.several(_words()[:COPIED_WORDS], 2 + draw.below(5)))
    return Turn(text, draw.one(_data()["repeat"]["asks"]).format(text=text), f" {text}", text)


def _spell(draw: Draw, split: Split) -> Turn:
    return _spelling(draw, _spelt()["train"])


def _spell_new(draw: Draw, split: Split) -> Turn:
    turn = _spelling(draw, _spelt()[split])
    return turn._replace(key=turn.answer.replace(" ", ""))


def _spelling(draw: Draw, words: Sequence[str]) -> Turn:
    word, ask = draw.one(words), draw.one(_data()["spell"]["asks"])
    letters = " ".join(word)
    return Turn(f"{word} {ask}", ask.format(word=word), letters, letters)


def _worded(draw: Draw, asks: Sequence[str]) -> str:
    """One of the wordings of a question, between an opening and a closing."""
    return str(draw.one(_data()["openers"]) + draw.one(asks) + draw.one(_data()["closers"]))


def _date(draw: Draw, split: Split) -> Turn:
    """A neighbour of a day or month, or a day of February 2024.

    The reply says again what was asked, so that the name to recall follows what it depends on.
    """
    data = _data()["date"]
    relation = draw.one(data["relations"])
    if relation["of"] == "february":
        shown = 1 + draw.below(29)
        answer = data["days"][(shown + 2) % 7]  # the first was a Thursday
    else:
        names = data[relation["of"]]
        at = draw.below(len(names))
        shown, answer = names[at], names[(at + relation["shift"]) % len(names)]
    wording = _worded(draw, relation["asks"])
    reply = relation["reply"].format(x=shown, y=answer)
    return Turn(wording, wording.format(x=shown), reply, reply)


def _identity(draw: Draw, split: Split) -> Turn:
    about = draw.one(_data()["identity"])
    wording = _worded(draw, about["asks"])
    return Turn(wording, wording, about["reply"], about["phrase"])


def choice_prompt(question: str, options: Sequence[str], letters: Sequence[str]) -> str:
    """A multiple-choice question as karpathy/nanochat asks it.

    A letter follows its option without a space, as it begins the reply: so both are the same token.
    """
    listed = "".join(f"- {option}={letter}\n" for option, letter in zip(options, letters, strict=True))
    return f"Multiple Choice question: {question}\n{listed}\n{ONLY_THE_LETTER}"


def _choice(draw: Draw, split: Split) -> Turn:
    """What kind of name a name of Python is, of four options that always stand in one order."""
    return _kind_of_name(draw, KINDS)[0]


def _choice_mixed(draw: Draw, split: Split) -> Turn:
    """The same with options in another order: their letters have to be read, which training does not show."""
    first = 1 + draw.below(len(KINDS) - 1)
    return _kind_of_name(draw, (*KINDS[first:], *KINDS[:first]))[0]


def _choice_steps(draw: Draw, split: Split) -> Turn:
    """The same with the steps written down, so that a name far behind is looked up more often."""
    turn, kind, name = _kind_of_name(draw, KINDS)
    prompt = turn.prompt.replace(ONLY_THE_LETTER, "Respond with the name, its kind and the letter.")
    reply = f" {name} is {kind}={turn.reply}"
    return Turn(prompt, prompt, reply, reply.strip())


def _kind_of_name(draw: Draw, kinds: Sequence[str]) -> tuple[Turn, str, str]:
    data, right = _data()["choice"], draw.below(len(kinds))
    name = draw.one(data[kinds[right]])
    prompt = choice_prompt(_worded(draw, data["asks"]).format(name=name), kinds, LETTERS)
    return Turn(prompt, prompt, LETTERS[right], LETTERS[right]), kinds[right], name


def _pydoc(draw: Draw, split: Split) -> Turn:
    name, fact = draw.one(list(_data()["pydoc"]["facts"].items()))
    return Turn(name, draw.one(_data()["pydoc"]["asks"]).format(name=name), fact, fact)


class Task(NamedTuple):
    """A task.

    Attributes:
        make: draws one of its turns.
        judge: how a reply is judged.
        share: of the conversations that begin with it, in proportion to those of the other tasks.
    """

    make: Callable[[Draw, Split], Turn]
    judge: str
    share: int


TASKS = {
    "calc": Task(_calc, "number", 8),
    "unit": Task(_unit, "number", 6),
    "date": Task(_date, "exact", 14),
    "identity": Task(_identity, "phrase", 6),
    "count": Task(_count, "exact", 8),
    "repeat": Task(_repeat, "exact", 16),
    "spell": Task(_spell, "exact", 14),
    "spell-new": Task(_spell_new, "exact", 0),
    "choice": Task(_choice, "letter", 7),
    "choice-steps": Task(_choice_steps, "exact", 10),
    "choice-mixed": Task(_choice_mixed, "letter", 0),
    "pydoc": Task(_pydoc, "f1", 1),
    "bigsum": Task(_bigsum, "number", 9),
}
_BAG = [name for name, task in TASKS.items() for _ in range(task.share)]


def _turn(task: str, draw: Draw, split: Split) -> Turn:
    """A turn of a task that is dealt to a split."""
    while True:
        turn = TASKS[task].make(draw, split)
        if _split_of(task, turn.key) == split:
            return turn


def _messages(turns: Sequence[Turn]) -> list[Row]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn.prompt), ("assistant", turn.reply))
    ]


def row(split: Split, seed: int, index: int) -> Row:
    """Conversation `index` of the mixture, a function of the arguments alone.

    A fifth of the conversations are of two or three tasks. Besides, some turns have others that go on from
    them.

    Args:
        split: "train", or "test" for questions that training never shows.
        seed: of the corpus.
        index: 0 or more; there is no last one.

    Returns:
        A row of a chat corpus: messages, id, source.
    """
    draw = Draw("made", split, seed, index)
    bag, tasks = _BAG, list[str]()
    for _ in range(draw.below(2) + 2 if draw.below(5) == 0 else 1):
        tasks.append(draw.one(bag))
        bag = [task for task in bag if task != tasks[-1]]
    turns = [_turn(task, draw, split) for task in tasks]
    messages = _messages([each for turn in turns for each in (turn, *turn.more)])
    source = f"made/{tasks[0]}" if len(tasks) == 1 else "made/several"
    return {"messages": messages, "id": f"{split}-{seed}-{index}", "source": source}


def examples(task: str, split: Split, count: int, seed: int) -> list[Row]:
    """Questions of one task, each with its reply and what judges it.

    Args:
        task: a name of TASKS.
        split: "test" for evaluation, "train" for RL.
        count: how many; no question comes twice, so there may be fewer where the task has no more.
        seed: of the choice.

    Returns:
        Rows of one question and its reply, with task, judge, answer, and letters where that is asked.
    """
    made: dict[str, Row] = {}
    index, last = 0, 0
    while len(made) < count and index - last < TRIES:
        draw = Draw("example", task, split, seed, index)
        turn, index = _turn(task, draw, split), index + 1
        if turn.prompt in made:
            continue
        last = index
        made[turn.prompt] = {
            "messages": _messages([turn]),
            "id": f"{task}-{split}-{seed}-{index - 1}",
            "source": f"made/{task}",
            "task": task,
            "judge": TASKS[task].judge,
            "answer": turn.answer,
            **({"letters": list(LETTERS)} if TASKS[task].judge == "letter" else {}),
        }
    return list(made.values())
