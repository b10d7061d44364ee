"""Reinforce right replies of a chat model: `python -m scripts.chat_rl --base d12-sft`, or by torchrun.

What is imported here loads no libraries: signals are heard before those are loaded, which takes seconds.
"""

from __future__ import annotations

from nanochat.common import errors
from nanochat.common.stop_signals import heeding_signals


@errors.cli
def main() -> None:
    """Listen, train, and leave with the exit code that says how the run has ended."""
    heeding_signals(reinforce_as_asked)


def reinforce_as_asked() -> str:
    """Parse, plan, train, report; the status of the run."""
    from nanochat.chat import finetune, rl
    from nanochat.config import arguments
    from nanochat.config.arguments import RlArgs

    return finetune.run(arguments.parse(RlArgs), rl.prepare)


if __name__ == "__main__":
    main()
