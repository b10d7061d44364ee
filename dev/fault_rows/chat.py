"""Rows of the chat stage: conversations that cannot be used, runs that are not there, kills of SFT and RL."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from dev.fault_box import TINY, Box, expect_error, expect_ok, row

ASK = {"role": "user", "content": "two dogs?"}
ANSWER = {"role": "assistant", "content": "the cat sat."}
GOOD = {"messages": [ASK, ANSWER]}
SFT = ["--device-type=cpu", "--dtype=float32", "--device-batch-size=4", "--eval-tokens=512"]


def local(box: Box, lines: list[object], *flags: str) -> subprocess.CompletedProcess[str]:
    """What chat_data says to a file of these lines; a text is a line as it is."""
    path = box.folder / "talk.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), "utf-8", errors="surrogatepass")
    return box.run("chat_data", "--corpus=local", "--name=talk", "--files", path, *flags)


def based(box: Box) -> None:
    """A base run "a" of a few steps, and a chat corpus "talk" of short conversations."""
    box.tiny()
    shape = ["--max-seq-len=128", "--total-batch-size=512", "--keep-tails"]
    expect_ok(box.run("base_train", *TINY, *shape, "--num-iterations=6", "--run=a"))
    words = ("the cat sat on a mat", "two dogs near red house", "while a cat saw")
    pairs = [(words[i % 3], words[(i + 1) % 3]) for i in range(300)]
    rows = [{"messages": [{**ASK, "content": a}, {**ANSWER, "content": b}]} for a, b in pairs]
    expect_ok(local(box, rows))


def weights(box: Box, run: str) -> tuple[str, bytes]:
    """The newest checkpoint of a run: its name, and the bytes of its weights."""
    newest = max((box.base / "runs" / run / "checkpoints").glob("step_*"))
    return newest.name, (newest / "model.safetensors").read_bytes()


BAD: dict[str, tuple[object, tuple[str, ...]]] = {
    "no reply": ({"messages": [ASK]}, ("expected a reply",)),
    "roles that do not alternate": ({"messages": [ASK, ASK, ANSWER]}, ("messages[1].role", "user")),
    "an unknown role": (
        {"messages": [{**ASK, "role": "narrator"}, ANSWER]},
        ("messages[0].role", "narrator"),
    ),
    "an empty mask": ({"messages": [ASK, {**ANSWER, "content": ""}]}, ("repl",)),
    "a part of unknown kind": (
        {"messages": [ASK, {**ANSWER, "content": [{"type": "image", "text": "x"}]}]},
        ("messages[1].content[0].type", "image"),
    ),
    "no JSON": ("{not JSON", ("JSON",)),
    "no object": ([1, 2], ("list",)),
    "a tool that is not known": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}],
                },
            ]
        },
        ("messages[1].tool_calls[0].function.name", "weather"),
    ),
    "half of a surrogate pair": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', ("surrogate",)),
}


@row(
    "F1", "a line of a chat corpus that cannot be used, of nine kinds", wanted="file, line and key; no corpus"
)
def f1(box: Box) -> None:
    """One bad line between good ones."""
    for what, (bad, words) in BAD.items():
        line = expect_error(local(box, [GOOD, bad, GOOD]), "talk.jsonl: line 2", *words)
        assert "--skip-bad" in line, f"{what}: {line}"
        assert not (box.base / "data" / "talk").exists(), what


@row("F2", "the same lines with --skip-bad", wanted="left out and counted, the rest is there")
def f2(box: Box) -> None:
    """All nine kinds between good ones."""
    bad = [line for line, _ in BAD.values()]
    done = local(box, [GOOD, *bad, *[GOOD] * 20], "--skip-bad")
    expect_ok(done)
    assert f"{len(bad)} " in done.stdout + done.stderr, done.stdout + done.stderr
    assert (box.base / "data" / "talk" / "manifest.json").exists()


@row("F3", "a file without one usable conversation, with --skip-bad", wanted="one line, no corpus")
def f3(box: Box) -> None:
    """Nothing is left."""
    expect_error(local(box, ["{", "[]"], "--skip-bad"), "talk", "nothing in it")
    assert not (box.base / "data" / "talk").exists()


@row("F4", "chat commands on runs and corpora that are not there", wanted="one line that names them")
def f4(box: Box) -> None:
    """Each of the commands."""
    based(box)
    expect_error(box.run("chat_sft", "--base=absent"), "absent")
    expect_error(box.run("chat_sft"), "--base")
    expect_error(box.run("chat_sft", "--base=a", "--data", "nothing"), "nothing", "chat_data")
    line = expect_error(box.run("chat_sft", "--base=a", "--data", "tiny"), "tiny")
    assert "Delete" not in line, line  # it is a corpus of text, and in order
    expect_error(box.run("chat_rl", "--base=absent"), "absent")
    expect_error(box.run("chat_rl", "--base=a"), "no chat model", "chat_sft --base a")
    expect_error(box.run("chat_eval", "--run=absent"), "absent")
    expect_error(box.run("chat_eval", "--run=a", "--tasks=arc-easy"), "arc-easy", "chat_data")
    expect_error(box.run("chat_eval", "--run=a", "--tasks=nothing"), "nothing")
    expect_error(box.run("chat_cli", "--run=absent", "-p", "cat"), "absent")
    expect_error(box.run("chat_cli"), "--run")
    expect_error(box.run("base_train", *TINY[1:], "--corpus=talk", "--tokenizer=tiny", "--run=b"), "talk")
    runs = sorted(path.name for path in (box.base / "runs").iterdir())
    assert runs == ["a"], f"left behind: {runs}"


@row("F5", "a message longer than the context; none; a closed pipe", wanted="one line; one line; silence")
def f5(box: Box) -> None:
    """The doors of chat_cli that are no terminal."""
    based(box)
    talk = [*box.argv("chat_cli", "--run=a", "--device-type=cpu", "--max-new-tokens=8")]
    long = box.execute([*talk, "-p", "cat " * 400])
    expect_error(long, "tokens")
    expect_error(box.execute(talk, stdin=subprocess.DEVNULL), "standard input is empty")
    piped = box.execute(["bash", "-c", 'set -o pipefail; "$@" -p cat | true', "-", *talk])
    assert "Traceback" not in piped.stderr, piped.stderr
    assert "Broken" not in piped.stderr, piped.stderr
    asked = box.execute(talk, input="the cat sat\non a mat\n")
    expect_ok(asked)
    assert "\x1b" not in asked.stdout, asked.stdout


@row("F6", "Ctrl-C in the middle of a reply, then another message", wanted="the reply ends, the talk goes on")
def f6(box: Box) -> None:
    """A real terminal, on which ^C is typed."""
    based(box)
    ours, theirs = pty.openpty()
    argv = box.argv("chat_cli", "--run=a", "--device-type=cpu", "--max-new-tokens=20")
    process = subprocess.Popen(
        argv, env=box.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        for _ in range(3):
            read_until(ours, "> ")
            os.write(ours, b"cat\n")
            time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # what ^C does where the terminal is the controlling one
        read_until(ours, "> ")
        os.write(ours, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)


def read_until(terminal: int, text: str, timeout: float = 60) -> str:
    """What a terminal shows until some text has come."""
    shown, deadline = "", time.monotonic() + timeout
    while text not in shown:
        assert time.monotonic() < deadline, f"{text!r} was not shown: {shown[-600:]}"
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode("utf-8", "replace")
    return shown


@row(
    "F7",
    "chat_sft is killed (kill -9) again and again and resumed",
    wanted="the weights of an undisturbed run",
)
def f7(box: Box) -> None:
    """Five kills at any moment."""
    based(box)
    flags = ["--base=a", "--data", "talk", *SFT, "--total-batch-size=512", "--num-iterations=40"]
    flags += ["--eval-every=10", "--save-every=3", "--keep-last=100", "--resume=auto"]
    killed_and_resumed(box, "chat_sft", flags)


@row(
    "F8",
    "chat_rl is killed (kill -9) again and again and resumed",
    wanted="the weights of an undisturbed run",
)
def f8(box: Box) -> None:
    """As F7."""
    based(box)
    short = ["--total-batch-size=512", "--num-iterations=4", "--eval-every=0"]
    expect_ok(box.run("chat_sft", "--base=a", "--data", "talk", *SFT, *short, "--run=s"))
    flags = ["--base=s", *SFT[:3], "--task=bigsum", "--prompts=2", "--samples=2", "--max-new-tokens=4"]
    killed_and_resumed(box, "chat_rl", [*flags, "--num-iterations=12", "--save-every=2", "--resume=auto"])


def killed_and_resumed(box: Box, command: str, flags: list[Any]) -> None:
    """Compare a run that was killed at five moments with one that was not."""
    expect_ok(box.run(command, *flags, "--run=whole"))
    for number in range(5):
        process = box.start(command, *flags, "--run=killed")
        box.wait_for_step("killed", 2 * number + 2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    expect_ok(box.run(command, *flags, "--run=killed"))
    assert weights(box, "killed") == weights(box, "whole")
    temporary = [path for path in Path(box.base).rglob("*") if ".tmp" in path.name]
    assert not temporary, temporary
