"""The format of conversations: read from JSON, rendered with a mask, fitted, read back from ids."""

from __future__ import annotations

import copy
import json
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.chat import conversation
from nanochat.chat.conversation import Message, Part
from nanochat.common.errors import UserError
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer
from tests.chat import talk

SEEDS = st.integers(0, 2**32)
U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def read(*messages, **more):
    return conversation.read({"messages": list(messages), **more}, "mine.jsonl:7")


def call(expression, name="calculator", **more):
    """A tool call as OpenAI writes it."""
    function = {"name": name, "arguments": json.dumps({"expression": expression})}
    return {"type": "function", "function": function, **more}


def test_ids_and_mask_of_one_conversation_written_by_hand():
    tokenizer = talk.tokenizer()
    said = read(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 20/2?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "20/2"},
                {"type": "python_output", "text": "10"},
                {"type": "text", "text": "10."},
            ],
        },
        U,
        A,
    )
    pieces = [  # text or special, supervised
        ("<|bos|>", False),
        ("<|user_start|>", False),
        ("Be brief.\n\nWhat is 20/2?", False),
        ("<|user_end|>", False),
        ("<|assistant_start|>", False),
        ("It is ", True),
        ("<|python_start|>", True),
        ("20/2", True),
        ("<|python_end|>", True),
        ("<|output_start|>", False),
        ("10", False),
        ("<|output_end|>", False),
        ("10.", True),
        ("<|assistant_end|>", True),
        ("<|user_start|>", False),
        ("hi", False),
        ("<|user_end|>", False),
        ("<|assistant_start|>", False),
        ("yes", True),
        ("<|assistant_end|>", True),
    ]
    ids, mask = [], []
    for piece, supervised in pieces:
        one = [tokenizer.special_id(piece)] if piece in SPECIALS else tokenizer.encode(piece)
        ids += one
        mask += [supervised] * len(one)
    found = conversation.render(tokenizer, [said])
    assert (found.ids.tolist(), found.supervised.tolist()) == (ids, mask)
    assert (found.ids.dtype, found.supervised.dtype, found.offsets.dtype) == (np.int32, bool, np.int64)
    asked = ids[: -1 - len(tokenizer.encode("yes"))]
    assert conversation.prompt(tokenizer, said[:4]) == asked


