"""The wire format against hand-written answers and slow twins."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.chat import conversation
from nanochat.chat.conversation import Message, Part
from nanochat.chat.tools import ToolCalls
from nanochat.engine import Completion
from nanochat.serve.batcher import Token
from nanochat.serve.openai_api import ApiError, Asked, Reply, Served, read
from tests.chat import talk

CONTEXT = 400
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def served(context: int = CONTEXT) -> Served:
    return Served("d4", talk.tokenizer(), context, slots=4, max_messages=6)


def read_chat(body: Any, served: Served) -> Asked:
    return read(json.dumps(body).encode(), served, True)


def read_completion(body: Any, served: Served) -> Asked:
    return read(json.dumps(body).encode(), served, False)


def refused(body: Any, read: Any = read_chat) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body, served())
    return caught.value


def test_a_conversation_is_read_as_it_is_trained_on() -> None:
    """Contents in every form, forged specials in them: the ids of the slow twin, and the reply's start."""
    rng, tokenizer = random.Random(0), talk.tokenizer()
    for _ in range(200):
        messages = talk.random_row(rng, forged=True)["messages"][:-1]
        said = conversation.read_prompt({"messages": messages}, "here")
        ids, _ = talk.twin(tokenizer, said)
        for message in messages:  # as an answer of ours has them: the text beside the parts
            if message["role"] == "assistant" and isinstance(message["content"], list):
                message["parts"], message["content"] = message["content"], "the text alone"
        body = {"messages": messages, "model": "d4"}
        asked = read_chat(body, Served("d4", tokenizer, 10_000, 4, 20))
        assert asked.prompts == ((*ids, tokenizer.special_id("<|assistant_start|>")),)


