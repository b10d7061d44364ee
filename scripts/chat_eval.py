"""Score a chat model: `python -m scripts.chat_eval --run d12-sft --tasks made,chatcore`, or with torchrun."""

from __future__ import annotations

from nanochat.chat import evaluate
from nanochat.common import errors
from nanochat.config import arguments
from nanochat.config.arguments import ChatEvalArgs
from nanochat.distributed import world


@errors.cli
def main() -> None:
    """Parse, score."""
    args = arguments.parse(ChatEvalArgs)
    with world.join(args.device_type, args.dist_timeout) as ranks:
        evaluate.main(args, ranks)


if __name__ == "__main__":
    main()
