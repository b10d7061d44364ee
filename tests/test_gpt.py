"""The model against tests/reference_model.py, and the promises of its parts."""

import math

import pytest
import torch
import torch._dynamo.testing

from nanochat.common.machine import Precision
from nanochat.config.arguments import TrainArgs
from nanochat.config.model_config import GPTConfig, count_params
from nanochat.config.plan import model_config, plan
from nanochat.model.gpt import GPT
from tests.reference_model import reference_logits, reference_loss

FP32 = Precision(torch.float32, "sdpa")


def config_of(**changes):
    base = {
        "n_layer": 3,
        "n_embd": 32,
        "n_head": 4,
        "n_kv_head": 2,
        "head_dim": 8,
        "vocab_size": 70,
        "sequence_len": 160,
        "window_pattern": "SL",
    }
    return GPTConfig(**{**base, **changes})


def random_model(config, precision=FP32, seed=0):
    """Every parameter far from its initial value, so that no term of the forward pass vanishes."""
    model = GPT(config, precision)
    model.init_weights(seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.1 if p.dim() == 2 else 0.3))
    return model


def batch(config, rows=2, length=None, seed=3):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, length or config.sequence_len), generator=g)
    targets = torch.randint(0, config.vocab_size, ids.shape, generator=g)
    targets[:, ::7] = -1
    return ids, targets


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(n_layer=1, n_head=2, vocab_size=64),
        config_of(n_layer=4, sequence_len=33, window_pattern="SSSL"),
    ],
)
def test_logits_loss_and_gradients_equal_the_reference(config):
    model = random_model(config)
    ids, targets = batch(config)
    loss = model.loss(ids, targets)
    loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    want_loss = reference_loss(weights, config, ids, targets)
    want_loss.backward()
    torch.testing.assert_close(
        model.logits(ids), reference_logits(weights, config, ids), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        error = (p.grad - weights[name].grad).abs().max()
        assert error <= 1e-5 * max(1.0, weights[name].grad.abs().max()), name


def test_bf16_stays_near_fp32():
    config = config_of()
    model, ids = random_model(config), batch(config)[0]
    bf16 = random_model(config, Precision(torch.bfloat16, "sdpa"))
    assert all(p.dtype == torch.float32 for p in bf16.parameters())
    assert bf16(ids).dtype == torch.bfloat16
    assert bf16.logits(ids).dtype == torch.float32
    assert (bf16.logits(ids) - model.logits(ids)).abs().mean() < 0.05


class ListCache:
    """The simplest DecodeCache: everything by torch.cat."""

    lengths = None  # all rows have the same

    def __init__(self):
        self.length, self.kept, self.last = 0, {}, None

    def shift_ids(self, ids):
        first = torch.full_like(ids[:, :1], -1) if self.last is None else self.last
        self.last = ids[:, -1:]
        return torch.cat((first, ids[:, :-1]), dim=1)

    def append(self, layer, k, v):
        if layer in self.kept:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = (k, v)
        return k, v

    def advance(self, count):
        self.length += count


@pytest.mark.parametrize("chunks", [(160,), (1,) * 12, (100, 1, 1, 30, 28)])
def test_decoding_through_a_cache_equals_the_full_pass(chunks):
    config = config_of()
    model, (ids, _) = random_model(config), batch(config)
    ids = ids[:, : sum(chunks)]
    cache, got = ListCache(), []
    with torch.no_grad():
        for part in ids.split(chunks, dim=1):
            got.append(model.logits(part, cache))
        full = model.logits(ids)
    torch.testing.assert_close(torch.cat(got, dim=1), full, rtol=1e-5, atol=1e-5)
    assert cache.length == ids.size(1)


def test_a_cache_may_be_longer_than_the_training_context():
    config = config_of(sequence_len=16)
    model = random_model(config)
    ids = batch(config, length=20)[0]
    with pytest.raises(AssertionError, match="reserve_positions"):
        model.logits(ids)
    short = model.logits(ids[:, :16])
    model.reserve_positions(20)
    torch.testing.assert_close(model.logits(ids)[:, :16], short)


def held_bytes_and_gradients(recompute):
    """Bytes that autograd keeps for a backward pass, and the gradients."""
    config = config_of(n_layer=4)
    model, (ids, targets) = random_model(config), batch(config)
    model.recompute = recompute
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    held = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model(ids)
    assert torch.equal(hidden, random_model(config)(ids))
    model.loss(ids, targets).backward()
    return sum(held.values()), {name: p.grad for name, p in model.named_parameters()}


def test_recomputing_changes_no_gradient_and_keeps_less():
    everything, want = held_bytes_and_gradients("none")
    without_mlp, mlp_grads = held_bytes_and_gradients("mlp")
    ends_only, block_grads = held_bytes_and_gradients("block")
    for grads in (mlp_grads, block_grads):
        assert all(torch.equal(grads[name], grad) for name, grad in want.items())
    assert without_mlp < 0.75 * everything
    assert ends_only < 0.2 * everything


def two_documents(model, first=70, second=90, seed=3):
    """A row of two documents, BOS 0 before each, and the second alone."""
    ids = torch.randint(
        1, model.config.vocab_size, (1, first + second), generator=torch.Generator().manual_seed(seed)
    )
    ids[0, 0] = ids[0, first] = 0
    return ids, ids[:, first:]


def test_with_a_document_mask_a_document_is_read_as_if_alone():
    """All but what smear mixes: the embedding of the token before, which reaches the BOS from before it."""
    config = config_of()
    model = random_model(config)
    ids, alone = two_documents(model)
    together = model.logits(ids)[:, 70:]
    assert (together - model.logits(alone)).abs().max() > 0.1
    masked = GPT(config, FP32, document_bos=0)
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        masked.smear_scale.zero_()
    torch.testing.assert_close(masked.logits(ids)[:, 70:], masked.logits(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masked.logits(ids)[:, :70], masked.logits(ids[:, :70]), rtol=1e-4, atol=1e-4)


def test_with_a_document_mask_no_gradient_crosses():
    model = random_model(config_of())
    ids, _ = two_documents(model)
    ids[0, 1:70] = ids[0, 1:70] % 30 + 1  # ids that the second document does not have
    ids[0, 71:] = ids[0, 71:] % 30 + 31
    model.document_bos = 0
    with torch.no_grad():
        model.smear_scale.zero_()
    targets = torch.full_like(ids, -1)
    targets[0, 70:] = 5
    model.loss(ids, targets).backward()
    assert not model.embed.weight.grad[1:31].any()
    assert model.embed.weight.grad[31:61].any()


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("document_bos", [None, 0])
def test_windows_may_change_between_passes(backend, document_bos):
    """As if the model had been made with them, in both directions."""
    precision = Precision(torch.float32, backend)
    models = []
    for pattern in ("SL", "LL"):
        model = GPT(config_of(window_pattern=pattern), precision, document_bos)
        model.load_state_dict(random_model(config_of()).state_dict())
        models.append(model)
    ids = batch(models[0].config)[0].clamp(min=1)
    ids[:, 10] = 0  # the second document is longer than the short window of 128
    with torch.no_grad():
        short, full = (model.logits(ids) for model in models)
        assert (short - full).abs().max() > 1e-3
        models[0].use_windows(models[1].config.windows)
        assert torch.equal(models[0].logits(ids), full)
        models[0].use_windows(models[0].config.windows)
        assert torch.equal(models[0].logits(ids), short)


def test_padding_of_the_vocabulary_never_shows():
    config = config_of(vocab_size=70)
    model, (ids, targets) = random_model(config), batch(config)
    assert model.head.weight.shape[0] == 128
    before = model.loss(ids, targets).item()
    with torch.no_grad():
        model.head.weight[70:] = 1e9
    assert model.loss(ids, targets).item() == before
    assert model.logits(ids).shape[-1] == 70
    assert model.logits(ids, last_only=True).shape == (2, 1, 70)


def test_token_losses_add_up_to_the_loss():
    config = config_of()
    model, (ids, targets) = random_model(config), batch(config)
    targets[0, 1] = model.logits(ids)[0, 1].argmax()
    losses, likeliest = model.token_losses(ids, targets)
    assert losses.shape == likeliest.shape == ids.shape
    assert likeliest[0, 1]
    torch.testing.assert_close(losses.sum() / (targets != -1).sum(), model.loss(ids, targets).detach())
    with torch.no_grad():
        assert torch.equal(model.loss(ids, targets, reduction="none"), losses)


def test_no_value_is_left_uninitialised_and_init_is_the_recipe():
    config = config_of(n_layer=5, n_embd=64, vocab_size=1000)
    with torch.device("meta"):
        model = GPT(config, FP32)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(float("nan"))
    model.init_weights(0)
    assert all(torch.isfinite(t).all() for t in [*model.parameters(), *model.buffers()])
    assert torch.isfinite(model.loss(*batch(config)))
    w = dict(model.named_parameters())
    std = 64**-0.5
    for name, want in {
        "embed.weight": 0.8,
        "head.weight": 0.001,
        "blocks.2.attn.q.weight": std,
        "blocks.2.attn.v.weight": std,
        "blocks.2.mlp.up.weight": 0.4 * std,
        "value_embeds.4.weight": std,
    }.items():
        assert abs(w[name].std() / want - 1) < 0.05, name
    assert w["blocks.0.attn.k.weight"].abs().max() <= math.sqrt(3) * std
    assert not w["blocks.1.attn.out.weight"].any()
    assert not w["blocks.1.mlp.down.weight"].any()
    gate = w["blocks.0.attn.value_gate.weight"]
    assert gate.min() >= 0
    assert 0 < gate.max() <= 0.02
    torch.testing.assert_close(w["resid_scale"], torch.tensor([1.15, 1.125, 1.10, 1.075, 1.05]))
    torch.testing.assert_close(w["x0_scale"], torch.tensor([0.2, 0.1625, 0.125, 0.0875, 0.05]))
    assert w["backout_scale"].item() == pytest.approx(0.2)
    assert w["smear_scale"] == 0


def test_a_parameter_starts_the_same_whatever_else_the_model_has():
    small, deep = GPT(config_of(n_layer=3), FP32), GPT(config_of(n_layer=5), FP32)
    small.init_weights(7)
    deep.init_weights(7)
    name = "blocks.1.attn.q.weight"
    assert torch.equal(small.get_parameter(name), deep.get_parameter(name))
    assert not torch.equal(small.get_parameter(name), small.get_parameter("blocks.2.attn.q.weight"))
    again = GPT(config_of(n_layer=3), FP32)
    again.init_weights(8)
    assert not torch.equal(small.get_parameter(name), again.get_parameter(name))


@pytest.mark.parametrize("kind", ["softmax", "diff1", "diff2"])
def test_every_depth_from_1_to_40_builds_with_the_planned_parameters(kind):
    for depth in range(1, 41) if kind == "softmax" else (1, 2, 3, 12, 25):
        args = TrainArgs(depth=depth, attention_kind=kind)
        config = model_config(args, vocab_size=32768, depth=depth)
        with torch.device("meta"):
            model = GPT(config, FP32)
        kinds, counted = model.parameter_kinds(), dict.fromkeys(("scalars",), 0)
        for name, p in model.named_parameters():
            group = kinds[name]
            key = "scalars" if group in ("resid", "x0", "smear", "share") else group
            counted[key] = counted.get(key, 0) + p.numel()
        planned = count_params(config)
        assert counted == {key: getattr(planned, key) for key in counted}
        assert sum(counted.values()) == planned.total
        assert set(kinds.values()) <= plan(args, 32768).groups.keys()


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_odd_shapes_step_on_the_meta_device(depth):
    config = model_config(TrainArgs(depth=depth, max_seq_len=96), vocab_size=8191, depth=depth)
    with torch.device("meta"):
        model = GPT(config, Precision(torch.bfloat16, "sdpa"))
        hidden = model(torch.zeros(2, 96, dtype=torch.long))
    assert hidden.shape == (2, 96, config.n_embd)
    hidden.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "head.weight")


def require_one_graph(model, ids):
    """The forward pass compiles to one graph, which is right for other ids too."""
    torch._dynamo.reset()  # a process may compile one function for eight models only
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for shift in range(3):
        torch.testing.assert_close(compiled(ids.roll(shift)), model(ids.roll(shift)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("document_bos", [None, 0])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_the_forward_pass_is_one_graph_and_never_recompiles(recompute, document_bos):
    config = config_of(sequence_len=160)
    model, (ids, targets) = random_model(config), batch(config)
    model.recompute, model.document_bos = recompute, document_bos
    require_one_graph(model, ids)
    loss = torch.compile(model.loss, backend="eager")(ids, targets)
    torch.testing.assert_close(loss, model.loss(ids, targets))


@pytest.mark.parametrize("document_bos", [None, 0])
def test_flex_takes_its_masks_into_one_graph(document_bos):
    config = config_of(sequence_len=160)
    model, (ids, _) = random_model(config, Precision(torch.float32, "flex")), batch(config)
    model.document_bos = document_bos
    torch._dynamo.reset()  # a process may compile one function for eight models only
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():  # on a CPU FlexAttention has no backward
        for shift in range(2):
            torch.testing.assert_close(compiled(ids.roll(shift)), model(ids.roll(shift)))
    assert counter.frame_count == 1
