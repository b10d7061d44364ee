"""Wire format of OpenAI's API: a body becomes a checked request, tokens become chunks or one answer. No HTTP.

What a client may send by default is taken; what would change the reply and cannot be done is refused by its
name, and never passed over. A call of the calculator is a part beside the text: `message.parts` of an answer,
`delta.part` of a chunk, and both are taken back in a message.
"""

from __future__ import annotations

import codecs
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nanochat.chat import conversation
from nanochat.chat.conversation import KINDS, Kind, Part
from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.common.typed_json import mismatch, shown
from nanochat.engine import Completion, Sampling
from nanochat.serve.batcher import Token
from nanochat.tokenizer.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as everywhere
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
LARGEST = 2**63 - 1

# Type and bounds of what is done, of either endpoint; null is as good as nothing.
FIELDS: dict[str, tuple[Any, float, float]] = {
    "model": (str, 0, 0),
    "max_tokens": (int, 1, LARGEST),
    "max_completion_tokens": (int, 1, LARGEST),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, LARGEST),
    "best_of": (int, 1, 1),
    "seed": (int, -LARGEST, LARGEST),
    "stop": (str | list[str], 0, 0),
    "stream": (bool, 0, 1),
    "stream_options": (dict[str, bool | None], 0, 0),
}
# What is not done, and what asks for nothing of it; best_of is, too, where it is 1.
NOT_DONE = {
    *("tools", "tool_choice", "functions", "function_call", "response_format", "logprobs", "top_logprobs"),
    *("logit_bias", "frequency_penalty", "presence_penalty", "modalities", "echo", "suffix", "store"),
}
NOTHING: tuple[Any, ...] = (False, 0, "", [], {}, "none", "auto", {"type": "text"}, ["text"])
# What has no bearing on a reply.
IGNORED = {
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}


