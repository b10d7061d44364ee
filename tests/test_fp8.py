"""fp8 products against float64: forward, both gradients, scales, which layers, which machines."""

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.model.attention_backends import choose_precision
from nanochat.model.fp8 import (
    E4M3,
    E5M2,
    MARGIN,
    SAMPLED_ROWS,
    fits,
    gradient_scale,
    linear,
    loudest_rows,
    quantize,
    quantize_both,
    quantize_input,
    quantize_weight,
    sampled,
    sampled_scale,
    scale_for,
    turned,
)
from nanochat.model.gpt import GPT
from nanochat.model.layers import Linear, constant, norm
from tests.test_gpt import batch, config_of, random_model

# Half a unit in the last place: 3 bits of mantissa in e4m3, 2 in e5m2.
ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}
FP8 = Precision(torch.bfloat16, "sdpa", fp8=True)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e4, 3e38])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_tensor_of_any_size_fills_the_range_and_comes_back(dtype, size):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * size
    scale = scale_for(x.abs().amax(), dtype)
    x8 = quantize(x, scale, dtype)
    assert torch.isfinite(x8.float()).all()
    back = x8.double() * scale.double()
    assert x8.float().abs().max() == torch.finfo(dtype).max
    large = x.abs() > x.abs().max() / 1000  # smaller ones are below the normal numbers of e4m3
    assert ((back - x.double()).abs() <= 1.001 * ROUNDING[dtype] * x.double().abs())[large].all()


def test_zeros_stay_zeros():
    x = torch.zeros(64, 16)
    scale = sampled_scale(x)
    assert not quantize(x, scale, E4M3).float().any()
    assert scale > 0


@pytest.mark.parametrize(("dtype", "scale_of"), [(E4M3, sampled_scale), (E5M2, gradient_scale)])
def test_the_scale_of_a_sample_leaves_room_and_what_is_beyond_becomes_the_end(dtype, scale_of):
    x = torch.ones(4 * SAMPLED_ROWS, 64)
    x[5, 33], x[6, 33], x[9, 33] = 0.99 * MARGIN[dtype], -1000 * MARGIN[dtype], torch.nan
    scale, largest = scale_of(x), torch.finfo(dtype).max
    x8 = quantize(x, scale, dtype).float()
    assert x8[5, 33] * scale == pytest.approx(0.99 * MARGIN[dtype], rel=ROUNDING[dtype])
    assert x8[6, 33] == -largest
    assert x8[9, 33].isnan()
    assert scale == MARGIN[dtype] / largest


