"""Differential attention (RECIPE part 5): two attention maps a head, the second subtracted from the first.

"diff1" (Ye et al., Differential Transformer, ICLR 2025): queries and keys of half a head's width, so two maps
over values of the whole width; the difference is normed; lambda is one number a layer. "diff2" (its authors'
second version, 2026): twice the queries, of a whole width, over the same keys and values; lambda is computed
for each position and head.

Legend: B rows, T positions, C model width, H heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.config.model_config import GPTConfig
from nanochat.model.layers import Linear, constant, normal, parameter

# Queries, keys and values -> (B, T, heads of the queries, width of the values).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def initial_lambda(layer: int) -> float:
    """The weight of the second map that layer `layer` (from 0) begins with under diff1.

    >>> [round(initial_lambda(layer), 3) for layer in (0, 1, 4, 12)]
    [0.2, 0.356, 0.619, 0.784]
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Diff1(nn.Module):
    """norm(A1 V - l A2 V) (1 - l0), with one learned weight l a layer, which is about l0 at the start."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Declare the vectors (4, D/2) that lambda is computed from."""
        super().__init__()
        self.initial, self.eps = initial_lambda(layer), config.head_norm_eps
        init = normal(config.share_vectors_std)
        self.vectors = parameter(4, config.qk_dim, kind="share", init=init)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """(B, T, 2 H, D/2) queries, (B, Tk, 2 Hkv, D/2) keys, (B, Tk, Hkv, D) values -> (B, T, H, D).

        Neighbours are the two of a head. x, the normed stream, is not used.
        """
        q, k = (torch.unflatten(two, -2, (-1, 2)) for two in (q, k))
        first, second = (attend(q[..., i, :], k[..., i, :], v) for i in range(2))
        q1, k1, q2, k2 = self.vectors
        weight = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.initial
        y = first - weight.to(first.dtype) * second
        return (1 - self.initial) * F.rms_norm(y, (y.size(-1),), eps=self.eps)


class Diff2(nn.Module):
    """A1 V - l A2 V, with a weight l between 0 and 1 for each position and head."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Declare the matrix (H, C) that gives lambda."""
        super().__init__()
        self.share = Linear(config.n_embd, config.n_head, constant(0.0))

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """(B, T, 2 H, D) queries, (B, Tk, Hkv, D) keys and values -> (B, T, H, D).

        Neighbours are the two of a head, so that they read the same keys; x (B, T, C) is the normed stream.
        """
        first, second = torch.unflatten(attend(q, k, v), -2, (-1, 2)).unbind(-2)
        return first - torch.sigmoid(self.share(x))[..., None] * second
