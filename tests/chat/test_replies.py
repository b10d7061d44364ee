"""Replies of random models: rules, draws, company, sessions."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat.chat import conversation
from nanochat.chat.conversation import Message, Part
from nanochat.chat.replies import ChatSession, ReplyEngine, ToolCall
from nanochat.chat.tools import calculate
from nanochat.common.errors import UserError
from nanochat.engine import Engine, KVCache, Sampling
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer
from tests.test_engine import tiny_gpt

TEXTS = ["What is 347 + 589? 347+589 = 936. error count r in strawberry caf\u00e9 \U0001f40d"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


def random_gpt(tokenizer, *, sequence_len=192, favour=(), seed=0):
    """A random model in which nothing is zero, and which likes to say the special tokens in `favour`."""
    shape = {"sequence_len": sequence_len, "n_layer": 3, "bigram": True, "vocab_size": tokenizer.vocab_size}
    model = tiny_gpt(**shape, seed=seed)
    with torch.no_grad():
        for name in favour:
            model.head.weight[tokenizer.special_id(name)] *= 2
    return model


CALLS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|user_start|>", "<|assistant_end|>")


@pytest.fixture(scope="module")
def engine(tokenizer):
    return ReplyEngine(random_gpt(tokenizer, favour=CALLS, seed=4), tokenizer)


def asked(tokenizer, text):
    return conversation.prompt(tokenizer, (Message("user", (Part("text", text),)),))


def slow_reply(model, tokenizer, prompt, most, *, tools=True):
    """The greedy reply by full forward passes, with the rules of CHAT 4.9 written out anew."""
    special = tokenizer.special_id
    ids, code, forced, calls = [], None, [], 0
    sampled = []
    while True:
        with torch.no_grad():
            logits = model.logits(torch.tensor([prompt + ids]))[0, -1]
        if code is not None:
            allowed = [special("<|python_end|>")]
        else:
            allowed = [special("<|assistant_end|>")]
            if tools and calls < 8:
                allowed.append(special("<|python_start|>"))
        for name in SPECIALS:
            if special(name) not in allowed:
                logits[special(name)] = -torch.inf
        sampled.append(not forced)
        token = forced.pop(0) if forced else int(logits.argmax())
        if sampled[-1] and token == special("<|assistant_end|>"):
            return ids, sampled[:-1], "stop"
        ids.append(token)
        if code is None and token == special("<|python_start|>"):
            code = []
        elif code is not None and token == special("<|python_end|>"):
            result, code, calls = calculate(tokenizer.decode(code)), None, calls + 1
            output = tokenizer.encode(result)
            forced = [special("<|output_start|>"), *output, special("<|output_end|>")]
        elif code is not None:
            code.append(token)
            if len(code) == 64:
                forced = [special("<|python_end|>")]
        if len(ids) == most:
            return ids, sampled, "length"


def test_greedy_replies_are_those_of_full_forward_passes_and_rules(tokenizer, engine):
    prompts = [
        asked(tokenizer, text) for text in ("What is 3?", "a", "count r in strawberry", "xyzzy", "b c")
    ]
    for tools in (True, False):
        replies = engine.replies(prompts, Sampling(70, temperature=0), tools=tools)
        for prompt, (reply,) in zip(prompts, replies, strict=True):
            expected = slow_reply(engine.model, tokenizer, prompt, 70, tools=tools)
            assert (list(reply.ids), list(reply.sampled), reply.reason) == expected
    drawn = {i for (reply,) in engine.replies(prompts, Sampling(70, temperature=0)) for i in reply.ids}
    assert tokenizer.special_id("<|output_end|>") in drawn  # the model above did call


def test_the_same_reply_in_any_company(tokenizer, engine):
    """Prompts of many lengths, in one batch, one by one, with other samples beside them."""
    rng = random.Random(0)
    prompts = [asked(tokenizer, "ab c"[: 1 + rng.randrange(4)] * rng.randint(1, 8)) for _ in range(12)]
    assert len({len(prompt) for prompt in prompts}) > 5
    names = [f"7/{i}" for i in range(12)]
    for temperature in (0.0, 1.0):
        sampling = Sampling(40, temperature, seed=3)
        together = engine.replies(prompts, sampling, 3, names=names)
        for i in range(0, 12, 3):
            assert engine.replies(prompts[i : i + 1], sampling, 3, names=names[i : i + 1]) == [together[i]]
            (alone,) = engine.replies(prompts[i : i + 1], sampling, names=names[i : i + 1])
            assert alone == together[i][:1]
        few = engine.replies(
            prompts, Sampling(3, temperature, seed=3), 3, names=names
        )  # in groups of a length
        assert [[r.ids[:3] for r in row] for row in together] == [[r.ids for r in row] for row in few]


def test_what_is_drawn_depends_on_names_and_seed(tokenizer, engine):
    prompts = [asked(tokenizer, text) for text in ("abc", "abc", "hello")]
    hot = Sampling(30, 1.0, seed=1)
    first, again, _ = engine.replies(prompts, hot, 2)
    assert first != again
    assert len({reply.ids for reply in first}) == 2
    named = engine.replies(prompts, hot, 2, names=["x", "x", "y"])
    assert named[0] == named[1]
    assert engine.replies(prompts[2:], hot, 2, names=["y"]) == [named[2]]
    assert engine.replies(prompts[2:], Sampling(30, 1.0, seed=2), 2, names=["y"]) != [named[2]]


def test_constrained_replies_never_say_what_they_may_not(tokenizer):
    model = random_gpt(tokenizer, favour=SPECIALS, seed=2)
    engine, prompts = ReplyEngine(model, tokenizer), [asked(tokenizer, "abc")] * 40
    for tools in (True, False):
        replies = [reply for (reply,) in engine.replies(prompts, Sampling(60, 1.0, seed=5), tools=tools)]
        assert "forbidden" not in {reply.reason for reply in replies}
        drawn = {i for r in replies for i, drew in zip(r.ids, r.sampled, strict=True) if drew}
        expected = {"<|python_start|>", "<|python_end|>"} if tools else set()
        assert {i for i in drawn if i >= tokenizer.bos_id} == {tokenizer.special_id(n) for n in expected}
    free = [reply for (reply,) in engine.replies(prompts, Sampling(60, 1.0, seed=5), constrained=False)]
    ended = [reply for reply in free if reply.reason == "forbidden"]
    assert ended
    for reply in ended:
        assert reply.ids[-1] >= tokenizer.bos_id
        assert reply.sampled[-1]


def test_unconstrained_replies_have_the_probabilities_of_the_model(tokenizer, engine):
    prompt, count = asked(tokenizer, "a"), 4000
    (replies,) = engine.replies([prompt], Sampling(1, 1.0), count, constrained=False)
    with torch.no_grad():
        expected = engine.model.logits(torch.tensor([prompt]))[0, -1].double().softmax(-1)
    end = tokenizer.special_id("<|assistant_end|>")
    drawn = torch.tensor([end if reply.reason == "stop" else reply.ids[0] for reply in replies])
    shares = torch.bincount(drawn, minlength=tokenizer.vocab_size).double() / count
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()
    likeliest = expected.argsort(descending=True)[:5]
    assert (shares[likeliest] > 0).all()


def test_a_full_context_ends_a_reply(tokenizer):
    engine = ReplyEngine(random_gpt(tokenizer, sequence_len=24, seed=1), tokenizer)
    prompts = [asked(tokenizer, text) for text in ("a", "abc", "abcdefgh")]
    for (reply,), prompt in zip(engine.replies(prompts, Sampling(99, 0.0)), prompts, strict=True):
        ids, sampled, _ = slow_reply(engine.model, tokenizer, prompt, 25 - len(prompt))
        assert (list(reply.ids), list(reply.sampled), reply.reason) == (ids, sampled, "context")
    with pytest.raises(UserError, match="no tokens"):
        engine.replies([prompts[0], []], Sampling(1))


# -----------------------------------------------------------------------------
# Sessions


def text_of(events):
    return "".join(
        event if isinstance(event, str) else f"[{event.expression}={event.result}]" for event in events
    )


def text_of_parts(parts):
    """The same text, of the parts of a reply that may end within a call."""
    shown, expression = "", ""
    for part in parts:
        if part.kind == "text":
            shown += part.text
        elif part.kind == "python":
            expression = part.text
        else:
            shown += f"[{expression}={calculate(expression)}]"
    return shown


def turns(rng, count):
    """Texts of a user."""
    return ["".join(rng.choice("abc 12+\u00e9") for _ in range(rng.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_a_session_replies_as_from_scratch(tokenizer, seed):
    """Five turns, some replies abandoned in their middle; the cache is used, and never wrong."""
    model = random_gpt(tokenizer, sequence_len=512, favour=CALLS[:2], seed=seed)
    engine, session = ReplyEngine(model, tokenizer), ChatSession(model, tokenizer)
    rng, said = random.Random(seed), ()
    for text in turns(rng, 5):
        asked_now = (*said, Message("user", (Part("text", text),)))
        prompt = conversation.prompt(tokenizer, asked_now)
        sampling = Sampling(20, temperature=rng.choice([0.0, 0.8]), seed=seed)
        if rng.random() < 0.6:  # Ctrl-C
            events = session.say(asked_now, sampling)
            for _ in range(rng.randint(1, 4)):
                next(events, None)
            events.close()
        events = list(session.say(asked_now, sampling))
        ((reply,),) = engine.replies([prompt], sampling)
        parts = conversation.parts_of(tokenizer, reply.ids)
        assert text_of(events) == text_of_parts(parts)
        assert len([e for e in events if isinstance(e, ToolCall)]) == sum(
            part.kind == "python_output" for part in parts
        )
        said = (*asked_now, Message("assistant", parts or (Part("text", ""),)))
    session_ids = session._ids[: session._cache.length]
    assert session_ids[: len(prompt)] == prompt


def test_a_session_reads_only_what_is_new(tokenizer, monkeypatch):
    model = random_gpt(tokenizer, seed=3)
    session, read = ChatSession(model, tokenizer), []
    forward = GPT.logits
    monkeypatch.setattr(
        GPT, "logits", lambda *args, **kw: (read.append(args[1].size(1)), forward(*args, **kw))[1]
    )
    first = (Message("user", (Part("text", "a fairly long message to begin with, 123"),)),)
    reply = text_of(session.say(first, Sampling(8, 0.0)))
    length = len(conversation.prompt(tokenizer, first))
    assert read[0] == length
    read.clear()
    text_of(session.say(first, Sampling(8, 0.0)))  # /retry
    assert read[0] == 1
    read.clear()
    second = (*first, Message("assistant", (Part("text", reply),)), Message("user", (Part("text", "b"),)))
    text_of(session.say(second, Sampling(8, 0.0)))
    assert read[0] < len(conversation.prompt(tokenizer, second)) - length + 1


def test_an_interrupt_within_the_model_leaves_the_session_as_it_was(tokenizer, monkeypatch):
    model = random_gpt(tokenizer, seed=4)
    engine, session = ReplyEngine(model, tokenizer), ChatSession(model, tokenizer)
    said = (Message("user", (Part("text", "hello 12"),)),)
    append, left = KVCache.append, [10]

    def interrupted(self, layer, k, v):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return append(self, layer, k, v)

    monkeypatch.setattr(KVCache, "append", interrupted)
    for count in range(2, 20):
        left[0] = count
        with pytest.raises(KeyboardInterrupt):
            list(session.say(said, Sampling(30, 0.0)))
        left[0] = -1
        ((reply,),) = engine.replies([conversation.prompt(tokenizer, said)], Sampling(6, 0.0))
        parts = conversation.parts_of(tokenizer, reply.ids)
        assert text_of(session.say(said, Sampling(6, 0.0))) == text_of_parts(parts)


def test_a_session_never_splits_a_character(tokenizer, monkeypatch):
    model = random_gpt(tokenizer)
    script = [*"caf\u00e9 \U0001f40d!".encode(), 0xE4]
    start, end, stop = (
        tokenizer.special_id(f"<|{name}|>") for name in ("python_start", "python_end", "assistant_end")
    )
    byte = {tokenizer.decode_bytes([i]): i for i in range(256)}
    ids = [byte[bytes([b])] for b in script] + [start, *tokenizer.encode("1+2"), end, 0, 0, 0]
    ids += [*tokenizer.encode("3"), byte[b"\xe4"], stop]
    monkeypatch.setattr("nanochat.engine.choose_tokens", lambda *_: torch.tensor([ids.pop(0)]))
    events = list(ChatSession(model, tokenizer).say((Message("user", (Part("text", "x"),)),), Sampling(60)))
    assert events == [*"caf\u00e9 \U0001f40d!", "\ufffd", ToolCall("1+2", "3"), "3", "\ufffd"]


def test_a_prompt_beyond_the_context_is_refused(tokenizer):
    session = ChatSession(random_gpt(tokenizer, sequence_len=24), tokenizer)
    with pytest.raises(UserError, match="context 24"):
        next(session.say((Message("user", (Part("text", "x y z " * 20),)),), Sampling(1)))


def test_plain_generation_is_untouched_by_rules(tokenizer, engine):
    """A special token other than BOS is text to it, and nothing is forced."""
    prompt = asked(tokenizer, "abc")
    plain = Engine(engine.model, tokenizer).generate([prompt], Sampling(40, 1.0), 8)[0]
    assert all(all(done.sampled) for done in plain)
    assert any(tokenizer.special_id("<|user_start|>") in done.ids for done in plain)
