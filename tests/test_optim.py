"""The optimizer against an independent one, its rules against linear algebra, its guard on bad numbers."""

import math

import pytest
import torch
import torch._dynamo.testing

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config.model_config import GPTConfig
from nanochat.config.plan import GroupPlan
from nanochat.distributed.world import World
from nanochat.optim.muon import muon_update, polar_express
from nanochat.optim.muon_adamw import SMALL_ELEMENTS, MuonAdamW
from nanochat.optim.rates import MatrixOptions
from tests.reference_model import ReferenceOptimizer, reference_loss
from tests.test_gpt import random_model

GROUPS = {
    "matrix": GroupPlan("muon", 0.02, 0.97, 0.90, 1e-10, 0.28),
    "embedding": GroupPlan("adamw", 0.3, 0.8, 0.995, 1e-10, 0.001),
    "value_embedding": GroupPlan("adamw", 0.15, 0.8, 0.995, 1e-10, 0.01),
    "unembedding": GroupPlan("adamw", 0.008, 0.8, 0.96, 1e-10, 0.01),
    "resid": GroupPlan("adamw", 0.005, 0.8, 0.95, 1e-10, 0.05),
    "x0": GroupPlan("adamw", 0.5, 0.96, 0.95, 1e-10, 0.0),
    "smear": GroupPlan("adamw", 0.2, 0.8, 0.95, 1e-10, 0.0),
}
NORM_FACTOR = 1.01  # as tests/reference_model.py has it
OPTIONS = MatrixOptions(NORM_FACTOR)
CONFIG = GPTConfig(
    n_layer=3,
    n_embd=32,
    n_head=4,
    n_kv_head=2,
    head_dim=8,
    vocab_size=70,
    sequence_len=24,
    window_pattern="SL",
)


def small_model(seed=0):
    return random_model(CONFIG, Precision(torch.float32, "sdpa"), seed)


def optimizer_of(model):
    params = dict(model.named_parameters())
    return MuonAdamW(params, model.parameter_kinds(), GROUPS, World.single_process(), torch.float32, OPTIONS)


def moments_held(optimizer):
    """Elements of the moments of matrices and tables in this rank's memory."""
    held = []
    for shard in optimizer.shards:
        held += shard.rule.moments.values() if hasattr(shard, "rule") else (shard.exp_avg, shard.exp_avg_sq)
    return sum(tensor.numel() for tensor in held if isinstance(tensor, torch.Tensor))


def schedule(step):
    return 1 - 0.05 * step, 0.85 + 0.01 * step, 0.3 - 0.02 * step


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (40, 16), (1, 12), (64, 3)])
def test_polar_express_brings_singular_values_near_1_and_keeps_the_vectors(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=g)
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    got = polar_express(x)
    values = (u.mT @ got @ vt.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(got, u @ torch.diag_embed(values) @ vt, rtol=1e-3, atol=1e-3)
    # The iteration is built for singular values from 1e-3 up.
    large = s > 3e-3
    assert large.float().mean() > 0.8
    assert (values[large] - 1).abs().max() < 0.3


def test_orthogonalization_is_near_the_svd_in_bf16():
    x = torch.randn(1, 48, 96, generator=torch.Generator().manual_seed(1))
    u, _, vt = torch.linalg.svd(x[0], full_matrices=False)
    got = polar_express((x / (1.01 * x.norm())).bfloat16())[0].float()
    cosine = (got * (u @ vt)).sum() / got.norm() / (u @ vt).norm()
    assert cosine > 0.98


def apply_muon(p, g, lr=0.1, wd=0.0):
    m, n = p.shape[1:]
    second_moment = torch.zeros(p.size(0), *((m, 1) if m >= n else (1, n)))
    muon_update(
        p,
        g,
        torch.zeros_like(p),
        second_moment,
        lr=torch.tensor(lr),
        momentum=torch.tensor(0.9),
        weight_decay=torch.tensor(wd),
        beta2=0.9,
        ok=torch.tensor(True),
        dtype=torch.float32,
        norm_factor=NORM_FACTOR,
    )


def test_a_muon_step_has_the_norm_of_an_orthogonal_matrix():
    for m, n in ((16, 16), (16, 48), (48, 16)):
        g = torch.randn(2, m, n, generator=torch.Generator().manual_seed(0)) * 1e-4
        p = torch.zeros(2, m, n)
        apply_muon(p, g)
        torch.testing.assert_close(p.norm(dim=(1, 2)), torch.full((2,), 0.1 * math.sqrt(min(m, n))))


def test_weight_decay_acts_only_where_the_update_agrees_with_the_weight():
    g = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    start = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    plain, decayed = start.clone(), start.clone()
    apply_muon(plain, g)
    apply_muon(decayed, g, wd=0.5)
    agrees = (start - plain) * start >= 0
    torch.testing.assert_close(decayed, torch.where(agrees, plain - 0.1 * 0.5 * start, plain))


def test_a_gradient_of_zeros_leaves_a_matrix_where_it_is():
    p = torch.randn(2, 8, 4)
    before = p.clone()
    apply_muon(p, torch.zeros_like(p))
    assert torch.equal(p, before)


def test_ten_steps_on_the_model_equal_the_reference():
    model = small_model()
    kinds = model.parameter_kinds()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, reference = optimizer_of(model), ReferenceOptimizer(weights, kinds, GROUPS)
    g = torch.Generator().manual_seed(5)
    for step in range(10):
        ids = torch.randint(0, 70, (2, 24), generator=g)
        targets = torch.randint(0, 70, (2, 24), generator=g)
        model.loss(ids, targets).backward()
        result = optimizer.step(*schedule(step))
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        grads = torch.autograd.grad(reference_loss(leaves, CONFIG, ids, targets), list(leaves.values()))
        reference.step(dict(zip(leaves, grads, strict=True)), *schedule(step))
        norm = torch.stack([x.norm() for x in grads]).norm()
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-3, atol=0)
        assert result.applied
    for name, p in model.named_parameters():
        assert (p - weights[name]).abs().max() < 1e-4, name
        assert p.grad is None


