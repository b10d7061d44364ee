"""Every constant of training, in sets: RECIPE part 2 (July 2026, the default), part 1 (January 2026), part 3.

What is structure rather than a constant (smear, backout, row equilibration, the Frobenius rescaling) is the
same in all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

REFERENCE_DEPTH = 12
REFERENCE_WIDTH = 768
REFERENCE_BATCH_TOKENS = 2**19


@dataclass(frozen=True)
class GroupRecipe:
    """Base hyperparameters of a kind of parameter, tuned at depth 12.

    Attributes:
        lr: learning rate at width 768 and batches of 2^19 tokens.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        scales_with_width: lr is multiplied by (width / 768)^-1/2.
        scales_with_batch: lr is multiplied by (batch / 2^19)^1/2.
    """

    lr: float
    beta1: float = 0.8
    beta2: float = 0.95
    weight_decay: float = 0.0
    scales_with_width: bool = False
    scales_with_batch: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConstants:
    """Constants of a model's mathematics and of its initial weights. Defaults are July's.

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


MODEL_CONSTANTS = tuple(item.name for item in dataclasses.fields(ModelConstants))


@dataclass(frozen=True, kw_only=True)
class Recipe(ModelConstants):
    """A complete set of constants: those of the model, and those of its training. Defaults are July's."""

    # Horizon and batch (RECIPE 2.2)
    target_param_data_ratio: float = 12.0
    batch_exponent: float = 0.383  # Power Lines, arXiv 2505.13738
    weight_decay_follows: str = "horizon"  # or "depth": 0.2 (12 / n)^2
    batch_tokens: int | None = None  # instead of the rule, where the number is the recipe's
    # Stages, each from a share of the steps on (RECIPE 3.3): parts of the batch, shares of the windows
    batch_stages: tuple[tuple[float, int], ...] = ()
    window_stages: tuple[tuple[float, float], ...] = ()
    # Groups (RECIPE 2.4); Muon's beta1 is its momentum, which the schedule moves
    matrix: GroupRecipe = GroupRecipe(lr=0.02, beta1=0.97, beta2=0.90, weight_decay=0.28)
    # The same matrices under other optimizers. A Muon step changes an element by 0.02 / sqrt(768) = 7e-4 at
    # width 768, an Adam step by about a quarter of its learning rate; RECIPE 4.3 has 0.0018 to 0.003.
    matrix_soap: GroupRecipe = GroupRecipe(
        lr=0.003, beta1=0.95, beta2=0.95, weight_decay=0.1, scales_with_width=True
    )
    matrix_adamw: GroupRecipe = GroupRecipe(
        lr=0.003, beta1=0.9, beta2=0.95, weight_decay=0.1, scales_with_width=True
    )
    unembedding: GroupRecipe = GroupRecipe(lr=0.008, beta2=0.96, weight_decay=0.01, scales_with_width=True)
    embedding: GroupRecipe = GroupRecipe(lr=0.3, beta2=0.995, weight_decay=0.001, scales_with_width=True)
    value_embedding: GroupRecipe = GroupRecipe(
        lr=0.15, beta2=0.995, weight_decay=0.01, scales_with_width=True
    )
    resid: GroupRecipe = GroupRecipe(lr=0.005, weight_decay=0.05)
    x0: GroupRecipe = GroupRecipe(lr=0.5, beta1=0.96)
    smear: GroupRecipe = GroupRecipe(lr=0.2, scales_with_batch=False)
    share: GroupRecipe = GroupRecipe(lr=0.005)  # of differential attention: resid's, for want of a better
    # Muon
    polar_norm_factor: float = 1.01
    # Schedules
    warmup_steps: int = 40
    warmup_share: float = 0.1  # of a short run at most (dev/LOG.md, 2026-11-21)
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_warmup_steps: int = 400
    momentum_final: float = 0.90
    weight_decay_shape: str = "cosine"  # or "linear"

    def model_constants(self) -> dict[str, Any]:
        """The constants that a new model gets, by name."""
        return {name: getattr(self, name) for name in MODEL_CONSTANTS}

    def matrix_group(self, optimizer: str) -> GroupRecipe:
        """The group of the block matrices under an optimizer: "muon", "soap" or "adamw"."""
        return {"muon": self.matrix, "soap": self.matrix_soap, "adamw": self.matrix_adamw}[optimizer]


JULY = Recipe()

JANUARY = Recipe(
    target_param_data_ratio=10.5,
    batch_exponent=0.0,
    weight_decay_follows="depth",
    matrix=GroupRecipe(lr=0.02, beta1=0.95, beta2=0.95, weight_decay=0.2),
    unembedding=GroupRecipe(lr=0.004, scales_with_width=True),
    embedding=GroupRecipe(lr=0.3, scales_with_width=True),
    value_embedding=GroupRecipe(lr=0.3, scales_with_width=True),
    resid=GroupRecipe(lr=0.005),
    polar_norm_factor=1.02,
    warmup_steps=0,
    warmdown_ratio=0.5,
    final_lr_frac=0.0,
    momentum_peak=0.95,
    momentum_warmup_steps=300,
    momentum_final=0.95,
    weight_decay_shape="linear",
    rope_base=10_000.0,
    qk_scale=1.0,
    short_window_divisor=2,
    value_gate_channels=32,
    value_gate_scale=2.0,
    value_gate_init=0.0,
    embedding_std=1.0,
    mlp_in_scale=1.0,
    resid_first=1.0,
    resid_last=1.0,
    x0_first=0.1,
    x0_last=0.1,
)

# The race to a validation loss of 3.28 on FineWeb in the shape of GPT-2 small, which is depth 12: 85 M
# weights in the blocks and 39 M in the head are the "124 M" of that race; tables of embeddings are beside
# them. Batch, windows, warmdown and momentum are those of RECIPE 3.3; rates are July's, which were tuned at
# this depth. The horizon is a guess between 0.98e9 tokens (record 12, document masks) and 0.57e9 (record 46,
# a batch that grows): no run has tuned it. The last stage has all of the windows, so that a finished model
# is like any other.
SPEEDRUN_124M = dataclasses.replace(
    JULY,
    target_param_data_ratio=6.5,
    batch_tokens=393_216,
    batch_stages=((0.0, 1), (1 / 3, 2), (2 / 3, 3)),
    window_stages=((0.0, 0.25), (1 / 3, 0.5), (2 / 3, 1.0)),
    warmdown_ratio=0.60,
    final_lr_frac=0.15,
    momentum_peak=0.95,
    momentum_warmup_steps=300,
    document_mask=True,
)

RECIPES = {"july": JULY, "january": JANUARY, "speedrun-124m": SPEEDRUN_124M}
