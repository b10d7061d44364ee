"""GPT: a decoder-only transformer with per-layer residual scalars, value embeddings, smear and backout.

Only mathematics (docs/recipe.md; RECIPE 1.1, 1.2, 2.4): training, saving and sampling are elsewhere. Legend:
B rows, T positions, C model width, H query heads, Hkv key/value heads, D head width, V vocabulary. Master
weights are fp32; activations and matrix products have the compute dtype.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.common.machine import Precision
from nanochat.config.model_config import GPTConfig
from nanochat.model.attention import (
    TOKENS_A_CONVERSATION,
    TOKENS_A_DOCUMENT,
    Layout,
    attention,
    block_masks,
    layout_of,
)
from nanochat.model.decode_cache import DecodeCache
from nanochat.model.layers import (
    Embedding,
    Linear,
    Spec,
    constant,
    norm,
    normal,
    pair_rows,
    parameter,
    ramp,
    rotate,
    uniform,
    uniform_of_width,
)
from nanochat.model.loss import Reduction, softcapped_cross_entropy, token_losses
from nanochat.model.mlp import mlp
from nanochat.model.table_rows import order_of

# Of the forward pass in one process: windows that grow, with gradients and without, rows that are halved.
# Past torch's own limit of 8 everything would run uncompiled, and only a warning would say so.
MOST_GRAPHS = 64


@dataclass(frozen=True)
class Rows:
    """What the tables hold for the tokens of a batch, in the compute dtype.

    They are looked up before the passes that a compiler makes, so that their gradients come one table at a
    time, and go to the rows of a table that the batch has.

    Attributes:
        tokens: (B, T, C) embeddings.
        before: (B, T, C) those of the tokens before, behind a cache; zeros before the very first.
        pairs: (B, T, C) embeddings of each token with the one before it, if the model has them.
        values: (B, T, Hkv * D) value embeddings, by layer.
    """

    tokens: Tensor
    before: Tensor | None
    pairs: Tensor | None
    values: dict[int, Tensor]


@dataclass(frozen=True)
class Shared:
    """What all layers of a forward pass over T positions share.

    Attributes:
        cos: (T, 1, D/2), of the rotary angles; (B, T, 1, D/2) where rows stand at different positions.
        sin: likewise.
        windows: of attention, one a layer.
        layout: the documents of the rows, for attention.
        cache: earlier positions, if any.
        rows: of the tables.
    """

    cos: Tensor
    sin: Tensor
    windows: tuple[int, ...]
    layout: Layout
    cache: DecodeCache | None
    rows: Rows


class Attention(nn.Module):
    """Causal attention with rotary positions, normed queries and keys, and gated value embeddings.

    Under differential attention a head has two maps; the keys of both fill a head's place in a cache.
    """

    def __init__(self, config: GPTConfig, layer: int, precision: Precision) -> None:
        """Build layer `layer` (from 0)."""
        super().__init__()
        self.layer = layer
        self.backend = precision.attention
        self.kv_heads, self.head_dim, self.qk_dim = config.n_kv_head, config.head_dim, config.qk_dim
        # Queries and keys are both multiplied by qk_scale after their norm: its square goes on the scores.
        self.scale = config.qk_scale**2 * config.qk_dim**-0.5
        self.gate_channels, self.gate_scale = config.value_gate_width, config.value_gate_scale
        width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
        init, zero, fp8 = uniform_of_width(width), constant(0.0), precision.fp8
        self.q = Linear(width, config.n_head * config.kind.maps * config.qk_dim, init, fp8=fp8, normed=True)
        self.k = Linear(width, kv_width, init, fp8=fp8, normed=True)
        self.v = Linear(width, kv_width, init, fp8=fp8, normed=True)
        self.out = Linear(config.n_head * config.head_dim, width, zero, fp8=fp8)
        gate = uniform(0.0, config.value_gate_init)
        has_gate = config.has_value_embedding(layer)
        self.value_gate = Linear(self.gate_channels, config.n_kv_head, gate) if has_gate else None
        kind = config.kind.module
        self.differential: nn.Module | None = pkgutil.resolve_name(kind)(config, layer) if kind else None

    def forward(self, x: Tensor, value: Tensor | None, shared: Shared) -> Tensor:
        """(B, T, C) normed stream, (B, T, Hkv * D) value embedding or None -> (B, T, C)."""
        q, k = (matrix(x).unflatten(-1, (-1, self.qk_dim)) for matrix in (self.q, self.k))
        v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.value_gate is not None and value is not None:
            gate = self.gate_scale * torch.sigmoid(self.value_gate(x[..., : self.gate_channels]))
            v = v + gate[..., None] * value.view_as(v)
        q, k = (norm(rotate(y, shared.cos, shared.sin)) for y in (q, k))
        if shared.cache is not None:
            k, v = shared.cache.append(self.layer, k.reshape(v.shape), v)
            q = q.to(k.dtype)  # a cache may hold a wider one than the model computes in
            k = torch.unflatten(k.flatten(-2), -1, (-1, self.qk_dim))
        window, layout = shared.windows[self.layer], shared.layout
        attend = partial(attention, window=window, backend=self.backend, scale=self.scale, layout=layout)
        y = attend(q, k, v) if self.differential is None else self.differential(x, q, k, v, attend)
        return self.out(y.flatten(-2).to(x.dtype))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """C -> 4 C -> C with relu squared between."""

    def __init__(self, config: GPTConfig, fp8: bool) -> None:
        """Build both matrices."""
        super().__init__()
        width = config.n_embd
        self.up = Linear(width, 4 * width, uniform_of_width(width, config.mlp_in_scale), fp8=fp8)
        self.down = Linear(4 * width, width, constant(0.0), fp8=fp8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        weights = self.up.working(x.dtype), self.down.working(x.dtype)
        return mlp(x, *weights, self.up.in_fp8(), self.down.in_fp8())


class Block(nn.Module):
    """Attention and MLP, each added to the stream after its norm."""

    def __init__(self, config: GPTConfig, layer: int, precision: Precision) -> None:
        """Build layer `layer` (from 0)."""
        super().__init__()
        self.attn = Attention(config, layer, precision)
        self.mlp = MLP(config, precision.fp8)

    def forward(self, x: Tensor, value: Tensor | None, shared: Shared, recompute_mlp: bool) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(norm(x), value, shared)
        return _recomputed(self._add_mlp, x) if recompute_mlp else self._add_mlp(x)

    def _add_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(norm(x))  # type: ignore[no-any-return]


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), of which only the arguments are kept for the backward pass."""
    # Nothing in a forward pass is random, so no generator's state is kept either.
    out: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return out


