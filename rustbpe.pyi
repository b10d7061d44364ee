"""Byte-level BPE: a parallel trainer and an encoder whose ids equal tiktoken's."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

class Tokenizer:
    """A vocabulary of byte strings and the pattern that splits text before merging.

    Safe to share between threads: a training that ends swaps the vocabulary in at once; calls under way keep
    the old one.
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
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Learns merges from texts: highest count first, ties by the smaller pair of ids.

        The result does not depend on the number of threads. It is smaller than asked if the texts have no
        more pairs.

        Args:
            iterator: Texts; read while the pieces of earlier ones are counted, and not kept.
            vocab_size: 256 and the number of merges.
            buffer_size: Texts handed over at once, at most.
            pattern: Regex that splits text into pieces; GPT-4's by default.
            num_threads: Threads that count; one per core by default.

        Raises:
            ValueError: vocab_size below 256, a pattern that does not compile, a text that is not valid
                Unicode.
            TypeError: an item that is not a str.
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
        """Ids of all texts end to end, and offsets: those of text i are `ids[offsets[i]:offsets[i + 1]]`."""

    def decode(self, ids: Sequence[int] | NDArray[np.uint32]) -> str:
        """Text of ids; bytes that are not valid UTF-8 become U+FFFD as in `bytes.decode(errors="replace")`.

        Raises:
            ValueError: an id outside the vocabulary.
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
