import json
import math
from hashlib import sha256

import numpy as np
import pytest
from scipy import stats as scipy_stats

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.config.arguments import EvalArgs
from nanochat.distributed.world import World
from nanochat.evaluation import base_eval
from nanochat.evaluation.core import compare
from nanochat.evaluation.core import statistics as core_statistics
from nanochat.evaluation.core.results import gpt2_accuracy


def write_run(name, answers, core, passage=2, **changes):
    """A scored run: answers[task] are 1 or 0, a passage has that many examples."""
    folder = files.run_dir(name)
    tasks = {label: {"baseline": 0.5 if label == "a" else 0.0, "accuracy": 0.5} for label in answers}
    scores = {
        "core_metric": core,
        "core_variant": "nanochat",
        "bundle": "b",
        "crop_tokens": 9,
        "max_per_task": 0,
    }
    tasks = {
        label: {"centered": 0.0, "stderr": 0.1, **fields}
        for label, fields in changes.pop("tasks", tasks).items()
    }
    files.write_json(folder / "base_eval.json", {**scores, "tasks": tasks, **changes})
    lines = [
        {
            "task": label,
            "index": n,
            "line": n + 1,
            "losses": [1.0],
            "answer": right,
            "gold": 1,
            "passage": n // passage,
        }
        for label, row in answers.items()
        for n, right in enumerate(row)
    ]
    (folder / "core_predictions.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), "utf-8"
    )


def test_two_runs_are_compared_example_by_example():
    write_run("one", {"a": [1, 0, 1, 0, 0, 0], "b": [1, 1, 1, 1, 0, 0]}, 0.2)
    write_run("two", {"a": [1, 1, 1, 1, 1, 0], "b": [1, 1, 0, 1, 0, 0]}, 0.5)
    whole, a, b = compare.compare("one", "two")
    assert (a.first, a.second, a.pairs) == (pytest.approx(2 / 6), pytest.approx(5 / 6), 6)
    assert a.only == (0, 3)
    assert b.only == (1, 0)
    # Passage sums of the differences: a has 1, 1, 1 and mean 1/2 a example; b has 0, -1, 0 and mean -1/6.
    assert a.stderr == pytest.approx(0, abs=1e-12)
    expected = math.sqrt(3 / 2 * ((1 / 3) ** 2 + (2 / 3) ** 2 + (1 / 3) ** 2) / 36)
    assert b.stderr == pytest.approx(expected)
    assert (whole.first, whole.second) == (0.2, 0.5)
    assert whole.stderr == pytest.approx(expected / 2)  # b has baseline 0; a has no error
    assert b.p_value == pytest.approx(math.erfc(1 / 6 / expected / math.sqrt(2)))


def test_a_run_against_itself_has_no_difference():
    write_run("one", {"a": [1, 0, 1, 0], "b": [1, 1, 0, 0]}, 0.2)
    write_run("two", {"a": [1, 0, 1, 0], "b": [1, 1, 0, 0]}, 0.2)
    assert all((row.stderr, row.p_value) == (0, 1) for row in compare.compare("one", "two"))


def test_runs_that_were_asked_other_questions_are_refused():
    write_run("one", {"a": [1, 0]}, 0.2)
    for changes, message in [
        ({"core_variant": "dclm"}, "'two' was scored with core_variant=dclm, run 'one' with nanochat"),
        ({"crop_tokens": 8}, "crop_tokens=8"),
        ({"tasks": {"b": {"baseline": 0}}}, "different tasks"),
    ]:
        write_run("two", {"a": [1, 0]}, 0.2, **changes)
        with pytest.raises(UserError, match=message):
            compare.compare("one", "two")
    write_run("two", {"a": [1, 0, 1]}, 0.2)
    with pytest.raises(UserError, match="different examples"):
        compare.compare("one", "two")


def test_a_run_that_was_not_scored_is_named_with_the_command_that_scores_it():
    write_run("one", {"a": [1, 0]}, 0.2)
    with pytest.raises(UserError, match="'none'.*scripts.base_eval --run none --eval core"):
        compare.compare("one", "none")
    write_run("two", {"a": [1, 0]}, None)
    with pytest.raises(UserError, match="holds no CORE"):
        compare.compare("one", "two")
    write_run("two", {"a": [1, 0]}, 0.2)
    (files.run_dir("two") / "core_predictions.jsonl").unlink()
    with pytest.raises(UserError, match="holds no answers"):
        compare.compare("one", "two")


