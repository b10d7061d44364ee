import json
import math

import pytest

from nanochat import base_eval, core_compare, files
from nanochat.config import EvalArgs
from nanochat.core_results import GPT2_ACCURACY
from nanochat.errors import UserError
from nanochat.world import World


def write_run(name, answers, core, **changes):
    """A scored run: answers[task] are 1 or 0, passages are pairs of examples."""
    folder = files.run_dir(name)
    tasks = {label: {"baseline": 0.5 if label == "a" else 0.0, "accuracy": 0.5} for label in answers}
    scores = {
        "core_metric": core,
        "core_variant": "nanochat",
        "bundle": "b",
        "crop_tokens": 9,
        "max_per_task": 0,
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
            "passage": n // 2,
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
    whole, a, b = core_compare.compare("one", "two")
    assert (a.first, a.second, a.pairs) == (pytest.approx(2 / 6), pytest.approx(5 / 6), 6)
    assert (a.only_first, a.only_second) == (0, 3)
    assert (b.only_first, b.only_second) == (1, 0)
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
    assert all((row.stderr, row.p_value) == (0, 1) for row in core_compare.compare("one", "two"))


def test_runs_that_were_asked_other_questions_are_refused():
    write_run("one", {"a": [1, 0]}, 0.2)
    for changes, message in [
        ({"core_variant": "dclm"}, "'two' was scored with core_variant=dclm, run 'one' with nanochat"),
        ({"crop_tokens": 8}, "crop_tokens=8"),
        ({"tasks": {"b": {"baseline": 0}}}, "different tasks"),
    ]:
        write_run("two", {"a": [1, 0]}, 0.2, **changes)
        with pytest.raises(UserError, match=message):
            core_compare.compare("one", "two")
    write_run("two", {"a": [1, 0, 1]}, 0.2)
    with pytest.raises(UserError, match="different examples"):
        core_compare.compare("one", "two")


def test_a_run_that_was_not_scored_is_named_with_the_command_that_scores_it():
    write_run("one", {"a": [1, 0]}, 0.2)
    with pytest.raises(UserError, match="'none'.*scripts.base_eval --run none --eval core"):
        core_compare.compare("one", "none")
    write_run("two", {"a": [1, 0]}, None)
    with pytest.raises(UserError, match="holds no CORE"):
        core_compare.compare("one", "two")
    write_run("two", {"a": [1, 0]}, 0.2)
    (files.run_dir("two") / "core_predictions.jsonl").unlink()
    with pytest.raises(UserError, match="holds no answers"):
        core_compare.compare("one", "two")


def test_seeds_are_combined_with_the_verdict_of_few(capsys):
    answers = {label: [1, 0] for label in GPT2_ACCURACY}
    for name, core in zip(("s0", "s1", "s2"), (0.2525, 0.2625, 0.2725), strict=True):
        write_run(name, answers, core)
    found = core_compare.combine(["s0", "s1", "s2"])
    assert (found.mean, found.stderr) == (pytest.approx(0.2625), pytest.approx(0.01 / math.sqrt(3)))
    # t = 0.005975 / 0.0057735 with two degrees of freedom: 0.5 + t / (2 sqrt(2 + t^2)).
    t = (0.2625 - 0.256525) / (0.01 / math.sqrt(3))
    assert f"{0.5 + t / (2 * math.sqrt(2 + t * t)):.3f}" in found.verdict
    base_eval.main(EvalArgs(combine=("s0", "s1", "s2")), World.solo())
    assert "0.2625 +- 0.0058" in capsys.readouterr().out
    for runs in (["s0"], ["s0", "s0"]):
        with pytest.raises(UserError, match="two or more different runs"):
            core_compare.combine(runs)


def test_the_comparison_is_printed(capsys):
    write_run("one", {"a": [1, 0, 1, 0, 0, 0]}, 0.2)
    write_run("two", {"a": [1, 1, 1, 1, 0, 0]}, 0.5)
    base_eval.main(EvalArgs(compare=("one", "two")), World.solo())
    printed = capsys.readouterr().out
    assert "CORE of two is +0.3000" in printed
    with pytest.raises(UserError, match="expected two runs"):
        base_eval.main(EvalArgs(compare=("one",)), World.solo())
