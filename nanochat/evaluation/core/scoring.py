"""Losses of spans of tokens: what rows share computed once, the output head only where it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.engine import KVCache
from nanochat.evaluation.core import batching
from nanochat.evaluation.core.batching import Inputs, PrefixGroup, Span
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


class Scorer(Protocol):
    """A causal language model, as CORE uses it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def context_tokens(self) -> int:
        """Length it was trained for."""
        ...

    @property
    def longest_tokens(self) -> int:
        """Longest row it can read."""
        ...

    def room(self, tokens: int) -> AbstractContextManager[None]:
        """Within, rows of so many tokens can be read."""
        ...

    def read(self, ids: Tensor, first: int) -> Tensor:
        """(B, T) int64 -> (B, T - first, C): what `losses` takes, from position `first` on."""
        ...

    def read_on(self, shared: Tensor, rows: Tensor, ids: Tensor, first: int) -> Tensor:
        """Outputs of ids[:, first:], (R, T) that follow shared (F, L): row i goes on from shared[rows[i]]."""
        ...

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """(N, C), (N,) -> losses in nats and, if asked, whether the target is the likeliest token."""
        ...

    def flops(self, tokens: int, finished: int, outputs: int) -> float:
        """Operations of the products with weights.

        Args:
            tokens: positions read.
            finished: those of them that the last layer was computed for.
            outputs: those of them that went through the head.
        """
        ...


@dataclass(frozen=True)
class GPTScorer:
    """Our own model as a Scorer."""

    model: GPT

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.head.weight.device

    @property
    def context_tokens(self) -> int:
        """Length it was trained for."""
        return self.model.config.sequence_len

    @property
    def longest_tokens(self) -> int:
        """Rotary positions go on beyond the context, and attention windows stay as they were trained."""
        return ROTARY_CONTEXTS * self.context_tokens

    @contextmanager
    def room(self, tokens: int) -> Iterator[None]:
        """Longer rotary tables; a model in training gets its own back, as its compiled step knows them."""
        model = self.model
        own = model.cos, model.sin, model.block_masks
        if tokens > model.cos.size(0):
            model.reserve_positions(tokens)
        try:
            yield
        finally:
            model.cos, model.sin, model.block_masks = own

    def read(self, ids: Tensor, first: int) -> Tensor:
        """Hidden states after the final norm."""
        hidden: Tensor = self.model(ids, first=first)
        return hidden

    def read_on(self, shared: Tensor, rows: Tensor, ids: Tensor, first: int) -> Tensor:
        """Hidden states of rows behind a cache."""
        groups, length = shared.shape
        cache = KVCache(
            self.model.config, groups, length + ids.size(1), dtype=self.model.dtype, device=self.device
        )
        self.model(shared, cache, first=length - 1)  # nothing is asked of what is shared
        cache.take_rows(rows)
        hidden: Tensor = self.model(ids, cache, first=first)
        return hidden

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """Losses of the softcapped head."""
        config = self.model.config
        return loss.token_losses(
            hidden,
            self.model.head.weight,
            targets,
            config.softcap,
            vocab_size=config.vocab_size,
            with_argmax=with_argmax,
        )

    def flops(self, tokens: int, finished: int, outputs: int) -> float:
        """Two operations a weight."""
        config = self.model.config
        matrices = [*self.model.blocks.parameters(), self.model.smear_gate.weight]
        weights = sum(parameter.numel() for parameter in matrices)
        last = f"blocks.{config.n_layer - 1}"
        names = (f"{last}.{name}.weight" for name in ("attn.q", "attn.out", "mlp.up", "mlp.down"))
        late = sum(self.model.get_parameter(name).numel() for name in names)
        head = config.n_embd * config.vocab_size
        return 2.0 * (tokens * (weights - late) + finished * late + outputs * head)


