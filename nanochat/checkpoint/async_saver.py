"""Asynchronous saving: a thread writes the snapshot that was copied between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.format import Snapshot
from nanochat.checkpoint.state import TrainState
from nanochat.common.errors import UserError, describe_os_error
from nanochat.config.plan import Plan
from nanochat.distributed.world import World

MAX_FAILURES = 3  # in a row; the run does not go on without a checkpoint
SLOW_S = 20.0  # torchrun, Slurm and Kubernetes kill 30 s after they have asked to stop


class Saver:
    """Writes checkpoints of one run, one at a time, in a thread of the main rank.

    A save that fails costs nothing but itself: it is told of, and the next one tries again.
    """

    def __init__(
        self,
        plan: Plan,
        fingerprints: dict[str, str],
        world: World,
        say: Callable[[str], None],
        saved_step: int | None,
    ) -> None:
        """`saved_step` is the checkpoint that the run has gone on from, which is not written again."""
        self._plan, self._fingerprints, self._world, self._say = plan, fingerprints, world, say
        self._saved_step = saved_step
        self._began = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        self._failures = 0

    def is_time(self) -> bool:
        """Whether --save-minutes have passed since the last save; all ranks ask."""
        minutes = self._plan.args.save_minutes
        if not minutes:
            return False
        return self._world.any_rank(self._world.is_main and time.monotonic() - self._began >= 60 * minutes)

    def save(self, state: TrainState) -> None:
        """Copy the state, and write it while training goes on. All ranks call it.

        Raises:
            UserError: three saves in a row have failed.
        """
        if state.step == self._saved_step:
            return
        self._settle()
        if self._world.any_rank(self._failures >= MAX_FAILURES):
            raise UserError(f"{MAX_FAILURES} saves in a row have failed; training stops. {self._error or ''}")
        self._began = time.monotonic()
        snapshot = checkpoint_state.snapshot(state, self._plan, self._fingerprints, self._world)
        self._saved_step = state.step
        if snapshot is not None:
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
            self._thread.start()

    def finish(self) -> None:
        """Wait until everything is written. All ranks call it.

        Raises:
            UserError: the last save has failed.
        """
        self._settle()
        if self._world.any_rank(self._failures > 0):
            raise UserError(f"the last state of the run could not be saved. {self._error or ''}")

    def _settle(self) -> None:
        """Wait for the save in progress, and count it if it has failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._failures = self._failures + 1 if self._error is not None else 0

    def _write(self, snapshot: Snapshot) -> None:
        args, folder = self._plan.args, snapshot.folder
        self._error = UserError(f"{folder}: not written.")  # until it is
        try:
            seconds = snapshot.write()
        except (UserError, OSError) as error:
            text = describe_os_error(error) if isinstance(error, OSError) else str(error)
            self._error = UserError(text)
            self._say(f"warning: {folder.name} was not saved, the earlier ones are as they were: {text}")
            return
        self._error = None
        late = " That is long: a preempted machine gives about 30 s." if seconds > SLOW_S else ""
        self._say(f"saved {folder} in {seconds:.1f} s.{late}")
        try:  # the checkpoint is there: what goes wrong from here on has not lost it
            kept = checkpoint_format.retained(args.run_name, snapshot.meta["step"])
            checkpoint_format.prune(args.run_name, kept, args.keep_last, args.keep_every, self._say)
        except (UserError, OSError) as error:
            self._say(f"warning: no old checkpoint was deleted: {error}")
