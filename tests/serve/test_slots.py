"""Slots of different lengths against full passes over what each stores, and attention against rows alone."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common.machine import Precision
from nanochat.engine import KVCache
from nanochat.model import attention as attention_module
from nanochat.model.attention import Layout, attention
from nanochat.model.gpt import GPT
from nanochat.serve.slots import SlotCache
from tests.test_engine import tiny_gpt

SLOTS = 5


def gpt(kind: str) -> GPT:
    """A random model of each kind of attention; two query heads read a key head."""
    model = tiny_gpt(n_layer=3, bigram=kind == "softmax")
    if kind == "softmax":
        return model
    other = GPT(dataclasses.replace(model.config, attention_kind=kind), Precision(torch.float32, "sdpa"))
    other.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return other


@pytest.mark.parametrize("kind", ["softmax", "diff1", "diff2"])
@torch.no_grad()
def test_whatever_was_read_stepped_copied_and_swapped_the_logits_are_those_of_full_passes(kind):
    """The window of 128 is passed, slots are filled to the last position and begun again."""
    model, rng = gpt(kind), random.Random(kind)
    capacity = model.config.sequence_len
    cache, twin = SlotCache(model, SLOTS, capacity), [[] for _ in range(SLOTS)]
    stepped = filled = 0
    for _ in range(150):
        slot, other = rng.randrange(SLOTS), rng.randrange(SLOTS)
        action = rng.choice(("read", "copy", "swap", "step", "step", "step"))
        free = capacity - len(twin[slot])
        if action == "read" and free:
            chunk = [rng.randrange(257) for _ in range(rng.randint(1, min(free, 70)))]
            cache.read(slot, chunk)
            twin[slot] = twin[slot] + chunk
        elif action == "copy":
            length = rng.choice((rng.randint(0, len(twin[slot])), len(twin[slot])))
            cache.copy(slot, other, length)
            twin[other] = twin[slot][:length]
        elif action == "swap":
            cache.swap(slot, other)
            twin[slot], twin[other] = twin[other], twin[slot]
        elif action == "step":
            first = range(rng.randint(1, SLOTS))
            tokens = [rng.randrange(257) if rng.random() < 0.7 else None for _ in first]
            tokens = [t if len(ids) < capacity else None for t, ids in zip(tokens, twin, strict=False)]
            if any(token is not None for token in tokens):
                logits = cache.step(tokens)
                for row, token in enumerate(tokens):
                    if token is not None:
                        twin[row] = [*twin[row], token]
                        full = model.logits(torch.tensor([twin[row]]), last_only=True)[0, 0]
                        torch.testing.assert_close(logits[row], full, rtol=1e-4, atol=1e-4)
                        stepped += 1
                        filled += len(twin[row]) == capacity
        assert cache.ids == twin
    assert stepped > 100
    if kind == "softmax":
        full_slot = SlotCache(model, 2, capacity)
        full_slot.read(0, [1] * (capacity - 1))
        full_slot.read(1, [2] * 3)
        last = full_slot.step([7, 8])
        expected = model.logits(torch.tensor([[1] * (capacity - 1) + [7]]), last_only=True)[0, 0]
        torch.testing.assert_close(last[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pass_that_fails_leaves_a_slot_as_it_was():
    model = tiny_gpt(n_layer=2, bigram=True)  # so that its steps go through its blocks
    cache = SlotCache(model, 2, 160)
    for slot in range(2):
        cache.read(slot, [1, 2, 3 + slot])
    # The memory of this machine does not hold what the hook asks for.
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: torch.empty(1 << 55))
    for attempt in (lambda: cache.read(0, [4]), lambda: cache.step([4, 5])):
        with pytest.raises(RuntimeError, match="memory"):
            attempt()
    hook.remove()
    assert cache.ids == [[1, 2, 3], [1, 2, 4]]
    expected = model.logits(torch.tensor([[1, 2, 3, 9], [1, 2, 4, 9]]), last_only=True)[:, 0]
    torch.testing.assert_close(cache.step([9, 9]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_prompts_have_in_common_with_a_slot():
    cache = SlotCache(tiny_gpt(n_layer=2), 1, 160)
    assert cache.match(0, [1, 2]) == 0
    cache.read(0, [1, 2, 3])
    cases = {(): 0, (1, 2): 2, (1, 2, 3): 3, (1, 2, 3, 4): 3, (1, 9, 3): 1, (9,): 0}
    assert {prompt: cache.match(0, prompt) for prompt in cases} == cases


# ----------------------------------------------------------------------------------------------------
# Attention behind rows of different lengths


def documented_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    """What FlashAttention's page says of flash_attn_with_kvcache, row by row and head by head.

    A row has cache_seqlens keys; with causal the mask is aligned at the bottom right corner, and a window of
    (left, 0) leaves the keys from i + keys - queries - left to i + keys - queries.
    """
    assert causal
    assert cache_seqlens.dtype == torch.int32
    out, scale = torch.empty_like(q), q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    for row, keys in enumerate(cache_seqlens.tolist()):
        for i in range(q.size(1)):
            last = i + keys - q.size(1)
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            for head in range(q.size(2)):
                at = row, slice(first, last + 1), head // (q.size(2) // k_cache.size(2))
                share = (scale * k_cache[at] @ q[row, i, head]).softmax(0)
                out[row, i, head] = share @ v_cache[at]
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attention_by_lengths_is_that_of_each_row_alone(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    tq, heads, groups, wider = draw(1, 4), draw(1, 2), draw(1, 3), data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(tq, 40), min_size=1, max_size=4))
    tk, window = draw(max(lengths), 48), draw(0, 50)
    generator = torch.Generator().manual_seed(draw(0, 99))
    make = lambda count, heads, width: torch.randn(len(lengths), count, heads, width, generator=generator)  # noqa: E731
    width = 8 * (1 + wider)
    q, k, v = make(tq, heads * groups, 8), make(tk, heads, 8), make(tk, heads, width)
    layout = Layout(lengths=torch.tensor(lengths))
    given_ = {"window": window, "scale": 0.5}
    alone = [
        attention(q[[row]], k[[row], :length], v[[row], :length], backend="sdpa", **given_)
        for row, length in enumerate(lengths)
    ]
    for backend in ("sdpa", "flex", "varlen"):
        together = attention(q, k, v, backend=backend, layout=layout, **given_)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        package = SimpleNamespace(flash_attn_with_kvcache=documented_kvcache)
        patch.setitem(attention_module.downloaded_kernels, "fa3", package)
        together = attention(q, k, v, backend="fa3", layout=layout, **given_)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_rows_of_a_cache_share_its_memory():
    model = tiny_gpt(n_layer=2)
    cache = KVCache(model, 3, 10)
    cache.row(1).k.fill_(7)
    assert cache.k[:, 1].eq(7).all()
    assert cache.row(2).length == 0
