"""The optimizer of a group of block matrices, by its name."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.config.plan import GroupPlan
from nanochat.optim.adamw import AdamW
from nanochat.optim.muon import Muon
from nanochat.optim.rates import MatrixOptions, MatrixRule
from nanochat.optim.soap import Soap


def matrix_rule(
    like: Tensor, group: GroupPlan, dtype: torch.dtype, norm_factor: float, options: MatrixOptions
) -> MatrixRule:
    """The rule that the group names, with moments at zero for matrices like (K, m, n)."""
    if group.optimizer == "soap":
        return Soap(like, group, options)
    if group.optimizer == "adamw":
        return AdamW(like, group)
    assert group.optimizer == "muon", group.optimizer
    return Muon(like, group, dtype, norm_factor)
