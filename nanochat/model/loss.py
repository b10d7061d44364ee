"""Fused linear head, softcap and cross-entropy: the logits of a batch never exist together.

They would be the largest tensor of a step, forward and backward: 32,768 numbers a token.

Legend: N tokens, C model width, V vocabulary (V' >= V with padding rows), R rows of a chunk.

The softcap and its derivative are written with a sigmoid. With s = sigmoid(2 z / cap),

    cap tanh(z / cap) = 2 cap s - cap        and        d/dz cap tanh(z / cap) = 4 s (1 - s),

and the softmax ignores the constant, so softmax(2 cap s) are the probabilities. On a CPU (2 cores, AVX512,
per 8,192 tokens of V = 32,768) a sigmoid takes 0.055 s where tanh takes 0.34 s, and the fused softmax 0.08 s
where exp and sum take 0.17 s; that is why it is written this way. A probability is never below exp(-2 cap) /
V, so -log(p) is safe.

On a GPU that Triton compiles for, the elementwise part is one kernel (loss_kernel.py), which takes 6 bytes a
logit in bf16 where the operations above take 60.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat.model import kernels
from nanochat.model.fp8 import E4M3, E5M2, Fp8Weight, quantize
from nanochat.model.fp8 import product as scaled_product

Reduction = Literal["mean", "sum", "none"]
IGNORED = -1  # the target that does not count

# Elements of logits held at a time: in the compute dtype for the matrix products (a chunk), and in fp32 for
# the elementwise part (a tile of the chunk). On a CPU tiles should stay in cache: per 8,192 tokens of
# V = 32,768 the elementwise part takes 0.18 to 0.20 s with tiles of 2^19 to 2^21, and 0.29 s with 2^23. The
# kernel of a GPU needs no tile, so that chunks are twice as large there in the same memory: each chunk reads
# and writes the gradient of the whole head once.
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}

# Factor on the derivatives by the logits while fp16 holds them: most are near 1 / (4 V), and fp16 has its
# full precision from 6e-5 up. A larger one risks that a sum over the rows of a chunk passes 65,504.
FP16_BOOST = 32.0


def softcapped_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    *,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    cast: Tensor | None = None,
    eighth: Fp8Weight | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats of softcap * tanh(x @ weight.T / softcap) against the targets.

    Where gradients are wanted they are computed in the same pass over the chunks: products in the dtype of x,
    softcap and softmax in fp32, the gradient of the weight summed in fp32.

    Args:
        x: (N, C) hidden states in the compute dtype.
        weight: (V', C) master weight of the head, which takes the gradient.
        targets: (N,) int64 token ids below vocab_size, or IGNORED.
        softcap: bound of the logits.
        vocab_size: V; rows of the weight from V on are padding and take no part. By default V'.
        reduction: "mean" over the targets that count (0 if there are none), "sum", or "none", which gives
            (N,) losses, zero where ignored, and no gradient.
        chunk_rows: rows whose logits are held at a time; by default chosen for the device.
        cast: (V', C) the weight in the dtype of x, where the caller has it; by default it is cast here.
        eighth: the weight in fp8: the logits and the gradient of x are then products in that, where gradients
            are wanted and the kernel runs. x must come from an RMS norm, which bounds it.
        weights: (N,) fp32 factors on the losses, of either sign, whose weighted sum is then returned in the
            place of "mean" or "sum". That of an ignored target is not read.

    Returns:
        fp32 scalar, or (N,) fp32 for reduction "none".
    """
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    vocab_size = weight.size(0) if vocab_size is None else vocab_size
    constants = (softcap, vocab_size, chunk_rows)
    if weights is not None:
        assert reduction != "none", "weights are for a sum"
        weights = weights.masked_fill(targets == IGNORED, 0)
    if wants_grad:
        assert reduction != "none", "per-token losses carry no gradient: call under torch.no_grad()"
        total: Tensor = _SummedLoss.apply(x, weight, targets, weights, cast, eighth, *constants)
    else:
        losses, _ = token_losses(x, weight, targets, *constants, with_argmax=False, cast=cast)
        if reduction == "none":
            return losses
        total = losses.sum() if weights is None else (losses * weights).sum()
    if reduction == "sum" or weights is not None:
        return total
    return total / (targets != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def token_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    with_argmax: bool = True,
    cast: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses token by token and whether each target is the most likely token; no gradients.

    Arguments as in softcapped_cross_entropy. Of equal logits the first is the most likely one.

    Returns:
        (N,) fp32 losses in nats, zero where ignored; (N,) bool, False where ignored, or everywhere without
        with_argmax.
    """
    vocab_size = weight.size(0) if vocab_size is None else vocab_size
    losses, valid = _new_losses(x), targets != IGNORED
    is_argmax = torch.zeros_like(valid)
    if fused := _is_fused(x):
        from nanochat.model.loss_kernel import softcapped_losses  # here: Triton is for GPUs
    head = _head(weight, cast, x.dtype, weight.size(0) if fused else vocab_size)
    safe = targets.clamp(0, vocab_size - 1)
    for rows in _spans(x.size(0), chunk_rows or _default_rows(CHUNK_ELEMENTS, x, head.size(0))):
        z = x[rows] @ head.t()
        if fused:
            hits = is_argmax[rows] if with_argmax else None
            softcapped_losses(z, targets[rows], losses[rows], hits, softcap, vocab_size, 1.0, False)
            continue
        if with_argmax:
            is_argmax[rows] = z.argmax(dim=-1) == safe[rows]
        _losses_of_chunk(z, safe[rows], softcap, losses[rows], with_grad=False)
    return losses * valid, is_argmax & valid


class _SummedLoss(torch.autograd.Function):
    """The sum of the losses, by weights if they are given; its gradients are ready when forward ends.

    A weight may be as small as one part in the tokens of a step. So rows are multiplied by their weight
    relative to the largest, which bf16, fp16 and fp8 hold as they hold no weight, and the largest goes on
    the gradients at the end.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        cast: Tensor | None,
        eighth: Fp8Weight | None,
        softcap: float,
        vocab_size: int,
        chunk_rows: int | None,
    ) -> Tensor:
        want_x, want_weight = ctx.needs_input_grad[:2]
        losses, factors, largest = _new_losses(x), targets != IGNORED, None
        if weights is not None:
            largest = weights.abs().amax().clamp(min=torch.finfo(weights.dtype).tiny)
            factors = weights / largest
        if fused := _is_fused(x):
            from nanochat.model.loss_kernel import softcapped_losses
        head = _head(weight, cast, x.dtype, weight.size(0) if fused else vocab_size)
        safe = targets.clamp(0, vocab_size - 1)
        # The kernel multiplies derivatives by their row's factor. Elsewhere x does, and its gradient.
        counted = x if fused or not want_weight else torch.mul(x, factors[:, None], out=torch.empty_like(x))
        grad_x = torch.empty_like(x) if want_x else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        product = None if grad_weight is None else _product_buffer(grad_weight, head)
        chunk = chunk_rows or _default_rows(CHUNK_ELEMENTS, x, head.size(0))
        most = min(chunk, x.size(0))
        products = _Fp8Products(x, head, most, eighth) if eighth and fused else _Products(x, head, most)
        for rows in _spans(x.size(0), chunk):
            z = products.logits(rows)
            if fused:
                constants = (None, softcap, vocab_size, _boost(x.dtype), True, products.narrow(rows))
                by_row = None if weights is None else factors[rows]
                softcapped_losses(z, targets[rows], losses[rows], *constants, by_row)
            else:
                _losses_of_chunk(z, safe[rows], softcap, losses[rows], with_grad=want_x or want_weight)
            if grad_x is not None:
                products.fill_grad_x(z, grad_x[rows])
            if grad_weight is not None:
                _add_product(grad_weight[: head.size(0)], z.t(), counted[rows], product)
            del z  # before the next chunk's are there
        if grad_x is not None and not fused:
            grad_x.mul_(factors[:, None])
        ctx.grads, ctx.boost, ctx.largest = (grad_x, grad_weight), _boost(x.dtype), largest
        total = (losses * factors).sum()
        return total if largest is None else total * largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        assert ctx.grads is not None, (
            "the gradients of this loss were given out already (backward called twice)"
        )
        (grad_x, grad_weight), ctx.grads = ctx.grads, None
        factor = 4 / ctx.boost * grad  # the 4 of 4 s (1 - s), left out of the pass over the logits
        if ctx.largest is not None:
            factor = (factor * ctx.largest)[None, None]  # of no dimensions, it would be rounded to bf16
        return (
            None if grad_x is None else grad_x.mul_(factor),
            None if grad_weight is None else grad_weight.mul_(factor),
            *(None,) * 7,
        )


