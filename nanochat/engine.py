"""Generation: sampling, rules of rows, and streaming of text.

The cache is the only decode state. Its rows have one length, so no padding ever enters it: prompts of other
lengths form other groups, or, under a `Steering`, the ends of the longer prompts are fed a token at a time in
place of draws. What a row draws depends on its prompt's index, its sample's number and the seed, never on
what is decoded beside it.

The prompt and what is added share the model's context T. A longer prompt is an error; a text that fills the
context ends there with the reason "context" and never loses its beginning.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanochat.common.errors import UserError
from nanochat.distributed.world import World
from nanochat.model.decode_step import decode_step
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache
from nanochat.tokenizer.tokenizer import Tokenizer

Ending = Literal["stop", "forbidden"]
Reason = Literal["stop", "forbidden", "length", "context", "aborted"]
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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: tokens to add at most, 1 or more.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0 means all.
        seed: of the samples.
        top_p: choose among the likeliest tokens of those that together have this probability; 1 means all.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """What was added to a prompt.

    Attributes:
        ids: new tokens, without the one that may have ended them.
        sampled: for each of them, whether it was drawn; False where a rule put it in place of a draw.
        reason: "stop" at a BOS or what else ends a text, "forbidden" at a token that may not come, which is
            the last of the ids, "length" at max_tokens, "context" where the context was full, "aborted" where
            who had asked for it wanted no more.
    """

    ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    reason: Reason


class RowRules(Protocol):
    """Interface of what decides about one row: which tokens it may draw, which it is given, where it ends.

    Attributes:
        mode: the row of `Steering.masks` that holds for the next draw.
        is_text: whether the token taken last is text, and not of a tool call.
    """

    mode: int
    is_text: bool

    def take(self, drawn: int) -> tuple[int, bool, Ending | None]:
        """The token that comes; whether it is the drawn one; whether it ends the row, and why."""
        ...


@dataclass(frozen=True)
class Steering:
    """What decides about rows besides the model.

    Attributes:
        rules: makes those of a new row.
        masks: (modes, n) fp32, added to the logits of the last n ids of the vocabulary; -inf forbids one.
    """

    rules: Callable[[], RowRules]
    masks: Tensor | None = None


class EndsAtBos:
    """Rules of plain text (RowRules): anything may come, and a BOS ends it."""

    def __init__(self, bos_id: int) -> None:
        """Begin a text that ends at this id."""
        self.mode, self.is_text, self.bos_id = 0, True, bos_id

    def take(self, drawn: int) -> tuple[int, bool, Ending | None]:
        """The drawn token comes."""
        return drawn, True, "stop" if drawn == self.bos_id else None


@dataclass
class _Row:
    """A row under way: number, rules, the rest of its prompt (backwards), and what was added to it."""

    number: int
    rules: RowRules
    unread: list[int]
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    done: bool = False


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
        steering: Steering | None = None,
        names: Sequence[object] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the prompt, completion) as they come: those of one prompt in the order of samples.

        Prompts of the same length are done together, as many rows at a time as CACHE_BYTES hold; with a
        steering those of nearly the same length, too.

        Args:
            prompts: as in `generate`.
            sampling: as in `generate`.
            num_samples: as in `generate`.
            lengths: of the prompts to continue; by default all.
            steering: rules of every row; by default a BOS ends it.
            names: of the prompts; the draws depend on a prompt's name. By default its index.

        Raises:
            UserError: as `generate`, at the first.
        """
        for prompt in prompts:
            self.check(prompt)
        chosen = [i for i, prompt in enumerate(prompts) if lengths is None or len(prompt) in lengths]
        # A token by which prompts differ costs a step: at most a quarter of those of the replies.
        spread = sampling.max_tokens // 4 if steering else 0
        config = self.model.config
        for indices in _groups([len(prompts[i]) for i in chosen], spread):
            indices = [chosen[i] for i in indices]
            longest = max(len(prompts[i]) for i in indices)
            capacity = min(config.sequence_len, longest + sampling.max_tokens)
            position = 2 * config.n_layer * config.n_kv_head * config.head_dim * self.model.dtype.itemsize
            at_once = max(1, CACHE_BYTES // (capacity * position))
            together = max(1, at_once // num_samples)
            for first in range(0, len(indices), together):
                for start in range(0, num_samples, at_once):
                    samples = range(start, min(start + at_once, num_samples))
                    rows = [(i, sample) for i in indices[first : first + together] for sample in samples]
                    steps = self.decode(prompts, rows, sampling, steering, names)
                    done = {row: step for row, step in steps if isinstance(step, Completion)}
                    yield from ((index, done[row]) for row, (index, _) in enumerate(rows))

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """Continue one prompt, piece of text by piece. A character is never split over two pieces.

        Raises:
            UserError: as `generate`, at the first piece.
        """
        self.check(prompt)
        text = codecs.getincrementaldecoder("utf-8")("replace")
        for _, step in self.decode([prompt], [(0, 0)], sampling):
            if isinstance(step, int) and (piece := text.decode(self.tokenizer.decode_bytes([step]))):
                yield piece
        if piece := text.decode(b"", final=True):
            yield piece

    def check(self, prompt: Sequence[int]) -> None:
        """Raise UserError for a prompt that is empty, too long, or has an id outside the vocabulary."""
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
    def decode(
        self,
        prompts: Prompts,
        rows: Sequence[tuple[int, int]],
        sampling: Sampling,
        steering: Steering | None = None,
        names: Sequence[object] | None = None,
        cache: KVCache | None = None,
    ) -> Iterator[tuple[int, int | Completion]]:
        """Yield (row, token) as tokens come and (row, completion) when a row ends.

        Args:
            prompts: of any lengths, checked; those of the rows should differ little.
            rows: the index of the prompt and the number of the sample, those of a prompt side by side.
            sampling: how.
            steering: rules of the rows; by default a BOS ends them.
            names: of the prompts, as in `completions`.
            cache: of one row, which holds the beginning of its prompt, but not all of it.
        """
        model, context = self.model, self.model.config.sequence_len
        cache, logits = self._prefill(prompts, rows, sampling, cache)
        device, read, compiled = logits.device, cache.length, decode_step(model)
        by_row = []
        for index, sample in rows:
            most = min(sampling.max_tokens, context - len(prompts[index]) + 1)
            own = row_draws(most, sampling.seed, names[index] if names else index, sample)
            by_row.append(F.pad(own, (len(prompts[index]) - read, 0)))  # none while a prompt is read
        draws = pad_sequence(by_row, batch_first=True).to(device)
        rules = steering.rules if steering else partial(EndsAtBos, self.tokenizer.bos_id)
        live = [_Row(i, rules(), list(prompts[index][read:])[::-1]) for i, (index, _) in enumerate(rows)]
        for step in range(draws.size(1)):
            if steering and steering.masks is not None:
                modes = torch.tensor([row.rules.mode for row in live], device=device)
                logits[:, -steering.masks.size(1) :] += steering.masks[modes]
            tokens = choose_tokens(logits, sampling, draws[:, step])
            drawn = tokens.cpu().tolist()  # the only wait for the device in a step
            fed = list(drawn)
            yield from _take(live, fed, sampling.max_tokens, cache.length == context)
            if fed != drawn:
                tokens = torch.tensor(fed, device=device)
            running = [place for place, row in enumerate(live) if not row.done]
            if not running:
                return
            # Rows that have ended go on unseen until they are half: dropping them copies the cache.
            if steering and 2 * len(running) <= len(live):
                kept = torch.tensor(running, device=device)
                cache.take_rows(kept)
                tokens, draws, live = tokens[kept], draws[kept], [live[place] for place in running]
            if compiled is None:
                logits = model.logits(tokens[:, None], cache, last_only=True)[:, 0]
            else:
                rows_now, lengths_now = range(len(tokens)), [cache.length] * len(tokens)
                logits = compiled.logits(tokens.tolist(), rows_now, lengths_now, cache)
                cache.advance(1)

    def _prefill(
        self, prompts: Prompts, rows: Sequence[tuple[int, int]], sampling: Sampling, cache: KVCache | None
    ) -> tuple[KVCache, Tensor]:
        """Read what the prompts of the rows have up to the shortest: a cache of it, (B, V) logits."""
        indices = list(dict.fromkeys(index for index, _ in rows))
        lengths = [len(prompts[index]) for index in indices]
        if cache is None:
            capacity = min(self.model.config.sequence_len, max(lengths) + sampling.max_tokens - 1)
            cache = KVCache(self.model, len(indices), capacity)
        device = self.model.head.weight.device
        ids = [prompts[index][cache.length : min(lengths)] for index in indices]
        logits = self.model.logits(torch.tensor(ids, device=device), cache, last_only=True)[:, 0]
        if len(rows) > len(indices):  # a prompt is read once, whatever the number of its samples
            copies = torch.arange(len(indices), device=device)
            copies = copies.repeat_interleave(len(rows) // len(indices))
            logits = logits[copies]
            cache.take_rows(copies)
        return cache, logits


def _take(
    live: Sequence[_Row], fed: list[int], most: int, is_full: bool
) -> Iterator[tuple[int, int | Completion]]:
    """Give each row its draw in `fed`, and put there what comes in its place; yields as `decode`."""
    for place, row in enumerate(live):
        if row.unread:
            fed[place] = row.unread.pop()
        elif not row.done:
            fed[place], sampled, ending = row.rules.take(fed[place])
            limit: Reason | None = "context" if is_full else None
            limit = "length" if len(row.ids) + 1 == most else limit
            if ending != "stop":
                row.ids.append(fed[place])
                row.sampled.append(sampled)
                yield row.number, fed[place]
            if reason := ending or limit:
                row.done = True
                yield row.number, Completion(tuple(row.ids), tuple(row.sampled), reason)


def _groups(lengths: Sequence[int], spread: int) -> Iterator[list[int]]:
    """Indices of lengths that differ by at most `spread`, in the order of the first of each group."""
    leaders: dict[int, int] = {}
    shortest = -1
    for length in sorted(set(lengths)):
        if shortest < 0 or length - shortest > spread:
            shortest = length
        leaders[length] = shortest
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(leaders[length], []).append(index)
    yield from groups.values()


def row_draws(count: int, seed: int, name: object, sample: int) -> Tensor:
    """The uniform numbers of one row, (count,) fp32: made on the CPU, so that every device has the same.

    Args:
        count: of the tokens that may be drawn.
        seed: of the sampling.
        name: of the prompt.
        sample: its number among those of the prompt.
    """
    state = random.Random(f"{seed}/{name}/{sample}").getrandbits(63)  # noqa: S311
    return torch.rand(count, generator=torch.Generator().manual_seed(state))


def choose_tokens(logits: Tensor, sampling: Sampling | Sequence[Sampling], draws: Tensor) -> Tensor:
    """Next token of each row, (B,) int64 on the device of the logits.

    Args:
        logits: (B, V) fp32.
        sampling: temperature, top_k and top_p, the same for all rows or one for each. Rows must agree in
            whether they take the likeliest, have a top_k, have a top_p (`sampling_kind`).
        draws: (B,) fp32, uniform from 0 to 1; not looked at where temperature is 0.
    """
    samplings = [sampling] if isinstance(sampling, Sampling) else sampling
    is_greedy, has_top_k, has_top_p = sampling_kind(samplings[0], logits.size(-1))
    if is_greedy:
        return logits.argmax(dim=-1)
    ids, top_k = None, [row.top_k for row in samplings]
    if has_top_k or has_top_p:
        logits, ids = logits.topk(max(top_k) if has_top_k else logits.size(-1), dim=-1)
        if has_top_k and min(top_k) < max(top_k):
            beyond = torch.arange(logits.size(-1), device=logits.device) >= _column(top_k, logits)
            logits = logits.masked_fill(beyond, -torch.inf)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / _column(
        [row.temperature for row in samplings], logits
    )
    shares = shifted.softmax(dim=-1)
    cumulative = shares.cumsum(dim=-1)
    # The probabilities sum to 1 up to rounding: a draw is a fraction of that sum.
    last = torch.tensor([[logits.size(-1) - 1]], device=logits.device)
    if has_top_p:
        fewer = cumulative - shares < _column([row.top_p for row in samplings], logits)
        last = (fewer.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    total = cumulative.gather(-1, last.expand(len(cumulative), 1))
    chosen = torch.searchsorted(cumulative, draws[:, None] * total, right=True).minimum(last)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def sampling_kind(sampling: Sampling, vocabulary: int) -> tuple[bool, bool, bool]:
    """Whether it takes the likeliest token, has a top_k, has a top_p: what rows chosen together agree in.

    One that leaves the whole vocabulary is none.
    """
    if sampling.temperature < torch.finfo(torch.float32).tiny:  # as a divisor it would be zero
        return True, False, False
    return False, 0 < sampling.top_k < vocabulary, sampling.top_p < 1


def _column(values: Sequence[float], logits: Tensor) -> float | Tensor:
    """The one value of all rows, or (B, 1) with that of each."""
    if min(values) == max(values):
        return values[0]
    return torch.tensor(values, device=logits.device)[:, None]


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