def random_problem(seed=0):
    """Shapes of each way of sharing, tables above SMALL_ELEMENTS among them, that 2 and 3 do not divide."""
    shapes = {
        "a": ((5, 7), "matrix"),
        "b": ((5, 7), "matrix"),
        "c": ((5, 7), "matrix"),
        "d": ((9, 4), "matrix"),
        "table": ((205, 7), "embedding"),
        "even": ((256, 6), "unembedding"),
        "scale": ((), "smear"),
        "x0": ((3,), "x0"),
    }
    g = torch.Generator().manual_seed(seed)
    params = {name: torch.randn(shape, generator=g).requires_grad_() for name, (shape, _) in shapes.items()}
    assert params["table"].numel() > SMALL_ELEMENTS
    return params, {name: kind for name, (_, kind) in shapes.items()}


def set_random_grads(params, seed):
    g = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=g)


def test_ten_steps_on_random_gradients_equal_the_reference():
    params, kinds = random_problem()
    weights = {name: p.detach().clone() for name, p in params.items()}
    optimizer = MuonAdamW(params, kinds, GROUPS, World.single_process(), torch.float32, OPTIONS)
    reference = ReferenceOptimizer(weights, kinds, GROUPS)
    for step in range(10):
        set_random_grads(params, step)
        reference.step({name: p.grad.clone() for name, p in params.items()}, *schedule(step))
        optimizer.step(*schedule(step))
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "ok"])
@pytest.mark.parametrize("where", ["a", "table", "x0"])
@pytest.mark.parametrize("at", [0, 2])
def test_what_is_not_finite_changes_nothing_and_the_next_step_is_as_if_it_never_was(bad, where, at):
    def run(with_bad):
        params, kinds = random_problem()
        optimizer = MuonAdamW(params, kinds, GROUPS, World.single_process(), torch.float32, OPTIONS)
        for step in range(4):
            if with_bad and step == at:
                before = {name: p.detach().clone() for name, p in params.items()}
                state = optimizer.state_tensors()
                set_random_grads(params, 99)
                if bad != "ok":
                    params[where].grad.view(-1)[-1] = bad
                result = optimizer.step(*schedule(step), ok=torch.tensor(bad != "ok"))
                assert not result.applied
                assert all(torch.equal(p, before[name]) for name, p in params.items())
                after = optimizer.state_tensors()
                assert all(torch.equal(t, state[name]) for name, t in after.items())
            set_random_grads(params, step)
            assert optimizer.step(*schedule(step)).applied
        return params

    disturbed, calm = run(True), run(False)
    assert all(torch.equal(disturbed[name], calm[name]) for name in calm)


