"""Byte-level BPE: a parallel trainer and an encoder whose ids equal tiktoken's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

class ArrowStrings(Protocol):
    """A string array of Arrow: pyarrow's Array or ChunkedArray of type string or large_string."""

    @property
    def type(self) -> object:
        """Its type."""

    def __len__(self) -> int:
        """Its rows."""

class TrainingReport(TypedDict):
    """What a training has read."""

    texts: int
    bytes: int
    pieces: int
    """Pieces counted, repetitions and those dropped since among them."""
    distinct_pieces: int
    """Distinct pieces of two bytes and more that were there at the end."""
    prunings: int
    """How often `max_memory` was passed and rare pieces dropped; 0 means that all counts are exact."""
    pruned_pieces: int
    """Distinct pieces dropped; one that came again and was dropped again counts twice."""
    pruned_occurrences: int
    """How often those had occurred."""

class Tokenizer:
    """A vocabulary of byte strings and the pattern that splits text before merging.

    Safe to share between threads: a training that ends swaps the vocabulary in at once; calls under way keep
    the old one. Splitting, training, encoding, and decoding of arrays let other threads of Python run, and
    stop at Ctrl-C; what reads or makes lists, `str` and `bytes` does not. `num_threads` is 1 or more; four a
    core are the most that are used, and fewer where the system gives no more.
    """

    def __init__(self) -> None:
        """The 256 single bytes, GPT-4's pattern."""

    @staticmethod
    def from_ranks(ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]], pattern: str) -> Tokenizer:
        """A tokenizer of known ranks, giving tiktoken's ids for them.

        Raises:
            ValueError: ranks that are not 0..n-1 once each, a repeated or empty token, one of the 256 bytes
                missing, or a pattern that does not compile.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str | ArrowStrings],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        num_threads: int | None = None,
        max_memory: int | None = None,
        progress: Callable[[int, int, int], object] | None = None,
    ) -> TrainingReport:
        """Learns merges from texts: highest count first, ties by the smaller pair of ids.

        The result does not depend on the number of threads. It is smaller than asked if the texts have no
        more pairs. Whatever stops it leaves the tokenizer as it was.

        With `max_memory` the stream is counted in rounds of a sixty-fourth of it. After a round, if training
        on the distinct pieces held would take more than `max_memory` (128 bytes a piece and 24 for each byte
        of it), the rarest are dropped: all with a count of at most c, for the smallest c that leaves no more
        than half of the bound. The vocabulary then depends on the order of the texts and on `buffer_size`,
        still not on threads.

        Args:
            iterator: Texts, or columns of texts, whose rows are read without making them `str` (nulls are
                passed over); read while the pieces of earlier ones are counted, and not kept.
            vocab_size: 256 and the number of merges.
            buffer_size: Texts handed over at once, at most.
            pattern: Regex that splits text into pieces; GPT-4's by default.
            num_threads: Threads that count; one per core by default.
            max_memory: Bytes that counting and training may take, 64 MiB or more; no bound by default. Texts
                under way and what Python holds come on top.
            progress: Called about ten times a second, and at the end, with bytes read, pieces counted and
                merges done; an exception it raises stops the training.

        Raises:
            ValueError: vocab_size below 256, a pattern that does not compile, a text that is not valid
                Unicode.
            TypeError: an item that is neither.
        """

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def encode_numpy(self, text: str) -> NDArray[np.uint32]:
        """Ids of a text as an array."""

    def batch_encode(self, texts: Iterable[str], num_threads: int | None = None) -> list[list[int]]:
        """Ids of each text."""

    def encode_batch_numpy(
        self, texts: Iterable[str], num_threads: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts end to end, and offsets: those of text i are `ids[offsets[i]:offsets[i + 1]]`.

        Texts are read while earlier ones are encoded, and let go as they are done with.
        """

    def decode(self, ids: Sequence[int] | NDArray[np.uint32]) -> str:
        """Text of ids; bytes that are not valid UTF-8 become U+FFFD as in `bytes.decode(errors="replace")`.

        Raises:
            ValueError: an id that the vocabulary does not have.
        """

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.uint32]) -> bytes:
        """Bytes of ids."""

    def split(self, text: str) -> list[str]:
        """The pieces of a text, each of which is merged by itself."""

    @property
    def vocab_size(self) -> int:
        """256 and the number of merges."""

    def get_pattern(self) -> str:
        """The pattern as it was given."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(bytes, rank) of every token in order of rank: tiktoken's mergeable ranks."""

    def get_merges(self) -> list[tuple[int, int]]:
        """The two ids that make each token of more than one byte, in order of rank.

        Raises:
            ValueError: a token of the ranks that no merge makes.
        """
