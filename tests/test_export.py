import json

import numpy as np
import pytest
import torch

from nanochat import export, files
from nanochat.config import ExportArgs
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.hardware import Precision
from nanochat.scaling import GPTConfig
from nanochat.tokenizer import Tokenizer

TEXT = "the cat sat on a mat and saw two dogs near their red house\n\n  while 12 rains fell. "


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


def odd_model(tokenizer, recipe="july"):
    """Grouped heads, short windows, a vocabulary that needs padding rows; no parameter is left at zero."""
    shape = GPTConfig(3, 48, 6, 2, 8, tokenizer.vocab_size, 160, window_pattern="SL", recipe=recipe)
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


@pytest.mark.parametrize("recipe", ["july", "january"])
def test_transformers_computes_the_same_logits(tokenizer, tmp_path, recipe):
    transformers = pytest.importorskip("transformers")
    model = odd_model(tokenizer, recipe)
    export.write_hf(model, tokenizer, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.randint(0, tokenizer.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
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
    with pytest.raises(UserError, match="exists already"):
        export.run(ExportArgs(run="r"))
    with pytest.raises(UserError, match="'r'"):
        export.run(ExportArgs(run="r", out=str(base_dir / "elsewhere")))