def test_what_clients_send_by_default_is_taken() -> None:
    defaults = {
        **dict.fromkeys(("tools", "logprobs", "stop", "seed", "n", "unheard_of", "response_format")),
        **{"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tool_choice": "auto"},
        **{"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True},
    }
    asked = read_chat({**HI, **defaults}, served())
    assert (asked.n, asked.stop, asked.stream, asked.include_usage) == (1, (), False, False)
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (1.0, 1.0, 0)
    assert asked.sampling.max_tokens == CONTEXT
    assert read_completion({"prompt": "a"}, served()).sampling.max_tokens == 16
    developer = {"messages": [{"role": "developer", "content": "Be kind."}, *HI["messages"]]}
    system = {"messages": [{"role": "system", "content": "Be kind."}, *HI["messages"]]}
    assert read_chat(developer, served()).prompts == read_chat(system, served()).prompts


def test_what_is_asked_is_read() -> None:
    wanted = {"max_completion_tokens": 7, "max_tokens": 9, "temperature": 0, "top_p": 0.5, "top_k": 3}
    rest = {"seed": -5, "n": 4, "stop": "end", "stream": True, "stream_options": {"include_usage": True}}
    asked = read_chat({**HI, **wanted, **rest}, served())
    sampling = asked.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0, 0.5, 3)
    assert (sampling.seed, asked.n, asked.stop, asked.stream, asked.include_usage) == (
        -5,
        4,
        ("end",),
        True,
        True,
    )
    tokenizer = talk.tokenizer()
    asked = read_completion({"prompt": ["one", "<|bos|>"], "n": 2}, served())
    assert asked.prompts == tuple(
        (tokenizer.special_id("<|bos|>"), *tokenizer.encode(text)) for text in ("one", "<|bos|>")
    )


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ([], None, "the body is a list, expected an object"),
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "no message of the user"),
        ({"messages": 3}, "messages", "messages is 3, expected a list"),
        ({"messages": [7]}, "messages[0]", "messages[0] is 7"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "'robot', expected system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is null"),
        ({"messages": [*HI["messages"], {"role": "assistant", "content": ""}]}, "messages", "not the user's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "messages[0].content[0].type is 'image_url', and this model reads text only",
        ),
        ({"messages": HI["messages"] * 7}, "messages", "messages holds 7, expected 6 at most"),
        ({**HI, "tools": [{}]}, "tools", "tools is a list, which this server cannot do"),
        ({**HI, "logprobs": True}, "logprobs", "logprobs is True"),
        ({**HI, "response_format": {"type": "json_object"}}, "response_format", "cannot do"),
        ({**HI, "frequency_penalty": 0.5}, "frequency_penalty", "cannot do"),
        ({**HI, "max_token": 5}, "max_token", "'max_token' is no field that this server knows"),
        ({**HI, "temperature": "hot"}, "temperature", "temperature is 'hot', expected a number"),
        ({**HI, "temperature": True}, "temperature", "temperature is True"),
        ({**HI, "temperature": 2.5}, "temperature", "expected a number from 0 to 2"),
        ({**HI, "n": 5}, "n", "n is 5, expected a number from 1 to 4"),
        ({**HI, "n": 0}, "n", "n is 0"),
        ({**HI, "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({**HI, "seed": 2**70}, "seed", "seed is"),
        ({**HI, "stop": ["a", ""]}, "stop", "stop takes 4 texts of 1 to 256 characters"),
        ({**HI, "stop": list("abcde")}, "stop", "stop takes 4 texts"),
        ({**HI, "stop": [1]}, "stop", "stop[0] is 1"),
        ({**HI, "stream_options": {"include_usage": 1}}, "stream_options", "include_usage is 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body: Any, param: str | None, says: str) -> None:
    error = refused(body)
    assert (error.status, error.param) == (400, param)
    assert says in error.message
    assert "--skip-bad" not in error.message
    told = {"message": error.message, "type": "invalid_request_error", "param": param, "code": None}
    assert error.body() == {"error": told}


def test_completions_refuse_what_they_do_not_do() -> None:
    for field, value in (("echo", True), ("suffix", "x"), ("best_of", 2), ("logprobs", 1), ("messages", [])):
        assert refused({"prompt": "a", field: value}, read_completion).param == field
    for prompt in ([], ["a"] * 5, [1, 2], None):
        assert refused({"prompt": prompt}, read_completion).param == "prompt"


def test_a_text_that_fills_the_context_is_refused_with_the_code_that_clients_know() -> None:
    tokenizer = talk.tokenizer()
    fits = "the " * 1_000
    while len(tokenizer.encode(fits, bos=True)) >= CONTEXT:
        fits = fits[:-1]
    assert len(read_completion({"prompt": fits}, served()).prompts[0]) < CONTEXT
    for error in (
        refused({"prompt": fits + "the the"}, read_completion),
        refused({"messages": [{"role": "user", "content": fits}]}),
    ):
        assert (error.status, error.code) == (400, "context_length_exceeded")
    assert refused({**HI, "model": "gpt-4"}).body()["error"]["code"] == "model_not_found"


def reply_to(asked: Asked) -> Reply:
    return Reply(asked, served())


@functools.cache
def single_bytes() -> dict[int, int]:
    """The id of each byte."""
    tokenizer = talk.tokenizer()
    spelled = {tokenizer.decode_bytes([token]): token for token in range(tokenizer.bos_id)}
    return {value: spelled[bytes([value])] for value in range(256)}


PIECES = st.text(alphabet="ab\u00e9\U0001f600", max_size=12)


@settings(max_examples=300, deadline=None)
@given(text=PIECES, stops=st.lists(PIECES.filter(bool), max_size=4), stream=st.booleans())
def test_a_stop_string_ends_a_reply_and_no_part_of_it_is_sent(
    text: str, stops: list[str], stream: bool
) -> None:
    """Bytes come one by one. Twin: the text so far, as a whole, is searched after each."""
    raw, expected, finish, tokens = text.encode(), text, "length", len(text.encode())
    for size in range(len(raw) + 1):
        so_far = raw[:size].decode(errors="ignore")
        if found := [so_far.find(stop) for stop in stops if stop in so_far]:
            expected, finish, tokens = so_far[: min(found)], "stop", size
            break
    reply = reply_to(read_chat({**HI, "stop": stops, "stream": stream}, served()))
    ids, sent = single_bytes(), ""
    for value in raw:
        for chunk in reply.take([(0, Token(ids[value], True, True))]):
            sent += chunk["choices"][0]["delta"].get("content", "")
            assert expected.startswith(sent)
    for chunk in reply.take([(0, Completion((), (), "length"))]):
        sent += chunk["choices"][0]["delta"].get("content", "")
    choice = reply.whole()["choices"][0]
    assert sent == choice["message"]["content"] == expected
    assert choice["finish_reason"] == finish
    assert reply.usage()["completion_tokens"] == tokens


def random_reply(rng: random.Random) -> tuple[list[Token], Completion]:
    """A reply that the rules of tool calls let through: random draws, which like to call."""
    tokenizer = talk.tokenizer()
    calls, tokens = ToolCalls(tokenizer, True), list[Token]()
    liked = [tokenizer.special_id(f"<|{name}|>") for name in ("python_start", "python_end", "assistant_end")]
    some = tokenizer.encode("the cat 347+589 \u4f60\u597d \U0001f600")
    while len(tokens) < 60:
        drawn = rng.choice(liked if rng.random() < 0.2 else some)
        token, sampled, ending = calls.take(drawn)
        if ending == "forbidden":
            continue
        if ending == "stop":
            break
        tokens.append(Token(token, sampled, calls.is_text))
    reason: Any = "stop" if len(tokens) < 60 else "length"
    ids, sampled_flags = tuple(token.id for token in tokens), tuple(token.sampled for token in tokens)
    return tokens, Completion(ids, sampled_flags, reason)


def test_calls_are_parts_of_the_answer_and_of_its_chunks() -> None:
    """However the events are bunched: the parts that `parts_of` finds in the ids; together with the text."""
    rng, tokenizer = random.Random(1), talk.tokenizer()
    kinds = set()
    for _ in range(300):
        n = rng.choice((1, 1, 2))
        reply = reply_to(read_chat({**HI, "n": n, "stream_options": {"include_usage": True}}, served()))
        told = [random_reply(rng) for _ in range(n)]
        events = [[(index, event) for event in (*tokens, end)] for index, (tokens, end) in enumerate(told)]
        chunks = reply.opening()
        while any(events):
            bunch = []
            for mine in events:
                count = rng.randrange(6)
                bunch += mine[:count]
                del mine[:count]
            chunks += reply.take(bunch)
        assert reply.is_done
        chunks += reply.closing()
        usage = chunks.pop()
        assert usage["choices"] == []
        assert usage["usage"] == reply.usage() == reply.whole()["usage"]
        assert usage["usage"]["completion_tokens"] == sum(len(tokens) for tokens, _ in told)
        for index, (tokens, end) in enumerate(told):
            expected = conversation.parts_of(tokenizer, [token.id for token in tokens])
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert mine[-1]["delta"] == {}
            assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + [end.reason]
            said = []
            for choice in mine[1:-1]:
                ((kind, value),) = choice["delta"].items()
                said.append(Part("text", value) if kind == "content" else Part(value["type"], value["text"]))
            assert conversation.joined(said) == expected
            message = reply.whole()["choices"][index]["message"]
            assert message["parts"] == [{"type": part.kind, "text": part.text} for part in expected]
            assert message["content"] == "".join(part.text for part in expected if part.kind == "text")
            kinds |= {part.kind for part in expected}
    assert kinds == {"text", "python", "python_output"}


def test_an_answer_goes_back_as_it_came() -> None:
    """What the page and a client send after a reply with a call: the ids that the model wrote."""
    tokenizer = talk.tokenizer()
    parts = (
        Part("text", "Well. "),
        Part("python", "1+2"),
        Part("python_output", "3"),
        Part("text", "It is 3."),
    )
    turn = (Message("user", (Part("text", "hi"),)), Message("assistant", parts))
    ids = [
        *conversation.render(tokenizer, [(*turn, turn[0])]).ids,
        tokenizer.special_id("<|assistant_start|>"),
    ]
    written = [{"type": part.kind, "text": part.text} for part in parts]
    for message in ({"content": "Well. It is 3.", "parts": written, "refusal": None}, {"content": written}):
        body = {"messages": [*HI["messages"], {"role": "assistant", **message}, *HI["messages"]]}
        assert read_chat(body, served()).prompts == (tuple(ids),)


def test_a_completion_is_text_alone() -> None:
    reply = reply_to(read_completion({"prompt": ["a", "b"], "n": 2}, served()))
    assert reply.opening() == reply.closing() == []
    tokenizer = talk.tokenizer()
    ids = tokenizer.encode("the cat")
    special = Token(tokenizer.special_id("<|user_start|>"), True, True)
    for index in range(4):
        tokens = [*(Token(token, True, True) for token in ids), special]
        first, last = reply.take([(index, event) for event in (*tokens, Completion((), (), "aborted"))])
        assert (first["object"], first["choices"][0]["text"]) == ("text_completion", "the cat")
        assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "length")
    assert [choice["text"] for choice in reply.whole()["choices"]] == ["the cat"] * 4


def test_a_model_that_fails_is_an_error_of_the_server() -> None:
    with pytest.raises(ApiError) as caught:
        reply_to(read_chat(HI, served())).take([(0, MemoryError("what the user said"))])
    assert caught.value.status == 500
    assert caught.value.body()["error"]["type"] == "server_error"
    assert "said" not in caught.value.message
