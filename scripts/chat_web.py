"""Serve a model to browsers and to OpenAI's clients: `python -m scripts.chat_web --run quickstart-sft`."""

from __future__ import annotations

from typing import Any

import torch

from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import errors, listener, machine
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config.arguments import ChatWebArgs
from nanochat.model import attention_backends, decode_step

DRAIN_S = 10  # that running replies get when the server is told to stop


@errors.cli
def main() -> None:
    """Parse, take the port, load the model onto each device, and serve until told to stop."""
    args = arguments.parse(ChatWebArgs)
    if not args.run:
        raise UserError("name a run: python -m scripts.chat_web --run quickstart-sft")
    try:
        import uvicorn

        from nanochat.serve.openai_api import Served
        from nanochat.serve.server import Server
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing, which serving needs: pip install '.[serve]'") from None
    key = key_of(args)
    port = listener.bind(args.host, args.port)
    device = machine.detect_device(args.device_type)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    precision, _ = attention_backends.choose_precision(device, args.dtype, args.attention)
    loaded = [
        checkpoint_state.load_model(
            args.run, args.step, device=machine.detect_device(args.device_type, rank), precision=precision
        )
        for rank in range(count)
    ]
    for one, _, _ in loaded:
        decode_step.use_weights(one, args.weights)
    model, tokenizer, meta = loaded[0]
    if not meta["plan"].get("finetune"):
        errors.warn(
            f"run {args.run!r} has seen no conversations, so it continues text instead of answering. "
            f"Finetune it first: python -m scripts.chat_sft --base {args.run}"
        )
    served = Served(args.run, tokenizer, model.config.sequence_len, args.slots, args.max_messages)
    server = Server(served, [one for one, _, _ in loaded], args, key)
    port.listen(128)  # from here on, who connects is answered
    where = f"{count} x {machine.device_name(device)}" if count > 1 else machine.device_name(device)
    print(f"{args.run}, step {meta['step']}, on {where}: {args.slots} replies at once")
    print(f"Open {listener.address_of(port)} in a browser. Ctrl-C ends the server.", flush=True)
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    config = uvicorn.Config(server.app, http="h11", ws="none", timeout_graceful_shutdown=DRAIN_S, **quiet)
    uvicorn.Server(config).run([port])


def key_of(args: ChatWebArgs) -> str:
    """The key that requests have to bring, "" for none.

    Raises:
        UserError: there has to be one, or the file holds none.
    """
    if args.api_key_file:
        return listener.read_key(args.api_key_file)
    if args.key and not listener.is_loopback(args.host):
        raise UserError(
            f"--host={args.host}: others can reach it, and there is no key. Give --api-key-file, "
            "or --no-key to let everybody in."
        )
    return ""


if __name__ == "__main__":
    main()
