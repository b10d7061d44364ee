"""attention against a softmax in float64 with an explicit mask."""

import dataclasses
import importlib.util
import math
import re
from types import SimpleNamespace

import pytest
import torch

from nanochat.common.errors import UserError
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.model.attention import (
    BACKENDS,
    PACKED,
    SPARE_DOCUMENTS,
    Layout,
    attention,
    block_masks,
    layout_of,
)
from nanochat.model.attention_backends import available_backends, choose_backend, window_hint
from nanochat.model.sdpa_attention import _stacked_chunks
from tests.attention_reference import attention_reference
from tests.conftest import REPO


def naive(q, k, v, window):
    """One query, one head at a time, in float64: the sentence of the docstring, literally."""
    (b, tq, h, d), tk = q.shape, k.size(1)
    out = torch.zeros(b, tq, h, d, dtype=torch.float64)
    for row in range(b):
        for head in range(h):
            kv = head // (h // k.size(2))
            for i in range(tq):
                p = tk - tq + i
                seen = range(max(0, p - window), p + 1)
                scores = torch.stack([q[row, i, head] @ k[row, j, kv] / math.sqrt(d) for j in seen])
                values = torch.stack([v[row, j, kv] for j in seen])
                out[row, i, head] = scores.softmax(0) @ values
    return out


def random_qkv(tq, tk, h=4, hkv=2, d=8, b=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (b, tq, h, d), (b, tk, hkv, d), (b, tk, hkv, d)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("window", [0, 1, 3, 6, 7, 100])
@pytest.mark.parametrize(("tq", "tk"), [(8, 8), (1, 8), (3, 8), (1, 1)])
def test_the_reference_is_the_sentence_of_its_docstring(tq, tk, window):
    q, k, v = random_qkv(tq, tk)
    torch.testing.assert_close(
        attention_reference(q, k, v, window=window), naive(q, k, v, window), rtol=1e-12, atol=1e-12
    )


# T = 1, below a block, a whole number of blocks, and not; windows of nothing, of less and more than a block.
@pytest.mark.parametrize("window", [0, 5, 63, 64, 100, 199, 200, 10_000])
@pytest.mark.parametrize("t", [1, 40, 192, 200])
def test_sdpa_equals_the_reference_forward_and_backward(t, window):
    q, k, v = random_qkv(t, t, dtype=torch.float32)
    out = attention(q, k, v, window=window, backend="sdpa")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, window=window)
    want_grads = torch.autograd.grad((want * weights).sum(), exact)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 7, 50, 300])
@pytest.mark.parametrize(("tq", "tk"), [(1, 90), (5, 90), (89, 90), (30, 31)])
def test_sdpa_behind_a_cache_equals_the_tail_of_the_full_pass(tq, tk, window):
    q, k, v = random_qkv(tk, tk, dtype=torch.float32)
    full = attention_reference(q, k, v, window=window)[:, tk - tq :]
    cached = attention(q[:, tk - tq :], k, v, window=window, backend="sdpa")
    torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-5)


def test_many_new_positions_behind_a_cache_go_by_blocks():
    q, k, v = random_qkv(700, 720, h=1, hkv=1, d=4, b=1, dtype=torch.float32)
    want = attention_reference(q, k, v, window=33)
    torch.testing.assert_close(attention(q, k, v, window=33, backend="sdpa"), want, rtol=1e-5, atol=1e-5)


def test_the_scale_replaces_the_default():
    q, k, v = random_qkv(9, 9)
    got = attention(q, k, v, window=4, backend="sdpa", scale=0.5)
    torch.testing.assert_close(got, attention_reference(q, k, v, window=4, scale=0.5))
    torch.testing.assert_close(got, naive(q * 0.5 * math.sqrt(8), k, v, 4))


def test_bf16_is_within_its_rounding():
    q, k, v = random_qkv(150, 150, dtype=torch.bfloat16)
    out = attention(q, k, v, window=40, backend="sdpa")
    want = attention_reference(*(x.double() for x in (q, k, v)), window=40)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=0.02, atol=0.02)


