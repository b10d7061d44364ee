"""The test of the race to 3.28, and the rows of the leaderboard, from the files of runs."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from scipy import stats as scipy_stats

from dev import leaderboard, significance
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.evaluation.core.results import gpt2_accuracy

ARGS = {"depth": 12, "recipe": "speedrun-124m", "num_iterations": 100}


def a_run(name: str, seed: int, loss: float | None = 3.27, core: float | None = None, **changes: Any) -> None:
    folder = files.run_dir(name)
    config = {
        "args": {**ARGS, "run": name, "seed": seed, **changes.get("args", {})},
        "flops_per_token": 1e9,
        "fingerprints": {"corpus": changes.get("corpus", "c"), "tokenizer": "t"},
        "machine": {"device": "Abacus 7"},
        "provenance": {
            "date": "2026-11-21",
            "commit": "0123456789ab",
            "command": f"-m scripts.base_train -- --depth=12 --run {name} --seed={seed} --resume auto --fp8",
        },
    }
    files.write_json(folder / "config.json", config)
    summary = {
        "status": changes.get("status", "finished"),
        "val_loss": loss,
        "val_bpb": 0.75 + seed / 100,
        "steps": 100,
        "tokens": 5_242_880,
        "train_seconds": 600.0 + 60 * seed,
        "world_size": 8,
    }
    files.write_json(folder / "summary.json", summary)
    if core is not None:
        scores = {"core_metric": core, "tasks": dict.fromkeys(changes.get("tasks", gpt2_accuracy()), {})}
        files.write_json(folder / "base_eval.json", scores)


def test_the_verdict_is_that_of_scipy() -> None:
    for losses in ([3.2790, 3.2793, 3.2788, 3.2795], [3.27, 3.29], [3.2801, 3.2799, 3.2797]):
        found = significance.judge(losses)
        theirs = scipy_stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
        assert found.p == pytest.approx(theirs, rel=1e-9)
        assert found.holds == (theirs < 0.01)


def test_a_case_worked_by_hand() -> None:
    """Losses 1, 2, 3 and the bar 4: mean 2, standard error 1/sqrt(3), t = -2 sqrt(3), two degrees."""
    t = -2 * 3**0.5
    by_hand = 0.5 + t / (2 * (2 + t * t) ** 0.5)  # Student's distribution with two degrees
    assert significance.judge([1.0, 2.0, 3.0], target=4.0).p == pytest.approx(by_hand, rel=1e-12)


def test_a_mean_below_the_bar_is_not_enough_and_it_says_how_many_runs_would_be() -> None:
    found = significance.judge([3.2795, 3.2785, 3.2802])
    assert not found.holds
    text = found.describe()
    assert "it is not shown" in text
    needed = int(text.rsplit("with ", 1)[1].split()[0])
    sd = (sum((loss - 3.2794) ** 2 for loss in found.losses) / 2) ** 0.5

    def p(n: int) -> float:
        return float(scipy_stats.t.cdf((3.2794 - 3.28) / (sd / n**0.5), n - 1))

    assert p(needed) < 0.01 <= p(needed - 1)
    assert "would be" not in significance.judge([3.29, 3.285]).describe()  # no number of runs helps
    assert "it is shown" in significance.judge([3.2701, 3.2702, 3.2703]).describe()


def test_runs_below_the_bar_in_all_draws_pass_at_most_at_the_level() -> None:
    """Of 4000 experiments whose mean lies on the bar, one in a hundred is believed."""
    import numpy as np

    draws = np.random.default_rng(0).normal(3.28, 0.0013, size=(4000, 4))
    believed = sum(significance.judge(list(each)).holds for each in draws)
    assert 21 <= believed <= 59  # 40 +- 3 standard deviations


def test_what_is_no_fair_draw_is_refused() -> None:
    a_run("a", 0)
    assert significance.final_loss("a") == 3.27
    for name, changes, message in (
        ("b", {"status": "target_reached"}, "no fair draw"),
        ("c", {"status": "stopped"}, "has not ended"),
        ("d", {"loss": None}, "no val_loss"),
    ):
        a_run(name, 1, **changes)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            significance.final_loss(name)
    for name, seed, changes, message in (
        ("e", 0, {}, "the same seed twice"),
        ("h", 2, {}, "'b' has the same configuration and is not named"),
        ("f", 1, {"args": {"num_iterations": 120}}, "num_iterations is 120, and 100 in 'a'"),
        ("g", 1, {"corpus": "other"}, "corpus or tokenizer"),
    ):
        a_run(name, seed, **changes)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            significance.require_alike(["a", name])
    for losses in ([3.2], [3.2, float("nan")]):
        with pytest.raises(UserError, match="two or more numbers"):
            significance.judge(losses)


@pytest.mark.parametrize(
    "command",
    [
        "scripts/base_train.py --depth=24 --run=x --seed 3 --fp8",
        "-u -m scripts.base_train -- --run x --depth=24 --resume auto --fp8 --seed=1",
        "-m scripts.base_train --depth=24 --resume=auto --fp8",
    ],
)
def test_a_row_shows_the_command_without_its_seed(command: str) -> None:
    assert leaderboard.shown_command(command) == "base_train --depth=24 --fp8"


def test_rows_are_made_from_the_files_of_runs() -> None:
    for seed, loss, core in ((0, 3.278, 0.26), (1, 3.276, 0.28)):
        a_run(f"r{seed}", seed, loss=loss, core=core)
    shared = ["2026-11-21", "0123456789ab", "`base_train --depth=12 --fp8`", "8 x Abacus 7", "2"]
    minutes = "10.50 +- 0.50"
    core_row = [*shared, "0.2700 +- 0.0100", "0.75500 +- 0.00500", "5.243e+06", "5.24e+15", minutes]
    assert leaderboard.row("core", ["r0", "r1"]) == core_row
    p = scipy_stats.ttest_1samp([3.278, 3.276], 3.28, alternative="less").pvalue
    loss_row = [*shared, "3.27700 +- 0.00100", f"{p:.2g}, runs not declared", "100", "5.243e+06", minutes]
    assert leaderboard.row("loss", ["r0", "r1"]) == loss_row
    for race, head in leaderboard.HEADS.items():
        assert len(head) == len(leaderboard.row(race, ["r0", "r1"]))


def test_one_run_has_no_p_value() -> None:
    a_run("r0", 0)
    assert leaderboard.row("loss", ["r0"])[6] == "one run"


def begun(name: str, seed: int) -> None:
    """A run that has not ended."""
    a_run(name, seed)
    (files.run_dir(name) / "summary.json").unlink()


LOW = [3.2770, 3.2772, 3.2771, 3.2769, 3.2773, 3.2768, 3.2774, 3.2770]


def ran(count: int) -> list[str]:
    for seed in range(count):
        a_run(f"r{seed}", seed, loss=LOW[seed])
    return [f"r{seed}" for seed in range(count)]


def test_a_claim_of_as_many_runs_as_were_declared_is_judged_at_the_level() -> None:
    begun("r0", 0)
    significance.declare("r0", 4)
    found = significance.claim(ran(4))
    assert (found.declared, found.level) == (True, 0.01)
    assert "it is shown (one-sided t-test" in found.describe()


def test_without_a_declaration_it_is_no_claim() -> None:
    found = significance.claim(ran(4))
    assert found.p < 0.01
    assert "it is not shown" in found.describe()
    assert "no claim: the number of runs was not declared" in found.describe()


def test_a_declared_extension_has_two_looks_at_half_the_level() -> None:
    begun("r0", 0)
    significance.declare("r0", 4, 8)
    assert significance.claim(ran(4)).level == 0.005
    assert significance.claim(ran(8)).level == 0.005
    for count in (5, 7):
        for seed in range(count, 8):
            shutil.rmtree(files.run_dir(f"r{seed}"), ignore_errors=True)
        with pytest.raises(UserError, match=f"{count} runs are named, and 4 or 8 were declared"):
            significance.claim(ran(count))


def test_what_was_declared_stays_and_comes_before_the_first_end() -> None:
    begun("r0", 0)
    path = significance.declare("r0", 4)
    with pytest.raises(UserError, match="was declared for this configuration"):
        significance.declare("r0", 3)
    a_run("r1", 1)
    assert significance.declare("r0", 4) == path, "a script that is run again says it again"
    path.unlink()
    with pytest.raises(UserError, match=r"'r1' of this configuration has ended"):
        significance.declare("r0", 4)
    for count, more in ((1, None), (4, 4), (4, 2), (0, None)):
        with pytest.raises(UserError, match="expected 2 runs or more"):
            significance.declare("r0", count, more)


@pytest.mark.parametrize(
    ("seeds", "missing"), [((1, 2), "0 to 1"), ((0, 2, 3), "0 to 2"), ((0, 1, 5), "0 to 2")]
)
def test_seeds_with_gaps_are_refused(seeds: tuple[int, ...], missing: str) -> None:
    for seed in seeds:
        a_run(f"s{seed}", seed)
    with pytest.raises(UserError, match=f"expected {missing}: seeds with gaps may have been chosen"):
        significance.claim([f"s{seed}" for seed in seeds])


def test_a_run_that_is_not_named_is_named_whether_it_ended_or_not() -> None:
    names = ran(3)
    with pytest.raises(UserError, match="'r2' has the same configuration and is not named"):
        significance.claim(names[:2])
    begun("r3", 3)
    with pytest.raises(UserError, match="'r3' has the same configuration"):
        significance.claim(names)
    a_run("other", 3, args={"num_iterations": 120})  # of another configuration
    files.write_json(files.run_dir("damaged") / "config.json", [])
    shutil.rmtree(files.run_dir("r3"))
    significance.claim(names)


def test_two_looks_hold_the_level_and_looking_at_will_does_not() -> None:
    """Of experiments whose mean is the bar: declared looks at 4 and 8 runs, and a look after every run."""
    import numpy as np

    draws = np.random.default_rng(1).normal(3.28, 0.0013, size=(6000, 10))

    def low(runs: int, level: float) -> np.ndarray:
        part = draws[:, :runs]
        t = (part.mean(1) - 3.28) / (part.std(1, ddof=1) / runs**0.5)
        return np.asarray(scipy_stats.t.cdf(t, runs - 1) < level)

    declared = (low(4, 0.005) | low(8, 0.005)).mean()
    assert declared <= 0.01 + 3 * (0.01 * 0.99 / 6000) ** 0.5
    at_will = np.any([low(runs, 0.01) for runs in range(2, 11)], axis=0).mean()
    assert at_will > 0.03


def test_the_command_declares_and_judges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["significance", *words])
        significance.main()
        return capsys.readouterr().out

    begun("r0", 0)
    assert "declared: " in command("--declare", "2", "r0")
    assert "it is shown" in command(*ran(2), "--level", "0.2")
    with pytest.raises(SystemExit, match="2"):
        command("--declare", "2", "r0", "r1")
    assert "name the first run alone" in capsys.readouterr().err


def test_the_page_has_both_races_with_the_columns_of_the_command() -> None:
    from tests.conftest import REPO

    page = (REPO / "dev" / "LEADERBOARD.md").read_text("utf-8")
    for race, head in leaderboard.HEADS.items():
        assert f"| {' | '.join(head)} |" in page
        assert f"python -m dev.leaderboard --race {race}" in page


def test_another_suite_than_core_gives_no_row() -> None:
    a_run("mini", 0, core=0.3, tasks=["mini_a", "mini_b"])
    with pytest.raises(UserError, match="no CORE of the whole bundle"):
        leaderboard.row("core", ["mini"])
