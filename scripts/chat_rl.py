"""Reinforce right replies of a chat model: `python -m scripts.chat_rl --base d12-sft`, or by torchrun.

What is imported here loads no libraries: signals are heard before those are loaded, which takes seconds.
"""

from __future__ import annotations

import json

from nanochat.common import errors
from nanochat.common.stop_signals import STOPPED, StoppedEarly, leave, leave_early, stop_signals


@errors.cli
def main() -> None:
    """Listen, train, and leave with the exit code that says how the run has ended."""
    with stop_signals(has_work=False):
        try:
            status = reinforce_as_asked()
        except StoppedEarly:
            leave_early()
        leave(STOPPED if status == "stopped" else 0)


def reinforce_as_asked() -> str:
    """Parse, plan, train, report; the status of the run."""
    from nanochat.chat import rl
    from nanochat.config import arguments
    from nanochat.config import plan as planning
    from nanochat.config.arguments import RlArgs
    from nanochat.distributed import world
    from nanochat.model import attention_backends
    from nanochat.train import run as train_run

    args = arguments.parse(RlArgs)
    with world.join(args.device_type, args.dist_timeout) as ranks:
        plan, stage = rl.prepare(args, ranks)
        if args.dry_run:
            ranks.print0(json.dumps(plan.to_dict(), indent=2))
            return "planned"
        precision, reason = attention_backends.choose_precision(
            ranks.device, args.dtype, args.attention, False, ranks
        )
        for line in (reason, *planning.describe(plan), *plan.notices):
            ranks.print0(line)
        return train_run.conclude(train_run.run(plan, stage, precision, ranks), ranks)


if __name__ == "__main__":
    main()
