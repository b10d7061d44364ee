"""Talk to a chat model: `python -m scripts.chat_cli --run quickstart-sft`."""

from __future__ import annotations

import contextlib
import io
import sys

from nanochat.chat.terminal import Terminal
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import errors, machine
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config.arguments import ChatCliArgs
from nanochat.model import attention_backends, decode_step


@errors.cli
def main() -> None:
    """Parse and load; then print one reply, to -p or to a pipe, or talk."""
    args = arguments.parse(ChatCliArgs)
    if not args.run:
        raise UserError("name a run: python -m scripts.chat_cli --run quickstart-sft")
    message = args.prompt or message_of_pipe()
    device = machine.detect_device(args.device_type)
    precision, _ = attention_backends.choose_precision(device, args.dtype, args.attention)
    model, tokenizer, meta = checkpoint_state.load_model(
        args.run, args.step, device=device, precision=precision
    )
    decode_step.use_weights(model, args.weights)
    if not meta["plan"].get("finetune"):
        errors.warn(
            f"run {args.run!r} has seen no conversations, so it continues text instead of answering. "
            f"Finetune it first: python -m scripts.chat_sft --base {args.run}"
        )
    terminal = Terminal(model, tokenizer, args)
    if message:
        terminal.ask(message)
        return
    with contextlib.suppress(ImportError):  # line editing and history, which stays in memory
        import readline  # noqa: F401
    terminal.talk()


def message_of_pipe() -> str:
    """All that a pipe or a file holds, as one message; nothing where a person types.

    Raises:
        UserError: it holds nothing.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # there is none where the shell has closed it
        sys.stdin.reconfigure(errors="replace")
        if sys.stdin.isatty():
            return ""
        if text := sys.stdin.read().strip():
            return text
    raise UserError("standard input is empty. Write a message to it, or give one with -p.")


if __name__ == "__main__":
    main()
