"""Token caches: each split of a chat corpus, rendered once for a tokenizer, and read from the disk by slices.

Half a million conversations are rendered in a minute, and every start of a run needs the length of each. So
their tokens are kept beside the shards, one file a split: int32 tokens, ~id where not supervised, then int64
offsets, little-endian. A cache is written as a whole under a lock: of all ranks the first makes it, and the
others wait. It is hashed when it is opened, and made again where anything differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from nanochat.chat import conversation
from nanochat.chat.corpus import ChatCorpus
from nanochat.common import files, locks
from nanochat.common.checksums import ChecksummedFile
from nanochat.common.errors import UserError
from nanochat.data.corpus import MANIFEST
from nanochat.tokenizer.tokenizer import Tokenizer

FORMAT = 1  # changes with the rendering, too
RENDERED_AT_ONCE = 1000  # conversations
MAX_HELD_TOKENS = 1 << 26  # a file of fewer is kept in memory: to read a short conversation takes 80 us
SCANNED_TOKENS = 1 << 22  # at a time


class Entry(TypedDict):
    """A file as the manifest of a cache lists it."""

    sha256: str
    conversations: int
    tokens: int


class Listing(TypedDict):
    """The manifest of a cache."""

    made_of: dict[str, str | int]
    splits: dict[str, Entry]


class TokenFile:
    """The tokens of the conversations of a split.

    Attributes:
        offsets: (n + 1,) int64; conversation i has the tokens offsets[i] to offsets[i + 1].
    """

    def __init__(self, file: ChecksummedFile, entry: Entry) -> None:
        """Read the offsets.

        Args:
            file: tokens, then offsets.
            entry: how many.
        """
        self._file = file
        self._held: NDArray[np.int32] | None = None
        self.offsets: NDArray[np.int64] = np.frombuffer(file.read(4 * entry["tokens"], file.bytes), "<i8")
        if entry["tokens"] <= MAX_HELD_TOKENS:
            self._held = self.read(0, entry["tokens"])

    def read(self, start: int, end: int) -> NDArray[np.int32]:
        """The tokens from `start` to `end`, ~id where not supervised.

        Raises:
            UserError: the file has changed since it was opened.
        """
        if self._held is not None:
            return self._held[start:end]
        return np.frombuffer(self._file.read(4 * start, 4 * end), "<i4")

    def scan(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """All conversations, some at a time: their tokens, and their offsets within these."""
        steps = np.arange(0, self.offsets[-1], SCANNED_TOKENS)
        borders = np.unique(np.append(np.searchsorted(self.offsets, steps), len(self.offsets) - 1))
        for first, last in itertools.pairwise(borders):
            start, end = int(self.offsets[first]), int(self.offsets[last])
            yield self.read(start, end), self.offsets[first : last + 1] - start


def open_split(corpus: ChatCorpus, split: str, tokenizer: Tokenizer) -> TokenFile:
    """The tokens of a split, rendered first where that has not been done.

    Raises:
        UserError: the corpus is damaged, or has a conversation that cannot be used.
    """
    folder = corpus.folder / f"tokens-{tokenizer.fingerprint[:16]}"
    made_of: dict[str, str | int] = {"format": FORMAT, "corpus": corpus.fingerprint}
    made_of["tokenizer"] = tokenizer.fingerprint
    if (found := _open(folder, split, made_of)) is None:
        what = f"the token cache of corpus {corpus.name!r}"
        with locks.held(corpus.folder / ".tokens.lock", what, wait=True):
            if (found := _open(folder, split, made_of)) is None:  # nobody has made it meanwhile
                with files.atomic_dir(folder, owned=folder.name) as temporary:
                    splits = {one: _render(corpus, one, tokenizer, temporary) for one in ("train", "val")}
                    files.write_json(temporary / MANIFEST, Listing(made_of=made_of, splits=splits))
                found = _open(folder, split, made_of)
    assert found is not None, "it was written a moment ago"
    return found


def _open(folder: Path, split: str, made_of: dict[str, str | int]) -> TokenFile | None:
    """The file of a split in a cache; None where it is not there, damaged, or of another corpus."""
    try:
        listing: Listing = files.read_json(folder / MANIFEST, Listing)
        file = ChecksummedFile(folder / split)
    except (UserError, OSError):
        return None
    entry = listing["splits"].get(split)
    if listing["made_of"] != made_of or entry is None or entry["sha256"] != file.sha256:
        return None
    return TokenFile(file, entry)


def _render(corpus: ChatCorpus, split: str, tokenizer: Tokenizer, folder: Path) -> Entry:
    """Write the file of a split: its conversations in their order."""
    offsets = [np.zeros(1, np.int64)]
    rows = corpus.rows(split)
    with (folder / split).open("wb") as file:
        while some := [
            conversation.read(row, where) for where, row in itertools.islice(rows, RENDERED_AT_ONCE)
        ]:
            ids, supervised, ends = conversation.render(tokenizer, some)
            file.write(np.where(supervised, ids, ~ids).astype("<i4").tobytes())
            offsets.append(offsets[-1][-1] + ends[1:])
        file.write(np.concatenate(offsets).astype("<i8").tobytes())
    conversations, tokens = sum(map(len, offsets)) - 1, int(offsets[-1][-1])
    return Entry(sha256=files.sha256(folder / split), conversations=conversations, tokens=tokens)
