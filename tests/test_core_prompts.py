import ast
import json
import random
import re

import pytest

from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import prompts
from nanochat.evaluation.core.bundle import Example, Task

MC = Task("mc", "multiple_choice", 1, "\nAnswer: ", "eval_data/mc.jsonl", 25.0)
SCHEMA = Task("schema", "schema", 1, " ", "eval_data/schema.jsonl", 50.0)
LM = Task("lm", "language_modeling", 1, " ", "eval_data/lm.jsonl", 0.0)


def texts_of(task, item, shots, variant="nanochat"):
    """The whole texts of an example: the context, if any, and the rows."""
    prefix = "".join(prompts.render(task, shot, variant).shot for shot in shots)
    question = prompts.render(task, item, variant)
    context = [] if question.context is None else [(prefix + question.context).strip()]
    return context + [prefix + "".join(texts) for texts in question.rows]


def test_multiple_choice_prompts_keep_the_query_as_it_is():
    shot, item = Example(("2+2? ",), ("3", "4"), 1, 1), Example((" 1+1? ",), ("2", "5"), 0, 2)
    rows = texts_of(MC, item, [shot])
    head = "2+2? \nAnswer: 4\n\n 1+1? \nAnswer: "
    assert rows == [head + "2", head + "5"]


def test_schema_prompts_vary_the_context_and_share_the_continuation():
    shot = Example(("The cat", "The dog"), ("barked.",), 1, 1)
    item = Example(("It rained, so", "It shone, so"), ("we got wet.",), 0, 2)
    assert texts_of(SCHEMA, item, [shot]) == [
        "The dog barked.\n\nIt rained, so we got wet.",
        "The dog barked.\n\nIt shone, so we got wet.",
    ]


def test_language_modeling_prompts_strip_contexts_but_not_continuations():
    shot, item = Example(("\none two ",), (" three ",), 0, 1), Example(("four ",), ("five ",), 0, 2)
    context, row = texts_of(LM, item, [shot])
    assert row == "one two  three \n\nfour five "
    assert context == "one two  three \n\nfour"


def test_shots_are_those_of_sampling_the_list_without_the_example():
    for total, shots, index in [(5, 2, 0), (30, 10, 29), (30, 10, 7), (200, 10, 199), (2117, 10, 1234)]:
        others = [place for place in range(total) if place != index]
        expected = random.Random(1234 + index).sample(others, shots)
        assert prompts.draw_shots(total, shots, "nanochat")[index] == expected


def test_shots_are_clamped_to_the_other_examples():
    for variant in prompts.SEPARATORS:
        assert sorted(prompts.draw_shots(4, 10, variant)[1]) == [0, 2, 3]
        assert prompts.draw_shots(1, 10, variant) == [[]]


def test_a_cut_list_is_the_beginning_of_the_shuffled_one():
    examples = [Example((str(n),), ("x",), 0, n) for n in range(50)]
    expected = list(range(50))
    random.Random(1337).shuffle(expected)
    for count, kept in ((0, expected), (8, expected[:8])):
        [group] = prompts.arrange(examples, count, "nanochat")
        assert [example.line for example in group] == kept
    assert [example.line for example in examples] == list(range(50))


def test_prompts_of_the_real_bundle_equal_nanochats(shared_data):
    """The first example of each task after the second, where it has shots; long ones are abridged."""
    bundle = core_bundle.open_bundle(shared_data / "eval_bundle.zip")
    tasks = {task.label: task for task in core_bundle.load_tasks(bundle)}
    text = (shared_data / "core_rendered_examples.txt").read_text(encoding="utf-8")
    blocks = re.findall(
        r"^##### (\S+) .*\n +nanochat\[0\]: (.*)\n +nanochat\[1\]: (.*)\n", text, re.MULTILINE
    )
    assert len(blocks) == 22
    for label, first, second in blocks:
        task = tasks[label]
        lines = bundle.text(task.member).split("\n", 2)[:2]
        item, shot = (core_bundle._parse_example("f", task, json.loads(line), 1) for line in lines)
        texts = texts_of(task, item, [shot] if task.shots else [])
        # A Python literal each; the second is the end of the text only, and " ... " may stand for a middle.
        first, second = ast.literal_eval(first), ast.literal_eval(second)
        begin, _, end = first.partition(" ... ")
        assert texts[0].startswith(begin), label
        assert texts[0].endswith(end), label
        assert texts[1].endswith(second), label
        if " ... " not in first:
            assert texts[0] == first, label


