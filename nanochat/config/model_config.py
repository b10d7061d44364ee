"""The shape and the constants of a model, and what follows from them: parameters and FLOPs. Pure: no torch.

Formulas: RECIPE 1.1 and 1.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanochat.config.recipes import ModelConstants

VOCAB_MULTIPLE = 64


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n.

    >>> round_up(770, 128)
    896
    """
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class GPTConfig(ModelConstants):
    """Shape and constants of a model (RECIPE 1.1, 1.2, 2.4).

    All that its mathematics and its initial weights take from a recipe is here, and in a checkpoint; the name
    of the recipe only says where the values came from.

    Attributes:
        n_layer: number of blocks.
        n_embd: model width C.
        n_head: query heads.
        n_kv_head: key and value heads; divides n_head.
        head_dim: width D of a head, even.
        vocab_size: entries of the tokenizer.
        sequence_len: context length T.
        window_pattern: S and L, tiled over layers; the last layer is always L.
        recipe: name of the set of constants that filled this.
        attention_kind: one of config.ATTENTION_KINDS.
        bigram: whether pairs of neighbouring tokens have a table.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    sequence_len: int
    window_pattern: str = "SSSL"
    recipe: str = "july"
    attention_kind: str = "softmax"
    bigram: bool = False

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the tables: the vocabulary, raised to a multiple of 64."""
        return round_up(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def n_map(self) -> int:
        """Attention maps of a layer, each with its own queries: two a head under differential attention."""
        return self.n_head if self.attention_kind == "softmax" else 2 * self.n_head

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key: under diff1 the two maps of a head share the width of the head."""
        return self.head_dim // 2 if self.attention_kind == "diff1" else self.head_dim

    @property
    def windows(self) -> tuple[int, ...]:
        """How many earlier tokens each layer sees beside the current one."""
        full = self.sequence_len
        short = min(full, round_up(-(-full // self.short_window_divisor), self.window_multiple))
        kinds = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return tuple(short if kind == "S" else full for kind in kinds)

    def windows_at(self, share: float) -> tuple[int, ...]:
        """The windows where layers have a share of their own, raised to a multiple of 128."""
        return tuple(min(own, round_up(math.ceil(own * share), self.window_multiple)) for own in self.windows)

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
    q_width, out_width, kv_width = c.n_map * c.qk_dim, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    value_layers = sum(c.has_value_embedding(i) for i in range(c.n_layer))
    shares = c.n_head if c.attention_kind == "diff2" else 0
    attention = c.n_embd * (q_width + out_width + 2 * kv_width + shares)
    share_vectors = 4 * c.qk_dim if c.attention_kind == "diff1" else 0
    mlp = 2 * c.n_embd * 4 * c.n_embd
    gates = value_layers * c.n_kv_head * c.value_gate_width
    table = c.padded_vocab_size * c.n_embd
    return ParamCounts(
        matrix=c.n_layer * (attention + mlp) + gates,
        unembedding=table,
        embedding=table,
        value_embedding=value_layers * c.padded_vocab_size * kv_width + c.bigram_rows * c.n_embd,
        scalars=c.n_layer * (2 + c.bigram + share_vectors) + c.smear_gate_width + 2,
    )


def flops_per_token(c: GPTConfig) -> float:
    """Training FLOPs a token (RECIPE 1.5): 6 a matmul weight, 12 C min(window, T) a layer for attention.

    Of the 12 C, 6 are for scores and 6 for values: diff1 takes the second twice (5.2), diff2 both.
    """
    width = c.n_map * (c.qk_dim + c.head_dim)
    attention = sum(6 * width * min(window, c.sequence_len) for window in c.windows)
    return 6 * count_params(c).scaling + attention
