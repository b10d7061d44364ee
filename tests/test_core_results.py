import csv
import doctest
import json
import math

import pytest

from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import results as core_results
from nanochat.evaluation.core.bundle import Example, Task
from nanochat.evaluation.core.results import CoreResult, Prediction, TaskScore, centre, choose
from nanochat.evaluation.core.statistics import Stratum


def score(label, baseline, correct, examples, cropped=0, passages=None):
    stratum = Stratum.of([1.0] * correct + [0.0] * (examples - correct), passages or range(examples))
    task = Task(label, "multiple_choice", 0, " ", f"eval_data/{label}", baseline)
    return TaskScore(task, "0f" * 32, examples, (stratum,), cropped, 0, {})


def result_of(*tasks, variant="nanochat", predictions=(), faults=None):
    return CoreResult("b", variant, tuple(tasks), tuple(predictions), 512, 512, 1.0, {}, 0, 0, faults or {})


def gpt2_row(bundle, name, cap):
    """The task scores of one of the csv files in the bundle, with the counts they came from."""
    rows = csv.reader(bundle.text(f"openai-community-gpt2{name}.csv").splitlines()[1:])
    accuracies = {label.strip(): float(accuracy) for label, accuracy, _ in rows if accuracy.strip()}
    scores = []
    for task in core_bundle.load_tasks(bundle):
        total = b"".join(bundle.pieces(task.member)).count(b"\n")
        n = min(total, cap) if cap else total
        correct = round(accuracies[task.label] * n)
        assert correct / n == pytest.approx(accuracies[task.label], abs=6e-7)
        scores.append(score(task.label, task.baseline_percent, correct, n))
    return scores


@pytest.mark.parametrize(
    ("name", "cap", "v1", "v2", "stderr"),
    [
        ("", 0, 0.113891, 0.088095, 0.0063),
        ("-medium", 1000, 0.184903, 0.158706, 0.0070),
        ("-large", 1000, 0.214641, 0.189887, 0.0070),
        ("-xl", 1000, 0.256525, 0.230890, 0.0071),
    ],
)
def test_core_of_gpt2_is_reproduced_from_its_accuracies(shared_data, name, cap, v1, v2, stderr):
    scores = gpt2_row(core_bundle.open_bundle(shared_data / "eval_bundle.zip"), name, cap)
    result = result_of(*scores)
    assert core_results.is_core(task.label for task in result.tasks)
    assert result.core_metric == pytest.approx(v1, abs=1e-6)
    assert (result.core(1), result.core(2)) == (result.core_metric, pytest.approx(v2, abs=1e-6))
    assert result.core_stderr == pytest.approx(stderr, abs=5e-5)
    boot = result.core_bootstrap
    assert boot["stderr"] == pytest.approx(result.core_stderr, rel=0.04)
    assert boot["low"] == pytest.approx(v1 - 1.96 * stderr, abs=1e-3)
    assert boot["high"] == pytest.approx(v1 + 1.96 * stderr, abs=1e-3)
    assert result_of(*scores, variant="dclm").core_metric == result.core(2)


def test_the_table_of_gpt2_is_that_of_the_bundle(shared_data):
    bundle = core_bundle.open_bundle(shared_data / "eval_bundle.zip")
    for place, (name, cap) in enumerate([("", 0), ("-xl", 1000)]):
        for task in gpt2_row(bundle, name, cap):
            assert core_results.gpt2_accuracy()[task.label][place] == pytest.approx(task.accuracy, abs=1e-6)


def test_the_verdict_is_only_for_core_by_nanochats_prompts():
    labels = list(core_results.gpt2_accuracy())
    # One error above the bar, where the error is that of both: sqrt(0.006^2 + 0.0029^2).
    said = core_results.verdict(labels, "nanochat", 0.256525 + math.hypot(0.006, 0.0029), 0.006)
    assert said.startswith(
        "above the 0.256525 +- 0.0029 of GPT-2 1558M with probability 0.841 (these weights "
    )
    assert "another seed of the recipe is not in it" in said
    assert core_results.verdict(labels, "nanochat", 0.1, 0.006).startswith("below the 0.256525")
    assert core_results.verdict(labels[1:], "nanochat", 0.3, 0.006) == ""
    assert core_results.verdict(labels, "dclm", 0.3, 0.006) == ""
    assert core_results.verdict(labels, "nanochat", None, None) == ""


