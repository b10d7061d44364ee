"""Score a trained model: `python -m scripts.base_eval --run d12 --eval core,bpb,sample`, or with torchrun."""

from __future__ import annotations

from nanochat.common import errors
from nanochat.config import arguments
from nanochat.config.arguments import EvalArgs
from nanochat.distributed import world
from nanochat.evaluation import base_eval


@errors.cli
def main() -> None:
    """Parse, score."""
    args = arguments.parse(EvalArgs)
    with world.join(args.device_type, args.dist_timeout) as ranks:
        base_eval.main(args, ranks)


if __name__ == "__main__":
    main()
