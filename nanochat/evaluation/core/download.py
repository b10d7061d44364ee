"""Download of the CORE tasks: resumed after a break, every file checked by its hash, whole or absent.

    python -m scripts.core_download

Of the zip the files below are read and nothing else, and only if all have the bytes that GPT-2 was scored on
(CORE.md part 1). A zip of which that is not true is thrown away.
"""

from __future__ import annotations

import functools
import http.client
import os
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from nanochat.common import files, locks
from nanochat.common.errors import UserError
from nanochat.common.progress import bytes_bar
from nanochat.evaluation.core import bundle as core_bundle

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
RETRY_DELAYS_S = (1.0, 4.0, 15.0, 60.0)  # before each further attempt that brought nothing new
TIMEOUT_S = 30.0  # without a byte
BLOCK_BYTES = 1 << 16
MAX_ZIP_BYTES = 1 << 30  # the public one has about 160 MB
UNPACKED_BYTES = 50_000_000  # of the files below
LENGTH = re.compile(r"[0-9]{1,18}")


@functools.cache
def public_files() -> dict[str, str]:
    """SHA-256 of each file of the public bundle that is read, by its name in it."""
    # In the format of sha256sum, which can check a bundle too.
    lines = Path(__file__).with_name("public_bundle.sha256").read_text("utf-8").splitlines()
    return {member: digest for digest, member in map(str.split, lines)}


def fetch(url: str = BUNDLE_URL, retry_delays_s: Sequence[float] = RETRY_DELAYS_S) -> Path:
    """Bring the CORE tasks to the base directory; what is there and right is not fetched.

    Args:
        url: of the zip; the hashes are of its files, so that any mirror will do.
        retry_delays_s: seconds to wait before each further attempt; one that brought bytes counts anew.

    Returns:
        The folder.

    Raises:
        UserError: it cannot be had, is not what it should be, does not fit on the disk, or the folder there
            holds something else.
    """
    if not url.startswith(("https://", "http://")):
        raise UserError(f"--url={url}: expected http:// or https://. A zip on a disk goes to --eval-bundle.")
    folder, part = files.eval_bundle_dir(), files.eval_bundle_part()
    if not folder.exists():
        files.require_writable(folder.parent)
        with locks.held(files.eval_bundle_lock(), "the download of the CORE tasks", wait=True):
            if not folder.exists():  # else whoever held the lock before has brought them
                _download(url, part, retry_delays_s)
                try:
                    _unpack(part, folder)
                except UserError as error:
                    part.unlink()
                    raise UserError(f"{url}: {error}") from error
                part.unlink()
    if wrong := differences(folder):
        raise UserError(
            f"{folder}: {len(wrong)} of {len(public_files())} files are missing or not the public bundle's, "
            f"the first is {wrong[0]}. Move the folder away to fetch them again."
        )
    return folder


def differences(folder: Path) -> list[str]:
    """Files of the public bundle that a folder lacks or has with other bytes."""
    return [
        member
        for member, digest in public_files().items()
        if not (folder / member).is_file() or files.sha256(folder / member) != digest
    ]


def _download(url: str, part: Path, retry_delays_s: Sequence[float]) -> None:
    """Append to `part` until it is the whole file; what an earlier run has fetched is kept."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _append(url, part)
        except UserError:
            raise
        except (ValueError, OverflowError, http.client.InvalidURL) as error:
            raise UserError(f"{url}: cannot be asked for ({error}). Check --url.") from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            refused = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
            failures = 1 if _size(part) > before else failures + 1
            if refused or failures > len(retry_delays_s):
                raise UserError(
                    f"{url}: cannot be fetched ({error}). What arrived is kept: run the same command again. "
                    "Or fetch the zip elsewhere and name it with --eval-bundle."
                ) from error
            delay_s = retry_delays_s[failures - 1]
            print(f"{url}: {error}; again in {delay_s:g} s", flush=True)
            time.sleep(delay_s)


def _append(url: str, part: Path) -> None:
    """One request for what is missing.

    Raises:
        OSError: of the network, or the answer ended early.
        UserError: the file is too large for us or for the disk.
    """
    have = _size(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - fetch takes http only
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)  # as long as the file is, or longer: from the beginning
        raise
    with answer:
        if answer.status != http.client.PARTIAL_CONTENT:
            have = 0  # all of it comes, whatever was asked for
        length = answer.headers["Content-Length"] or ""
        # What is no length says nothing; the files of the zip have their hashes.
        total = have + int(length) if LENGTH.fullmatch(length) else None
        _require_room(url, part, have, total)
        with _opened(part, have) as sink, bytes_bar("eval bundle", total or 0) as show:
            while block := answer.read(BLOCK_BYTES):
                have += len(block)
                _require_room(url, part, have, total)
                sink.write(block)
                show(have)
    if total is not None and have != total:
        raise http.client.IncompleteRead(b"", total - have)


def _require_room(url: str, part: Path, have: int, total: int | None) -> None:
    size = max(have, total or 0)
    if size > MAX_ZIP_BYTES:
        raise UserError(f"{url}: {size} bytes, more than any eval bundle. Do not use this file.")
    if size - have + UNPACKED_BYTES > files.free_bytes(part):
        raise UserError(f"{part.parent}: no room for an eval bundle of {size} bytes. Free some space.")


def _size(part: Path) -> int:
    """Bytes that have arrived. What lies there under another name too is not ours to write to: it goes."""
    try:
        found = part.lstat()
    except FileNotFoundError:
        return 0
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{part}: a folder, where the download goes. Move it away.")
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        part.unlink()
        return 0
    return found.st_size


def _opened(part: Path, have: int) -> BinaryIO:
    """The file to append to, or to begin; a link that has taken its name meanwhile is not followed."""
    how = os.O_APPEND if have else os.O_TRUNC
    flags = os.O_WRONLY | os.O_CREAT | how | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(part, flags, 0o666), "wb")


def _unpack(archive: Path, folder: Path) -> None:
    """Write the files that are known, and only those, if all of them are right; all or none."""
    bundle = core_bundle.open_bundle(archive)
    with files.atomic_dir(folder) as temporary:
        for member in public_files():
            target = temporary / member
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as sink:
                sink.writelines(bundle.pieces(member))
        if wrong := differences(temporary):
            raise UserError(f"{wrong[0]} has other bytes than the public bundle's. Fetch it again.")