def test_a_mask_first_met_while_generating_serves_a_later_backward():
    q, k, v = random_qkv(77, 77, dtype=torch.float32)
    with torch.inference_mode():
        attention(q.detach(), k.detach(), v.detach(), window=11, backend="sdpa")
    attention(q, k, v, window=11, backend="sdpa").sum().backward()
    assert torch.isfinite(q.grad).all()


def test_memory_of_a_window_follows_the_window():
    """No saved or intermediate tensor of the windowed pass has T x T elements."""
    t = 1024
    q, k, v = random_qkv(t, t, h=1, hkv=1, d=4, b=1, dtype=torch.float32)
    largest = 0

    def record(x):
        nonlocal largest
        largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        attention(q, k, v, window=64, backend="sdpa").sum()
    assert 0 < largest <= t * 2 * 64


def test_on_a_cpu_only_sdpa_runs_and_the_reasons_are_given():
    reasons = available_backends(torch.device("cpu"))
    assert list(reasons) == list(BACKENDS)
    assert reasons["sdpa"] == ""
    assert all("CUDA" in reasons[name] for name in BACKENDS if name != "sdpa")
    name, why = choose_backend(torch.device("cpu"), "auto")
    assert name == "sdpa"
    assert "CUDA" in why


def test_an_explicit_choice_that_is_not_available_is_an_error():
    assert choose_backend(torch.device("cpu"), "sdpa")[0] == "sdpa"
    with pytest.raises(UserError, match="--attention=fa3.*CUDA"):
        choose_backend(torch.device("cpu"), "fa3")
    with pytest.raises(UserError, match="--attention=fa4.*no such"):
        choose_backend(torch.device("cpu"), "fa4")


def several_documents(b, t, seed=0):
    """(B, T) bool: documents of 1 to 40 positions."""
    return torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 0.06


@pytest.mark.parametrize("window", [0, 5, 63, 100, 199, 10_000])
@pytest.mark.parametrize("t", [1, 40, 192, 200, 700])
def test_attention_stays_within_documents_forward_and_backward(t, window):
    q, k, v = random_qkv(t, t, dtype=torch.float32)
    layout = layout_of(several_documents(2, t), "sdpa", [window])
    out = attention(q, k, v, window=window, backend="sdpa", layout=layout)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, window=window, documents=layout.documents)
    want_grads = torch.autograd.grad((want * weights).sum(), exact)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 7, 31, 32, 40, 64, 99, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_blocks_that_stack_for_other_devices_equal_the_reference(window, documents):
    q, k, v = random_qkv(100, 100, hkv=4)
    layout = layout_of(several_documents(2, 100), "sdpa", [window]) if documents else Layout()
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    got = _stacked_chunks(*heads_first, window, None, layout.documents).transpose(1, 2)
    want = attention_reference(q, k, v, window=window, documents=layout.documents)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [5, 128, 1000])
def test_flex_sees_what_the_reference_sees(window):
    """Forward, where FlexAttention runs on any device as the dense formula."""
    q, k, v = (x.detach() for x in random_qkv(300, 300, d=16, dtype=torch.float32))
    plain = attention(q, k, v, window=window, backend="flex")
    torch.testing.assert_close(plain, attention_reference(q, k, v, window=window), rtol=1e-5, atol=1e-5)
    ahead = Layout(block_masks=block_masks("flex", 300, [window], q.device))
    assert torch.equal(attention(q, k, v, window=window, backend="flex", layout=ahead), plain)
    layout = layout_of(several_documents(2, 300), "flex", [window])
    got = attention(q, k, v, window=window, backend="flex", layout=layout)
    want = attention_reference(q, k, v, window=window, documents=layout.documents)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", PACKED)
def test_boundaries_for_the_flash_kernels_are_those_of_the_documents(backend):
    begins = torch.zeros(2, 16, dtype=torch.bool)
    begins[0, [0, 5]] = True
    begins[1, 9] = True  # its first position begins a document unsaid
    layout = layout_of(begins, backend, [16])
    assert layout.boundaries.dtype == torch.int32
    assert layout.boundaries.tolist() == [0, 5, 16, 25] + [32] * (2 * 16 + 1 - 4)
    assert layout.documents[1].tolist() == [1] * 9 + [2] * 7


