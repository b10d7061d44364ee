"""Conversations: read from JSON, rendered to ids with their loss mask, and replies read back from ids.

One conversation is `<|bos|> (<|user_start|> TEXT <|user_end|> <|assistant_start|> REPLY <|assistant_end|>)*`
with nothing between the pieces. A system text stands before the first user text. Every text is encoded by
itself as plain text, so one that spells a special token stays text. The loss is taken over what the model
says: text, code with both its markers, and `<|assistant_end|>`; never over the output of a tool.

Pure (no torch): data, training, evaluation and the terminal share this one format.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.common.typed_json import mismatch, shown
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer

Role = Literal["system", "user", "assistant"]
Kind = Literal["text", "python", "python_output"]

KINDS = ("text", "python", "python_output")
TOOL = "calculator"  # the one function that a tool call may name
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of the roles
NEXT: dict[str, tuple[str, ...]] = {  # which roles may follow one; "" is the beginning
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),  # an assistant's message whose calls have no result yet
    "result": ("assistant", "user"),
}

# Codes of a layout: a special token is 2 * id + supervised, a text one of these two.
PLAIN_TEXT, SUPERVISED_TEXT = -2, -1
_Marks = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """A piece of a message.

    Attributes:
        kind: "text", "python" (an expression for the tool) or "python_output" (what the tool answered).
        text: its text, without markers.
    """

    kind: Kind
    text: str


@dataclass(frozen=True)
class Message:
    """What one role says in a turn.

    Attributes:
        role: "system" (only first), "user" or "assistant".
        parts: of kind "text" for system and user; no two texts in a row and no empty text, as `read` gives
            them, so that a reply has one way to be written.
    """

    role: Role
    parts: tuple[Part, ...]


Conversation = tuple[Message, ...]


class Rendered(NamedTuple):
    """Conversations as tokens, end to end.

    Attributes:
        ids: (N,) int32 token ids; each conversation starts with BOS.
        supervised: (N,) bool, True where the loss is taken.
        offsets: (n + 1,) int64; conversation i is ids[offsets[i] : offsets[i + 1]].
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]


class _PartFields(TypedDict):
    type: str
    text: str


class _Function(TypedDict):
    name: str
    arguments: str | dict[str, Any]


class _Call(TypedDict):
    function: _Function


class _Arguments(TypedDict):
    expression: str


class _Known(TypedDict, total=False):
    """What a row, a message and a tool call may have, with the same meaning and type in each."""

    id: str | int | None
    source: str | None
    tool_call_id: str | int | None
    messages: list[Any]
    conversations: list[Any]


def read(row: object, where: str) -> Conversation:
    """Read a conversation to train on: one that ends with a reply, and supervises some text or code.

    `messages` of `role` and `content` are read, with parts or OpenAI's `tool_calls` of the calculator, and
    ShareGPT's `conversations` of `from` and `value`. Texts may be empty, as long as one reply is not.

    Args:
        row: a line of a corpus, as JSON gives it.
        where: file and line, for the message.

    Raises:
        UserError: it is none; the message names file, line and key.
    """
    conversation = read_prompt(row, where)
    if conversation[-1].role != "assistant":
        _refuse(where, "the last message is the user's, expected a reply of the assistant")
    said = (part.kind for message in conversation if message.role == "assistant" for part in message.parts)
    if all(kind == "python_output" for kind in said):
        _refuse(where, "the replies hold no text and no code, so there is nothing to train on")
    return conversation


def read_prompt(row: object, where: str) -> Conversation:
    """Read a conversation that may end with the user's message; otherwise as `read`."""
    _require(row, _Known, "the line" if not isinstance(row, dict) else "", where)
    fields = cast(dict[str, Any], row)
    key = "messages" if "messages" in fields else "conversations"
    if key not in fields:
        _refuse(where, "messages is missing")
    reader = _Reader(where)
    for index, entry in enumerate(fields[key]):
        reader.add(entry, f"{key}[{index}]")
    if reader.calls:
        _refuse(where, f"{key} ends with a tool call, expected its result in a message of the role tool")
    if all(role == "system" for role, _ in reader.turns):
        _refuse(where, f"{key} holds no message of the user")
    return tuple(Message(role, joined(parts)) for role, parts in reader.turns)