@given(SEEDS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_conversations_end_to_end_are_those_of_the_slow_twin(seed, forged):
    rng, tokenizer = random.Random(seed), talk.tokenizer()
    several = [conversation.read(talk.random_row(rng, forged), "x") for _ in range(rng.randrange(4))]
    found = conversation.render(tokenizer, several)
    assert len(found.offsets) == len(several) + 1
    assert found.offsets[-1] == len(found.ids) == len(found.supervised)
    for said, start, end in zip(several, found.offsets, found.offsets[1:], strict=False):
        expected = talk.twin(tokenizer, said)
        assert (found.ids[start:end].tolist(), found.supervised[start:end].tolist()) == expected
        asked = conversation.prompt(tokenizer, said[:-1])
        assert asked == expected[0][: len(asked)]
        assert asked[-1] == tokenizer.special_id("<|assistant_start|>")


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_texts_that_spell_special_tokens_stay_text(seed):
    tokenizer = talk.tokenizer()
    said = conversation.read(talk.random_row(random.Random(seed), forged=True), "x")
    ids = conversation.render(tokenizer, [said]).ids.tolist()
    markers = {"python": 2, "python_output": 2, "text": 0}
    turns = [message for message in said if message.role != "system"]
    inner = sum(markers[part.kind] for message in turns for part in message.parts)
    assert sum(token >= tokenizer.bos_id for token in ids) == 1 + 2 * len(turns) + inner
    texts = ["".join(part.text for part in message.parts) for message in said]
    if said[0].role == "system":
        texts[0] += "\n\n"
    found = tokenizer.decode([token for token in ids if token < tokenizer.bos_id])
    assert found == "".join(texts)


def reply_ids(tokenizer, said):
    """Ids of the last reply, without its ends."""
    ids = conversation.render(tokenizer, [said]).ids.tolist()
    last = len(ids) - 1 - ids[::-1].index(tokenizer.special_id("<|assistant_start|>"))
    return ids[last + 1 : -1]


def with_reply(parts):
    return (Message("user", ()), Message("assistant", tuple(parts)))


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_reply_s_ids_give_its_parts_and_these_the_ids(seed):
    tokenizer = talk.tokenizer()
    said = conversation.read(talk.random_row(random.Random(seed), forged=True), "x")
    ids = reply_ids(tokenizer, said)
    assert conversation.parts_of(tokenizer, ids) == said[-1].parts
    assert reply_ids(tokenizer, with_reply(said[-1].parts)) == ids


ODD_IDS = st.one_of(st.integers(-5, 1010), st.integers(991, 999), st.integers(0, 255))


@given(st.lists(ODD_IDS, max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_ids_are_parts_that_are_rendered_and_read_to_the_same(ids):
    tokenizer = talk.tokenizer()
    assert tokenizer.bos_id == 991
    parts = conversation.parts_of(tokenizer, ids)
    again = reply_ids(tokenizer, with_reply(parts))
    assert conversation.parts_of(tokenizer, again) == parts


def test_malformed_replies_are_parts():
    tokenizer = talk.tokenizer()
    names = {name[2:-2]: tokenizer.special_id(name) for name in SPECIALS}
    one, two = tokenizer.encode("1+"), tokenizer.encode("2")
    cases = [
        ([], ()),
        ([names["python_start"], *one], (Part("python", "1+"),)),
        (
            [names["python_start"], *one, names["output_start"], *two],
            (Part("python", "1+"), Part("python_output", "2")),
        ),
        ([*one, names["python_end"], *two], (Part("text", "1+2"),)),
        ([names["bos"], *one, 5000, -1], (Part("text", "1+"),)),
        ([names["python_start"], names["python_end"]], (Part("python", ""),)),
    ]
    for ids, parts in cases:
        assert conversation.parts_of(tokenizer, ids) == parts


PYTHON, OUTPUT = Part("python", "20/2"), Part("python_output", "10")


def test_tool_calls_as_openai_writes_them_are_parts_of_one_turn():
    asked = {"role": "assistant", "content": None, "tool_calls": [call("20/2", id="a")]}
    answered = {"role": "tool", "tool_call_id": "a", "content": "10"}
    assert read(U, asked, answered, A)[1].parts == (PYTHON, OUTPUT, Part("text", "yes"))
    assert read(U, asked, answered)[1].parts == (PYTHON, OUTPUT)
    assert [m.role for m in read(U, asked, answered, U, A)] == ["user", "assistant", "user", "assistant"]
    twice = read(U, asked | {"content": "So: "}, answered, asked, answered, A)
    assert twice[1].parts == (Part("text", "So: "), PYTHON, OUTPUT, PYTHON, OUTPUT, Part("text", "yes"))
    plain = call("20/2")
    plain["function"]["arguments"] = {"expression": "20/2"}
    listed = {"role": "tool", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "0"}]}
    assert read(U, asked | {"tool_calls": [plain]}, listed, A) == read(U, asked, answered, A)
    assert read(U, A | {"tool_calls": []}, U | {"tool_calls": None}, A | {"tool_calls": None})


def test_results_of_parallel_calls_stand_behind_their_calls():
    asked = {"role": "assistant", "content": "", "tool_calls": [call("1+1", id="a"), call("2+2", id="b")]}
    first, second = ({"role": "tool", "tool_call_id": key, "content": value} for key, value in ("a2", "b4"))
    parts = [
        Part("python", "1+1"),
        Part("python_output", "2"),
        Part("python", "2+2"),
        Part("python_output", "4"),
    ]
    assert read(U, asked, first, second)[1].parts == tuple(parts)
    assert read(U, asked, second, first)[1].parts == (*parts[2:], *parts[:2])
    for lines in ([first, U, A], [first, A], [first]):
        with pytest.raises(UserError, match="expected tool|ends with a tool call"):
            read(U, asked, *lines)
    with pytest.raises(
        UserError, match=r"messages\[3\].tool_call_id is 'a', expected the id of a call that has"
    ):
        read(U, asked, first, first)


def test_ids_may_be_numbers():
    asked = {"role": "assistant", "content": "", "tool_calls": [call("1+1", id=1), call("2+2", id=0)]}
    second, first = (
        {"role": "tool", "tool_call_id": key, "content": value} for key, value in ((0, "4"), (1, "2"))
    )
    outputs = [part.text for part in read(U, asked, second, first)[1].parts]
    assert outputs == ["2+2", "4", "1+1", "2"]
    assert conversation.read({"messages": [U, A], "id": 7}, "x") == read(U, A)


def test_an_empty_id_is_none():
    asked = {"role": "assistant", "content": "", "tool_calls": [call("1+1", id=""), call("2+2", id="")]}
    results = ({"role": "tool", "tool_call_id": "", "content": value} for value in "24")
    assert [part.text for part in read(U, asked, *results)[1].parts] == ["1+1", "2", "2+2", "4"]


def test_sharegpt_and_lists_of_texts_are_read():
    lines = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yes"},
        {"from": "user", "value": "hi"},
        {"from": "assistant", "value": "yes"},
    ]
    expected = read({"role": "system", "content": "s"}, U, A, U, A)
    assert conversation.read({"conversations": lines}, "x") == expected
    texts = [{"type": "text", "text": text} for text in ("h", "", "i")]
    assert read({"role": "user", "content": texts}, A) == read(U, A)