class _Products:
    """The head's products with a chunk: its logits, and the gradient of x from the derivatives by them."""

    def __init__(self, x: Tensor, head: Tensor, most_rows: int) -> None:
        self.x, self.head = x, head
        self.buffer = self._buffer(most_rows)

    def _buffer(self, most_rows: int) -> Tensor:
        return self.x.new_empty(most_rows, self.head.size(0))

    def logits(self, rows: slice) -> Tensor:
        """(R, V') of x @ (V', C).T for the rows of a chunk."""
        return torch.mm(self.x[rows], self.head.t(), out=self.buffer[: rows.stop - rows.start])

    def narrow(self, rows: slice) -> Tensor | None:
        """Where the kernel writes the derivatives in fp8, if it does."""
        return None

    def fill_grad_x(self, z: Tensor, out: Tensor) -> None:
        """(R, V') derivatives @ (V', C), into out."""
        torch.mm(z, self.head, out=out)


class _Fp8Products(_Products):
    """The same two products in fp8, at twice the rate.

    The third, for the gradient of the weight, stays in bf16: in fp8 it would need the derivatives transposed
    and a pass over the fp32 gradient a chunk, which takes the time that it wins.
    """

    def __init__(self, x: Tensor, head: Tensor, most_rows: int, weight: Fp8Weight) -> None:
        from nanochat.model.loss_kernel import NARROW_BOOST

        super().__init__(x, head, most_rows)
        self.weight, bound = weight, math.sqrt(x.size(1))
        self.x_scale = torch.full((), bound / torch.finfo(E4M3).max, device=x.device)
        self.x8 = quantize(x, self.x_scale, E4M3)
        self.z_scale = torch.full((), _boost(x.dtype) / NARROW_BOOST, device=x.device)

    def _buffer(self, most_rows: int) -> Tensor:
        return torch.empty(most_rows, self.head.size(0), dtype=E5M2, device=self.x.device)

    def logits(self, rows: slice) -> Tensor:
        weight = self.weight
        return scaled_product(self.x8[rows], self.x_scale, weight.rows, weight.scale, self.x.dtype, fast=True)

    def narrow(self, rows: slice) -> Tensor | None:
        return self.buffer[: rows.stop - rows.start]

    def fill_grad_x(self, z: Tensor, out: Tensor) -> None:
        factors = self.buffer[: z.size(0)], self.z_scale, self.weight.columns, self.weight.scale
        out.copy_(scaled_product(*factors, out.dtype, fast=False))


