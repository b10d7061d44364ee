"""Command lines become frozen arguments, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config.arguments import (
    DatasetArgs,
    EvalArgs,
    ExportArgs,
    GenerateArgs,
    ReportArgs,
    TokEvalArgs,
    TokTrainArgs,
    TrainArgs,
)
from nanochat.config.recipes import OLD_NAMES

ALL = [TrainArgs, EvalArgs, TokTrainArgs, TokEvalArgs, DatasetArgs, GenerateArgs, ReportArgs, ExportArgs]


@pytest.mark.parametrize("cls", ALL)
def test_no_arguments_give_the_defaults(cls: type) -> None:
    assert arguments.parse(cls, []) == cls()


def test_flags_of_every_kind() -> None:
    line = "--depth 4 --target-flops=1e18 --keep-tails --window-pattern L --num-iterations 20 --resume auto"
    args = arguments.parse(TrainArgs, shlex.split(line))
    assert (args.depth, args.target_flops, args.keep_tails) == (4, 1e18, True)
    assert (args.window_pattern, args.num_iterations, args.resume) == ("L", 20, "auto")
    assert arguments.parse(DatasetArgs, ["-n", "8", "--files", "a", "b"]) == DatasetArgs(
        num_shards=8, files=("a", "b")
    )
    assert arguments.parse(GenerateArgs, ["one", "two", "--run", "d4"]).prompt == ("one", "two")


def test_the_old_name_of_a_recipe_is_read(tmp_path: Path) -> None:
    for old, new in OLD_NAMES.items():
        assert arguments.parse(TrainArgs, ["--recipe", old]).recipe == new
        assert arguments.from_dict(TrainArgs, {"recipe": old}, tmp_path).recipe == new


def test_the_separator_of_torchrun_is_not_a_flag() -> None:
    assert arguments.parse(TrainArgs, ["--", "--run", "x"]).run == "x"


@pytest.mark.parametrize("argv", [["--dept", "4"], ["--depth", "four"], ["--recipe", "march"], ["stray"]])
def test_unknown_flags_and_values_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        arguments.parse(TrainArgs, argv)
    assert leaving.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("cls", ALL)
def test_help_names_every_flag(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        arguments.parse(cls, ["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for item in dataclasses.fields(cls):
        assert item.name.replace("_", "-") in text


@pytest.mark.parametrize("cls", ALL)
def test_arguments_survive_json(cls: type) -> None:
    stored = json.loads(json.dumps(dataclasses.asdict(cls())))
    path = Path("state.json")
    assert arguments.from_dict(cls, stored, path) == cls()
    with pytest.raises(UserError, match=r"state\.json: 'colour'"):
        arguments.from_dict(cls, {**stored, "colour": "red"}, path)


def test_names_that_follow_from_others() -> None:
    assert TrainArgs(depth=20).run_name == "d20"
    assert TrainArgs(run="mine").run_name == "mine"
    assert TrainArgs(corpus="stdlib").tokenizer_name == "stdlib"


@pytest.mark.parametrize(
    ("argv", "prompts"),
    [
        (["a", "--run", "r", "b"], ("a", "b")),
        (["--run=r", "--", "-hello"], ("-hello",)),
        (["--run=r", "a", "--", "-hello", "--run"], ("a", "-hello", "--run")),
        (["--run=r"], ()),
    ],
)
def test_prompts_stand_before_between_and_behind_flags(argv, prompts):
    args = arguments.parse(GenerateArgs, argv)
    assert (args.run, args.prompt) == ("r", prompts)


@pytest.mark.parametrize("prompt", ["-hello", "-x", "--what"])
def test_a_prompt_that_looks_like_a_flag_is_told_where_to_stand(prompt, capsys):
    with pytest.raises(SystemExit) as left:
        arguments.parse(GenerateArgs, ["--run=r", prompt])
    assert left.value.code == 2
    assert "after --" in capsys.readouterr().err
