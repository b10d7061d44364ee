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

from nanochat.evaluation.core import batching
from nanochat.evaluation.core.batching import Ids, PrefixGroup, Span
from nanochat.model import loss
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache

# A forward pass costs its tokens and this many more. CPU: 2 ms at depth 4, 20,000 tokens/s. A GPU waits while
# the launches of a pass are made: at 8 us an operator that is the time of 1,000 tokens at depth 24 and of
# 10,000 at depth 4 (an estimate for an H100, not a measurement). A guess will do: with made-up prompts the
# batches for 4,096 cost at most 9 % more than those for the true number. Nothing is measured at the start,
# because then the batches, and with them the last digits of a score, would depend on a clock.
OVERHEAD_TOKENS = {"cpu": 48}
LAUNCH_TOKENS = 4096
# Most positions of a pass, where fewer than are asked for are better: on a CPU activations should stay in
# cache (one core, bf16, depth 4, 264,000 tokens: 21.6 s with 1024, 18.9 with 2048, 18.4 with 4096, 19.5 with
# 8192), a Mac has little memory.
MOST_TOKENS = {"cpu": 4096, "mps": 16384}
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
        config, head = self.model.config, self.model.head
        return loss.token_losses(
            hidden,
            head.weight,
            targets,
            config.softcap,
            vocab_size=config.vocab_size,
            with_argmax=with_argmax,
            cast=head.working(hidden.dtype),
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

    A GPU computes while this program goes on: there "forward" is the time of launching, and the wait for what
    was launched is in "scoring". Their sum is the time of the model on any device.

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

    All batches are launched before the first result is read, so that a GPU never waits for the next of them.

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
    batch_tokens = min(batch_tokens, MOST_TOKENS.get(model.device.type, batch_tokens))
    groups = batching.prefix_groups(batching.rows_of([*distinct.values()]), overhead, batch_tokens)
    plan = batching.batches(groups, overhead, batch_tokens)
    clock.add("batching", started)
    launched = [_launch(model, batch, with_argmax, clock) for batch in plan]
    started = time.perf_counter()
    scored = _read(launched)
    clock.add("scoring", started)
    return [scored[distinct[key]] if key in distinct else (math.nan, True) for key in keys]


@torch.no_grad()
def _launch(
    model: Scorer, batch: Sequence[PrefixGroup], with_argmax: bool, clock: Clock
) -> tuple[list[Span], Tensor]:
    """Start the forward pass of a batch; waits for nothing.

    Returns:
        Its spans; (2, N) fp32 on the device, for each of their scored tokens in turn the loss in nats, and 1
        where the token is the likeliest.
    """
    started = time.perf_counter()
    shared = min(group.shared for group in batch)
    rows = [row for group in batch for row in group.rows]
    spans = [span for row in rows for span in row.spans]
    # The output at a token predicts the next one.
    positions = np.concatenate([np.arange(span.start - 1, len(span.ids) - 1) for span in spans]) - shared
    targets = np.concatenate([span.ids[span.start :] for span in spans]).astype(np.int64)
    row_of_span = [number for number, row in enumerate(rows) for _ in row.spans]
    inputs = [_padded([row.ids[shared:] for row in rows])]
    inputs += map(torch.from_numpy, (np.repeat(row_of_span, _sizes(spans)), positions, targets))
    if shared:
        group_of_row = [number for number, group in enumerate(batch) for _ in group.rows]
        inputs += [_padded([group.rows[0].ids[:shared] for group in batch]), torch.tensor(group_of_row)]
    ids, row, position, target, *prefix = _moved(inputs, model.device)
    hidden = model.read(ids, (prefix[0], prefix[1]) if shared else None)
    picked = hidden[row, position]
    clock.tokens += ids.numel() + shared * len(batch)
    clock.outputs += len(targets)
    started = clock.add("forward", started)
    losses, hits = model.losses(picked, target, with_argmax=with_argmax)
    values = torch.stack((losses.float(), hits.float()))
    clock.add("scoring", started)
    return spans, values


def _read(launched: Sequence[tuple[list[Span], Tensor]]) -> dict[Span, tuple[float, bool]]:
    """Mean loss of each span and whether all of it is the likeliest: one wait for all batches."""
    if not launched:
        return {}
    spans = [span for batch, _ in launched for span in batch]
    sizes = _sizes(spans)
    nats, likeliest = torch.cat([values for _, values in launched], dim=1).cpu()
    parts = zip(spans, torch.split(nats, sizes), torch.split(likeliest, sizes), strict=True)
    return {span: (losses.mean().item(), bool(hits.all())) for span, losses, hits in parts}


def _sizes(spans: Sequence[Span]) -> list[int]:
    """Scored tokens of each span."""
    return [len(span.ids) - span.start for span in spans]


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of int64 on the device, in one copy, for which nobody waits."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _padded(rows: Sequence[Ids]) -> Tensor:
    """Rows of different lengths as (B, T) int64, zeros at the right, where a causal model cannot see them."""
    return pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
