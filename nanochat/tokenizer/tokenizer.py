"""Byte-level BPE tokenizer: text to ids and back, nine special tokens, and its file tokenizer.json.

The file is in Hugging Face's format, so `tokenizers` and `transformers` load it as it is and give the same
ids; it is the only home of the pattern. Ids 0..M-1 are byte strings (the 256 single bytes, then one for each
merge in order), M..M+8 the special tokens. These stand in its vocabulary, where an id finds its name and a
name its id, and not among its `added_tokens`: those are looked for in all text, and a text that spells
`<|bos|>` would yield one.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import rustbpe
from nanochat.common import files
from nanochat.common.errors import UserError

# GPT-4's pattern with numbers cut into ones and twos: at small vocabularies three digits waste entries.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# GPT-2's, with which its vocabulary is read.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_END = "<|endoftext|>"  # stands before every document, as <|bos|> does here, and has the id of it

# <|bos|>, then <|user_start|>, <|user_end|>, <|assistant_start|> and so on.
SPEAKERS = ("user", "assistant", "python", "output")
SPECIALS = ("<|bos|>", *(f"<|{speaker}_{edge}|>" for speaker in SPEAKERS for edge in ("start", "end")))

FILE_NAME = "tokenizer.json"
NO_DIGEST = "0" * 64
MIN_MEMORY = 64 << 20  # bytes; the least bound on the memory of training

T = TypeVar("T")


class Tokenizer:
    """A vocabulary and its pattern. Immutable; safe to share between threads.

    Attributes:
        trained_on: what it was trained on, kept in the file for people; `asked_vocab_size` says how many
            entries were asked for, since a corpus may run out of pairs before.
        pattern: the regex that splits text into pieces, each merged by itself.
        bos_id: id of `<|bos|>`, with which every document starts.
        vocab_size: entries, special tokens included.
    """

    def __init__(self, bpe: rustbpe.Tokenizer, trained_on: dict[str, str | int] | None = None) -> None:
        """Put the special tokens after the byte strings of `bpe`.

        Args:
            bpe: ranks and pattern.
            trained_on: what it was trained on.
        """
        self._bpe = bpe
        self.trained_on = dict(trained_on or {})
        self.pattern = bpe.get_pattern()
        self.bos_id = bpe.vocab_size
        self.vocab_size = self.bos_id + len(SPECIALS)
        self._spelled = [token for token, _ in bpe.get_mergeable_ranks()]
        self._spelled += [name.encode() for name in SPECIALS]
        self._contents = _to_json(bpe, self.trained_on)

    @classmethod
    def train(
        cls,
        texts: Iterable[str | rustbpe.ArrowStrings],
        vocab_size: int,
        *,
        source: str = "",
        max_memory: int | None = None,
        progress: Callable[[int, int, int], object] | None = None,
    ) -> Tokenizer:
        """Learn merges from texts, read once and not kept.

        The vocabulary is smaller than asked if the texts have no pairs left to merge.

        Args:
            texts: the corpus: texts, or columns of Arrow that hold them.
            vocab_size: entries, special tokens included.
            source: name or hash of the corpus, kept in the file.
            max_memory: bytes that training may take, 64 MiB or more; above it rare pieces are dropped by the
                rule in rustbpe.pyi, which the file then says.
            progress: told about ten times a second: bytes read, pieces counted, merges done.

        Raises:
            UserError: `vocab_size` below 256 + 9, no text, or a text that is not valid Unicode.
        """
        if vocab_size < (least := 256 + len(SPECIALS)):
            raise UserError(
                f"vocab_size={vocab_size}: 256 bytes and {len(SPECIALS)} special tokens need {least} or more."
            )
        if max_memory is not None and max_memory < MIN_MEMORY:
            raise UserError(f"max_memory={max_memory}: training needs {MIN_MEMORY} bytes (64 MiB) or more.")
        bpe = rustbpe.Tokenizer()
        try:
            report = bpe.train_from_iterator(
                texts, vocab_size - len(SPECIALS), pattern=PATTERN, max_memory=max_memory, progress=progress
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"training the tokenizer: {error}. Take that text out of the corpus.") from error
        if report["bytes"] == 0:
            raise UserError("training the tokenizer: the corpus has no text. Name one that has.")
        about: dict[str, str | int] = {"source": source} if source else {}
        about |= {"texts": report["texts"], "bytes": report["bytes"]}
        about |= {"asked_vocab_size": vocab_size, "pruned_pieces": report["pruned_pieces"]}
        return cls(bpe, about)

    @classmethod
    def from_ranks_file(cls, path: Path, pattern: str) -> Tokenizer:
        """A tokenizer from tiktoken's ranks: lines of base64 and rank, as OpenAI publishes them.

        Raises:
            UserError: the file is absent or is not such a file.
        """
        try:
            pairs = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            return cls(rustbpe.Tokenizer.from_ranks(ranks, pattern))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file.") from None
        except ValueError as error:
            raise UserError(f"{path}: not a file of tiktoken ranks ({error}).") from error

    @classmethod
    def from_gpt2_file(cls, path: Path) -> Tokenizer:
        """GPT-2's tokenizer, from its vocab.json; <|bos|> takes the place of <|endoftext|>, 50256.

        Raises:
            UserError: the file is absent or is not such a file.
        """
        vocab = files.read_json(path)
        try:
            names = _names_by_id(_field(vocab, "file", dict))
            if names[-1:] != [GPT2_END]:
                raise ValueError(f"its last entry is not {GPT2_END}")
            return cls(rustbpe.Tokenizer.from_ranks(_ranks_of(names[:-1]), GPT2_PATTERN))
        except ValueError as error:
            raise UserError(f"{path}: not the vocab.json of GPT-2: {error}. Fetch it again.") from error

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `folder`/tokenizer.json and check all of it.

        Raises:
            UserError: the file is absent, damaged, or not one that `save` writes.
        """
        path = folder / FILE_NAME
        again = "Put a copy back, or train it again with scripts/tok_train.py --overwrite."
        document = files.read_json(path, advice=again)
        try:
            tokenizer = cls(*_from_json(document))
        except ValueError as error:
            raise UserError(f"{path}: not a tokenizer of this project: {error}. {again}") from error
        contents = path.read_bytes()
        if contents != tokenizer._contents:
            if contents != _to_json(tokenizer._bpe, tokenizer.trained_on, with_digest=False):
                digest = hashlib.sha256(contents).hexdigest()[:12]
                raise UserError(
                    f"{path}: damaged, or changed by hand: sha256 {digest}, what it says has "
                    f"{tokenizer.fingerprint[:12]}. {again}"
                )
            # From before there was a digest: checkpoints know this tokenizer by the sha256 of this file.
            tokenizer._contents = contents
        return tokenizer

    def special_id(self, name: str) -> int:
        """Id of a special token, which no text is encoded to: `special_id("<|user_start|>")`."""
        return self.bos_id + SPECIALS.index(name)

    def save(self, folder: Path) -> None:
        """Write `folder`/tokenizer.json, whole or not at all."""
        files.atomic_write(folder / FILE_NAME, self._contents)

    @property
    def fingerprint(self) -> str:
        """The sha256 of tokenizer.json."""
        return hashlib.sha256(self._contents).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, after BOS if asked. What spells a special token is text like any other.

        Raises:
            UserError: the text holds lone surrogates.
        """
        try:
            return [self.bos_id] * bos + self._bpe.encode(text)
        except ValueError as error:
            raise UserError(str(error)) from error

    def encode_batch(
        self, texts: Sequence[str], num_threads: int | None = None
    ) -> tuple[np.ndarray[Any, np.dtype[np.uint32]], np.ndarray[Any, np.dtype[np.int64]]]:
        """Ids of many texts, without BOS, on all cores or `num_threads` of them.

        Returns:
            ids: uint32, those of all texts end to end.
            offsets: int64, (texts + 1,); text i is `ids[offsets[i] : offsets[i + 1]]`.

        Raises:
            UserError: a text holds lone surrogates.
        """
        try:
            return self._bpe.encode_batch_numpy(texts, num_threads)
        except ValueError as error:
            raise UserError(str(error)) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens by their names, bytes that are not UTF-8 as U+FFFD.

        Raises:
            UserError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of `ids`; special tokens by their names.

        Raises:
            UserError: an id outside the vocabulary.
        """
        numbers = np.asarray(ids, dtype=np.int64)
        wrong = numbers[(numbers < 0) | (numbers >= self.vocab_size)]
        if wrong.size:
            raise UserError(
                f"unknown token id {wrong[0]}: the vocabulary has the ids 0 to {self.vocab_size - 1}. "
                "Decode with the tokenizer that the ids were made with."
            )
        return b"".join(self._spelled[i] for i in numbers.tolist())

    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Length in raw bytes of each token, (vocab_size,) int64; 0 for special tokens.

        Raw bytes, since one token in 170 is no valid UTF-8 by itself and would measure wrong as text.
        """
        lengths = np.array([len(token) for token in self._spelled], dtype=np.int64)
        lengths[self.bos_id :] = 0
        return lengths


def _byte_alphabet() -> list[str]:
    """One visible character for each byte, as GPT-2 chose them: itself if printable, else from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _to_json(bpe: rustbpe.Tokenizer, trained_on: dict[str, str | int], *, with_digest: bool = True) -> bytes:
    """The contents of tokenizer.json. The same tokenizer gives the same bytes, so a file can be compared.

    Its digest is that of the file with zeros in its place: no one change leaves a file that agrees.
    """
    alphabet, pattern = _byte_alphabet(), bpe.get_pattern()
    tokens = ["".join(alphabet[byte] for byte in token) for token, _ in bpe.get_mergeable_ranks()]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        # Readers pass over a key they do not know, but only here.
        "trained_on": trained_on,
        **({"sha256": NO_DIGEST} if with_digest else {}),
        "vocab": {token: i for i, token in enumerate([*tokens, *SPECIALS])},
        "merges": [f"{tokens[left]} {tokens[right]}" for left, right in bpe.get_merges()],
    }
    document: dict[str, Any] = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    contents = (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()
    digest = hashlib.sha256(contents).hexdigest()
    return contents.replace(f'"sha256": "{NO_DIGEST}"'.encode(), f'"sha256": "{digest}"'.encode(), 1)


def _from_json(document: object) -> tuple[rustbpe.Tokenizer, dict[str, str | int]]:
    """Rebuild what `_to_json` wrote.

    Raises:
        ValueError: what is missing, of a wrong type, or at odds with the rest.
    """
    model = _field(_field(document, "file", dict), "model", dict)
    names = _names_by_id(_field(model, "vocab", dict))
    merges = _field(model, "merges", list)
    tokens = names[: -len(SPECIALS)]
    if tuple(names[len(tokens) :]) != SPECIALS:
        raise ValueError(
            f"the last {len(SPECIALS)} entries of 'vocab' are not {SPECIALS[0]} to {SPECIALS[-1]}"
        )
    steps = _field(_field(document, "pre_tokenizer", dict), "pretokenizers", list)
    pattern = _field(_field(steps[0] if steps else None, "pattern", dict), "Regex", str)
    bpe = rustbpe.Tokenizer.from_ranks(_ranks_of(tokens), pattern)
    expected = [f"{tokens[left]} {tokens[right]}" for left, right in bpe.get_merges()]
    if merges != expected:
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(merges, expected, strict=False))
        raise ValueError(
            f"'merges' has {len(merges)} entries, 'vocab' asks for {len(expected)}; they part at "
            f"{sum(1 for _ in equal)}"
        )
    return bpe, _field(model, "trained_on", dict)


def _ranks_of(tokens: Sequence[str]) -> dict[bytes, int]:
    """Byte strings and ranks of tokens spelled in the byte alphabet."""
    byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
    try:
        return {bytes(byte_of[char] for char in token): rank for rank, token in enumerate(tokens)}
    except KeyError as error:
        raise ValueError(f"'vocab' has the character {error}, which stands for no byte") from None


def _field(value: object, key: str, kind: type[T]) -> T:
    """`value[key]`, checked; the key "file" means the value itself."""
    inner = value if key == "file" else value.get(key) if isinstance(value, dict) else None
    if not isinstance(inner, kind):
        raise ValueError(f"{key!r} is {type(inner).__name__}, expected {kind.__name__}")
    return inner


def _names_by_id(vocab: dict[str, object]) -> list[str]:
    names = {i: name for name, i in vocab.items() if type(i) is int}
    missing = next((i for i in range(len(vocab)) if i not in names), None)
    if missing is not None:
        raise ValueError(f"'vocab' has {len(vocab)} entries and none with id {missing}")
    return [names[i] for i in range(len(vocab))]
