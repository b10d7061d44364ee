"""Client of the Hugging Face hub: lists the shards of a data set, fetches them, and checks what it fetched.

`huggingface_hub` does the transfer, so `HF_ENDPOINT`, `HF_TOKEN`, mirrors and proxies work as its users know
them; so do its waits and retries (a stall of 10 s, a reset, 429 with Retry-After, a wrong length). Added
here: one commit for all shards, the size and digest of each before it is fetched, the check of free space,
the sha256 of every fetched file, another attempt after a failure that may pass, and the name of every shard
that is missing in the end. An error that no attempt can change (a token that is refused, a setting, a server
that is no hub) ends the download at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from huggingface_hub import (
    HfApi,
    RepoFile,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.progress import bytes_bar
from nanochat.data import parquet_shards, pending_download, token_shards
from nanochat.data.parquet_shards import Shard
from nanochat.tokenizer.tokenizer import Tokenizer

THREADS = 8
RETRY_DELAYS_S = (1.0, 4.0, 15.0, 60.0)  # before each further attempt: over a minute of outage is survived
LISTED_FILES = 500  # named in one request
RESERVE_BYTES = 1 << 30  # of disk that a download leaves free
FOOTER_BYTES = 1 << 18  # read from the end of a shard at first; its footer has about 10 kB
MAX_FOOTER_BYTES = 1 << 26
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (401, 403, 404, 410, 451)  # of the hub itself; the store that it sends to refuses what is too old
README = "README.md"  # every data set has one
NO_SUCH_FILE = "the hub has no such file"
NOT_A_HUB = (
    "the server does not answer as a Hugging Face hub does, as where a network asks to sign in; "
    "check the network, and HF_ENDPOINT if it is set"
)
VOCABULARY_FILE = "vocab.json"
VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # GPT-2's

Result = TypeVar("Result")


class NotAHubError(Exception):
    """The answer is not one that a hub gives."""


class Hub:
    """One data set on the hub. Use as a context manager: the threads are stopped at the end."""

    def __init__(self, repo: str, retry_delays_s: Sequence[float] = RETRY_DELAYS_S) -> None:
        """Start no request yet.

        Args:
            repo: name of the data set.
            retry_delays_s: seconds to wait before each further attempt at anything.
        """
        self._repo = repo
        self._delays_s = retry_delays_s
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="hub")

    def __enter__(self) -> Hub:
        """Silence the client's progress bars."""
        disable_progress_bars()  # eight bars at once tear each other; there is one over all
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads after their present files, which the end of the process would wait for, too.

        A thread that still wrote would leave files in a folder that its owner has removed.
        """
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def newest_commit(self, name: str) -> str:
        """The commit that the main branch is at, read from the headers of one of its files."""

        def work(name: str, _: int) -> str:
            url = hf_hub_url(self._repo, name, repo_type="dataset")
            if (commit := get_hf_file_metadata(url).commit_hash) is None:
                raise NotAHubError
            return commit

        return self._all([name], work)[name]

    def describe(self, names: Sequence[str], commit: str, val_shard: str) -> dict[str, Shard]:
        """Manifest entries of files that are still at the hub: sizes, digests, documents, row groups.

        Raises:
            UserError: names every file of which the hub does not tell this, and why.
        """
        listed = self._list(names, commit)
        if absent := [name for name in names if name not in listed]:
            raise self._missing([f"{name} (404: {NO_SUCH_FILE})" for name in absent])

        def work(name: str, _: int) -> Shard:
            file = listed[name]
            if file.lfs is None:
                raise ValueError("the hub has no sha256 of it")
            documents, row_groups = self._counts(name, commit, file.size)
            split = "val" if name == val_shard else "train"
            return Shard(name, split, file.size, documents, row_groups, file.lfs.sha256)

        return self._all(names, work)

    def _list(self, names: Sequence[str], commit: str) -> dict[str, RepoFile]:
        """Sizes and digests of files, many in one request; files that are not there are left out."""
        batches = {names[at]: names[at : at + LISTED_FILES] for at in range(0, len(names), LISTED_FILES)}

        def work(first: str, _: int) -> list[RepoFile]:
            paths = list(batches[first])
            try:
                entries = HfApi().get_paths_info(self._repo, paths, revision=commit, repo_type="dataset")
            except (KeyError, TypeError, json.JSONDecodeError):
                raise NotAHubError from None
            return [entry for entry in entries if isinstance(entry, RepoFile)]

        return {entry.path: entry for batch in self._all(list(batches), work).values() for entry in batch}

    def list_parquet(self, folder: str, commit: str) -> list[Shard]:
        """The parquet files of a folder: sizes and digests, as shards of the split RAW, named by their paths.

        Raises:
            UserError: there is no such folder, or the hub does not tell.
        """

        def work(name: str, _: int) -> list[Shard]:
            tree = HfApi().list_repo_tree(self._repo, name, revision=commit, repo_type="dataset")
            try:
                entries = [entry for entry in tree if isinstance(entry, RepoFile) and entry.lfs is not None]
            except (KeyError, TypeError, json.JSONDecodeError):
                raise NotAHubError from None
            return [
                Shard(entry.path, parquet_shards.RAW, entry.size, 0, 0, entry.lfs.sha256)  # type: ignore[union-attr]
                for entry in entries
                if entry.path.endswith(".parquet")
            ]

        return self._all([folder], work)[folder]

    def fetch(self, members: Sequence[Shard], commit: str, folder: Path, stage: Path) -> None:
        """Bring shards to `folder`, in about their order; those that are there and verify are not fetched.

        Args:
            members: the shards, as `describe` tells them.
            commit: where they are from.
            folder: where they go; only what is verified takes its name there.
            stage: a folder on the same disk for what is on its way.

        Raises:
            UserError: names every shard that could not be had, and why; or the disk is full.
        """
        by_name = {shard.name: shard for shard in members}

        def work(name: str, attempt: int) -> None:
            if not (folder / name).is_file() or parquet_shards.problem(folder / name, by_name[name]):
                self._fetch_one(by_name[name], commit, folder, stage, again=attempt > 0)

        with bytes_bar(f"{self._repo}: {len(members)} shards", sum(s.bytes for s in members)) as show:

            def report(done: Sequence[str]) -> None:
                with contextlib.suppress(FileNotFoundError):  # renamed while we looked
                    staged = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
                    show(sum(by_name[name].bytes for name in done) + staged)

            self._all(list(by_name), work, report)

    def fetch_tokenizer(self, stage: Path) -> Tokenizer:
        """GPT-2's tokenizer, from the vocabulary of a model on the hub, which is fetched into `stage`.

        Raises:
            UserError: it could not be had, or is another one.
        """

        def work(name: str, attempt: int) -> Tokenizer:
            path = Path(hf_hub_download(self._repo, name, local_dir=stage, force_download=attempt > 0))
            if (digest := files.sha256(path)) != VOCABULARY_SHA256:
                raise ValueError(f"it has sha256 {digest}, expected {VOCABULARY_SHA256}")
            return Tokenizer.from_gpt2_file(path)

        return self._all([VOCABULARY_FILE], work)[VOCABULARY_FILE]

    def _fetch_one(self, shard: Shard, commit: str, folder: Path, stage: Path, again: bool) -> None:
        repo, name = self._repo, shard.name
        try:  # again without what the client keeps elsewhere on this machine, which may be damaged
            hf_hub_download(
                repo, name, repo_type="dataset", revision=commit, local_dir=stage, force_download=again
            )
        except OSError as error:
            if error.errno in FULL_DISK:
                raise UserError(
                    f"{folder}: the disk is full. Free some space, ask for fewer shards (-n), or set "
                    "NANOCHAT_BASE_DIR elsewhere; then run the same command again."
                ) from None
            raise
        fetched = stage / name
        if problem := parquet_shards.problem(fetched, shard):
            fetched.unlink()
            raise ValueError(problem.removeprefix(f"{fetched}: "))
        files.fsync(fetched)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fetched.replace(folder / name)
        files.fsync(folder)
        print(f"{name}: {shard.bytes / 1e6:.1f} MB", flush=True)

    def _counts(self, name: str, commit: str, size: int) -> tuple[int, int]:
        """Documents and row groups: from the end of a parquet file, or the beginning of one of tokens."""
        if name.endswith(token_shards.SUFFIX):
            head = self._range(name, commit, 0, min(size, token_shards.HEADER_BYTES))
            return 0, token_shards.chunks(token_shards.count_tokens(head, size))
        tail = self._range(name, commit, max(0, size - FOOTER_BYTES), size)
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < needed <= min(size, MAX_FOOTER_BYTES):
            tail = self._range(name, commit, size - needed, size)
        try:
            return parquet_shards.counts(pa.BufferReader(tail))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"what arrived is not the end of a parquet file: {error}") from None

    def _range(self, name: str, commit: str, first: int, end: int) -> bytes:
        """Bytes `first` to `end` of a file."""
        response = get_session().get(
            hf_hub_url(self._repo, name, repo_type="dataset", revision=commit),
            headers={**build_hf_headers(), "Range": f"bytes={first}-{end - 1}"},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        hf_raise_for_status(response)
        content = bytes(response.content)
        return content if response.status_code == 206 else content[first:end]  # 200: ranges are ignored

    def _all(
        self,
        names: Sequence[str],
        work: Callable[[str, int], Result],
        report: Callable[[Sequence[str]], None] = lambda done: None,
    ) -> dict[str, Result]:
        """Do `work` (name, attempt) for every name in parallel; every failure is named in one error."""
        futures = {self._pool.submit(self._persist, work, name): name for name in names}
        waiting: set[Future[Result]] = set(futures)
        results: dict[str, Result] = {}
        failures: list[str] = []
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    results[futures[future]] = future.result()
                except UserError:
                    raise
                except Exception as error:  # noqa: BLE001 - the client raises its transport's errors as they come
                    failures.append(f"{futures[future]} ({_reason(error)})")
            report(list(results))
        if failures:
            raise self._missing(failures)
        return {name: results[name] for name in names}

    def _missing(self, failures: Sequence[str]) -> UserError:
        return UserError(
            f"{self._repo}: {len(failures)} missing: {'; '.join(sorted(failures))}. "
            "What arrived is kept: run the same command again."
        )

    def _persist(self, work: Callable[[str, int], Result], name: str) -> Result:
        """Do `work`, again after each delay unless another attempt cannot end otherwise.

        Raises:
            UserError: what refuses this file refuses all.
        """
        for attempt, delay_s in enumerate(self._delays_s):
            try:
                return work(name, attempt)
            except Exception as error:
                if refusal := _refusal(error):
                    raise UserError(f"{self._repo}: {refusal}. Then run the same command again.") from None
                if isinstance(error, UserError) or _status(error) in REFUSED or self._stopped.is_set():
                    raise
                print(f"{name}: {_reason(error)}; again in {delay_s:g} s", flush=True)
            if self._stopped.wait(delay_s):
                raise InterruptedError("stopped")
        return work(name, len(self._delays_s))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from: the client wraps what the hub says in errors of its cache."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int:
    """The HTTP status with which the hub itself refused; 0 where that is not what happened."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and str(cause.response.url).startswith(constants.ENDPOINT):
            return int(cause.response.status_code)
    return 0


