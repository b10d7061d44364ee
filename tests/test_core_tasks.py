import json
import zipfile

import pytest

from nanochat.common.errors import UserError
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core.bundle import Bundle, Example, Task
from tests.bundles import bundle_of

MC = Task("mc", "multiple_choice", 1, "\nAnswer: ", "eval_data/mc.jsonl", 25.0)
SCHEMA = Task("schema", "schema", 1, " ", "eval_data/schema.jsonl", 50.0)
LM = Task("lm", "language_modeling", 1, " ", "eval_data/lm.jsonl", 0.0)

CORE_YAML = """icl_tasks:
-
  label: mc
  dataset_uri: mc.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
-
  label: lm
  dataset_uri: lm.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
  has_categories: true
"""
META = 'Eval Task,Task Category,Random baseline,Description\nmc,x,25,"a, b"\nlm,x,0,\nother,x,9.1,\n'
TEXTS = {
    "core.yaml": CORE_YAML,
    "eval_meta_data.csv": META,
    "eval_data/mc.jsonl": '{"query": "q", "choices": ["a", "b"], "gold": 1}\n',
    "eval_data/lm.jsonl": '{"context": "c", "continuation": "d", "category": "e"}\n',
}


def changed(**changes):
    names = {"core": "core.yaml", "meta": "eval_meta_data.csv", "mc": "eval_data/mc.jsonl"}
    return bundle_of("b", {**TEXTS, **{names[key]: text for key, text in changes.items()}})


def write_zip(path, root="", texts=TEXTS):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(root + name, text)
    return path


def test_a_folder_a_zip_and_a_zip_with_a_top_folder_read_the_same(tmp_path):
    folder = tmp_path / "bundle"
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    places = [folder, write_zip(tmp_path / "flat.zip"), write_zip(tmp_path / "deep.zip", "eval_bundle/")]
    for place in places:
        bundle = core_bundle.open_bundle(place)
        tasks = core_bundle.load_tasks(bundle)
        assert tasks == [
            Task("mc", "multiple_choice", 2, "\nAnswer: ", "eval_data/mc.jsonl", 25.0),
            Task("lm", "language_modeling", 0, " ", "eval_data/lm.jsonl", 0.0, has_categories=True),
        ]
        assert core_bundle.load_examples(bundle, tasks[0]) == [Example(("q",), ("a", "b"), 1, 1)]
        assert core_bundle.load_examples(bundle, tasks[1]) == [Example(("c",), ("d",), 0, 1, "e")]


def test_a_missing_bundle_a_cut_zip_and_paths_out_of_it_are_refused(tmp_path):
    good = write_zip(tmp_path / "good.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(good[: len(good) // 2])
    write_zip(tmp_path / "evil.zip", texts={**TEXTS, "../outside.txt": "x"})
    write_zip(tmp_path / "none.zip", texts={"a.txt": "x"})
    (tmp_path / "empty").mkdir()
    expected = {
        "absent.zip": "no such eval bundle",
        "cut.zip": "not a complete zip",
        "evil.zip": "leads out of it",
        "none.zip": "expected one core.yaml",
        "empty": "no core.yaml",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            core_bundle.open_bundle(tmp_path / name)


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored, so that the text can be found and changed
        for name, text in TEXTS.items():
            archive.writestr(name, text)
    path.write_bytes(path.read_bytes().replace(b'"gold": 1', b'"gold": 0'))
    bundle = core_bundle.open_bundle(path)
    with pytest.raises(UserError, match=r"bundle.zip/eval_data/mc.jsonl: damaged"):
        core_bundle.load_examples(bundle, core_bundle.load_tasks(bundle)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"core": "a: [1"}, r"b/core.yaml: not valid YAML"),
        ({"core": "tasks: 1"}, r"b/core.yaml: expected a list of tasks"),
        ({"core": CORE_YAML.replace("label: lm", "label: mc")}, r"'mc' stands there twice"),
        ({"core": CORE_YAML.replace("language_modeling", "poetry")}, r"task 'lm': icl_task_type is 'poetry'"),
        ({"core": CORE_YAML.replace("mc.jsonl", "../mc.jsonl")}, r"task 'mc': dataset_uri"),
        ({"core": CORE_YAML.replace("[2]", "[-1]")}, r"task 'mc': num_fewshot is -1"),
        ({"core": CORE_YAML.replace("label: lm", "label: new")}, r"task 'new': .* no random baseline"),
        ({"core": CORE_YAML.replace("label: lm", "lable: lm")}, r"task 2 has no label"),
        ({"meta": META.replace("x,25", "x,guess")}, r"eval_meta_data.csv:2: .*'mc' is 'guess'"),
        ({"meta": META.replace("x,9.1", "x,100")}, r"eval_meta_data.csv:4: .*'other' is '100'"),
    ],
)
def test_a_faulty_task_list_is_one_clear_error(change, message):
    with pytest.raises(UserError, match=message):
        core_bundle.load_tasks(changed(**change))


GOOD_LINE = TEXTS["eval_data/mc.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "choices": ["a"', "not valid JSON"),
        ("[1]", "it is a list, expected an object"),
        ('{"choices": ["a"], "gold": 0}', "query is null, expected a text"),
        ('{"query": "q", "choices": [], "gold": 0}', "choices is empty"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', "choices is empty, or a text in it is"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2, expected a number from 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "gold is True"),
    ],
)
def test_a_faulty_example_is_named_by_file_and_line(line, message):
    bundle = changed(mc=GOOD_LINE + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"b/eval_data/mc.jsonl:3: .*{message}"):
        core_bundle.load_examples(bundle, MC)


def test_other_faults_of_task_files_are_named():
    with pytest.raises(UserError, match=r"b/eval_data/schema.jsonl: the file is missing"):
        core_bundle.load_examples(changed(), SCHEMA)
    with pytest.raises(UserError, match=r"b/eval_data/mc.jsonl: holds no examples"):
        core_bundle.load_examples(changed(mc="\n"), MC)
    with pytest.raises(UserError, match="continuation is empty"):
        core_bundle._parse_example("f:1", LM, {"context": "a", "continuation": " "}, 1)
    with pytest.raises(UserError, match="byte 1 is not UTF-8"):
        Bundle("b", lambda _: [b"a\xff"]).text("eval_data/mc.jsonl")


def test_texts_are_kept_exactly_and_only_newlines_end_a_line():
    query = " a\u2028b\x0cc\n "
    bundle = changed(mc=json.dumps({"query": query, "choices": [" x", "y "], "gold": 0}, ensure_ascii=False))
    assert core_bundle.load_examples(bundle, MC) == [Example((query,), (" x", "y "), 0, 1)]


@pytest.mark.slow  # reads all 50 MB
def test_the_real_bundle_has_22_tasks_and_91037_examples(shared_data):
    bundle = core_bundle.open_bundle(shared_data / "eval_bundle.zip")
    tasks = core_bundle.load_tasks(bundle)
    assert len(tasks) == 22
    assert sum(len(core_bundle.load_examples(bundle, task)) for task in tasks) == 91_037
    assert {task.label: task.baseline_percent for task in tasks}["boolq"] == 62
