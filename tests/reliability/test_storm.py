"""P4, P8 in a storm: kills and signals at random moments, however a run was started, and what is left then.

A session is one process (or torchrun with two) of base_train, ended at random. Whatever it was started with,
and whatever has been done to its checkpoints before, afterwards as many whole ones are there as --keep-last
promises, only the steps since the last save are lost, and after all sessions the run ends at the same bits.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint.format import MANIFEST, MODEL, OPTIMIZER, STATE, folder_of, steps_of
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import STOPPED
from nanochat.data import parquet_shards, pending_download
from nanochat.data.corpus import Corpus
from tests.conftest import REPO
from tests.dist.launch import command, digest, lines
from tests.reliability.figures import Figure
from tests.reliability.warm import Warm, WarmServer
from tests.tiny import WORDS, command_line, tiny_corpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
Process = subprocess.Popen[bytes] | Warm
EVERY = 5  # steps between saves
SESSIONS = int(os.environ.get("NANOCHAT_STORM", "12"))  # of all campaigns together; one takes 5 to 10 s
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
KINDS = ("auto", "auto", "step", "extend", "flip", "manifest", "torn")


@pytest.fixture(scope="module")
def server() -> Iterator[WarmServer]:
    with WarmServer() as started:
        yield started


class Campaign:
    """Sessions of one run, each ended at random, and what must be true after each."""

    def __init__(self, server: WarmServer, name: str, ranks: int, keep_last: int, **changes: Any) -> None:
        """`changes` are those of the flags."""
        self.server = server
        self.run, self.ranks, self.keep_last, self.rng = name, ranks, keep_last, random.Random(name)
        self.changes = {"save_every": EVERY, "eval_every": 50, "keep_last": keep_last, **changes}
        self.done_again = 0
        self.back_to: int | None = None  # the step to go on from after a session that had another horizon

    def argv(self, run: str, **more: Any) -> list[str]:
        """The command line of a session."""
        flags = command_line(run=run, **{**self.changes, **more})
        if self.ranks == 1:
            return [sys.executable, "-m", "scripts.base_train", *flags]
        return command(self.ranks, [*flags, "--device-type=cpu"])

    def to_the_end(self, run: str, **more: Any) -> None:
        """Run without a disturbance."""
        log = files.run_dir(run).with_name(f"{run}-end.log")
        process = self._start(0, log, run, more)
        assert process.wait(600) == 0, log.read_text(errors="replace")[-2000:]

    def whole(self) -> set[int]:
        """Steps whose checkpoints verify."""
        found = set()
        for step in steps_of(self.run):
            with contextlib.suppress(UserError):
                checkpoint_format.verify(folder_of(self.run, step))
                found.add(step)
        return found

    def reached(self) -> int:
        """Steps that metrics.jsonl tells of."""
        path = files.run_dir(self.run) / "metrics.jsonl"
        done = path.read_text(errors="replace") if path.exists() else ""
        return 1 + max(map(int, re.findall(r'"kind": "step", "step": (\d+),.*\}\n', done)), default=-1)

    def session(self, number: int, how: str) -> None:
        """One start, one end at random; an AssertionError where a promise is broken."""
        how = "back" if self.back_to is not None else how
        before = self.whole()
        more, start = self._prepare(how, before)
        log = files.run_dir(self.run).with_name(f"{self.run}-{number}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()  # it is read before the process has opened it
        process = self._start(number, log, self.run, more)
        try:
            self._wait_for_a_moment(process, number, start, log)
            self._end(process, number, log)
        finally:
            kill(process)
        told = log.read_text(errors="replace")
        assert self.ranks > 1 or "Traceback" not in told, told[-2000:]
        stepped = steps_shown(log) > 0
        saved = {int(step) for step in re.findall(r"^saved .*step_(\d{6,}) in", told, re.MULTILINE)}
        promised, whole = {step for step in before if step <= start} | saved, self.whole()
        assert len(whole) >= min(self.keep_last, len(promised)), f"{sorted(whole)} of {sorted(promised)}"
        assert max(whole, default=0) >= max(promised, default=0), f"{sorted(whole)} of {sorted(promised)}"
        if how == "extend" or (how == "back" and not stepped):
            self.back_to = start  # or the end would not be the same
        if stepped:
            lost = self.reached() - max(whole, default=0)
            self.done_again = max(self.done_again, lost)
            # Steps go on while a save is written, which is waited for before the next: within two intervals.
            assert lost < 2 * EVERY, f"{lost} steps to do again"

    def _start(self, number: int, log: Path, run: str, more: dict[str, Any]) -> Process:
        """One in eight is the command itself, import and all, and so is every torchrun."""
        if self.ranks == 1 and number % 8 != 7:
            return self.server.start(command_line(run=run, **{**self.changes, **more}), log)
        with log.open("w") as out:
            argv = self.argv(run, **more)
            return subprocess.Popen(argv, cwd=REPO, stdout=out, stderr=out, start_new_session=True)

    def _prepare(self, how: str, whole: set[int]) -> tuple[dict[str, Any], int]:
        """Damage what is to be damaged; the flags of the start, and the step that it goes on from."""
        newest = max(whole, default=0)
        if how == "back":
            assert self.back_to is not None
            step, self.back_to = self.back_to, None
            return {"resume": str(step) if step else "auto"}, step
        if how == "step" and whole:
            step = self.rng.choice(sorted(whole))
            return {"resume": str(step)}, step
        if how == "extend":
            longer = self.changes["num_iterations"] * 2
            # All are kept: the next session goes back to this start, which a signal may have saved anywhere.
            more = {"resume": "auto", "extend": True, "num_iterations": longer, "keep_every": 1}
            return more, newest
        if how in ("flip", "manifest", "torn") and len(whole) > 1:
            damage(folder_of(self.run, newest), how, self.rng)
            newest = max(whole - {newest})
        return {"resume": "auto"}, newest

    def _wait_for_a_moment(self, process: Process, number: int, start: int, log: Path) -> None:
        """At the start, after some steps, within a save, or while the loader waits."""
        where, deadline = self.rng.choice(("start", "steps", "steps", "save")), time.monotonic() + 120
        if where == "start":
            until, condition = time.monotonic() + self.rng.uniform(0, 6 if number % 8 == 7 else 1), None
        else:
            steps = start + self.rng.randrange(1, 3 * EVERY)
            until, condition = deadline, lambda: steps_shown(log) >= steps
        while process.poll() is None and time.monotonic() < until:
            if condition is not None and condition():
                break
            if until == deadline and "has not arrived yet" in log.read_text(errors="replace"):
                until = time.monotonic() + self.rng.uniform(0, 2)
            time.sleep(0.01)
        folder = files.checkpoints_dir(self.run)
        until = min(deadline, time.monotonic() + 3)
        while where == "save" and process.poll() is None and time.monotonic() < until:
            if list(folder.glob(".tmp-step_*")):
                break
            time.sleep(0.0005)

    def _end(self, process: Process, number: int, log: Path) -> None:
        """Two of three are killed, the third is asked to stop."""
        code = process.poll()
        assert code in (None, 0), f"exit {code}: {log.read_text()[-2000:]}"
        if number % 3 < 2:
            return
        os.kill(process.pid, self.rng.choice(STOPS if self.ranks == 1 else STOPS[:1]))
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            raise AssertionError("alive two minutes after the signal") from None
        told = log.read_text(errors="replace")
        if self.ranks == 1:  # torchrun has an exit code of its own
            assert code in (0, STOPPED), f"exit {code}: {told[-1500:]}"
        if (stopped := re.search(r"stopped by a signal after step (\d+)", told)) is not None:
            assert int(stopped[1]) in self.whole(), f"step {stopped[1]} is lost: {told[-1500:]}"


def steps_shown(log: Path) -> int:
    """The step that a session has come to, by its console."""
    return max(
        map(int, re.findall(r"^step +(\d+)/.*loss", log.read_text(errors="replace"), re.MULTILINE)), default=0
    )


def kill(process: Process) -> None:
    """End a process and all that it has started, and wait until none is left."""
    family = [process.pid]
    for pid in family:  # grows while it is gone through
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                family += [int(child) for child in (task / "children").read_text().split()]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in family[1:]):
        assert time.monotonic() < deadline, "a rank is alive"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether it is there and no corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def damage(folder: Path, how: str, rng: random.Random) -> None:
    """Flip a bit of a file, tear one off, or lose the manifest."""
    path = folder / rng.choice((MODEL, OPTIMIZER, STATE))
    if how == "manifest":
        (folder / MANIFEST).unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data if how == "flip" else data[: rng.randrange(len(data))])


def storm(campaign: Campaign, sessions: int, figure: Figure) -> None:
    """So many sessions, then the end beside that of a run that was left in peace."""
    kinds = [*KINDS[1:], *campaign.rng.choices(KINDS, k=max(0, sessions - len(KINDS) + 1))]
    campaign.rng.shuffle(kinds)
    for number, how in enumerate(kinds[:sessions]):
        with figure.trial(f"{campaign.run}, session {number} ({how})"):
            campaign.session(number, how)
    figure.measure(campaign.done_again, f"steps done again, saving every {EVERY}")
    more = {"resume": str(campaign.back_to or "auto")}
    with figure.trial(f"{campaign.run}, the end"):
        campaign.to_the_end(campaign.run, **more)
        campaign.to_the_end(f"{campaign.run}-whole")
        last = campaign.changes["num_iterations"]
        assert digest(campaign.run, last) == digest(f"{campaign.run}-whole", last)
        assert lines(campaign.run, "") == lines(f"{campaign.run}-whole", "")


def test_a_short_storm(server: WarmServer, figure: Any, tmp_path: Path) -> None:
    """Two kills and a signal: what every change is tried with."""
    tiny_corpus(tmp_path)
    campaign = Campaign(server, "short", 1, 2, num_iterations=40)
    storm(campaign, 3, figure("P4", "kills and signals at random moments, in a short form"))


@pytest.mark.slow
@pytest.mark.timeout(200 + 120 * SESSIONS)
@pytest.mark.parametrize(
    ("ranks", "keep_last", "share"),
    [(1, 2, 0.4), (1, 1, 0.25), (2, 3, 0.15)],
    ids=["keep 2", "keep 1", "2 ranks"],
)
def test_kills_and_signals_cost_what_was_promised_and_change_nothing(
    ranks: int, keep_last: int, share: float, figure: Any, tmp_path: Path, server: WarmServer
) -> None:
    tiny_corpus(tmp_path)
    sessions = max(2, round(share * SESSIONS))
    name = f"storm-{ranks}-{keep_last}"
    campaign = Campaign(server, name, ranks, keep_last, num_iterations=12 * sessions + 40)
    unit = f"kills and signals at random moments of runs started in {len(set(KINDS))} ways, {ranks} rank(s)"
    storm(campaign, sessions, figure("P4", f"{unit}, --keep-last={keep_last}"))


@pytest.fixture
def shard_under_way(tmp_path: Path, base_dir: Path) -> Iterator[Path]:
    """A corpus of the hub's kind whose second shard is still fetched by somebody; yields where it will be."""
    tiny_corpus(tmp_path)
    folder, members = base_dir / "data" / "fineweb-edu", []
    folder.mkdir(parents=True)
    for index, (split, documents) in enumerate((("train", 60), ("train", 400), ("val", 60))):
        rng = random.Random(index)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(documents)]
        members += parquet_shards.write_shards(texts, folder, split, index)
    source = "karpathy/fineweb-edu-100b-shuffle@x"
    Corpus(folder, "fineweb-edu", source, members).write_manifest(folder)
    missing = folder / members[1].name
    missing.rename(tmp_path / missing.name)
    with pending_download.staging(folder):
        yield missing


@pytest.mark.slow
@pytest.mark.timeout(200 + 120 * SESSIONS)
def test_kills_and_signals_while_the_loader_waits_for_a_shard(
    shard_under_way: Path, tmp_path: Path, figure: Any, server: WarmServer
) -> None:
    """The first shard is enough for some steps; then every session waits until it is ended."""
    found = figure("P4", "kills and signals while the loader waits for a shard")
    changes = {"corpus": "fineweb-edu", "tokenizer": "local", "num_iterations": 120}
    campaign = Campaign(server, "waits", 1, 2, **changes)
    for number in range(max(3, round(0.2 * SESSIONS))):
        with found.trial(f"session {number}"):
            campaign.session(number, "auto")
    shutil.copyfile(tmp_path / shard_under_way.name, shard_under_way)
    with found.trial("the end"):
        campaign.to_the_end("waits", resume="auto")
        campaign.to_the_end("waits-whole")
        assert digest("waits", 120) == digest("waits-whole", 120)
        assert lines("waits", "") == lines("waits-whole", "")
