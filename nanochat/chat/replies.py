"""Replies of a model: to many prompts at once, or in a session that keeps its cache over the turns."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from nanochat import engine
from nanochat.chat import conversation
from nanochat.chat.conversation import Conversation
from nanochat.chat.tools import DRAWN_SPECIALS, ToolCalls
from nanochat.engine import Engine, Sampling, Steering
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer

Reply = engine.Completion
Reason = engine.Reason


class ToolCall(NamedTuple):
    """An expression that the model had computed, and what came out."""

    expression: str
    result: str


class ReplyEngine:
    """Replies to prompts with a model."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Hold a model and its tokenizer."""
        self.model, self.tokenizer = model, tokenizer

    def replies(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_samples: int = 1,
        *,
        tools: bool = True,
        constrained: bool = True,
        names: Sequence[object] | None = None,
    ) -> list[list[Reply]]:
        """Reply to each prompt `num_samples` times.

        Args:
            prompts: ids that end in <|assistant_start|>, of any lengths.
            sampling: how; the seed gives each prompt and sample a generator of its own.
            num_samples: replies to each prompt, 1 or more.
            tools: whether the calculator may be called.
            constrained: never draw a special token that may not come; else such a token ends the reply with
                the reason "forbidden", and what is drawn has the model's own probabilities.
            names: of the prompts; what a prompt draws depends on its name. By default its index.

        Returns:
            A list for each prompt, in order, of its replies.

        Raises:
            UserError: an empty prompt, one longer than the context, or an id outside the vocabulary.
        """
        done: list[list[Reply]] = [[] for _ in prompts]
        rules = partial(ToolCalls, self.tokenizer, tools)
        steering = Steering(rules, masks(self.model) if constrained else None)
        replies = Engine(self.model, self.tokenizer).completions(
            prompts, sampling, num_samples, steering=steering, names=names
        )
        for index, reply in replies:
            done[index].append(reply)
        return done


class ChatSession:
    """Replies in one conversation after another, of which only what is new goes through the model."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Begin with an empty cache for the whole context of the model."""
        self._engine = Engine(model, tokenizer)
        self._cache = KVCache(model, 1, model.config.sequence_len)
        self._ids: list[int] = []  # those in the cache and perhaps some after them

    def say(self, asked: Conversation, sampling: Sampling, *, tools: bool = True) -> Iterator[str | ToolCall]:
        """Reply to a conversation, piece by piece: texts of whole characters, and calls once computed.

        The caller may stop at any piece; what was computed until then serves the next reply.

        Args:
            asked: ends with the user's message.
            sampling: how.
            tools: whether the calculator may be called.

        Raises:
            UserError: at the first piece: the prompt is longer than the context.
        """
        tokenizer = self._engine.tokenizer
        prompt = conversation.prompt(tokenizer, asked)
        self._engine.check(prompt)
        # The last token of the prompt is read in any case: its logits are what the reply begins with.
        cached = self._ids[: self._cache.length]
        pairs = zip(cached, prompt[:-1], strict=False)
        self._cache.length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._ids = list(prompt)
        calls = ToolCalls(tokenizer, tools)
        steering = Steering(lambda: calls, masks(self._engine.model))
        text = codecs.getincrementaldecoder("utf-8")("replace")
        made = 0
        for _, step in self._engine.decode([prompt], [(0, 0)], sampling, steering, cache=self._cache):
            said = b""
            if isinstance(step, int):
                self._ids.append(step)
                said = tokenizer.decode_bytes([step]) if calls.is_text else b""
            if piece := text.decode(said, final=not said):
                yield piece
            if len(calls.calls) > made:
                yield ToolCall(*calls.calls[made])
                made += 1


def masks(model: GPT) -> torch.Tensor:
    """What keeps a reply from drawing special tokens that may not come, (modes, 9) fp32."""
    allowed = torch.tensor([[name in drawn for name in SPECIALS] for drawn in DRAWN_SPECIALS])
    forbidden = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    return forbidden.to(model.head.weight.device)
