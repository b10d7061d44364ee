"""What a resumed run may change: nothing, unless the metadata of a flag or of a field says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import resume
from nanochat.checkpoint.compatibility import EARLY_FLAGS
from nanochat.common.errors import UserError
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan

FIXED = {"corpus", "keep_tails", "seed", "soap_every", "soap_sides", "dtype", "grad_reduce_dtype", "fp8"} | {
    "fp8_head"
}
FREE = (
    {"run", "tokenizer", "target_loss", "device_batch_size", "on_nonfinite", "device_type", "attention"}
    | {"compile", "profile", "recompute", "dist_timeout", "eval_every", "eval_tokens", "core_metric_every"}
    | {"core_metric_max_per_task", "eval_bundle", "sample_every", "save_every", "save_minutes", "keep_last"}
    | {"keep_every", "resume", "extend", "check_ranks_every", "wandb", "dry_run"}
)
# Another value of each flag that acts through the plan alone.
PLANNED: dict[str, Any] = {
    "depth": 5,
    "max_seq_len": 512,
    "window_pattern": "L",
    "aspect_ratio": 96,
    "head_dim": 64,
    "attention_kind": "diff2",
    "bigram": True,
    "document_mask": True,
    "num_iterations": 77,
    "target_flops": 1e15,
    "target_param_data_ratio": 7.0,
    "recipe": "nanochat-2026-01",
    "total_batch_size": 2**15,
    "matrix_optimizer": "adamw",
    "matrix_lr": 0.5,
    "embedding_lr": 0.5,
    "unembedding_lr": 0.5,
    "scalar_lr": 0.7,
    "weight_decay": 0.5,
    "warmup_steps": 3,
    "warmdown_ratio": 0.2,
    "final_lr_frac": 0.3,
}
ARGS = TrainArgs(depth=4, max_seq_len=256, dtype="float32")
HASHES = {"corpus": "c", "tokenizer": "t"}


def compare(then: Plan, now: Plan, **changes: Any) -> list[str]:
    """The differences that a resume lets through; `changes` are those of the plan on the disk."""
    meta = {"plan": json.loads(json.dumps(then.to_dict())) | changes, "fingerprints": HASHES}
    return resume.require_same_run(meta, now, HASHES, Path("step_000001"))


def plan(**changes: Any) -> Plan:
    return planning.plan(dataclasses.replace(ARGS, **changes), 512)


def test_every_flag_is_thought_about() -> None:
    """A new flag is fixed until it is put into one of the three sets, here and where it is declared."""
    kinds = {item.name: item.metadata.get("resume", "fixed") for item in dataclasses.fields(TrainArgs)}
    wanted = dict.fromkeys(FIXED, "fixed") | dict.fromkeys(FREE, "free") | dict.fromkeys(PLANNED, "planned")
    assert kinds == wanted


@pytest.mark.parametrize("name", PLANNED)
def test_a_flag_that_acts_through_the_plan_is_refused_there(name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be resumed.* then, .* now"):
        compare(plan(), plan(**{name: PLANNED[name]}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("corpus", "x"), ("keep_tails", True), ("seed", 1), ("soap_every", 5), ("soap_sides", 1)]
    + [("dtype", "bfloat16"), ("fp8", True), ("grad_reduce_dtype", "bfloat16")],
)
def test_a_fixed_flag_is_refused_by_its_name(name: str, value: Any) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"{flag}: {getattr(plan().args, name)!r} then, {value!r} now"):
        compare(plan(), plan(**{name: value}))


def test_the_head_in_fp8_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match="--fp8-head: False then, True now"):
        compare(plan(fp8=True), plan(fp8=True, fp8_head=True))


def test_a_flag_that_nobody_classified_is_refused() -> None:
    args = dataclasses.asdict(ARGS) | {"dropout": 0.1}  # of a later version
    with pytest.raises(UserError, match=r"--dropout: 0\.1 then, 'nothing' now"):
        compare(plan(), plan(), args=args)


def test_free_flags_world_size_and_micro_batch_may_change() -> None:
    changes: dict[str, Any] = {
        "run": "x",
        "save_every": 3,
        "keep_last": 9,
        "wandb": "offline",
        "compile": "on",
    }
    now = planning.plan(
        dataclasses.replace(ARGS, device_batch_size=2, on_nonfinite="skip", eval_tokens=1, **changes), 512, 2
    )
    assert compare(plan(), now) == []


def test_the_same_plan_from_other_flags_is_the_same_run() -> None:
    derived = plan()
    said = plan(num_iterations=derived.steps, total_batch_size=derived.batch_tokens, matrix_lr=0.02)
    assert compare(derived, said) == []


@pytest.mark.parametrize("field", ["batch_tokens", "batch_rows", "lanes", "steps", "polar_norm_factor"])
def test_a_field_of_the_plan_is_compared(field: str) -> None:
    with pytest.raises(UserError, match=rf"{field}: 3 then, "):
        compare(plan(), plan(), **{field: 3})


def test_extend_lets_the_horizon_through_and_nothing_else() -> None:
    found = compare(plan(num_iterations=50), plan(num_iterations=99, extend=True))
    assert any(text.startswith("steps: 50 then, 99 now") for text in found)
    with pytest.raises(UserError, match="--extend"):
        compare(plan(num_iterations=50), plan(num_iterations=99))
    with pytest.raises(UserError, match=r"schedule\.final_lr_frac: .*Give the same arguments"):
        compare(plan(num_iterations=50), plan(num_iterations=99, extend=True, final_lr_frac=0.5))
    with pytest.raises(UserError, match=r"groups\.embedding\.lr"):
        compare(plan(num_iterations=50), plan(num_iterations=99, extend=True, embedding_lr=0.9))


def test_a_checkpoint_that_lacks_a_flag_had_what_its_version_did() -> None:
    args = {name: value for name, value in dataclasses.asdict(ARGS).items() if name not in EARLY_FLAGS}
    del args["scalar_lr"]
    assert compare(plan(), plan(), args=args) == []
    with pytest.raises(UserError, match="--soap-every: 10 then, 5 now"):
        compare(plan(), plan(soap_every=5), args=args)


def test_a_retired_flag_that_did_nothing_is_passed_over_and_another_value_refused() -> None:
    args = dataclasses.asdict(plan().args)
    assert compare(plan(), plan(), args=args | {"z_loss": 0.0}) == []
    refused = r"--z-loss: 0\.0001 then, 'nothing' now.*no --z-loss: finish the run with the one that began it"
    with pytest.raises(UserError, match=refused):
        compare(plan(), plan(), args=args | {"z_loss": 1e-4})


def test_an_early_checkpoint_does_not_say_what_auto_was() -> None:
    args = dataclasses.asdict(plan().args) | {"dtype": "auto"}
    assert compare(plan(), plan(), args=args) == []


def test_the_value_embeddings_of_an_early_run_stayed_where_they_were() -> None:
    then = plan(embedding_lr=0.6)
    args = dataclasses.asdict(then.args)
    del args["scalar_lr"]
    groups = dataclasses.asdict(then)["groups"]
    groups["value_embedding"]["lr"] = plan().groups["value_embedding"].lr
    with pytest.raises(UserError, match=r"value_embedding\.lr.*finish the run with that version"):
        compare(then, then, args=args, groups=groups)
