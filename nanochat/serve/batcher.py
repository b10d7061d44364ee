"""Batcher: replies to many requests at once, which come and go while others are decoded.

One thread computes. An iteration reads at most one chunk of the oldest prompt that waits, then adds one token
to every row under way: a long prompt delays others by a chunk, and a row that ends makes room at once. What a
row draws depends on its request alone, never on what is decoded beside it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import engine
from nanochat.common.errors import warn
from nanochat.model.gpt import GPT
from nanochat.serve.slots import SlotCache
from nanochat.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """What is asked: a prompt, and how to continue it.

    Attributes:
        ids: of the prompt.
        sampling: how the next token is chosen.
        name: of the prompt; what is drawn depends on the seed, on this, and on `sample`.
        sample: its number among those of the prompt.
        rules: makes the rules of the reply; by default a BOS ends it.
        masks: the batcher's, where the rules' modes choose among them; None forbids no token.
    """

    ids: tuple[int, ...]
    sampling: engine.Sampling
    name: object = 0
    sample: int = 0
    rules: Callable[[], engine.RowRules] | None = None
    masks: Tensor | None = None


class Token(NamedTuple):
    """A token that was added to a prompt.

    Attributes:
        id: of the token.
        sampled: whether it was drawn; False where a rule put it in place of a draw.
        is_text: whether it is text of the reply, and not of a tool call.
    """

    id: int
    sampled: bool
    is_text: bool


Emit = Callable[[Token | engine.Completion | Exception], None]


class Full(Exception):
    """No more requests are taken now."""


@dataclass
class Stats:
    """What a batcher does and has done.

    Attributes:
        busy: slots with a request.
        queue: requests that wait for one.
        prompt_computed: tokens of prompts that were read.
        prompt_reused: tokens of prompts that a slot had stored already.
        generated: tokens added to prompts.
        ended: requests, by the reason of their completion, or "error".
    """

    busy: int = 0
    queue: int = 0
    prompt_computed: int = 0
    prompt_reused: int = 0
    generated: int = 0
    ended: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Handle:
    """A request under way. Its fields are the batcher's."""

    request: Request
    emit: Emit
    rules: engine.RowRules
    kind: tuple[bool, bool, bool]
    slot: int = -1
    draws: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    is_done: bool = False

    @property
    def next_id(self) -> int:
        """The id that the next step reads: the last one of the prompt, then what came."""
        return self.ids[-1] if self.ids else self.request.ids[-1]

    @property
    def draw(self) -> float:
        """The uniform number that chooses the next token, where one is drawn."""
        return self.draws[len(self.ids)] if self.draws else 0.0


