"""The batcher against each request alone, and what happens where a request, a reader or a device fails."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from nanochat.chat import conversation
from nanochat.chat.conversation import Message, Part
from nanochat.chat.replies import ReplyEngine
from nanochat.chat.replies import masks as masks_of
from nanochat.chat.tools import ToolCalls
from nanochat.common.errors import UserError
from nanochat.engine import Completion, Engine, Sampling, choose_tokens, sampling_kind
from nanochat.serve.batcher import Batcher, Full, Request, Token
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.chat.test_replies import CALLS, TEXTS, random_gpt
from tests.test_engine import BOS, ByteTokenizer, tiny_gpt

GREEDY = Sampling(max_tokens=12, temperature=0)


class Reader:
    """Takes the events of one request, and may do something at each."""

    def __init__(self, at_token=None):
        self.tokens, self.end, self.at_token = [], None, at_token

    def __call__(self, event):
        assert self.end is None, "something came after the end"
        if isinstance(event, Token):
            self.tokens.append(event)
            if self.at_token:
                self.at_token(self)
        else:
            self.end = event

    def completion(self):
        """The completion, once its tokens are seen to be those that came."""
        assert isinstance(self.end, Completion), self.end
        assert [token.id for token in self.tokens] == list(self.end.ids)
        assert [token.sampled for token in self.tokens] == list(self.end.sampled)
        return self.end


@pytest.fixture(scope="module")
def model():
    return tiny_gpt(n_layer=2, bigram=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def chat_model(tokenizer):
    return random_gpt(tokenizer, favour=CALLS, seed=4)


@contextlib.contextmanager
def no_memory(model, passes=1000):
    """Let so many passes ask for more memory than any machine has, and the others go on."""
    left = iter(range(passes))

    def take(*_):
        for _ in left:
            torch.empty(1 << 55)

    hook = model.blocks[-1].register_forward_pre_hook(take)
    yield
    hook.remove()


def finish(batcher):
    """Step until there is nothing to do; returns the number of iterations."""
    steps = 0
    while batcher.step():
        steps += 1
    assert (batcher.stats.busy, batcher.stats.queue) == (0, 0)
    return steps


def random_prompt(rng, longest=100):
    return (BOS, *(rng.randrange(256) for _ in range(rng.choice((0, 1, 5, rng.randrange(longest))))))


def random_sampling(rng, most=20):
    return Sampling(
        rng.randint(1, most),
        temperature=rng.choice((0.0, 0.7, 1.0)),
        top_k=rng.choice((0, 0, 3, 50, 257, 1000)),
        seed=rng.randrange(5),
        top_p=rng.choice((1.0, 1.0, 0.5, 0.9)),
    )


def arrive(batcher, requests, rng, hurry=0.5):
    """Submit requests at random moments, between iterations; returns their completions."""
    readers = [Reader() for _ in requests]
    for request, reader in zip(requests, readers, strict=True):
        while rng.random() > hurry:
            batcher.step()
        batcher.submit(request, reader)
    finish(batcher)
    return [reader.completion() for reader in readers]


def alone(model, request):
    """What Engine makes of one request."""
    engine = Engine(model, ByteTokenizer())
    ((_, done),) = engine.completions([request.ids], request.sampling, names=[request.name])
    return done


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_greedy_replies_that_arrive_at_random_are_those_of_each_alone(model, count):
    rng = random.Random(count)
    batcher = Batcher(model, ByteTokenizer(), slots=8, prefill_chunk=16, max_queue=count)
    requests = [
        Request(random_prompt(rng), Sampling(rng.randint(1, 24), temperature=0)) for _ in range(count)
    ]
    done = arrive(batcher, requests, rng)
    different = [i for i, request in enumerate(requests) if done[i] != alone(model, request)]
    assert different == []
    assert len({one.reason for one in done}) > 1


def test_draws_depend_on_a_request_and_not_on_its_company(model):
    """Against Engine with the same seed and name; temperatures, top_k and top_p differ from row to row."""
    rng = random.Random(1)
    batcher = Batcher(model, ByteTokenizer(), slots=8, prefill_chunk=32)
    requests = [
        Request(random_prompt(rng), random_sampling(rng), name=f"prompt {i}", sample=0) for i in range(40)
    ]
    done = arrive(batcher, requests, rng, hurry=0.8)
    for request, one in zip(requests, done, strict=True):
        assert one == alone(model, request), request.sampling


def test_samples_of_one_prompt_are_those_of_the_engine_and_read_it_once(model):
    prompt = (BOS, *range(60))
    sampling = Sampling(15, temperature=1.0, seed=3)
    (expected,) = Engine(model, ByteTokenizer()).generate([prompt], sampling, num_samples=11)
    batcher = Batcher(model, ByteTokenizer(), slots=5)
    done = batcher.generate([Request(prompt, sampling, sample=i) for i in range(11)])
    assert done == expected
    assert batcher.stats.prompt_computed == 60 + 11
    assert batcher.stats.prompt_reused == 10 * 60
    assert batcher.stats.generated == sum(len(one.ids) for one in done)
    assert sum(batcher.stats.ended.values()) == 11


@pytest.mark.parametrize("constrained", [True, False])
def test_replies_with_tool_calls_are_those_of_the_reply_engine(chat_model, tokenizer, constrained):
    texts = [f"{a} + {b}" for a in range(3) for b in range(5)]
    prompts = [conversation.prompt(tokenizer, (Message("user", (Part("text", text),)),)) for text in texts]
    sampling = Sampling(60, temperature=0.8, seed=2)
    asked = {"constrained": constrained, "names": texts}
    expected = ReplyEngine(chat_model, tokenizer).replies(prompts, sampling, **asked)
    masks = masks_of(chat_model)
    batcher = Batcher(chat_model, tokenizer, slots=4, masks=masks)
    rules, chosen = partial(ToolCalls, tokenizer, True), masks if constrained else None
    requests = [
        Request(tuple(prompt), sampling, text, rules=rules, masks=chosen)
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    plain = Request((tokenizer.bos_id, 5), sampling, "plain")
    done = batcher.generate([*requests, plain])
    assert done[:-1] == [one for (one,) in expected]
    assert (
        done[-1] == next(Engine(chat_model, tokenizer).completions([plain.ids], sampling, names=["plain"]))[1]
    )
    assert any(not all(one.sampled) for one in done) or not constrained, "no reply called the calculator"


def test_tokens_say_whether_they_are_text(chat_model, tokenizer):
    prompt = conversation.prompt(tokenizer, (Message("user", (Part("text", "2 + 3"),)),))
    readers, masks = [], masks_of(chat_model)
    batcher = Batcher(chat_model, tokenizer, masks=masks)
    for seed in range(12):
        readers.append(Reader())
        sampling = Sampling(60, seed=seed)
        batcher.submit(
            Request(tuple(prompt), sampling, rules=partial(ToolCalls, tokenizer, True), masks=masks),
            readers[-1],
        )
    finish(batcher)
    specials = range(tokenizer.bos_id, tokenizer.vocab_size)
    for reader in readers:
        inside = False  # of a call and of what it gave
        for token in reader.tokens:
            begins = token.id in (
                tokenizer.special_id("<|python_start|>"),
                tokenizer.special_id("<|output_start|>"),
            )
            inside = inside or begins
            assert token.is_text == (not inside)
            inside = inside and (token.id not in specials or begins)
    assert len({token.is_text for reader in readers for token in reader.tokens}) == 2


# ----------------------------------------------------------------------------------------------------
# What is read of a prompt


def test_an_iteration_reads_a_chunk_and_delays_others_by_no_more(model):
    batcher = Batcher(model, ByteTokenizer(), slots=2, prefill_chunk=10)
    first, second = Reader(), Reader()
    batcher.submit(Request((BOS, 1), replace(GREEDY, max_tokens=50)), first)
    batcher.step()
    batcher.submit(Request((BOS, *range(35)), GREEDY), second)
    seen = []
    for _ in range(5):
        batcher.step()
        seen.append((len(first.tokens), len(second.tokens), batcher.stats.prompt_computed))
    # The other slot has the BOS; 34 tokens come in chunks, and the last one in the step after them.
    assert seen == [(2, 0, 13), (3, 0, 23), (4, 0, 33), (5, 1, 37), (6, 2, 37)]


def test_a_conversation_that_goes_on_reads_only_what_is_new(model):
    """Others come between, and take the slots that were used longest ago."""
    rng = random.Random(5)
    batcher = Batcher(model, ByteTokenizer(), slots=4)
    ids = (BOS, *range(20))
    (reply,) = batcher.generate([Request(ids, GREEDY)])
    for turn in range(5):
        batcher.generate([Request((BOS, 200 + turn, *map(int, rng.randbytes(9))), GREEDY)])
        before = replace(batcher.stats)
        ids = (*ids, *reply.ids, 1, 2, 3)
        (reply,) = batcher.generate([Request(ids, GREEDY)])
        assert reply == alone(model, Request(ids, GREEDY))
        # The last token of a reply that was cut off is the only other one that was not read.
        assert batcher.stats.prompt_computed - before.prompt_computed <= 4
        assert batcher.stats.prompt_reused - before.prompt_reused >= len(ids) - 4
    again = replace(batcher.stats)
    assert batcher.generate([Request(ids, GREEDY)]) == [reply]
    assert batcher.stats.prompt_computed - again.prompt_computed == 1


def test_what_another_text_begins_with_is_copied_and_stays_where_it_is(model):
    shared = (BOS, *range(50))
    batcher = Batcher(model, ByteTokenizer(), slots=3)
    long, short = (*shared, *range(100, 160)), (*shared, 7)
    reused = []
    for prompt in (long, short, long):
        before = batcher.stats.prompt_reused
        assert batcher.generate([Request(prompt, GREEDY)]) == [alone(model, Request(prompt, GREEDY))]
        reused.append(batcher.stats.prompt_reused - before)
    assert reused == [0, len(shared), len(long) - 1]


def test_contexts_are_filled_to_the_end(model):
    requests = [Request((BOS, *[65] * (length - 1)), Sampling(50, 0.0)) for length in (150, 159, 160, 158)]
    done = Batcher(model, ByteTokenizer(), slots=4).generate(requests)
    assert done == [alone(model, request) for request in requests]
    assert "context" in {one.reason for one in done}


# ----------------------------------------------------------------------------------------------------
# Ends before the end


def test_an_abort_frees_the_slot_in_the_next_iteration_wherever_a_request_is(chat_model, tokenizer):
    masks = masks_of(chat_model)
    prompt = tuple(conversation.prompt(tokenizer, (Message("user", (Part("text", "1 + 2"),)),)))
    rules = partial(ToolCalls, tokenizer, True)
    requests = [Request(prompt, Sampling(60, seed=seed), rules=rules, masks=masks) for seed in range(40)]
    replies = Batcher(chat_model, tokenizer, masks=masks).generate(requests)
    sampling = next(
        request.sampling for request, one in zip(requests, replies, strict=True) if not all(one.sampled)
    )
    for where in ("queue", "prefill", "decode", "tool call", "submitted", "ended"):
        batcher = Batcher(chat_model, tokenizer, slots=1, prefill_chunk=4, masks=masks)
        blocker, reader, following = Reader(), Reader(), Reader()
        first = None
        if where == "queue":
            first = batcher.submit(Request((*prompt, *range(40)), sampling), blocker)
            batcher.step()
        handle = batcher.submit(Request(prompt, sampling, rules=rules, masks=masks), reader)
        while not {
            "queue": True,
            "submitted": True,
            "prefill": handle.slot == 0,
            "decode": len(reader.tokens) > 1,
            "tool call": any(not token.sampled for token in reader.tokens),
            "ended": reader.end,
        }[where]:
            assert batcher.step(), where
        ended = reader.end
        batcher.abort(handle)
        batcher.abort(handle)
        batcher.submit(Request(prompt, GREEDY, rules=rules, masks=masks), following)
        if first:
            batcher.abort(first)
        batcher.step()
        assert reader.end is ended if ended else reader.completion().reason == "aborted"
        assert batcher.stats.busy == 1, where  # the next one has the slot
        finish(batcher)
        assert (
            following.completion()
            == Batcher(chat_model, tokenizer, masks=masks).generate(
                [Request(prompt, GREEDY, rules=rules, masks=masks)]
            )[0]
        )


def test_a_reader_may_abort_its_own_request_and_submit_another(model):
    batcher, second = Batcher(model, ByteTokenizer(), slots=1), Reader()
    prompt = Request((BOS, 9), replace(GREEDY, max_tokens=40))

    def at_token(reader):
        if len(reader.tokens) == 3:
            batcher.abort(handle)
            batcher.submit(prompt, second)

    first = Reader(at_token)
    handle = batcher.submit(prompt, first)
    finish(batcher)
    assert first.completion().reason == "aborted"
    assert len(first.tokens) == 3
    assert second.completion() == alone(model, prompt)


def test_a_reader_that_raises_loses_its_request_alone(model, capsys):
    def fails(reader):
        raise OSError("the pipe is closed")

    batcher = Batcher(model, ByteTokenizer(), slots=2)
    prompt = Request((BOS, 9), replace(GREEDY, max_tokens=40))
    broken, whole = Reader(fails), Reader()
    batcher.submit(prompt, broken)
    batcher.submit(prompt, whole)
    batcher.submit(prompt, lambda event: 1 / 0)
    finish(batcher)
    assert broken.end.reason == "aborted"
    assert whole.completion() == alone(model, prompt)
    assert "the pipe is closed" in capsys.readouterr().err
    assert batcher.stats.ended["aborted"] == 2


def test_a_step_without_memory_fails_those_in_it_and_no_other():
    model = tiny_gpt(n_layer=2, bigram=True)  # so that its steps go through its blocks
    model.head.weight.data[BOS] = 0  # which ends no text then
    batcher = Batcher(model, ByteTokenizer(), slots=3, prefill_chunk=8)
    greedy = replace(GREEDY, max_tokens=10)
    prompts = [Request((BOS, *range(count)), greedy) for count in (3, 4, 20, 5)]
    first, second, long, last = (Reader() for _ in prompts)
    for request, reader in zip(prompts[:2], (first, second), strict=True):
        batcher.submit(request, reader)
    for _ in range(3):
        batcher.step()
    batcher.submit(prompts[2], long)
    with no_memory(model, passes=1):  # the chunk
        batcher.step()
    assert isinstance(long.end, RuntimeError)
    assert (len(first.tokens), len(second.tokens)) == (4, 3)
    with no_memory(model):  # the step
        batcher.step()
    assert isinstance(first.end, RuntimeError)
    assert isinstance(second.end, RuntimeError)
    batcher.submit(prompts[3], last)
    finish(batcher)
    assert last.completion() == alone(model, prompts[3])
    assert batcher.stats.ended == Counter(error=3, length=1)


def test_generate_raises_what_a_step_raised_and_leaves_nothing():
    model = tiny_gpt(n_layer=2)
    batcher = Batcher(model, ByteTokenizer(), slots=2)
    requests = [Request((BOS, count), GREEDY) for count in range(5)]
    with no_memory(model), pytest.raises(RuntimeError, match="memory"):
        batcher.generate(requests)
    assert batcher.generate(requests) == [alone(model, request) for request in requests]


class Interrupts:
    """Rules of a reply during which somebody presses Ctrl-C."""

    mode, is_text = 0, True

    def take(self, drawn):
        raise KeyboardInterrupt


def test_an_interrupt_of_generate_leaves_nothing(model):
    batcher = Batcher(model, ByteTokenizer(), slots=2)
    requests = [Request((BOS, count), GREEDY, rules=Interrupts if count == 1 else None) for count in range(5)]
    with pytest.raises(KeyboardInterrupt):
        batcher.generate(requests)
    assert finish(batcher) == 0
    assert batcher.generate(requests[2:]) == [alone(model, request) for request in requests[2:]]


def test_rules_that_raise_lose_their_request_alone(model):
    class Fails(Interrupts):
        def take(self, drawn):
            raise LookupError("no rule")

    batcher, broken, whole = Batcher(model, ByteTokenizer(), slots=2), Reader(), Reader()
    batcher.submit(Request((BOS, 9), GREEDY, rules=Fails), broken)
    batcher.submit(Request((BOS, 9), GREEDY), whole)
    finish(batcher)
    assert isinstance(broken.end, LookupError)
    assert whole.completion() == alone(model, Request((BOS, 9), GREEDY))


# ----------------------------------------------------------------------------------------------------
# The queue and the thread


def test_what_cannot_be_continued_is_refused_and_so_is_what_the_queue_has_no_room_for(model):
    batcher = Batcher(model, ByteTokenizer(), slots=1, max_queue=3)
    for prompt, message in [((), "no tokens"), ((1,) * 161, "161 tokens.*160"), ((1, 257), "id 257")]:
        with pytest.raises(UserError, match=message):
            batcher.submit(Request(prompt, GREEDY), Reader())
        with pytest.raises(UserError, match=message):
            batcher.generate([Request((1,), GREEDY), Request(prompt, GREEDY)])
    readers = [Reader() for _ in range(4)]
    batcher.submit(Request((BOS,), GREEDY), readers[0])
    batcher.step()
    for reader in readers[1:]:
        batcher.submit(Request((BOS,), GREEDY), reader)
    with pytest.raises(Full, match="3 requests"):
        batcher.submit(Request((BOS,), GREEDY), Reader())
    assert (batcher.stats.busy, batcher.stats.queue) == (1, 3)
    finish(batcher)
    assert {reader.completion() for reader in readers} == {alone(model, Request((BOS,), GREEDY))}
    batcher.close()
    with pytest.raises(Full, match="closed"):
        batcher.submit(Request((BOS,), GREEDY), Reader())


def test_a_thread_serves_many_others_and_aborts_what_is_left_when_closed(model):
    batcher = Batcher(model, ByteTokenizer(), slots=4, max_queue=100)
    server = threading.Thread(target=batcher.run)
    server.start()
    results, lock = Counter(), threading.Lock()

    def client(number):
        rng = random.Random(number)
        for _ in range(6):
            request = Request(random_prompt(rng, 30), Sampling(rng.randint(1, 8), temperature=0))
            over, reader = threading.Event(), Reader()

            def emit(event, reader=reader, over=over):
                reader(event)
                over.set() if reader.end else None

            batcher.submit(request, emit)
            assert over.wait(30)
            with lock:
                results[reader.completion() == alone(model, request)] += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(5)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    assert results == {True: 30}
    left = [Reader() for _ in range(9)]
    for reader in left:
        batcher.submit(Request((BOS,), Sampling(150, temperature=1.0, seed=5)), reader)
    batcher.close()
    server.join(30)
    assert not server.is_alive()
    assert all(reader.end for reader in left)
    assert (batcher.stats.busy, batcher.stats.queue) == (0, 0)


@pytest.mark.slow
def test_ten_thousand_random_requests_leak_no_slot_and_no_memory():
    """A tenth is aborted, some readers raise, some passes find no memory."""
    rng, model = random.Random(0), tiny_gpt(n_layer=1, sequence_len=48)
    batcher = Batcher(model, ByteTokenizer(), slots=8, prefill_chunk=8, max_queue=20)
    model.blocks[0].register_forward_pre_hook(
        lambda *_: torch.empty(1 << 55) if rng.random() < 0.001 else None
    )
    ends, refused, objects = Counter(), 0, []

    def fails_sometimes(reader):
        if rng.random() < 0.002:
            raise OSError("gone")

    readers, handles = [], []
    for number in range(10_000):
        reader = Reader(fails_sometimes)
        try:
            request = Request(random_prompt(rng, 40), random_sampling(rng, 12), number)
            handles.append(batcher.submit(request, reader))
            readers.append(reader)
        except Full:
            refused += 1
        if rng.random() < 0.1 and handles:
            batcher.abort(rng.choice(handles[-30:]))
        for _ in range(rng.choice((0, 0, 1, 2, 6))):
            batcher.step()
        if number % 1000 == 999:
            finish(batcher)
            ends.update(type(reader.end).__name__ for reader in readers)
            assert all(reader.end is not None for reader in readers)
            readers, handles = [], []
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert set(ends) == {"Completion", "RuntimeError"}
    assert ends.total() + refused == 10_000
    assert ends.total() > 7_000
    assert batcher.stats.ended.total() == ends.total()
    assert max(objects[2:]) - objects[1] < 200, objects


# ----------------------------------------------------------------------------------------------------
# top_p


def slow_choice(logits, sampling, draw):
    """The token a draw falls on, by lists: the likeliest first, as many as top_k and top_p leave."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[: sampling.top_k or None]
    weights = [2.718281828459045 ** ((logits[i] - logits[order[0]]) / sampling.temperature) for i in order]
    shares, kept = [weight / sum(weights) for weight in weights], 0
    while kept == 0 or (kept < len(order) and sum(shares[:kept]) < sampling.top_p):
        kept += 1
    target = draw * sum(shares[:kept])
    for i in range(kept):
        target -= shares[i]
        if target < 0:
            return order[i]
    return order[kept - 1]


def test_the_nucleus_is_the_fewest_likeliest_tokens_of_that_probability():
    rng = random.Random(0)
    logits = torch.randn(400, 40, generator=torch.Generator().manual_seed(0)) * 3
    draws = torch.rand(400, generator=torch.Generator().manual_seed(1))
    samplings = [
        Sampling(
            1,
            rng.choice((0.5, 1.0, 2.0)),
            rng.choice((0, 3, 5, 40, 90)),
            top_p=rng.choice((0.0, 0.3, 0.9, 0.99)),
        )
        for _ in range(400)
    ]
    kinds = {}
    for row, sampling in enumerate(samplings):
        kinds.setdefault(sampling_kind(sampling, 40), []).append(row)
    assert set(kinds) == {(False, True, True), (False, False, True)}
    for rows in kinds.values():
        together = choose_tokens(logits[rows], [samplings[row] for row in rows], draws[rows])
        for row, token in zip(rows, together.tolist(), strict=True):
            expected = slow_choice(logits[row].tolist(), samplings[row], draws[row].item())
            assert token == expected, samplings[row]
            one = choose_tokens(logits[row : row + 1], samplings[row], draws[row : row + 1])
            assert one.item() == expected
