"""What a step does on CUDA against the same on the CPU in fp32: loss, precision, documents, recomputing."""

import pytest
import torch

from nanochat.common.machine import Precision
from nanochat.distributed.world import World
from nanochat.model.attention import BACKENDS, attention, layout_of
from nanochat.model.attention_backends import available_backends
from nanochat.model.fp8 import linear
from nanochat.model.gpt import GPT
from nanochat.model.loss import softcapped_cross_entropy
from nanochat.optim.loss_scale import LossScale
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions
from tests.attention_reference import attention_reference
from tests.test_attention import several_documents
from tests.test_gpt import FP32, batch, config_of, random_model
from tests.test_loss import SOFTCAP, problem, textbook
from tests.test_optim import GROUPS, NORM_FACTOR, OPTIONS
from tests.test_soap import ADAMW, SOAP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = torch.device("cuda")
CONFIG = config_of(n_embd=256, n_head=4, n_kv_head=4, head_dim=64, sequence_len=512)


def on_gpu(config, precision, **changes):
    """A copy on the GPU of the model that random_model makes."""
    model = GPT(config, precision, **changes).to(CUDA)
    model.load_state_dict(random_model(config).state_dict())
    model.reserve_positions(config.sequence_len)
    return model


def optimizer_of(model, dtype, matrix=GROUPS["matrix"], options=OPTIONS):
    kinds, world, groups = model.parameter_kinds(), World.single_process(CUDA), {**GROUPS, "matrix": matrix}
    return MuonAdamW(dict(model.named_parameters()), kinds, groups, world, dtype, options)


def backend_or_skip(name, dtype=torch.bfloat16):
    reason = available_backends(CUDA, dtype)[name]
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name


def needs(major, minor=0):
    if torch.cuda.get_device_capability(CUDA) < (major, minor):
        pytest.skip(f"needs sm{major}{minor}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_loss_equals_float64(dtype):
    x, weight, targets = problem(n=300, c=64, v=1000, dtype=dtype, scale=0.3)
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    want = textbook(*exact, targets)
    want_grads = torch.autograd.grad(want, exact)
    x, weight = (p.detach().to(CUDA).requires_grad_() for p in (x, weight))
    loss = softcapped_cross_entropy(x, weight, targets.to(CUDA), SOFTCAP, chunk_rows=64)
    assert abs(loss.item() - want.item()) < 2e-3 * want.item()
    (loss * 1024).backward()
    for got, expected in zip((x.grad, weight.grad), want_grads, strict=True):
        assert (got.double().cpu() / 1024 - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("window", [0, 100, 5000])
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_stays_within_documents(name, window):
    g = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (
        torch.randn(2, 640, 4, 64, generator=g, device=CUDA, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    layout = layout_of(several_documents(2, 640).to(CUDA), backend_or_skip(name), [window])
    out = attention(q, k, v, window=window, backend=name, layout=layout)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, window=window, documents=layout.documents)
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)
    for got, expected in zip(grads, torch.autograd.grad((want * weights).sum(), exact), strict=True):
        assert (got.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("document_bos", [None, 0])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_in_bf16_has_the_loss_and_gradients_of_fp32_on_the_cpu(name, compiled, document_bos):
    needs(8)
    precision = Precision(torch.bfloat16, backend_or_skip(name))
    model = on_gpu(CONFIG, precision, document_bos=document_bos)
    want = random_model(CONFIG, FP32)
    want.document_bos = document_bos
    ids, targets = batch(CONFIG)
    if compiled:
        model.compile_for(ids.size(0))
    loss, want_loss = model.loss(ids.to(CUDA), targets.to(CUDA)), want.loss(ids, targets)
    assert abs(loss.item() - want_loss.item()) < 0.02 * want_loss.item()
    loss.backward()
    want_loss.backward()
    for (parameter, a), b in zip(model.named_parameters(), want.parameters(), strict=True):
        if b.grad.dim() == 2:
            cosine = torch.cosine_similarity(a.grad.cpu().flatten(), b.grad.flatten(), dim=0)
            assert cosine > 0.98, parameter


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_takes_less_memory_for_the_same_gradients(recompute):
    needs(8)
    found = {}
    for way in ("none", recompute):
        model = on_gpu(CONFIG, Precision(torch.bfloat16, "sdpa"))
        model.recompute = way
        ids, targets = (x.to(CUDA) for x in batch(CONFIG, rows=16))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids).sum().backward()
        found[way] = torch.cuda.max_memory_allocated() - before, model.blocks[0].mlp.up.weight.grad
    torch.testing.assert_close(found[recompute][1], found["none"][1], rtol=0.02, atol=0.02)
    assert found[recompute][0] < found["none"][0]


def test_fp8_products_are_within_their_rounding():
    needs(9)
    g = torch.Generator(CUDA).manual_seed(1)
    x = torch.randn(64, 256, generator=g, device=CUDA).bfloat16().requires_grad_()
    weight = (torch.randn(128, 256, generator=g, device=CUDA) / 16).requires_grad_()
    grad = torch.randn(64, 128, generator=g, device=CUDA).bfloat16()
    out = linear(x, weight)
    out.backward(grad)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = exact[0] @ exact[1].t()
    want.backward(grad.double())
    assert weight.grad.dtype == torch.float32
    for got, expected in ((out, want), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (got.double() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_steps_in_fp8(compiled):
    needs(9)
    ids, targets = (x.to(CUDA) for x in batch(CONFIG))
    losses = []
    for fp8 in (False, True):
        model = on_gpu(CONFIG, Precision(torch.bfloat16, "sdpa", fp8))
        if compiled:
            model.compile_for(ids.size(0))
        loss = model.loss(ids, targets)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_fp16_steps_with_a_loss_scale():
    model = on_gpu(CONFIG, Precision(torch.float16, "sdpa"))
    optimizer = optimizer_of(model, torch.float16)
    scale = LossScale(torch.float16, CUDA)
    ids, targets = (x.to(CUDA) for x in batch(CONFIG))
    losses = []
    for _ in range(8):
        loss = model.loss(ids, targets)
        scale.up(loss).backward()
        scale.down(model.parameters())
        result = optimizer.step(0.05, 0.9, 0.0, ok=torch.isfinite(loss))
        scale.adjust(result.applied, loss.detach())
        losses.append(loss.item())
    assert result.applied
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("matrix", [GROUPS["matrix"], SOAP, ADAMW], ids=lambda group: group.optimizer)
def test_a_step_never_waits_for_the_device(matrix):
    """Micro-batches and update under the mode that makes every wait an error.

    SOAP waits where it finds its bases, at step 0 and the first renewal; step 6 is its second one.
    """
    needs(8)
    model = on_gpu(CONFIG, Precision(torch.bfloat16, "sdpa"))
    optimizer = optimizer_of(model, torch.bfloat16, matrix, MatrixOptions(NORM_FACTOR, soap_every=3))
    ids, targets = (x.to(CUDA) for x in batch(CONFIG))
    for attempt in range(2):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            model.loss(ids, targets).backward()
            optimizer.step(0.05, 0.9, 0.0, index=6 * attempt)
        finally:
            torch.cuda.set_sync_debug_mode("default")
