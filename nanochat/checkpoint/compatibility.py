"""Plans of checkpoints made by earlier versions, completed with what those versions did. Pure.

A value here is history: it says how a checkpoint was trained, and changes with no recipe.
"""

from __future__ import annotations

from typing import Any

from nanochat.config.recipes import current_name

# Versions up to f4eb7ef (November 2026) wrote down the name of a recipe and none of its constants.
_JULY: dict[str, Any] = {
    "document_mask": False,
    "rope_base": 100_000.0,
    "softcap": 15.0,
    "qk_scale": 1.2,
    "short_window_divisor": 4,
    "window_multiple": 128,
    "value_gate_channels": 12,
    "value_gate_scale": 3.0,
    "value_gate_init": 0.02,
    "smear_gate_channels": 24,
    "smear_gate_init": 0.02,
    "embedding_std": 0.8,
    "head_std": 0.001,
    "mlp_in_scale": 0.4,
    "resid_first": 1.15,
    "resid_last": 1.05,
    "x0_first": 0.20,
    "x0_last": 0.05,
    "backout_init": 0.2,
    "bigram_scale_init": 0.05,
    "share_vectors_std": 0.1,
    "head_norm_eps": 1e-5,
}
_JANUARY = _JULY | {
    "rope_base": 10_000.0,
    "qk_scale": 1.0,
    "short_window_divisor": 2,
    "value_gate_channels": 32,
    "value_gate_scale": 2.0,
    "value_gate_init": 0.0,
    "embedding_std": 1.0,
    "mlp_in_scale": 1.0,
    "resid_first": 1.0,
    "resid_last": 1.0,
    "x0_first": 0.1,
    "x0_last": 0.1,
}
RECIPE_CONSTANTS = {"july": _JULY, "january": _JANUARY, "speedrun-124m": _JULY | {"document_mask": True}}
POLAR_NORM_FACTOR = {"july": 1.01, "january": 1.02, "speedrun-124m": 1.01}

# Flags and fields that came after the first checkpoints, with what was done before there was a choice.
EARLY_MODEL = {"window_pattern": "SSSL", "recipe": "july", "attention_kind": "softmax", "bigram": False}
EARLY_SCHEDULE: dict[str, Any] = {"batch_stages": [], "window_stages": []}
EARLY_FLAGS: dict[str, Any] = {
    "keep_tails": False,
    "fp8": False,
    "fp8_head": False,
    "soap_every": 10,
    "soap_sides": 2,
    "grad_reduce_dtype": "float32",
}

# Flags that this version has no more, with the value at which they did nothing: a run that had another is
# scored as any, and finished with the version that began it.
RETIRED_FLAGS = {"z_loss": 0.0}


def completed(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan of a checkpoint, as state.json holds it, with every field that its version left unsaid.

    Only absent fields are filled: whatever a checkpoint says of itself stands, but for retired flags that did
    nothing. A plan that is not of the right shape comes back as it is, for those who read it to refuse.
    """
    model, args, schedule = plan.get("model"), plan.get("args"), plan.get("schedule")
    if not isinstance(model, dict) or not isinstance(args, dict):
        return plan
    model = EARLY_MODEL | model
    args = EARLY_FLAGS | {k: v for k, v in args.items() if k not in RETIRED_FLAGS or v != RETIRED_FLAGS[k]}
    recipe = model["recipe"] if isinstance(model["recipe"], str) else ""
    constants = RECIPE_CONSTANTS.get(recipe, {})
    if constants and args.get("document_mask") is True:  # a flag of the run, then
        constants = constants | {"document_mask": True}
    for part in (model, args):
        if "recipe" in part:
            part["recipe"] = current_name(part["recipe"])
    out = {"finetune": None} | plan | {"model": constants | model, "args": args}
    if isinstance(schedule, dict):
        out["schedule"] = EARLY_SCHEDULE | schedule
    if recipe in POLAR_NORM_FACTOR:
        out.setdefault("polar_norm_factor", POLAR_NORM_FACTOR[recipe])
    return out