def test_dclm_keeps_the_order_and_draws_within_categories():
    examples = [Example((str(n),), ("x",), 0, n, "ab"[n % 2]) for n in range(11)]
    groups = prompts.arrange(examples, 0, "dclm")
    assert [[example.line for example in group] for group in groups] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]
    cut = prompts.arrange(examples, 5, "dclm")
    assert [[example.line for example in group] for group in cut] == [[0, 2, 4], [1, 3]]


def test_dclm_draws_from_one_generator_and_never_the_example_itself():
    drawn = prompts.draw_shots(12, 5, "dclm")
    rng = random.Random(1234)
    for index, shots in enumerate(drawn):
        expected = set(rng.sample(range(12), 5))
        if index in expected:
            expected.remove(index)
            while len(expected) < 5:
                other = rng.choice(range(12))
                if other != index:
                    expected.add(other)
        assert shots == list(expected)
        assert index not in shots
        assert len(shots) == 5


def test_prompts_of_the_real_bundle_equal_dclms(shared_data):
    """What the reference file says of llm-foundry: context and answers, tokenized apart."""
    bundle = core_bundle.open_bundle(shared_data / "eval_bundle.zip")
    tasks = {task.label: task for task in core_bundle.load_tasks(bundle)}
    text = (shared_data / "core_rendered_examples.txt").read_text(encoding="utf-8")
    blocks = re.findall(
        r"^##### (\S+) .*\n(?: +nanochat.*\n)+ +foundry *(ctx )?: (.*) \| cont (.*) gold", text, re.MULTILINE
    )
    assert len(blocks) == 22
    for label, is_schema, context, answers in blocks:
        task = tasks[label]
        lines = bundle.text(task.member).split("\n", 2)[:2]
        item, shot = (core_bundle._parse_example("f", task, json.loads(line), 1) for line in lines)
        rows = prompts.render(task, item, "dclm").rows
        before = prompts.render(task, shot, "dclm").last_shot if task.shots else ""
        answers = ast.literal_eval(answers)
        expected = [answers] if isinstance(answers, str) else answers
        if is_schema:
            contexts = [ast.literal_eval(one) for one in ast.literal_eval(context)]
            assert [head for head, _ in rows] == contexts
            assert {tail for _, tail in rows} == set(expected)
            continue
        assert [tail for _, tail in rows] == expected, label
        begin, _, end = ast.literal_eval(context).partition(" ... ")
        for head, _ in rows:
            assert (before + head).startswith(begin), label
            assert (before + head).endswith(end), label


def test_examples_about_one_passage_have_one_number():
    story = (
        "Below is a story.\nIt was a dark night and the rain fell on the town, "
        + "so nobody went out. " * 3
        + "\n"
    )
    other = (
        "Below is a story.\nThe sun was out and the birds sang in all the trees of the park, "
        + "as they do. " * 5
        + "\n"
    )
    contexts = [story + "Who?", other + "Where?", story + "Who?\nHe.\nWhen?", "Short.", "Short too."] + [
        f"Below is a story.\n{n} {'word ' * 30}" for n in range(80)
    ]
    found = prompts.passages([Example((text,), ("x",), 0, n) for n, text in enumerate(contexts)])
    assert found[0] == found[2]
    assert len(set(found)) == len(contexts) - 1


@pytest.mark.slow  # reads all 50 MB
def test_the_stories_and_passages_of_the_real_bundle_are_found(shared_data):
    bundle = core_bundle.open_bundle(shared_data / "eval_bundle.zip")
    count = {}
    for task in core_bundle.load_tasks(bundle):
        examples = core_bundle.load_examples(bundle, task)
        count[task.label] = (len(set(prompts.passages(examples))), len(examples))
    # The public counts: coqa's development set has 500 stories, squad's 2,067 paragraphs.
    assert 495 <= count["coqa"][0] <= 500
    assert 2040 <= count["squad"][0] <= 2067
    assert count["agi_eval_lsat_ar"][0] < 60
    assert count["winograd"][0] < 200
    for label in ("bigbench_dyck_languages", "bigbench_cs_algorithms", "copa", "bigbench_repeat_copy_logic"):
        assert count[label][0] == count[label][1], label
