"""Talking to a tiny model that has learnt four replies by heart; on real terminals, in pipes, and within."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from safetensors.torch import save_file

from nanochat.chat import conversation, terminal
from nanochat.chat.conversation import Conversation, Message, Part
from nanochat.chat.terminal import Terminal
from nanochat.common import files, progress
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import ChatCliArgs
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.conftest import REPO
from tests.tiny import WORDS, tiny_args, tiny_corpus, train_tiny

LONG = " ".join(WORDS[i % len(WORDS)] for i in range(24))
SUM = "What is 347 + 589?"
TALK = {
    "hi": (Part("text", "two dogs \U0001f600 saw the cat"),),
    SUM: (Part("python", "347+589"), Part("python_output", "936"), Part("text", "347 + 589 = 936.")),
    "long": (Part("text", LONG),),
    "bad": (Part("text", "\x1b]0;owned\x07 and \x9b2J"),),
}
SHAPE = {"max_seq_len": 256, "total_batch_size": 1024, "num_iterations": 1, "keep_tails": True}
ARGS = ChatCliArgs(temperature=0.0, max_new_tokens=128)


def turns(*messages: str) -> Conversation:
    """The conversation that the model has learnt for these messages."""
    pairs = [(Message("user", (Part("text", text),)), Message("assistant", TALK[text])) for text in messages]
    return tuple(message for pair in pairs for message in pair)


def learn_by_heart(model: GPT, tokenizer: Tokenizer) -> None:
    """Train on conversations of up to three of the four messages, until the replies are certain."""
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        talks = [turns(*rng.choices(list(TALK), k=rng.randint(1, 3))) for _ in range(4)]
        rendered = conversation.render(tokenizer, talks)
        length = min(256, int(max(rendered.offsets[1:] - rendered.offsets[:-1])))
        ids = torch.full((4, length), tokenizer.bos_id)
        targets = torch.full((4, length), -1)
        for row, (start, end) in enumerate(zip(rendered.offsets, rendered.offsets[1:], strict=False)):
            known = torch.from_numpy(rendered.ids[start : min(end, start + length)]).long()
            supervised = torch.from_numpy(rendered.supervised[start : start + len(known)])
            ids[row, : len(known)] = known
            targets[row, : len(known)] = torch.where(supervised, known, -1)
        optimizer.zero_grad()
        model.loss(ids[:, :-1].contiguous(), targets[:, 1:].contiguous()).backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS) + "."] * 3, 340)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    shape = planning.plan(tiny_args(**SHAPE), tokenizer.vocab_size).model
    model = GPT(shape, Precision(torch.float32, "sdpa"), tokenizer.bos_id if shape.document_mask else None)
    model.init_weights(0)
    learn_by_heart(model, tokenizer)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: GPT, tokenizer: Tokenizer) -> Path:
    """A base directory with the model as a chat run "chat", and a base run "base" of the same shape."""
    folder = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        tiny_corpus(folder)
        tokenizer.save(files.tokenizer_dir("local"))
        for run in ("base", "chat"):
            train_tiny(**{**SHAPE, "run": run})
        checkpoint = files.checkpoints_dir("chat") / "step_000001"
        save_file(model.state_dict(), checkpoint / "model.safetensors")
        state = files.read_json(checkpoint / "state.json")
        state["plan"]["finetune"] = {"stage": "sft"}
        files.write_json(checkpoint / "state.json", state)
        manifest = files.read_json(checkpoint / "MANIFEST.json")
        for name in ("model.safetensors", "state.json"):
            path = checkpoint / name
            manifest["files"][name] |= {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        files.write_json(checkpoint / "MANIFEST.json", manifest)
    return folder / "base"


class Talk:
    """A conversation in this process: what is typed, and what is then on the two streams."""

    def __init__(self, talker: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
        self.terminal, self._capsys = talker, capsys

    @property
    def said(self) -> Conversation:
        return self.terminal._said

    def type(self, *lines: str) -> tuple[str, str]:
        """Type these lines, then Ctrl-D; what standard output and standard error then hold."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            self.terminal.talk()
        out, err = self._capsys.readouterr()
        return out.replace("> ", "").rstrip("\n"), err.partition("commands.\n")[2]


