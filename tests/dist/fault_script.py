"""Run by torchrun: base_train, in which a fault of the real kind befalls one rank at one step, once.

    fault_script.py KIND RANK STEP FLAG...

Of a launch that is restarted, only the first try has the fault.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any

import torch

from nanochat import train
from nanochat.dataloader import TrainLoader


def befall(kind: str, state: Any) -> None:
    """Do to this process what befalls it."""
    match kind:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hung":
            time.sleep(1e6)
        case "hung in C, holding the interpreter":
            ctypes.PyDLL(None).sleep(1_000_000)
        case "an exception":
            raise OSError("a shard could not be read")
        case "a flipped bit":
            # Of those that every rank updates for itself; others are overwritten by their owner's every step.
            state.model.resid_scale.detach().view(torch.int32)[1] ^= 1 << 20
        case "preempted":
            os.kill(os.getpid(), signal.SIGTERM)
        case _:
            raise AssertionError(kind)


def main() -> None:
    kind, rank, step, *flags = [word for word in sys.argv[1:] if word != "--"]
    sys.argv[1:] = flags
    chosen = os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    real_step, real_batch = train.train_step, TrainLoader.next_batch
    at: list[Any] = []

    def next_batch(loader: TrainLoader) -> Any:
        if at and at[0].step == int(step) and chosen:
            befall(kind, at[0])
        return real_batch(loader)

    def train_step(plan: Any, state: Any, *rest: Any) -> Any:
        at[:] = [state]
        return real_step(plan, state, *rest)

    TrainLoader.next_batch = next_batch  # type: ignore[method-assign]
    train.train_step = train_step
    from scripts.base_train import main as base_train

    base_train()


if __name__ == "__main__":
    main()
