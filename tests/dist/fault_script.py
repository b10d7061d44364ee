"""Run by torchrun: base_train, in which a fault of the real kind befalls one rank at one step, once.

    fault_script.py KIND RANK STEP WHERE FLAG...

The fault befalls the rank in step STEP where it fetches its batch ("loader"), computes ("forward") or is about
to join the others in a sum ("collective"); or after STEP steps in the middle of a validation ("eval") or of
writing a checkpoint ("save").

Of a launch that is restarted, only the first try has the fault.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nanochat.checkpoint import format as checkpoint_format
from nanochat.train import run as train_run
from nanochat.data.train_loader import TrainLoader, ValBatches
from nanochat.model.gpt import GPT


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


def before(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """The function, with something that happens first."""

    def both(*args: Any, **options: Any) -> Any:
        act()
        return function(*args, **options)

    return both


def amid(iterate: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """An iterator, with something that happens between its first item and its second."""

    def items(*args: Any) -> Any:
        found = iterate(*args)
        yield next(found)
        act()
        yield from found

    return items


def main() -> None:
    kind, rank, step, where, *flags = [word for word in sys.argv[1:] if word != "--"]
    sys.argv[1:] = flags
    chosen = os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    real_step = train_run.train_step
    at: list[Any] = []

    def fault() -> None:
        if chosen and at and at[0].step == int(step):
            state = at.pop()
            befall(kind, state)

    def train_step(plan: Any, state: Any, *rest: Any) -> Any:
        at[:] = [state] if state.step <= int(step) else []
        return real_step(plan, state, *rest)

    train_run.train_step = train_step
    homes: dict[str, tuple[Any, str]] = {
        "loader": (TrainLoader, "next_batch"),
        "forward": (GPT, "loss"),
        "collective": (dist, "all_reduce"),
        "eval": (ValBatches, "__iter__"),
        "save": (checkpoint_format, "save_tensors"),
    }
    home, name = homes[where]
    wrap = amid if where == "eval" else before
    setattr(home, name, wrap(getattr(home, name), fault))
    from scripts.base_train import main as base_train

    base_train()


if __name__ == "__main__":
    main()
