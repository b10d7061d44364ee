"""Generation: the cache of what a model has read, sampling, and text as it comes.

The only owner of decode state. Rows of one length decode together; prompts of other lengths form other
groups, so no padding ever enters a cache. What a row draws depends on its prompt's place, its own number and
the seed, never on what is decoded beside it.

The prompt and what is added share the model's context T. A longer prompt is an error; a text that fills the
context ends there with the reason "context" and never loses its beginning.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanochat.common.errors import UserError
from nanochat.config.model_config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

Reason = Literal["stop", "length", "context"]

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
    """

    def __init__(
        self, config: GPTConfig, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Room for `capacity` positions of `rows` rows in the model's compute dtype, all free."""
        shape = (config.n_layer, rows, capacity, config.n_kv_head, config.head_dim)
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self._last = torch.zeros(rows, 1, config.n_embd, dtype=dtype, device=device)
        self._last_id = torch.full((rows, 1), -1, device=device)
        self._length = 0

    @property
    def length(self) -> int:
        """Positions stored."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._k.size(2)

    def shift(self, x: Tensor) -> Tensor:
        """What precedes each of the new positions x (B, T, C), and remember the last of them."""
        before = torch.cat((self._last, x[:, :-1]), dim=1)
        self._last = x[:, -1:].clone()
        return before

    def shift_ids(self, ids: Tensor) -> Tensor:
        """The id before each of the new ones (B, T), -1 before the first, and remember the last of them."""
        before = torch.cat((self._last_id, ids[:, :-1]), dim=1)
        self._last_id = ids[:, -1:].clone()
        return before

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, Hkv, D) keys and values after those there are; return all, (B, length + T, Hkv, D)."""
        end = self._length + k.size(1)
        assert end <= self.capacity, "the cache is full"
        self._k[layer, :, self._length : end] = k
        self._v[layer, :, self._length : end] = v
        return self._k[layer, :, :end], self._v[layer, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` new positions as stored, once every layer has appended them."""
        self._length += count

    def repeat_rows(self, times: int) -> None:
        """Replace each row by `times` copies of it, side by side."""
        if times > 1:
            self.take_rows(torch.arange(self._k.size(1)).repeat_interleave(times))

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
        max_tokens: most tokens to add.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0 means all.
        seed: of the samples.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError on a value that cannot be used."""
        if self.max_tokens < 1:
            raise UserError(f"--max-new-tokens={self.max_tokens}: expected 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"--temperature={self.temperature}: expected 0 (likeliest token) or a number above."
            )
        if self.top_k < 0:
            raise UserError(f"--top-k={self.top_k}: expected 0 (all tokens) or a number above.")


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
        self.model = model
        self.tokenizer = tokenizer

    def encode(self, prompt: str) -> list[int]:
        """A prompt as tokens, after a BOS, as every document begins in training."""
        return self.tokenizer.encode(prompt, bos=True)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, num_samples: int = 1
    ) -> list[list[Completion]]:
        """Continue each prompt `num_samples` times.

        Args:
            prompts: token ids, of any lengths.
            sampling: how; the seed gives each prompt and sample a generator of its own.
            num_samples: continuations of each prompt.

        Returns:
            A list for each prompt, in order, of its completions.

        Raises:
            UserError: an empty prompt, one longer than the context, or an id outside the vocabulary.
        """
        done: list[list[Completion]] = [[] for _ in prompts]
        for place, completion in self.completions(prompts, sampling, num_samples):
            done[place].append(completion)
        return done

    def completions(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, num_samples: int = 1
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (place of the prompt, completion) as they come: those of one prompt in the order of samples.

        Prompts of the same length are done together, as many rows at a time as CACHE_BYTES hold.

        Raises:
            UserError: as `generate`, at the first.
        """
        if num_samples < 1:
            raise UserError(f"--num-samples={num_samples}: expected 1 or more.")
        for prompt in prompts:
            self._check(prompt)
        groups: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(len(prompt), []).append(place)
        for length, places in groups.items():
            rows = self._rows_at_once(length, sampling)
            together = max(1, rows // num_samples)
            for first in range(0, len(places), together):
                chunk = places[first : first + together]
                for start in range(0, num_samples, rows):
                    samples = range(start, min(start + rows, num_samples))
                    yield from self._complete([prompts[place] for place in chunk], sampling, samples, chunk)

    def _rows_at_once(self, length: int, sampling: Sampling) -> int:
        """How many rows decode together: their keys and values fit into CACHE_BYTES."""
        config = self.model.config
        capacity = min(config.sequence_len, length + sampling.max_tokens)
        row_bytes = 2 * config.n_layer * capacity * config.n_kv_head * config.head_dim
        return max(1, CACHE_BYTES // (row_bytes * self.model.dtype.itemsize))

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        samples: range,
        places: Sequence[int],
    ) -> Iterator[tuple[int, Completion]]:
        """Decode prompts of one length to their ends."""
        ids: list[list[int]] = [[] for _ in range(len(places) * len(samples))]
        reasons: list[Reason] = ["length"] * len(ids)
        for row, step in self._decode(prompts, sampling, samples, places):
            if isinstance(step, int):
                ids[row].append(step)
            else:
                reasons[row] = step
        for row, (added, reason) in enumerate(zip(ids, reasons, strict=True)):
            yield places[row // len(samples)], Completion(tuple(added), reason)

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """Continue one prompt, piece of text by piece. A character is never split over two pieces.

        Raises:
            UserError: as `generate`, at the first piece.
        """
        self._check(prompt)
        text = codecs.getincrementaldecoder("utf-8")("replace")
        for _, step in self._decode([prompt], sampling, range(1), [0]):
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
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, samples: range, places: Sequence[int]
    ) -> Iterator[tuple[int, int | Reason]]:
        """Yield (row, token) as tokens come and (row, reason) when a row ends; rows are prompts x samples.

        Args:
            prompts: of one length.
            sampling: how.
            samples: the numbers of the rows of each prompt, side by side, for their generators.
            places: the number of each prompt, for its generators.
        """
        model, context = self.model, self.model.config.sequence_len
        length, device = len(prompts[0]), model.head.weight.device
        capacity = min(context, length + sampling.max_tokens - 1)
        cache = KVCache(model.config, len(prompts), capacity, dtype=model.dtype, device=device)
        logits = model.logits(torch.tensor(prompts, device=device), cache, last_only=True)[:, 0]
        logits = logits.repeat_interleave(len(samples), dim=0)
        cache.repeat_rows(len(samples))
        generators = [_generator(sampling.seed, place, sample) for place in places for sample in samples]
        running = dict.fromkeys(range(len(generators)))
        for added in range(1, sampling.max_tokens + 1):
            tokens = choose_tokens(logits, sampling, generators)
            full: Reason | None = "context" if cache.length == context else None
            last: Reason | None = "length" if added == sampling.max_tokens else full
            for row, token in [(row, int(tokens[row])) for row in running]:
                stop = token == self.tokenizer.bos_id
                if not stop:
                    yield row, token
                if stop or last:
                    del running[row]
                    yield row, "stop" if stop else last or "length"
            if not running:
                return
            # Rows that have ended go on unseen: dropping them would copy the cache.
            logits = model.logits(tokens[:, None].to(device), cache, last_only=True)[:, 0]


def _generator(seed: int, place: int, sample: int) -> torch.Generator:
    """A generator of one row's own, on the CPU, so that every kind of device draws the same."""
    state = random.Random(f"{seed}/{place}/{sample}").getrandbits(63)  # noqa: S311
    return torch.Generator().manual_seed(state)


def choose_tokens(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next token of each row, (B,) int64 on the CPU.

    Args:
        logits: (B, V) fp32.
        sampling: temperature and top_k.
        generators: one a row; each gives one uniform number, wherever temperature is not 0.
    """
    if sampling.temperature < torch.finfo(torch.float32).tiny:  # as a divisor it would be zero
        return logits.argmax(dim=-1).cpu()
    ids = None
    if sampling.top_k and sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k, dim=-1)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    cumulative = shifted.softmax(dim=-1).cumsum(dim=-1)
    draws = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(logits.device)
    # The sum of the probabilities rounds to a little less than 1 or more: a draw is a share of that sum.
    place = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    place = place.clamp(max=logits.size(-1) - 1)
    chosen = place if ids is None else ids.gather(-1, place)
    return chosen[:, 0].cpu()


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str] = SAMPLE_PROMPTS,
    *,
    max_tokens: int = 48,
    temperature: float = 0.7,
    top_k: int = 50,
    seed: int = 0,
) -> list[str]:
    """Each prompt with one continuation, as text. No ranks are involved: any rank may call it alone."""
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_tokens, temperature, top_k, seed)
    # A tiny context still gets a sample: of the end of the prompt.
    ids = [engine.encode(prompt)[-model.config.sequence_len :] for prompt in prompts]
    completions = engine.generate(ids, sampling)
    return [
        prompt + tokenizer.decode(list(done[0].ids))
        for prompt, done in zip(prompts, completions, strict=True)
    ]
