"""The table of pairs against its formula, behind a cache, in a plan, and on several ranks."""

import sys

import pytest
import torch

from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.model_config import count_params, flops_per_token
from nanochat.config.plan import model_config
from nanochat.engine import KVCache
from nanochat.model.gpt import GPT
from nanochat.model.layers import pair_rows
from tests.dist.launch import digest, losses
from tests.dist.world import train_world
from tests.reference_model import reference_loss, reference_pairs
from tests.test_gpt import FP32, batch, config_of, random_model
from tests.tiny import tiny_corpus


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_loss_and_gradients_equal_the_reference(recompute):
    config = config_of(bigram=True)
    model, (ids, targets) = random_model(config), batch(config)
    model.recompute = recompute
    loss = model.loss(ids, targets)
    loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    want = reference_loss(weights, config, ids, targets)
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - weights[name].grad).abs().max() <= 1e-5, name
    assert model.bigram.weight.grad.any()
    assert model.bigram_scale.grad.all()


def test_pairs_spread_over_the_table():
    rows = 5 * 128
    ids = torch.randint(0, 64, (1, 20_000), generator=torch.Generator().manual_seed(0))
    before = torch.cat((torch.tensor([[-1]]), ids[:, :-1]), dim=1)
    found = pair_rows(ids, before, rows)
    assert torch.equal(found, reference_pairs(ids, rows))
    counts = torch.bincount(found[0], minlength=rows)
    assert (counts > 0).float().mean() > 0.95
    assert counts.max() < 4 * counts.float().mean()


def test_decoding_through_the_cache_equals_the_full_pass():
    config = config_of(bigram=True)
    model, (ids, _) = random_model(config), batch(config)
    with torch.no_grad():
        full = model.logits(ids)
        for pieces in ([1] * 160, [100, 1, 1, 30, 28]):
            cache = KVCache(model, 2, 160)
            parts = [model.logits(part, cache) for part in ids.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)
        cache = KVCache(model, 2, 160)
        model.logits(ids[:, :90], cache)
        cache.take_rows(torch.tensor([1, 0, 1]))
        behind = model.logits(ids[[1, 0, 1], 90:], cache)
    torch.testing.assert_close(behind, full[[1, 0, 1], 90:], rtol=1e-5, atol=1e-5)


def test_at_the_start_it_changes_nothing():
    plain, paired = GPT(config_of(), FP32), GPT(config_of(bigram=True), FP32)
    plain.init_weights(0)
    paired.init_weights(0)
    ids = batch(config_of())[0]
    assert torch.equal(plain.logits(ids), paired.logits(ids))
    assert paired.bigram_scale.tolist() == pytest.approx([0.05] * 3)


def test_the_plan_counts_it_and_no_flop():
    plain, paired = (model_config(TrainArgs(bigram=given), 32768, 12) for given in (False, True))
    assert count_params(paired).total - count_params(plain).total == 5 * 32768 * 768 + 12
    assert count_params(paired).scaling == count_params(plain).scaling
    assert flops_per_token(paired) == flops_per_token(plain)
    with torch.device("meta"):
        model = GPT(paired, FP32)
    assert sum(p.numel() for p in model.parameters()) == count_params(paired).total
    kinds = model.parameter_kinds()
    assert (kinds["bigram.weight"], kinds["bigram_scale"]) == ("value_embedding", "resid")
    assert set(kinds.values()) <= planning.plan(TrainArgs(bigram=True), 32768).groups.keys()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks: 0.3 s a world, 5 s if spawned")
def test_two_ranks_resumed_train_the_run_of_one(tmp_path):
    tiny_corpus(tmp_path)
    common = {"bigram": True, "device_batch_size": 1, "warmup_steps": 0, "save_every": 1000}
    train_world(1, tmp_path, run="one", **common)
    train_world(2, tmp_path, run="two", **common)
    train_world(2, tmp_path, run="cut", stop_at=5, **common)
    train_world(2, tmp_path, run="cut", resume="auto", **common)
    assert digest("cut", 12) == digest("two", 12)
    assert losses("one") == pytest.approx(losses("two"), abs=1e-5)
