"""Recipes: named sets of every constant of a model and its training (docs/recipe.md; RECIPE parts 1 to 4).

A recipe is named after the state of karpathy/nanochat whose mathematics it has, so that a result says what it
is a result of. Structure that is no constant (smear, backout, row equilibration) is the same in all recipes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nanochat.config.model_config import MODEL_CONSTANTS, ModelConstants

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


@dataclass(frozen=True)
class MatrixOptimizer:
    """One entry of MATRIX_OPTIMIZERS: a rule for block matrices and its base hyperparameters.

    Attributes:
        rule: "module:class", made as class(like, group, dtype, options); see optim/rates.py.
        group: hyperparameters, where they are not the recipe's own `matrix`.
    """

    rule: str
    group: GroupRecipe | None = None


# A Muon step changes an element by 0.02 / sqrt(768) = 7e-4 at width 768, an Adam step by about a quarter of
# its learning rate; RECIPE 4.3 has 0.0018 to 0.003.
MATRIX_OPTIMIZERS = {
    "muon": MatrixOptimizer("nanochat.optim.muon:Muon"),
    "soap": MatrixOptimizer(
        "nanochat.optim.soap:Soap", GroupRecipe(0.003, 0.95, 0.95, weight_decay=0.1, scales_with_width=True)
    ),
    "adamw": MatrixOptimizer(
        "nanochat.optim.adamw:AdamW", GroupRecipe(0.003, 0.9, 0.95, weight_decay=0.1, scales_with_width=True)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(ModelConstants):
    """Constants of a model and of its training. Defaults are those of nanochat-2026-07."""

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
        """The group of the block matrices under one of MATRIX_OPTIMIZERS."""
        return MATRIX_OPTIMIZERS[optimizer].group or self.matrix


NANOCHAT_2026_07 = Recipe()

NANOCHAT_2026_01 = Recipe(
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
# weights in the blocks and 39 M in the head are the "124 M" of that race; embeddings are not counted. Batch,
# windows, warmdown and momentum are those of RECIPE 3.3; rates are those of nanochat-2026-07, tuned at this
# depth. The horizon is a guess between 0.98e9 tokens (record 12, document masks) and 0.57e9 (record 46,
# a batch that grows): no run has tuned it. The last stage has all of the windows, so that a finished model
# is like any other.
SPEEDRUN_124M = dataclasses.replace(
    NANOCHAT_2026_07,
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

RECIPES = {
    "nanochat-2026-07": NANOCHAT_2026_07,
    "nanochat-2026-01": NANOCHAT_2026_01,
    "speedrun-124m": SPEEDRUN_124M,
}
OLD_NAMES = {"july": "nanochat-2026-07", "january": "nanochat-2026-01"}  # before 0.2


def current_name(name: Any) -> Any:
    """The name that a recipe has today, of the one that it had; whatever is no old name is left as it is."""
    return OLD_NAMES.get(name, name) if isinstance(name, str) else name
