"""fp8 products against float64: forward, both gradients, scales, which layers, which machines."""

import pytest
import torch
import torch._dynamo.testing

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.model.attention_backends import choose_precision
from nanochat.model.fp8 import E4M3, E5M2, fits, linear, quantize
from nanochat.model.gpt import GPT
from nanochat.model.layers import Linear, constant
from tests.test_gpt import batch, config_of, random_model

# Half a unit in the last place: 3 bits of mantissa in e4m3, 2 in e5m2.
ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}
FP8 = Precision(torch.bfloat16, "sdpa", fp8=True)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e4, 3e38])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_tensor_of_any_size_fills_the_range_and_comes_back(dtype, size):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * size
    x8, scale = quantize(x, dtype)
    assert torch.isfinite(x8.float()).all()
    back = x8.double() * scale.double()
    assert x8.float().abs().max() == torch.finfo(dtype).max
    large = x.abs() > x.abs().max() / 1000  # smaller ones are below the normal numbers of e4m3
    assert ((back - x.double()).abs() <= 1.001 * ROUNDING[dtype] * x.double().abs())[large].all()


def test_zeros_stay_zeros():
    x8, scale = quantize(torch.zeros(4, 4), E4M3)
    assert not x8.float().any()
    assert scale > 0


def test_forward_and_both_gradients_are_within_the_rounding_of_fp8():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, 256, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(128, 256, generator=g) / 16).requires_grad_()
    grad = torch.randn(3, 16, 128, generator=g).bfloat16() * 1e-4
    out = linear(x, weight)
    out.backward(grad)
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = exact[0] @ exact[1].t()
    want.backward(grad.double())
    # Each element of a factor is off by a uniform error of at most ROUNDING: about 0.58 of it on average.
    forward, backward = (1.2 * 0.58 * (a**2 + b**2) ** 0.5 for a, b in ((2**-4, 2**-4), (2**-3, 2**-4)))
    assert (out.double() - want).norm() < forward * want.norm()
    for got, expected in ((x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (got.double() - expected).norm() < backward * expected.norm()
        assert (got.double() * expected).sum() / got.double().norm() / expected.norm() > 0.995


def test_it_is_the_exact_product_of_what_the_factors_were_rounded_to():
    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(16, 128, generator=g), torch.randn(128, 128, generator=g)
    (x8, x_scale), (w8, w_scale) = quantize(x, E4M3), quantize(weight, E4M3)
    want = (x8.double() * x_scale.double()) @ (w8.double() * w_scale.double()).t()
    torch.testing.assert_close(linear(x, weight).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "answer"), [((128, 128), True), ((768, 24), False), ((127, 256), False), ((136, 128), False)]
)
def test_narrow_or_odd_layers_stay_out(sides, answer):
    assert fits(*sides) is answer
    assert Linear(*sides, constant(0.0), fp8=True).fp8 is answer


def wide_config():
    return config_of(n_layer=2, n_embd=128, n_head=2, n_kv_head=2, head_dim=64, sequence_len=32)


def test_a_model_trains_in_fp8_and_evaluates_without():
    config = wide_config()
    ids, targets = batch(config)
    half, eighth = random_model(config, Precision(torch.bfloat16, "sdpa")), random_model(config, FP8)
    with torch.no_grad():
        assert torch.equal(eighth.logits(ids), half.logits(ids))
    losses = [model.loss(ids, targets) for model in (half, eighth)]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(half.named_parameters(), eighth.parameters(), strict=True):
        assert b.grad.dtype == torch.float32
        if a.dim() == 2 and a.grad.norm() > 0:
            assert (a.grad * b.grad).sum() > 0.8 * a.grad.norm() * b.grad.norm(), name


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_it_compiles_without_a_break(recompute):
    config = wide_config()
    model, ids = random_model(config, FP8), batch(config)[0]
    model.recompute = recompute
    torch._dynamo.reset()  # a process may compile one function for eight models only
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(ids), model(ids))
    compiled(ids.roll(1)).sum().backward()
    assert counter.frame_count == 1


def test_asked_for_where_it_cannot_be_had_it_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--fp8: needs a Hopper GPU"):
        choose_precision(torch.device("cpu"), fp8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match="--fp8: goes with bfloat16"):
        choose_precision(cuda, dtype="float32", fp8=True)
    assert choose_precision(cuda, backend="sdpa", fp8=True)[0] == FP8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UserError, match="--fp8: needs a Hopper GPU"):
        choose_precision(cuda, fp8=True)


def test_gpt_on_the_meta_device_takes_the_precision():
    with torch.device("meta"):
        model = GPT(wide_config(), FP8)
    assert model.blocks[0].mlp.up.fp8
    assert not model.smear_gate.fp8
