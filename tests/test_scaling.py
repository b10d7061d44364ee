"""What depth decides, against the tables of RECIPE 1.7 and 2.3 and against hand-worked numbers."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nanochat.common.errors import UserError
from nanochat.config.arguments import TrainArgs
from nanochat.config.model_config import count_params, flops_per_token
from nanochat.config.plan import describe, model_config, plan

# RECIPE 2.3: n, N (M), log2 B, LR multiplier, weight decay, steps, tokens (billions), GFLOP a token, FLOPs
JULY_TABLE = [
    (4, 11.53, 18, 0.707, 1.89, 528, 0.138, 0.0802, 1.11e16),
    (6, 23.20, 18, 0.707, 0.940, 1062, 0.278, 0.1675, 4.66e16),
    (8, 41.94, 18, 0.707, 0.520, 1920, 0.503, 0.2957, 1.49e17),
    (10, 70.12, 19, 1, 0.440, 1605, 0.841, 0.4955, 4.17e17),
    (12, 110.10, 19, 1, 0.280, 2520, 1.321, 0.7597, 1.00e18),
    (14, 164.23, 19, 1, 0.188, 3759, 1.971, 1.1285, 2.22e18),
    (16, 234.88, 19, 1, 0.131, 5376, 2.819, 1.5855, 4.47e18),
    (18, 324.4, 20, 1.414, 0.134, 3712, 3.892, 2.1800, 8.49e18),
    (20, 435.2, 20, 1.414, 0.100, 4980, 5.222, 2.8862, 1.51e19),
    (22, 569.5, 20, 1.414, 0.077, 6517, 6.834, 3.7631, 2.57e19),
    (24, 729.8, 20, 1.414, 0.060, 8352, 8.758, 4.7752, 4.18e19),
    (26, 918.4, 20, 1.414, 0.0475, 10510, 11.021, 5.9911, 6.60e19),
    (28, 1137.7, 20, 1.414, 0.0383, 13020, 13.652, 7.3657, 1.01e20),
    (32, 1677.7, 21, 2, 0.0368, 9600, 20.133, 10.771, 2.17e20),
]

# RECIPE 1.7: n, width, heads, blocks, N, all (M), GFLOP a token, steps, tokens (billions), FLOPs, decay
JANUARY_TABLE = [
    (4, 256, 2, 3.15, 11.53, 36.7, 0.0849, 231, 0.121, 1.03e16, 1.80),
    (6, 384, 3, 10.62, 23.20, 73.5, 0.1769, 464, 0.243, 4.31e16, 0.80),
    (8, 512, 4, 25.17, 41.94, 125.8, 0.3146, 840, 0.440, 1.385e17, 0.45),
    (10, 640, 5, 49.15, 70.12, 196.0, 0.5230, 1404, 0.736, 3.85e17, 0.288),
    (12, 768, 6, 84.94, 110.10, 286.3, 0.8022, 2205, 1.156, 9.27e17, 0.20),
    (14, 896, 7, 134.87, 164.23, 399.1, 1.1836, 3289, 1.724, 2.04e18, 0.147),
    (16, 1024, 8, 201.33, 234.88, 536.9, 1.6610, 4704, 2.466, 4.10e18, 0.1125),
    (18, 1152, 9, 286.66, 324.41, 701.9, 2.2720, 6496, 3.406, 7.74e18, 0.0889),
    (20, 1280, 10, 393.22, 435.16, 896.5, 3.0042, 8715, 4.569, 1.373e19, 0.072),
    (22, 1408, 11, 523.37, 569.51, 1123.2, 3.9015, 11405, 5.980, 2.333e19, 0.0595),
    (24, 1536, 12, 679.48, 729.81, 1384.1, 4.9451, 14616, 7.663, 3.789e19, 0.050),
    (26, 1664, 13, 863.90, 918.43, 1681.8, 6.1853, 18393, 9.643, 5.965e19, 0.0426),
    (28, 1792, 14, 1078.99, 1137.71, 2018.5, 7.5970, 22785, 11.946, 9.075e19, 0.0367),
]


@pytest.mark.parametrize("row", JULY_TABLE, ids=lambda row: f"d{row[0]}")
def test_plan_reproduces_the_july_table(row: tuple[float, ...]) -> None:
    depth, scaling, log2_batch, lr, decay, steps, tokens, gflops, flops = row
    p = plan(TrainArgs(depth=int(depth)), vocab_size=32768)
    assert p.params.scaling / 1e6 == pytest.approx(scaling, abs=0.051)
    assert p.batch_tokens == 2**log2_batch
    assert p.groups["matrix"].lr / 0.02 == pytest.approx(lr, abs=0.0005)
    assert p.schedule.matrix_weight_decay == pytest.approx(decay, rel=0.006)
    assert p.steps == steps
    assert p.tokens / 1e9 == pytest.approx(tokens, abs=0.0005)
    assert p.flops_per_token / 1e9 == pytest.approx(gflops, abs=0.0005)
    assert p.tokens * p.flops_per_token == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize("row", JANUARY_TABLE, ids=lambda row: f"d{row[0]}")
def test_plan_reproduces_the_january_table(row: tuple[float, ...]) -> None:
    depth, width, heads, blocks, scaling, total, gflops, steps, tokens, flops, decay = row
    p = plan(TrainArgs(depth=int(depth), recipe="nanochat-2026-01"), vocab_size=32768)
    assert (p.model.n_embd, p.model.n_head, p.batch_tokens) == (width, heads, 2**19)
    assert p.params.matrix / 1e6 == pytest.approx(blocks, abs=0.006)
    assert p.params.scaling / 1e6 == pytest.approx(scaling, abs=0.006)
    assert p.params.total / 1e6 == pytest.approx(total, abs=0.06)
    assert p.flops_per_token / 1e9 == pytest.approx(gflops, abs=0.0005)
    assert p.steps == steps
    assert p.tokens / 1e9 == pytest.approx(tokens, abs=0.0006)
    assert p.tokens * p.flops_per_token == pytest.approx(flops, rel=0.005)
    assert p.schedule.matrix_weight_decay == pytest.approx(decay, rel=0.006)


def test_learning_rates_of_d24_by_hand() -> None:
    groups = plan(TrainArgs(depth=24), vocab_size=32768).groups
    batch = math.sqrt(2)  # 2^20 tokens against 2^19
    width = math.sqrt(768 / 1536)
    assert groups["unembedding"].lr == pytest.approx(0.008 * batch * width)
    assert groups["embedding"].lr == pytest.approx(0.3 * batch * width)
    assert groups["value_embedding"].lr == pytest.approx(0.15 * batch * width)
    assert groups["resid"].lr == pytest.approx(0.005 * batch)
    assert groups["x0"].lr == pytest.approx(0.5 * batch)
    assert groups["smear"].lr == 0.2
    assert groups["matrix"].lr == pytest.approx(0.02 * batch)


@pytest.mark.parametrize(("optimizer", "betas"), [("soap", (0.95, 0.95)), ("adamw", (0.9, 0.95))])
def test_matrices_under_another_optimizer_by_hand(optimizer: str, betas: tuple[float, float]) -> None:
    ours = plan(TrainArgs(depth=24, matrix_optimizer=optimizer), vocab_size=32768)
    muon = plan(TrainArgs(depth=24), vocab_size=32768)
    group = ours.groups["matrix"]
    assert (group.optimizer, group.beta1, group.beta2) == (optimizer, *betas)
    assert group.lr == pytest.approx(0.003 * math.sqrt(2) * math.sqrt(768 / 1536))
    assert group.weight_decay == pytest.approx(muon.groups["matrix"].weight_decay * 0.1 / 0.28)
    assert ours.schedule.matrix_weight_decay == group.weight_decay
    assert {**ours.groups, "matrix": None} == {**muon.groups, "matrix": None}
    asked = plan(TrainArgs(depth=24, matrix_optimizer=optimizer, matrix_lr=0.001, weight_decay=0.0), 32768)
    assert asked.groups["matrix"].lr == pytest.approx(group.lr / 3)
    assert asked.groups["matrix"].weight_decay == 0


@pytest.mark.parametrize("flags", [{"scalar_lr": -1e-4}, {"soap_every": 0}])
def test_techniques_out_of_range_are_refused_by_their_flag(flags: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--" + next(iter(flags)).replace("_", "-")):
        plan(dataclasses.replace(TrainArgs(), **flags), 32768)  # type: ignore[arg-type]


def test_windows_follow_the_pattern_and_the_last_layer_is_full() -> None:
    model = model_config(TrainArgs(depth=6), 32768, 6)
    assert model.windows == (512, 512, 512, 2048, 512, 2048)
    assert model_config(TrainArgs(max_seq_len=512), 32768, 4).windows == (128, 128, 128, 512)
    assert model_config(TrainArgs(max_seq_len=64), 32768, 2).windows == (64, 64)


def test_flops_of_d12_by_hand() -> None:
    # 9 short layers of 512 and 3 full ones of 2048; 768 wide
    model = model_config(TrainArgs(), 32768, 12)
    by_hand = 6 * (12 * 12 * 768**2 + 6 * 6 * 12 + 32768 * 768) + 12 * 768 * (9 * 512 + 3 * 2048)
    assert flops_per_token(model) == by_hand


@pytest.mark.parametrize("depth", range(1, 41))
def test_every_depth_has_a_plan(depth: int) -> None:
    p = plan(TrainArgs(depth=depth), vocab_size=32768)
    assert p.model.n_embd == 128 * math.ceil(64 * depth / 128) == p.model.n_head * 128
    assert p.device_batch_size * p.grad_accum_steps * 2048 == p.batch_tokens
    assert len(p.model.windows) == depth
    assert count_params(p.model).scaling == p.params.scaling
    json.dumps(p.to_dict(), allow_nan=False)


def test_horizon_flags_take_precedence_in_order() -> None:
    assert plan(TrainArgs(depth=12, num_iterations=7, target_flops=1e18), 32768).steps == 7
    p = plan(TrainArgs(depth=12, target_flops=1e18), 32768)
    assert p.tokens * p.flops_per_token == pytest.approx(1e18, rel=1e-3)
    assert plan(TrainArgs(depth=12, target_param_data_ratio=8), 32768).steps == 1680


def test_the_warmup_is_forty_steps_but_of_a_short_run_a_tenth() -> None:
    for steps, warmup in ((12, 1), (200, 20), (400, 40), (528, 40), (100_000, 40)):
        assert plan(TrainArgs(num_iterations=steps), 32768).schedule.warmup_steps == warmup
    assert plan(TrainArgs(num_iterations=200, warmup_steps=40), 32768).schedule.warmup_steps == 40


def test_micro_batch_that_does_not_divide_is_adjusted_with_a_notice() -> None:
    p = plan(TrainArgs(max_seq_len=512, total_batch_size=16384, device_batch_size=12), 32768)
    assert (p.device_batch_size, p.grad_accum_steps) == (8, 4)
    assert "--device-batch-size=12" in p.notices[0]
    assert "using 8" in p.notices[0]


def test_world_size_divides_accumulation_and_changes_nothing_else() -> None:
    one, eight = plan(TrainArgs(), 32768, 1), plan(TrainArgs(), 32768, 8)
    assert (one.grad_accum_steps, eight.grad_accum_steps) == (8, 1)
    same = {"world_size": 8, "grad_accum_steps": 1}
    assert dataclasses.replace(one, **same) == eight


@pytest.mark.parametrize(
    ("flag", "value"),
    [("depth", 0), ("depth", -3), ("window_pattern", "SX"), ("head_dim", 7), ("warmdown_ratio", 1.5)],
)
def test_impossible_arguments_are_refused_by_name(flag: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}="):
        plan(TrainArgs(**{flag: value}), 32768)


def test_batch_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 6144"):
        plan(TrainArgs(total_batch_size=2**14), 32768, world_size=3)


def test_the_race_has_the_batches_and_windows_of_its_records() -> None:
    # RECIPE 3.3: thirds of the steps with 131072, 262144 and 393216 tokens; 6.5 tokens a scaling parameter
    p = plan(TrainArgs(recipe="speedrun-124m"), 50265)
    assert p.model.padded_vocab_size == 50304
    assert p.params.scaling == 12 * 12 * 768**2 + 6 * 6 * 12 + 50304 * 768
    thirds = [p.tokens_at(int(p.steps * part)) for part in (0.2, 0.5, 0.8)]
    assert thirds == [131_072, 262_144, 393_216]
    assert p.tokens == pytest.approx(6.5 * p.params.scaling, rel=1e-3)
    assert p.tokens == sum(p.tokens_at(step) for step in range(p.steps))
    assert p.to_dict()["tokens"] == p.tokens
    assert [p.windows_at(int(p.steps * part))[2:4] for part in (0.2, 0.5, 0.8)] == [
        (128, 512),
        (256, 1024),
        (512, 2048),
    ]
    assert p.windows_at(p.steps) == p.model.windows
    assert all(window % 128 == 0 for step in range(p.steps) for window in set(p.windows_at(step)))
    assert any(line.startswith("the batch grows: 131,072 tokens from step 0, ") for line in describe(p))
    json.dumps(p.to_dict(), allow_nan=False)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_batches_of_the_race_are_the_same_for_any_ranks(size: int) -> None:
    one, many = (plan(TrainArgs(recipe="speedrun-124m"), 50265, n) for n in (1, size))
    assert (many.batch_rows, many.schedule, many.lanes) == (one.batch_rows, one.schedule, one.lanes)
    assert many.batch_rows % (size * many.device_batch_size) == 0
    assert many.device_batch_size * many.grad_accum_steps * size * 2048 == 393_216


def test_a_batch_whose_stages_ranks_do_not_divide_is_refused() -> None:
    args = TrainArgs(recipe="speedrun-124m", total_batch_size=2**19)
    with pytest.raises(
        UserError, match=r"multiple of 49152 tokens \(8 ranks .* 3 times, since the batch grows"
    ):
        plan(args, 50265, world_size=8)


def test_windows_of_a_share_are_whole_blocks_within_their_own() -> None:
    model = model_config(TrainArgs(max_seq_len=1024), 32768, 4)
    assert model.windows == (256, 256, 256, 1024)
    assert model.windows_at(0.3) == (128, 128, 128, 384)
    assert model.windows_at(0.001) == (128, 128, 128, 128)
    assert model.windows_at(1.0) == model.windows
    assert model_config(TrainArgs(max_seq_len=100), 32768, 2).windows_at(0.5) == (100, 100)