def _is_fused(x: Tensor) -> bool:
    """Whether the elementwise part is the kernel's."""
    return kernels.run_on(x.device) and x.dtype.itemsize <= 4


def _head(weight: Tensor, cast: Tensor | None, dtype: torch.dtype, rows: int) -> Tensor:
    """The first rows of the weight in the dtype of the products.

    The kernel takes those of padding too, whose number suits the tensor cores and loads of 128 bits: V may be
    50,257. Their logits count for nothing and their derivatives are zero.
    """
    return weight[:rows].to(dtype) if cast is None else cast[:rows]


def _product_buffer(total: Tensor, head: Tensor) -> Tensor | None:
    """Room for a product that `_add_product` cannot add to the total while it is computed."""
    return None if total.is_cuda or total.dtype == head.dtype else torch.empty_like(head)


def _add_product(total: Tensor, a: Tensor, b: Tensor, product: Tensor | None) -> None:
    """Add a @ b to the total, in which a GPU keeps it from the first partial sum on."""
    if product is not None:
        total += torch.mm(a, b, out=product)
    elif total.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _losses_of_chunk(z: Tensor, targets: Tensor, softcap: float, losses: Tensor, with_grad: bool) -> None:
    """Fill the losses (R,) of the logits z (R, V), which are before the softcap.

    with_grad, z turns into (d loss / d z) / 4, times _boost, in place.
    """
    tile = _default_rows(TILE_ELEMENTS, z, z.size(1))
    wide = torch.promote_types(z.dtype, torch.float32)
    s_buffer = z.new_empty(min(tile, z.size(0)), z.size(1), dtype=wide)
    p_buffer = torch.empty_like(s_buffer)
    for rows in _spans(z.size(0), tile):
        s, p = s_buffer[: rows.stop - rows.start], p_buffer[: rows.stop - rows.start]
        s.copy_(z[rows]).mul_(2 / softcap).sigmoid_()
        torch.mul(s, 2 * softcap, out=p)
        torch.softmax(p, dim=-1, out=p)
        target = targets[rows, None]
        torch.neg(p.gather(1, target).log_()[:, 0], out=losses[rows])
        if with_grad:
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            torch.ops.aten.sigmoid_backward.grad_input(p, s, grad_input=p)  # p s (1 - s) in one pass
            if (boost := _boost(z.dtype)) != 1:
                p.mul_(boost)
            z[rows] = p


def _boost(dtype: torch.dtype) -> float:
    return FP16_BOOST if dtype == torch.float16 else 1.0


def _new_losses(x: Tensor) -> Tensor:
    return x.new_empty(x.size(0), dtype=torch.promote_types(x.dtype, torch.float32))


def _default_rows(elements: dict[str, int], like: Tensor, columns: int) -> int:
    """Rows of `columns` elements that fit the budget of the device of `like`."""
    return max(1, elements.get(like.device.type, elements["cuda"]) // columns)


def _spans(n: int, step: int) -> list[slice]:
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]