@pytest.fixture
def talk(model: GPT, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(Terminal(model, tokenizer, ARGS), capsys)


def test_a_conversation_of_several_turns(talk: Talk) -> None:
    out, err = talk.type("hi", SUM, "", "long", "hi")
    hello = "two dogs \U0001f600 saw the cat"
    assert out.splitlines() == [hello, "347 + 589 = 936.", LONG, hello]
    assert err == "347+589 = 936\n"
    assert talk.said == turns("hi", SUM, "long", "hi")


def test_undo_retry_and_new(talk: Talk) -> None:
    talk.type("/undo", "/retry", "hi", "long", "/undo")
    assert talk.said == turns("hi")
    out, _ = talk.type("/retry")
    assert out == "two dogs \U0001f600 saw the cat"
    assert talk.said == turns("hi")
    talk.type("/new")
    assert talk.said == ()


def test_a_reply_that_is_asked_for_again_is_drawn_anew(model: GPT, tokenizer: Tokenizer) -> None:
    args = ChatCliArgs(temperature=2.0, top_k=0, max_new_tokens=12)
    talker, again = Terminal(model, tokenizer, args), Terminal(model, tokenizer, args)
    talker.ask("hi")
    again.ask("hi")
    assert talker._said == again._said
    replies = {talker._said}
    for _ in range(4):
        talker._retry("")
        replies.add(talker._said)
    assert len(replies) > 2


def test_settings_change_and_wrong_ones_are_one_line(talk: Talk) -> None:
    _, err = talk.type("/temp 0.5", "/topk 7", "/temp hot", "/topk 1.5", "/temp -1", "/topk", "/what", "/")
    lines = err.splitlines()
    assert lines == [
        "'hot': expected a number.",
        "'1.5': expected a number.",
        "--temperature=-1.0: expected 0 or more.",
        "'': expected a number.",
        "/what: no such command. /help lists them.",
        "/: no such command. /help lists them.",
    ]
    assert (talk.terminal._args.temperature, talk.terminal._args.top_k) == (0.5, 7)


def test_help_names_every_command(talk: Talk) -> None:
    _, err = talk.type("/help")
    named = re.findall(r"^/(\w+) +\S", err, re.MULTILINE)
    assert tuple(named) == terminal.COMMANDS


def test_the_system_text_stays_over_new_and_goes_when_it_is_emptied(talk: Talk) -> None:
    system = Message("system", (Part("text", "be a cat"),))
    talk.type("hi", "/system be a cat")
    assert talk.said == (system, *turns("hi"))
    talk.type("/new")
    assert talk.said == (system,)
    talk.type("/undo", "/retry", "/system")
    assert talk.said == ()


def test_a_saved_conversation_is_read_by_others_and_goes_on(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "my talk.jsonl"
    other = tmp_path / "other"
    talk.type(f"/save {path}")
    assert not path.exists()  # nothing was said
    talk.type("hi", f"/save {path}", "/system be a cat", SUM, f"/save {path}", "/new", "/system", "long")
    first, second = path.read_text("utf-8").splitlines()
    assert conversation.read(json.loads(first), "") == turns("hi")
    saved = conversation.read(json.loads(second), "")
    assert saved == (Message("system", (Part("text", "be a cat"),)), *turns("hi", SUM))
    talk.type(f"/load {path}", f"/save {other}")
    assert talk.said == saved
    assert other.with_suffix(".jsonl").read_text("utf-8").splitlines() == [second]


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"{", "line 1"),
        (b"\xff\xfe", "x.jsonl"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "expected a reply"),
        (b'{"messages": 3}', "line 1: messages is 3"),
    ],
)
def test_what_cannot_be_loaded_or_saved_is_one_line(
    talk: Talk, tmp_path: Path, contents: bytes, words: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(contents)
    wrong = [
        f"/load {path}.absent",
        f"/save {tmp_path}/no/where",
        "/save",
        "/save ~nobody/x",
        "/load /",
        "/load",
    ]
    _, err = talk.type("hi", f"/load {path}", *wrong)
    assert err.count("\n") == 7
    assert words in err.splitlines()[0]
    assert talk.said == turns("hi")


def test_the_first_turns_are_forgotten_where_the_context_is_full_and_that_is_said_once(talk: Talk) -> None:
    out, err = talk.type(*["long"] * 12)
    assert out.splitlines() == [LONG] * 12
    assert err.count("forgotten") == 1
    assert talk.said == turns(*["long"] * 12)


def test_a_message_that_does_not_fit_is_one_line_and_not_kept(talk: Talk) -> None:
    out, err = talk.type("hi", "x" * 999, "long")
    assert "Shorten it" in err
    assert err.count("\n") == 1
    assert out.splitlines()[-1] == LONG
    assert talk.said == turns("hi", "long")


class Interrupting(io.StringIO):
    """A stream on which Ctrl-C is typed when some word appears, once."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def write(self, text: str) -> int:
        if self.word and self.word in text:
            self.word = ""
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_an_interrupt_ends_the_reply_and_keeps_what_was_said(talk: Talk) -> None:
    with contextlib.redirect_stdout(Interrupting("mat")) as stream:
        talk.type("long", "hi")
    asked, reply, *rest = talk.said
    assert asked == turns("long")[0]
    assert LONG.startswith(reply.parts[0].text)
    assert len(reply.parts[0].text) < 40
    assert tuple(rest) == turns("hi")
    assert stream.getvalue().endswith("two dogs \U0001f600 saw the cat\n> \n")


class Screen(io.StringIO):
    """What a terminal would be."""

    def isatty(self) -> bool:
        return True


@given(
    words=st.lists(
        st.sampled_from(["a", "cat", "\u4f60\u597d\u4e16\u754c", "\U0001f600", "x" * 33, "house,", "is."]),
        min_size=1,
        max_size=40,
    ),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    width=st.integers(12, 50),
)
def test_lines_end_between_words(words: list[str], cuts: list[int], width: int) -> None:
    text, begin = " ".join(words), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(Screen()) as screen:
        patch.setenv("COLUMNS", str(width))
        page = progress.Page()
        while begin < len(text):
            end = begin + cuts[begin % len(cuts)]
            page.write(text[begin:end])
            begin = end
        page.end_line()
    lines = screen.getvalue().splitlines()
    short = [word for word in words if cell_len(word) < min(width, progress.LONG_WORD)]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    if len(short) == len(words):
        assert " ".join(lines) == text
        assert all(cell_len(line) <= width for line in lines)
        for line, following in zip(lines, lines[1:], strict=False):  # no line ends early
            assert cell_len(f"{line} {following.split(' ')[0]}") > width


def run_cli(base: Path, *flags: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", "--device-type=cpu", "--temperature=0", *flags],
        cwd=REPO,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
        **how,  # type: ignore[call-overload]
    )


class Console:
    """chat_cli on a terminal of its own, which is the controlling one: what is typed there may be Ctrl-C."""

    def __init__(self, base: Path, *flags: str, columns: int = 40) -> None:
        self.shown = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(REPO)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # who works in the background ignores it
            argv = [
                sys.executable,
                "-m",
                "scripts.chat_cli",
                "--run=chat",
                "--device-type=cpu",
                "--temperature=0",
            ]
            env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(REPO), "TERM": "xterm"}
            os.execve(sys.executable, [*argv, *flags], {**env, "COLUMNS": str(columns)})

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, timeout: float = 120) -> str:
        """What is shown from now on until this text is."""
        began, deadline = len(self.shown), time.monotonic() + timeout
        while text not in self.shown[began:]:
            assert time.monotonic() < deadline, f"{text!r} is not shown: {self.shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.shown += os.read(self._fd, 4096).decode("utf-8", "replace")
        return self.shown[began:]

    def _read(self) -> bytes:
        while not select.select([self._fd], [], [], 10)[0]:
            self.type("\x03")
        return os.read(self._fd, 4096)

    def leave(self) -> int:
        """The exit code, once the command has ended.

        A Ctrl-C that comes just before Python waits for a key is heard with the next: it is pressed again.
        """
        with contextlib.suppress(OSError):  # the terminal is gone with the command
            while data := self._read():
                self.shown += data.decode("utf-8", "replace")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def plain(shown: str) -> str:
    """Without the escape sequences of readline and rich."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown).replace("\r", "")


def test_a_conversation_on_a_terminal(base: Path) -> None:
    console = Console(base)
    console.wait_for("> ")
    console.type("long\n")
    reply = plain(console.wait_for("> "))
    assert all(len(line) <= 40 for line in reply.splitlines())
    assert LONG in reply.replace("\n", " ")
    console.type(f"{SUM}\n")
    reply = console.wait_for("> ")
    assert "\x1b[2m347+589 = 936\x1b[0m" in reply  # dim
    assert "\n347 + 589 = 936.\n" in plain(reply)
    console.type("bad\n")
    assert "\ufffd]0;owned\ufffd and \ufffd2J" in console.wait_for("> ")
    console.type("\x1b[A\x1b[A")  # two messages back
    assert SUM in console.wait_for("589?")
    console.type("\x03")
    assert console.leave() == 0
    assert "Traceback" not in console.shown


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "code"), [("\x04", 0), ("/quit\n", 0), ("\x03", 0)])
def test_ctrl_c_ends_a_reply_and_keys_at_the_prompt_leave(base: Path, keys: str, code: int) -> None:
    console = Console(base, "--max-new-tokens=200")
    console.wait_for("> ")
    for _ in range(3):
        console.type("long\n")
        console.wait_for("cat")
        console.type("\x03")
        console.wait_for("> ")
    console.type("/new\n")
    console.wait_for("> ")
    console.type("hi\n")
    assert "\U0001f600" in console.wait_for("> ")
    console.type(keys)
    assert console.leave() == code
    assert "Traceback" not in console.shown


@pytest.mark.slow
def test_one_message_from_a_pipe(base: Path) -> None:
    asked = run_cli(base, "--run=chat", input=f"{SUM}\n")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "347 + 589 = 936.\n", "347+589 = 936\n")


@pytest.mark.slow
def test_one_message_by_a_flag_and_what_is_wrong(base: Path) -> None:
    asked = run_cli(base, "--run=chat", "-p", "bad", input="hi")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "\x1b]0;owned\x07 and \x9b2J\n", "")
    warned = run_cli(base, "--run=base", "-p", "hi", "--max-new-tokens=4")
    assert warned.returncode == 0
    assert "python -m scripts.chat_sft --base base" in warned.stderr
    for flags, words in (
        ((), "name a run"),
        (("--run=absent", "-p", "hi"), "absent"),
        (("--run=chat",), "standard input is empty"),
        (("--run=chat", "-p", "x" * 999), "Shorten it"),
    ):
        refused = run_cli(base, *flags, stdin=subprocess.DEVNULL)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert words in refused.stderr


@pytest.mark.slow
def test_a_reader_who_has_left_is_no_error(base: Path) -> None:
    command = f'"{sys.executable}" -m scripts.chat_cli --run=chat --device-type=cpu -p long | true'
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=REPO,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
