"""Downloads from a hub on this machine: what arrives is verified, what does not is named, nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.data import hub as hub_module
from nanochat.data import pending_download
from nanochat.data.corpus import Corpus
from nanochat.data.hub import Hub as HubClient
from nanochat.data.train_loader import TrainLoader
from nanochat.distributed.world import World
from tests.hub_server import (
    COMMIT,
    FAULTS,
    REPO,
    VAL,
    Hub,
    environment,
    fetch,
    numbered,
    running,
    start,
    text_of,
)
from tests.reliability.figures import Figure
from tests.test_dataloader import Letters, rows_of


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running(tmp_path, numbered(3)) as server:
        yield server


@pytest.fixture
def hub_client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client in this process asks the hub of the test, with a token."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_whole(hub: Hub, folder: Path, names: list[str]) -> None:
    """The folder has these shards, bit for bit, the manifest, and nothing else."""
    assert names_in(folder) == sorted(["manifest.json", *names])
    for name in names:
        assert (folder / name).read_bytes() == hub.contents[name]


def test_shards_arrive_verified_and_are_not_fetched_again(hub: Hub, base_dir: Path) -> None:
    done = fetch(hub, base_dir, "-n", "2")
    assert done.returncode == 0, done.stderr
    folder = base_dir / "data" / "fineweb-edu"
    assert_whole(hub, folder, numbered(2))
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["source"] == f"{REPO}@{COMMIT}"
    assert [(s["name"], s["split"], s["documents"], s["row_groups"]) for s in manifest["shards"]] == [
        ("shard_00000.parquet", "train", 1500, 2),
        ("shard_00001.parquet", "train", 1500, 2),
        (VAL, "val", 1500, 2),
    ]
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256(hub.contents[shard["name"]]).hexdigest()
    assert hub.tokens == {"Bearer secret"}

    assert fetch(hub, base_dir, "-n", "2").returncode == 0
    assert fetch(hub, base_dir, "-n", "3").returncode == 0
    assert hub.requests == dict.fromkeys(hub.contents, 1)

    damaged = bytearray(hub.contents["shard_00001.parquet"])
    damaged[1000] ^= 1
    (folder / "shard_00001.parquet").write_bytes(damaged)
    (folder / "shard_00002.parquet").write_bytes(b"cut")
    assert fetch(hub, base_dir, "-n", "3").returncode == 0
    assert hub.requests == {**dict.fromkeys(hub.contents, 2), "shard_00000.parquet": 1, VAL: 1}
    assert_whole(hub, folder, numbered(3))


def test_missing_shards_are_named_with_exit_code_2(hub: Hub, base_dir: Path) -> None:
    taken = {name: hub.contents.pop(name) for name in ("shard_00001.parquet", VAL)}
    failed = fetch(hub, base_dir, "-n", "3")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert VAL in failed.stderr
    hub.contents[VAL] = taken[VAL]
    failed = fetch(hub, base_dir, "-n", "3")
    assert failed.returncode == 2
    assert "1 missing: shard_00001.parquet" in failed.stderr
    assert "shard_00002" not in failed.stderr
    assert names_in(base_dir / "data" / "fineweb-edu") == []
    hub.contents.update(taken)
    assert fetch(hub, base_dir, "-n", "3").returncode == 0


def test_a_smaller_plan_lists_fewer_shards_and_the_larger_one_fetches_nothing_again(
    hub: Hub, base_dir: Path
) -> None:
    folder = base_dir / "data" / "fineweb-edu"
    for count in ("3", "1", "3"):
        assert fetch(hub, base_dir, "-n", count).returncode == 0
        listed = json.loads((folder / "manifest.json").read_text("utf-8"))["shards"]
        assert [s["split"] for s in listed] == ["train"] * int(count) + ["val"]
    assert hub.requests == dict.fromkeys(hub.contents, 1)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub: Hub, base_dir: Path) -> None:
    code = (
        "import sys; from nanochat.common import files\n"
        "files.free_bytes = lambda path: 1 << 20\n"
        "from scripts.dataset import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--corpus", "fineweb-edu", "-n", "3"],
        env=environment(hub, base_dir),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "to spare, but 0.0 GB are free" in done.stderr
    assert not hub.requests


def test_no_hub_is_said_in_one_line(base_dir: Path, tmp_path: Path, hub: Hub) -> None:
    hub.close()
    done = fetch(hub, base_dir, "-n", "1", delays_s="0")
    assert done.returncode == 2
    assert f"{REPO}: 1 missing: {VAL} (" in done.stderr
    assert names_in(base_dir / "data" / "fineweb-edu") == []


# -----------------------------------------------------------------------------
# P10: a download ends whole, or says why


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(fault) for fault, _ in rows)
    return "\n".join(["", *(f"  {fault:{width}}  {outcome}" for fault, outcome in rows)])


def test_every_fault_that_passes_is_survived(
    tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str], figure: Callable[..., Figure]
) -> None:
    passing = figure("P10", "faults of a transfer that pass")
    names = numbered(len(FAULTS))
    folder = base_dir / "data" / "fineweb-edu"
    with running(tmp_path, names, documents=400) as hub:
        hub.faults = dict(zip(names, FAULTS, strict=False))
        hub.times = {name: 2 if "dropped" in fault else 1 for name, fault in hub.faults.items()}
        done = fetch(hub, base_dir, "-n", str(len(FAULTS)))
        rows = [
            (fault, f"verified, after {hub.requests[name] + hub.ranges[name] - 1} answers")
            for name, fault in hub.faults.items()
            if (folder / name).is_file() and (folder / name).read_bytes() == hub.contents[name]
        ]
        with capsys.disabled():
            print(table(rows))
        for name, fault in hub.faults.items():
            with passing.trial(fault):
                assert (folder / name).read_bytes() == hub.contents[name]
                assert hub.times[name] == 0
        assert done.returncode == 0, done.stderr
        assert_whole(hub, folder, names)


PASSING = ("a redirect", "dropped, then ranges are ignored", "429 with Retry-After")  # even if they stay
QUICK = ["wrong bytes", "HTML with 200", "HTML of the right size", "the length is too small", "503", "500"]


@pytest.mark.parametrize(
    "lasting", [QUICK, pytest.param([f for f in FAULTS if f not in PASSING], marks=pytest.mark.slow)]
)
def test_every_fault_that_stays_is_named_and_leaves_nothing(
    tmp_path: Path,
    base_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lasting: list[str],
    figure: Callable[..., Figure],
) -> None:
    staying = figure("P10", f"faults of a transfer that stay, {len(lasting)} kinds")
    monkeypatch.setattr(pending_download, "BEGIN_S", 0.1)
    names = numbered(len(lasting))
    folder = base_dir / "data" / "fineweb-edu"
    with running(tmp_path, names, documents=400) as hub:
        hub.faults = dict(zip(names, lasting, strict=False))
        done = fetch(hub, base_dir, "-n", str(len(lasting)), delays_s="0.1")
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        reasons = dict(part.split(" (", 1) for part in line.split("missing: ")[1].split("; "))
        rows = []
        for name, fault in hub.faults.items():
            with staying.trial(fault):
                assert not (folder / name).exists()
                rows.append((fault, f"exit code {done.returncode}: {reasons[name]}"[:120]))
        with capsys.disabled():
            print(table(rows))
        assert done.returncode == 2
        left = [name for name in names_in(folder) if name not in names]
        assert left == ["manifest.json"]
        with pytest.raises(UserError, match="missing"):
            Corpus.read_manifest(folder).verify(Corpus.read_manifest(folder).shards[0])
        hub.faults = {}
        assert fetch(hub, base_dir, "-n", str(len(lasting))).returncode == 0
        assert_whole(hub, folder, names)


def test_a_disk_that_fills_midway_stops_the_download_and_leaves_nothing(hub: Hub, base_dir: Path) -> None:
    limit = len(hub.contents["shard_00000.parquet"]) // 2
    code = f"""
        import resource, signal
        from scripts import dataset
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        dataset.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "--corpus", "fineweb-edu", "-n", "3"],
        env=environment(hub, base_dir),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    folder = base_dir / "data" / "fineweb-edu"
    assert names_in(folder) == ["manifest.json"]
    assert fetch(hub, base_dir, "-n", "3").returncode == 0
    assert_whole(hub, folder, numbered(3))