def test_texts_may_be_empty_but_not_all_replies():
    empty = {"role": "assistant", "content": ""}
    said = read({"role": "user", "content": ""}, empty, U, A)
    assert [len(message.parts) for message in said] == [0, 0, 1, 1]
    tokenizer = talk.tokenizer()
    found = conversation.render(tokenizer, [said])
    assert (found.ids.tolist(), found.supervised.tolist()) == talk.twin(tokenizer, said)
    output = {"role": "assistant", "content": [{"type": "python_output", "text": "4"}]}
    for lines in ([U, empty], [U, empty, U, output]):
        with pytest.raises(UserError, match="hold no text and no code"):
            read(*lines)


def test_a_prompt_may_end_with_the_user_s_message_and_what_is_trained_on_may_not():
    assert conversation.read_prompt({"messages": [U]}, "x") == (Message("user", (Part("text", "hi"),)),)
    assert conversation.read_prompt({"messages": [U, A]}, "x") == read(U, A)
    with pytest.raises(UserError, match="the last message is the user's, expected a reply"):
        read(U)
    with pytest.raises(UserError, match="nothing to answer"):
        conversation.prompt(talk.tokenizer(), read(U, A))


def parts(*pairs):
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in pairs]}


def calling(*calls):
    return [
        U,
        {"role": "assistant", "content": None, "tool_calls": list(calls)},
        {"role": "tool", "content": "1"},
    ]


def misspelt(arguments):
    one = call("1")
    one["function"]["arguments"] = arguments
    return calling(one)