def test_seeds_are_combined_with_the_verdict_of_few(capsys):
    answers = {label: [1, 0] for label in gpt2_accuracy()}
    for name, core in zip(("s0", "s1", "s2"), (0.2525, 0.2625, 0.2725), strict=True):
        write_run(name, answers, core)
    values, claims = compare.combine(["s0", "s1", "s2"])
    assert values == {"s0": 0.2525, "s1": 0.2625, "s2": 0.2725}
    # The variance of the seeds' mean has two degrees of freedom, the bar's is known: Welch's sum of both.
    seeds, bar = 0.0001 / 3, 0.0029**2
    degrees = int(2 * ((seeds + bar) / seeds) ** 2)
    expected = scipy_stats.t.cdf((0.2625 - 0.256525) / math.sqrt(seeds + bar), degrees)
    [claim] = claims  # these scores do not say the error of their questions
    assert claim.mean == pytest.approx(0.2625)
    assert claim.stderr == pytest.approx(0.01 / math.sqrt(3))
    assert f"above the 0.256525 +- 0.0029 of GPT-2 1558M with probability {expected:.3f}" in claim.verdict
    base_eval.main(EvalArgs(combine=("s0", "s1", "s2")), World.single_process())
    assert "0.2625 +- 0.0058" in capsys.readouterr().out
    for runs in (["s0"], ["s0", "s0"]):
        with pytest.raises(UserError, match="two or more different runs"):
            compare.combine(runs)


def test_the_comparison_is_printed(capsys):
    write_run("one", {"a": [1, 0, 1, 0, 0, 0]}, 0.2)
    write_run("two", {"a": [1, 1, 1, 1, 0, 0]}, 0.5)
    base_eval.main(EvalArgs(compare=("one", "two")), World.single_process())
    printed = capsys.readouterr().out
    assert "CORE of two is +0.3000" in printed
    with pytest.raises(UserError, match="expected two runs"):
        base_eval.main(EvalArgs(compare=("one",)), World.single_process())


def test_a_recipe_is_judged_on_these_questions_and_at_such_questions(capsys):
    answers = {label: [1, 0] for label in gpt2_accuracy()}
    for name, core in zip(("s0", "s1", "s2"), (0.2575, 0.2625, 0.2675), strict=True):
        write_run(name, answers, core, core_stderr=0.0063)
    these, such = compare.combine(["s0", "s1", "s2"])[1]
    assert these.stderr == pytest.approx(0.005 / math.sqrt(3))
    assert such.stderr == pytest.approx(math.hypot(0.005 / math.sqrt(3), 0.0063))
    known = 0.0063**2 + 0.0029**2
    degrees = int(2 * ((0.000025 / 3 + known) / (0.000025 / 3)) ** 2)
    expected = scipy_stats.t.cdf((0.2625 - 0.256525) / math.sqrt(0.000025 / 3 + known), degrees)
    assert such.verdict.endswith(f"with probability {expected:.3f}")
    base_eval.main(EvalArgs(combine=("s0", "s1", "s2")), World.single_process())
    printed = " ".join(capsys.readouterr().out.split())
    assert "on these questions" in printed
    assert "with the error of the questions" in printed


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 5), (4, 0), (8, 1), (1, 20), (12, 12), (0, 1), (24, 0)])
def test_few_pairs_that_differ_are_tested_exactly(only_a, only_b):
    same = 40
    write_run("one", {"a": [1] * only_a + [0] * only_b + [1] * same}, 0.2, passage=1)
    write_run("two", {"a": [0] * only_a + [1] * only_b + [1] * same}, 0.3, passage=1)
    [_, row] = compare.compare("one", "two")
    assert row.only == (only_a, only_b)
    expected = scipy_stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert row.p_value == pytest.approx(expected, rel=1e-9)


def test_many_pairs_and_passages_are_tested_by_the_error_of_the_difference():
    for passage, only_b in ((1, 25), (2, 6)):
        write_run("one", {"a": [0] * only_b + [1] * 40}, 0.2, passage=passage)
        write_run("two", {"a": [1] * only_b + [1] * 40}, 0.3, passage=passage)
        [_, row] = compare.compare("one", "two")
        z = (row.second - row.first) / row.stderr
        assert row.p_value == pytest.approx(2 * scipy_stats.norm.sf(z), rel=1e-6)


