"""Files: the paths of everything that is kept, and writing that a kill cannot leave half done.

A file or folder is written under a temporary name beside its place, flushed to the disk, and renamed: at its
own name it is whole or it is not there.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.common import typed_json
from nanochat.common.errors import UserError

COPY_BYTES = 1 << 20
MADE_BY = re.compile(r"\.(?:tmp|old)-(?P<name>.+?)(?:@(?P<place>[0-9a-f]{8}))?\.(?P<pid>[0-9]+)")
FETCHED = "fetch"  # the name of downloads, which `pending_download` judges by a rule of its own
ABANDONED_S = 86_400.0
MAKE_AGAIN = "It is damaged; make it again."
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
NAME_RULE = "a name of up to 128 letters (a-z, A-Z), digits, '-', '_' and '.', not beginning with '.'"
SURROGATES = re.compile("[\ud800-\udfff]")


def base_dir() -> Path:
    """The folder of everything: `NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`. Not created here.

    Raises:
        UserError: there is no home folder to put it in, or its name is not UTF-8.
    """
    given = os.environ.get("NANOCHAT_BASE_DIR")
    try:
        folder = Path(given or "~/.cache/nanochat").expanduser()  # a file of variables leaves ~ as it is
    except RuntimeError:
        raise UserError(
            f"{given or '~'}: there is no such home folder. "
            "Set NANOCHAT_BASE_DIR to a folder that can be written."
        ) from None
    if not is_utf8(str(folder)):
        raise UserError(f"NANOCHAT_BASE_DIR={ascii(given)}: not UTF-8. Set it to a folder named in UTF-8.")
    return folder


def is_utf8(text: str) -> bool:
    """Whether a text from outside was UTF-8: Python keeps other bytes as halves of surrogate pairs."""
    return not SURROGATES.search(text)


def is_name(folder: str, name: str) -> bool:
    """Whether a text can name a corpus, tokenizer, run or experiment.

    A name from an older version, which took nearly any characters, is still good for what has it.

    Args:
        folder: the part of the base directory where its like are.
        name: the text.
    """
    if NAME.fullmatch(name):
        return True
    if not name or name.startswith(".") or "\0" in name or Path(name).name != name or not is_utf8(name):
        return False
    return len(name.encode("utf-8")) < 256 and (base_dir() / folder / name).is_dir()


def named(folder: str, name: str) -> Path:
    """The folder of what a person has named, in the part of the base directory where its like are.

    Raises:
        UserError: the name is not usable.
    """
    if not is_name(folder, name):
        raise UserError(f"{ascii(name)} is not a usable name. Use {NAME_RULE}.")
    return base_dir() / folder / name


def data_dir(corpus: str) -> Path:
    """Folder of a corpus: manifest.json and its shards."""
    return named("data", corpus)


def corpus_lock(corpus: str) -> Path:
    """Who makes a corpus."""
    return data_dir(corpus).with_name(f".{corpus}.lock")


def tokenizer_dir(name: str) -> Path:
    """Folder of a tokenizer: tokenizer.json."""
    return named("tokenizers", name)


def run_dir(run: str) -> Path:
    """Folder of a training run: config.json, metrics.jsonl, checkpoints, scores, report."""
    return named("runs", run)


def checkpoints_dir(run: str) -> Path:
    """Folder that holds the step_NNNNNN folders of a run."""
    return run_dir(run) / "checkpoints"


def eval_bundle_dir() -> Path:
    """Folder of the unpacked CORE tasks."""
    return base_dir() / "eval_bundle"


def eval_bundle_part() -> Path:
    """What has arrived of the zip that is unpacked there."""
    return base_dir() / "eval_bundle.zip.part"


def eval_bundle_lock() -> Path:
    """Who fetches them."""
    return base_dir() / "eval_bundle.lock"


def keep_compiled() -> Path:
    """The folder where torch.compile keeps what it makes: TORCHINDUCTOR_CACHE_DIR, by default a part of ours.

    It has no setting for that but the environment, so the variable is set; before torch's compiler is
    imported, which sets it otherwise.
    """
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base_dir() / "compiled")))


def fsync(path: Path) -> None:
    """Make the bytes of a file durable, or the names in a folder, where the platform can open a folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of the system the name of the file: those of calls on a descriptor have none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def temporary(path: Path, kind: str = "tmp") -> Path:
    """A sibling of `path` that no other process writes, and whose name says which process does."""
    return path.with_name(f".{kind}-{path.name}@{_place()}.{os.getpid()}")


def machine() -> tuple[str, str]:
    """What tells this machine from others, and the namespace in which process ids mean something on it."""
    host, namespace = socket.gethostname(), ""
    with contextlib.suppress(OSError):  # only Linux tells: the id of the boot, which its containers share
        host = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip() or host
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return host, namespace


