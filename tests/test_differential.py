"""Differential attention against the formulas of its papers, one head at a time in float64."""

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file

from nanochat import export
from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import ExportArgs, TrainArgs
from nanochat.config.model_config import count_params, flops_per_token
from nanochat.config.plan import model_config
from nanochat.engine import Engine, KVCache, Sampling
from nanochat.model.attention import attention, layout_of
from nanochat.model.differential_attention import initial_lambda
from nanochat.model.gpt import GPT
from tests.attention_reference import attention_reference
from tests.reference_model import reference_logits
from tests.test_attention import several_documents
from tests.test_engine import BOS, ByteTokenizer, greedy_by_full_forward
from tests.test_gpt import FP32, batch, config_of, random_model
from tests.tiny import read_metrics, tiny_corpus, train_tiny

KINDS = ["softmax", "diff1", "diff2"]
DIFFERENTIAL = KINDS[1:]
FP64 = Precision(torch.float64, "sdpa")


def double(config, document_bos=None):
    """A model of float64 throughout, each parameter far from its start, with the reference's angles.

    Angles are of fp32 in both, but raised to powers in another order: 1e-7 that would hide what is compared.
    """
    model = GPT(config, FP64, document_bos)
    model.load_state_dict(random_model(config).state_dict())
    d = config.qk_dim
    frequency = torch.stack([torch.tensor(100_000.0) ** (-2 * i / d) for i in range(d // 2)])
    angle = torch.outer(torch.arange(config.sequence_len, dtype=torch.float32), frequency)[:, None]
    model.cos, model.sin = angle.cos().double(), angle.sin().double()
    return model.double()


@pytest.mark.parametrize("document_bos", [None, 0])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 8), (3, 3, 4), (1, 1, 16), (6, 1, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_formula(kind, heads, kv_heads, head_dim, document_bos):
    """Windows of 128 of 150 positions and full ones, documents, several counts of heads."""
    config = config_of(
        attention_kind=kind, n_head=heads, n_kv_head=kv_heads, head_dim=head_dim, sequence_len=150
    )
    assert set(config.windows) == {128, 150}
    model, (ids, _) = double(config, document_bos), batch(config)
    ids[0, [0, 3, 40, 149]], ids[1, [0, 70]] = 0, 0
    weights = torch.randn(2, 150, config.n_embd, generator=torch.Generator().manual_seed(5)).double()
    head = model.head.weight[: config.vocab_size]
    logits = 15 * torch.tanh(model(ids) @ head.T / 15)
    ((logits @ head) * weights).sum().backward()
    exact = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    want = reference_logits(exact, config, ids, document_bos)
    ((want @ exact["head.weight"][: config.vocab_size]) * weights).sum().backward()
    torch.testing.assert_close(logits, want, rtol=1e-11, atol=1e-11)
    for name, p in model.named_parameters():
        scale = exact[name].grad.abs().max()
        assert scale > 0, name
        assert (p.grad - exact[name].grad).abs().max() < 1e-10 * scale, name


@pytest.mark.parametrize("window", [0, 5, 63, 100, 10_000])
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (200, 200), (1, 200), (70, 200)])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_values_may_be_wider_than_queries_and_keys(backend, tq, tk, window):
    """Forward, and backward where a CPU has it."""
    g = torch.Generator().manual_seed(0)
    shapes = (2, tq, 4, 8), (2, tk, 2, 8), (2, tk, 2, 16)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    if backend == "sdpa":
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, window=window, backend=backend)
    want = attention_reference(q, k, v, window=window)
    assert out.shape == (2, tq, 4, 16)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    if backend == "sdpa":
        weights = torch.randn(out.shape, generator=g, dtype=torch.float64)
        got, expected = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, want))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_wider_values_within_documents(backend):
    q, k, v = (torch.randn(2, 200, 4, d, generator=torch.Generator().manual_seed(d)) for d in (8, 8, 16))
    layout = layout_of(several_documents(2, 200), backend, [63])
    got = attention(q, k, v, window=63, backend=backend, layout=layout, scale=0.7)
    want = attention_reference(q, k, v, window=63, documents=layout.documents, scale=0.7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DIFFERENTIAL)