@pytest.mark.parametrize(("rows", "t"), [(16, 7), (1, 1), (300, 1), (1, 300), (64, 2)])
@pytest.mark.parametrize("every", [1, 3, 10_000])
def test_every_row_has_its_slot_and_documents_of_one_token_have_theirs(rows, t, every):
    """16 rows of 7 tokens had more starts than slots once: an assertion on the device ended the process."""
    begins = torch.arange(t).repeat(rows, 1) % every == 0
    layout = layout_of(begins, "varlen", [t])
    starts, slots = layout.boundaries.tolist(), min(rows * t, rows + SPARE_DOCUMENTS + rows * t // 128)
    assert len(starts) == slots + 1
    assert starts == sorted(starts)
    assert starts[-1] == rows * t
    assert set(range(0, rows * t, t)) <= set(starts)
    if begins.sum() <= slots:
        assert sorted({*starts} - {rows * t}) == begins.flatten().nonzero().flatten().tolist()


def test_documents_beyond_the_slots_join_the_one_before_them_in_their_row():
    begins = torch.ones(
        3, 60, dtype=torch.bool
    )  # 3 row starts and 177 others, of which 64 + 180 // 128 have slots
    layout = layout_of(begins, "fa3", [60])
    documents = layout.documents
    assert documents[0].tolist() == list(range(1, 61))
    assert documents[1].tolist() == [*range(1, 7), *[7] * 54]
    assert documents[2].tolist() == [1] * 60
    assert layout.boundaries.tolist() == [*range(67), 120, 180]
    fits = layout_of(begins[:1], "fa3", [60])
    assert fits.documents.tolist() == [list(range(1, 61))]


def test_documents_of_128_tokens_on_average_always_fit():
    """The slots of a micro-batch of the 124M race: 593 for 65,536 tokens, where there were 8,193."""
    rows, t = 16, 4096
    begins = torch.zeros(rows, t, dtype=torch.bool)
    begins[3, :512] = True  # the shortest ones all together
    layout = layout_of(begins, "fa2", [t])
    assert layout.documents[3].max() == 512
    assert layout.boundaries.numel() == 16 + 64 + 512 + 1


def test_a_short_window_is_hinted_at_where_it_takes_longer_than_full_attention():
    config = planning.plan(TrainArgs(depth=4), 512, 1).model
    cuda = torch.device("cuda")
    hint = window_hint(config, "sdpa", cuda)
    assert "1.8 times" in hint
    assert "--window-pattern L sees" in hint
    for backend in PACKED:
        assert window_hint(config, backend, cuda) == ""
    assert window_hint(config, "flex", cuda) == ""
    assert window_hint(config, "sdpa", torch.device("cpu")) == ""
    assert window_hint(dataclasses.replace(config, window_pattern="L"), "sdpa", cuda) == ""
    # A mask of documents is needed in any case, and a window then makes it smaller.
    assert window_hint(dataclasses.replace(config, document_mask=True), "sdpa", cuda) == ""
    short = dataclasses.replace(config, sequence_len=1024)
    assert "--window-pattern L --attention sdpa" in window_hint(short, "flex", cuda)


def test_the_namespace_of_flash_attention_4_is_not_taken_for_flash_attention_2(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert importlib.util.find_spec("flash_attn") is not None
    reasons = available_backends(torch.device("cuda", 7))
    assert reasons["fa2"] == "the module flash_attn.flash_attn_interface is not installed"


def test_the_extra_gpu_is_built_already():
    """flash-attn is published as its sources alone: it wants a CUDA compiler, and an hour."""
    line = re.search("^gpu = .*]", (REPO / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert line is not None
    assert line[0] == 'gpu = ["kernels>=0.16"]'  # before 0.16 it selects no build for torch 2.13 and later


def test_ranks_of_several_architectures_walk_the_order_of_the_oldest(monkeypatch):
    """Each would else ask its own questions of the others, and none would be answered."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda, asked = torch.device("cuda"), []
    others = SimpleNamespace(
        max_over_ranks=lambda value: max(value, -7), any_rank=lambda flag: asked.append(flag)
    )
    assert choose_backend(cuda, "auto", torch.bfloat16, others)[0] == "flex"
    assert asked == [False]