class _Reader:
    """Messages as they stand in a file, one after another, become turns.

    A message with tool calls, the results in messages of the role tool, and the assistant's message after
    them are one turn of ours.

    Attributes:
        turns: role and parts of each turn.
        calls: the expressions that wait for their results, by the id of the call.
    """

    def __init__(self, where: str) -> None:
        """Begin a conversation that stands at `where`."""
        self.where = where
        self.turns: list[tuple[Role, list[Part]]] = []
        self.calls: dict[str, str] = {}
        self._last = ""

    def add(self, entry: dict[str, Any], name: str) -> None:
        """Take the message called `name`.

        Raises:
            UserError: a role that may not stand here, or a content that cannot be used.
        """
        _require(entry, dict, name, self.where)
        key, allowed = "from" if "from" in entry else "role", NEXT[self._last]
        given = entry.get(key)
        role = SHAREGPT.get(given, given) if isinstance(given, str) else ""
        if role not in allowed:
            _refuse(self.where, f"{name}.{key} is {shown(given)}, expected {' or '.join(allowed)}")
        parts = self._parts(entry, name, role)
        if role == "tool":
            self._add_result(entry, name, "".join(part.text for part in parts))
            return
        if self._last != "result" or role == "user":
            self.turns.append((cast(Role, role), []))
        self.turns[-1][1].extend(parts)
        self._last = role
        if role == "assistant" and entry.get("tool_calls"):
            self._add_calls(entry["tool_calls"], f"{name}.tool_calls")
            self._last = "call"

    def _parts(self, entry: dict[str, Any], name: str, role: str) -> list[Part]:
        """The parts of a message's content; a text is one part."""
        key = "value" if "from" in entry else "content"
        content, name = entry.get(key), f"{name}.{key}"
        if content is None and role == "assistant" and entry.get("tool_calls"):
            return []
        if isinstance(content, str):
            return [Part("text", self._text(content, name))]
        _require(content, str | list[_PartFields], name, self.where)
        kinds = KINDS if role == "assistant" else KINDS[:1]
        parts = []
        for index, part in enumerate(cast(list[dict[str, Any]], content)):
            if (kind := part["type"]) not in kinds:
                at = f"{name}[{index}].type"
                _refuse(self.where, f"{at} is {shown(kind)}, expected {' or '.join(kinds)}")
            parts.append(Part(kind, self._text(part["text"], f"{name}[{index}].text")))
        return parts

    def _text(self, text: str, name: str) -> str:
        """A text that can be encoded."""
        try:
            text.encode()
        except UnicodeEncodeError:
            _refuse(self.where, f"{name} holds half of a surrogate pair, expected valid Unicode")
        return text

    def _add_calls(self, calls: list[dict[str, Any]], name: str) -> None:
        _require(calls, list[_Call], name, self.where)
        _require(calls, list[_Known], name, self.where)
        for index, call in enumerate(calls):
            at, function = f"{name}[{index}].function", call["function"]
            if function["name"] != TOOL:
                _refuse(self.where, f"{at}.name is {shown(function['name'])}, expected {TOOL!r}")
            at, arguments = f"{at}.arguments", function["arguments"]
            try:
                arguments = typed_json.parse(arguments) if isinstance(arguments, str) else arguments
            except ValueError as error:
                _refuse(self.where, f"{at} is not JSON ({error})")
            _require(arguments, _Arguments, at, self.where)
            key = _id(call, "id") or str(index)
            if key in self.calls:
                _refuse(self.where, f"{name}[{index}].id is {shown(key)}, as that of another call")
            self.calls[key] = self._text(arguments["expression"], f"{at}.expression")

    def _add_result(self, entry: dict[str, Any], name: str, output: str) -> None:
        _require(entry, _Known, name, self.where)
        key = _id(entry, "tool_call_id") or next(iter(self.calls))
        if key not in self.calls:
            at = f"{name}.tool_call_id is {shown(key)}"
            _refuse(self.where, f"{at}, expected the id of a call that has no result yet")
        self.turns[-1][1].extend((Part("python", self.calls.pop(key)), Part("python_output", output)))
        self._last = "call" if self.calls else "result"


def _id(fields: dict[str, Any], name: str) -> str:
    """An id as a text, however it is written; empty where there is none."""
    return "" if fields.get(name) is None else str(fields[name])


def _require(value: object, shape: Any, name: str, where: str) -> None:
    if wrong := mismatch(value, shape, name):
        _refuse(where, wrong)


