"""The roofline: its arithmetic, the projections of the first review, cards, and the table in the README."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dev.bench import roofline
from dev.bench.roofline import CARDS, FIRST_COUNT, Traffic, plan_for, project
from nanochat.common.errors import UserError
from nanochat.config.model_config import flops_per_token

H100 = CARDS["h100"]
# Milliseconds of a step of d24 on 8 H100, before anything was mended: the review of 2026-11.
REVIEW = {
    "bf16": {"blocks": 822, "head": 66, "attention": 120, "passes": 247, "loss": 95, "step": 1410},
    "fp8": {"blocks": 581, "head": 66, "attention": 120, "passes": 359, "loss": 95, "step": 1281},
}
REVIEW_BOTH = {"tables, sums of gradients": 18, "optimizer": 20, "collectives, not hidden": 22}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_first_count_gives_the_table_of_the_review(dtype: str) -> None:
    found = project(plan_for(24, 8, H100, fp8=dtype == "fp8"), H100, FIRST_COUNT[dtype])
    ms = {part: 1e3 * seconds for part, seconds in found.parts.items()}
    review = REVIEW[dtype]
    assert ms["products of the blocks"] == pytest.approx(review["blocks"], rel=0.01)
    assert ms["products of the head"] == pytest.approx(review["head"], rel=0.01)
    assert ms["attention"] == pytest.approx(review["attention"], rel=0.03)
    passes = ms["fused kernels of the blocks"] + ms["copies of weights"]
    assert passes == pytest.approx(review["passes"], rel=0.01)
    assert ms["loss"] == pytest.approx(review["loss"], rel=0.01)
    assert {part: ms[part] for part in REVIEW_BOTH} == pytest.approx(REVIEW_BOTH, rel=0.03)
    assert 1e3 * found.seconds == pytest.approx(review["step"], rel=0.02)


def test_the_examples_in_the_documentation() -> None:
    assert doctest.testmod(roofline).failed == 0


def test_a_run_follows_from_its_step() -> None:
    found = project(plan_for(24, 8, H100), H100, FIRST_COUNT["bf16"])
    assert found.tokens_per_s == pytest.approx(744_000, rel=0.02)
    assert found.mfu == pytest.approx(0.45, rel=0.02)
    assert found.hours == pytest.approx(3.3, rel=0.02)
    assert found.plan.steps * found.seconds / 3600 == pytest.approx(found.hours)


def test_flops_are_those_of_the_scaling_rules_but_for_attention() -> None:
    """Executed and nominal FLOPs of attention differ: causal tiles halve them, backward recomputes scores."""
    plan = plan_for(24, 8, H100)
    matmul = 6 * (plan.params.matrix + plan.params.unembedding)
    nominal = flops_per_token(plan.model) - matmul
    assert 0.5 < roofline.attention_flops(plan.model) / nominal < 1
    assert roofline.keys_met(128, 2048) == 128
    assert roofline.keys_met(8192, 128) == pytest.approx(256, rel=0.02)


def test_the_shard_of_muon_is_an_eighth() -> None:
    model = plan_for(24, 8, H100).model
    assert roofline.muon_flops(model, 8) == pytest.approx(3.3e12, rel=0.02)
    assert roofline.muon_flops(model, 1) == pytest.approx(8 * roofline.muon_flops(model, 8))


def counted(**changes: Any) -> dict[str, Any]:
    """A step as bytes.json has it, with the bytes of the review."""
    several = {"kernels": 1, "gb": 4.0}
    more = {"kernels": 100, "gb": 3 * 16.6}
    attention = {"attention": several, "operators": several, "products": several}
    blocks = {
        "forward": {"fused": {"kernels": 1, "gb": 4 * (69.1 - 8.2)}, **attention},
        "backward": {"fused": {"kernels": 1, "gb": 4 * 97.6}, "eager": more},
    }
    loss = {"eager": {"kernels": 440, "gb": 4 * 64.4}, "products": {"kernels": 24, "gb": 9.0}}
    update = {"fused": {"kernels": 56, "gb": 30.0}, "eager": {"kernels": 9, "gb": 10.5}}
    shape = {"depth": 24, "width": 1536, "vocabulary": 32768, "tokens": 32768, "ranks": 8, "micro_batches": 4}
    return {
        "shape": shape,
        "batches": blocks | {"loss": loss},
        "copies": {"eager": {"kernels": 1, "gb": 4 * 8.2}},
        "update": {**update, "wire": {"kernels": 20, "gb": 12.0}},
        **changes,
    }


def test_a_counted_step_takes_the_place_of_the_first_count(tmp_path: Path) -> None:
    path = tmp_path / "bytes.json"
    assert roofline.traffic_of(False, path) == FIRST_COUNT["bf16"]
    path.write_text(json.dumps({"torch": "2.15", "steps": {"d24": counted()}}), "utf-8")
    traffic = roofline.traffic_of(False, path)
    assert traffic.loss == pytest.approx(60, rel=0.01)
    assert traffic.accumulation == pytest.approx(9, rel=0.01)
    step = project(plan_for(24, 8, H100), H100, traffic)
    assert 1e3 * step.seconds == pytest.approx(REVIEW["bf16"]["step"], rel=0.02)
    assert roofline.traffic_of(True, path) == FIRST_COUNT["fp8"]
    without_update = {name: value for name, value in counted().items() if name != "update"}
    steps = {"d24": counted(), "d24-fp8": without_update}
    path.write_text(json.dumps({"torch": "2.15", "steps": steps}), "utf-8")
    assert roofline.traffic_of(True, path).muon == traffic.muon


def test_fewer_bytes_make_a_shorter_step() -> None:
    plan = plan_for(24, 8, H100)
    less = Traffic(forward=20, backward=40, weights=0, loss=6)
    assert project(plan, H100, less).seconds < project(plan, H100, FIRST_COUNT["bf16"]).seconds - 0.2


@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_a_step_within_its_limits(card: str) -> None:
    chosen = CARDS[card]
    found = project(plan_for(20, 8, chosen), chosen, FIRST_COUNT["bf16"])
    assert chosen.gemm < chosen.peak
    assert 0.2 < found.mfu < 0.9
    assert found.seconds >= found.plan.batch_tokens / 8 * found.plan.flops_per_token / chosen.peak * 0.95


def test_a_small_card_gets_fewer_rows_and_a_large_model_none() -> None:
    assert plan_for(20, 8, CARDS["4090"]).device_batch_size < plan_for(20, 8, H100).device_batch_size
    with pytest.raises(UserError, match="one row needs more than the 25 GB of a rtx 4090"):
        plan_for(32, 1, CARDS["4090"])
    with pytest.raises(UserError, match="--fp8: training on a a100 has none"):
        plan_for(24, 8, CARDS["a100"], fp8=True)


def test_a_rank_alone_sends_nothing() -> None:
    assert project(plan_for(12, 1, H100), H100, FIRST_COUNT["bf16"]).parts["collectives, not hidden"] == 0


def test_the_table_of_the_readme_is_what_the_command_prints_now() -> None:
    text = roofline.README.read_text("utf-8")
    _, _, rest = text.partition(f"{roofline.BEGIN}\n")
    assert rest.partition(roofline.END)[0].splitlines() == list(roofline.table()), (
        "the projections have changed. Renew them: python -m dev.bench.roofline --readme"
    )


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n", "utf-8")
    roofline.write_table(readme)
    lines = readme.read_text("utf-8").splitlines()
    assert lines == ["before", roofline.BEGIN, *roofline.table(), roofline.END, "after"]


def test_measurements_stand_beside_projections(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    setting = {"depth": 12, "dtype": "bf16", "backend": "varlen", "recipe": "nanochat-2026-07"}
    setting |= {"rows": 32, "context": 2048, "tokens": 65_536}
    rows = [
        {"name": "a", "metric": "matmul_block", "ours": 660e12, "unit": "FLOP/s"},
        {"name": "b", "metric": "memory_rate", "ours": 2.0e12, "unit": "B/s"},
        {"name": "c", "error": "exit code 1: out of memory"},
        {"name": "d", "metric": "step_time", "ours": 0.2, "unit": "s", **setting},
        {"name": "e", "metric": "step_time", "ours": 0.2, "unit": "s", **setting, "recipe": "speedrun-124m"},
    ]
    content = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "rows": rows}
    path.write_text(json.dumps(content), "utf-8")
    lines = list(roofline.compare(path))
    assert len(lines) == 4
    assert "+1.5%" in lines[1]
    assert "-25.9%  <- more than 15 % apart" in lines[2]
    assert lines[3].startswith("step d12 bf16 varlen")
    path.write_text(json.dumps({**content, "machine": {"device": "a CPU"}}), "utf-8")
    with pytest.raises(UserError, match="measured on a CPU, and the cards are h100"):
        list(roofline.compare(path))


def test_the_command_prints_the_parts_and_the_price(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--depth", "12", "--dollars", "2"])
    roofline.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("projected, nothing is measured: depth 12, bf16, 8 x h100")
    assert "at an assumed $2.00 a GPU and hour" in lines[-1]