@functools.cache
def _place() -> str:
    return hashlib.sha256("\n".join(machine()).encode()).hexdigest()[:8]


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary has certainly ended: only where its process id is one of here."""
    made = MADE_BY.fullmatch(path.name)
    return made is not None and made["place"] == _place() and not is_alive(int(made["pid"]))


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on success it is made durable and takes the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = temporary(path)
    try:
        yield written
        fsync(written)
        written.replace(path)
        fsync(path.parent)
    finally:
        written.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path, owned: str = "") -> Iterator[Path]:
    """Yield a temporary sibling folder; on success its files are made durable and it replaces `path`.

    Where `path` is a link, as to a larger disk, the folder behind it is replaced and the link stays. What
    killed writers have left beside it goes first, as `sweep_temporaries` has it: models are large.
    """
    if path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(path.parent, owned)
    written = temporary(path)
    shutil.rmtree(written, ignore_errors=True)
    try:
        written.mkdir()
        yield written
        for part in (*sorted(written.rglob("*")), written):
            fsync(part)
        doomed = _move_aside(path) if path.exists() else None
        written.rename(path)
        fsync(path.parent)
        if doomed:  # last: between the two renames is the only moment without a folder of the name
            _delete(doomed)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _move_aside(path: Path) -> Path:
    """Take a folder away in one step, so that its name never shows a half of it."""
    doomed = temporary(path, "old")
    _delete(doomed)
    path.rename(doomed)
    return doomed


def _delete(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder, as far as the disk lets us."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_dir(path: Path) -> None:
    """Delete a folder; a kill midway leaves a name that nothing reads."""
    _delete(_move_aside(path))


def sweep_temporaries(folder: Path, owned: str = "") -> None:
    """Delete what killed writers left in `folder`.

    A temporary of this machine goes if its process has ended. Process ids of other machines and containers
    tell nothing here: what they write goes when nothing in it has changed for a day, by the disk's own clock.

    Args:
        folder: where to look.
        owned: pattern of the names that nobody but this process writes, because it holds their lock, and that
            it does not write just now: whoever began one of them has ended.
    """
    if not folder.is_dir():
        return
    for path in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        made = MADE_BY.fullmatch(path.name)
        if made is None or made["name"] == FETCHED:
            continue
        is_owned = fnmatch.fnmatchcase(made["name"], owned)
        if made["place"] == _place():
            gone = is_abandoned(path) or (is_owned and int(made["pid"]) == os.getpid())
        else:
            gone = is_owned or disk_time(folder) - _last_change(path) > ABANDONED_S
        if gone:
            _delete(path)


def _last_change(path: Path) -> float:
    """The newest time in a tree; now, where it changes as we look."""
    try:
        return max(part.lstat().st_mtime for part in [path, *path.rglob("*")])
    except OSError:
        return math.inf


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file: readers see the old one or the new one, never a part."""
    with atomic_path(path) as written, _naming(path):
        written.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON.

    Bytes from outside that were not UTF-8, as names of files may have, are written as a backslash and digits.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, SURROGATES.sub(_escaped_byte, text))


def _escaped_byte(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\\\u{code:04x}"


def read_json(path: Path, shape: Any = Any, *, advice: str = MAKE_AGAIN) -> Any:
    """The value of a JSON file, which has the shape that the caller is written for (`typed_json.mismatch`).

    Args:
        path: the file.
        shape: a type hint, such as `dict[str, int]` or a TypedDict; by default any.
        advice: what helps where the file is damaged.

    Raises:
        UserError: the file is absent or cannot be read, is not JSON, or has another shape.
    """
    try:
        is_plain = path.is_file() or not path.exists()  # to open a pipe would wait for ever
        value = typed_json.parse(path.read_bytes()) if is_plain else None
        wrong = typed_json.mismatch(value, shape) if is_plain else "not a plain file"
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        wrong = f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        wrong = f"not a JSON file ({error})"
    if wrong:
        raise UserError(f"{path}: {wrong}. {advice}")
    return value


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`, or would hold it: its nearest existing parent is asked."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_time(folder: Path) -> float:
    """Now, by the clock that dates the files of `folder`: that of a file server may differ from ours."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime
    return time.time()


def require_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written there, before hours are spent.

    Raises:
        UserError: the folder is read-only, on a full disk, or its path is taken by a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        helps = "Free some space"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            helps = f"Make {error.filename or folder} a folder that you can write to"
        raise UserError(
            f"{folder}: cannot write there ({error.strerror}). {helps}, or set NANOCHAT_BASE_DIR to another."
        ) from None
