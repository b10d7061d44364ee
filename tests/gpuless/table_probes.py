"""Tables on a pretended H100, for bytes of gradients, and by Triton's interpreter, for numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat.model import kernels
from nanochat.model.table_rows import RowOrder, TableRows, lookup
from tests.gpuless.eager import Counter
from tests.gpuless.probes import Watch

GPU = torch.device("cuda:0")


def gradients(tokens: int, vocabulary: int, width: int, dense: bool, tables: int = 2) -> dict[str, Any]:
    """Megabytes a table of the second micro-batch's lookups and their backward passes, and what is as large.

    Args:
        tokens: of a micro-batch.
        vocabulary: rows of a table.
        width: of a table.
        dense: by operations of torch, as on a device that Triton does not compile for.
        tables: that share the order of the ids.
    """
    if dense:
        kernels.run_on = lambda device: False  # type: ignore[assignment]
    with FakeTensorMode():
        held = [nn.Parameter(torch.empty(vocabulary, width, device=GPU)) for _ in range(tables)]
        ids = torch.zeros(16, tokens // 16, dtype=torch.int64, device=GPU)
        grad = torch.empty(16, tokens // 16, width, dtype=torch.bfloat16, device=GPU)
        crossings = Watch()
        for _ in range(2):
            with Counter() as counter, crossings:
                order = None if dense else RowOrder.of(ids)
                for table in held:
                    lookup(table, ids, order, torch.bfloat16).backward(grad)
        assert all(table.grad is not None for table in held)
    found = counter.by_operator()
    return {
        "megabytes": sum(count for _, count in found.values()) / tables / 1e6,
        "by": {name: count / tables / 1e6 for name, (_, count) in found.items()},
        "operations": {name: launches for name, (launches, _) in found.items()},
        "crossings": crossings.crossings,
    }


def both_gradients(**sizes: Any) -> list[dict[str, Any]]:
    """`gradients` by the kernels and by torch's operations."""
    return [gradients(dense=False, **sizes), gradients(dense=True, **sizes)]


# -----------------------------------------------------------------------------
# In the interpreter


def ids_of(kind: str, tokens: int, rows: int) -> Tensor:
    """Ids by Zipf's law, all the same, all different, or of runs that end at, before and after a piece's."""
    random = torch.Generator().manual_seed(0)
    if kind == "zipf":
        weights = 1 / (torch.arange(rows) + 2.7)
        return torch.multinomial(weights, tokens, replacement=True, generator=random)
    if kind == "runs":
        runs = [(3, 32), (9, 33), (2, 63), (8, 1), (7, 65)]
        ids = torch.cat([torch.full((count,), id) for id, count in runs])
        return ids[torch.randperm(len(ids), generator=random)]
    return (
        torch.full((tokens,), rows - 1) if kind == "same" else torch.randperm(rows, generator=random)[:tokens]
    )


def numbers(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`sums` of several cases in one process."""
    from nanochat.model import table_kernel

    # So that few tokens make several pieces of an id, and several pieces a program.
    table_kernel.PROGRAMS, table_kernel.PIECE = 8, 32
    return [sums(**case) for case in cases]


def sums(kind: str, tokens: int, rows: int, width: int, dtype: str) -> dict[str, Any]:
    """Gathered rows and added gradients beside float64.

    Returns:
        "rows": largest relative error of a row. "error": largest of a sum, in units of the fp32 sum of the
        magnitudes. "again": whether a second pass gives the same bits. "ready": calls of the hook.
    """
    number, random = getattr(torch, dtype), torch.Generator().manual_seed(1)
    ids = ids_of(kind, tokens, rows)[None]
    table = nn.Parameter(torch.randn(rows, width, generator=random))
    calls: list[bool] = []
    table.grad_ready = lambda p: calls.append(p is table and p.grad is not None)  # type: ignore[attr-defined]
    grad = torch.randn(1, ids.numel(), width, generator=random).to(number)
    found, order = [], RowOrder.of(ids)
    for shared in (order, order, None):
        table.grad = None
        for _ in range(2 if shared is None else 1):  # the last adds two micro-batches
            got = TableRows.apply(table, ids, shared, number)
            got.backward(grad)
        assert table.grad is not None
        found.append(table.grad.clone())
    exact = torch.zeros(rows, width, dtype=torch.float64).index_add_(0, ids[0], grad[0].double())
    size = torch.ones(rows, width, dtype=torch.float64).index_add_(0, ids[0], grad[0].double().abs())
    want = F.embedding(ids, table.detach())
    return {
        "rows": ((got.detach().float() - want).abs() / want.abs().clamp(min=1e-3)).max().item(),
        "error": ((found[0].double() - exact).abs() / size).max().item(),
        "twice": ((found[2].double() - 2 * exact).abs() / size).max().item(),
        "again": torch.equal(found[0], found[1]),
        "ready": calls,
    }