class GPT(nn.Module):
    """The whole model. Its parameters hold nothing until init_weights or a checkpoint fills them.

    Attributes:
        recompute: what a backward pass computes again instead of keeping it: "none", "mlp" (of every block)
            or "block" (all but the stream between blocks). May be changed between passes.
        decode_weights: what a decode step on a CPU stores matrices in: "auto" (the compute dtype) or "int8".
        document_bos: the id with which documents begin, if attention is to stay within them.
        isolates_documents: whether smear and pairs stay within them, too, so that a document is read as if it
            were alone. Pretraining lets both reach from a BOS to the token before it, as nanochat does. With
            the backends in attention.PACKED a row of T tokens may have T // TOKENS_A_CONVERSATION documents.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, precision: Precision, document_bos: int | None = None) -> None:
        """Build the shape of a model, on the meta device too.

        Args:
            config: shape and constants.
            precision: compute dtype and the name of the attention backend.
            document_bos: the id with which documents begin, if attention is to stay within them.
        """
        super().__init__()
        self.config = config
        self.dtype = precision.compute_dtype
        self.recompute, self.decode_weights = "none", "auto"
        self.document_bos, self.isolates_documents = document_bos, False
        self.windows = config.windows
        self.backend = precision.attention
        self.block_masks: dict[int, Any] = {}
        self._compiled: tuple[torch.Size, Callable[[Tensor, Rows], Tensor]] | None = None
        c, rows, width, dtype = config, config.padded_vocab_size, config.n_embd, self.dtype
        self.embed = Embedding(rows, width, dtype, "embedding", normal(c.embedding_std))
        self.smear_gate = Linear(c.smear_gate_width, 1, uniform(0.0, c.smear_gate_init), "smear")
        self.smear_scale = parameter(kind="smear", init=constant(0.0))
        self.backout_scale = parameter(kind="smear", init=constant(c.backout_init))
        self.resid_scale = parameter(c.n_layer, kind="resid", init=ramp(c.resid_first, c.resid_last))
        self.x0_scale = parameter(c.n_layer, kind="x0", init=ramp(c.x0_first, c.x0_last))
        self.bigram, self.bigram_scale = None, None
        if c.bigram:
            self.bigram = Embedding(c.bigram_rows, width, dtype, "value_embedding", constant(0.0))
            self.bigram_scale = parameter(c.n_layer, kind="resid", init=constant(c.bigram_scale_init))
        layers = range(c.n_layer)
        self.blocks = nn.ModuleList(Block(config, layer, precision) for layer in layers)
        kv_width, init = c.n_kv_head * c.head_dim, uniform_of_width(width)
        tables = {
            str(layer): Embedding(rows, kv_width, dtype, "value_embedding", init)
            for layer in layers
            if c.has_value_embedding(layer)
        }
        self.value_embeds = nn.ModuleDict(tables)
        self.head = Linear(
            width, rows, normal(c.head_std), "unembedding", fp8=precision.fp8_head, normed=True
        )
        self.linears = [module for module in self.modules() if isinstance(module, Linear)]
        self.specs: dict[str, Spec] = {name: p.spec for name, p in self.named_parameters()}  # type: ignore[attr-defined]
        self.reserve_positions(c.sequence_len)

    def reserve_positions(self, count: int) -> None:
        """Make the rotary tables for `count` positions, (count, 1, D/2); a cache may need more than T.

        D is the width of queries and keys. The masks of backends that want them ahead are made too, for T.
        """
        half = self.config.qk_dim // 2
        device = self.embed.weight.device
        frequency = torch.arange(half, dtype=torch.float32, device=device).div_(-half)
        frequency = self.config.rope_base**frequency
        position = torch.arange(count, dtype=torch.float32, device=device)
        angle = torch.outer(position, frequency)[:, None, :]
        self.register_buffer("cos", angle.cos().to(self.dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(self.dtype), persistent=False)
        self.block_masks = block_masks(self.backend, self.config.sequence_len, self.windows, device)

    def use_windows(self, windows: tuple[int, ...]) -> None:
        """Let layer i see windows[i] earlier tokens from here on. Each set of windows is compiled once."""
        if windows != self.windows:
            self.windows = windows
            device, length = self.embed.weight.device, self.config.sequence_len
            self.block_masks = block_masks(self.backend, length, windows, device)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter (RECIPE 1.2, 2.4) and table.

        Each parameter has a generator of its own, seeded by (seed, name): its values depend on its name, its
        shape and the kind of device, not on the order, the other parameters or the number of ranks.
        """
        for name, p in self.named_parameters():
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(p.device).manual_seed(int.from_bytes(digest[:8], "little"))
            self.specs[name].init(p.detach(), generator)
        self.reserve_positions(self.cos.size(0))

    def forward(self, ids: Tensor, cache: DecodeCache | None = None) -> Tensor:
        """(B, T) int64 token ids -> (B, T, C) hidden states after the final norm.

        Args:
            ids: token ids below vocab_size.
            cache: earlier positions, if any; the new ones are added to it.
        """
        return self._blocks_pass(ids, self._lookup(ids, cache), cache)

    def _lookup(self, ids: Tensor, cache: DecodeCache | None = None) -> Rows:
        """The rows of the tables; pairs reach over a BOS where smear does."""
        before = None if cache is None else cache.shift_ids(ids)
        earlier = None if before is None else self.embed(before.clamp(min=0)) * (before >= 0)[..., None]
        pairs = None
        if self.bigram is not None:
            before = F.pad(ids[:, :-1], (1, 0), value=-1) if before is None else before
            if (starts := self._isolated_starts(ids, cache)) is not None:
                before = before.masked_fill(starts, -1)
            pairs = self.bigram(pair_rows(ids, before, self.config.bigram_rows))
        order = order_of(ids)
        values = {int(layer): table(ids, order) for layer, table in self.value_embeds.items()}
        return Rows(self.embed(ids, order), earlier, pairs, values)

    def _blocks_pass(self, ids: Tensor, rows: Rows, cache: DecodeCache | None = None) -> Tensor:
        """Everything between the tables and the head: (B, T, C)."""
        count = ids.size(1)
        cos, sin = self._rotary(count, cache)
        shared = Shared(cos, sin, self.windows, self._layout(ids, cache), cache, rows)
        x = norm(rows.tokens)
        before = F.pad(x[:, :-1], (0, 0, 1, 0)) if rows.before is None else norm(rows.before)
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_gate_width]))
        if (starts := self._isolated_starts(ids, cache)) is not None:
            gate = gate.masked_fill(starts[..., None], 0)
        x = x0 = x + self.smear_scale * gate * before
        middle = x
        whole_layers = self.recompute == "block" and cache is None and torch.is_grad_enabled()
        for i in range(self.config.n_layer):
            args = (i, x, x0, shared)
            x = _recomputed(self._layer, *args) if whole_layers else self._layer(*args)
            if i == self.config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.advance(count)
        return norm(x - self.backout_scale * middle)

    def _rotary(self, count: int, cache: DecodeCache | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `count` new positions, as in `Shared`."""
        start = 0 if cache is None else cache.length
        assert start + count <= self.cos.size(0), "reserve_positions was not called for this length"
        if cache is None or cache.lengths is None:
            return self.cos[start : start + count], self.sin[start : start + count]
        positions = cache.lengths[:, None] + torch.arange(count, device=cache.lengths.device)
        return self.cos[positions], self.sin[positions]

    def _isolated_starts(self, ids: Tensor, cache: DecodeCache | None) -> Tensor | None:
        """(B, T) bool: where the token before is none of this document; None where that is not asked."""
        if self.isolates_documents and self.document_bos is not None and cache is None:
            return ids == self.document_bos
        return None

    def _layout(self, ids: Tensor, cache: DecodeCache | None) -> Layout:
        """Where documents begin; a prompt behind a cache is one document, whatever is in it."""
        if self.document_bos is not None and cache is None:
            length = TOKENS_A_CONVERSATION if self.isolates_documents else TOKENS_A_DOCUMENT
            return layout_of(ids == self.document_bos, self.backend, self.windows, length)
        if cache is not None and cache.lengths is not None:
            return Layout(lengths=cache.lengths + ids.size(1))
        return Layout(block_masks=self.block_masks if ids.size(1) == self.config.sequence_len else {})

    def _layer(self, i: int, x: Tensor, x0: Tensor, shared: Shared) -> Tensor:
        """Layer i with its residual scalars and its value embedding: (B, T, C) -> (B, T, C)."""
        mixed = self.resid_scale[i] * x + self.x0_scale[i] * x0
        if self.bigram_scale is not None and shared.rows.pairs is not None:
            mixed = mixed + self.bigram_scale[i] * shared.rows.pairs
        recompute_mlp = self.recompute == "mlp" and shared.cache is None and torch.is_grad_enabled()
        return self.blocks[i](mixed, shared.rows.values.get(i), shared, recompute_mlp)  # type: ignore[no-any-return]

    @property
    def is_compiled(self) -> bool:
        """Whether compile_for was called."""
        return self._compiled is not None

    def compile_for(self, rows: int) -> None:
        """Let torch.compile make the blocks' pass of `loss` for batches of (rows, sequence_len).

        Batches of another shape, and what goes behind a cache, run as they are, so that nothing is compiled
        again later. Tables and the loss itself stay outside: their kernels are fused already, and the loss's
        loop over chunks would be unrolled into the graph.
        """
        import torch._dynamo  # here: who does not compile need not wait for it

        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        for layer in self.linears:
            layer.is_refreshed = True
        shape = torch.Size((rows, self.config.sequence_len))
        self._compiled = shape, torch.compile(self._blocks_pass, dynamic=False)

    def _hidden(self, ids: Tensor) -> Tensor:
        if self._compiled is not None and ids.shape == self._compiled[0]:
            for layer in self.linears:
                layer.refresh(self.dtype)
            return self._compiled[1](ids, self._lookup(ids))
        hidden: Tensor = self(ids)
        return hidden

    def hold_gradients(self, holds: bool) -> None:
        """Whether linear layers keep the gradients of the next micro-batch, to add them with those after it.

        The last micro-batch of a step must not be held.
        """
        for layer in self.linears:
            layer.holds = holds

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, also those that are held."""
        super().zero_grad(set_to_none)
        for layer in self.linears:
            layer.drop_gradients()

    def loss(
        self, ids: Tensor, targets: Tensor, reduction: Reduction = "mean", weights: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy in nats; by weights, the one loss of pretraining, finetuning and RL.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64, -1 where it does not count.
            reduction: "mean" over the targets that count, "sum", or "none" for (B, T) losses without
                gradient.
            weights: (B, T) fp32 factors on the losses, of either sign, whose weighted sum is returned in the
                place of "mean" or "sum". That of a target of -1 is not read.

        Returns:
            fp32 scalar, or (B, T) fp32.
        """
        c, head, hidden = self.config, self.head, self._hidden(ids).flatten(0, 1)
        loss = softcapped_cross_entropy(
            hidden,
            head.weight,
            targets.flatten(),
            c.softcap,
            vocab_size=c.vocab_size,
            reduction=reduction,
            cast=head.working(hidden.dtype).detach(),
            eighth=head.in_fp8(),
            weights=None if weights is None else weights.flatten(),
        )
        return loss.view_as(targets) if reduction == "none" else loss

    @torch.no_grad()
    def token_losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) losses in nats, 0 where the target is -1; (B, T) bool, target is the likeliest token."""
        c, head, hidden = self.config, self.head, self(ids).flatten(0, 1)
        cast = head.working(hidden.dtype)
        losses, is_argmax = token_losses(
            hidden, head.weight, targets.flatten(), c.softcap, c.vocab_size, cast=cast
        )
        return losses.view_as(targets), is_argmax.view_as(targets)

    def logits(self, ids: Tensor, cache: DecodeCache | None = None, last_only: bool = False) -> Tensor:
        """Softcapped logits, (B, T, V) fp32, or (B, 1, V) with last_only; V without padding rows."""
        hidden = self(ids, cache)
        if last_only:
            hidden = hidden[:, -1:]
        softcap = self.config.softcap
        z = F.linear(hidden, self.head.working(hidden.dtype)[: self.config.vocab_size]).float()
        return softcap * torch.tanh(z / softcap)

    def parameter_kinds(self) -> dict[str, str]:
        """Optimizer group of each parameter: a key of `Plan.groups`."""
        return {name: spec.kind for name, spec in self.specs.items()}
