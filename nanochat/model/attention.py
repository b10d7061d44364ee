"""Causal sliding-window attention: one function over five backends.

The kernels differ in what they take (layouts, masks, widths); everything above sees one signature.

Legend: B rows, Tq query positions, Tk key positions (Tk >= Tq), H query heads, Hkv key/value heads, D head
width, Dv that of values (Dv >= D). Query i stands at absolute position p = Tk - Tq + i and sees the keys j
with p - window <= j <= p, so a window of 0 is the position itself, and Tq < Tk is decoding behind a cache. H
is a multiple of Hkv; head h reads K/V head h // (H / Hkv). With documents, a query sees the keys of its own
document only. With lengths, a row has as many keys as its length says, and its queries are the last of those.

Backends: "fa3" (FlashAttention 3, Hopper), "fa2" (flash_attn, Ampere and later), "varlen" (PyTorch's flash
kernel for packed sequences, Ampere and later), "flex" (PyTorch FlexAttention with a block mask, any CUDA
GPU), "sdpa" (PyTorch; see `nanochat.model.sdpa_attention`). A call that the chosen one would compile anew, or
has no kernel for, is computed by sdpa: nothing is compiled for each shape that scoring or decoding meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.sdpa_attention import row_mask, sdpa, sdpa_of_rows

BACKENDS = ("fa3", "fa2", "varlen", "flex", "sdpa")
# Those that take the positions of a batch end to end, with the places where sequences begin.
PACKED = ("fa3", "fa2", "varlen")
# Slots for documents there, beside one for the start of each row: so many, and one more in so many tokens.
# The number of documents is not known without waiting for the device. An empty slot costs a program of the
# kernel and, in the backward pass, 64 to 128 rows of fp32 query gradients.
SPARE_DOCUMENTS = 64
TOKENS_A_DOCUMENT = 128
TOKENS_A_CONVERSATION = 16  # likewise of finetuning, whose documents are short and none may see another
WIDEST_HEAD = 256  # of a flash kernel; widths are multiples of 8
# Kernels that were downloaded at run time, by backend: modules with the interface of the installed package.
downloaded_kernels: dict[str, Any] = {}


@dataclass(frozen=True)
class Layout:
    """What all layers of a forward pass know of the rows; the default is one document a row.

    Attributes:
        documents: (B, T) int32, number of the document of each position within its row.
        boundaries: (K + 1,) int32, for the backends in PACKED: where documents begin in the B x T positions
            laid end to end, then B x T for the rest.
        block_masks: for flex, the mask of each window.
        lengths: (B,) int64, the keys of each row, behind a cache whose rows differ in that.
        row_masks: for sdpa, what that and each window make of it; filled by the first layer with the window.
    """

    documents: Tensor | None = None
    boundaries: Tensor | None = None
    block_masks: dict[int, Any] = field(default_factory=dict)
    lengths: Tensor | None = None
    row_masks: dict[int, Tensor] = field(default_factory=dict)


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
    backend = _backend_for(backend, q, k, v, window, layout)
    if backend == "flex":
        return _flex(q, k, v, window, scale, layout)
    if wider := v.size(-1) - q.size(-1):
        # The other kernels take one width. Zeros add nothing to a score; cutting the values into parts of
        # width D costs as many multiplications, and twice the exponentials.
        scale = q.size(-1) ** -0.5 if scale is None else scale
        q, k = F.pad(q, (0, wider)), F.pad(k, (0, wider))
    if layout.lengths is not None and backend == "sdpa":
        if window not in layout.row_masks:
            layout.row_masks[window] = row_mask(layout.lengths, q.size(1), k.size(1), window, q.dtype)
        return sdpa_of_rows(q, k, v, layout.row_masks[window], scale)
    if backend == "sdpa":
        return sdpa(q, k, v, window, scale, layout.documents)
    if backend == "varlen":
        return _varlen(q, k, v, window, scale, layout.boundaries)
    assert backend in ("fa3", "fa2"), backend
    return _flash(backend, q, k, v, window, scale, layout)


def _backend_for(backend: str, q: Tensor, k: Tensor, v: Tensor, window: int, layout: Layout) -> str:
    """The backend that computes one call: the chosen one, or sdpa where that has no kernel ready for it.

    FlexAttention outside of a compiled pass would be compiled for each shape, and after eight of them run
    without a kernel. Torch's kernel for packed sequences is worth its packing for windows and documents; rows
    that are seen whole have a dense kernel, cuDNN's on Hopper and Blackwell. How it aligns fewer queries than
    keys is not documented.
    """
    if layout.lengths is not None and backend not in ("fa3", "fa2"):
        return "sdpa"
    if backend == "flex" and q.device.type != "cpu" and not torch.compiler.is_compiling():
        return "sdpa"
    if backend in PACKED and (v.size(-1) > WIDEST_HEAD or v.size(-1) % 8):
        return "sdpa"
    whole = window >= k.size(1) - 1 and layout.boundaries is None
    if backend == "varlen" and (whole or q.size(1) < k.size(1)):
        return "sdpa"
    return backend


def layout_of(
    begins: Tensor, backend: str, windows: Sequence[int], tokens_a_document: int = TOKENS_A_DOCUMENT
) -> Layout:
    """The layout of rows of several documents, without waiting for the device.

    The backends in PACKED have a fixed number of slots (SPARE_DOCUMENTS). In a batch with more documents,
    each of those that come too late is taken as part of the one before it in its row, so its tokens see that
    too; rows never see each other. Documents of `tokens_a_document` on average all have their slots.

    Args:
        begins: (B, T) bool, True where a document begins; the first position of a row begins one in any case.
        backend: one of BACKENDS.
        windows: of the layers.
        tokens_a_document: so many tokens more have a slot more.
    """
    begins = begins.clone()
    begins[:, 0] = True
    if backend in PACKED:
        places = min(begins.numel(), begins.size(0) + SPARE_DOCUMENTS + begins.numel() // tokens_a_document)
        begins = _first_documents(begins, places)
        starts = torch.nonzero_static(begins.flatten(), size=places + 1, fill_value=begins.numel())
        return Layout(_numbered(begins), boundaries=starts[:, 0].to(torch.int32))
    documents = _numbered(begins)
    if backend == "flex" and (torch.compiler.is_compiling() or documents.device.type == "cpu"):
        masks = {window: _document_block_mask(documents, window) for window in set(windows)}
        return Layout(documents, block_masks=masks)
    return Layout(documents)


def _numbered(begins: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) int32: the number of each position's document within its row."""
    return begins.cumsum(dim=1, dtype=torch.int32)


