"""Every byte that meets the disk: where things live, and how they are written so that a kill leaves no half.

A file or folder is written under a temporary name beside its place, flushed to the disk, and renamed: at its
own name it is whole or it is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat import typed_json
from nanochat.errors import UserError

COPY_BYTES = 1 << 20
MAKE_AGAIN = "It is damaged; make it again."
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
NAME_RULE = "up to 128 letters (a-z, A-Z), digits, '-', '_' and '.', not beginning with '.'"
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


def _named(folder: str, name: str) -> Path:
    if not is_name(folder, name):
        raise UserError(f"{ascii(name)} is not a usable name. Use {NAME_RULE}.")
    return base_dir() / folder / name


def data_dir(corpus: str) -> Path:
    """Folder of a corpus: manifest.json and its shards."""
    return _named("data", corpus)


def tokenizer_dir(name: str) -> Path:
    """Folder of a tokenizer: tokenizer.json."""
    return _named("tokenizers", name)


def run_dir(run: str) -> Path:
    """Folder of a training run: config.json, metrics.jsonl, checkpoints, scores, report."""
    return _named("runs", run)


def checkpoints_dir(run: str) -> Path:
    """Folder that holds the step_NNNNNN folders of a run."""
    return run_dir(run) / "checkpoints"


def experiment_dir(name: str) -> Path:
    """Folder of an experiment of several runs: their consoles, their locks, checkouts of other revisions."""
    return _named("experiments", name)


def eval_bundle_dir() -> Path:
    """Folder of the unpacked CORE tasks."""
    return base_dir() / "eval_bundle"


def eval_bundle_part() -> Path:
    """What has arrived of the zip that is unpacked there."""
    return base_dir() / "eval_bundle.zip.part"


def eval_bundle_lock() -> Path:
    """Who fetches them."""
    return base_dir() / "eval_bundle.lock"


def token_cache_file(key: str) -> Path:
    """The tokens of some texts of CORE; `key` is the hash of the texts and of the tokenizer."""
    return base_dir() / "eval_tokens" / f"{key}.safetensors"


def attention_times_file() -> Path:
    """How long each attention backend took on this machine, by what it was measured for."""
    return base_dir() / "attention_times.json"


def keep_compiled() -> Path:
    """The folder where torch.compile keeps what it makes: TORCHINDUCTOR_CACHE_DIR, by default a part of ours.

    It has no setting for that but the environment, so the variable is set; before anything is compiled.
    """
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base_dir() / "compiled")))


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable, where the platform can open a folder at all."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}.{os.getpid()}")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on success it is made durable and takes the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success its files are made durable and it replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                fsync_file(file)
            else:
                fsync_dir(file)
        fsync_dir(temporary)
        if path.exists():
            _move_aside(path)
        temporary.rename(path)
        fsync_dir(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_aside(path: Path) -> None:
    """Take a folder away in one step, so that its name never shows a half of it."""
    doomed = path.with_name(f".old-{path.name}.{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_dir(path: Path) -> None:
    """Delete a folder; a kill midway leaves a name that nothing reads."""
    _move_aside(path)


def sweep_temporaries(folder: Path, own: bool = False) -> None:
    """Delete what killed writers left in `folder`; a temporary whose process still lives is kept.

    Args:
        folder: where to look.
        own: also those with the id of this process, which writes nothing there now: in a container the
            process that was killed may have had it.
    """
    if not folder.is_dir():
        return
    for path in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        pid = path.name.rpartition(".")[2]
        if pid.isdigit() and (own and int(pid) == os.getpid() or not is_alive(int(pid))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file: readers see the old one or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON.

    Bytes from outside that were not UTF-8, as names of files may have, are written as a backslash and digits.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, SURROGATES.sub(_escaped_byte, text))


def _escaped_byte(found: re.Match[str]) -> str:
    code = ord(found.group())
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
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise UserError(f"{path}: not a plain file. {advice}")
        value = typed_json.parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}). {advice}") from None
    if wrong := typed_json.mismatch(value, shape):
        raise UserError(f"{path}: {wrong}. {advice}")
    return value


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`, or would hold it: its nearest existing parent is asked."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_time(folder: Path) -> float:
    """Now, by the clock that dates the files of `folder`: that of a file server may differ from ours."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-clock.") as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def require_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written there, before hours are spent.

    Raises:
        UserError: the folder is read-only, on a full disk, or its path is taken by a file.
    """
    probe = folder / f".tmp-probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        fsync_file(probe)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror}). "
            "Free some space, or set NANOCHAT_BASE_DIR to another folder."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
