import json

import numpy as np
import pytest
import torch

from nanochat import export
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config.arguments import ExportArgs
from nanochat.config.model_config import GPTConfig
from nanochat.engine import Engine, Sampling
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

TEXT = "the cat sat on a mat and saw two dogs near their red house\n\n  while 12 rains fell. "


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


# Recipe, kind of attention, table of pairs.
MODELS = [
    ("nanochat-2026-07", "softmax", False),
    ("nanochat-2026-01", "softmax", True),
    ("nanochat-2026-07", "diff1", True),
    ("nanochat-2026-07", "diff2", False),
]


def odd_model(tokenizer, recipe="nanochat-2026-07", kind="softmax", bigram=False, **constants):
    """Grouped heads, short windows, a vocabulary that needs padding rows; no parameter is left at zero."""
    size = tokenizer.vocab_size
    constants |= {"recipe": recipe, "attention_kind": kind, "bigram": bigram}
    shape = GPTConfig(
        n_layer=3,
        n_embd=48,
        n_head=6,
        n_kv_head=2,
        head_dim=8,
        vocab_size=size,
        sequence_len=160,
        window_pattern="SL",
        **constants,
    )
    model = GPT(shape, Precision(torch.float32, "sdpa"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.init_weights(0)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def test_the_folder_holds_what_transformers_needs(tokenizer, tmp_path):
    export.write_hf(odd_model(tokenizer), tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modeling_nanochat.py",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size
    assert (config["windows"], config["value_layers"]) == ([128, 160, 160], [0, 2])
    # A special token is text here, so a chat template would give wrong ids: there is none.
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"] == []
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def short_windows(tokenizer, which):
    """An odd model whose short windows end within a cache of a few positions."""
    return odd_model(tokenizer, *which, window_multiple=16, short_window_divisor=8)


def random_ids(tokenizer, rows=2, length=150):
    shape = (rows, length)
    return torch.randint(0, tokenizer.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def loaded(model, tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    export.write_hf(model, tokenizer, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("which", MODELS)
def test_transformers_computes_the_same_logits_and_greedy_text(tokenizer, tmp_path, which):
    model = odd_model(tokenizer, *which)
    theirs, ids = loaded(model, tokenizer, tmp_path / "out"), random_ids(tokenizer)
    with torch.no_grad():
        ours, found = model.logits(ids), theirs(ids, labels=ids)
    np.testing.assert_allclose(found.logits.numpy(), ours.numpy(), atol=2e-5)
    expected = model.loss(ids[:, :-1], ids[:, 1:].contiguous())
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    greedy = theirs.generate(ids[:1, :9], max_new_tokens=5, do_sample=False)
    row = ids[:1, :9]
    for _ in range(greedy.size(1) - 9):
        row = torch.cat((row, model.logits(row)[:, -1:].argmax(-1)), dim=1)
    assert greedy.tolist() == row.tolist()


@pytest.mark.parametrize("which", MODELS)
def test_behind_its_cache_transformers_computes_the_same(tokenizer, tmp_path, which):
    """Logits in pieces, greedy text, beams that reorder the cache: with it, without it, and by our engine."""
    transformers = pytest.importorskip("transformers")
    model = short_windows(tokenizer, which)
    assert model.config.windows == (32, 160, 160)
    theirs, ids = loaded(model, tokenizer, tmp_path / "out"), random_ids(tokenizer)
    with torch.no_grad():
        plain = theirs(ids, use_cache=False).logits
        for cache in (None, transformers.DynamicCache(), transformers.DynamicCache(config=theirs.config)):
            pieces = []
            for piece in ids.split([40, 1, 1, 58, 50], dim=1):
                out = theirs(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
            np.testing.assert_allclose(torch.cat(pieces, dim=1).numpy(), plain.numpy(), atol=1e-5)
    prompts = ids[:, :40]
    common = {"attention_mask": torch.ones_like(prompts), "do_sample": False}
    done = Engine(model, tokenizer).generate(prompts.tolist(), Sampling(30, temperature=0))
    for cached in (True, False):
        out = theirs.generate(prompts, use_cache=cached, max_new_tokens=30, **common)[:, 40:].tolist()
        assert [list(ours.ids) for [ours] in done] == [
            row[: row.index(tokenizer.bos_id)] if tokenizer.bos_id in row else row for row in out
        ]
    beams = [
        theirs.generate(prompts, use_cache=cached, max_new_tokens=12, num_beams=3, **common).tolist()
        for cached in (True, False)
    ]
    assert beams[0] == beams[1]


def test_another_cache_and_a_mask_of_other_length_are_one_clear_error(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs, ids = loaded(odd_model(tokenizer), tokenizer, tmp_path / "out"), random_ids(tokenizer, 1, 9)
    static = transformers.StaticCache(config=theirs.config, max_cache_len=32)
    with pytest.raises(ValueError, match="the cache is a StaticCache: expected a DynamicCache"):
        theirs(ids, past_key_values=static)
    cache = theirs(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\): expected \(1, 9\)"):
        theirs(ids[:, 6:], past_key_values=cache, attention_mask=torch.ones(1, 3))


def test_its_tokenizer_gives_our_ids_after_a_bos(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    export.write_hf(odd_model(tokenizer), tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TEXT, "", "caf\u00e9 \U0001f600\n\n x"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.bos_id


def test_requests_that_cannot_be_met_are_one_clear_error(base_dir):
    with pytest.raises(UserError, match="--run is missing"):
        export.run(ExportArgs())
    (files.run_dir("r") / "hf").mkdir(parents=True)
    (files.run_dir("r") / "hf" / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        export.run(ExportArgs(run="r"))
    with pytest.raises(UserError, match="'r'"):
        export.run(ExportArgs(run="r", out=str(base_dir / "elsewhere")))


def exported(tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    model = odd_model(tokenizer)
    theirs = loaded(model, tokenizer, folder)
    return model, theirs, transformers.AutoTokenizer.from_pretrained(folder)


SPELLED = (
    "a <|bos|> b",
    "<|bos|>",
    "<|bos|><|bos|>x",
    "\n<|user_start|>hi<|user_end|> <|bos|",
    "<|bos|>\u00e9",
)


@pytest.mark.parametrize("text", SPELLED)
def test_a_text_that_spells_a_special_token_is_text_in_transformers_too(tokenizer, tmp_path, text):
    _, _, theirs = exported(tokenizer, tmp_path / "out")
    theirs.save_pretrained(tmp_path / "again")
    again = type(theirs).from_pretrained(tmp_path / "again")
    for found in (theirs, again):
        assert found(text)["input_ids"] == tokenizer.encode(text, bos=True)
        assert found([text, "plain"])["input_ids"][0] == tokenizer.encode(text, bos=True)
        assert found.tokenize(text) == found.convert_ids_to_tokens(tokenizer.encode(text))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_other_lengths_are_padded_and_give_what_they_give_alone(tokenizer, tmp_path, side):
    model, theirs, encoder = exported(tokenizer, tmp_path / "out")
    texts = ["the cat sat on a mat and saw", "two", "dogs near their red house while 12 rains fell. the"]
    batch = encoder(texts, padding=True, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**batch).logits
        for row, text in enumerate(texts):
            ids = torch.tensor([tokenizer.encode(text, bos=True)])
            kept = logits[row][batch["attention_mask"][row].bool()]
            np.testing.assert_allclose(kept.numpy(), model.logits(ids)[0].numpy(), atol=2e-5)
    longest = batch["input_ids"].size(1)
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    done, plain, chunked = (
        theirs.generate(**batch, **common, **how)[:, longest:]
        for how in ({}, {"use_cache": False}, {"prefill_chunk_size": 5})
    )
    assert done.tolist() == plain.tolist() == chunked.tolist()
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer.encode(text, bos=True)])
        for _ in range(6):
            ids = torch.cat((ids, model.logits(ids)[:, -1:].argmax(-1)), dim=1)
        assert done[row].tolist() == ids[0, -6:].tolist()


def test_padding_between_tokens_and_rows_of_padding_alone_do_no_harm(tokenizer, tmp_path):
    model, theirs, _ = exported(tokenizer, tmp_path / "out")
    ids = torch.tensor([[tokenizer.bos_id, 7, 0, 9, 0, 0, 11], [0, 0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0] * 7])
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask).logits
        expected = model.logits(torch.tensor([[tokenizer.bos_id, 7, 9, 11]]))[0]
    np.testing.assert_allclose(logits[0, [0, 1, 3, 6]].numpy(), expected.numpy(), atol=2e-5)
    assert logits.isfinite().all()


def test_an_empty_folder_is_written_to_and_a_link_stays_a_link(tokenizer, tmp_path, base_dir, monkeypatch):
    from nanochat.checkpoint import state as checkpoint_state

    model = odd_model(tokenizer)
    monkeypatch.setattr(
        checkpoint_state, "load_model", lambda *a, **k: (model, tokenizer, {"step": 1, "plan": {}})
    )
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    assert export.run(ExportArgs(run="r", out=str(tmp_path / "out"))) == tmp_path / "big"
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="exists already"):
        export.run(ExportArgs(run="r", out=str(tmp_path / "out")))


@pytest.mark.parametrize("finetune", [None, {"stage": "sft"}])
def test_only_a_run_of_the_chat_stage_gets_a_chat_template(tokenizer, tmp_path, monkeypatch, finetune):
    from nanochat.checkpoint import state as checkpoint_state

    meta = {"step": 1, "plan": {"finetune": finetune}}
    monkeypatch.setattr(
        checkpoint_state, "load_model", lambda *a, **k: (odd_model(tokenizer), tokenizer, meta)
    )
    folder = export.run(ExportArgs(run="r", out=str(tmp_path / "out")))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert ("chat_template" in config) == (config["eos_token"] == "<|assistant_end|>") == bool(finetune)
    assert config["split_special_tokens"] == (not finetune)