def test_downloads_at_once_into_one_folder_do_not_disturb_each_other(hub: Hub, base_dir: Path) -> None:
    hub.chunk_s = 0.02
    processes = [start(hub, base_dir, "-n", "3") for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert_whole(hub, base_dir / "data" / "fineweb-edu", numbered(3))


def kill_often(tmp_path: Path, base_dir: Path, kills: int, pause_s: float, figure: Figure) -> None:
    """Kill downloads at random moments; after each, what has a shard's name is that shard."""
    rng = random.Random(0)
    folder = base_dir / "data" / "fineweb-edu"
    names = numbered(10)
    with running(tmp_path, names) as hub:
        hub.chunk_s = pause_s
        started = time.monotonic()
        assert fetch(hub, base_dir, "-n", "10").returncode == 0
        whole_s = time.monotonic() - started
        shutil.rmtree(folder)
        left_behind = killed = 0
        while killed < kills:
            process = start(hub, base_dir, "-n", "10")
            time.sleep(rng.uniform(0.2, 1.0) * whole_s)
            if process.poll() is None:
                process.kill()
                killed += 1
            process.communicate()
            if process.returncode == 0:
                assert_whole(hub, folder, names)
                shutil.rmtree(folder)
                continue
            with figure.trial(f"kill {killed}"):
                for path in folder.glob("shard_*") if folder.exists() else ():
                    assert path.read_bytes() == hub.contents[path.name]
            left_behind += folder.exists() and any(folder.glob(".*"))
        assert left_behind, "no kill came in the middle of a download"
        assert fetch(hub, base_dir, "-n", "10").returncode == 0
        assert_whole(hub, folder, names)
        assert names_in(folder.parent) == ["fineweb-edu"]


def test_a_download_killed_at_random_moments_ends_verified_with_nothing_left(
    tmp_path: Path, base_dir: Path, figure: Callable[..., Figure]
) -> None:
    kill_often(tmp_path, base_dir, 5, 0.02, figure("P10", "kills -9 of a download, a few"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills(tmp_path: Path, base_dir: Path, figure: Callable[..., Figure]) -> None:
    kill_often(tmp_path, base_dir, 50, 0.05, figure("P10", "kills -9 of a download"))


REFUSALS: dict[str, tuple[int, dict[str, str], str]] = {
    "a wrong token": (401, {"X-Error-Message": "Invalid credentials"}, "401: .* correct or unset HF_TOKEN"),
    "a hidden repository": (401, {"X-Error-Code": "RepoNotFound"}, "401: .* correct or unset HF_TOKEN"),
    "no access": (403, {}, "403: .* set HF_TOKEN to a token that may read"),
    "terms": (403, {"X-Error-Code": "GatedRepo"}, "403: .* accept its terms"),
    "a portal's page": (
        200,
        {"Content-Type": "text/html"},
        "does not answer as a Hugging Face hub .*HF_ENDPOINT",
    ),
    "a portal's redirect": (
        302,
        {"Location": "http://127.0.0.1:9/"},
        "does not answer as a Hugging Face hub",
    ),
    "no repository": (404, {"X-Error-Code": "RepoNotFound"}, "404: the hub has no such file"),
    "no page": (404, {"Content-Type": "text/html"}, "404: the hub has no such file"),
    "gone": (410, {}, "410: the hub has no such file"),
}


@pytest.mark.parametrize("kind", list(REFUSALS))
def test_what_cannot_pass_is_asked_once_and_said(
    hub: Hub, base_dir: Path, kind: str, hub_client: None, capsys: pytest.CaptureFixture[str]
) -> None:
    status, headers, expected = REFUSALS[kind]
    hub.refusal = (status, headers)
    with pytest.raises(UserError, match=expected), HubClient(REPO) as client:
        client.newest_commit(VAL)
    assert "again in" not in capsys.readouterr().out
    assert hub.attempts <= 2  # a redirect to itself may be followed


@pytest.mark.parametrize("kind", ["a wrong token", "a portal's page"])
def test_a_refusal_in_the_middle_ends_the_whole_download(
    hub: Hub, base_dir: Path, kind: str, hub_client: None, tmp_path: Path
) -> None:
    """It is said once, not for each of the shards, however the client wraps it."""
    stage = tmp_path / "stage"
    with HubClient(REPO) as client:
        members = list(client.describe(numbered(3), COMMIT, VAL).values())
        hub.refusal = REFUSALS[kind][:2]
        with pytest.raises(UserError, match=rf"^{REPO}: .*{REFUSALS[kind][2]}") as told:
            client.fetch(members, COMMIT, tmp_path / "folder", stage)
    assert str(told.value).count("shard_") == 0


def test_offline_is_said_at_once(base_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = fetch(hub, base_dir, "-n", "1", delays_s="60")
    assert done.returncode == 2
    told = f"{REPO}: HF_HUB_OFFLINE forbids every download: unset it. Then run the same command again."
    assert done.stderr == f"error: {told}\n"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert fetch(hub, base_dir, "-n", "1").returncode == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # what is there needs no network
    assert fetch(hub, base_dir, "-n", "1").returncode == 0


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(hub: Hub, hub_client: None, status: int) -> None:
    hub.refusal = (status, {})
    with pytest.raises(UserError, match="1 missing"), HubClient(REPO, [0.01, 0.01]) as client:
        client.newest_commit(VAL)
    assert hub.attempts == 3


def test_the_store_behind_the_hub_refuses_what_is_too_old_and_is_asked_again(hub_client: None) -> None:
    """A link to the store ends with its signature; only what the hub itself refuses is final."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    for url, refusal in (
        ("https://cdn.example.org/blob?Expires=1", ""),
        (f"{constants.ENDPOINT}/x", "403: "),
    ):
        response: Any = SimpleNamespace(url=url, status_code=403, headers={}, request=None)
        error = HfHubHTTPError("expired", response=response)
        assert hub_module._refusal(error)[:5] == refusal


# -----------------------------------------------------------------------------
# Training begins while shards arrive


def test_a_reader_waits_for_the_next_shard_and_sees_the_full_corpus(
    hub: Hub, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(hub, base_dir, "-n", "3", "--first", "1").returncode == 0
    folder = base_dir / "data" / "fineweb-edu"
    assert names_in(folder) == ["manifest.json", "shard_00000.parquet", VAL]
    before = Corpus.read_manifest(folder)
    hub.chunk_s = 0.1
    process = start(hub, base_dir, "-n", "3")
    corpus = Corpus.open("fineweb-edu")
    assert corpus.fingerprint == before.fingerprint
    texts = [
        t
        for shard in corpus.train_shards
        for i in range(shard.row_groups)
        for t in corpus.read_block(shard, i)
    ]
    assert texts == [text_of(name, i) for name in numbered(3)[:3] for i in range(1500)]
    assert process.wait(30) == 0
    process.communicate()
    told = capsys.readouterr().out
    assert "2 of 4 shards are on their way" in told
    assert "shard_00001.parquet has not arrived yet: waiting" in told
    assert "shard_00001.parquet arrived after" in told
    assert Corpus.open("fineweb-edu").fingerprint == before.fingerprint


def test_batches_drawn_while_shards_arrive_are_those_of_the_full_corpus(hub: Hub, base_dir: Path) -> None:
    assert fetch(hub, base_dir, "-n", "3", "--first", "0").returncode == 0
    hub.chunk_s = 0.05
    process = start(hub, base_dir, "-n", "3")

    def batches() -> list[list[list[int]]]:
        corpus = Corpus.open("fineweb-edu")
        loader = TrainLoader(
            corpus,
            Letters(),
            sequence_len=511,
            rows_per_batch=16,
            streams=4,
            seed=1,
            world=World.single_process(),
            device_batch_size=16,
        )
        drawn = [rows_of(loader.next_batch()).tolist() for _ in range(50)]
        assert loader.epoch > 1
        loader.close()
        return drawn

    arriving = batches()
    assert process.wait(30) == 0
    process.communicate()
    assert batches() == arriving


def test_a_shard_that_nobody_brings_is_an_error_within_a_moment(
    hub: Hub, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(hub, base_dir, "-n", "2", "--first", "1").returncode == 0
    monkeypatch.setattr(pending_download, "BEGIN_S", 0.1)
    with pytest.raises(UserError, match=r"shard_00001\.parquet: the shard is missing.*Repair: "):
        Corpus.open("fineweb-edu")


def test_a_shard_that_does_not_come_ends_the_wait(
    hub: Hub, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(hub, base_dir, "-n", "2", "--first", "1").returncode == 0
    monkeypatch.setattr(pending_download, "ARRIVE_S", 0.2)
    monkeypatch.setattr(pending_download, "POLL_S", 0.05)
    folder = base_dir / "data" / "fineweb-edu"
    corpus = Corpus.read_manifest(folder)
    stage = files.temporary(folder / files.FETCHED)
    stage.mkdir()
    with pytest.raises(UserError, match=r"did not arrive in \d+ s; the download is too slow.*Repair: "):
        corpus.read_block(corpus.train_shards[1], 0)
    monkeypatch.setattr(pending_download, "ARRIVE_S", 20)
    old = time.time() - pending_download.STALE_S + 0.5
    os.utime(stage, (old, old))  # its process has been killed: it is renewed no more
    with pytest.raises(UserError, match="the download has ended without it"):
        corpus.read_block(corpus.train_shards[1], 0)


# -----------------------------------------------------------------------------
# Which downloads live, on shared disks and by wrong clocks


def stage_of(folder: Path, place: str, pid: int, age_s: float) -> Path:
    """A download's folder with something in it, renewed so long ago by the clock of the disk."""
    stage = folder / f".tmp-fetch@{place}.{pid}"
    stage.mkdir(parents=True)
    (stage / "half").touch()
    renewed = files.disk_time(folder) - age_s
    os.utime(stage, (renewed, renewed))
    return stage


ELSEWHERE = "0123abcd"
HERE = files.temporary(Path("x")).name.split("@")[1].split(".")[0]
NOBODY = 4_194_305  # no process has this id


def test_a_download_of_another_machine_lives_while_it_is_renewed(tmp_path: Path) -> None:
    live = stage_of(tmp_path, ELSEWHERE, NOBODY, age_s=pending_download.STALE_S - 20)
    assert pending_download.is_under_way(tmp_path)
    with pending_download.staging(tmp_path) as own:
        assert live.is_dir()
    assert not own.exists()
    files.sweep_temporaries(tmp_path)
    assert (live / "half").exists()


@pytest.mark.parametrize(
    ("place", "pid", "age_s"),
    [
        (ELSEWHERE, os.getpid(), pending_download.STALE_S + 20),
        (ELSEWHERE, os.getpid(), -86_400),  # its clock was a day ahead, or ours has been set back
        (HERE, NOBODY, 0),  # killed a moment ago
        (HERE, os.getpid(), -86_400),
    ],
    ids=["elsewhere, old", "elsewhere, ahead", "here, killed", "here, ahead"],  # process ids differ by worker
)
def test_a_dead_download_is_not_waited_for_and_is_swept(
    tmp_path: Path, place: str, pid: int, age_s: float
) -> None:
    dead = stage_of(tmp_path, place, pid, age_s)
    assert not pending_download.is_under_way(tmp_path)
    with pending_download.staging(tmp_path):
        assert not (dead / "half").exists()


@pytest.mark.parametrize("wrong_s", [-86_400, -120, 120, 86_400])
def test_our_own_clock_may_be_wrong(tmp_path: Path, wrong_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the file server dates the stages, and is asked."""
    live = stage_of(tmp_path, ELSEWHERE, NOBODY, age_s=5)
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + wrong_s)
    assert pending_download.is_under_way(tmp_path)
    os.utime(live, (true() - 100, true() - 100))
    assert not pending_download.is_under_way(tmp_path)


def test_a_disk_that_cannot_be_written_is_read_by_our_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_of(tmp_path, ELSEWHERE, NOBODY, age_s=5)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    assert pending_download.is_under_way(tmp_path)