def heavy_tailed(rows, width):
    """Rows of very different size; in one of a hundred a few channels are 200 times as large."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=g) * torch.randn(rows, 1, generator=g).exp()
    x[:, :4] *= 1 + 200 * (torch.rand(rows, 1, generator=g) < 0.01)
    return x


@pytest.mark.parametrize(("dtype", "scale_of"), [(E4M3, sampled_scale), (E5M2, gradient_scale)])
def test_a_sample_rounds_as_well_as_the_largest_element_does(dtype, scale_of):
    x = heavy_tailed(4096, 256)
    errors = []
    for scale in (scale_for(x.abs().amax(), dtype), scale_of(x)):
        back = quantize(x, scale, dtype).float() * scale
        errors.append((back - x).norm() / x.norm())
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("count", [SAMPLED_ROWS, 2 * SAMPLED_ROWS, 3 * SAMPLED_ROWS + 16])
def test_of_each_few_rows_of_a_gradient_the_largest_is_taken(count):
    step = count // SAMPLED_ROWS
    grad = torch.randn(count, 40, generator=torch.Generator().manual_seed(0))
    rows = loudest_rows(grad)
    assert len(rows) == len(sampled(grad))
    for i, row in enumerate(rows.tolist()):
        assert row == max(range(i * step, min(count, (i + 1) * step)), key=lambda j: grad[j, 0].abs())


@pytest.mark.parametrize("width", [128, 144, 1536])
def test_the_scale_of_a_gradient_has_seen_every_row_and_every_channel(width):
    """Each row in a sector of 16 channels at least, and each channel in many rows."""
    count, tiny = 2 * SAMPLED_ROWS, torch.finfo(torch.float32).tiny
    for row in (0, 1, 777, count - 1):
        grad = torch.zeros(count, width)
        grad[row] = 1
        assert gradient_scale(grad) == MARGIN[E5M2] / torch.finfo(E5M2).max
    for channel in (0, 17, width - 1):
        grad = torch.full((count, width), tiny)
        grad[:, channel] = 1
        assert gradient_scale(grad) == MARGIN[E5M2] / torch.finfo(E5M2).max


def test_gradients_come_where_all_rows_at_equal_distances_are_zero():
    """Of tokens that no loss counts: a scale of such rows alone would make all others its end."""
    g = torch.Generator().manual_seed(6)
    count, few = 4 * SAMPLED_ROWS, torch.arange(4 * SAMPLED_ROWS) % 512 == 3
    x = torch.randn(count, 128, generator=g).bfloat16().requires_grad_()
    leaf = (torch.randn(128, 128, generator=g) / 11).bfloat16().requires_grad_()
    grad = torch.randn(count, 128, generator=g).bfloat16() * 1e-4 * few[:, None]
    assert not sampled(grad).any()
    linear(x, leaf).backward(grad)
    for got, want in ((x.grad, grad.float() @ leaf.float()), (leaf.grad, grad.float().t() @ x.float())):
        assert (got.float() - want).norm() < 0.1 * want.norm()


def test_behind_a_norm_the_scale_is_known_and_never_too_small():
    x = torch.zeros(64, 256)
    x[:, 7] = 1.0  # the largest element that an RMS norm can give: all but one are zero
    x = norm(torch.cat((x, heavy_tailed(64, 256)))).bfloat16()
    rows, columns, scale = quantize_input(x, bound=16.0)
    assert torch.equal(columns.float(), rows.float().t())
    assert rows.float().abs().max() == torch.finfo(E4M3).max
    assert (rows.float() * scale - x.float()).norm() < 0.027 * x.float().norm()


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
    x_scale, eighth = sampled_scale(x), quantize_weight(weight)
    x8 = quantize(x, x_scale, E4M3)
    want = (x8.double() * x_scale.double()) @ (eighth.rows.double() * eighth.scale.double()).t()
    torch.testing.assert_close(linear(x, weight, eighth).double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(eighth.columns.float(), eighth.rows.float().t())


def test_a_weight_that_was_quantized_before_gives_its_gradient_to_the_leaf():
    g = torch.Generator().manual_seed(4)
    x, master = torch.randn(32, 128, generator=g).bfloat16(), torch.randn(256, 128, generator=g)
    leaf, eighth = master.bfloat16().requires_grad_(), quantize_weight(master)
    out = linear(x, leaf, eighth)
    assert torch.equal(out, linear(x, master, None))
    out.sum().backward()
    want = torch.ones(256, 32) @ x.float()
    assert leaf.grad.dtype == torch.bfloat16
    assert (leaf.grad.float() - want).norm() < 0.07 * want.norm()


def test_the_operators_have_the_shapes_that_a_compiler_is_told():
    x, scale = heavy_tailed(32, 64).bfloat16(), torch.tensor(0.1)
    torch.library.opcheck(quantize_both, (x, scale, E5M2), test_utils="test_faketensor")
    torch.library.opcheck(turned, (quantize(x, scale, E4M3),), test_utils="test_faketensor")


def test_backward_reads_what_forward_quantized():
    """A compiler that splits the graph keeps no activation but in fp8, and quantizes no weight."""
    x, leaf = torch.randn(32, 128).bfloat16(), torch.randn(256, 128).bfloat16().requires_grad_()
    eighth, kept, made = quantize_weight(leaf), [], []

    def take(graph, inputs):
        kept.append([(t.dtype, tuple(t.shape)) for t in inputs])
        made.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=take, bw_compiler=take, partition_fn=min_cut_rematerialization_partition
    )
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, leaf, eighth: linear(norm(x), leaf, eighth, 128**0.5), backend=backend, fullgraph=True
    )
    compiled(x, leaf, eighth).sum().backward()
    assert {(dtype, shape) for dtype, shape in kept[1] if shape} == {
        (E4M3, (32, 128)),
        (torch.bfloat16, (32, 256)),  # the gradient
    }
    assert made[1].count("nanochat.quantize_both.default") == 1  # the gradient
    assert "nanochat.turned.default" not in made[1]


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
