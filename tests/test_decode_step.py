"""The compiled decode step against full forward passes of the model, in company and alone."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config.model_config import GPTConfig
from nanochat.engine import Engine, Sampling
from nanochat.model.decode_step import DecodeStep, decode_step, use_weights
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache
from tests.test_engine import ByteTokenizer

VOCABULARY, CONTEXT = 300, 160


def gpt(dtype: torch.dtype = torch.float32, **changes: object) -> GPT:
    """A random model in which every weight has a bearing; two query heads read a key head."""
    shape = {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_kv_head": 2, "head_dim": 12}
    config = GPTConfig(**{**shape, "vocab_size": VOCABULARY, "sequence_len": CONTEXT, **changes})
    model = GPT(config, Precision(dtype, "sdpa"))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def walk(model: GPT, step: DecodeStep, ids: torch.Tensor, read: int = 0) -> torch.Tensor:
    """(B, T - read, V) logits of rows decoded together, token by token, behind a pass over `read`."""
    cache = KVCache(model, len(ids), CONTEXT)
    if read:
        model(ids[:, :read], cache)
    found = []
    for at in range(read, ids.size(1)):
        rows = range(len(ids))
        found.append(step.logits(ids[:, at].tolist(), rows, [at] * len(ids), cache))
    return torch.stack(found, dim=1)


def some_ids(rows: int, length: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "two heads to a key head": {},
    "a head to a key head": {"n_kv_head": 4},
    "one layer": {"n_layer": 1},
    "five layers": {"n_layer": 5},
    "widths that fill no tile": {"n_embd": 20, "n_head": 2, "n_kv_head": 1, "head_dim": 10},
    "all positions": {"window_pattern": "L"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("read", [0, 1, 131])
@torch.no_grad()
def test_logits_are_those_of_a_full_pass(shape: str, read: int) -> None:
    model, ids = gpt(**SHAPES[shape]), some_ids(3)
    step = DecodeStep(model)
    full = model.logits(ids)[:, read:]
    torch.testing.assert_close(walk(model, step, ids, read), full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_in_bf16_they_are_as_near_as_the_models_own() -> None:
    """The truth is the model with the same weights, rounded, in fp32."""
    model, ids = gpt(torch.bfloat16), some_ids(4)
    exact = gpt()
    exact.load_state_dict({name: p.bfloat16().float() for name, p in model.state_dict().items()})
    truth = exact.logits(ids)
    own, ours = (
        (found - truth).abs().mean() for found in (model.logits(ids), walk(model, DecodeStep(model), ids))
    )
    assert ours < own


@torch.no_grad()
def test_in_int8_they_are_near() -> None:
    """The truth is the model whose weights are what int8 makes of them."""
    model, ids = gpt(), some_ids(2, 60)
    use_weights(model, "int8")
    step = DecodeStep(model)
    matrices = [block for block in model.blocks.state_dict() if not block.endswith("value_gate.weight")]
    for name in (*(f"blocks.{name}" for name in matrices), "head.weight"):
        weight = model.get_parameter(name)
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        weight.copy_((weight / scale).round() * scale)
    torch.testing.assert_close(walk(model, step, ids), model.logits(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["auto", "int8"])
@torch.no_grad()
def test_a_row_is_the_same_to_the_last_bit_in_any_company_and_with_any_threads(dtype, weights) -> None:
    """Rows of other lengths come and go beside it; a model so wide that threads have work."""
    model = gpt(dtype, n_embd=256, head_dim=64, vocab_size=8192)
    use_weights(model, weights)
    step, rng = DecodeStep(model), random.Random(0)
    ids = torch.randint(0, 8192, (9, 40), generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [walk(model, step, row[None])[0] for row in ids]
        cache, lengths = KVCache(model, 9, CONTEXT), [0] * 9
        while any(length < 40 for length in lengths):
            torch.set_num_threads(rng.choice((1, 2, 3, 7)))
            rows = rng.sample([row for row in range(9) if lengths[row] < 40], 1)
            rows += [row for row in range(9) if row not in rows and lengths[row] < 40 and rng.random() < 0.6]
            tokens, at = [int(ids[row, lengths[row]]) for row in rows], [lengths[row] for row in rows]
            for row, logits in zip(rows, step.logits(tokens, rows, at, cache), strict=True):
                assert torch.equal(logits, alone[row][lengths[row]])
                lengths[row] += 1
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_a_step_is_made_again_when_weights_or_windows_change() -> None:
    model, ids = gpt(), some_ids(1, 20)
    first = decode_step(model)
    assert first is not None
    assert decode_step(model) is first
    for change in (
        lambda: model.blocks[1].mlp.up.weight.mul_(1.5),
        lambda: model.embed.weight.add_(0.1),
        lambda: model.resid_scale.mul_(1.2),
        lambda: model.use_windows((3, 3, 160)),
        lambda: model.load_state_dict({name: p * 0.9 for name, p in model.state_dict().items()}),
    ):
        change()
        again = decode_step(model)
        assert again is not None
        torch.testing.assert_close(walk(model, again, ids), model.logits(ids), rtol=1e-4, atol=1e-4)
    assert decode_step(gpt(bigram=True)) is None
    assert decode_step(gpt(attention_kind="diff1")) is None
    with pytest.raises(UserError, match="--weights=int8"):
        use_weights(gpt(bigram=True), "int8")


@torch.no_grad()
def test_what_a_cache_cannot_hold_is_refused() -> None:
    model = gpt()
    step, cache = DecodeStep(model), KVCache(model, 2, 8)
    for tokens, rows, lengths in (([1], [0], [8]), ([1], [2], [0]), ([VOCABULARY + 64], [0], [0])):
        with pytest.raises((ValueError, IndexError)):
            step.logits(tokens, rows, lengths, cache)


def test_the_engine_takes_it() -> None:
    """Greedy text is that of full passes, and no layer of the model runs once the prompt is read."""
    model, calls = gpt(), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    prompts = [[1, 2, 3], [4, 5, 6]]
    done = Engine(model, ByteTokenizer()).generate(prompts, Sampling(20, temperature=0))
    assert len(calls) == 1
    for prompt, (completion,) in zip(prompts, done, strict=True):
        ids = list(prompt)
        for token in completion.ids:
            with torch.no_grad():
                assert token == int(model.logits(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)
