"""Attention by its definition, in plain mathematics: what every backend is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.model.sdpa_attention import band_mask


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The definition, in plain mathematics and with an explicit mask; shapes as in `attention`."""
    groups = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.size(-1) ** -0.5 if scale is None else scale)
    visible = band_mask(q.size(1), k.size(1), window, q.device)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)