class ApiError(Exception):
    """A refusal in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Refuse with a status of HTTP.

        Args:
            status: 400 and above.
            message: what was wrong, and what to do.
            param: the field that was wrong.
            code: for programs.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Served:
    """The model that is served.

    Attributes:
        name: of its run.
        tokenizer: its own.
        context: positions T that a prompt and its reply share.
        slots: replies that one request may ask for.
        max_messages: of a conversation.
        created: when it was loaded, in seconds of Unix.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    slots: int
    max_messages: int
    created: int = field(default_factory=lambda: int(time.time()))

    def listed(self) -> dict[str, Any]:
        """The answer of /v1/models."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "nanochat"}
        return {"object": "list", "data": [{**model, "context": self.context}]}


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        is_chat: whether the prompts are conversations, each ending in <|assistant_start|>.
        prompts: their ids; each is shorter than the context.
        n: replies to each.
        sampling: how.
        stop: texts that end a reply, and are not part of it.
        stream: whether chunks are wanted as they come.
        include_usage: whether the last chunk says the usage.
    """

    is_chat: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def read(raw: bytes, served: Served, is_chat: bool) -> Asked:
    """Check a request: a conversation to answer, or texts to continue, each after a BOS.

    Args:
        raw: body of /v1/chat/completions, or of /v1/completions.
        served: the model.
        is_chat: which of them.

    Raises:
        ApiError: the first thing that is wrong, with the field's name.
    """
    name, shape = ("messages", list[Any]) if is_chat else ("prompt", str | list[str])
    body = _checked(raw, served, {**FIELDS, "n": (int, 1, served.slots), name: (shape, 0, 0)})
    if name not in body:
        _refuse(name, f"{name} is missing")
    texts = [body[name]] if is_chat or isinstance(body[name], str) else body[name]
    prompts = [
        _chat_prompt(one, served) if is_chat else served.tokenizer.encode(one, bos=True) for one in texts
    ]
    if not 0 < len(prompts) * body.get("n", 1) <= served.slots:
        _refuse(name, f"prompt and n ask for {len(prompts)} texts, expected 1 to {served.slots} in all")
    for ids in prompts:
        if len(ids) >= served.context:
            what = f"the prompt has {len(ids)} tokens; it and a reply share a context of {served.context}"
            raise ApiError(400, f"{what}. Leave some out.", name, "context_length_exceeded")
    stop = body.get("stop", [])
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in stop):
        _refuse("stop", f"stop takes {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
    longest = body.get("max_tokens", served.context if is_chat else COMPLETION_TOKENS)
    longest = min(body.get("max_completion_tokens", longest), served.context)
    how = body.get("temperature", 1.0), body.get("top_k", 0), body.get("seed", secrets.randbits(31))
    sampling = Sampling(longest, *how, body.get("top_p", 1.0))
    usage = bool(body.get("stream_options", {}).get("include_usage"))
    wanted = tuple(map(tuple, prompts)), body.get("n", 1), sampling, stop
    return Asked(is_chat, *wanted, body.get("stream", False), usage)


def _checked(raw: bytes, served: Served, known: dict[str, tuple[Any, float, float]]) -> dict[str, Any]:
    """The fields of a body that have a bearing and are not null, each of its type and range."""
    try:
        body = typed_json.parse(raw)
    except ValueError as error:
        _refuse(None, f"the body is not JSON ({error})")
    if not isinstance(body, dict):
        _refuse(None, f"the body is {shown(body)}, expected an object")
    body = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name, value in body.items():
        if wrong := _wrong(name, value, known):
            _refuse(name, wrong)
    if body.get("model", served.name) != served.name:
        message = f"there is no model {shown(body['model'])}. This server has {served.name!r}."
        raise ApiError(404, message, "model", "model_not_found")
    return body


def _wrong(name: str, value: Any, known: dict[str, tuple[Any, float, float]]) -> str:
    """What is wrong with a field, in words, or ""."""
    if name in NOT_DONE:
        done = f"{name} is {shown(value)}, which this server cannot do. Leave it out"
        return "" if value in NOTHING else done
    if name not in known:
        return f"{shown(name)} is no field that this server knows. Leave it out"
    shape, least, most = known[name]
    wrong = mismatch(value, shape, name)
    if not wrong and isinstance(value, int | float) and not least <= value <= most:
        return f"{name} is {shown(value)}, expected a number from {least} to {most}"
    return wrong


def _chat_prompt(messages: list[Any], served: Served) -> list[int]:
    """Ids of a conversation and of the start of its reply."""
    if len(messages) > served.max_messages:
        _refuse("messages", f"messages holds {len(messages)}, expected {served.max_messages} at most")
    entries = [_entry(entry, f"messages[{index}]") for index, entry in enumerate(messages)]
    try:
        said = conversation.read_prompt({"messages": entries}, "messages")
        return conversation.prompt(served.tokenizer, said)
    except UserError as error:
        # Its advice is for who reads a corpus.
        what = str(error).removeprefix("messages: ").rpartition(". Correct it")[0] or str(error)
        at = re.match(r"messages[\w.\[\]]*", what)
        _refuse(at[0] if at else "messages", what)


def _refuse(param: str | None, what: str) -> NoReturn:
    raise ApiError(400, f"{what.removesuffix('.')}.", param)


def _entry(entry: Any, name: str) -> Any:
    """A message as `conversation.read_prompt` reads it; its `parts`, as our answers have them, come first."""
    if not isinstance(entry, dict):
        return entry
    fields = ("role", "content", "tool_calls", "tool_call_id")
    kept = {key: entry[key] for key in fields if entry.get(key) is not None}
    kept["content"] = entry["parts"] if entry.get("parts") is not None else entry.get("content")
    if kept.get("role") == "developer":  # the system's newer name
        kept["role"] = "system"
    for index, part in enumerate(kept["content"] if isinstance(kept["content"], list) else ()):
        if isinstance(part, dict) and part.get("type") not in KINDS:
            at = f"{name}.content[{index}]"
            _refuse(at, f"{at}.type is {shown(part.get('type'))}, and this model reads text only")
    return kept


Event = Token | Completion | Exception


class _Choice:
    """One reply as it grows: tokens become text that no stop string can take back, and calls.

    Attributes:
        said: what is certain so far, piece by piece.
        tokens: that were added, without those after a stop string.
        finish: "stop" or "length" once it has ended.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        """Begin an empty reply."""
        self.said: list[Part] = []
        self.tokens = 0
        self.finish: str | None = None
        self._tokenizer, self._stop = tokenizer, stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._kind: Kind = "text"
        self._code: list[int] = []

    def take(self, event: Event) -> list[Part]:
        """Take what the batcher emitted; returns what is certain by it.

        Raises:
            ApiError: the batcher could not go on.
        """
        if isinstance(event, Exception):
            raise ApiError(500, "the model failed at this request. Try it again.") from event
        if isinstance(event, Completion):
            said = [*self._end_of_code(), *self._say(b"", final=True)]
            self.finish = self.finish or ("stop" if event.reason in ("stop", "forbidden") else "length")
        else:
            self.tokens += 1
            said = self._take_token(event)
        self.said += said
        return said

    def _take_token(self, token: Token) -> list[Part]:
        tokenizer = self._tokenizer
        if token.id < tokenizer.bos_id:
            if token.is_text:
                return self._say(tokenizer.decode_bytes([token.id]))
            self._code.append(token.id)
            return []
        # A special token is never shown: as text it would look like a marker.
        said = [*self._end_of_code(), *self._say(b"", final=True)]
        if token.id == tokenizer.special_id("<|python_start|>"):
            self._kind = "python"
        elif token.id == tokenizer.special_id("<|output_start|>"):
            self._kind = "python_output"
        return said

    def _end_of_code(self) -> list[Part]:
        """The expression or output that ends here, if one does."""
        kind, code = self._kind, self._tokenizer.decode(self._code)
        self._kind, self._code = "text", []
        return [] if kind == "text" else [Part(kind, code)]

    def _say(self, said: bytes, final: bool = False) -> list[Part]:
        """Hold these bytes of text, and give out what no stop string can begin in."""
        text = self._held + self._utf8.decode(said, final)
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.finish, end = "stop", min(found)
        else:
            sizes = (
                size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])
            )
            end = len(text) - (0 if final else max(sizes, default=0))
        self._held = text[end:]
        return [Part("text", text[:end])] if end else []


class Reply:
    """The answer to one request, from its first event to its last.

    Attributes:
        choices: replies; those of one prompt are side by side.
    """

    def __init__(self, asked: Asked, served: Served) -> None:
        """Begin an answer without a token."""
        self.asked = asked
        count = len(asked.prompts) * asked.n
        self.choices = [_Choice(served.tokenizer, asked.stop) for _ in range(count)]
        self._head = {
            "id": ("chatcmpl-" if asked.is_chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if asked.is_chat else "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish for choice in self.choices)

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token: the role of each message."""
        indices = range(len(self.choices) if self.asked.is_chat else 0)
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in indices]

    def take(self, events: Iterable[tuple[int, Event]]) -> list[dict[str, Any]]:
        """Take events by the index of their choice; returns the chunks that they make.

        Raises:
            ApiError: the batcher could not go on with one of them.
        """
        fresh: dict[int, list[Part]] = {}
        for index, event in events:
            if not self.choices[index].finish:  # what comes after a stop string is not wanted
                fresh.setdefault(index, []).extend(self.choices[index].take(event))
        chunks = []
        for index, parts in fresh.items():
            for part in conversation.joined(parts):
                is_text = part.kind == "text"
                chunks.append(
                    self._chunk(index, {"content": part.text} if is_text else {"part": _written(part)})
                )
            if finish := self.choices[index].finish:
                chunks.append(self._chunk(index, {}, finish))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """Chunks after the last choice has ended: the usage, where it was asked for."""
        return [{**self._chunk(0, {}), "choices": [], "usage": self.usage()}] * self.asked.include_usage

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        is_chat = self.asked.is_chat
        said = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        kind = {"object": "chat.completion.chunk"} if is_chat else {}
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self._head, **kind, "choices": [choice], **usage}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, choice in enumerate(self.choices):
            parts = conversation.joined(choice.said)
            text = "".join(part.text for part in parts if part.kind == "text")
            message = {"role": "assistant", "content": text, "parts": [_written(part) for part in parts]}
            said = {"message": message} if self.asked.is_chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": choice.finish})
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of the replies."""
        prompt = sum(map(len, self.asked.prompts))
        added = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": added, "total_tokens": prompt + added}


def _written(part: Part) -> dict[str, str]:
    return {"type": part.kind, "text": part.text}
