"""Domains of flags: every number of every command is bounded, and nothing typed ends in a traceback."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import files, flags
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config import plan as planning
from nanochat.config.arguments import EvalArgs, GenerateArgs, TokTrainArgs, TrainArgs

COMMANDS = [
    value for name, value in vars(arguments).items() if name.endswith("Args") and isinstance(value, type)
]

HOSTILE = (
    *("nan", "inf", "-inf", "-1", "0", "-0.0", "1e-320", "1e38", "-1e38", "1e308", "1e400", "0.5"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "9" * 5000, "-" + "9" * 5000),
    *("\u00b2", "\u0663", "1_0", "0x10", "1e8", "", " ", "\udcff", "\x1b[31m", "one", "None", "[]"),
)


def numbers(cls: Any) -> list[tuple[str, Any]]:
    """Name and type of the flags of a command that take any number."""
    hints = typing.get_type_hints(cls)
    return [
        (item.name, flags.type_of(hints[item.name]))
        for item in dataclasses.fields(cls)
        if flags.is_number(hints[item.name]) and "choices" not in item.metadata
    ]


NEEDED = {arguments.CheckpointArgs: ["list", "d12"]}
NUMBERS = [(cls, name) for cls in COMMANDS for name, _ in numbers(cls)]


def refusal(cls: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that refuses a command line, or "" where it is taken; anything else fails the test."""
    try:
        arguments.parse(cls, argv)
    except UserError as error:
        return str(error)
    except SystemExit as leaving:
        return capsys.readouterr().err.removesuffix("\n") if leaving.code == 2 else f"code {leaving.code}"
    return ""


