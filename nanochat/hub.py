"""Shards from the Hugging Face hub: which there are, whether they fit on the disk, fetched and checked.

`huggingface_hub` does the transfer, so `HF_ENDPOINT`, `HF_TOKEN`, mirrors and proxies work as its users know
them. What is ours: one commit for all shards, the check of free space, the sha256 of what arrived, another
attempt after a failure, and the name of every shard that is missing in the end.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nanochat import files, shards
from nanochat.errors import UserError

THREADS = 8
RETRY_DELAYS_S = (1.0, 4.0, 15.0, 60.0)  # before each further attempt: over a minute of outage is survived
RESERVE_BYTES = 1 << 30  # of disk that a download leaves free
SHA256 = re.compile(r"[0-9a-f]{64}")

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the hub, in shards numbered 0 to `last`; the last is validation."""

    repo: str
    last: int

    def shard(self, index: int) -> str:
        """File name of a shard."""
        return f"shard_{index:05d}.parquet"

    @property
    def val_shard(self) -> str:
        """File name of the validation shard."""
        return self.shard(self.last)


HUB_CORPORA = {
    "fineweb-edu": HubCorpus("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": HubCorpus("karpathy/climbmix-400b-shuffle", 6542),
}


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file; `sha256` is None where its etag is not such a digest."""

    name: str
    commit: str
    bytes: int | None
    sha256: str | None


def head(repo: str, name: str, revision: str) -> RemoteFile:
    """Ask the hub for a file's commit, size and digest."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # takes half a second; only downloads pay

    metadata = get_hf_file_metadata(hf_hub_url(repo, name, repo_type="dataset", revision=revision))
    if metadata.commit_hash is None:
        raise ValueError("the server does not answer as a Hugging Face hub does; check HF_ENDPOINT")
    etag = metadata.etag or ""
    return RemoteFile(name, metadata.commit_hash, metadata.size, etag if SHA256.fullmatch(etag) else None)


def fetch(
    repo: str,
    names: Sequence[str],
    folder: Path,
    revision: str | None,
    *,
    retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
) -> tuple[str, dict[str, str]]:
    """Download files of a data set into `folder`; what is there already and verifies is not fetched again.

    Args:
        repo: name of the data set on the hub.
        names: the files.
        folder: where they go.
        revision: the commit to take them from; None for the newest.
        retry_delays_s: seconds to wait before each further attempt.

    Returns:
        The commit, and the sha256 of each file.

    Raises:
        UserError: names every file that could not be had, and why; or the disk is too small.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # eight bars at once tear each other; a line a shard is printed instead
    pool = ThreadPoolExecutor(THREADS)
    try:
        if revision is None:
            newest, failures = _each(
                pool, names[:1], lambda name: head(repo, name, "main").commit, retry_delays_s
            )
            _require_all(repo, failures)
            revision = newest[names[0]]
        commit = revision
        remotes, failures = _each(pool, names, lambda name: head(repo, name, commit), retry_delays_s)
        _require_space(folder, list(remotes.values()))
        digests, failed = _each(
            pool, list(remotes), lambda name: _fetch_one(repo, remotes[name], folder), retry_delays_s
        )
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    _require_all(repo, {**failures, **failed})
    if (folder / ".cache").is_dir():
        files.remove_dir(folder / ".cache")  # the client's bookkeeping of transfers
    return commit, digests


def _each(
    pool: ThreadPoolExecutor, names: Sequence[str], work: Callable[[str], Result], delays_s: Sequence[float]
) -> tuple[dict[str, Result], dict[str, str]]:
    """Run `work` on every name in parallel; returns the results, and the reason of each failure."""
    futures: dict[str, Future[Result]] = {name: pool.submit(_persist, work, name, delays_s) for name in names}
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    for name, future in futures.items():
        try:
            results[name] = future.result()
        except Exception as error:  # noqa: BLE001 - the client raises its transport's errors as they come
            failures[name] = (str(error).splitlines() or [""])[0] or type(error).__name__
    return results, failures


def _persist(work: Callable[[str], Result], name: str, delays_s: Sequence[float]) -> Result:
    """Do `work`, again after each delay unless the hub has said that there is no such thing."""
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for delay_s in delays_s:
        try:
            return work(name)
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (LocalEntryNotFoundError, OSError, ValueError) as error:
            print(f"{name}: {str(error).splitlines()[0]}; again in {delay_s:g} s", flush=True)
            time.sleep(delay_s)
    return work(name)


def _fetch_one(repo: str, remote: RemoteFile, folder: Path) -> str:
    """Fetch and check one file; returns its sha256. A wrong file does not stay."""
    from huggingface_hub import hf_hub_download

    path = folder / remote.name
    if path.is_file() and _problem(path, remote):
        path.unlink()
    hf_hub_download(repo, remote.name, repo_type="dataset", revision=remote.commit, local_dir=folder)
    if problem := _problem(path, remote):
        path.unlink()
        raise ValueError(problem)
    print(f"{remote.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return files.sha256(path)


def _problem(path: Path, remote: RemoteFile) -> str:
    """What is wrong with a file that arrived; "" if nothing is."""
    size = path.stat().st_size
    if remote.bytes is not None and size != remote.bytes:
        return f"{size} bytes arrived, the hub has {remote.bytes}"
    if remote.sha256 is not None and (digest := files.sha256(path)) != remote.sha256:
        return f"what arrived has sha256 {digest}, the hub has {remote.sha256}"
    try:
        shards.describe(path, "train", sha256="not needed")
    except UserError as error:
        return str(error)
    return ""


def _require_space(folder: Path, remotes: Sequence[RemoteFile]) -> None:
    wanted = sum(remote.bytes or 0 for remote in remotes if not (folder / remote.name).is_file())
    free = files.free_bytes(folder)
    if wanted + RESERVE_BYTES > free:
        raise UserError(
            f"{folder}: {wanted / 1e9:.1f} GB to fetch and {RESERVE_BYTES / 1e9:.1f} GB to spare, but "
            f"{free / 1e9:.1f} GB are free. Ask for fewer shards (-n) or set NANOCHAT_BASE_DIR elsewhere."
        )


def _require_all(repo: str, failures: dict[str, str]) -> None:
    if failures:
        listed = "; ".join(f"{name} ({reason})" for name, reason in sorted(failures.items()))
        raise UserError(
            f"{repo}: {len(failures)} missing: {listed}. What arrived is kept: run the same command again."
        )
