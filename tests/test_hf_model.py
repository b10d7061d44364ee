"""CORE of models of Hugging Face, against the plain scorer; tiny random models, saved here."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dev.bench import naive_core
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.config.arguments import EvalArgs
from nanochat.distributed.world import World
from nanochat.evaluation import base_eval, hf_model
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import evaluate
from nanochat.evaluation.core.bundle import Bundle
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.test_core_eval import WORDS, small_bundle, stories_bundle

transformers = pytest.importorskip("transformers")

SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    # Its logits are capped behind the head, and layers have windows.
    "gemma2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "sliding_window": 64,
        "final_logit_softcapping": 0.5,
        "attn_implementation": "eager",
    },
}


def save_model(folder, kind):
    """A tiny random model with a tokenizer of ours in the format of Hugging Face."""
    own = Tokenizer.train([" ".join(WORDS) + "\n\nQ: A:"], 300)
    own.save(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|bos|>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=own.vocab_size, **SHAPES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    return folder


class Logits:
    """What the plain scorer asks of a model."""

    def __init__(self, model):
        self.model = model

    def logits(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


class Encode:
    """What the plain scorer asks of a tokenizer."""

    def __init__(self, tokenizer):
        self.bos_id, self.tokenizer = tokenizer.bos_id, tokenizer

    def encode(self, text, bos=False):
        return [self.bos_id] * bos + self.tokenizer.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("kind", list(SHAPES))
def test_a_model_of_hugging_face_answers_as_one_example_at_a_time(tmp_path, kind):
    folder = save_model(tmp_path / kind, kind)
    scorer, tokenizer = hf_model.load(str(folder), torch.device("cpu"), torch.float32)
    assert scorer.context_tokens == 512
    for bundle in (small_bundle(12), stories_bundle()):
        result = evaluate.evaluate(scorer, tokenizer, bundle, world=World.single_process())
        got = iter(result.predictions)
        for task in core_bundle.load_tasks(bundle):
            examples = core_bundle.load_examples(bundle, task)
            plain = naive_core.answers(Logits(scorer.model), Encode(tokenizer), task, examples, 0, 512)
            for expected in plain:
                found = next(got)
                np.testing.assert_allclose(found.losses, expected.losses, atol=1e-4)
                assert found.answer == expected.answer


def test_what_is_shared_is_read_once_where_the_model_has_a_cache(tmp_path):
    scorer, tokenizer = hf_model.load(
        str(save_model(tmp_path / "m", "llama")), torch.device("cpu"), torch.float32
    )
    calls = []
    whole = scorer.base.forward

    def counted(*args, **kwargs):
        calls.append(kwargs["input_ids"].numel())
        return whole(*args, **kwargs)

    scorer.base.forward = counted
    result = evaluate.evaluate(scorer, tokenizer, stories_bundle(), world=World.single_process())
    assert sum(calls) == result.computed_tokens


@pytest.mark.parametrize("kind", list(SHAPES))
def test_operations_are_those_that_torch_counts(tmp_path, kind):
    scorer, _ = hf_model.load(str(save_model(tmp_path / kind, kind)), torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = scorer.read(torch.ones(2, 12, dtype=torch.int64))
        scorer.losses(hidden[:, :3].flatten(0, 1), torch.ones(6, dtype=torch.int64), True)
    counts = counter.get_flop_counts()["Global"]
    of_weights = sum(counts.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert scorer.flops(24, 6) == of_weights > 0


def test_the_command_writes_a_folder_that_runs_can_be_compared_to(tmp_path, base_dir, monkeypatch, capsys):
    folder = save_model(tmp_path / "m", "gpt2")
    bundle = small_bundle(12)
    monkeypatch.setattr(
        "nanochat.evaluation.core.evaluate.find_bundle", lambda where: Bundle("b", bundle.pieces)
    )
    args = EvalArgs(hf=str(folder), run="gpt2", device_type="cpu", dtype="float32")
    base_eval.main(args, World.single_process())
    found = files.read_json(files.run_dir("gpt2") / "base_eval.json")
    assert (found["model"], found["core_variant"]) == (str(folder), "nanochat")
    assert set(found["tasks"]) == {"mc", "schema", "lm"}
    base_eval.main(EvalArgs(hf=str(folder), device_type="cpu", dtype="float32"), World.single_process())
    [other] = [path.name for path in files.run_dir("gpt2").parent.iterdir() if path.name.startswith("hf-")]
    base_eval.main(EvalArgs(compare=("gpt2", other)), World.single_process())
    assert "+0.0000" in capsys.readouterr().out


def test_a_model_that_cannot_be_loaded_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        hf_model.load(str(tmp_path), torch.device("cpu"), torch.float32)