def _first_documents(begins: Tensor, places: int) -> Tensor:
    """(B, T) bool with at most `places` True: all row starts and, in order, as many others as then fit."""
    others = begins.clone()
    others[:, 0] = False
    count = others.flatten().cumsum(0, dtype=torch.int32).view_as(begins)
    kept = others & (count <= places - begins.size(0))
    kept[:, 0] = True
    return kept


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
    """The same within documents (B, T), of each batch anew."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - window) & (documents[b, i] == documents[b, j])

    b, t = documents.shape
    return create_block_mask(visible, b, None, t, t, device=str(documents.device))


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, layout: Layout) -> Tensor:
    """Block-sparse inside a compiled pass; on a CPU, where it is for tests, the plain formula."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = layout.block_masks.get(window)
    if mask is None:
        mask = _block_mask(q.size(1), k.size(1), window, q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out: Any = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    result: Tensor = out.transpose(1, 2)
    return result


@lru_cache(maxsize=64)
def _kept_row_starts(rows: int, t: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _row_starts(rows, t, device)


def _row_starts(rows: int, t: int, device: torch.device) -> Tensor:
    """(rows + 1,) int32: 0, t, 2 t, ... rows x t."""
    return torch.arange(0, (rows + 1) * t, t, dtype=torch.int32, device=device)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, boundaries: Tensor | None
) -> Tensor:
    """Torch's flash kernel for packed sequences, Tq = Tk = T; rows without documents are a sequence each."""
    from torch.nn.attention.varlen import varlen_attn

    rows, t = q.size(0), q.size(1)
    if boundaries is None:
        make = _row_starts if torch.compiler.is_compiling() else _kept_row_starts
        boundaries = make(rows, t, q.device)
    out: Any = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        boundaries,
        # One tensor for both would let cuDNN take full attention, which made NaN of empty slots before 9.25.
        boundaries.clone(),
        t,
        t,
        scale=scale,
        window_size=(window if window < t - 1 else -1, 0),
        enable_gqa=q.size(2) != k.size(2),
    )
    result: Tensor = out.view_as(q)
    return result


def _flash(
    backend: str, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, layout: Layout
) -> Tensor:
    """Both packages align the causal mask at the bottom right and take (left, right), -1 for no limit."""
    if backend in downloaded_kernels:
        flash = downloaded_kernels[backend]
    elif backend == "fa3":
        import flash_attn_interface

        flash = flash_attn_interface
    else:
        import flash_attn

        flash = flash_attn
    left = window if window < k.size(1) - 1 else -1
    boundaries = layout.boundaries
    if layout.lengths is not None:
        lengths = layout.lengths.to(torch.int32)
        seen = {"cache_seqlens": lengths, "causal": True, "window_size": (left, 0)}
        out = flash.flash_attn_with_kvcache(q, k, v, softmax_scale=scale, **seen)
    elif boundaries is None:
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
