"""Tokenizer training on a corpus: reads columns of Arrow, shows a progress bar, and prints the figures.

It is here and not beside the tokenizer, which takes any iterator of texts and knows no corpus.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.progress import BarColumn, Progress, TextColumn

from nanochat.common.machine import peak_memory_bytes
from nanochat.config.arguments import TokTrainArgs
from nanochat.data import text_size
from nanochat.data.corpus import Corpus
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer

Report = Callable[[int, int, int], None]


def columns(corpus: Corpus, *, max_chars: int, doc_cap: int) -> Iterator[pa.Array]:
    """Training documents in the order of the shards, as arrays of Arrow: none becomes a `str`.

    Args:
        corpus: shards are verified at their first use.
        max_chars: about how many characters in all; the last document may go over.
        doc_cap: characters taken of each document, from its beginning.

    Raises:
        UserError: a shard is damaged, absent, or over the limits on what is read.
    """
    left = max_chars
    for shard in corpus.train_shards:
        for row_group in range(shard.row_groups):
            if left <= 0:
                return
            texts = pc.utf8_slice_codeunits(corpus.read_column(shard, row_group), 0, doc_cap)
            given = np.cumsum(pc.utf8_length(texts).to_numpy(zero_copy_only=False))
            wanted = int(np.searchsorted(given, left)) + 1
            yield texts.slice(0, wanted)
            left -= int(given[min(wanted, len(given)) - 1]) if len(given) else 0


@contextlib.contextmanager
def bar(corpus: Corpus, max_chars: int, entries: int) -> Iterator[Report]:
    """A bar on a terminal: counting, with its speed, then merging; and the memory that the process holds."""
    if not sys.stdout.isatty():
        yield lambda read, pieces, merges: None
        return
    started = time.perf_counter()
    parts = (TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*parts, transient=True) as progress:
        total = min(_text_bytes(corpus), max_chars)
        counting = progress.add_task("counting", total=total, detail="")
        merging = progress.add_task("merging", total=entries - 256 - len(SPECIALS), detail="")

        def report(read: int, pieces: int, merges: int) -> None:
            progress.update(merging, completed=merges, detail=f"{merges:,} merges")
            if merges == 0:
                speed = read / max(time.perf_counter() - started, 1e-9) / 1e6
                detail = f"{read / 1e6:,.0f} MB, {pieces / 1e6:,.1f} M pieces, {speed:.0f} MB/s"
                memory = f"{peak_memory_bytes() / 1e6:,.0f} MB held"
                progress.update(counting, completed=read, detail=f"{detail}, {memory}")

        yield report


def _text_bytes(corpus: Corpus) -> int:
    """About how much text the training shards hold, from the footer of the first."""
    first = corpus.train_shards[0]
    corpus.verify(first)
    with pq.ParquetFile(corpus.path(first)) as file:
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        expansion = sum(group.total_byte_size for group in groups) / max(first.bytes, 1)
    return int(expansion * sum(shard.bytes for shard in corpus.train_shards))


def _suitable_size(corpus: Corpus) -> int:
    """Entries of a vocabulary that suits the text; says so where they are fewer than the usual ones."""
    if not text_size.is_measured(corpus):
        return text_size.MAX_VOCAB
    size = _text_bytes(corpus)
    entries = text_size.vocab_size_for(size)
    if entries < text_size.MAX_VOCAB:
        print(
            f"vocabulary: {entries:,} entries suit {size / 1e6:,.2f} MB of text, about "
            f"{text_size.VOCAB_BYTES:,} bytes an entry (--vocab-size)"
        )
    return entries


def train(corpus: Corpus, args: TokTrainArgs) -> Tokenizer:
    """Train on a corpus and say how it went."""
    asked = args.vocab_size or _suitable_size(corpus)
    texts = columns(corpus, max_chars=args.max_chars, doc_cap=args.doc_cap)
    started = time.perf_counter()
    with bar(corpus, args.max_chars, asked) as report:
        tokenizer = Tokenizer.train(
            texts, asked, source=corpus.fingerprint, max_memory=args.max_memory, progress=report
        )
    seconds, read = time.perf_counter() - started, int(tokenizer.trained_on["bytes"])
    print(
        f"trained {tokenizer.vocab_size} entries on {read / 1e6:,.1f} MB in {seconds:.1f} s "
        f"({read / 1e6 / seconds:,.0f} MB/s), peak memory {peak_memory_bytes() / 1e6:,.0f} MB"
    )
    if tokenizer.vocab_size < asked:
        print(f"the corpus has no more pairs: {asked} entries were asked")
    if pruned := tokenizer.trained_on["pruned_pieces"]:
        print(f"--max-memory={args.max_memory} was passed: {pruned} rare pieces were dropped")
    return tokenizer


def validation_text(corpus: Corpus, max_chars: int) -> str:
    """The beginning of a corpus's validation split."""
    groups = ((shard, group) for shard in corpus.val_shards for group in range(shard.row_groups))
    texts: list[str] = []
    while sum(map(len, texts)) < max_chars and (following := next(groups, None)):
        texts += corpus.read_block(*following)
    return "\n\n".join(texts)[:max_chars]
