"""Finetune a base model on conversations: `python -m scripts.chat_sft --base d12`, or by torchrun.

What is imported here loads no libraries: signals are heard before those are loaded, which takes seconds.
"""

from __future__ import annotations

from nanochat.common import errors
from nanochat.common.stop_signals import heeding_signals


@errors.cli
def main() -> None:
    """Listen, train, and leave with the exit code that says how the run has ended."""
    heeding_signals(finetune_as_asked)


def finetune_as_asked() -> str:
    """Parse, plan, train, report; the status of the run."""
    from nanochat.chat import finetune, sft
    from nanochat.config import arguments
    from nanochat.config.arguments import SftArgs

    return finetune.run(arguments.parse(SftArgs), sft.prepare)


if __name__ == "__main__":
    main()
