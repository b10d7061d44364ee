"""A conversation in the terminal: replies as they come, wrapped between words, and commands that begin with /.

The cache of the model is kept over the turns, so a message costs what it adds. Nothing of a conversation is
written to the disk unless /save asks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from nanochat.chat import conversation
from nanochat.chat.conversation import Conversation, Message, Part
from nanochat.chat.replies import ChatSession, ToolCall
from nanochat.common import console, flags, typed_json
from nanochat.common.errors import UserError, warn
from nanochat.common.progress import printable
from nanochat.config.arguments import ChatCliArgs
from nanochat.engine import Sampling
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

LONG_WORD = (
    20  # cells that are held back until it is known on which line a word stands; Chinese has no spaces
)

HELP = """\
/new            begin a new conversation
/undo           take the last message and its reply back
/retry          ask the last message again
/system TEXT    text before the first message; without TEXT, none
/temp X         sampling temperature; 0 takes the likeliest token
/topk N         sample among the N likeliest tokens; 0 means all
/save FILE      add the conversation to a jsonl file, which chat_data reads
/load FILE      go on with the last conversation of a jsonl file
/quit           leave, as Ctrl-D does
Ctrl-C ends a reply and keeps what was said. A message that begins with / is written with a space before it."""


class Terminal:
    """A conversation of a person and a model: what was said, and how the next reply is made.

    Attributes:
        said: messages of user and assistant in turn; the last one is a reply, or there is none.
        args: flags of the command, which /system, /temp and /topk change.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, args: ChatCliArgs) -> None:
        """Begin with nothing said."""
        self.tokenizer, self.args = tokenizer, args
        self.context = model.config.sequence_len
        self.said: Conversation = ()
        self._session = ChatSession(model, tokenizer)
        self._replies = 0  # each draws with a seed of its own, so that /retry is another one
        self._is_shortened = False
        self._page = Page()

    def talk(self) -> None:
        """Read messages and commands until Ctrl-D, Ctrl-C or /quit."""
        self._page.note("Ctrl-D leaves, Ctrl-C ends a reply, /help lists the commands.")
        while not console.reader_is_gone():
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.split() == ["/quit"]:
                return
            try:
                if line.startswith("/"):
                    self.command(*line.split(maxsplit=1))
                elif line.strip():
                    with _noted_interrupt() as is_interrupted:
                        self.ask(line.strip(), is_interrupted)
            except (UserError, OSError) as error:
                self._page.note(printable(f"{error}"))

    def ask(self, text: str, is_interrupted: Callable[[], bool] = bool) -> None:
        """Print the reply to a message as it comes, and keep both; without a reply, neither.

        Args:
            text: the message.
            is_interrupted: asked after every token, whether to end the reply there.

        Raises:
            UserError: the message does not fit into the context.
        """
        asked = (*self.said, Message("user", (Part("text", text),)))
        sampling = Sampling(
            self.args.max_new_tokens,
            self.args.temperature,
            self.args.top_k,
            self.args.seed + self._replies,
        )
        self._replies += 1
        parts: list[Part] = []
        for event in self._session.say(self._fitting(asked), sampling, tools=self.args.tools):
            if isinstance(event, ToolCall):
                parts += [Part("python", event.expression), Part("python_output", event.result)]
                self._page.tool_call(f"{event.expression} = {event.result}")
            elif event:
                before = parts.pop().text if parts and parts[-1].kind == "text" else ""
                parts.append(Part("text", before + event))
                self._page.write(event)
            if is_interrupted() or console.reader_is_gone():
                break
        self._page.end()
        if parts:
            self.said = (*asked, Message("assistant", tuple(parts)))

    def command(self, name: str, value: str = "") -> None:
        """Carry out a line that begins with a slash.

        Raises:
            UserError: an unknown command, or a value that it cannot use.
        """
        actions: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/undo": self._undo,
            "/retry": self._retry,
            "/system": lambda text: self._change(system=text),
            "/temp": lambda number: self._change(temperature=_number(float, number)),
            "/topk": lambda number: self._change(top_k=_number(int, number)),
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: self._page.note(HELP),
        }
        if name not in actions:
            raise UserError(f"{name}: no such command. /help lists them.")
        actions[name](value.strip())

    def _fitting(self, asked: Conversation) -> Conversation:
        """The messages that the model reads: the oldest are left out where the context is full."""
        if self.args.system:
            asked = (Message("system", (Part("text", self.args.system),)), *asked)
        room = self.context - min(self.args.max_new_tokens, self.context // 4)
        kept, dropped = conversation.fit(self.tokenizer, asked, room)
        if dropped and not self._is_shortened:
            self._is_shortened = True
            self._page.note(
                f"The context of {self.context} tokens is full: the model forgets the oldest turns."
            )
        return kept

    def _new(self, _: str) -> None:
        self.said, self._is_shortened = (), False

    def _undo(self, _: str) -> None:
        if not self.said:
            raise UserError("nothing was said yet.")
        self.said = self.said[:-2]

    def _retry(self, _: str) -> None:
        before = self.said
        self._undo("")
        with _noted_interrupt() as is_interrupted:
            self.ask(before[-2].parts[0].text, is_interrupted)

    def _change(self, **values: object) -> None:
        changed = dataclasses.replace(self.args, **values)  # type: ignore[arg-type]
        flags.require_domain(changed)
        self.args = changed

    def _save(self, name: str) -> None:
        if not name or not self.said:
            raise UserError("/save FILE: name a file, once something was said.")
        said = self.said
        if self.args.system:
            said = (Message("system", (Part("text", self.args.system),)), *said)
        messages = [
            {
                "role": message.role,
                "content": [{"type": part.kind, "text": part.text} for part in message.parts],
            }
            for message in said
        ]
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self._page.note(printable(f"added to {name}"))

    def _load(self, name: str) -> None:
        path = Path(name).expanduser()
        lines = path.read_bytes().splitlines()
        try:
            row = typed_json.parse(lines[-1] if lines else b"")
        except ValueError as error:
            raise UserError(
                f"{name}:{len(lines)}: {error}. Each line holds a conversation in JSON."
            ) from error
        loaded = conversation.read(row, f"{name}:{len(lines)}")
        self._new("")
        has_system = loaded[0].role == "system"
        self._change(system=loaded[0].parts[0].text if has_system else "")
        self.said = loaded[has_system:]
        self._page.note(printable(f"{len(self.said) // 2} turns loaded from {name}"))


class Page:
    """Where a reply is printed: on a terminal wrapped between words, elsewhere as it is."""

    def __init__(self) -> None:
        """Begin at the left edge."""
        self._console = Console(highlight=False)
        self._is_terminal = sys.stdout.isatty()
        self._column = 0
        self._held = ""  # the last word so far, with the spaces before it

    def write(self, text: str) -> None:
        """Print the next piece of a reply."""
        if not self._is_terminal:
            print(text, end="", flush=True)
            return
        pieces = re.findall(r"\n|[^\S\n]+\S*|\S+", self._held + printable(text).expandtabs(4))
        self._held = "" if pieces[-1] == "\n" or cell_len(pieces[-1]) >= LONG_WORD else pieces.pop()
        for piece in pieces:
            self._place(piece)
        sys.stdout.flush()

    def tool_call(self, text: str) -> None:
        """Print what was computed, on a line of its own."""
        if not self._is_terminal:  # a program reads the reply alone
            print(text, file=sys.stderr, flush=True)
            return
        self.end()
        self.note(printable(text))

    def note(self, text: str) -> None:
        """Print what is not of the reply."""
        self._console.print(Text(text, style="dim"))

    def end(self) -> None:
        """End the line, unless it has just begun."""
        self._place(self._held)
        self._held = ""
        if self._column or not self._is_terminal:
            self._place("\n")

    def _place(self, piece: str) -> None:
        width, size = self._console.width, cell_len(piece)
        if piece == "\n" or (self._column and self._column + size > width):
            print()
            piece, self._column = piece.lstrip(), 0
            size = cell_len(piece)
        print(piece, end="", flush=True)
        self._column = (self._column + size) % width


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C is noted: it ends a reply between two tokens, never within the model."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _number(kind: Callable[[str], float], text: str) -> float:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"{text!r}: expected a number.") from error
