"""A conversation packed among others is read, and learnt from, as if it were alone."""

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common.machine import Precision
from nanochat.engine import KVCache
from nanochat.model import sdpa_attention
from nanochat.model.attention import PACKED, TOKENS_A_CONVERSATION, layout_of
from nanochat.model.gpt import GPT
from tests.test_gpt import config_of, random_model, require_one_graph

BOS = 0
LENGTH = 300  # of a row; short windows are 128
KINDS = {
    "plain": {},
    "short windows only": {"window_pattern": "SSSL", "n_layer": 4},
    "long": {"window_pattern": "L"},
    "bigram": {"bigram": True},
    "diff1": {"attention_kind": "diff1"},
    "diff2": {"attention_kind": "diff2", "bigram": True},
}


def isolating(kind="plain", backend="sdpa"):
    config = config_of(sequence_len=LENGTH, **KINDS[kind])
    model = random_model(config, Precision(torch.float32, backend))
    model.document_bos, model.isolates_documents = BOS, True
    return model


def conversations(lengths, seed=1):
    """Each its BOS and random ids that are none."""
    g = torch.Generator().manual_seed(seed)
    found = [torch.randint(1, 70, (length,), generator=g) for length in lengths]
    for ids in found:
        ids[0] = BOS
    return found


def row_of(parts):
    """One row of conversations end to end, filled with an id that is no BOS; (1, T + 1)."""
    row = torch.full((1, LENGTH + 1), 69)
    ids = torch.cat(parts)
    row[0, : len(ids)] = ids
    return row


def losses(model, ids):
    """Each position's loss of the next token, (1, T)."""
    with torch.no_grad():
        return model.loss(ids[:, :-1], ids[:, 1:], reduction="none")


def differences(model, lengths, seed=1):
    """Of each conversation: the largest difference of a loss packed and alone."""
    parts = conversations(lengths, seed)
    packed, start, found = losses(model, row_of(parts)), 0, []
    for ids in parts:
        alone = losses(model, ids[None])
        found.append((packed[:, start : start + len(ids) - 1] - alone).abs().max().item())
        start += len(ids)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_losses_packed_are_those_alone(kind, stacked, monkeypatch):
    """Shorter and longer than a window and than a chunk of queries; stacked chunks are those of GPUs."""
    if stacked:
        chunks = SimpleNamespace(apply=sdpa_attention._stacked_chunks)
        monkeypatch.setattr(sdpa_attention, "_ChunksOnCpu", chunks)
    model, lengths = isolating(kind), (20, 2, 170, 7, 90)
    assert max(differences(model, lengths)) < 1e-5
    model.isolates_documents = False  # smear and pairs reach over a BOS
    assert min(differences(model, lengths)[1:]) > 1e-3
    model.document_bos = None
    assert min(differences(model, lengths)[1:]) > 1e-2


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(2, 120), min_size=1, max_size=40).filter(lambda found: sum(found) < LENGTH),
    seed=st.integers(0, 1000),
)
def test_any_neighbours_change_nothing(lengths, seed):
    assert max(differences(isolating("bigram"), lengths, seed)) < 1e-5


@pytest.mark.slow
def test_flex_reads_them_alone_too():
    model, lengths = isolating("bigram", "flex"), (20, 2, 170, 7, 90)
    assert max(differences(model, lengths)) < 1e-5


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_gradients_packed_are_those_alone(recompute):
    model = isolating("bigram")
    model.recompute = recompute
    parts = conversations((60, 170, 40))
    parts[1] = parts[1] % 30  # ids below 30; its neighbours' are from 30 on
    parts[1][1:].clamp_(min=1)
    for ids in (parts[0], parts[2]):
        ids[1:] = ids[1:] % 30 + 30
    targets = parts[1][None, 1:]
    model.loss(parts[1][None, :-1], targets, reduction="sum").backward()
    alone = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    row, weights = row_of(parts), torch.zeros(1, LENGTH)
    weights[:, 60 : 60 + 169] = 1
    model.loss(row[:, :-1], row[:, 1:], weights=weights).backward()
    for name, p in model.named_parameters():
        assert (p.grad - alone[name]).abs().max() <= 1e-5 * alone[name].abs().max().clamp(min=1), name
    assert not model.embed.weight.grad[30:].any()
    assert not model.value_embeds["2"].weight.grad[30:].any()
    assert model.embed.weight.grad[:30].any()


def test_the_cache_reads_a_conversation_so():
    """A prompt behind a cache has one BOS, at its beginning, where nothing is before it."""
    model = isolating("bigram")
    (ids,) = conversations((50,))
    cache = KVCache(model, 1, 64)
    with torch.no_grad():
        parts = [model.logits(part[None], cache) for part in ids.split((20, 1, 29))]
        torch.testing.assert_close(torch.cat(parts, 1), model.logits(ids[None]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_it_is_one_graph(recompute):
    model, ids = isolating("bigram"), row_of(conversations((60, 170, 40)))[:, :-1]
    model.recompute = recompute
    require_one_graph(model, ids)


@pytest.mark.parametrize("backend", PACKED)
@pytest.mark.parametrize("length", [256, 512])
def test_rows_of_short_conversations_have_a_slot_each(backend, length):
    """As many as the loader puts in a row at most; with a slot in 128 tokens most would be merged."""
    ids = torch.ones(16, length, dtype=torch.int64)
    ids[:, ::TOKENS_A_CONVERSATION] = BOS
    layout = layout_of(ids == BOS, backend, (128,), TOKENS_A_CONVERSATION)
    assert (layout.documents[:, -1] == length // TOKENS_A_CONVERSATION).all()
    meant = GPT(config_of(sequence_len=length), Precision(torch.float32, backend), BOS)
    merged = meant._layout(ids, None).documents[:, -1]
    meant.isolates_documents = True
    assert torch.equal(meant._layout(ids, None).boundaries, layout.boundaries)
    assert merged.sum() < 16 * length // TOKENS_A_CONVERSATION / 2
