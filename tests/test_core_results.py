import csv
import doctest
import json
import math

import pytest

from nanochat import core_results, core_tasks
from nanochat.core_results import CoreResult, Prediction, TaskScore, centre, choose


def result_of(*tasks):
    return CoreResult("b", tuple(tasks), (), 512, 1.0)


def gpt2_row(bundle, name, cap):
    """The task scores of one of the csv files in the bundle, with the counts they came from."""
    rows = csv.reader(bundle.text(f"openai-community-gpt2{name}.csv").splitlines()[1:])
    accuracies = {label.strip(): float(accuracy) for label, accuracy, _ in rows if accuracy.strip()}
    scores = []
    for task in core_tasks.load_tasks(bundle):
        total = bundle.read(task.member).count(b"\n")
        n = min(total, cap) if cap else total
        correct = round(accuracies[task.label] * n)
        assert correct / n == pytest.approx(accuracies[task.label], abs=6e-7)
        scores.append(TaskScore(task.label, task.kind, task.shots, task.baseline_percent, n, correct, 0))
    return result_of(*scores)


@pytest.mark.parametrize(
    ("name", "cap", "core", "stderr"),
    [
        ("", 0, 0.113891, 0.0063),
        ("-medium", 1000, 0.184903, 0.0070),
        ("-large", 1000, 0.214641, 0.0070),
        ("-xl", 1000, 0.256525, 0.0071),
    ],
)
def test_core_of_gpt2_is_reproduced_from_its_accuracies(shared_data, name, cap, core, stderr):
    bundle = core_tasks.open_bundle(shared_data / "eval_bundle.zip")
    result = gpt2_row(bundle, name, cap)
    assert len(result.tasks) == 22
    assert result.core_metric == pytest.approx(core, abs=1e-6)
    assert result.core_stderr == pytest.approx(stderr, abs=5e-5)


def test_core_and_its_error_by_hand():
    # 60 of 100 with a baseline of 20 %: (0.6 - 0.2) / 0.8 = 0.5; its error sqrt(0.24 / 100) / 0.8.
    # 25 of 50 with a baseline of 0: 0.5; its error sqrt(0.25 / 50).
    result = result_of(
        TaskScore("a", "multiple_choice", 0, 20, 100, 60, 0),
        TaskScore("b", "language_modeling", 0, 0, 50, 30, 3),
    )
    assert result.core_metric == pytest.approx((0.5 + 0.6) / 2)
    assert result.core_stderr == pytest.approx(math.sqrt(0.0024 / 0.64 + 0.0048) / 2)
    fields = result.as_dict()["tasks"]
    assert fields["a"]["accuracy"] == pytest.approx(0.6)
    assert fields["a"]["centered"] == pytest.approx(0.5)
    assert fields["a"]["stderr"] == pytest.approx(math.sqrt(0.0024))
    assert (fields["a"]["examples"], fields["b"]["cropped_prompts"]) == (100, 3)


def test_guessing_is_zero_and_worse_is_negative():
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
        Prediction("mc", 0, 7, (1.25, math.nan), 0, 1, 1),
        Prediction("lm", 1, 2, (0.1234567,), -1, 0, 0),
    )
    lines = CoreResult("b", (), predictions, 512, 1.0).predictions_jsonl().splitlines()
    assert json.loads(lines[0]) == {
        "task": "mc",
        "index": 0,
        "line": 7,
        "losses": [1.25, None],
        "answer": 0,
        "gold": 1,
        "cropped": 1,
    }
    assert json.loads(lines[1])["losses"] == [0.123457]


def test_examples_in_the_docstrings_hold():
    results = doctest.testmod(core_results)
    assert (results.attempted > 3, results.failed) == (True, 0)
