import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config.model_config import GPTConfig
from nanochat.distributed.world import World
from nanochat.engine import (
    Completion,
    Engine,
    KVCache,
    Sampling,
    Steering,
    choose_tokens,
    row_draws,
    sample_texts,
)
from nanochat.model.gpt import GPT

BOS = 256


class ByteTokenizer:
    """Ids are bytes; what the engine needs of a tokenizer and no more."""

    bos_id = BOS
    vocab_size = 257

    def encode(self, text, bos=False):
        return [BOS] * bos + list(text.encode("utf-8"))

    def decode_bytes(self, ids):
        return bytes(token for token in ids if token < 256)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")


def tiny_gpt(*, sequence_len=160, n_layer=4, n_kv_head=1, seed=0, bigram=False, vocab_size=257):
    """A random model in which nothing is zero: window < T, grouped heads, value tables, smear, backout."""
    config = GPTConfig(
        n_layer=n_layer,
        n_embd=64,
        n_head=2,
        n_kv_head=n_kv_head,
        head_dim=32,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        bigram=bigram,
    )
    model = GPT(config, Precision(torch.float32, "sdpa"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.init_weights(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_gpt(), ByteTokenizer())


def greedy_by_full_forward(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_cache_gives_the_logits_of_a_full_forward(engine):
    model = engine.model
    assert set(model.config.windows) == {128, 160}
    ids = torch.randint(0, 257, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model.logits(ids)
        for pieces in ([1] * 150, [140, 1, 1, 8], [3, 140, 7]):
            cache = KVCache(model, 2, 150)
            parts = [model.logits(part, cache) for part in ids.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)
            assert cache.length == 150


def test_a_cache_that_is_cut_back_or_whose_rows_are_taken_gives_the_same_logits():
    model = tiny_gpt(bigram=True)
    ids = torch.randint(0, 257, (3, 60), generator=torch.Generator().manual_seed(1))
    other = torch.randint(0, 257, (3, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = model.logits(ids)
        cache = KVCache(model, 3, 60)
        model.logits(ids[:, :30], cache)
        for length in (29, 1, 0, 17):
            model.logits(other[:, : 60 - cache.length], cache)  # goes to the end of it
            cache.length = 0
            model.logits(ids[:, :length], cache) if length else None
            model.logits(other[:, :5], cache)
            cache.length = length
            cut = model.logits(ids[:, length:50], cache)
            torch.testing.assert_close(cut, full[:, length:50], rtol=1e-4, atol=1e-4)
        for rows in ([2, 0, 1, 1], [3], [0, 0]):  # of the former: 2, 0, 1, 1, then 1, then 1, 1
            cache.take_rows(torch.tensor(rows))
        rest = model.logits(ids[[1, 1], 50:], cache)
        torch.testing.assert_close(rest, full[[1, 1], 50:], rtol=1e-4, atol=1e-4)
        assert cache.length == 60
        cache.take_rows(torch.tensor([1]))  # a full cache, too
        cache.length = 59
        torch.testing.assert_close(model.logits(ids[1:2, 59:], cache), full[1:2, 59:], rtol=1e-4, atol=1e-4)


def test_greedy_text_is_what_the_full_forward_chooses_token_by_token(engine):
    # 120 + 40 tokens: the window of 128 is passed on the way.
    prompt = engine.tokenizer.encode("x" * 119, bos=True)
    (done,) = engine.generate([prompt], Sampling(max_tokens=40, temperature=0))
    expected = greedy_by_full_forward(engine.model, prompt, 40)
    assert len(set(expected)) > 5
    if BOS in expected:
        expected = expected[: expected.index(BOS)]
    assert list(done[0].ids) == expected


def test_prompts_of_other_lengths_and_more_samples_change_nothing(engine):
    prompts = [
        engine.tokenizer.encode(text, bos=True) for text in ("abc", "hello world", "xyz", "a", "hello")
    ]
    sampling = Sampling(max_tokens=12, temperature=0)
    alone = [engine.generate([prompt], sampling)[0] for prompt in prompts]
    assert engine.generate(prompts, sampling) == alone
    doubled = engine.generate(prompts, sampling, num_samples=3)
    assert doubled == [done * 3 for done in alone]
    assert len({done[0].ids for done in alone}) == len(prompts)


def test_the_same_seed_gives_the_same_text_in_any_company(engine):
    hot = Sampling(max_tokens=12, temperature=1.0, top_k=40, seed=7)
    prompts = [engine.tokenizer.encode(text, bos=True) for text in ("abc", "xyz", "hello")]
    together = engine.generate(prompts, hot, num_samples=3)
    assert engine.generate(prompts, hot, num_samples=3) == together
    assert engine.generate(prompts[:1], hot, num_samples=1)[0][0] == together[0][0]
    assert len({done.ids for done in together[0]}) == 3
    other = Sampling(max_tokens=12, temperature=1.0, top_k=40, seed=8)
    assert engine.generate(prompts, other, num_samples=3) != together


def test_rows_that_do_not_fit_together_follow_each_other_and_draw_the_same(engine, monkeypatch):
    prompts = [engine.tokenizer.encode(text, bos=True) for text in ("abc", "xyz", "a longer one")]
    sampling = Sampling(max_tokens=6, temperature=1.0, top_k=40, seed=7)
    together = engine.generate(prompts, sampling, num_samples=5)
    row_bytes = 2 * 4 * (len(prompts[0]) + 6) * 1 * 32 * 4
    for rows in (1, 2, 7):  # of 10 in the group of two prompts
        monkeypatch.setattr("nanochat.engine.CACHE_BYTES", rows * row_bytes)
        assert engine.generate(prompts, sampling, num_samples=5) == together
    monkeypatch.setattr("nanochat.engine.CACHE_BYTES", row_bytes)
    first = next(engine.completions(prompts, sampling, num_samples=10**9))  # nothing is held for the others
    assert first == (0, together[0][0])


def test_tokens_are_drawn_with_the_softmax_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = 20_000
    for top_k, temperature in [(0, 1.0), (0, 0.5), (2, 1.0), (4, 2.0)]:
        expected = (logits[0] / temperature).double().exp()
        if top_k:
            expected[logits[0] < logits[0].topk(top_k).values[-1]] = 0
        expected /= expected.sum()
        uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
        chosen = choose_tokens(logits.expand(draws, -1), Sampling(1, temperature, top_k), uniform)
        shares = torch.bincount(chosen, minlength=4).double() / draws
        # Five standard errors: the seeds are fixed, so this either always holds or never.
        assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()
        assert (shares[expected == 0] == 0).all()


def test_extreme_sampling_values_are_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    draws = torch.rand(2, generator=torch.Generator().manual_seed(0))
    cold = [Sampling(1, temperature, 50) for temperature in (0.0, 1e-30, 1e-40, 1e-46, 5e-324)]
    for sampling in (*cold, Sampling(1, 1e-46), Sampling(1, 1.0, top_k=1), Sampling(1, 1e-3, 99)):
        assert choose_tokens(logits, sampling, draws).tolist() == [1, 0]


def test_no_draw_chooses_a_token_without_probability():
    """Nor does rounding: the largest draw times the sum of the probabilities is less than that sum."""
    largest = 1 - 2.0**-24
    logits = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, [0, 17, 39]] = -torch.inf
    for draw in (0.0, 0.5, largest):
        chosen = choose_tokens(logits, Sampling(1), torch.full((3000,), draw))
        assert not set(chosen.tolist()) & {0, 17, 39}
        chosen = choose_tokens(logits, Sampling(1, top_k=39), torch.full((3000,), draw))
        assert not set(chosen.tolist()) & {0, 17, 39}


class Counting:
    """Rules that end a row after some tokens, put 65 in place of every third draw, and forbid token 3."""

    def __init__(self):
        self.mode, self.count = 0, 0

    def take(self, drawn):
        self.count += 1
        self.mode = 1 - self.mode
        if self.count % 3 == 0:
            return 65, False, None
        return drawn, True, "stop" if drawn % 16 == 5 else "forbidden" if drawn == 3 else None


def test_rules_replace_draws_forbid_tokens_and_end_rows(engine):
    """Against full forward passes of each prompt alone; prompts have many lengths, and rows are dropped."""
    masks = torch.zeros(2, 200)
    masks[1, ::2] = -torch.inf  # of the ids from 57 on, every other one
    steering = Steering(Counting, masks)
    prompts = [[BOS, *range(70, 70 + length)] for length in (3, 9, 4, 12, 3, 7, 5, 11)]
    sampling = Sampling(max_tokens=40, temperature=0)
    done = dict(engine.completions(prompts, sampling, steering=steering))
    assert len({len(one.ids) for one in done.values()}) > 3
    assert {one.reason for one in done.values()} > {"stop"}
    for index, prompt in enumerate(prompts):
        ids, sampled, reason = [], [], None
        while not reason:
            with torch.no_grad():
                logits = engine.model.logits(torch.tensor([prompt + ids]))[0, -1]
            if len(ids) % 2:
                logits[57::2] = -torch.inf
            token, forced = int(logits.argmax()), len(ids) % 3 == 2
            token = 65 if forced else token
            reason = "stop" if not forced and token % 16 == 5 else None
            if reason:
                break
            ids.append(token)
            sampled.append(not forced)
            reason = "forbidden" if not forced and token == 3 else "length" if len(ids) == 40 else None
        assert done[index] == Completion(tuple(ids), tuple(sampled), reason)


def test_prompts_that_cannot_be_used_are_refused(engine):
    sampling = Sampling(1)
    for prompt, message in [
        ([], "no tokens"),
        ([1] * 161, "161 tokens.*160"),
        ([1, 257], "id 257"),
        ([-1], "id -1"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.generate([[1], prompt], sampling)
        with pytest.raises(UserError, match=message):
            next(engine.stream(prompt, sampling))


def test_a_text_ends_where_the_context_is_full():
    engine = Engine(tiny_gpt(sequence_len=16, n_layer=2), ByteTokenizer())
    engine.model.head.weight.data[BOS] = 0
    for length in (10, 15, 16):
        prompt = [65] * length
        (done,) = engine.generate([prompt], Sampling(max_tokens=50, temperature=0))
        # The last token read is the 16th; the one it predicts is the last given.
        assert (len(done[0].ids), done[0].reason) == (17 - length, "context")
        assert list(done[0].ids) == greedy_by_full_forward(engine.model, prompt, 17 - length)
    (done,) = engine.generate([[65] * 10], Sampling(max_tokens=7, temperature=0))
    assert (len(done[0].ids), done[0].reason) == (7, "length")


def test_a_row_stops_at_bos_and_the_others_go_on(engine, monkeypatch):
    def scripted(logits, sampling, draws):
        script = [[65, 66], [BOS, 67], [68, 69]]
        return torch.tensor(script[scripted.calls.pop(0)])

    scripted.calls = [0, 1, 2]
    monkeypatch.setattr("nanochat.engine.choose_tokens", scripted)
    first, second = engine.generate([[1, 2], [3, 4]], Sampling(max_tokens=3))
    assert (first[0].ids, first[0].reason) == ((65,), "stop")
    assert (second[0].ids, second[0].reason) == ((66, 67, 69), "length")


def test_a_stream_never_splits_a_character(engine, monkeypatch):
    text = "a\u00e9\u4e2d\U0001f40d!"
    left = [*text.encode("utf-8"), 0xE4, 0xB8]  # ends in the middle of a character

    def scripted(logits, sampling, draws):
        return torch.tensor([left.pop(0)])

    monkeypatch.setattr("nanochat.engine.choose_tokens", scripted)
    pieces = list(engine.stream(engine.tokenizer.encode("x", bos=True), Sampling(max_tokens=len(left))))
    assert pieces == [*text, "\ufffd"]


def test_a_stream_is_the_generated_text(engine):
    prompt, sampling = (
        engine.tokenizer.encode("hello", bos=True),
        Sampling(max_tokens=30, temperature=0.9, seed=3),
    )
    (done,) = engine.generate([prompt], sampling)
    assert "".join(engine.stream(prompt, sampling)) == ByteTokenizer().decode(done[0].ids)


def test_every_row_draws_what_a_generator_of_its_own_gives_one_by_one():
    state = random.Random("7/2/5").getrandbits(63)
    generator = torch.Generator().manual_seed(state)
    assert row_draws(33, 7, 2, 5).tolist() == [torch.rand(1, generator=generator).item() for _ in range(33)]


def test_samples_are_prompts_with_continuations_in_any_context(engine):
    alone = World.single_process()
    texts = sample_texts(engine.model, ByteTokenizer(), alone, ["abc", "hello"], max_tokens=5)
    assert [text[:3] for text in texts] == ["abc", "hel"]
    assert sample_texts(engine.model, ByteTokenizer(), alone, ["abc", "hello"], max_tokens=5) == texts
    small = tiny_gpt(sequence_len=8, n_layer=2)
    assert len(sample_texts(small, ByteTokenizer(), alone)) == 6


@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_number_of_ranks_writes_the_same_samples(engine, size):
    """Each rank decodes a part of them, and each gets all."""
    prompts = ["abc", "hello", "xyz", "a", "seven b", "hallo"]
    expected = sample_texts(engine.model, ByteTokenizer(), World.single_process(), prompts, max_tokens=9)
    barrier, given, decoded = threading.Barrier(size, timeout=60), {}, []

    class Together(World):
        """A rank in a thread, which meets the others where they gather."""

        def gather_ints(self, values):
            given[self.rank] = values
            decoded.append(sum(count > 0 for count in values[:: len(values) // len(prompts)]))
            barrier.wait()
            return [given[rank] for rank in range(self.size)]

    def run(rank):
        world = Together(rank, size, torch.device("cpu"), None)
        return sample_texts(engine.model, ByteTokenizer(), world, prompts, max_tokens=9)

    with ThreadPoolExecutor(size) as pool:
        assert list(pool.map(run, range(size))) == [expected] * size
    assert sum(decoded) == len(prompts)
    assert max(decoded) < len(prompts)
