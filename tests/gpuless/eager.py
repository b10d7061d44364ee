"""Bytes that operators move outside compiled graphs, and the kernels that they launch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpuless.inductor import Watch

FREE = (
    "prim.",
    "aten.empty",
    "aten.new_empty",
    "aten._assert",
    "aten.detach",
    "aten.lift",
    "aten._unsafe_view",
)
FILLS = ("new_full", "new_zeros", "zeros_like", "ones_like", "full_like")
BY_ROW = ("embedding.", "gather", "index.", "index_select", "scatter", "index_put", "index_add")
# Of 32,768 tokens of FineWeb-edu under a vocabulary of 32,768: 5,970 to 7,151 in 20 stretches.
DISTINCT_IDS = 6_720 / 32_768
WRITES_ONLY = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_")


class Counter(TorchDispatchMode):
    """Counts, for every operator on the device, its launches and the bytes that it reads and writes.

    Attributes:
        watch: whose phase of the step they are filed under; by default none.
        found: [launches, bytes] by phase and operator.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        super().__init__()
        self.watch = watch or Watch()
        self.found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled under this mode, and what compiles them is not counted."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if not name.startswith(FREE) and not func.is_view and self._is_on_device(out, args):
            row = self.found[self.watch.phase, name]
            row[0] += 1
            row[1] += moved(func, name.removeprefix("aten."), args, kwargs or {}, out)
        return out

    def by_operator(self) -> dict[str, list[int]]:
        """[launches, bytes] of all phases by operator without overload, most bytes first."""
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for (_, name), row in self.found.items():
            total = sums[name.rpartition(".")[0]]
            total[:] = [a + b for a, b in zip(total, row, strict=True)]
        return dict(sorted(sums.items(), key=lambda item: -item[1][1]))

    @staticmethod
    def _is_on_device(out: Any, args: Any) -> bool:
        leaves = _pytree.tree_leaves((out, args))
        return any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda" for leaf in leaves)


def moved(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operator must read and write: each tensor once, of a table the rows in question."""
    if name.startswith(FILLS):
        return _bytes(out)
    if name.startswith(BY_ROW):
        return _moved_by_row(name, args, kwargs, out)
    if name.startswith("nanochat.gather_rows"):  # of the table a row a token
        table, ids, _ = args
        return _bytes((ids, out)) + out.numel() * table.element_size()
    if name.startswith("nanochat.add_rows"):  # the gradient of a table, of tokens, and their order
        table, rows, *order = args
        row_bytes = table.size(1) * table.element_size()
        return _bytes((rows, order)) + round(2 * DISTINCT_IDS * rows.size(0) * row_bytes)
    if name.startswith("nanochat.softcapped_losses"):  # with gradients, logits are read twice and written
        logits, with_grad = args[0], args[7]
        return _bytes(args[1:]) + (3 if with_grad else 1) * _bytes(logits)
    if name.startswith("nanochat.add_gradients"):  # a total that is fresh is written alone
        total, first, second, fresh = args
        return _bytes((first, second)) + (1 if fresh else 2) * _bytes(total)
    total, arguments = 0, func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    for argument in arguments:
        size = _bytes(given.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not (is_written and (argument.is_out or name.startswith(WRITES_ONLY)))
        total += size * (is_written + is_read)
    if all(returned.alias_info is None for returned in func._schema.returns):
        total += _bytes(out)
    return total


def _moved_by_row(name: str, args: Any, kwargs: Any, out: Any) -> int:
    tensors = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if name.startswith(("scatter", "index_put", "index_add")):
        return _bytes(tensors[1:]) + 2 * _bytes(tensors[-1:])
    return _bytes(tensors[1:]) + 2 * _bytes(out)


def _bytes(found: Any) -> int:
    """Bytes of the tensors in a structure; what is expanded is as small as its storage."""
    tensors = [t for t in _pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