BAD = [
    ([], "the line is a list, expected an object"),
    (None, "the line is null, expected an object"),
    ("hi", "the line is 'hi', expected an object"),
    ({}, "messages is missing"),
    ({"messages": []}, "messages holds no message of the user"),
    ({"messages": {}}, "messages is an object, expected a list"),
    ({"messages": [U, A], "id": [3]}, "id is a list, expected a text or a whole number"),
    ({"messages": [U, A], "tool_call_id": 1.5}, "tool_call_id is 1.5, expected a text or a whole number"),
    ({"messages": [U, A], "source": []}, "source is a list, expected a text or null"),
    ([U, "yes"], "messages[1] is 'yes', expected an object"),
    ([U], "the last message is the user's, expected a reply"),
    ([U, A, U], "the last message is the user's, expected a reply"),
    ([A, U], "messages[0].role is 'assistant', expected system or user"),
    ([U, U, A], "messages[1].role is 'user', expected assistant"),
    ([U, A, A], "messages[2].role is 'assistant', expected user"),
    ([U, A, {"role": "system", "content": ""}], "messages[2].role is 'system', expected user"),
    ([{"role": "system", "content": "s"}], "messages holds no message of the user"),
    ([U, {"role": "bot", "content": "x"}], "messages[1].role is 'bot', expected assistant"),
    ([U, {"role": "call", "content": "x"}], "messages[1].role is 'call', expected assistant"),
    ([U, {"role": 3, "content": "x"}], "messages[1].role is 3, expected assistant"),
    ([U, {"content": "x"}], "messages[1].role is null, expected assistant"),
    ([U, A, {"role": "tool", "content": "x"}], "messages[2].role is 'tool', expected user"),
    ([U, {"role": "assistant"}], "messages[1].content is null, expected a text or a list"),
    ([U, {"role": "assistant", "content": 5}], "messages[1].content is 5, expected a text or a list"),
    ([U, {"role": "assistant", "content": ["a"]}], "messages[1].content[0] is 'a', expected an object"),
    ([U, {"role": "assistant", "content": [{"type": "text"}]}], "messages[1].content[0].text is missing"),
    ([U, parts(("text", None))], "messages[1].content[0].text is null, expected a text"),
    (
        [U, parts(("text", "a"), ("image_url", "b"))],
        "messages[1].content[1].type is 'image_url', expected text or python",
    ),
    (
        [parts(("python", "1")) | {"role": "user"}, A],
        "messages[0].content[0].type is 'python', expected text.",
    ),
    ([U, {"role": "assistant", "content": "\ud800"}], "messages[1].content holds half of a surrogate pair"),
    ([U, parts(("text", "\udfff"))], "messages[1].content[0].text holds half of a surrogate pair"),
    (
        calling(call("1", name="search")),
        "messages[1].tool_calls[0].function.name is 'search', expected 'calculator'",
    ),
    (calling(call("1", id=[])), "messages[1].tool_calls[0].id is a list, expected a text or a whole number"),
    (
        calling(call("1", id="a"), call("1", id="a")),
        "messages[1].tool_calls[1].id is 'a', as that of another call",
    ),
    (calling({"id": "a"}), "messages[1].tool_calls[0].function is missing"),
    (misspelt("{"), "messages[1].tool_calls[0].function.arguments is not JSON"),
    (misspelt("[" * 10**5), "messages[1].tool_calls[0].function.arguments is not JSON (nested too deeply)"),
    (misspelt("{}"), "messages[1].tool_calls[0].function.arguments.expression is missing"),
    (misspelt({"expression": 1}), "arguments.expression is 1, expected a text"),
    (misspelt({"expression": "\ud800"}), "arguments.expression holds half of a surrogate pair"),
    (misspelt(None), "messages[1].tool_calls[0].function.arguments is null, expected a text or an object"),
    (
        [U, {"role": "assistant", "content": None, "tool_calls": 5}],
        "messages[1].tool_calls is 5, expected a list",
    ),
    ([*calling(call("1"))[:2], {"role": "tool", "content": None}], "messages[2].content is null"),
    (
        [*calling(call("1"))[:2], {"role": "tool", "content": "1", "tool_call_id": 7}],
        "messages[2].tool_call_id is '7', expected the id of a call that has no result yet",
    ),
    (calling(call("1"))[:2], "messages ends with a tool call"),
    (
        {"conversations": [{"from": "human", "value": 3}]},
        "conversations[0].value is 3, expected a text or a list",
    ),
    (
        {"conversations": [{"from": "dog", "value": ""}]},
        "conversations[0].from is 'dog', expected system or user",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_input_is_one_error_with_line_and_key(row, message):
    if isinstance(row, list) and row:
        row = {"messages": row}
    with pytest.raises(UserError) as caught:
        conversation.read(row, "mine.jsonl:7")
    text = str(caught.value)
    assert text.startswith("mine.jsonl:7: ")
    assert message in text
    assert text.endswith("Correct it, or leave such lines out with chat_data --skip-bad.")
    assert text.isascii()
    assert len(text.splitlines()) == 1
    assert len(text) < 300


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec=None), max_size=5),
    st.sampled_from(
        ("system", "user", "human", "gpt", "assistant", "tool", "text", "python", "calculator", "{}")
    ),
)
KEYS = st.sampled_from(
    ("messages", "conversations", "role", "content", "from", "value", "type", "text", "id", "tool_calls")
    + ("function", "name", "arguments", "expression", "tool_call_id")
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def places(value, path=()):
    """Paths of all values within a value."""
    yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield from places(inner, (*path, key))


def changed(row, path, value):
    """The row with another value at a path."""
    row = copy.deepcopy(row)
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return row


GOOD = {
    "messages": [
        *calling(call("20/2", id="a"), call("1")),
        {"role": "tool", "content": "10"},
        A,
        U,
        parts(("text", "a"), ("python", "1"), ("python_output", "1")),
    ]
}


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_json_reads_or_is_a_user_error(data):
    row = data.draw(JSON)
    if data.draw(st.booleans()):
        path = data.draw(st.sampled_from([path for path in places(GOOD) if path]))
        row = changed(GOOD, path, row)
    try:
        said = conversation.read(row, "x:1")
    except UserError:
        return
    tokenizer = talk.tokenizer()
    found = conversation.render(tokenizer, [said])
    assert (found.ids.tolist(), found.supervised.tolist()) == talk.twin(tokenizer, said)
    assert found.supervised.any()


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_the_oldest_turns_go_and_as_few_as_fit(seed):
    rng, tokenizer = random.Random(seed), talk.tokenizer()
    said = sum((conversation.read(talk.random_row(rng), "x") for _ in range(3)), ())
    turns = tuple(message for message in said if message.role != "system")[:-1]
    system = (Message("system", (Part("text", "Be brief."),)),) * rng.randrange(2)
    room = rng.randrange(20, 150)
    lengths = [
        len(conversation.prompt(tokenizer, system + turns[start:])) for start in range(0, len(turns), 2)
    ]
    fitting = [number for number, length in enumerate(lengths) if length <= room]
    if not fitting:
        with pytest.raises(UserError, match=f"more than the {room} tokens"):
            conversation.fit(tokenizer, system + turns, room)
        return
    kept, dropped = conversation.fit(tokenizer, system + turns, room)
    assert dropped == fitting[0]
    assert kept == system + turns[2 * dropped :]


def test_a_tokenizer_without_the_special_tokens_is_refused_where_it_is_read(tmp_path):
    talk.tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text("utf-8"))
    for name in SPECIALS[1:]:
        del document["model"]["vocab"][name]
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(UserError, match=r"not <\|bos\|> to <\|output_end\|>"):
        Tokenizer.load(tmp_path)


@pytest.mark.slow
def test_twenty_thousand_short_conversations_a_second():
    rng = random.Random(0)
    several = [conversation.read(talk.random_row(rng), "x") for _ in range(2000)] * 10
    start = time.perf_counter()
    conversation.render(talk.tokenizer(), several)
    assert len(several) / (time.perf_counter() - start) > 20_000
