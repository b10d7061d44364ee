"""The CORE tasks from the network: resumed after a break, every file checked by its hash, whole or absent.

    python -m scripts.core_download

Of the zip the files below are read and nothing else, and only if all have the bytes that GPT-2 was asked
(CORE.md part 1). A zip of which that is not true is thrown away.
"""

from __future__ import annotations

import hashlib
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

TASK_SHA256 = {
    "commonsense_reasoning": {
        "commonsense_qa": "2771f63f8127c0725b1f6b0ef2cd2ef6469168ae5875fc8d276b25b4f32c8c1a",
        "copa": "595dca44dec54c849490bd403a3e24a29e3b944065783222ebb0eb1a55298846",
        "openbook_qa": "adb2e5c7f8db810ddad4d6b2bf53dcc86dcc545499f7aafcaf42a8e179476c09",
        "piqa": "d2870e73aec5154df3faf259b7700876e11608eebdf69e9d6667435673dbe4e0",
    },
    "language_understanding": {
        "bigbench_language_identification": "80c98d8e7ab8213513d1643886229c05c40a6837353b07c19ac7bd860668954e",  # noqa: E501 - a hash stays whole
        "hellaswag": "52a31d32b14dff7713a705be664cbeff77eb66edcf7f8b0a5e9408633929b448",
        "lambada_openai": "411bfbe5b9054346b6a19299c0242670adbefb9162efd958593cbc0290b8c9dc",
        "winograd_wsc": "746336c27cd2e39a554cb1b8b4869d0f1ae2577ac5bfe799842d26bca5a5bf5e",
        "winogrande": "ea1592526f3bfdd0948ed3acb1b4dfa3f83d23698917118688ee1df7f8d4b8d7",
    },
    "reading_comprehension": {
        "boolq": "454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8",
        "coqa": "0c2b8029776a138f755d065b9506eb8e91bbd38c44dce321a75f9987bb7875aa",
        "squad": "41fe6c43e725c0dc9161465066932c46edc390bf4019c361c500bbc4b766a350",
    },
    "symbolic_problem_solving": {
        "agi_eval_lsat_ar": "9ffd73480b51746c11627e56239f8b87035eb255cb92c3a58fd64e2e4b65fb56",
        "bigbench_cs_algorithms": "8485683a8c7e7e6c9fc6ca3cc81140fd85edb27f34406a6736d1539cf7ebcb3a",
        "bigbench_dyck_languages": "106ba9ac7507c7ab385c5e59c49cd57aa83025abf080d9b2a2661c0d6c6dbcc5",
        "bigbench_operators": "41e2964ad619c49edd97c22b2c50f922a0241255d906a754bf81a20f4f66b85f",
        "bigbench_repeat_copy_logic": "8febd2c0080a15680cd17f92bfa30d87abcfac021e646e55d0b8ad69f0cfa767",
    },
    "world_knowledge": {
        "arc_challenge": "1ae3aeedf1951d881cbd5c2e3a31e78a1993d251479afbe4cb413b6707244636",
        "arc_easy": "d2d12e59543acf9a5ef6079634a72b30215e36c2fd4236fff3bc855d287b87f5",
        "bigbench_qa_wikidata": "bb0d22727cb25beffb022c8e8c0c3e1159c8b3c7bd7284603c0d6491f8616265",
        "jeopardy_all": "187e7f270a440c63d6cf11a57459fdc7e0bce889338225e42cc88e24ee13d52e",
    },
}
SHA256 = {
    "core.yaml": "463f6ae0aa127fbd41fa655f8919e136858f4849eef176922a3be96e102ce7e7",
    "eval_meta_data.csv": "84e279cdc0d836c9ea3a6e55a99102f8ee18f72809fe7aa6ac5a1fe630aa492f",
} | {
    f"eval_data/{folder}/{task}.jsonl": digest
    for folder, tasks in TASK_SHA256.items()
    for task, digest in tasks.items()
}


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
    folder = files.eval_bundle_dir()
    if folder.exists():
        return _checked(folder)
    files.require_writable(folder.parent)
    with locks.held(files.eval_bundle_lock(), "the download of the CORE tasks", wait=True):
        if folder.exists():  # whoever held the lock before has brought them
            return _checked(folder)
        part = files.eval_bundle_part()
        _download(url, part, retry_delays_s)
        try:
            _unpack(part, folder)
        except UserError as error:
            part.unlink()
            raise UserError(f"{url}: {error}") from error
        part.unlink()
    return folder


def _checked(folder: Path) -> Path:
    """The folder that is there, if it holds the public bundle."""
    if wrong := differences(folder):
        raise UserError(
            f"{folder}: {len(wrong)} of {len(SHA256)} files are missing or not the public bundle's, the "
            f"first is {wrong[0]}. Move the folder away to fetch them again."
        )
    return folder


def differences(folder: Path) -> list[str]:
    """Files of the public bundle that a folder lacks or has with other bytes."""
    return [
        member
        for member, digest in SHA256.items()
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
        for member, digest in SHA256.items():
            target = temporary / member
            target.parent.mkdir(parents=True, exist_ok=True)
            found = hashlib.sha256()
            with target.open("xb") as sink:
                for block in bundle.blocks(member):
                    found.update(block)
                    sink.write(block)
            if found.hexdigest() != digest:
                raise UserError(f"{member} has other bytes than the public bundle's. Fetch it again.")
