"""Scores continuations: shared prefixes are read once (KV cache), the LM head sees scored positions only.

Of a prompt of CORE a few tokens are scored and hundreds are read, most of them the same for several options.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanochat.engine import KVCache
from nanochat.evaluation.core import batching
from nanochat.evaluation.core.batching import Ids, PrefixGroup, Span
from nanochat.model import loss
from nanochat.model.gpt import GPT

# A forward pass costs its tokens and this many more. CPU: 2 ms at depth 4, 20,000 tokens/s. Others: launches.
OVERHEAD_TOKENS = {"cpu": 48}
LAUNCH_TOKENS = 8192
# Most positions of a pass where activations should stay in cache. One core, bf16, depth 4, 264,000 tokens:
# 21.6 s with 1024, 18.9 with 2048, 18.4 with 4096, 19.5 with 8192.
CACHE_TOKENS = {"cpu": 4096}
# karpathy/nanochat makes rotary tables of so many contexts, and crops no prompt of CORE to fewer positions.
ROTARY_CONTEXTS = 10

PARTS = ("reading", "rendering", "tokenizing", "batching", "forward", "scoring")


class Scorer(Protocol):
    """A causal language model, as CORE uses it.

    Attributes:
        device: where it computes.
        context_tokens: length it was trained for.
        longest_tokens: longest row it can read.
    """

    device: torch.device
    context_tokens: int
    longest_tokens: int

    def room(self, tokens: int) -> AbstractContextManager[None]:
        """Within, rows of so many tokens can be read."""

    def read(self, ids: Tensor, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, C): what `losses` takes.

        Args:
            ids: the rows.
            prefix: (F, L) tokens that are read once, and (B,) which of them each row goes on from.
        """

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """(N, C), (N,) -> losses in nats and, with_argmax, whether the target is the likeliest token."""

    def flops(self, tokens: int, outputs: int) -> float:
        """Operations of the matrix products: of so many positions read, and so many through the head."""


class GPTScorer:
    """Our own model. Rotary positions go on beyond its context; attention windows are those of training."""

    def __init__(self, model: GPT) -> None:
        self.model, self.device = model, model.head.weight.device
        self.context_tokens = model.config.sequence_len
        self.longest_tokens = ROTARY_CONTEXTS * self.context_tokens

    @contextmanager
    def room(self, tokens: int) -> Iterator[None]:
        """Longer rotary tables; a model in training gets its own back, as its compiled step knows them."""
        model = self.model
        kept = model.cos, model.sin, model.block_masks
        if tokens > model.cos.size(0):
            model.reserve_positions(tokens)
        try:
            yield
        finally:
            model.cos, model.sin, model.block_masks = kept

    def read(self, ids: Tensor, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Hidden states after the final norm."""
        model, cache = self.model, None
        if prefix is not None:
            shared, rows = prefix
            cache = KVCache(model, len(shared), shared.size(1) + ids.size(1))
            model(shared, cache)
            cache.take_rows(rows)
        hidden: Tensor = model(ids, cache)
        return hidden

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """Losses of the softcapped head."""
        config, head = self.model.config, self.model.head.weight
        return loss.token_losses(
            hidden, head, targets, config.softcap, vocab_size=config.vocab_size, with_argmax=with_argmax
        )

    def flops(self, tokens: int, outputs: int) -> float:
        """Two operations a weight."""
        config = self.model.config
        matrices = [*self.model.blocks.parameters(), self.model.smear_gate.weight]
        weights = sum(parameter.numel() for parameter in matrices)
        return 2.0 * (tokens * weights + outputs * config.n_embd * config.vocab_size)


@dataclass
class Clock:
    """Where the seconds of an evaluation went, on this rank.

    Attributes:
        seconds: by part.
        tokens: positions computed, padding included.
        outputs: those of them that went through the head.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    tokens: int = 0
    outputs: int = 0

    def add(self, part: str, since: float) -> float:
        """Count the time since `since` for a part; returns now."""
        now = time.perf_counter()
        self.seconds[part] += now - since
        return now


def score_spans(
    model: Scorer, spans: Sequence[Span], batch_tokens: int, *, with_argmax: bool, clock: Clock
) -> list[tuple[float, bool]]:
    """Mean loss and "every token is the likeliest" of each span, in the order given.

    Args:
        model: the model.
        spans: what to score; the loss of an empty one is NaN.
        batch_tokens: most positions in a forward pass of several rows, padding included.
        with_argmax: whether the second of each pair is needed; without it, it is False.
        clock: counts the seconds.
    """
    started = time.perf_counter()
    # Options with the same tokens are scored once, so that they tie exactly whatever batch they fall in.
    keys = [(span.ids.tobytes(), span.start) for span in spans]
    distinct = {key: span for key, span in zip(keys, spans, strict=True) if span.start < len(span.ids)}
    overhead = OVERHEAD_TOKENS.get(model.device.type, LAUNCH_TOKENS)
    batch_tokens = min(batch_tokens, CACHE_TOKENS.get(model.device.type, batch_tokens))
    groups = batching.prefix_groups(batching.rows_of([*distinct.values()]), overhead, batch_tokens)
    plan = batching.batches(groups, overhead, batch_tokens)
    clock.add("batching", started)
    scored: dict[Span, tuple[float, bool]] = {}
    for batch in plan:
        scored |= _score_batch(model, batch, with_argmax, clock)
    return [scored[distinct[key]] if key in distinct else (math.nan, True) for key in keys]


@torch.no_grad()
def _score_batch(
    model: Scorer, batch: Sequence[PrefixGroup], with_argmax: bool, clock: Clock
) -> dict[Span, tuple[float, bool]]:
    started = time.perf_counter()
    shared = min(group.shared for group in batch)
    rows = [row for group in batch for row in group.rows]
    ids = _padded([row.ids[shared:] for row in rows]).to(model.device)
    prefix = None
    if shared:
        group_of_row = [number for number, group in enumerate(batch) for _ in group.rows]
        heads = _padded([group.rows[0].ids[:shared] for group in batch])
        prefix = heads.to(model.device), torch.tensor(group_of_row, device=model.device)
    hidden = model.read(ids, prefix)
    spans = [span for row in rows for span in row.spans]
    sizes = [len(span.ids) - span.start for span in spans]
    row_of_span = [number for number, row in enumerate(rows) for _ in row.spans]
    # The output at a token predicts the next one.
    positions = np.concatenate([np.arange(span.start - 1, len(span.ids) - 1) for span in spans]) - shared
    targets = np.concatenate([span.ids[span.start :] for span in spans]).astype(np.int64)
    row, position, target = (
        torch.from_numpy(array).to(model.device)
        for array in (np.repeat(row_of_span, sizes), positions, targets)
    )
    picked = hidden[row, position]
    clock.tokens += ids.numel() + shared * len(batch)
    clock.outputs += len(targets)
    started = clock.add("forward", started)
    losses, hits = model.losses(picked, target, with_argmax=with_argmax)
    nats, likeliest = losses.float().cpu(), hits.cpu()
    results = {
        span: (part.mean().item(), bool(hit.all()))
        for span, part, hit in zip(
            spans, torch.split(nats, sizes), torch.split(likeliest, sizes), strict=True
        )
    }
    clock.add("scoring", started)
    return results


def _padded(rows: Sequence[Ids]) -> Tensor:
    """Rows of different lengths as (B, T) int64, zeros at the right, where a causal model cannot see them."""
    return pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