class Batcher:
    """Continues many prompts at once.

    Attributes:
        stats: counters, which other threads may read.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        slots: int = 16,
        *,
        prefill_chunk: int = 128,
        max_queue: int = 64,
        masks: Tensor | None = None,
    ) -> None:
        """Hold a model and room for the whole context in every slot.

        Args:
            model: whose context T is shared by a prompt and what is added.
            tokenizer: of the model.
            slots: requests decoded at once.
            prefill_chunk: tokens of a prompt that an iteration reads at most.
            max_queue: requests that may wait for a slot.
            masks: (modes, n) fp32, as Steering.masks, for the requests that name them.
        """
        self.stats = Stats()
        self._tokenizer, self._check = tokenizer, engine.Engine(model, tokenizer).check
        self._vocabulary = model.config.vocab_size
        self._chunk, self._max_queue, self._masks = prefill_chunk, max_queue, masks
        if masks is not None:  # and a mode that forbids nothing, for requests without masks
            self._modes = F.pad(masks, (0, 0, 0, 1))
        self._cache = SlotCache(model, slots, model.config.sequence_len)
        self._in_slot: list[Handle | None] = [None] * slots
        self._last_used = [0] * slots
        self._clock = 0
        self._reading: Handle | None = None
        self._waiting: deque[Handle] = deque()
        self._aborted: deque[Handle] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def submit(self, request: Request, emit: Emit) -> Handle:
        """Queue a request; thread-safe.

        Args:
            request: what is asked.
            emit: called in the batcher's thread with a Token for each token in order, then once with a
                Completion, or with the exception that ended the request; perhaps before this returns. Where
                it raises, the request is aborted.

        Raises:
            UserError: an empty prompt, one longer than the context, or an id outside the vocabulary.
            Full: so many requests wait already, or the batcher was closed.
        """
        return self._enqueue(request, emit, self._max_queue)

    def _enqueue(self, request: Request, emit: Emit, most: float) -> Handle:
        self._check(request.ids)
        assert request.masks is None or request.masks is self._masks, "the masks are those of the batcher"
        rules = request.rules() if request.rules else engine.EndsAtBos(self._tokenizer.bos_id)
        handle = Handle(request, emit, rules, engine.sampling_kind(request.sampling, self._vocabulary))
        with self._changed:
            if self._is_closed:
                raise Full("the batcher was closed")
            if len(self._waiting) >= most:
                raise Full(f"{len(self._waiting)} requests wait already")
            self._waiting.append(handle)
            self.stats.queue = len(self._waiting)
            self._changed.notify()
        return handle

    def abort(self, handle: Handle) -> None:
        """End a request with the reason "aborted", in the next iteration; thread-safe.

        Nothing happens to one that has ended.
        """
        with self._changed:
            self._aborted.append(handle)
            self._changed.notify()

    def run(self) -> None:
        """Work until `close`, and sleep while there is nothing to do; what is under way then is aborted."""
        try:
            while not self._is_closed:
                if not self.step():
                    with self._changed:
                        self._changed.wait_for(lambda: self._waiting or self._aborted or self._is_closed)
        finally:  # also of a mistake of ours: nobody waits for what will not come
            self.close()
            self._aborted.extend((*filter(None, self._in_slot), *self._waiting))
            self._end_aborted()

    def close(self) -> None:
        """Let `run` return, and take no more requests; thread-safe."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def generate(self, requests: Sequence[Request]) -> list[engine.Completion]:
        """Continue all prompts in the calling thread, which is then the batcher's; none may run.

        Returns:
            The completions, in the order of the requests.

        Raises:
            UserError: as `submit`.
            Exception: what a step raised, at the first request that it ended.
        """
        done: list[Token | engine.Completion | Exception | None] = [None] * len(requests)
        for prompt in requests:
            self._check(prompt.ids)
        handles = [
            self._enqueue(request, partial(done.__setitem__, index), float("inf"))
            for index, request in enumerate(requests)
        ]
        try:
            while self.step():
                pass
        finally:  # of an interrupt; otherwise all have ended
            for handle in handles:
                self.abort(handle)
            self._end_aborted()
        for one in done:
            if isinstance(one, Exception):
                raise one
        return [one for one in done if isinstance(one, engine.Completion)]

    @torch.no_grad()
    def step(self) -> bool:
        """One iteration; False where there was nothing to do. For the batcher's thread."""
        did = self._end_aborted()
        did |= self._read()
        return self._decode() or did

    # ------------------------------------------------------------------------------------------------
    # The end of a request

    def _end_aborted(self) -> bool:
        """End the requests that `abort` was called for since the last iteration."""
        did = False
        while self._aborted:
            handle, did = self._aborted.popleft(), True
            with self._changed, contextlib.suppress(ValueError):
                self._waiting.remove(handle)
                self.stats.queue = len(self._waiting)
            self._end(handle, "aborted")
        return did

    def _end(self, handle: Handle, reason: engine.Reason | Exception) -> None:
        """Free the slot of a request and tell its end, once."""
        if handle.is_done:
            return
        handle.is_done = True
        if handle is self._reading:
            self._reading = None
        if handle.slot >= 0:
            self._in_slot[handle.slot] = None
            self._clock += 1
            self._last_used[handle.slot] = self._clock
            self.stats.busy -= 1
        if isinstance(reason, Exception):
            self.stats.ended["error"] += 1
            last: engine.Completion | Exception = reason
        else:
            self.stats.ended[reason] += 1
            last = engine.Completion(tuple(handle.ids), tuple(handle.sampled), reason)
        with contextlib.suppress(Exception):  # the request is over; its reader's troubles are its own
            handle.emit(last)

    # ------------------------------------------------------------------------------------------------
    # Prompts

    def _read(self) -> bool:
        """Give free slots to those who wait, and read one chunk; False where nobody waits or no slot is free.

        All of a prompt is read here but its last token, which a step reads. A prompt of which a slot stores
        the rest needs no chunk, so several may begin in one iteration.
        """
        did = False
        while (handle := self._reading or self._begin()) is not None:
            unread = handle.request.ids[len(self._cache.ids[handle.slot]) : -1]
            if unread and did:
                self._reading = handle
                break
            self._reading = handle if len(unread) > self._chunk else None
            if unread:
                did = True
                self._read_chunk(handle, unread[: self._chunk])
        return did

    def _read_chunk(self, handle: Handle, chunk: Sequence[int]) -> None:
        try:
            self._cache.read(handle.slot, chunk)
            self.stats.prompt_computed += len(chunk)
        except Exception as error:  # whatever a device raises, the others go on
            self._end(handle, error)

    def _begin(self) -> Handle | None:
        """Give the oldest request a slot with what it has in common with any; None where that cannot be."""
        free = [slot for slot, handle in enumerate(self._in_slot) if handle is None]
        with self._changed:
            if not free or not self._waiting:
                return None
            handle = self._waiting.popleft()
            self.stats.queue = len(self._waiting)
        cache, request = self._cache, handle.request
        known = [cache.match(slot, request.ids[:-1]) for slot in range(len(self._in_slot))]
        source = max(range(len(known)), key=lambda slot: (known[slot], slot in free))
        common = known[source]
        # What is mostly of another text stays for whoever continues that, while older ones can go.
        is_taken = source in free and 2 * common >= len(cache.ids[source])
        slot = source if is_taken else min(free, key=self._last_used.__getitem__)
        cache.copy(source, slot, common)
        is_greedy, *_ = handle.kind
        if not is_greedy:
            count = min(request.sampling.max_tokens, cache.capacity - len(request.ids) + 1)
            draws = engine.row_draws(count, request.sampling.seed, request.name, request.sample)
            handle.draws = draws.tolist()
        handle.slot, self._in_slot[slot] = slot, handle
        self.stats.busy += 1
        self.stats.prompt_reused += common
        self.stats.prompt_computed += 1  # the last token, which a step reads
        return handle

    # ------------------------------------------------------------------------------------------------
    # Steps

    def _decode(self) -> bool:
        """Add a token to every row under way; False where there is none."""
        running = [handle for handle in self._in_slot if handle and handle is not self._reading]
        if not running:
            return False
        try:
            rows = self._packed(running)
            logits = self._cache.step([handle.next_id if handle else None for handle in rows])
            drawn = self._choose(logits, rows)
        except Exception as error:  # whatever a device raises, later requests may do better
            for handle in running:
                self._end(handle, error)
            return True
        for handle in running:
            self._take(handle, drawn[handle.slot])
        return True

    def _packed(self, running: Sequence[Handle]) -> list[Handle | None]:
        """Who is in the first slots, moved there: 1, 2, 4, 8, 16 or so of them, None where no row is decoded.

        Few shapes are met, and what a row stores can be read where it lies.
        """
        rows = min(len(self._in_slot), 1 << (len(running) - 1).bit_length())
        spare = [slot for slot in range(rows) if self._in_slot[slot] in (None, self._reading)]
        for handle in running:
            if handle.slot >= rows:
                self._swap(handle.slot, spare.pop(0))
        return [None if handle is self._reading else handle for handle in self._in_slot[:rows]]

    def _swap(self, a: int, b: int) -> None:
        self._cache.swap(a, b)
        handles, used = self._in_slot, self._last_used
        handles[a], handles[b], used[a], used[b] = handles[b], handles[a], used[b], used[a]
        for slot in (a, b):
            if (handle := self._in_slot[slot]) is not None:
                handle.slot = slot

    def _choose(self, logits: Tensor, rows: Sequence[Handle | None]) -> list[int]:
        """The token that each row draws, from (len(rows), V) logits."""
        if any(handle and handle.request.masks is not None for handle in rows):
            masked = [
                handle.rules.mode if handle and handle.request.masks is not None else -1 for handle in rows
            ]
            logits[:, -self._modes.size(1) :] += self._modes[torch.tensor(masked, device=logits.device)]
        kinds: dict[tuple[bool, bool, bool], list[int]] = {}
        for row, handle in enumerate(rows):
            if handle:
                kinds.setdefault(handle.kind, []).append(row)
        first = next(handle for handle in rows if handle)
        samplings = [(handle or first).request.sampling for handle in rows]
        draws = torch.tensor([handle.draw if handle else 0.0 for handle in rows], device=logits.device)
        if len(kinds) == 1:
            tokens = engine.choose_tokens(logits, samplings, draws)
        else:
            tokens = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
            for chosen in kinds.values():
                at = torch.tensor(chosen, device=logits.device)
                tokens[at] = engine.choose_tokens(logits[at], [samplings[row] for row in chosen], draws[at])
        drawn: list[int] = tokens.tolist()  # the only wait for the device in a step
        return drawn

    def _take(self, handle: Handle, drawn: int) -> None:
        """Give a row its draw, tell what came in its place, and end the row if that ends it."""
        request, count = handle.request, len(handle.ids) + 1
        try:
            token, sampled, ending = handle.rules.take(drawn)
        except Exception as error:  # of rules that somebody else wrote
            self._end(handle, error)
            return
        is_full = len(self._cache.ids[handle.slot]) == self._cache.capacity
        limit: engine.Reason | None = "context" if is_full else None
        limit = "length" if count == request.sampling.max_tokens else limit
        if ending != "stop":
            handle.ids.append(token)
            handle.sampled.append(sampled)
            self.stats.generated += 1
            try:
                handle.emit(Token(token, sampled, handle.rules.is_text))
            except Exception as error:  # of whoever listens
                warn(f"a reply was aborted, since what takes its tokens raised {error!r}")
                self._end(handle, "aborted")
                return
        if reason := ending or limit:
            self._end(handle, reason)
