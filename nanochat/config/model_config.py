"""Shape and constants of a model, and the parameters and FLOPs that follow. Pure: it needs no torch.

They are in every checkpoint, so that a model is computed as it was trained whatever a recipe says by then.
Formulas: docs/recipe.md (RECIPE 1.1 and 1.5).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from nanochat.common.flags import planned

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class AttentionKind:
    """One entry of ATTENTION_KINDS: what a variant of attention needs, and the module that computes it.

    Attributes:
        module: "module:class" that combines the attention maps of a head, made as class(config, layer); empty
            where the one map of a head is used as it is.
        maps: attention maps of a head, each with queries of its own.
        qk_divisor: queries and keys have the width of a head over this.
        vectors: learned vectors a layer of the width of a query, updated as the group "share".
        head_gates: whether a layer has a matrix of one row a head, (H, C), among its matrices.
    """

    module: str = ""
    maps: int = 1
    qk_divisor: int = 1
    vectors: int = 0
    head_gates: bool = False


DIFFERENTIAL = "nanochat.model.differential_attention"
ATTENTION_KINDS = {
    "softmax": AttentionKind(),
    "diff1": AttentionKind(f"{DIFFERENTIAL}:Diff1", maps=2, qk_divisor=2, vectors=4),
    "diff2": AttentionKind(f"{DIFFERENTIAL}:Diff2", maps=2, head_gates=True),
}


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Flags that are fields of a model as they stand: a command line and a checkpoint both have them."""

    window_pattern: str = planned(
        "SSSL", "attention window of each layer, tiled: S is a quarter of T, L is T; the last layer has T"
    )
    attention_kind: str = planned(
        "softmax",
        "attention variant: softmax, or Differential Transformer v1 (diff1) or v2 (diff2)",
        choices=tuple(ATTENTION_KINDS),
    )
    bigram: bool = planned(
        False, "add an embedding of each pair of neighbouring tokens, hashed, to the input of every layer"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConstants:
    """Constants of a model's mathematics and of its initial weights. Defaults are those of nanochat-2026-07.

    A recipe holds those that a new model gets, and `GPTConfig` holds a model's own: a checkpoint is computed
    with the constants that it was trained with, whatever a recipe says by then.

    Attributes:
        document_mask: attention stays within documents.
        rope_base: base of the rotary frequencies.
        softcap: bound of the logits.
        qk_scale: factor on queries and on keys after their norm.
        short_window_divisor: a short window is the context over this, raised to `window_multiple`.
        window_multiple: windows shorter than the context are raised to a multiple of this.
        value_gate_channels: channels of the attention input that a value gate reads, at most.
        value_gate_scale: factor on the gate of value embeddings.
        value_gate_init: value gates begin uniform from 0 to this.
        smear_gate_channels: channels of the embedding that the smear gate reads, at most.
        smear_gate_init: the smear gate begins uniform from 0 to this.
        embedding_std: standard deviation of the initial token embedding.
        head_std: standard deviation of the initial output head.
        mlp_in_scale: factor on the initial first matrix of every MLP.
        resid_first: resid_scale of the first layer at the start.
        resid_last: resid_scale of the last layer at the start; linear between.
        x0_first: x0_scale of the first layer at the start.
        x0_last: x0_scale of the last layer at the start; linear between.
        backout_init: backout_scale at the start.
        bigram_scale_init: bigram_scale of every layer at the start.
        share_vectors_std: standard deviation of the initial vectors of diff1 attention.
        head_norm_eps: added to the mean square in the norm of diff1 attention's heads.
    """

    document_mask: bool = False
    rope_base: float = 100_000.0
    softcap: float = 15.0
    qk_scale: float = 1.2
    short_window_divisor: int = 4
    window_multiple: int = 128
    value_gate_channels: int = 12
    value_gate_scale: float = 3.0
    value_gate_init: float = 0.02
    smear_gate_channels: int = 24
    smear_gate_init: float = 0.02
    embedding_std: float = 0.8
    head_std: float = 0.001
    mlp_in_scale: float = 0.4
    resid_first: float = 1.15
    resid_last: float = 1.05
    x0_first: float = 0.20
    x0_last: float = 0.05
    backout_init: float = 0.2
    bigram_scale_init: float = 0.05
    share_vectors_std: float = 0.1
    head_norm_eps: float = 1e-5


MODEL_FLAGS = tuple(item.name for item in dataclasses.fields(ModelFlags))
MODEL_CONSTANTS = tuple(item.name for item in dataclasses.fields(ModelConstants))


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n.

    >>> round_up(770, 128)
    896
    """
    return -(-n // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelFlags, ModelConstants):
    """Shape and constants of a model (RECIPE 1.1, 1.2, 2.4).

    Its mathematics and its initial weights take all of their constants from here; the name of the recipe only
    says where the values came from.

    Attributes:
        n_layer: number of blocks.
        n_embd: model width C.
        n_head: query heads.
        n_kv_head: key and value heads; divides n_head.
        head_dim: width D of a head, even.
        vocab_size: entries of the tokenizer.
        sequence_len: context length T.
        recipe: name of the set of constants that filled this.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    sequence_len: int
    recipe: str = "nanochat-2026-07"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the tables: the vocabulary, raised to a multiple of 64."""
        return round_up(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def kind(self) -> AttentionKind:
        """What the attention variant needs."""
        return ATTENTION_KINDS[self.attention_kind]

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key."""
        return self.head_dim // self.kind.qk_divisor

    @property
    def windows(self) -> tuple[int, ...]:
        """How many earlier tokens each layer sees beside the current one."""
        full = self.sequence_len
        short = min(full, round_up(-(-full // self.short_window_divisor), self.window_multiple))
        kinds = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return tuple(short if kind == "S" else full for kind in kinds)

    def windows_at(self, fraction: float) -> tuple[int, ...]:
        """The windows where each layer has this fraction of its own, raised to a multiple of 128."""
        multiple = self.window_multiple
        return tuple(min(full, round_up(math.ceil(full * fraction), multiple)) for full in self.windows)

    @property
    def bigram_rows(self) -> int:
        """Rows of the table of pairs, which share them by a hash: five times the vocabulary's (RECIPE 3)."""
        return 5 * self.padded_vocab_size if self.bigram else 0

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer owns a value table, the last one included."""
        return layer % 2 == (self.n_layer - 1) % 2

    @property
    def value_gate_width(self) -> int:
        """Channels of the attention input that the value gate reads."""
        return min(self.value_gate_channels, self.n_embd)

    @property
    def smear_gate_width(self) -> int:
        """Channels of the embedding that the smear gate reads (RECIPE 2.4)."""
        return min(self.smear_gate_channels, self.n_embd)


@dataclass(frozen=True)
class ParamCounts:
    """Parameters by kind, padded rows included; the table of pairs is one of the value tables."""

    matrix: int
    unembedding: int
    embedding: int
    value_embedding: int
    scalars: int

    @property
    def scaling(self) -> int:
        """The N of the scaling rules: block matrices and output head."""
        return self.matrix + self.unembedding

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrix + self.unembedding + self.embedding + self.value_embedding + self.scalars


def count_params(c: GPTConfig) -> ParamCounts:
    """Parameters of a model, without building it."""
    queries, out, keys = c.n_head * c.kind.maps * c.qk_dim, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    attention = c.n_embd * (queries + out + 2 * keys + c.kind.head_gates * c.n_head)
    mlp = 2 * c.n_embd * 4 * c.n_embd
    value_layers = sum(c.has_value_embedding(i) for i in range(c.n_layer))
    table = c.padded_vocab_size * c.n_embd
    return ParamCounts(
        matrix=c.n_layer * (attention + mlp) + value_layers * c.n_kv_head * c.value_gate_width,
        unembedding=table,
        embedding=table,
        value_embedding=value_layers * c.padded_vocab_size * keys + c.bigram_rows * c.n_embd,
        scalars=c.n_layer * (2 + c.bigram + c.kind.vectors * c.qk_dim) + c.smear_gate_width + 2,
    )


def flops_per_token(c: GPTConfig) -> float:
    """Training FLOPs a token (RECIPE 1.5): 6 a matmul weight, 12 C min(window, T) a layer for attention.

    Of the 12 C, 6 are for scores and 6 for values: diff1 takes the second twice (RECIPE 5.2), diff2 both.
    """
    width = c.n_head * c.kind.maps * (c.qk_dim + c.head_dim)
    attention = sum(6 * width * min(window, c.sequence_len) for window in c.windows)
    return 6 * count_params(c).scaling + attention