def test_without_a_task_there_is_no_core():
    fields = result_of(score("a", 0, 3, 6), faults={"b": "b.jsonl:1: bad"}).as_dict()
    assert {fields[name] for name in ("core_metric", "core_stderr", "core_v1", "core_v2")} == {None}
    assert fields["faults"] == {"b": "b.jsonl:1: bad"}
    assert fields["tasks"]["a"]["accuracy"] == 0.5


def test_categories_count_alike():
    answers = [Prediction("t", n, n, (1.0,), int(n < 2), 1, 0, n, "ab"[n > 3]) for n in range(5)]
    examples = [Example(("q",), ("a",), 0, n) for n in range(5)]
    asked = Task("t", "language_modeling", 0, " ", "eval_data/t", 0.0)
    task = core_results.score_task(asked, "", examples, answers)
    # Category a: 2 of 4; b: 0 of 1. Errors: 0.25 / 4 and 0.
    assert task.accuracy == pytest.approx(0.25)
    assert task.stderr == pytest.approx(math.sqrt(0.25 / 4) / 2)


def test_core_and_its_error_by_hand():
    # 60 of 100 with a baseline of 20 %: (0.6 - 0.2) / 0.8 = 0.5; its error sqrt(0.24 / 100) / 0.8.
    # 25 of 50 with a baseline of 0: 0.5; its error sqrt(0.25 / 50).
    result = result_of(
        score("a", 20, 60, 100),
        score("b", 0, 30, 50, cropped=3),
    )
    assert result.core_metric == pytest.approx((0.5 + 0.6) / 2)
    assert result.core_stderr == pytest.approx(math.sqrt(0.0024 / 0.64 + 0.0048) / 2)
    fields = result.as_dict()["tasks"]
    assert fields["a"]["accuracy"] == pytest.approx(0.6)
    assert fields["a"]["centered"] == pytest.approx(0.5)
    assert fields["a"]["stderr"] == pytest.approx(math.sqrt(0.0024))
    assert (fields["a"]["examples"], fields["b"]["cropped_prompts"]) == (100, 3)


def test_the_random_baseline_is_zero_and_worse_is_negative():
    assert centre(0.25, 25) == pytest.approx(0)
    assert centre(0.62, 62) == pytest.approx(0)
    assert centre(0.5, 62) == pytest.approx(-0.12 / 0.38)


def test_the_least_loss_wins_and_ties_go_to_the_first():
    assert choose([3.0, 1.0, 2.0]) == 1
    assert choose([1.0, 2.0, 1.0]) == 0


def test_an_empty_span_wins_only_when_it_comes_first():
    for losses in ([math.nan, 1.0], [1.0, math.nan, 0.5], [2.0, math.nan, 3.0], [math.nan, math.nan]):
        # Python's own min compares with < and keeps the first: what karpathy/nanochat does.
        assert choose(losses) == losses.index(min(losses))


def test_predictions_are_one_json_object_a_line():
    predictions = (
        Prediction("mc", 0, 7, (1.25, math.nan), 0, 1, 1, 5),
        Prediction("lm", 1, 2, (0.1234567,), -1, 0, 0, 6, "ART"),
    )
    lines = result_of(predictions=predictions).predictions_jsonl().splitlines()
    assert json.loads(lines[0]) == {
        "task": "mc",
        "index": 0,
        "line": 7,
        "losses": [1.25, None],
        "answer": 0,
        "gold": 1,
        "cropped": 1,
        "passage": 5,
    }
    assert json.loads(lines[1])["losses"] == [0.123457]
    assert json.loads(lines[1])["category"] == "ART"


def test_examples_in_the_docstrings_hold():
    results = doctest.testmod(core_results)
    assert (results.attempted > 3, results.failed) == (True, 0)


def test_no_right_answer_is_no_proof_of_none():
    fields = result_of(score("a", 0, 0, 32), score("b", 0, 50, 100)).as_dict()["tasks"]
    assert fields["a"]["stderr"] == 0
    assert fields["a"]["interval"] == pytest.approx((0, 0.10718), abs=1e-4)
    assert fields["b"]["interval"] == pytest.approx((0.4038, 0.5962), abs=1e-4)
    passages = result_of(score("a", 0, 0, 32, passages=[n // 8 for n in range(32)])).as_dict()["tasks"]
    assert passages["a"]["interval"][1] > 0.4  # four stories, not 32 draws
