"""Gated attention: the output of every head times a gate between 0 and 2, computed for each position.

Legend: B rows, T positions, C model width, H heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanochat.config.model_config import GPTConfig
from nanochat.model.layers import Linear, constant


class Gated(nn.Module):
    """2 sigmoid(x G) times the attention of each head; 1 at the start."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Declare the matrix (H, C) that gives the gates."""
        super().__init__()
        self.gate = Linear(config.n_embd, config.n_head, constant(0.0))

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """(B, T, H, D) queries, (B, Tk, Hkv, D) keys and values -> (B, T, H, D); x (B, T, C) is the stream."""
        return attend(q, k, v) * (2 * torch.sigmoid(self.gate(x)))[..., None]
