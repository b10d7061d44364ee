"""A conversation in the terminal: replies as they come, wrapped between words, and commands behind a slash.

The cache of the model is kept over the turns, so a message costs what it adds. Nothing of a conversation is
written to the disk unless /save asks for it.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

from nanochat.chat import conversation, sources
from nanochat.chat.conversation import Conversation, Message, Part
from nanochat.chat.replies import ChatSession, ToolCall
from nanochat.common import console, flags
from nanochat.common.errors import UserError
from nanochat.common.progress import Page
from nanochat.config.arguments import ChatCliArgs
from nanochat.engine import Sampling
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

COMMANDS = ("new", "undo", "retry", "system", "temp", "topk", "save", "load", "help", "quit")


class Terminal:
    """A conversation of a person and a model: what was said, and how the next reply is made.

    A command behind a slash is a method of its name, whose docstring is its line of /help.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, args: ChatCliArgs) -> None:
        """Begin with nothing said; the system text and the sampling are those of the flags."""
        self._tokenizer, self._args = tokenizer, args
        self._context = model.config.sequence_len
        self._session = ChatSession(model, tokenizer)
        self._page = Page()
        self._said = _system_text(args.system)  # then whole turns
        self._replies = 0  # each draws with a seed of its own, so that /retry gives another one
        self._is_shortened = self._is_interrupted = False

    def talk(self) -> None:
        """Read messages and commands until Ctrl-D, Ctrl-C or /quit; Ctrl-C within a reply ends that alone."""
        self._page.note("Ctrl-C ends a reply, Ctrl-D leaves, /help lists the commands.")
        try:
            while not console.reader_is_gone():
                line = input("> ")
                before = signal.signal(signal.SIGINT, self._interrupt)
                try:
                    self._obey(line)
                except (UserError, OSError, RuntimeError) as error:  # memory that runs out is of the last
                    self._page.note(str(error))
                finally:
                    signal.signal(signal.SIGINT, before)
        except (EOFError, KeyboardInterrupt):
            print()

    def ask(self, text: str, keep: int | None = None) -> None:
        """Print the reply to a message as it comes, and keep both; where nothing was said, neither.

        Args:
            text: the message.
            keep: how many of the earlier messages, as an end of a slice; by default all.

        Raises:
            UserError: the message does not fit into the context.
        """
        asked = (*self._said[:keep], Message("user", (Part("text", text),)))
        how, seed = self._args, self._args.seed + self._replies
        sampling = Sampling(how.max_new_tokens, how.temperature, how.top_k, seed)
        self._replies += 1
        self._is_interrupted = False
        parts: list[Part] = []
        for event in self._session.say(self._fitting(asked), sampling, tools=how.tools):
            if isinstance(event, ToolCall):
                parts += [Part("python", event.expression), Part("python_output", event.result)]
                self._page.note(f"{event.expression} = {event.result}")
            elif event:
                before = parts.pop().text if parts and parts[-1].kind == "text" else ""
                parts.append(Part("text", before + event))
                self._page.write(event)
            if self._is_interrupted or console.reader_is_gone():
                break
        self._page.end_line()
        if parts:
            self._said = (*asked, Message("assistant", tuple(parts)))

    def _obey(self, line: str) -> None:
        name, _, value = line.rstrip().partition(" ")
        if not name.startswith("/"):
            if line.strip():
                self.ask(line.strip())
        elif name[1:] in COMMANDS:
            getattr(self, f"_{name[1:]}")(value.strip())
        else:
            raise UserError(f"{name}: no such command. /help lists them.")

    def _interrupt(self, *_: object) -> None:
        self._is_interrupted = True  # heard between two tokens, never within the model

    def _fitting(self, asked: Conversation) -> Conversation:
        room = self._context - min(self._args.max_new_tokens, self._context // 4)
        kept, dropped = conversation.fit(self._tokenizer, asked, room)
        if dropped and not self._is_shortened:
            self._is_shortened = True
            self._page.note(f"The context of {self._context} tokens is full: the first turns are forgotten.")
        return kept

    def _change(self, name: str, text: str) -> None:
        try:
            changed = dataclasses.replace(self._args, **{name: type(getattr(self._args, name))(text)})
        except ValueError as error:
            raise UserError(f"{text!r}: expected a number.") from error
        flags.require_domain(changed)
        self._args = changed

    def _new(self, _: str) -> None:
        """Begin a new conversation."""
        self._said = tuple(message for message in self._said if message.role == "system")
        self._is_shortened = False

    def _undo(self, _: str) -> None:
        """Take back the last message and its reply."""
        if len(self._said) > 1:
            self._said = self._said[:-2]

    def _retry(self, _: str) -> None:
        """Ask the last message again."""
        if len(self._said) > 1:
            self.ask("".join(part.text for part in self._said[-2].parts), keep=-2)

    def _system(self, text: str) -> None:
        """Put TEXT before the first message; without TEXT, nothing."""
        turns = (message for message in self._said if message.role != "system")
        self._said = (*_system_text(text), *turns)

    def _temp(self, number: str) -> None:
        """Sample at the temperature X; 0 takes the likeliest token."""
        self._change("temperature", number)

    def _topk(self, number: str) -> None:
        """Sample among the N likeliest tokens; 0 means all."""
        self._change("top_k", number)

    def _save(self, name: str) -> None:
        """Add the conversation to FILE, a jsonl file that chat_data reads."""
        if not name or len(self._said) < 2:
            raise UserError("name a file behind /save, once something was said.")
        messages = []
        for message in self._said:
            parts = [{"type": part.kind, "text": part.text} for part in message.parts]
            messages.append({"role": message.role, "content": parts})
        path = Path(name.removesuffix(".jsonl") + ".jsonl").expanduser()
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self._page.note(f"added to {path}")

    def _load(self, name: str) -> None:
        """Go on with the last conversation of FILE, of any kind that chat_data reads."""
        said = self._said
        for row in sources.checked(sources.of_files([Path(name).expanduser()]), None):
            said = conversation.read(row, name)
        self._said, self._is_shortened = said, False
        self._page.note(f"turns: {len(said) // 2}")

    def _help(self, _: str) -> None:
        """List the commands."""
        self._page.note("A message that begins with / is written with a space before it.")
        for name in COMMANDS:
            self._page.note(f"/{name:8}{getattr(self, f'_{name}').__doc__}")

    def _quit(self, _: str) -> None:
        """Leave, as Ctrl-D does."""
        raise EOFError


def _system_text(text: str) -> Conversation:
    return (Message("system", (Part("text", text),)),) if text else ()
