"""Rows of embedding tables for tokens, and the gradients of tables without a dense tensor a micro-batch.

As operations of torch, a lookup's backward pass fills a (V, C) tensor with zeros, scatters the gradients of
the tokens into it, by atomic additions whose order is chance, and adds all of it to the gradient so far. Here
the tokens of a micro-batch are sorted by id once, for all tables, and only the rows that occur are read and
written. Legend: B rows of T tokens, N = B T, V rows of a table, C its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model import kernels


@dataclass(frozen=True)
class RowOrder:
    """The tokens of a micro-batch by id; made once for all tables that are looked up with the same ids.

    Attributes:
        ids: (N,) int32, sorted.
        tokens: (N,) int64, the token of each sorted id; those of one id in their order in the batch.
        starts: (N,) int64, where pieces of at most PIECE tokens of one id begin; N after the last.
    """

    ids: Tensor
    tokens: Tensor
    starts: Tensor

    @staticmethod
    def of(ids: Tensor) -> RowOrder:
        """Sort (B, T) int64 ids on their device; their number of pieces stays there too."""
        from nanochat.model.table_kernel import PIECE  # here: Triton is for GPUs

        count = ids.numel()
        by_id, tokens = torch.sort(ids.flatten().int(), stable=True)
        begins = torch.arange(count, device=ids.device) % PIECE == 0
        begins[1:] |= by_id[1:] != by_id[:-1]
        return RowOrder(by_id, tokens, torch.nonzero_static(begins, size=count, fill_value=count)[:, 0])


class TableRows(torch.autograd.Function):
    """Rows of a table in the compute dtype; the backward pass adds to the gradient of the table itself.

    Autograd is given no gradient of the table, which would be dense. After each micro-batch's addition
    `table.grad_ready(table)` is called, if the table has such an attribute, as autograd's hooks would be.
    """

    @staticmethod
    def forward(
        ctx: Any, table: nn.Parameter, ids: Tensor, order: RowOrder | None, dtype: torch.dtype
    ) -> Tensor:
        """(V, C) fp32 table, (B, T) int64 ids -> (B, T, C) in a dtype."""
        from nanochat.model.table_kernel import gather_rows

        ctx.table, ctx.ids, ctx.order = table, ids, order
        rows: Tensor = gather_rows(table.detach(), ids.flatten(), dtype)
        return rows.view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """(B, T, C) -> nothing; the sum of each row goes to the gradient of the table."""
        from nanochat.model.table_kernel import add_rows

        table, order = ctx.table, ctx.order or RowOrder.of(ctx.ids)
        if table.grad is None:
            table.grad = torch.zeros_like(table)
        rows = grad.reshape(-1, table.size(1)).contiguous()
        add_rows(table.grad, rows, order.ids, order.tokens, order.starts)
        ready = getattr(table, "grad_ready", None)
        if ready is not None:
            ready(table)
        return None, None, None, None


def order_of(ids: Tensor) -> RowOrder | None:
    """The order of (B, T) int64 ids for the lookups of this pass, None where none of them reads it."""
    reads = torch.is_grad_enabled() and not torch.compiler.is_compiling() and kernels.run_on(ids.device)
    return RowOrder.of(ids) if reads else None


def lookup(table: nn.Parameter, ids: Tensor, order: RowOrder | None, dtype: torch.dtype) -> Tensor:
    """Rows of a table in the compute dtype, outside of a compiled graph.

    Args:
        table: (V, C) fp32.
        ids: (B, T) int64 below V.
        order: of the ids, where other tables share it; by default the backward pass makes it.
        dtype: of the rows.

    Returns:
        (B, T, C).
    """
    if torch.compiler.is_compiling() or not kernels.run_on(table.device):
        return F.embedding(ids, table).to(dtype)
    rows: Tensor = TableRows.apply(table, ids, order, dtype)
    return rows
