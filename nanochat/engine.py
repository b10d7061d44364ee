"""Generation: KV cache, sampling, and streaming of text.

The cache is the only decode state. Rows of one length decode together and prompts of other lengths form other
groups, so no padding ever enters a cache. What a row draws depends on its prompt's index, its sample's number
and the seed, never on what is decoded beside it.

The prompt and what is added share the model's context T. A longer prompt is an error; a text that fills the
context ends there with the reason "context" and never loses its beginning.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanochat.common.errors import UserError
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

Reason = Literal["stop", "length", "context"]
Prompts = Sequence[Sequence[int]]  # token ids

CACHE_BYTES = 1 << 30  # of the rows that decode together; more samples follow one another

# Prose and code, so that a model of either corpus has something it knows.
SAMPLE_PROMPTS = (
    "The capital of France is",
    "Water is made of",
    "Once upon a time there was",
    "The best way to learn a language is",
    "import os\nimport ",
    "def read_lines(path):\n    ",
)


class KVCache:
    """Keys and values of every layer for rows of one length; the last embedding and id, for what mixes two.

    Implements gpt.DecodeCache.

    Attributes:
        length: positions stored.
    """

    def __init__(self, model: GPT, rows: int, capacity: int) -> None:
        """Room for `capacity` positions of `rows` rows in the model's compute dtype, all free."""
        config, dtype, device = model.config, model.dtype, model.head.weight.device
        shape = (config.n_layer, rows, capacity, config.n_kv_head, config.head_dim)
        self.length = 0
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self._last = torch.zeros(rows, 1, config.n_embd, dtype=dtype, device=device)
        self._last_id = torch.full((rows, 1), -1, device=device)

    def shift(self, x: Tensor) -> Tensor:
        """Return what precedes each of the new positions x (B, T, C), and keep the last of them."""
        before = torch.cat((self._last, x[:, :-1]), dim=1)
        self._last = x[:, -1:].clone()
        return before

    def shift_ids(self, ids: Tensor) -> Tensor:
        """Return the id before each of the new ones (B, T), -1 before the first, and keep the last one."""
        before = torch.cat((self._last_id, ids[:, :-1]), dim=1)
        self._last_id = ids[:, -1:].clone()
        return before

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, Hkv, D) keys and values behind earlier ones; return all, (B, length + T, Hkv, D)."""
        end = self.length + k.size(1)
        assert end <= self._k.size(2), "the cache is full"
        self._k[layer, :, self.length : end] = k
        self._v[layer, :, self.length : end] = v
        return self._k[layer, :, :end], self._v[layer, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` new positions as stored, once every layer has appended them."""
        self.length += count

    def take_rows(self, rows: Tensor) -> None:
        """Let row i be a copy of the former row rows[i]; rows is (B,) int64."""
        rows = rows.to(self._k.device)
        self._k, self._v = self._k.index_select(1, rows), self._v.index_select(1, rows)
        self._last = self._last.index_select(0, rows)
        self._last_id = self._last_id.index_select(0, rows)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: tokens to add at most, 1 or more.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0 means all.
        seed: of the samples.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What was added to a prompt.

    Attributes:
        ids: new tokens, without the BOS that may have ended them.
        reason: "stop" at a BOS, "length" at max_tokens, "context" where the context was full.
    """

    ids: tuple[int, ...]
    reason: Reason


class Engine:
    """Continues prompts with a model."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Hold a model and its tokenizer."""
        self.model, self.tokenizer = model, tokenizer

    def generate(self, prompts: Prompts, sampling: Sampling, num_samples: int = 1) -> list[list[Completion]]:
        """Continue each prompt `num_samples` times.

        Args:
            prompts: of any lengths.
            sampling: how; the seed gives each prompt and sample a generator of its own.
            num_samples: continuations of each prompt, 1 or more.

        Returns:
            A list for each prompt, in order, of its completions.

        Raises:
            UserError: an empty prompt, one longer than the context, or an id outside the vocabulary.
        """
        done: list[list[Completion]] = [[] for _ in prompts]
        for index, completion in self.completions(prompts, sampling, num_samples):
            done[index].append(completion)
        return done

    def completions(
        self,
        prompts: Prompts,
        sampling: Sampling,
        num_samples: int = 1,
        lengths: Collection[int] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the prompt, completion) as they come: those of one prompt in the order of samples.

        Prompts of the same length are done together, as many rows at a time as CACHE_BYTES hold.

        Args:
            prompts: as in `generate`.
            sampling: as in `generate`.
            num_samples: as in `generate`.
            lengths: of the prompts to continue; by default all.

        Raises:
            UserError: as `generate`, at the first.
        """
        groups: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            self._check(prompt)
            if lengths is None or len(prompt) in lengths:
                groups.setdefault(len(prompt), []).append(index)
        config = self.model.config
        for length, indices in groups.items():
            capacity = min(config.sequence_len, length + sampling.max_tokens)
            row_bytes = 2 * config.n_layer * capacity * config.n_kv_head * config.head_dim
            at_once = max(1, CACHE_BYTES // (row_bytes * self.model.dtype.itemsize))
            together = max(1, at_once // num_samples)
            for first in range(0, len(indices), together):
                for start in range(0, num_samples, at_once):
                    samples = range(start, min(start + at_once, num_samples))
                    rows = [(i, sample) for i in indices[first : first + together] for sample in samples]
                    steps = self._decode(prompts, rows, sampling)
                    done = {row: step for row, step in steps if isinstance(step, Completion)}
                    yield from ((index, done[row]) for row, (index, _) in enumerate(rows))

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """Continue one prompt, piece of text by piece. A character is never split over two pieces.

        Raises:
            UserError: as `generate`, at the first piece.
        """
        self._check(prompt)
        text = codecs.getincrementaldecoder("utf-8")("replace")
        for _, step in self._decode([prompt], [(0, 0)], sampling):
            if isinstance(step, int) and (piece := text.decode(self.tokenizer.decode_bytes([step]))):
                yield piece
        if piece := text.decode(b"", final=True):
            yield piece

    def _check(self, prompt: Sequence[int]) -> None:
        config = self.model.config
        if not prompt:
            raise UserError("the prompt has no tokens. Begin it with a BOS.")
        if len(prompt) > config.sequence_len:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model's context {config.sequence_len}. "
                "Shorten it, or use a model trained with a larger --max-seq-len."
            )
        if bad := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise UserError(
                f"the prompt has the token id {bad[0]}, outside the vocabulary of {config.vocab_size}. "
                "Use the tokenizer that the model was trained with."
            )

    @torch.no_grad()
    def _decode(
        self, prompts: Prompts, rows: Sequence[tuple[int, int]], sampling: Sampling
    ) -> Iterator[tuple[int, int | Completion]]:
        """Yield (row, token) as tokens come and (row, completion) when a row ends.

        Args:
            prompts: of which the rows name some of one length.
            rows: the index of the prompt and the number of the sample, those of a prompt side by side.
            sampling: how.
        """
        model, context = self.model, self.model.config.sequence_len
        indices = list(dict.fromkeys(index for index, _ in rows))
        ids = torch.tensor([prompts[index] for index in indices], device=model.head.weight.device)
        cache = KVCache(model, len(indices), min(context, ids.size(1) + sampling.max_tokens - 1))
        logits = model.logits(ids, cache, last_only=True)[:, 0]
        if len(rows) > len(indices):  # a prompt is read once, whatever the number of its samples
            copies = torch.arange(len(indices), device=ids.device)
            copies = copies.repeat_interleave(len(rows) // len(indices))
            logits = logits[copies]
            cache.take_rows(copies)
        most = min(sampling.max_tokens, context - ids.size(1) + 1)
        draws = torch.stack([_draws(most, sampling.seed, *row) for row in rows]).to(ids.device)
        running: dict[int, list[int]] = {row: [] for row in range(len(rows))}
        for count in range(1, sampling.max_tokens + 1):
            tokens = choose_tokens(logits, sampling, draws[:, count - 1])
            chosen = tokens.cpu().tolist()  # the only wait for the device in a step
            full: Reason | None = "context" if cache.length == context else None
            limit: Reason | None = "length" if count == sampling.max_tokens else full
            for row, added in list(running.items()):
                token = chosen[row]
                reason: Reason | None = "stop" if token == self.tokenizer.bos_id else limit
                if reason != "stop":
                    added.append(token)
                    yield row, token
                if reason:
                    yield row, Completion(tuple(running.pop(row)), reason)
            if not running:
                return
            # Rows that have ended go on unseen: dropping them would copy the cache.
            logits = model.logits(tokens[:, None], cache, last_only=True)[:, 0]


def _draws(count: int, seed: int, index: int, sample: int) -> Tensor:
    """The uniform numbers of one row, (count,) fp32: made on the CPU, so that every device has the same."""
    state = random.Random(f"{seed}/{index}/{sample}").getrandbits(63)  # noqa: S311
    return torch.rand(count, generator=torch.Generator().manual_seed(state))


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Next token of each row, (B,) int64 on the device of the logits.

    Args:
        logits: (B, V) fp32.
        sampling: temperature and top_k.
        draws: (B,) fp32, uniform from 0 to 1; not looked at where temperature is 0.
    """
    if sampling.temperature < torch.finfo(torch.float32).tiny:  # as a divisor it would be zero
        return logits.argmax(dim=-1)
    ids = None
    if sampling.top_k and sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k, dim=-1)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    cumulative = shifted.softmax(dim=-1).cumsum(dim=-1)
    # The probabilities sum to 1 up to rounding: a draw is a fraction of that sum.
    chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    chosen = chosen.clamp(max=logits.size(-1) - 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    world: World,
    prompts: Sequence[str] = SAMPLE_PROMPTS,
    *,
    max_tokens: int = 48,
) -> list[str]:
    """Each prompt with one continuation, as text, on every rank: a collective.

    The ranks share the work by the lengths of the prompts. Those of one length decode together on any number
    of ranks, so the texts are the same to the letter.
    """
    # A tiny context still gets a sample: of the end of the prompt.
    ids = [tokenizer.encode(prompt, bos=True)[-model.config.sequence_len :] for prompt in prompts]
    mine = sorted(set(map(len, ids)))[world.rank :: world.size]
    sampling = Sampling(max_tokens, temperature=0.7, top_k=50)
    added = torch.zeros(len(ids), 1 + min(max_tokens, model.config.sequence_len), dtype=torch.int64)
    for index, completion in Engine(model, tokenizer).completions(ids, sampling, lengths=mine):
        added[index, : 1 + len(completion.ids)] = torch.tensor([len(completion.ids), *completion.ids])
    gathered = torch.tensor(world.gather_ints(added.flatten().tolist())).sum(0).view_as(added)
    texts = [tokenizer.decode(row[1 : 1 + row[0]]) for row in gathered.tolist()]
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
