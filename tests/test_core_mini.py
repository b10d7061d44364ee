import random
import sys

import pytest

from dev import mini_bundle
from nanochat.common.errors import UserError
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core.evaluate import find_bundle

SOURCE = '''
from collections import deque, OrderedDict
from os.path import *
from . import sibling

class Box:
    """A box that holds up to three things. It is small.

    More.
    """

    def open(self):
        """Too short."""
        # the lid is heavy
        # and the lock is old
        return deque()
'''


def test_the_suite_has_100_examples_or_more_of_each_type():
    bundle = find_bundle("mini")
    counts = dict.fromkeys(core_bundle.LINE, 0)
    tasks = core_bundle.load_tasks(bundle)
    for task in tasks:
        counts[task.kind] += len(core_bundle.load_examples(bundle, task))
    assert min(counts.values()) >= 100
    assert {task.shots for task in tasks} == {0, 1, 2, 3}
    assert {task.delimiter for task in tasks} > {" "}


def test_the_generator_gives_the_same_suite_each_time_in_the_format_of_the_library():
    """The files in the library are of another Python, perhaps."""
    texts, bundle = mini_bundle.build(), find_bundle("mini")
    assert mini_bundle.build() == texts
    tasks = core_bundle.load_tasks(bundle)
    assert {"core.yaml", "eval_meta_data.csv", *(task.member for task in tasks)} == set(texts)
    if sys.version.startswith("3.11.7 "):
        assert {name: b"".join(bundle.pieces(name)).decode() for name in texts} == texts


def test_choices_differ_and_the_right_one_is_anywhere():
    bundle = find_bundle("mini")
    for task in core_bundle.load_tasks(bundle):
        examples = core_bundle.load_examples(bundle, task)
        assert all(len(set(example.contexts)) == len(example.contexts) for example in examples)
        assert all(len(set(example.continuations)) == len(example.continuations) for example in examples)
        options = max(len(examples[0].contexts), len(examples[0].continuations))
        for place in range(options):
            share = sum(example.gold == place for example in examples) / len(examples)
            assert abs(share - 1 / options) < 0.15, (task.label, place)
        if options > 1:
            assert task.baseline_percent == 100 / options


def test_material_is_read_from_the_syntax_tree():
    material = mini_bundle.gather([SOURCE, SOURCE, "def broken(:"])
    assert material.imports == {("collections", "deque"): 2, ("collections", "OrderedDict"): 2}
    assert material.docs == [("class Box:", "A box that holds up to three things")] * 2
    assert material.pairs[("        # the lid is heavy", "        # and the lock is old")] == 2


def test_the_last_word_of_a_repeated_line_is_asked_for():
    records = mini_bundle._repeated_comment(mini_bundle.gather([SOURCE, SOURCE]), random.Random(0))
    assert records == [
        {"context": "# the lid is heavy\n        # and the lock is", "continuation": "old"},
    ]


def test_an_installation_without_sources_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_bundle.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="core_mini: only 0 examples"):
        mini_bundle.build()
