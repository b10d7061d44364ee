"""SOAP against pytorch_optimizer, its bases against linear algebra; AdamW for matrices against PyTorch."""

import pytest
import torch
import torch._dynamo.testing

from nanochat.config.plan import GroupPlan
from nanochat.distributed.world import World
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions
from nanochat.optim.soap import Side, find_basis, renew_basis, soap_update

SOAP = GroupPlan("soap", 0.01, 0.95, 0.9, 1e-8, 0.1)
ADAMW = GroupPlan("adamw", 0.01, 0.9, 0.95, 1e-8, 0.1)
SHAPES = ((6, 6), (4, 9), (9, 4), (3, 5))
STEPS = 25
# By steps between two renewals, after steps of 0.01: all is float64, but the QR of the peer is float32.
ROUNDING = {1: 1e-5, 3: 1e-5, 10: 1e-5, 100: 1e-12}


def matrices(dtype=torch.float64, shapes=SHAPES):
    """Two parameters of each shape."""
    g = torch.Generator().manual_seed(0)
    return {
        f"{m}x{n}.{i}": torch.randn(m, n, generator=g, dtype=dtype).requires_grad_()
        for m, n in shapes
        for i in range(2)
    }


def gradient(shape, step, index, dtype=torch.float64):
    """Random, correlated over rows; whole numbers at step 0.

    Of a Gram matrix of low rank every basis of the null space is right, and rounding chooses one. Sums of
    products of whole numbers are exact, so that all implementations begin with the same one.
    """
    g = torch.Generator().manual_seed(100 * step + index)
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    correlated = noise + 2 * torch.linspace(-1, 1, shape[1]) * noise.sum(1, keepdim=True)
    return ((4 * noise).round() if step == 0 else correlated).to(dtype)


def optimizer_of(params, group, world=None, **options):
    kinds = dict.fromkeys(params, "matrix")
    chosen = MatrixOptions(1.0, **options)
    return MuonAdamW(params, kinds, {"matrix": group}, world or World.single_process(), torch.float32, chosen)


def train(params, optimizer, steps, first=0):
    for step in range(first, steps):
        for i, p in enumerate(params.values()):
            p.grad = gradient(p.shape, step, i, p.dtype)
        assert optimizer.step(1.0, 0.0, 0.1, index=step).applied


def peer(params, every, longest):
    library = pytest.importorskip("pytorch_optimizer")
    return library.SOAP(
        list(params),
        lr=SOAP.lr,
        betas=(SOAP.beta1, SOAP.beta2),
        weight_decay=0.1,
        precondition_frequency=every,
        max_precondition_dim=longest,
        eps=SOAP.eps,
    )


@pytest.mark.parametrize("every", ROUNDING)
def test_two_sided_soap_equals_pytorch_optimizer(every):
    params, theirs = matrices(), [p.detach().clone().requires_grad_() for p in matrices().values()]
    start = [p.detach().clone() for p in theirs]
    reference = peer(theirs, every, 100)
    train(params, optimizer_of(params, SOAP, soap_every=every), STEPS)
    for step in range(STEPS):
        for i, p in enumerate(theirs):
            p.grad = gradient(p.shape, step, i)
        reference.step()
    for ours, want, before in zip(params.values(), theirs, start, strict=True):
        assert (want - before).abs().max() > 0.04
        torch.testing.assert_close(ours.detach(), want.detach(), rtol=0, atol=ROUNDING[every])


@pytest.mark.parametrize("every", ROUNDING)
def test_one_sided_soap_equals_pytorch_optimizer(every):
    """The peer leaves out sides above a length: a row of zeros makes the left side of a square longer."""
    params = matrices()
    theirs = [
        torch.cat((p.detach(), p.new_zeros(int(p.size(0) == p.size(1)), p.size(1)))) for p in params.values()
    ]
    theirs = [p.requires_grad_() for p in theirs]
    references = [peer([p], every, min(p.shape)) for p in theirs]
    train(params, optimizer_of(params, SOAP, soap_every=every, soap_sides=1), STEPS)
    for step in range(STEPS):
        for i, (p, ours) in enumerate(zip(theirs, params.values(), strict=True)):
            p.grad = torch.zeros_like(p)
            p.grad[: ours.size(0)] = gradient(ours.shape, step, i)
            references[i].step()
    for ours, want in zip(params.values(), theirs, strict=True):
        torch.testing.assert_close(ours.detach(), want.detach()[: ours.size(0)], rtol=0, atol=ROUNDING[every])