@dataclass
class Clock:
    """Where the seconds of an evaluation went, on this rank."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("reading", "rendering", "tokenizing", "batching", "forward", "scoring"), 0.0
        )
    )
    tokens: int = 0  # positions computed, padding included
    finished: int = 0  # those of them that the last layer was computed for
    outputs: int = 0  # those that went through the head

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
        with_argmax: whether the second of each pair is asked; without it, it is False.
        clock: told where the time goes.
    """
    started = time.perf_counter()
    # Options with the same tokens are scored once, so that they tie exactly whatever batch they fall in.
    keys = [(span.ids.tobytes(), span.start) for span in spans]
    distinct = {key: span for key, span in zip(keys, spans, strict=True) if span.end > span.start}
    inputs = Inputs.of(list(distinct.values()))
    wanted: list[list[int]] = [[] for _ in inputs.ids]
    for place, number in enumerate(inputs.of_span):
        wanted[number].append(place)
    overhead = OVERHEAD_TOKENS.get(model.device.type, LAUNCH_TOKENS)
    batch_tokens = min(batch_tokens, CACHE_TOKENS.get(model.device.type, batch_tokens))
    found = batching.prefix_groups(inputs, overhead, batch_tokens)
    plan = batching.batches(found, overhead, batch_tokens)
    clock.add("batching", started)
    asked = list(distinct.values())
    scored: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
    for batch in plan:
        places = [place for group in batch for number in group.inputs for place in wanted[number]]
        rows = [number for group in batch for number in group.inputs for _ in wanted[number]]
        results = _score_batch(
            model, inputs, batch, rows, [asked[place] for place in places], with_argmax, clock
        )
        for place, result in zip(places, results, strict=True):
            scored[place] = result
    by_key = dict(zip(distinct, scored, strict=True))
    return [by_key.get(key, (float("nan"), True)) for key in keys]


@torch.no_grad()
def _score_batch(
    model: Scorer,
    inputs: Inputs,
    batch: Sequence[PrefixGroup],
    numbers: Sequence[int],
    spans: Sequence[Span],
    with_argmax: bool,
    clock: Clock,
) -> list[tuple[float, bool]]:
    """Score spans; numbers[i] is the sequence of inputs that span i is read from."""
    started = time.perf_counter()
    device = model.device
    shared = min(group.shared for group in batch)
    order = [number for group in batch for number in group.inputs]
    tails = _padded([inputs.ids[number][shared:] for number in order])
    first = min(span.start for span in spans) - 1 - shared  # the output at a token predicts the next one
    clock.tokens += tails.numel() + shared * len(batch)
    clock.finished += len(tails) * (tails.size(1) - first) + bool(shared) * len(batch)
    if shared:
        heads = torch.from_numpy(
            np.stack([inputs.ids[group.inputs[0]][:shared] for group in batch]).astype(np.int64)
        )
        owners = torch.tensor([place for place, group in enumerate(batch) for _ in group.inputs])
        hidden = model.read_on(heads.to(device), owners.to(device), tails.to(device), first)
    else:
        hidden = model.read(tails.to(device), first)
    row_of = {number: row for row, number in enumerate(order)}
    sizes = [span.end - span.start for span in spans]
    row = np.repeat([row_of[number] for number in numbers], sizes)
    position = np.concatenate([np.arange(span.start - 1, span.end - 1) for span in spans])
    position -= shared + first
    targets = np.concatenate([span.ids[span.start : span.end] for span in spans]).astype(np.int64)
    clock.outputs += len(targets)
    picked = hidden[torch.from_numpy(row).to(device), torch.from_numpy(position).to(device)]
    started = clock.add("forward", started)
    losses, hits = model.losses(
        picked,
        torch.from_numpy(targets).to(device),
        with_argmax=with_argmax,
    )
    nats, likeliest = losses.float().cpu(), hits.cpu()
    results = [
        (part.mean().item(), bool(hit.all()))
        for part, hit in zip(torch.split(nats, sizes), torch.split(likeliest, sizes), strict=True)
    ]
    clock.add("scoring", started)
    return results


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of different lengths as (B, T) int64, zeros at the right, where a causal model cannot see them."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row)
    return ids
