"""Differential attention: two maps a head, the second one taken out of the first (RECIPE part 5).

"diff1" (Ye et al., Differential Transformer, ICLR 2025): queries and keys of half a head's width, so two maps
over values of the whole width; the difference is normed. "diff2" (its authors' second version, 2026): twice
the queries of a whole width over the same keys and values; the share is found for each position and head.
Legend: B rows, T positions, C model width, H heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.config.model_config import GPTConfig
from nanochat.model.layers import Linear

# Queries, keys and values -> (B, T, heads of the queries, width of the values).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def initial_share(layer: int) -> float:
    """The share of the second map that layer `layer` (from 0) begins with under diff1.

    >>> [round(initial_share(layer), 3) for layer in (0, 1, 4, 12)]
    [0.2, 0.356, 0.619, 0.784]
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Diff1(nn.Module):
    """norm(A1 V - s A2 V) (1 - s0), with one learned share s a layer, which is about s0 at the start."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Leave the vectors uninitialised: (4, D/2), of which the shares are made."""
        super().__init__()
        self.initial, self.eps = initial_share(layer), config.head_norm_eps
        self.vectors = nn.Parameter(torch.empty(4, config.qk_dim))

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """(B, T, 2 H, D/2) queries, (B, Tk, 2 Hkv, D/2) keys, (B, Tk, Hkv, D) values -> (B, T, H, D).

        Neighbours are the two of a head. x, the normed stream, is not used.
        """
        q, k = (torch.unflatten(two, -2, (-1, 2)) for two in (q, k))
        first, second = (attend(q[..., i, :], k[..., i, :], v) for i in range(2))
        q1, k1, q2, k2 = self.vectors
        share = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.initial
        y = first - share.to(first.dtype) * second
        return (1 - self.initial) * F.rms_norm(y, (y.size(-1),), eps=self.eps)


class Diff2(nn.Module):
    """A1 V - s A2 V, with a share s between 0 and 1 for each position and head."""

    def __init__(self, config: GPTConfig) -> None:
        """Leave the matrix uninitialised: (H, C)."""
        super().__init__()
        self.share = Linear(config.n_embd, config.n_head)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """(B, T, 2 H, D) queries, (B, Tk, Hkv, D) keys and values -> (B, T, H, D).

        Neighbours are the two of a head, so that they read the same keys; x (B, T, C) is the normed stream.
        """
        first, second = torch.unflatten(attend(q, k, v), -2, (-1, 2)).unbind(-2)
        share: Tensor = torch.sigmoid(self.share(x))
        return first - share[..., None] * second


def differential(config: GPTConfig, layer: int) -> Diff1 | Diff2 | None:
    """What layer `layer` makes of its maps; None for softmax, whose one map a head is used as it is."""
    if config.attention_kind == "softmax":
        return None
    return Diff1(config, layer) if config.attention_kind == "diff1" else Diff2(config)
