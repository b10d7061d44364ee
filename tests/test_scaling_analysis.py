"""Scaling laws: known exponents come back, intervals hold what they say, runs are read from their files."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dev import scaling_analysis, scaling_fit
from dev.scaling_fit import Trained
from nanochat.common import files
from nanochat.common.errors import UserError

A, B = 0.54, 0.46  # N = 0.3 C^0.54, and D what is left of C = 6 N D
BUDGETS = (1e17, 3e17, 1e18, 3e18)


def made(
    scatter: float, seed: int = 0, sizes: int = 6, budgets: tuple[float, ...] = BUDGETS
) -> list[Trained]:
    """A sweep whose laws are known: parabolas about N = 0.3 C^A."""
    rng = np.random.default_rng(seed)
    runs = []
    for budget in budgets:
        best = math.log(0.3) + A * math.log(budget)
        for x in np.linspace(best - 1.3, best + 1.1, sizes):  # not centred: nothing may depend on that
            bpb = 30 * budget**-0.08 + 0.03 * (x - best) ** 2 + rng.normal(0, scatter)
            params = math.exp(x)
            runs.append(Trained(budget, params, budget / (6 * params), bpb))
    rng.shuffle(runs)  # type: ignore[arg-type]
    return runs


def test_known_laws_come_back_to_the_digit_without_scatter() -> None:
    laws = scaling_fit.analyse(made(scatter=0.0))
    assert laws.params_exponent is not None
    assert laws.tokens_exponent is not None
    assert laws.params_exponent.value == pytest.approx(A, abs=1e-9)
    assert laws.tokens_exponent.value == pytest.approx(B, abs=1e-9)
    for optimum, budget in zip(laws.optima, BUDGETS, strict=True):
        params = 0.3 * budget**A
        assert optimum.budget.flops == budget
        assert optimum.params.value == pytest.approx(params, rel=1e-6)
        assert optimum.tokens.value == pytest.approx(budget / 6 / params, rel=1e-6)
        assert optimum.ratio.value == pytest.approx(budget / 6 / params**2, rel=1e-6)
        assert optimum.bpb == pytest.approx(30 * budget**-0.08, rel=1e-9)
    geometric = math.exp(np.mean([math.log(budget / 6 / (0.3 * budget**A) ** 2) for budget in BUDGETS]))
    assert laws.ratio.value == pytest.approx(geometric, rel=1e-6)
    assert laws.scatter == pytest.approx(0.0, abs=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 sweeps with scatter, 95 % of the intervals hold; nor are they wider than they need to be."""
    monkeypatch.setattr(scaling_fit, "DRAWS", 400)
    truth = {"params": 0.3 * BUDGETS[1] ** A, "exponent": A}
    held = {"params": 0, "exponent": 0}
    trials = 300
    for seed in range(trials):
        laws = scaling_fit.analyse(made(scatter=0.0015, seed=seed, sizes=5))
        assert laws.params_exponent is not None
        for name, estimate in (("params", laws.optima[1].params), ("exponent", laws.params_exponent)):
            assert estimate.interval is not None
            held[name] += estimate.interval[0] <= truth[name] <= estimate.interval[1]
    for name, count in held.items():
        assert 0.91 <= count / trials <= 0.985, (name, count)


def test_the_same_runs_give_the_same_figures_in_any_order() -> None:
    runs = made(scatter=0.002)
    first, second = scaling_fit.analyse(runs), scaling_fit.analyse(runs[::-1])
    assert first.params_exponent is not None
    assert second.params_exponent is not None
    assert first.params_exponent.value == pytest.approx(second.params_exponent.value, rel=1e-12)


def test_a_best_size_outside_those_tried_counts_for_no_law() -> None:
    runs = [run for run in made(scatter=0.0) if run.budget < 3e18 or run.params > 0.3 * 3e18**A * 1.02]
    laws = scaling_fit.analyse(runs)
    assert [optimum.budget.flops for optimum in laws.optima] == list(BUDGETS[:3])
    assert [budget.flops for budget in laws.left_out] == [3e18]
    assert "| 3e+18 | 3 | not among the sizes tried |" in scaling_analysis.markdown(laws)


def test_what_the_runs_do_not_tell_is_said() -> None:
    three = scaling_fit.analyse(made(scatter=0.001, sizes=3))  # every parabola meets its runs
    assert three.scatter is None
    assert three.ratio.interval is None
    assert "(not told)" in scaling_analysis.markdown(three)
    one = scaling_fit.analyse(made(scatter=0.001, budgets=(1e18,)))
    assert one.params_exponent is None
    noisy = scaling_fit.analyse(made(scatter=0.03, seed=3, sizes=5))  # of the size of the parabola
    assert None in [optimum.params.interval for optimum in noisy.optima]


def test_too_few_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="runs of 2 sizes"):
        scaling_fit.analyse(made(scatter=0.0, sizes=2))
    slopes = [Trained(1e18, 10.0**i, 1e9, 3.0 - i) for i in range(5)]
    with pytest.raises(UserError, match="Train smaller and larger"):
        scaling_fit.analyse(slopes)


def write_run(name: str, run: Trained, target_flops: float | None, status: str = "finished") -> None:
    folder = files.run_dir(name)
    params = {"matrix": run.params - 100.0, "unembedding": 100.0, "embedding": 7.0}
    files.write_json(folder / "config.json", {"args": {"target_flops": target_flops}, "params": params})
    files.write_json(folder / "summary.json", {"status": status, "tokens": run.tokens, "val_bpb": run.bpb})


def test_a_sweep_is_read_from_its_run_folders() -> None:
    runs = made(scatter=0.001)
    for i, run in enumerate(runs):
        write_run(f"sweep-{i}", run, run.budget)
    laws = scaling_analysis.sweep([f"sweep-{i}" for i in range(len(runs))])
    direct = scaling_fit.analyse(runs)
    assert laws.ratio.value == pytest.approx(direct.ratio.value, rel=1e-9)
    assert scaling_analysis.to_json(laws)["budgets"][0]["flops"] == BUDGETS[0]
    text = scaling_analysis.markdown(laws)
    assert "N ~ C^a with a = 0.5" in text
    assert text.count("\n| ") == 5
    for changes, message in (((None, "finished"), "--target-flops"), ((1e18, "stopped"), "has not ended")):
        write_run("odd", runs[0], *changes)
        with pytest.raises(UserError, match=message):
            scaling_analysis.read("odd")


def test_the_plot_shows_every_budget() -> None:
    pytest.importorskip("matplotlib")
    path = files.base_dir() / "plot.svg"
    scaling_analysis.draw(scaling_fit.analyse(made(scatter=0.001)), path)
    text = path.read_text("utf-8")
    for budget in BUDGETS:
        assert f">{budget:.2g} FLOPs<" in text
