import doctest
import math

import numpy as np
import pytest
import torch

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.common.stop_signals import Stopped
from nanochat.config.model_config import GPTConfig
from nanochat.distributed.world import World
from nanochat.evaluation import bits_per_byte
from nanochat.evaluation.bits_per_byte import evaluate, profile_bpb
from nanochat.model.gpt import GPT

VOCAB = 40
# Token n spells n % 5 bytes; the multiples of five are special and spell none.
TOKEN_BYTES = np.arange(VOCAB) % 5


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(
        n_layer=2, n_embd=32, n_head=1, n_kv_head=1, head_dim=32, vocab_size=VOCAB, sequence_len=12
    )
    model = GPT(config, Precision(torch.float32, "sdpa"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.init_weights(0)
        model.head.weight.normal_(0, 1, generator=generator)
    return model


def batches(count, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows_of = [torch.randint(0, VOCAB, (rows, 13), generator=generator) for _ in range(count)]
    return [(tokens[:, :-1], tokens[:, 1:].clone()) for tokens in rows_of]


def naive_bpb(model, pairs):
    nats = n_bytes = 0.0
    for inputs, targets in pairs:
        with torch.no_grad():
            log_p = model.logits(inputs).double().log_softmax(-1)
        for row in range(len(targets)):
            for t, token in enumerate(targets[row].tolist()):
                if token >= 0 and TOKEN_BYTES[token]:
                    nats -= log_p[row, t, token].item()
                    n_bytes += TOKEN_BYTES[token]
    return nats / math.log(2) / n_bytes


def test_bits_per_byte_equals_the_sum_over_tokens_that_spell_bytes(model):
    pairs = batches(4)
    pairs[1][1][0, 3:6] = -1  # ignored targets
    assert evaluate(model, pairs, TOKEN_BYTES, World.single_process()).bpb == pytest.approx(
        naive_bpb(model, pairs), rel=1e-6
    )


def test_the_loss_is_the_mean_over_all_targets_that_count_special_ones_too(model):
    pairs = batches(4)
    pairs[1][1][0, 3:6] = -1
    nats, count = 0.0, 0
    for inputs, targets in pairs:
        with torch.no_grad():
            log_p = model.logits(inputs).double().log_softmax(-1)
        for row, t in (targets >= 0).nonzero().tolist():
            nats, count = nats - log_p[row, t, targets[row, t]].item(), count + 1
    assert count == 4 * 36 - 3
    assert evaluate(model, pairs, TOKEN_BYTES, World.single_process()).loss == pytest.approx(
        nats / count, rel=1e-6
    )
    assert profile_bpb(model, pairs, TOKEN_BYTES, World.single_process(), BOS).loss == pytest.approx(
        nats / count, rel=1e-6
    )


def test_a_model_that_knows_nothing_costs_log2_of_the_vocabulary_a_token(model):
    silent = GPT(model.config, Precision(torch.float32, "sdpa"))
    silent.init_weights(0)
    silent.head.weight.data.zero_()
    pairs = [(torch.full((1, 12), 1), torch.full((1, 12), 4))]
    assert evaluate(silent, pairs, TOKEN_BYTES, World.single_process()).bpb == pytest.approx(
        math.log2(VOCAB) / 4, rel=1e-6
    )


def test_the_way_rows_are_batched_does_not_matter(model):
    pairs = batches(4)
    merged = [(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))]
    one = evaluate(model, pairs, TOKEN_BYTES, World.single_process()).bpb
    assert evaluate(model, merged, TOKEN_BYTES, World.single_process()).bpb == pytest.approx(one, rel=1e-6)


def test_ranks_add_nats_and_bytes_before_dividing(model):
    """Two ranks with unequal shares: what each gives to the sum, and what the sum makes."""
    shares = [batches(3), batches(1, rows=1, seed=9)]
    given = []

    class Rank(World):
        def all_reduce_sum(self, tensor):
            given.append(tensor.clone())
            return tensor.copy_(sum(given))

        def max_over_ranks(self, value):
            return value

    for rank, pairs in enumerate(shares):
        world = Rank(rank=rank, size=2, device=torch.device("cpu"), backend="gloo")
        result = evaluate(model, pairs, TOKEN_BYTES, world).bpb
    assert result == pytest.approx(naive_bpb(model, shares[0] + shares[1]), rel=1e-6)
    assert given[0].dtype == torch.float64


def plain_profile(model, pairs):
    """(place, document, nats, bytes) of every target that spells something."""
    found, document = [], -1
    for inputs, targets in pairs:
        with torch.no_grad():
            log_p = model.logits(inputs).double().log_softmax(-1)
        for row in range(len(targets)):
            for t, token in enumerate(targets[row].tolist()):
                document += t == 0 or int(inputs[row, t]) == BOS
                if token >= 0 and TOKEN_BYTES[token]:
                    found.append((t + 1, document, -log_p[row, t, token].item(), int(TOKEN_BYTES[token])))
    return found


def bpb_of(entries):
    return sum(nats for _, _, nats, _ in entries) / math.log(2) / sum(count for *_, count in entries)


BOS = 10


def test_a_profile_takes_bits_per_byte_apart_by_position_and_by_document(model):
    pairs = batches(5)
    pairs[1][1][0, 3:6] = -1
    entries = plain_profile(model, pairs)
    profile = profile_bpb(model, pairs, TOKEN_BYTES, World.single_process(), BOS)
    assert profile.bpb == pytest.approx(
        evaluate(model, pairs, TOKEN_BYTES, World.single_process()).bpb, rel=1e-6
    )
    assert [part[:2] for part in profile.positions] == [[1, 1], [2, 3], [4, 7], [8, 12]]
    for first, last, bpb in profile.positions:
        expected = bpb_of([entry for entry in entries if first <= entry[0] <= last])
        assert bpb == pytest.approx(expected, rel=1e-6)
    documents = {entry[1] for entry in entries}
    assert len(documents) > 15
    counts = [0] * bits_per_byte.HISTOGRAM_BINS
    for number in documents:
        bpb = bpb_of([entry for entry in entries if entry[1] == number])
        counts[min(int(bpb / bits_per_byte.HISTOGRAM_STEP), bits_per_byte.HISTOGRAM_BINS - 1)] += 1
    assert list(profile.documents) == counts[: len(profile.documents)]
    assert sum(profile.documents) == len(documents)


def test_nothing_to_evaluate_is_one_clear_error(model):
    for pairs in ([], [(torch.ones(1, 4, dtype=torch.int64), torch.full((1, 4), 5))]):
        with pytest.raises(UserError, match="no tokens to evaluate on"):
            evaluate(model, pairs, TOKEN_BYTES, World.single_process())


def test_the_example_in_the_docstring_holds():
    results = doctest.testmod(bits_per_byte)
    assert (results.attempted, results.failed) == (1, 0)


def test_a_stop_between_batches_drops_what_was_measured(model):
    asked = iter([False, False, True, True])
    seen = []

    def counted():
        for pair in batches(4):
            seen.append(pair)
            yield pair

    with pytest.raises(Stopped):
        evaluate(model, counted(), TOKEN_BYTES, World.single_process(), lambda: next(asked))
    assert len(seen) == 3
