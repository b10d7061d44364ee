"""The MLP on a CPU: bit for bit what it was, what is kept, which kernels are taken."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from nanochat.model import mlp as module
from nanochat.model.fp8 import linear, quantize_weight
from nanochat.model.mlp import ReluSquared, is_fused, keeps_square, mlp, plain_mlp


def factors(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 128), (512, 128), (128, 512))
    return [torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_what_the_operators_say(dtype):
    x, up, down = factors(dtype)
    out = mlp(x, up, down)
    grad = torch.ones_like(out)
    got = torch.autograd.grad(out, (x, up, down), grad)
    z = F.linear(x, up)
    r = z.detach().relu()
    post = (r * r).requires_grad_()
    want = F.linear(post, down)
    assert torch.equal(out, want)
    grad_post, grad_down = torch.autograd.grad(want, (post, down), grad)
    want_grads = torch.autograd.grad(z, (x, up), (grad_post * r) * 2)
    assert all(torch.equal(a, b) for a, b in zip(got, (*want_grads, grad_down), strict=True))


def kept_by(monkeypatch, device_type, z):
    """What ReluSquared keeps, and its gradient, if z were on a device of that type."""
    monkeypatch.setattr(module, "keeps_square", lambda _, dtype: keeps_square(device_type, dtype))
    z, kept = z.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        square = ReluSquared.apply(z)
    square.sum().backward()
    return kept, square, z.grad


def test_on_cuda_the_square_alone_is_kept_which_the_next_product_keeps_anyway(monkeypatch):
    z = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    (root,), square, want = kept_by(monkeypatch, "cpu", z)
    assert torch.equal(root, z.relu())
    (kept,), again, got = kept_by(monkeypatch, "cuda", z)
    assert torch.equal(square, again)
    assert torch.equal(kept, square)
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0)  # the square was rounded to bf16
    assert kept_by(monkeypatch, "cuda", z.half())[0][0].equal(z.half().relu())  # its squares vanish


def test_compiled_for_a_gpu_one_tensor_of_four_widths_is_kept(monkeypatch):
    """With r two were: 20.2 C a token and layer at depth 24, for 16.2 C."""
    monkeypatch.setattr(module, "keeps_square", lambda _, dtype: keeps_square("cuda", dtype))
    inputs = []

    def take(graph, given):
        inputs.append([tuple(t.shape) for t in given])
        return make_boxed_func(graph.forward)

    split = partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(fw_compiler=take, bw_compiler=take, partition_fn=split)
    torch._dynamo.reset()
    x, up, down = factors(torch.bfloat16)
    torch.compile(plain_mlp, backend=backend, fullgraph=True)(x, up, down).sum().backward()
    assert [shape for shape in inputs[1] if shape in ((32, 512), (2, 16, 512))] == [(2, 16, 512)]


def test_in_fp8_both_products_are(monkeypatch):
    x, up, down = (t.detach().requires_grad_() for t in factors(torch.bfloat16))
    x = F.rms_norm(x.detach(), (128,)).requires_grad_()
    weights = quantize_weight(up), quantize_weight(down)
    out = mlp(x, up, down, *weights)
    hidden = linear(x, up, weights[0], 128**0.5).relu().square()
    assert torch.equal(out, linear(hidden, down, weights[1]))
    out.sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 for t in (x, up, down))


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "capability", "answer"),
    [
        ("cuda", torch.bfloat16, (256, 128), (9, 0), True),
        ("cuda", torch.bfloat16, (256, 128), (10, 0), False),
        ("cuda", torch.bfloat16, (256, 128), (8, 0), False),
        ("cuda", torch.bfloat16, (255, 128), (9, 0), False),
        ("cuda", torch.bfloat16, (256, 192), (9, 0), False),
        ("cuda", torch.float16, (256, 128), (9, 0), False),
        ("cpu", torch.bfloat16, (256, 128), (9, 0), False),
    ],
)
def test_the_fused_kernels_are_for_whole_tiles_in_bf16_on_hopper(
    monkeypatch, device, dtype, shape, capability, answer
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(device=torch.device(device), dtype=dtype, size=lambda i: shape[i])
    assert is_fused(x, 4 * shape[1]) is answer
    with torch.no_grad():
        assert not is_fused(x, 4 * shape[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("eight", [False, True])
def test_the_fused_kernels_compute_what_the_formula_says(eight):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    g = torch.Generator("cuda").manual_seed(2)
    shapes = ((4096, 768), (3072, 768), (768, 3072), (4096, 768))
    x, up, down, grad = (torch.randn(*s, generator=g, device="cuda") / s[1] ** 0.5 for s in shapes)
    x, grad = F.rms_norm(x, (768,)).bfloat16(), (1e-6 * grad).bfloat16()
    leaves = [x.requires_grad_(), up.bfloat16().requires_grad_(), down.bfloat16().requires_grad_()]
    assert is_fused(x, 3072)
    weights = (quantize_weight(up), quantize_weight(down)) if eight else ()
    out = mlp(*leaves, *weights)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = (exact[0] @ exact[1].t()).relu().square() @ exact[2].t()
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() < (0.12 if eight else 0.01) * b.norm()
