"""SOAP: Adam in the eigenbases of Shampoo's Gram matrices (arXiv 2409.11321; RECIPE 4).

Legend: K matrices of one shape (m, n); S is m for the left side and n for the right one. A side that is left
out (one-sided SOAP, on the longer side) has the identity for its basis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.config.plan import GroupPlan
from nanochat.optim.rates import MatrixOptions, StepRates, sum_of_squares


class Soap:
    """SOAP. Step 0 only finds the bases; every `soap_every` steps they are renewed.

    A matrix that had no gradient at step 0, or a run whose step 0 was held back, gets its bases from an
    eigendecomposition at the first renewal.
    """

    def __init__(self, like: Tensor, group: GroupPlan, dtype: torch.dtype, options: MatrixOptions) -> None:
        self.group, self.every = group, options.soap_every
        self.function = soap_update
        count, m, n = like.shape
        self.moments = {
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
            "step": like.new_zeros(count),
        }
        self.sides = []
        for name, dim, size, other in (("left", -2, m, n), ("right", -1, n, m)):
            if options.soap_sides == 1 and (size > other or (size == other and name == "left")):
                continue
            gram = like.new_zeros(count, size, size)
            basis = torch.eye(size, dtype=like.dtype, device=like.device).repeat(count, 1, 1)
            self.moments |= {f"{name}_gram": gram, f"{name}_basis": basis}
            self.sides.append(Side(dim, gram, basis))

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        """Update parameters and moments in place; (K,) sums of squares of the change."""
        if rates.index == 0:
            grads = torch.where(rates.ok, grads, 0.0)
            for side in self.sides:
                side.observe(grads, rates.ok.to(grads.dtype) * (1 - self.group.beta2))
                find_basis(side, rates.ok)
            return params.new_zeros(len(params))
        with tf32_products(params.device):
            squares = self.function(
                params,
                grads,
                self.moments["exp_avg"],
                self.moments["exp_avg_sq"],
                self.moments["step"],
                self.sides,
                lr=rates.lr_mult_tensor * self.group.lr,
                weight_decay=rates.weight_decay_tensor,
                beta1=self.group.beta1,
                beta2=self.group.beta2,
                eps=self.group.eps,
                ok=rates.ok,
            )
        if rates.index == self.every:
            for side in self.sides:
                find_basis(side, rates.ok)
        if rates.index % self.every == 0:
            for side in self.sides:
                renew_basis(side, self.moments["exp_avg_sq"], rates.ok)
        return squares

    def compile(self) -> None:
        """Let torch.compile make the update."""
        self.function = torch.compile(soap_update, dynamic=False)


@contextlib.contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Within, matrix products of fp32 are in TF32 on CUDA: eight times as fast, factors of 11 bits.

    The update bears it, as Muon's bears bf16; bases are found and renewed outside, in fp32 and float64. The
    switch is the older one, since it sets the newer one too, and readers of either find the same.
    """
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    if device.type != "cuda" or before == "tf32":
        yield
        return
    switch.allow_tf32 = True
    try:
        yield
    finally:
        switch.allow_tf32 = False
        switch.fp32_precision = before


@dataclass(frozen=True)
class Side:
    """What is kept of one side of the matrices; updated in place.

    Attributes:
        dim: -2 for the left side, -1 for the right one.
        gram: (K, S, S) average of G G^T on the left, of G^T G on the right.
        basis: (K, S, S) orthogonal, its columns near the eigenvectors of gram; the identity while nothing is
            known of them.
    """

    dim: int
    gram: Tensor
    basis: Tensor

    def into(self, x: Tensor) -> Tensor:
        """Matrices (K, m, n) in the coordinates of the basis."""
        return self.basis.mT @ x if self.dim == -2 else x @ self.basis

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `into`."""
        return self.basis @ x if self.dim == -2 else x @ self.basis.mT

    def observe(self, grads: Tensor, weight: Tensor) -> None:
        """Move the Gram matrices towards those of the gradients (K, m, n), by a 0-dim weight."""
        self.gram.lerp_(grads @ grads.mT if self.dim == -2 else grads.mT @ grads, weight)


def soap_update(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    sides: list[Side],
    *,
    lr: Tensor,
    weight_decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    ok: Tensor,
) -> Tensor:
    """Update K matrices in place with the bases as they are; returns (K,) sums of squares of the change.

    The first moment is kept in the space of the parameters, the second one in the coordinates of the bases.
    Weight decay comes after the step.

    Args:
        params: (K, m, n) fp32.
        grads: (K, m, n) fp32.
        exp_avg: (K, m, n) first moment M.
        exp_avg_sq: (K, m, n) second moment V.
        step: (K,) fp32, updates so far; advanced here.
        sides: one or two.
        lr: 0-dim on the device, as the next one.
        weight_decay: 0-dim, multiplied by lr.
        beta1: decay of the first moment.
        beta2: decay of the second moment and of the Gram matrices.
        eps: added to the root of the second moment.
        ok: 0-dim bool; where it is False nothing changes, whatever the gradient holds.
    """
    live = ok.to(params.dtype)
    grads = torch.where(ok, grads, 0.0)
    rotated, direction = grads, exp_avg.lerp_(grads, live * (1 - beta1))
    for side in sides:
        rotated, direction = side.into(rotated), side.into(direction)
    exp_avg_sq.lerp_(rotated.square(), live * (1 - beta2))
    direction = direction / (exp_avg_sq.sqrt() + eps)
    for side in sides:
        direction = side.back(direction)
    t = step.add_(live)[:, None, None]
    change = lr * torch.sqrt(1 - beta2**t) / (1 - beta1**t) * direction
    change = torch.where(ok, change + lr * weight_decay * (params - change), 0.0)
    params.sub_(change)
    for side in sides:
        side.observe(grads, live * (1 - beta2))
    return sum_of_squares(change)


def find_basis(side: Side, ok: Tensor) -> None:
    """Take the eigenvectors of the Gram matrices, in descending order, where the basis is the identity.

    A matrix without a gradient so far keeps the identity: half of the matrices begin like that, as the
    projections behind them are zero. Where ok is False nothing changes. In float64, where eigh converges also
    for matrices of low rank. It waits for the device.
    """
    identity = torch.eye(side.gram.size(-1), dtype=side.gram.dtype, device=side.gram.device)
    for gram, basis in zip(side.gram, side.basis, strict=True):
        found = torch.linalg.eigh(gram.double()).eigenvectors.flip(-1).to(basis.dtype)
        unknown = (basis == identity).all() & (gram != 0).any() & ok
        basis.copy_(torch.where(unknown, found, basis))


def renew_basis(side: Side, exp_avg_sq: Tensor, ok: Tensor) -> None:
    """One power iteration and QR of each basis, its columns first put in the order of their eigenvalues.

    The second moments follow their columns. Where ok is False nothing changes.
    """
    product = side.gram @ side.basis
    order = (side.basis * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
    turned = torch.linalg.qr(product.gather(-1, order[:, None, :].expand_as(product))).Q
    index = order[:, :, None] if side.dim == -2 else order[:, None, :]
    moved = exp_avg_sq.gather(side.dim, index.expand_as(exp_avg_sq))
    exp_avg_sq.copy_(torch.where(ok, moved, exp_avg_sq))
    side.basis.copy_(torch.where(ok, turned, side.basis))