def test_the_exact_test_holds_its_level_where_the_normal_one_does_not():
    """All pairs of 32 examples answered by two equal models of 40 %: at most 5 in 100 are told apart."""
    rng = np.random.default_rng(0)
    draws = rng.random((20_000, 2, 32)) < 0.4
    first = (draws[:, 0] & ~draws[:, 1]).sum(1)
    second = (draws[:, 1] & ~draws[:, 0]).sum(1)
    told = np.mean(
        [core_statistics.exact_mcnemar(int(b), int(c)) < 0.05 for b, c in zip(first, second, strict=True)]
    )
    assert told <= 0.05


def test_tasks_are_starred_after_holm_and_core_by_itself(capsys):
    tasks = {f"t{n}": [0, 1] * 20 for n in range(22)}
    write_run("one", tasks, 0.2, passage=1)
    better = dict(tasks, t0=[1] * 14 + [0, 1] * 13, t1=[1] * 40)
    write_run("two", better, 0.3, passage=1)
    whole, *rows = compare.compare("one", "two")
    first, second = rows[:2]
    assert first.p_value == pytest.approx(scipy_stats.binomtest(0, first.only[1], 0.5).pvalue)
    assert second.p_value < 0.05 / 22
    assert (second.p_holm, first.p_holm) == pytest.approx((second.p_value * 22, first.p_value * 21))
    assert math.isnan(whole.p_holm)
    base_eval.main(EvalArgs(compare=("one", "two")), World.single_process())
    lines = capsys.readouterr().out.splitlines()
    starred = [line.split()[0] for line in lines if line.rstrip().endswith("*")]
    assert [name for name in starred if name.startswith("t")] == ["t1"]
    assert any("Holm's correction for 22" in line for line in lines)


def test_answers_of_another_scoring_are_refused():
    """A kill between the two files leaves the answers of one checkpoint beside the scores of another."""
    write_run("one", {"a": [1, 0, 1]}, 0.2)
    write_run("two", {"a": [1, 0, 1]}, 0.2)
    path = files.run_dir("two") / "core_predictions.jsonl"
    scores = files.read_json(files.run_dir("two") / "base_eval.json")
    good = path.read_bytes()
    files.write_json(
        files.run_dir("two") / "base_eval.json", scores | {"answers_sha256": sha256(good).hexdigest()}
    )
    compare.compare("one", "two")
    path.write_bytes(good.replace(b'"answer": 1', b'"answer": 0', 1))
    with pytest.raises(UserError, match=r"not the answers .* scripts.base_eval --run two --eval core"):
        compare.compare("one", "two")


@pytest.mark.parametrize(
    ("name", "value"),
    [("sha256", "b" * 64), ("shots", 5), ("delimiter", "\n"), ("type", "schema"), ("baseline_v1", 0.3)],
)
def test_questions_that_were_changed_under_one_name_are_refused(name, value):
    task = {
        "baseline": 0.5,
        "sha256": "a" * 64,
        "shots": 0,
        "delimiter": " ",
        "type": "x",
        "baseline_v1": 0.5,
    }
    write_run("one", {"a": [1, 0]}, 0.2, tasks={"a": task})
    write_run("two", {"a": [1, 0]}, 0.2, tasks={"a": task | {name: value}})
    for ask in (compare.compare, lambda *runs: compare.combine(runs)):
        with pytest.raises(UserError, match=f"'two' was scored with {name} of a="):
            ask("one", "two")
    write_run("two", {"a": [1, 0]}, 0.2, tasks={"a": task}, bundle="another name")
    compare.compare("one", "two")  # the questions say it, whatever the zip is called


def test_scores_that_cropped_nothing_are_alike_whatever_the_limit():
    task = {"baseline": 0.5, "cropped_prompts": 0}
    write_run("one", {"a": [1, 0]}, 0.2, tasks={"a": task}, crop_tokens=2048)  # as older versions wrote
    write_run("two", {"a": [1, 0]}, 0.2, tasks={"a": task}, crop_tokens=None)
    compare.compare("one", "two")
    write_run("two", {"a": [1, 0]}, 0.2, tasks={"a": task | {"cropped_prompts": 1}}, crop_tokens=512)
    with pytest.raises(UserError, match="crop_tokens=512"):
        compare.compare("one", "two")