def test_soap_in_fp32_stays_near_float64():
    single, double = matrices(torch.float32), matrices()
    with torch.no_grad():
        for a, b in zip(double.values(), single.values(), strict=True):
            a.copy_(b)
    train(single, optimizer_of(single, SOAP, soap_every=3, soap_sides=1), 10)
    train(double, optimizer_of(double, SOAP, soap_every=3, soap_sides=1), 10)
    for a, b in zip(single.values(), double.values(), strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=1e-3)


def test_adamw_for_matrices_equals_pytorchs():
    params, theirs = matrices(torch.float32), [p.detach().clone() for p in matrices(torch.float32).values()]
    theirs = [p.requires_grad_() for p in theirs]
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    train(params, optimizer_of(params, ADAMW), STEPS)
    for step in range(STEPS):
        for i, p in enumerate(theirs):
            p.grad = gradient(p.shape, step, i, p.dtype)
        reference.step()
    for ours, want in zip(params.values(), theirs, strict=True):
        torch.testing.assert_close(ours.detach(), want.detach(), rtol=1e-5, atol=1e-6)


def some_side(dim=-2, size=6, other=4):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, size, 3 * size, generator=g)
    gram = x @ x.mT
    return Side(dim, gram, torch.eye(size).repeat(2, 1, 1)), torch.rand(
        2, *((size, other) if dim == -2 else (other, size)), generator=g
    )


