"""Causal sliding-window attention: one function over four backends.

The kernels differ in what they take (layouts, masks, widths); everything above sees one signature.

Legend: B rows, Tq query positions, Tk key positions (Tk >= Tq), H query heads, Hkv key/value heads, D head
width, Dv that of values (Dv >= D). Query i stands at absolute position p = Tk - Tq + i and sees the keys j
with p - window <= j <= p, so a window of 0 is the position itself, and Tq < Tk is decoding behind a cache. H
is a multiple of Hkv; head h reads K/V head h // (H / Hkv). With documents, a query sees the keys of its own
document only.

Backends: "fa3" (flash_attn_interface, Hopper), "fa2" (flash_attn, Ampere and later), "flex" (PyTorch
FlexAttention with a block mask, any CUDA GPU), "sdpa" (PyTorch; see `nanochat.model.sdpa_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.sdpa_attention import sdpa

BACKENDS = ("fa3", "fa2", "flex", "sdpa")
# Room for documents where a flash package counts them: one in so many tokens of a batch. Their number is not
# known without waiting for the device, and more than fit stop the run.
MIN_TOKENS_A_DOCUMENT = 8


@dataclass(frozen=True)
class Layout:
    """What all layers of a forward pass know of the rows; the default is one document a row.

    Attributes:
        documents: (B, T) int32, number of the document of each position within its row.
        boundaries: (K + 1,) int32, for the flash packages: where documents begin in the B x T positions laid
            end to end, then B x T for the rest.
        block_masks: for flex, the mask of each window.
    """

    documents: Tensor | None = None
    boundaries: Tensor | None = None
    block_masks: dict[int, Any] = field(default_factory=dict)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    backend: str,
    scale: float | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Causal attention over the last `window` positions and the position itself.

    Args:
        q: (B, Tq, H, D) queries, at the last Tq of the Tk positions.
        k: (B, Tk, Hkv, D) keys.
        v: (B, Tk, Hkv, Dv) values.
        window: how many previous positions a query sees besides its own; Tk - 1 or more is full attention.
        backend: one of BACKENDS, as chosen by `nanochat.model.attention_backends`.
        scale: factor on the scores before the softmax; by default D ** -0.5.
        layout: what layout_of gave for these rows and this backend; documents need Tq = Tk.

    Returns:
        (B, Tq, H, Dv) in the dtype of q.
    """
    assert k.size(1) >= q.size(1)
    assert v.size(-1) >= q.size(-1)
    assert q.size(2) % k.size(2) == 0
    assert window >= 0
    layout = layout or Layout()
    assert layout.documents is None or q.size(1) == k.size(1), "documents behind a cache"
    if backend == "flex":
        return _flex(q, k, v, window, scale, layout)
    if wider := v.size(-1) - q.size(-1):
        # The other kernels take one width. Zeros add nothing to a score; cutting the values into parts of
        # width D costs as many multiplications, and twice the exponentials.
        scale = q.size(-1) ** -0.5 if scale is None else scale
        q, k = F.pad(q, (0, wider)), F.pad(k, (0, wider))
    if backend == "sdpa":
        return sdpa(q, k, v, window, scale, layout.documents)
    assert backend in ("fa3", "fa2"), backend
    return _flash(backend, q, k, v, window, scale, layout.boundaries)


def layout_of(begins: Tensor, backend: str, windows: Sequence[int]) -> Layout:
    """The layout of rows of several documents, without waiting for the device.

    Args:
        begins: (B, T) bool, True where a document begins; the first position of a row begins one in any case.
        backend: one of BACKENDS.
        windows: of the layers.
    """
    begins = begins.clone()
    begins[:, 0] = True
    documents = begins.cumsum(dim=1, dtype=torch.int32)
    if backend == "flex":
        masks = {window: _document_block_mask(documents, window) for window in set(windows)}
        return Layout(documents, block_masks=masks)
    if backend == "sdpa":
        return Layout(documents)
    places = -(-begins.numel() // MIN_TOKENS_A_DOCUMENT)
    torch._assert_async(
        begins.sum() <= places, f"documents of under {MIN_TOKENS_A_DOCUMENT} tokens on average"
    )
    starts = torch.nonzero_static(begins.flatten(), size=places + 1, fill_value=begins.numel())
    return Layout(documents, boundaries=starts[:, 0].to(torch.int32))


def block_masks(backend: str, t: int, windows: Sequence[int], device: torch.device) -> dict[int, Any]:
    """For flex, the mask of each window for T queries and keys; for others nothing.

    Made ahead, so that no compiled pass makes them again.
    """
    if backend != "flex" or device.type == "meta":
        return {}
    return {window: _block_mask(t, t, window, device) for window in set(windows)}


# ----------------------------------------------------------------------------------------------------
# flex and flash


@lru_cache(maxsize=32)
def _block_mask(tq: int, tk: int, window: int, device: torch.device) -> Any:
    """FlexAttention's block-sparse form of band_mask, made once a shape."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = i + (tk - tq)
        return (j <= position) & (j >= position - window)

    with torch.inference_mode(False):
        return create_block_mask(visible, None, None, tq, tk, device=str(device))


def _document_block_mask(documents: Tensor, window: int) -> Any:
    """The same within documents (B, T): of each batch anew, in one compiled kernel where there is one."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - window) & (documents[b, i] == documents[b, j])

    b, t = documents.shape
    return _compiled(create_block_mask, documents.device)(
        visible, b, None, t, t, device=str(documents.device)
    )


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """FlexAttention is block-sparse only when compiled; on a CPU, where it is for tests, it stays plain."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return function
    return _compiled_once(function)


@lru_cache(maxsize=2)
def _compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, layout: Layout) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    mask = layout.block_masks.get(window)
    if mask is None:
        mask = _block_mask(q.size(1), k.size(1), window, q.device)
    attend = _compiled(flex_attention, q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


def _flash(
    backend: str, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, boundaries: Tensor | None
) -> Tensor:
    """Both packages align the causal mask at the bottom right and take (left, right), -1 for no limit."""
    if backend == "fa3":
        import flash_attn_interface as flash
    else:
        import flash_attn as flash
    left = window if window < k.size(1) - 1 else -1
    if boundaries is None:
        out = flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(left, 0))
    else:
        out = flash.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=boundaries,
            cu_seqlens_k=boundaries.clone(),  # Dynamo takes no tensor twice as arguments of a Function
            max_seqlen_q=q.size(1),
            max_seqlen_k=k.size(1),
            softmax_scale=scale,
            causal=True,
            window_size=(left, 0),
        )
    result: Tensor = out[0] if isinstance(out, tuple) else out  # early fa3 releases return (out, logsumexp)
    return result.view_as(q)
