"""Replies of a model: to many prompts at once, or in a session whose cache is kept over the turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from nanochat.chat.tools import DRAWN_SPECIALS, ToolCalls
from nanochat.engine import Completion, Engine, Sampling, Steering
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer

Reply = Completion


class ReplyEngine:
    """Replies to prompts with a model."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Hold a model and its tokenizer."""
        self._engine = Engine(model, tokenizer)

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
        steering = _steering(self._engine, tools, constrained)
        for index, reply in self._engine.completions(
            prompts, sampling, num_samples, steering=steering, names=names
        ):
            done[index].append(reply)
        return done


def _steering(engine: Engine, tools: bool, constrained: bool) -> Steering:
    """Rules of replies; their masks, (modes, 9), if what may not come is not to be drawn."""
    masks = None
    if constrained:
        allowed = torch.tensor([[name in drawn for name in SPECIALS] for drawn in DRAWN_SPECIALS])
        masks = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        masks = masks.to(engine.model.head.weight.device)
    return Steering(partial(ToolCalls, engine.tokenizer, tools), masks)
