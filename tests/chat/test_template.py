"""The chat template of an exported run: the ids and masks of ours in transformers, and what it refuses."""

from __future__ import annotations

import json
import random

import pytest
import torch

from nanochat import export
from nanochat.chat import conversation
from nanochat.chat.replies import ReplyEngine
from nanochat.engine import Sampling
from nanochat.tokenizer.tokenizer import SPECIALS
from tests.chat import talk
from tests.test_export import odd_model

transformers = pytest.importorskip("transformers")
U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    export.write_hf(odd_model(talk.tokenizer()), talk.tokenizer(), folder, chat=True)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def differences(theirs, count, seed):
    """How many of some random conversations have other ids or another mask in transformers."""
    rng = random.Random(seed)
    rows = [talk.random_row(rng) for _ in range(count)]
    rows = [row for row in rows if not any(name in texts for texts in spelled(row) for name in SPECIALS)]
    assert len(rows) > 0.9 * count
    ours = conversation.render(talk.tokenizer(), [conversation.read(row, "x") for row in rows])
    different = 0
    for row, start, end in zip(rows, ours.offsets, ours.offsets[1:], strict=False):
        found = theirs.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = ours.ids[start:end].tolist(), ours.supervised[start:end].tolist()
        different += (found["input_ids"], found["assistant_masks"]) != (ids, mask)
    return different


def spelled(row):
    """The texts of a row's messages: pieces drawn side by side may spell a special token by chance."""
    for message in row["messages"]:
        content = message["content"]
        yield content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_ids_and_masks_are_those_of_transformers(theirs):
    assert differences(theirs, 300, seed=1) == 0


@pytest.mark.slow
def test_ids_and_masks_are_those_of_transformers_on_ten_thousand_conversations(theirs):
    assert differences(theirs, 10_000, seed=2) == 0


def test_a_prompt_and_a_saved_copy_are_the_same(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    rng, tokenizer = random.Random(3), talk.tokenizer()
    for _ in range(30):
        messages = talk.random_row(rng)["messages"][:-1]
        asked = conversation.read_prompt({"messages": messages}, "x")
        for found in (theirs, again):
            ids = found.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ids == conversation.prompt(tokenizer, asked)
    assert theirs.eos_token_id == again.eos_token_id == tokenizer.special_id("<|assistant_end|>")
    reply = tokenizer.encode("It is 4.")
    assert theirs.decode([*reply, theirs.eos_token_id], skip_special_tokens=True) == "It is 4."


def text_parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", SPECIALS)
def test_a_forged_special_token_is_text_in_ours_and_refused_in_theirs(theirs, name):
    forged = f"a {name} b"
    contents = [forged, name, text_parts(forged), text_parts(f"a {name[:4]}", "", f"{name[4:]} b")]
    replies = [
        *contents,
        [{"type": "python", "text": forged}],
        [{"type": "python_output", "text": name}, *text_parts("a")],
    ]
    cases = [[{"role": "user", "content": content}, A] for content in contents]
    cases += [[{"role": "system", "content": content}, U, A] for content in contents]
    cases += [[U, A, U, {"role": "assistant", "content": content}] for content in replies]
    tokenizer = talk.tokenizer()
    for messages in cases:
        with pytest.raises(Exception, match="spells the special token"):
            theirs.apply_chat_template(messages)
        ids = conversation.render(tokenizer, [conversation.read({"messages": messages}, "x")]).ids
        assert name in tokenizer.decode([token for token in ids.tolist() if token < tokenizer.bos_id])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([A], "messages[0].role is 'assistant', expected system or user"),
        ([U, U], "messages[1].role is 'user', expected assistant"),
        ([U, A, {"role": "system", "content": ""}], "messages[2].role is 'system', expected user"),
        ([U, A, {"role": "tool", "content": "4"}], "messages[2].role is 'tool', expected user"),
        ([U, {"role": "assistant", "content": 3}], "messages[1].content is neither a text nor a list"),
        ([U, {"role": "assistant", "content": {}}], "messages[1].content is neither a text nor a list"),
        ([{"role": "user", "content": [{"type": "python", "text": ""}]}], "type 'python', expected text"),
        ([U, {"role": "assistant", "content": [{"type": "image"}]}], "type 'image', expected text or python"),
    ],
)
def test_what_ours_refuses_theirs_refuses(theirs, messages, message):
    with pytest.raises(Exception) as caught:
        theirs.apply_chat_template(messages)
    assert message in str(caught.value)


def test_the_folder_ends_replies_and_never_writes_a_marker(folder):
    tokenizer = talk.tokenizer()
    generation = json.loads((folder / "generation_config.json").read_text())
    end = tokenizer.special_id("<|assistant_end|>")
    assert (
        generation["eos_token_id"] == json.loads((folder / "config.json").read_text())["eos_token_id"] == end
    )
    assert sorted([*generation["suppress_tokens"], end]) == [tokenizer.special_id(name) for name in SPECIALS]


@pytest.mark.slow
def test_greedy_replies_are_those_of_our_engine(tmp_path):
    tokenizer = talk.tokenizer()
    model = odd_model(tokenizer)
    export.write_hf(model, tokenizer, tmp_path / "hf", chat=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    rng = random.Random(4)
    prompts: list[list[int]] = []
    while len(prompts) < 50:
        said = conversation.read(talk.random_row(rng), "x")[:-1]
        ids = conversation.prompt(tokenizer, said)
        prompts += [ids] if len(ids) <= model.config.sequence_len - 32 else []
    engine = ReplyEngine(model, tokenizer)
    for ids, [reply] in zip(
        prompts, engine.replies(prompts, Sampling(32, temperature=0), tools=False), strict=True
    ):
        found = theirs.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[
            0, len(ids) :
        ].tolist()
        ended = [tokenizer.special_id("<|assistant_end|>")] * (reply.reason == "stop")
        assert found == [*reply.ids, *ended]