def test_the_basis_found_diagonalizes_the_gram_matrices_in_descending_order():
    side, _ = some_side()
    find_basis(side, torch.tensor(True))
    rotated = side.basis.mT @ side.gram @ side.basis
    values = rotated.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(rotated, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert (values.diff() <= 0).all()
    known = side.basis.clone()
    side.gram.add_(torch.eye(6) * torch.arange(6))
    find_basis(side, torch.tensor(True))
    assert torch.equal(side.basis, known)


@pytest.mark.parametrize("dim", [-2, -1])
def test_renewing_moves_the_basis_towards_the_eigenvectors(dim):
    side, second_moment = some_side(dim)

    def off_diagonal():
        rotated = side.basis.mT @ side.gram @ side.basis
        return (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).norm()

    before = off_diagonal()
    renew_basis(side, second_moment, torch.tensor(True))
    assert off_diagonal() < 0.8 * before
    for _ in range(300):
        renew_basis(side, second_moment, torch.tensor(True))
    assert off_diagonal() < 1e-3 * before
    torch.testing.assert_close(side.basis.mT @ side.basis, torch.eye(6).expand(2, 6, 6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [-2, -1])
def test_the_second_moments_follow_the_columns_of_their_basis(dim):
    gram = torch.diag(torch.tensor([1.0, 9.0, 4.0]))[None]
    side = Side(dim, gram, torch.eye(3)[None])
    second_moment = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    order = torch.tensor([1, 2, 0])
    want = second_moment[:, order]
    if dim == -1:
        second_moment, want = second_moment.mT.contiguous(), want.mT
    renew_basis(side, second_moment, torch.tensor(True))
    assert torch.equal(second_moment, want)
    torch.testing.assert_close(side.basis[0].abs(), torch.eye(3)[:, order])


def test_a_matrix_without_a_first_gradient_gets_its_eigenbasis_at_the_first_renewal():
    """Half of a model is like that: the gradient comes through projections that begin at zero."""
    params = {"late": torch.zeros(4, 6, requires_grad=True), "early": torch.zeros(4, 6, requires_grad=True)}
    optimizer = optimizer_of(params, SOAP, soap_every=5)
    for step in range(6):
        for i, (name, p) in enumerate(params.items()):
            p.grad = gradient(p.shape, step, i, p.dtype) * (name == "early" or step >= 2)
        optimizer.step(1.0, 0.0, 0.0, index=step)
        state = optimizer.state_tensors()
        identity = torch.equal(state["late.left_basis"], torch.eye(4))
        assert identity == (step < 5)
        assert not torch.equal(state["early.left_basis"], torch.eye(4))
        assert torch.isfinite(params["late"]).all()
    gram, basis = state["late.left_gram"], state["late.left_basis"]
    rotated = basis.mT @ gram @ basis
    torch.testing.assert_close(
        rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-4 * gram.norm().item()
    )


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_a_step_held_back_changes_nothing(at):
    """Step 3 is one at which the bases are renewed."""
    params = matrices(torch.float32)
    optimizer = optimizer_of(params, SOAP, soap_every=3)
    train(params, optimizer, at)
    before = {name: p.detach().clone() for name, p in params.items()} | optimizer.state_tensors()
    for p in params.values():
        p.grad = torch.full_like(p, float("nan"))
    assert not optimizer.step(1.0, 0.0, 0.1, index=at).applied
    after = {name: p.detach().clone() for name, p in params.items()} | optimizer.state_tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    train(params, optimizer, at + 8, first=at + 1)
    assert all(torch.isfinite(p).all() for p in params.values())


@pytest.mark.parametrize("group", [SOAP, ADAMW], ids=["soap", "adamw"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_the_state_continues_in_another_optimizer_bit_for_bit(group, at):
    params = matrices(torch.float32)
    optimizer = optimizer_of(params, group, soap_every=3)
    train(params, optimizer, at)
    state, weights = optimizer.state_tensors(), {n: p.detach().clone() for n, p in params.items()}
    train(params, optimizer, 10, first=at)
    again = {name: w.clone().requires_grad_() for name, w in weights.items()}
    resumed = optimizer_of(again, group, soap_every=3)
    resumed.load_state_tensors(state)
    train(again, resumed, 10, first=at)
    assert all(torch.equal(again[name], p) for name, p in params.items())
    want, got = optimizer.state_tensors(), resumed.state_tensors()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_one_side_is_the_shorter_one_and_the_right_one_of_a_square():
    state = optimizer_of(matrices(), SOAP, soap_sides=1).state_tensors()
    bases = {name.split(".")[0]: name.split(".")[2] for name in state if name.endswith("basis")}
    assert bases == {"6x6": "right_basis", "4x9": "left_basis", "9x4": "right_basis", "3x5": "left_basis"}


def test_the_squares_told_are_those_of_the_change():
    params = matrices()
    optimizer = optimizer_of(params, SOAP, soap_every=3)
    train(params, optimizer, 4)
    before = {name: p.detach().clone() for name, p in params.items()}
    for i, p in enumerate(params.values()):
        p.grad = gradient(p.shape, 4, i)
    result = optimizer.step(0.5, 0.0, 0.1, index=4)
    changes = [(params[name].detach() - before[name]).square().sum() for name in optimizer.names]
    torch.testing.assert_close(result.update_squares, torch.stack(changes))


def test_a_compiled_update_is_one_graph_and_gives_the_same_numbers():
    counter = torch._dynamo.testing.CompileCounter()
    plain, compiled = matrices(torch.float32, SHAPES[:1]), matrices(torch.float32, SHAPES[:1])
    train(plain, optimizer_of(plain, SOAP, soap_every=3), 6)
    optimizer = optimizer_of(compiled, SOAP, soap_every=3)
    (shard,) = optimizer.shards
    shard.rule.function = torch.compile(soap_update, backend=counter, fullgraph=True, dynamic=False)
    train(compiled, optimizer, 6)
    assert counter.frame_count == 1
    assert all(torch.equal(compiled[name], p) for name, p in plain.items())
