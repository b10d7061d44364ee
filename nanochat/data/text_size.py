"""The size of a corpus that was made here, in documents and tokens, and the vocabulary that suits it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanochat.common.errors import UserError
from nanochat.config.plan import Plan
from nanochat.data.corpus import Corpus
from nanochat.data.packing import plan_rows
from nanochat.tokenizer.tokenizer import Tokenizer

MIN_VOCAB, MAX_VOCAB = 512, 32_768
VOCAB_BYTES = 1_000  # of text for an entry: below, most entries are rare words


@dataclass(frozen=True)
class TextSize:
    """How long the documents of a corpus are, in tokens without BOS.

    Attributes:
        documents: documents to train on.
        bytes: of their text in UTF-8, about.
        train: (n,) lengths of those in the first row group, which is like the others.
        val: (n,) lengths of those in the first row group of validation.
    """

    documents: int
    bytes: float
    train: NDArray[np.int64]
    val: NDArray[np.int64]

    @property
    def tokens(self) -> float:
        """Tokens of an epoch, BOS of each document included."""
        return self.documents * (1 + float(self.train.mean())) if len(self.train) else 0.0

    def cropped_fraction(self, context: int) -> float:
        """The fraction of the tokens that no row of a context holds, of the split that loses more."""
        return max(_cropped_fraction(lengths, context + 1) for lengths in (self.train, self.val))

    def require_rows(self, plan: Plan) -> None:
        """Refuse a plan that crops all there is, before anything is built.

        Raises:
            UserError: no row of one of the splits is filled.
        """
        context = plan.model.sequence_len
        if not plan.args.keep_tails and self.cropped_fraction(context) == 1:
            raise UserError(
                f"--no-keep-tails: the documents of one of the splits fill no row of --max-seq-len={context} "
                "tokens. Leave --no-keep-tails out, or give a shorter --max-seq-len."
            )

    def describe(self, plan: Plan) -> str:
        """How large the text is, and how often a plan reads it."""
        epochs = plan.tokens / max(1.0, self.tokens)
        return (
            f"text: about {self.bytes / 1e6:,.2f} MB to train on, {self.tokens:,.0f} tokens in a vocabulary "
            f"of {plan.model.vocab_size:,}; the {plan.steps:,} steps read it {epochs:.1f} times"
        )


def _cropped_fraction(lengths: NDArray[np.int64], row_slots: int) -> float:
    total = int(lengths.sum())
    kept = sum(segment.tokens for segment in plan_rows(lengths, row_slots, keep_tails=False)[0])
    return 1 - kept / total if total else 0.0


def is_measured(corpus: Corpus) -> bool:
    """Whether the settings follow the size of a corpus: it is text, and was made here."""
    return not corpus.holds_tokens and not corpus.comes_in_order


def measure(corpus: Corpus, tokenizer: Tokenizer) -> TextSize:
    """Tokenize the first row group of each split."""
    train, val = (
        corpus.read_block(shard, 0) if shard.row_groups else []
        for shard in (corpus.train_shards[0], corpus.val_shards[0])
    )
    documents = sum(shard.documents for shard in corpus.train_shards)
    sampled_bytes = sum(len(text.encode()) for text in train)
    lengths = (np.diff(tokenizer.encode_batch(texts, num_threads=1)[1]) for texts in (train, val))
    return TextSize(documents, sampled_bytes * documents / max(1, len(train)), *lengths)


def vocab_size_for(text_bytes: int) -> int:
    """The power of two nearest to an entry for 1,000 bytes, from 512 to 32,768.

    >>> [vocab_size_for(n) for n in (10_000, 1_000_000, 11_000_000, 100_000_000)]
    [512, 1024, 8192, 32768]
    """
    nearest = 1 << round(math.log2(max(1.0, text_bytes / VOCAB_BYTES)))
    return min(MAX_VOCAB, max(MIN_VOCAB, nearest))


def epochs_for(corpus: Corpus, tokenizer: Tokenizer, tokens: int) -> float:
    """How many times `tokens` training tokens go through a corpus; for text, an estimate."""
    if corpus.holds_tokens:
        return tokens / sum(shard.tokens for shard in corpus.train_shards)
    return tokens / max(1.0, measure(corpus, tokenizer).tokens)
