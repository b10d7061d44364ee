"""The README does not drift: its table is scaling's, the files and flags it names exist."""

from __future__ import annotations

import dataclasses
import os
import re
from xml.etree import ElementTree

import pytest

from dev.reliability import library_digest, page
from nanochat.common import charts, files
from nanochat.config.arguments import (
    ChatCliArgs,
    ChatDataArgs,
    ChatEvalArgs,
    ChatWebArgs,
    DatasetArgs,
    EvalArgs,
    ExportArgs,
    GenerateArgs,
    RlArgs,
    SftArgs,
    TokTrainArgs,
    TrainArgs,
)
from nanochat.config.plan import plan
from tests.conftest import REPO

README = (REPO / "README.md").read_text("utf-8")
DEPTHS = (4, 12, 20, 24, 32)


def row(depth: int) -> str:
    p = plan(TrainArgs(depth=depth), vocab_size=32768)
    m = p.model
    return (
        f"| {depth} | {m.n_embd} | {m.n_head} | {p.params.scaling / 1e6:,.0f} M | {p.batch_tokens:,} "
        f"| {p.steps:,} | {p.tokens / 1e9:.2f} B | {p.tokens * p.flops_per_token:.1e} |"
    )


def test_the_table_of_depths_is_that_of_the_plans() -> None:
    found = re.findall(r"^\| \d+ \|.*$", README, re.MULTILINE)
    assert found == [row(depth) for depth in DEPTHS]


@pytest.mark.skipif("NANOCHAT_RELIABILITY" in os.environ, reason="the figures are being written")
def test_the_table_of_promises_is_that_of_the_recorded_figures() -> None:
    entries = files.read_json(REPO / "reliability.json")
    assert page(entries) == (REPO / "docs" / "reliability.md").read_text("utf-8")
    assert sum(entry["failures"] for entry in entries) == 0


@pytest.mark.skipif("NANOCHAT_RELIABILITY" in os.environ, reason="the figures are being written")
def test_the_figures_are_of_this_library() -> None:
    """A promise is measured again when what keeps it has changed; docs/reliability.md says how."""
    if not (REPO / ".git").exists():
        pytest.skip("not a checkout of git: the files of the library cannot be listed")
    assert {entry["library"] for entry in files.read_json(REPO / "reliability.json")} == {
        library_digest(REPO)
    }


def test_every_file_it_names_is_there() -> None:
    named = re.findall(r"(?:nanochat|runs|dev|scripts|tests)/[\w./]*\w\.(?:py|sh|md)", README)
    assert len(named) > 5
    assert [name for name in named if not (REPO / name).exists()] == []


def test_it_is_short_and_its_pictures_are_small_and_readable_on_any_page() -> None:
    assert len(README.splitlines()) <= 100
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    for name in pictures:
        text = (REPO / name).read_text("utf-8")
        assert len(text) <= 60_000
        assert ElementTree.fromstring(text).attrib["color"] == charts.LONE_INK


CHAT_ARGS = {
    "chat_cli": ChatCliArgs,
    "chat_data": ChatDataArgs,
    "chat_eval": ChatEvalArgs,
    "chat_rl": RlArgs,
    "chat_sft": SftArgs,
    "chat_web": ChatWebArgs,
}


def flags_of(*classes: type) -> set[str]:
    """The flags of some commands, as a person types them."""
    fields = [item for cls in classes for item in dataclasses.fields(cls)]
    named = {"--" + item.name.replace("_", "-") for item in fields}
    return named | {item.metadata["short"] for item in fields if "short" in item.metadata}


def test_every_flag_it_names_exists() -> None:
    known = {"--standalone", "--nproc_per_node", "--nnodes", "--max-restarts", "--slow"}
    known |= flags_of(TrainArgs, EvalArgs, TokTrainArgs, DatasetArgs, GenerateArgs, ExportArgs)
    known |= flags_of(*CHAT_ARGS.values())
    assert sorted(set(re.findall(r"--[a-z][\w-]*", README)) - known) == []


@pytest.mark.parametrize(
    "path", ["README.md", "docs/chat.md", "runs/quickstart.sh"], ids=lambda path: path.rpartition("/")[2]
)
def test_every_chat_command_that_is_told_can_be_typed(path: str) -> None:
    text = (REPO / path).read_text("utf-8").replace("\\\n", " ")
    told = re.findall(r"-m scripts\.(chat_\w+)([^\n`]*)", text)
    assert told
    for command, rest in told:
        named = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest.partition("#")[0]))
        assert named <= flags_of(CHAT_ARGS[command]) | {"--help"}, f"{command}{rest}"


def test_the_page_of_cuda_names_tests_that_exist() -> None:
    page = (REPO / "docs" / "cuda.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)(?:\[[\w-]+\])?`", page))
    files = [*(REPO / "tests").rglob("test_*.py")]
    there = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)}
    assert len(named) > 20
    assert named <= there
    assert set(re.findall(r"`(?:tests/)?(?:\w+/)*(test_\w+\.py)`", page)) <= {path.name for path in files}