def test_decoding_through_the_cache_gives_the_logits_and_the_text_of_full_passes(kind):
    config = config_of(attention_kind=kind, n_layer=4, vocab_size=257, window_pattern="SSSL")
    model = random_model(config)
    ids = torch.randint(0, 257, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model.logits(ids)
        for pieces in ([1] * 150, [140, 1, 1, 8], [3, 140, 7]):
            cache = KVCache(model, 2, 150)
            parts = [model.logits(part, cache) for part in ids.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)
    engine = Engine(model, ByteTokenizer())
    prompts = [engine.tokenizer.encode("x" * 119, bos=True), engine.tokenizer.encode("abc", bos=True)]
    done = engine.generate(prompts, Sampling(max_tokens=20, temperature=0), num_samples=2)
    for prompt, (one, two) in zip(prompts, done, strict=True):
        expected = greedy_by_full_forward(model, prompt, 20)
        assert list(one.ids) == expected[: (*expected, BOS).index(BOS)]
        assert one == two


@pytest.mark.parametrize(("kind", "backend"), [("diff1", "flex"), ("diff2", "sdpa")])
def test_the_forward_pass_is_one_graph_whichever_the_kind(kind, backend):
    config = config_of(attention_kind=kind)
    model, (ids, _) = random_model(config, Precision(torch.float32, backend)), batch(config)
    torch._dynamo.reset()  # a process may compile one function for eight models only
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():  # on a CPU FlexAttention has no backward
        torch.testing.assert_close(compiled(ids), model(ids))
        torch.testing.assert_close(model(ids), random_model(config)(ids), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", DIFFERENTIAL)
def test_bf16_stays_near_fp32(kind):
    config = config_of(attention_kind=kind)
    model, ids = random_model(config), batch(config)[0]
    bf16 = random_model(config, Precision(torch.bfloat16, "sdpa"))
    assert bf16(ids).dtype == torch.bfloat16
    assert (bf16.logits(ids) - model.logits(ids)).abs().mean() < 0.06


def test_a_layer_begins_with_the_share_of_the_paper():
    assert [round(initial_lambda(layer), 3) for layer in (0, 1, 4, 12)] == [0.2, 0.356, 0.619, 0.784]
    model = GPT(config_of(attention_kind="diff1", n_layer=8, n_head=1, n_kv_head=1, head_dim=64), FP32)
    model.init_weights(0)
    vectors = torch.stack([block.attn.differential.vectors for block in model.blocks])
    assert vectors.shape == (8, 4, 32)
    assert vectors.std().item() == pytest.approx(0.1, rel=0.1)
    model = GPT(config_of(attention_kind="diff2"), FP32)
    model.init_weights(0)
    assert not any(block.attn.differential.share.weight.any() for block in model.blocks)  # sigmoid(0) = 1/2


def test_parameters_and_flops_by_hand():
    """Width 768, 6 heads of 128; 12 layers see 9 x 512 + 3 x 2048 positions."""
    shapes = {kind: model_config(TrainArgs(attention_kind=kind), 32768, 12) for kind in KINDS}
    counts = {kind: count_params(shape) for kind, shape in shapes.items()}
    flops = {kind: flops_per_token(shape) for kind, shape in shapes.items()}
    assert counts["diff1"].scaling == counts["softmax"].scaling
    assert counts["diff1"].total - counts["softmax"].total == 12 * 4 * 64
    assert counts["diff2"].total - counts["softmax"].total == 12 * 768 * (768 + 6)
    seen = 9 * 512 + 3 * 2048
    assert flops["diff1"] - flops["softmax"] == 6 * 768 * seen  # values twice
    assert flops["diff2"] - flops["softmax"] == 6 * 12 * 768 * (768 + 6) + 12 * 768 * seen  # all twice


def test_only_diff1_has_a_group_of_its_own():
    groups = {kind: planning.plan(TrainArgs(attention_kind=kind), 32768).groups for kind in KINDS}
    assert groups["softmax"].keys() == groups["diff2"].keys() == groups["diff1"].keys() - {"share"}
    assert groups["diff1"]["share"].optimizer == "adamw"
    kinds = GPT(config_of(attention_kind="diff1"), FP32).parameter_kinds()
    assert kinds["blocks.1.attn.differential.vectors"] == "share"
    kinds = GPT(config_of(attention_kind="diff2"), FP32).parameter_kinds()
    assert kinds["blocks.1.attn.differential.share.weight"] == "matrix"


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="--head-dim=6: expected a multiple of 4: .*--attention-kind=diff1"):
        planning.plan(TrainArgs(attention_kind="diff1", head_dim=6), 300)
    with pytest.raises(UserError, match="--attention-kind=hard: expected one of softmax, diff1, diff2"):
        planning.plan(TrainArgs(attention_kind="hard"), 300)


@pytest.mark.parametrize("kind", DIFFERENTIAL)
def test_a_run_is_trained_saved_read_again_and_exported(kind, tmp_path):
    tiny_corpus(tmp_path)
    summary = train_tiny(run=kind, attention_kind=kind, num_iterations=30, warmup_steps=0)
    assert summary["status"] == "finished"
    losses = [e["loss"] for e in read_metrics(files.run_dir(kind) / "metrics.jsonl") if e["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.2
    model, tokenizer, _ = checkpoint_state.load_model(kind, device=torch.device("cpu"), precision=FP32)
    assert model.config.attention_kind == kind
    weights = load_file(checkpoint_format.folder_of(kind, 30) / checkpoint_format.MODEL)
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert model.blocks[0].attn.differential is not None
    written = load_file(export.run(ExportArgs(run=kind)) / "model.safetensors")
    assert written.keys() == weights.keys()
