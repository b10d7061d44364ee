"""report.html: one file, from whatever a run has left, with nothing in it that a run could smuggle in."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nanochat.common import charts, files, run_files
from nanochat.common.errors import UserError
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.evaluation.core.results import gpt2_accuracy
from nanochat.report import RunFiles, render, write_report
from scripts import report as report_command

RUN = "r1"
VOID = {"meta", "br", "hr", "link", "img"}


class Page(HTMLParser):
    """The elements and text of a page; fails where a tag is left open or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def step_entry(step: int, batch_tokens: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "loss": loss,
        "smoothed_loss": loss,
        "lr": 0.02,
        "grad_norm": 1.5,
        "tokens_per_second": 5000.0,
        "tokens": (step + 1) * batch_tokens,
    }


@pytest.fixture
def run(base_dir: Path) -> Path:
    """A run that has started: the plan and some metrics."""
    plan = planning.plan(TrainArgs(depth=4, run=RUN, num_iterations=40), vocab_size=8192)
    folder = files.run_dir(RUN)
    files.write_json(folder / "config.json", {**plan.to_dict(), "machine": {"device": "Abacus 7"}})
    entries: list[dict[str, Any]] = [{"kind": "eval", "step": 0, "val_bpb": 3.25, "train_seconds": 0.0}]
    entries += [step_entry(step, plan.batch_tokens, 9.0 - step / 10) for step in range(40)]
    entries += [{"kind": "eval", "step": 40, "val_bpb": 1.75, "train_seconds": 60.0}]
    entries += [{"kind": "sample", "step": 20, "text": "an early sample"}]
    entries += [{"kind": "sample", "step": 40, "text": "a last <script>alert(1)</script> & sample"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return folder


def task(centered: float, accuracy: float = 0.5) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "centered": centered,
        "stderr": 0.02,
        "examples": 100,
        "baseline": 0.25,
        "shots": 0,
        "type": "multiple_choice",
    }


def write_scores(folder: Path, bundle: str, tasks: int, core: float = 0.3, **changes: Any) -> None:
    labels = list(gpt2_accuracy()) if tasks == 22 else [f"task_{i}" for i in range(tasks)]
    scores: dict[str, Any] = {
        "core_metric": core,
        "core_stderr": 0.005,
        "bundle": bundle,
        "core_variant": "nanochat",
        "tasks": {label: task(core) for label in labels},
        "bpb": {"train": 1.7, "val": 1.75},
        **changes,
    }
    files.write_json(folder / "base_eval.json", scores)


def finish(folder: Path) -> None:
    summary = {
        "status": "finished",
        "steps": 40,
        "tokens": 20_971_520,
        "val_bpb": 1.75,
        "min_val_bpb": 1.75,
        "train_seconds": 60.0,
        "tokens_per_second": 5000.0,
        "mfu": 0.25,
        "peak_memory_bytes": 2_500_000_000,
    }
    files.write_json(folder / "summary.json", summary)


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def test_a_finished_and_scored_run_shows_its_numbers(run: Path) -> None:
    finish(run)
    write_scores(run, "core_mini", 3)
    path = write_report(RUN)
    assert path == run / "report.html"
    page = Page(text_of(path)).text
    for shown in ("1.7500", "21.0 M", "1.0 min", "25.0%", "2.50 GB", "Abacus 7", "finished after 40 of 40"):
        assert shown in page
    for label in ("task_0", "task_2", "50.0%", "0.300", "Depth 4, width 256"):
        assert label in page


def test_the_page_is_one_file_without_scripts_or_outside_resources(run: Path) -> None:
    finish(run)
    write_scores(run, "core_mini", 3)
    page = Page(text_of(write_report(RUN)))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "image"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in text_of(run / "report.html")
    assert not re.search(r"url\((?!#)", text_of(run / "report.html"))


def test_what_comes_from_the_run_is_escaped(run: Path) -> None:
    files.write_json(
        run / "base_eval.json",
        {"core_metric": 0.1, "core_stderr": 0.1, "bundle": "<b>x", "tasks": {"<i>t": task(0.1)}},
    )
    text = text_of(write_report(RUN))
    assert "alert(1)" in text
    for raw in ("<script>", "<b>x", "<i>t"):
        assert raw not in text


def test_only_the_last_samples_are_shown(run: Path) -> None:
    page = Page(text_of(write_report(RUN))).text
    assert "a last <script>" in page
    assert "an early sample" not in page


def test_a_run_that_is_not_over_and_not_scored_has_a_report_that_says_so(run: Path) -> None:
    page = Page(text_of(write_report(RUN))).text
    assert "not at its end yet, 40 of 40 steps logged" in page
    assert f"python -m scripts.base_eval --run {RUN}" in page


def test_a_run_without_any_metric_yet_has_a_report(run: Path) -> None:
    (run / "metrics.jsonl").write_text("", "utf-8")
    page = Page(text_of(write_report(RUN))).text
    assert "0 of 40 steps logged" in page
    assert "Nothing measured" in page


def test_curves_are_drawn_over_tokens_with_distinct_identifiers(run: Path) -> None:
    pytest.importorskip("matplotlib")
    text = text_of(write_report(RUN))
    page = Page(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 5  # loss, bpb, learning rate, throughput, norm
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in identifiers
    assert "million tokens" in page.text
    assert charts.INK not in text


def test_bars_with_errors_are_drawn_for_the_tasks(run: Path) -> None:
    pytest.importorskip("matplotlib")
    write_scores(run, "core_mini", 3)
    page = Page(text_of(write_report(RUN)))
    assert sum(tag == "svg" for tag, _ in page.tags) == 6
    assert "centered accuracy" in page.text


def test_a_name_is_drawn_as_it_is_and_adds_no_element() -> None:
    pytest.importorskip("matplotlib")
    names = ["$\\frac$", "<b>&\"'"]
    drawn = Page(charts.bar_chart("c", names, [0.5, 0.25], [0.0, 0.0], "label"))
    assert all(name in drawn.text for name in names)
    assert not any(tag == "b" for tag, _ in drawn.tags)


def test_a_chart_is_a_file_of_its_own_too() -> None:
    pytest.importorskip("matplotlib")
    chart = charts.line_chart("c", [charts.Series("s", [0.0, 1.0], [1.0, 2.0])], "x", "y")
    root = ElementTree.fromstring(chart)
    assert root.attrib["color"] == charts.LONE_INK
    assert charts.INK not in chart
    assert "currentColor" in chart
    assert not [line for line in chart.splitlines() if line != line.rstrip()]


def test_without_matplotlib_the_curves_are_tables_and_it_says_how_to_get_plots(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_scores(run, "core_mini", 3)
    page = Page(text_of(write_report(RUN)))
    assert not any(tag == "svg" for tag, _ in page.tags)
    assert 'pip install "nanochat[plots]"' in page.text
    assert "9.0000" in page.text  # the first loss
    assert "5.1000" in page.text  # the last
    assert "3.2500" in page.text


def test_core_of_the_real_suite_is_compared_to_gpt2(run: Path) -> None:
    write_scores(run, "eval_bundle", 22, core=0.2665)
    text = text_of(write_report(RUN))
    assert (
        "This is above the 0.256525 +- 0.0029 of GPT-2 1558M with probability 0.958 (these weights"
        in Page(text).text
    )
    assert not charts.available() or "GPT-2 124M" in text


def test_the_other_variant_is_not_compared_and_both_tables_of_baselines_are_named(run: Path) -> None:
    write_scores(run, "eval_bundle", 22, core=0.2665, core_variant="dclm", core_v1=0.2912, core_v2=0.2665)
    text = Page(text_of(write_report(RUN))).text
    assert "0.256525" not in text
    assert "prompts of dclm" in text
    assert "it is 0.2912, by the corrected one 0.2665" in text


def test_bits_per_byte_are_shown_by_position_and_by_document(run: Path) -> None:
    places = {"positions": [[1, 1, 3.5], [2, 3, 2.25]], "documents": [0, 1, 3], "documents_step": 0.1}
    write_scores(run, "core_mini", 3, bpb_profile={"train": places, "val": places})
    text = text_of(write_report(RUN))
    assert "Bits per byte by position" in text
    assert "Documents by bits per byte" in text
    assert charts.available() or "2.2500" in text


def test_where_a_task_is_missing_no_core_is_shown(run: Path) -> None:
    write_scores(run, "b", 3, core_metric=None, core_stderr=None, faults={"squad": "squad.jsonl:1: bad"})
    assert "CORE is not reported: squad could not be read." in Page(text_of(write_report(RUN))).text


def test_trivial_baselines_show_scores_without_a_model(run: Path) -> None:
    controls = {"majority": 0.4, "longest": 0.25, "shortest": 0.1}
    tasks = {"mc": task(0.3) | {"controls": controls}, "lm": task(0.3)}
    files.write_json(run / "base_eval.json", {"core_metric": 0.3, "core_stderr": 0.1, "tasks": tasks})
    text = Page(text_of(write_report(RUN))).text
    assert "Trivial baselines" in text
    # (0.4 - 0.25) / 0.75 for one task and 0 for the other.
    assert "0.1000" in text
    assert "40.0%" in text


@pytest.mark.parametrize(("bundle", "tasks"), [("core_mini", 3), ("eval_bundle", 5)])
def test_another_suite_is_never_compared_to_gpt2(run: Path, bundle: str, tasks: int) -> None:
    write_scores(run, bundle, tasks, core=0.9)
    text = text_of(write_report(RUN))
    assert "GPT-2" not in text
    assert "not comparable" in text


def test_the_commonest_answer_is_counted_by_task(run: Path) -> None:
    write_scores(run, "core_mini", 2)
    lines = [{"task": "task_0", "losses": [1.0, 2.0], "answer": answer, "gold": 0} for answer in (0, 0, 0, 1)]
    lines.append({"task": "task_1", "losses": [1.0], "answer": 0, "gold": 0})
    (run / "core_predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), "utf-8")
    page = Page(text_of(write_report(RUN))).text
    assert "commonest answer" in page
    assert "75%" in page


def test_a_loss_that_is_not_finite_does_not_break_the_curve(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": 40, "loss": NaN, "smoothed_loss": NaN}\n')
    curve = RunFiles.read(RUN).curve("step", "loss", "loss")
    assert len(curve.x) == 40
    assert not re.search(r"\bnan\b", render(RunFiles.read(RUN)).lower())


def test_made_again_it_replaces_the_old_one_and_leaves_nothing_beside_it(run: Path) -> None:
    first = text_of(write_report(RUN))
    finish(run)
    assert text_of(write_report(RUN)) != first
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_the_same_files_give_the_same_report(run: Path) -> None:
    assert text_of(write_report(RUN)) == text_of(write_report(RUN))


def test_an_unknown_run_is_named() -> None:
    with pytest.raises(UserError, match="'nowhere'"):
        write_report("nowhere")
    assert not files.run_dir("nowhere").exists()


def test_a_damaged_file_is_named_and_no_report_is_written(run: Path) -> None:
    (run / "base_eval.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match=r"base_eval\.json"):
        write_report(RUN)
    assert not (run / "report.html").exists()


def finetuned(folder: Path, stage: str) -> None:
    """Let the run be one of SFT or RL, with the lines that such a run has logged and no others."""
    config = json.loads((folder / "config.json").read_text())
    config["finetune"] = {"stage": stage, "base": "d12", "base_step": 1234, "settings": {}}
    files.write_json(folder / "config.json", config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "step"]
    for line in lines:
        line |= {"reward": line["step"] / 40, "kl": 0.25} if stage == "rl" else {}
    for source in ("made", "smoltalk", "x1", "x2", "x3") if stage == "sft" else ():
        lines += [
            {"kind": "chat_val", "step": at, "source": source, "bpb": 0.5, "loss": 1.0} for at in (0, 40)
        ]
    lines += [{"kind": "chat_eval", "step": at, "scores": {"calc": 0.1 + at / 100}} for at in (0, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


CHAT_TASK = {
    "examples": 400,
    "unjudged": 0,
    "too_long": 0,
    "baseline": 0.25,
    "accuracy": 0.625,
    "stderr": 0.024,
    "interval": [0.577, 0.671],
    "centered": 0.5,
    "commonest": 0.34,
    "pass_at": {},
}


def write_chat_scores(folder: Path) -> None:
    unjudged = CHAT_TASK | dict.fromkeys(("accuracy", "stderr", "interval", "centered")) | {"unjudged": 164}
    scores = {
        "step": 40,
        "settings": {"temperature": 0.0},
        "tasks": {"choice": CHAT_TASK, "humaneval": unjudged, "<i>t": CHAT_TASK},
        "means": {"MADE": {"value": 0.4321, "stderr": 0.0123, "low": 0.4, "high": 0.5}, "ChatCORE": None},
        "answers_sha256": "0",
    }
    files.write_json(folder / "chat_eval.json", scores)
    parts = [("python", "1+2"), ("python_output", "3"), ("text", "It is 3 <script>.")]
    answer = {
        "task": "calc",
        "id": "calc-7",
        "sample": 0,
        "judge": "number",
        "prompt": "What is <b>1 + 2?",
        "reply": [{"type": kind, "text": text} for kind, text in parts],
        "right": True,
        "sampled": 9,
        "reason": "stop",
    }
    wrong = [{"text": f"wrong {number}", "type": "text"} for number in range(2)]
    answers = [answer, answer | {"id": "calc-8"}, *(answer | {"right": False, "reply": [w]} for w in wrong)]
    answers.append(answer | {"task": "humaneval", "right": None})
    (folder / "chat_answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))


def test_a_run_of_sft_shows_what_it_began_with_and_its_curves(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "available", lambda: False)
    finetuned(run, "sft")
    page = Page(text_of(write_report(RUN))).text
    assert "SFT of run d12, step 1,234" in page
    assert page.count("Validation on replies, by source") == 2  # four curves, and the fifth
    for shown in ("smoltalk, bits per byte", "calc, accuracy", "Tasks while training"):
        assert shown in page
    assert "Reward" not in page
    assert f"python -m scripts.chat_eval --run {RUN}" in page


def test_a_run_of_rl_shows_the_curves_that_it_has_logged(run: Path) -> None:
    pytest.importorskip("matplotlib")
    finetuned(run, "rl")
    page = Page(text_of(write_report(RUN)))
    assert "Reward, mean of all replies" in page.text
    assert "KL divergence" in page.text
    assert "Entropy" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4 + 3  # of training; tasks, reward and KL


def test_chat_scores_and_the_first_answers_of_each_task_are_shown_escaped(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "available", lambda: False)
    finetuned(run, "sft")
    write_chat_scores(run)
    text = text_of(write_report(RUN))
    page = Page(text).text
    for shown in ("MADE is 0.4321, standard error 0.0123", "62.5%", "34%", "164 not judged"):
        assert shown in page
    assert "[1+2 = 3] It is 3 <script>." in page
    assert "item calc-7" in page
    assert "calc-8" not in page
    assert "wrong 0" in page
    assert "wrong 1" not in page
    for raw in ("<script>", "<b>1 + 2", "<i>t"):
        assert raw not in text
    assert "ChatCORE" not in page
    assert "Not scored yet" not in page


WRONG = (None, [], {}, "x", True, -1, 1e308, [[]], {"a": [None]}, ["x", 1])


def mutated(value: Any) -> Iterator[Any]:
    """A JSON value with each of its parts taken away, or replaced by what does not belong there."""
    yield from WRONG
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, inner in list(places):
        if isinstance(value, dict):
            yield {key: other for key, other in value.items() if key != place}
        for changed in mutated(inner):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[place] = changed
            yield copy


def rendered() -> str:
    """Render the report of the run; what a refusal says, or "" where there is a page."""
    try:
        Page(render(RunFiles.read(RUN)))
    except UserError as refused:
        return str(refused)
    return ""


PLACES = {"positions": [[1, 1, 3.5], [2, 3, 2.25]], "documents": [0, 1, 3], "documents_step": 0.1}


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "summary.json",
        "base_eval.json",
        "metrics.jsonl",
        "core_predictions.jsonl",
        "chat_eval.json",
        "chat_answers.jsonl",
    ],
)
def test_files_of_any_other_shape_are_shown_or_refused_by_name(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "available", lambda: False)  # it would take minutes to draw them all
    finish(run)
    write_scores(run, "b", 1, bpb_profile={"val": PLACES}, samples=["s"], faults={}, crop_tokens=64)
    scores = json.loads((run / "base_eval.json").read_text())
    scores["tasks"]["task_0"]["controls"] = {"majority": 0.4}
    files.write_json(run / "base_eval.json", scores)
    config = json.loads((run / "config.json").read_text())
    config = {key: config[key] for key in ("model", "params", "batch_tokens", "steps", "machine")}
    config["args"] = {"corpus": "c"}
    config["finetune"] = {"stage": "sft", "base": "b", "base_step": 3}
    files.write_json(run / "config.json", config)
    write_chat_scores(run)
    lines = [step_entry(0, 64, 3.0), {"kind": "eval", "step": 1, "val_bpb": 1.0}]
    lines += [{"kind": "sample", "step": 1, "text": "s"}, {"kind": "core", "step": 1, "core_metric": 0.1}]
    lines += [{"kind": "chat_val", "step": 1, "source": "s", "bpb": 0.1}]
    lines += [{"kind": "chat_eval", "step": 1, "scores": {"t": 0.1}}]
    answers = [{"task": "t", "losses": [1.0, 2.0], "answer": 0, "gold": 0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "core_predictions.jsonl").write_text(json.dumps(answers[0]) + "\n")
    replies = run_files.read_lines(run / "chat_answers.jsonl", run_files.ChatAnswer)[:1]
    lists: dict[str, Any] = {"metrics.jsonl": lines, "core_predictions.jsonl": answers}
    whole: Any = (lists | {"chat_answers.jsonl": replies}).get(name)
    whole = json.loads((run / name).read_text()) if whole is None else whole
    made = 0
    for changed in mutated(whole):
        if name.endswith("l"):
            parts = changed if isinstance(changed, list) else [changed]
            (run / name).write_text("".join(json.dumps(part) + "\n" for part in parts))
        else:
            (run / name).write_text(json.dumps(changed))
        said = rendered()
        made += not said
        assert not said or (name in said and "\n" not in said and name.endswith(".json")), said
    assert made > 10


CONTENTS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b"\xff",
    b"9" * 5000,
    b"[" * 50_000,
    b'{"a":1,"a":2}',
    b"\0" * 512,
)


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "base_eval.json", "chat_eval.json"])
def test_damage_is_one_line_with_the_file_and_what_helps(run: Path, name: str, contents: bytes) -> None:
    finish(run)
    write_scores(run, "core_mini", 3)
    (run / name).write_bytes(contents)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*Delete it") as refused:
        write_report(RUN)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("contents", CONTENTS)
def test_a_damaged_summary_is_left_out_and_said(run: Path, contents: bytes) -> None:
    (run / "summary.json").write_bytes(contents)
    page = Page(text_of(write_report(RUN))).text
    assert re.search(r"Left out: .*summary\.json", page)
    assert "not at its end yet, 40 of 40 steps logged" in page


def test_the_command_prints_the_path(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--run", RUN])
    report_command.main()
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_a_long_curve_is_thinned_to_its_ends() -> None:
    curve = charts.Series("s", list(range(100_001)), list(range(100_001))).thinned()
    assert len(curve.x) <= charts.MAX_POINTS + 1
    assert (curve.x[0], curve.x[-1]) == (0, 100_000)