def _refuse(where: str, what: str) -> NoReturn:
    raise UserError(f"{where}: {what}. Correct it, or leave such lines out with chat_data --skip-bad.")


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The same parts with texts that follow one another as one, and without empty texts."""
    whole: list[Part] = []
    for part in parts:
        if part.kind == "text" and whole and whole[-1].kind == "text":
            whole.append(Part("text", whole.pop().text + part.text))
        elif part.kind != "text" or part.text:
            whole.append(part)
    return tuple(whole)


def render(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> Rendered:
    """Encode conversations in one batch; every reply is supervised.

    Raises:
        UserError: a text holds lone surrogates.
    """
    codes: list[int] = []
    texts: list[str] = []
    marks, ends = _marks(tokenizer), [0]
    for conversation in conversations:
        _lay_out(conversation, marks, codes, texts)
        ends.append(len(codes))
    encoded, offsets = tokenizer.encode_batch(texts)
    code = np.array(codes, np.int64)
    is_text, lengths = code < 0, np.ones(len(codes), np.int64)
    lengths[is_text] = np.diff(offsets)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.repeat((code >> 1).astype(np.int32), lengths)
    ids[np.repeat(is_text, lengths)] = encoded
    return Rendered(ids, np.repeat((code & 1).astype(np.bool_), lengths), starts[ends])


def prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids that a reply continues: the conversation, which ends with the user's message, and assistant_start.

    Raises:
        UserError: it does not end with the user's message, or a text holds lone surrogates.
    """
    if not conversation or conversation[-1].role != "user":
        raise UserError("the last message is not the user's, so there is nothing to answer. Add a message.")
    return [*render(tokenizer, [conversation]).ids.tolist(), tokenizer.special_id("<|assistant_start|>")]


def fit(tokenizer: Tokenizer, conversation: Conversation, room: int) -> tuple[Conversation, int]:
    """Drop the oldest whole turns until the prompt has at most `room` tokens; the system text stays.

    Args:
        tokenizer: of the model.
        conversation: one that ends with the user's message.
        room: tokens that the prompt may have.

    Returns:
        What is left, and how many turns went.

    Raises:
        UserError: the last message alone does not fit.
    """
    turns = [index for index, message in enumerate(conversation) if message.role == "user"]
    system = conversation[: turns[0]]

    def fits(dropped: int) -> bool:
        return len(prompt(tokenizer, system + conversation[turns[dropped] :])) <= room

    dropped = bisect.bisect_left(range(len(turns)), True, key=fits)
    if dropped == len(turns):
        raise UserError(f"the last message takes more than the {room} tokens that are free. Shorten it.")
    return system + conversation[turns[dropped] :], dropped


def parts_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Part, ...]:
    """Parts of a reply, whatever ids it consists of; where they are canonical, `render` gives them again.

    Code without its end is code; a special token that does not belong there separates and is left out, for
    as text it would look like a marker.

    Args:
        tokenizer: of the model.
        ids: those after assistant_start, without assistant_end.
    """
    kinds: dict[int, Kind] = {
        tokenizer.special_id("<|python_start|>"): "python",
        tokenizer.special_id("<|output_start|>"): "python_output",
    }
    runs: list[tuple[Kind, list[int]]] = [("text", [])]
    for token in ids:
        if 0 <= token < tokenizer.bos_id:
            runs[-1][1].append(token)
        else:
            runs.append((kinds.get(token, "text"), []))
    return joined(Part(kind, tokenizer.decode(run)) for kind, run in runs)


def _marks(tokenizer: Tokenizer) -> _Marks:
    """Codes of everything that a conversation is made of, by what it is."""
    code = {name: 2 * tokenizer.special_id(name) for name in SPECIALS}
    return {
        "bos": (code["<|bos|>"],),
        "user": (code["<|user_start|>"], PLAIN_TEXT, code["<|user_end|>"]),
        "assistant_start": (code["<|assistant_start|>"],),
        "text": (SUPERVISED_TEXT,),
        "python": (code["<|python_start|>"] + 1, SUPERVISED_TEXT, code["<|python_end|>"] + 1),
        "python_output": (code["<|output_start|>"], PLAIN_TEXT, code["<|output_end|>"]),
        "assistant_end": (code["<|assistant_end|>"] + 1,),
    }


def _lay_out(conversation: Conversation, marks: _Marks, codes: list[int], texts: list[str]) -> None:
    """Append a conversation's codes, and the text of each code that stands for one."""
    before = ""
    codes += marks["bos"]
    for message in conversation:
        if message.role == "assistant":
            codes += marks["assistant_start"]
            for part in message.parts:
                codes += marks[part.kind]
                texts.append(part.text)
            codes += marks["assistant_end"]
            continue
        text = "".join(part.text for part in message.parts)
        if message.role == "system":
            before = text + "\n\n"
        else:
            codes += marks["user"]
            texts.append(before + text)
            before = ""