def _refusal(error: BaseException) -> str:
    """What no further attempt at any file would change, and its remedy; "" for all other errors."""
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids every download: unset it"
        if isinstance(cause, NotAHubError | FileMetadataError):
            return NOT_A_HUB
    status = _status(error)
    if status == 401:
        given = "does not accept the token: correct or unset HF_TOKEN (or: hf auth logout)"
        return f"401: the hub {given if get_token() else 'wants a token: set HF_TOKEN to yours'}"
    if status == 403:
        return "403: the hub refuses access: set HF_TOKEN to a token that may read this, and accept its terms"
    return ""


def _reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    if _status(error) in (404, 410):
        return f"{_status(error)}: {NO_SUCH_FILE}"
    return parquet_shards.first_line(error)


def fetch_parquet(
    repo: str, folder: str, prefixes: Sequence[str], into: Path
) -> tuple[str, dict[str, list[Path]]]:
    """Fetch parquet files of a data set that are in a schema of its own; those that are there stay.

    Args:
        repo: name of the data set.
        folder: of it where the files lie.
        prefixes: how the names of the files begin, up to the "-" before their number.
        into: where they go.

    Returns:
        The commit that they are of, and the files by prefix, in their order.

    Raises:
        UserError: names every file that could not be had, and why; or the disk is full.
    """
    with pending_download.staging(into) as stage, Hub(repo) as source:
        commit = source.newest_commit(README)
        listed = source.list_parquet(folder, commit)
        found = {
            prefix: sorted(shard.name for shard in listed if shard.name.startswith(f"{folder}/{prefix}-"))
            for prefix in prefixes
        }
        if absent := [prefix for prefix in prefixes if not found[prefix]]:
            raise source._missing([f"{folder}/{prefix}-*.parquet (404: {NO_SUCH_FILE})" for prefix in absent])
        wanted = [shard for shard in listed if any(shard.name in names for names in found.values())]
        require_space(into, wanted)
        source.fetch(wanted, commit, into, stage)
    return commit, {prefix: [into / name for name in names] for prefix, names in found.items()}


def require_space(folder: Path, members: Sequence[Shard]) -> None:
    """Refuse a download that does not fit on the disk of `folder`, before it begins.

    Raises:
        UserError: says how much is wanted and how much is free.
    """
    wanted = sum(shard.bytes for shard in members if not (folder / shard.name).is_file())
    free = files.free_bytes(folder)
    if wanted and wanted + RESERVE_BYTES > free:
        raise UserError(
            f"{folder}: {wanted / 1e9:.1f} GB to fetch and {RESERVE_BYTES / 1e9:.1f} GB to spare, but "
            f"{free / 1e9:.1f} GB are free. Ask for fewer shards (-n) or set NANOCHAT_BASE_DIR elsewhere."
        )