@pytest.mark.parametrize("cls", COMMANDS)
def test_every_number_has_a_lower_bound_and_a_default_within_its_bounds(cls: Any) -> None:
    for item in dataclasses.fields(cls):
        if item.name in dict(numbers(cls)):
            assert {"above", "at_least"} & set(item.metadata), (
                f"{cls.__name__}.{item.name} has no lower bound"
            )
    flags.require_domain(cls())


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_what_is_typed_for_a_number_is_taken_within_its_bounds_or_refused_in_one_line(
    cls: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    for text in HOSTILE:
        said = refusal(cls, [*NEEDED.get(cls, []), f"{flag}={text}"], capsys)
        if said:
            assert flag in said, said
            assert "\n" not in said
            assert said.isascii(), said
            assert said.isprintable(), said
            assert len(said) < 400
    for text in ("nan", "inf", "-inf", "-1", "1e400", "\u00b2", "9" * 5000):
        assert refusal(cls, [*NEEDED.get(cls, []), f"{flag}={text}"], capsys), f"{flag}={text[:20]} is taken"


@pytest.mark.parametrize("name", [name for cls, name in NUMBERS if cls is TrainArgs])
def test_a_number_that_is_taken_makes_a_plan_that_a_file_can_hold(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    item = next(item for item in dataclasses.fields(TrainArgs) if item.name == name)
    ends = [item.metadata.get(bound) for bound in flags.BOUNDS]
    tiny = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=32", "--total-batch-size=128"]
    planned = 0
    for text in (*HOSTILE, *(repr(end) for end in ends if end is not None), "1e-300", "1e-46", "1", "2"):
        argv = [*tiny, f"--{name.replace('_', '-')}={text}"]
        if refusal(TrainArgs, argv, capsys):
            continue
        try:
            plan = planning.plan(arguments.parse(TrainArgs, argv), 300)
        except UserError as refused:
            assert "--" in str(refused)  # noqa: PT017
            continue
        json.dumps(plan.to_dict(), allow_nan=False)
        assert plan.steps > 0
        assert planning.describe(plan)
        planned += 1
    assert planned


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_help_shows_the_bounds(cls: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    item = next(item for item in dataclasses.fields(cls) if item.name == name)
    with pytest.raises(SystemExit):
        arguments.parse(cls, ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert "".join(flags.domain(item, typing.get_type_hints(cls)[name]).split()) in shown


@pytest.mark.parametrize(
    ("cls", "argv", "said"),
    [
        (EvalArgs, ["--eval-tokens=-5"], "--eval-tokens=-5: expected 1 or more."),
        (EvalArgs, ["--core-crop-tokens", "1"], "--core-crop-tokens=1: expected a whole number from 2 to"),
        (EvalArgs, ["--dist-timeout=inf"], "--dist-timeout=inf: expected a number from 1 to 10,000,000."),
        (GenerateArgs, ["--temperature=nan"], "--temperature=nan: expected 0 or more."),
        (GenerateArgs, ["--seed", str(2**63)], f"--seed={2**63}: expected 0 or more, below 2^63."),
        (TrainArgs, ["--matrix-lr=1e38"], "--matrix-lr=1e+38: expected a number from 0 to 1,000."),
        (TrainArgs, ["--depth=100000000"], "--depth=100000000: expected a whole number from 1 to 1,000."),
        (TrainArgs, ["--target-flops=inf"], "--target-flops=inf: expected a number above 0, at most 1e+30."),
        (TrainArgs, ["--resume=\u00b2"], r"--resume=\xb2: expected auto or the step of a checkpoint."),
        (TrainArgs, ["--resume=-1"], "--resume=-1: expected auto or the step of a checkpoint."),
        (TrainArgs, ["--save-minutes=nan"], "--save-minutes=nan: expected a number from 0 to"),
        (TrainArgs, ["--keep-last=0"], "--keep-last=0: expected 1 or more."),
        (TokTrainArgs, ["--doc-cap=-1"], "--doc-cap=-1: expected 1 or more."),
        (GenerateArgs, ["caf\udce9"], r"prompt=caf\udce9: expected a text in UTF-8."),
    ],
)
def test_a_refusal_names_flag_value_and_domain(cls: Any, argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        arguments.parse(cls, argv)
    assert str(refused.value).startswith(said)


NO_NAMES = ("../x", ".", "..", "/", "a/b", ".hidden", "x" * 129, "a b", "caf\u00e9", "cafe\u0301", "a\nb")
NO_NAMES += ("\x1b[31m", "\u202egnp", "caf\udce9", "\ud800", "a\0b", "a\\b", "a:b", "\U0001f600")


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("flag", ["--run", "--compare"])
def test_what_is_no_name_is_refused_escaped(flag: str, name: str, base_dir: Path) -> None:
    for refuse in (lambda: arguments.parse(EvalArgs, [flag, name]), lambda: files.run_dir(name)):
        with pytest.raises(UserError) as refused:
            refuse()
        assert str(refused.value).isprintable()
        assert str(refused.value).isascii()
        assert "up to 128 letters" in str(refused.value)
    assert not base_dir.exists()


@pytest.mark.parametrize("name", ["d12", "a", "-x", "_", "A.b-c_1", "x" * 128, "0"])
def test_what_the_message_promises_is_a_name(name: str) -> None:
    assert arguments.parse(EvalArgs, [f"--run={name}"]).run == name
    assert files.run_dir(name).name == name


def test_a_name_of_an_older_version_is_good_for_what_has_it(base_dir: Path) -> None:
    for name in ("caf\u00e9 2", "r\u00fcn", "x" * 250):
        with pytest.raises(UserError, match="not a usable name"):
            files.run_dir(name)
        (base_dir / "runs" / name).mkdir(parents=True)
        assert files.run_dir(name) == base_dir / "runs" / name
        assert arguments.parse(EvalArgs, [f"--run={name}"]).run == name
        with pytest.raises(UserError, match="not a usable name"):
            files.data_dir(name)


def test_paths_may_have_any_bytes() -> None:
    assert arguments.parse(arguments.DatasetArgs, ["--files", "caf\udce9.txt"]).files == ("caf\udce9.txt",)
    assert arguments.parse(arguments.ExportArgs, ["--out", "o\udce9"]).out == "o\udce9"


def test_a_refusal_of_the_parser_is_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["--nonsense"],
        ["--depth", "four"],
        ["--recipe", "x" * 10_000],
        ["\udcff\n\x1b"],
        ["--depth"],
    ):
        said = refusal(TrainArgs, argv, capsys)
        assert said.startswith("error: ")
        assert said.isprintable()
        assert len(said) < 400
        assert "--help" in said


def test_old_arguments_are_read_whatever_their_domain_is_now() -> None:
    path = Path("step_000004") / "state.json"
    assert arguments.from_dict(EvalArgs, {"eval_tokens": -5}, path).eval_tokens == -5
    for wrong in ({"eval_tokens": 0.5}, {"run": 3}, {"compare": "ab"}, {"keep_going": 1}, {"step": "3"}):
        with pytest.raises(UserError, match=rf"state\.json: {next(iter(wrong))} is .*expected"):
            arguments.from_dict(EvalArgs, wrong, path)
