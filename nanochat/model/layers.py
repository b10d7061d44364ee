"""Layers: linear, embedding, RMS norm, rotary positions; a parameter and its initial values.

A parameter says where it is made which optimizer group it belongs to and how it is initialized, so that a new
one is declared in one place. Legend: B rows, T positions, H heads, D head width. Master weights are fp32.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model import fp8 as eight
from nanochat.model import kernels
from nanochat.model.table_rows import RowOrder, lookup

# The framework's default where it computes in fp32; named, so that all dtypes, devices and versions agree.
NORM_EPS = torch.finfo(torch.float32).eps


Init = Callable[[Tensor, torch.Generator], Tensor]  # fills a parameter in place


@dataclass(frozen=True)
class Spec:
    """Optimizer group of a parameter (a key of `Plan.groups`), and its initial values."""

    kind: str
    init: Init


def parameter(*shape: int, kind: str, init: Init) -> nn.Parameter:
    """A learned fp32 tensor, not filled yet; `GPT.init_weights` or a checkpoint does that."""
    made = nn.Parameter(torch.empty(shape))
    made.spec = Spec(kind, init)  # type: ignore[attr-defined]
    return made


def constant(value: float) -> Init:
    """One value everywhere."""
    return lambda p, generator: p.fill_(value)


def uniform(low: float, high: float) -> Init:
    """Uniform from low to high."""
    return lambda p, generator: p.uniform_(low, high, generator=generator)


def uniform_of_width(width: int, scale: float = 1.0) -> Init:
    """Uniform with standard deviation scale / sqrt(width)."""
    bound = scale * math.sqrt(3 / width)
    return uniform(-bound, bound)


def normal(std: float) -> Init:
    """Normal around zero."""
    return lambda p, generator: p.normal_(0, std, generator=generator)


def ramp(first: float, last: float) -> Init:
    """Linear from the first layer to the last."""
    return lambda p, generator: p.copy_(torch.linspace(first, last, len(p)))


class Linear(nn.Module):
    """Linear layer without bias: (..., in) -> (..., out). Products read a copy of the fp32 master weight.

    The copy has the dtype of the input and is made again when the master has changed: once a step, and not
    once a micro-batch. It is a leaf, whose gradient is added to that of the master, in fp32. With fp8 the
    products are in that while training, if both sides are wide enough; evaluation is not in fp8.

    Attributes:
        fp8: whether training computes the products in fp8.
        holds: keep the gradient of a micro-batch in the compute dtype, and add it with that of the next:
            two passes over the master's gradient become one.
        is_refreshed: whether a compiled pass reads the copy, since somebody calls `refresh` before each.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init: Init,
        kind: str = "matrix",
        fp8: bool = False,
        normed: bool = False,
    ) -> None:
        """Declare the weight (out, in). Inputs that are `normed` come from an RMS norm, which bounds them."""
        super().__init__()
        self.fp8 = fp8 and eight.fits(in_features, out_features)
        self._bound = math.sqrt(in_features) if normed else None
        self.weight = parameter(out_features, in_features, kind=kind, init=init)
        self.holds = self.is_refreshed = False
        self._held: Tensor | None = None
        self._copy: Tensor | None = None
        self._eighth: eight.Fp8Weight | None = None
        self._copied = (0, 0)  # the master that the copies are of, and its version

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.working(x.dtype)
        if (eighth := self.in_fp8()) is not None:
            return eight.linear(x, weight, eighth, self._bound)
        return F.linear(x, weight)

    def working(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in a dtype."""
        if torch.compiler.is_compiling():
            return self._copy if self.is_refreshed and self._copy is not None else self.weight.to(dtype)
        self.refresh(dtype)
        return self.weight if dtype == self.weight.dtype or self._copy is None else self._copy

    def in_fp8(self) -> eight.Fp8Weight | None:
        """The weight in fp8 where this pass computes in it; after `working`, which makes both."""
        if not self.fp8 or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling() and not self.is_refreshed:
            return eight.quantize_weight(self.weight)
        return self._eighth

    def refresh(self, dtype: torch.dtype) -> None:
        """Make the copies again if the master is another, or has changed, since they were made."""
        weight, copy = self.weight, self._copy
        if dtype == weight.dtype:
            return
        with torch.inference_mode(False), torch.no_grad():
            if copy is None or (copy.dtype, copy.device) != (dtype, weight.device):
                copy = torch.empty_like(weight, dtype=dtype).requires_grad_(weight.requires_grad)
                layer = weakref.ref(self)
                copy.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda leaf: layer()._add_grad(leaf)  # type: ignore[union-attr]
                )
                self._copy, self._copied = copy, (0, 0)
            if self._copied != (id(weight), weight._version):
                copy.copy_(weight)
                self._eighth = eight.quantize_weight(weight) if self.fp8 else None
                self._copied = (id(weight), weight._version)

    def _add_grad(self, leaf: Tensor) -> None:
        """Move the gradient of the copy to the master."""
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        if self.holds and self._held is None:
            self._held = grad
            return
        grads = [grad] if self._held is None else [self._held, grad]
        self._held = None
        add_gradients(self.weight, grads)

    def drop_gradients(self) -> None:
        """Forget what has not reached the master."""
        self._held = None
        if self._copy is not None:
            self._copy.grad = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer makes a copy of its own master."""
        return {**self.__dict__, "_copy": None, "_eighth": None, "_held": None}


def add_gradients(master: nn.Parameter, grads: list[Tensor]) -> None:
    """Add the gradients of one or two micro-batches to that of a master (out, in), in fp32.

    Afterwards whoever waits for it is called: `grad_ready` of the master, where it has that attribute.
    """
    if kernels.run_on(master.device):
        from nanochat.model import gradient_kernel  # here: Triton is on machines with CUDA only

        fresh = master.grad is None
        if fresh:
            master.grad = torch.empty_like(master)
        pair = [grad.contiguous() for grad in grads]
        gradient_kernel.add_gradients(master.grad, pair[0], pair[1] if len(pair) > 1 else None, fresh)
    else:
        if master.grad is None:
            master.grad = grads.pop(0).to(master.dtype)
        for grad in grads:
            master.grad.add_(grad)
    if ready := getattr(master, "grad_ready", None):
        ready(master)


class Embedding(nn.Module):
    """Embedding: one row a token, looked up in fp32 and cast to the compute dtype."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, kind: str, init: Init) -> None:
        """Declare the table (rows, width)."""
        super().__init__()
        self.weight = parameter(rows, width, kind=kind, init=init)
        self.dtype = dtype

    def forward(self, ids: Tensor, order: RowOrder | None = None) -> Tensor:
        """(B, T) int64, and their order if other tables share it -> (B, T, width)."""
        return lookup(self.weight, ids, order, self.dtype)


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (B, T, H, D): channel i turns with channel i + D/2, by minus the angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def pair_rows(ids: Tensor, before: Tensor, rows: int) -> Tensor:
    """Row of the table of pairs for each token and the one before it, (B, T) int64, by modded-nanogpt's hash.

    Args:
        ids: (B, T) int64.
        before: (B, T) int64, -1 where there is none.
        rows: of the table.
    """
    return ((36313 * ids) ^ (27191 * before)) % rows
