"""Copies of weights in the compute dtype: the same bits as a cast in every pass, made once a step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.model.layers import Linear, normal
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions

BF16 = torch.bfloat16


def layer_and_inputs(count: int) -> tuple[Linear, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(24, 40, normal(1.0))
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return layer, [torch.randn(7, 24, generator=generator).to(BF16) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("hold", [False, True])
def test_gradients_have_the_bits_of_a_cast_in_every_micro_batch(count: int, hold: bool) -> None:
    layer, inputs = layer_and_inputs(count)
    plain = layer.weight.detach().clone().requires_grad_()
    for index, x in enumerate(inputs):
        layer.holds = hold and index + 1 < count
        y, want = layer(x), F.linear(x, plain.to(BF16))
        assert torch.equal(y, want)
        y.float().square().sum().backward()
        want.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, plain.grad)


def test_a_master_that_changes_in_any_way_is_copied_again() -> None:
    layer, [x] = layer_and_inputs(1)

    def is_fresh() -> bool:
        return torch.equal(layer(x), F.linear(x, layer.weight.to(BF16)))

    assert is_fresh()
    first = layer.working(BF16)
    assert layer.working(BF16) is first
    with torch.no_grad():
        layer.weight.mul_(2)
        assert is_fresh()
        torch._foreach_copy_([layer.weight], [torch.ones_like(layer.weight)])
        assert is_fresh()
        layer.weight.detach().view(-1)[3:5].fill_(7)  # as AdamW updates its slice of a table
        assert is_fresh()
    layer.load_state_dict({"weight": torch.full_like(layer.weight, 3)})
    assert is_fresh()
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))
    assert is_fresh()
    assert layer.working(torch.float32) is layer.weight


def test_a_copied_layer_has_a_gradient_of_its_own() -> None:
    layer, [x] = layer_and_inputs(1)
    layer(x).float().sum().backward()
    other = copy.deepcopy(layer)
    other.weight.grad = None
    other(x).float().sum().backward()
    assert torch.equal(other.weight.grad, layer.weight.grad)


def test_gradients_that_are_held_are_forgotten_with_the_others() -> None:
    layer, [x] = layer_and_inputs(1)
    layer.holds = True
    layer(x).float().sum().backward()
    assert layer.weight.grad is None
    layer.drop_gradients()
    layer.holds = False
    layer(x).float().sum().backward()
    plain = layer.weight.detach().clone().requires_grad_()
    F.linear(x, plain.to(BF16)).float().sum().backward()
    assert torch.equal(layer.weight.grad, plain.grad)


def test_what_is_evaluated_first_can_be_trained() -> None:
    layer, [x] = layer_and_inputs(1)
    with torch.inference_mode():
        layer(x)
    layer(x).float().sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("rule", ["muon", "soap", "adamw"])
def test_every_update_of_the_optimizer_is_seen(rule: str) -> None:
    plan = planning.plan(TrainArgs(depth=1, max_seq_len=16, num_iterations=9, matrix_optimizer=rule), 512)
    model = GPT(plan.model, Precision(BF16, "sdpa"))
    model.init_weights(0)
    params, kinds = dict(model.named_parameters()), model.parameter_kinds()
    optimizer = MuonAdamW(params, kinds, plan.groups, World.single_process(), BF16, MatrixOptions(1.01))
    ids = torch.arange(32).view(2, 16)
    for index in range(3):
        model.loss(ids, ids).backward()
        before = {name: p.detach().clone() for name, p in params.items()}
        optimizer.step(1.0, 0.9, 0.1, index=index)
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                assert torch.equal(layer.working(BF16), layer.weight.to(BF16)), name
    assert all(not torch.equal(before[name], p) for name, p in params.items() if kinds[name] != "share")
