"""Byte-level BPE, whose ids equal tiktoken's; and the step of a model that decodes text on a CPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

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

class DecodeStep:
    """The forward pass of one new position a row, on a CPU; `nanochat.model.decode_step` wraps it.

    Sums are fp32, in an order that does not depend on the rows beside one or on the number of threads.
    """

    def __init__(
        self,
        *,
        precision: str,
        rounds: bool,
        layers: list[tuple[Any, ...]],
        windows: list[int],
        mix: list[list[float]],
        head: NDArray[np.float32],
        vocabulary: int,
        embeddings: NDArray[np.float32 | np.uint16],
        heads: int,
        kv_heads: int,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        smear_gate: NDArray[np.float32],
        smear_scale: float,
        backout_scale: float,
        gate_scale: float,
        scale: float,
        softcap: float,
    ) -> None:
        """Pack the weights; the tables of embeddings stay where they are, and are read at each step.

        Args:
            precision: of the packed weights: "fp32", "bf16" or "int8", with a factor for each output.
            rounds: whether what is read from a table is rounded to bf16.
            layers: of each layer, in fp32: queries, keys and values below each other (outputs, C),
                out (C, H * D), up (4 C, C), down (C, 4 C), gate (Hkv, channels) or None, and the table of
                value embeddings (V, Hkv * D) or None.
            windows: earlier positions that each layer sees.
            mix: of each layer the factors of the stream and of its first state.
            head: (V or more, C).
            vocabulary: V.
            embeddings: (V or more, C); a table is fp32, or bf16 as its bits.
            heads: H.
            kv_heads: Hkv.
            cos: (positions, D / 2) of the rotary angles.
            sin: likewise.
            smear_gate: of so many channels.
            smear_scale: its factor.
            backout_scale: factor of the middle layer's stream.
            gate_scale: factor of the value gates.
            scale: of the scores.
            softcap: of the logits.

        Raises:
            ValueError: shapes that do not belong together.
        """

    def step(
        self,
        ids: list[int],
        before: list[int | None],
        rows: list[int],
        lengths: list[int],
        keys: NDArray[np.float32 | np.uint16],
        values: NDArray[np.float32 | np.uint16],
        logits: NDArray[np.float32],
        threads: int,
    ) -> None:
        """Store a position in some rows of a cache, and write what comes next into `logits`.

        Args:
            ids: (n) new tokens.
            before: (n) the tokens before them, None where there is none.
            rows: (n) rows of the cache, each once.
            lengths: (n) positions that they store.
            keys: (layers, rows, capacity, Hkv * D) fp32, or bf16 as its bits.
            values: likewise.
            logits: (n, V).
            threads: at most; a small step takes fewer.

        Raises:
            ValueError: an id, a row or a shape that is none of the model's, or a full row.
        """