def test_a_step_tells_the_squares_of_what_it_changed():
    params, kinds = random_problem()
    optimizer = MuonAdamW(params, kinds, GROUPS, World.single_process(), torch.float32, OPTIONS)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in params.items()}
        set_random_grads(params, step)
        grads = {name: p.grad.clone() for name, p in params.items()}
        result = optimizer.step(*schedule(step))
        for name, grad, update in zip(
            optimizer.names, result.grad_squares, result.update_squares, strict=True
        ):
            change = (params[name].detach() - before[name]).double()
            torch.testing.assert_close(update.double(), change.square().sum(), rtol=1e-3, atol=1e-9)
            torch.testing.assert_close(grad, grads[name].square().sum())
    rms = optimizer.rms_by_kind(result.update_squares.tolist())
    changes = [(params[n].detach() - before[n]).flatten() for n, kind in kinds.items() if kind == "matrix"]
    assert rms["matrix"] == pytest.approx(torch.cat(changes).square().mean().sqrt().item(), rel=1e-3)


def test_the_state_continues_in_another_optimizer_bit_for_bit():
    def start():
        params, kinds = random_problem()
        return params, MuonAdamW(params, kinds, GROUPS, World.single_process(), torch.float32, OPTIONS)

    params, optimizer = start()
    for step in range(6):
        if step == 3:
            state, weights = optimizer.state_tensors(), {n: p.detach().clone() for n, p in params.items()}
        set_random_grads(params, step)
        optimizer.step(*schedule(step))
    again, resumed = start()
    with torch.no_grad():
        for name, p in again.items():
            p.copy_(weights[name])
    resumed.load_state_tensors(state)
    for step in range(3, 6):
        set_random_grads(again, step)
        resumed.step(*schedule(step))
    assert all(torch.equal(again[name], params[name]) for name in params)
    assert state["a.momentum"].shape == (5, 7)
    assert state["a.second_moment"].shape == (1, 7)
    assert state["d.second_moment"].shape == (9, 1)
    assert state["table.exp_avg_sq"].shape == (205, 7)
    assert state["table.step"] == state["x0.step"] == 3


def test_weights_and_moments_are_fp32_whatever_the_model_computes_in():
    model = random_model(CONFIG, Precision(torch.bfloat16, "sdpa"), 0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = MuonAdamW(
        dict(model.named_parameters()),
        model.parameter_kinds(),
        GROUPS,
        World.single_process(),
        torch.bfloat16,
        OPTIONS,
    )
    optimizer.step(1.0, 0.9, 0.1)
    kept = [*model.parameters(), *optimizer.state_tensors().values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_a_state_of_another_model_is_refused_by_name():
    params, kinds = random_problem()
    optimizer = MuonAdamW(params, kinds, GROUPS, World.single_process(), torch.float32, OPTIONS)
    state = optimizer.state_tensors()
    with pytest.raises(UserError, match=r"b\.momentum is missing"):
        optimizer.load_state_tensors({k: t for k, t in state.items() if k != "b.momentum"})
    with pytest.raises(UserError, match=r"table\.exp_avg is .* of shape \(2, 2\), expected .* \(205, 7\)"):
        optimizer.load_state_tensors(state | {"table.exp_avg": torch.zeros(2, 2)})


def test_a_parameter_without_a_gradient_counts_as_zero():
    params, kinds = random_problem()
    optimizer = MuonAdamW(params, kinds, GROUPS, World.single_process(), torch.float32, OPTIONS)
    set_random_grads(params, 0)
    params["a"].grad = params["even"].grad = None
    before = params["a"].detach().clone()
    assert optimizer.step(1.0, 0.9, 0.0).applied
    assert torch.equal(params["a"], before)


def test_a_compiled_muon_update_does_not_recompile_as_the_schedule_moves():
    counter = torch._dynamo.testing.CompileCounter()
    update = torch.compile(muon_update, backend=counter, fullgraph=True, dynamic=False)
    p, moments = torch.zeros(2, 8, 4), (torch.zeros(2, 8, 4), torch.zeros(2, 8, 1))
    for step in range(3):
        lr_mult, momentum, weight_decay = (torch.tensor(x) for x in schedule(step))
        update(
            p,
            torch.ones(2, 8, 4),
            *moments,
            lr=lr_mult,
            momentum=momentum,
            weight_decay=weight_decay,
            beta2=0.9,
            ok=torch.tensor(True),
            dtype=torch.float32,
            norm_factor=NORM_FACTOR,
        )
    assert counter.frame_count == 1
