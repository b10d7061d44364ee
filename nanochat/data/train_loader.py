"""Training and validation batches: tokenized, packed rows in an order that does not depend on the ranks.

The row groups of the training shards are put in a seeded order, anew each epoch, and dealt to L *row streams*
(`row_stream.py`): stream l reads groups l, l + L, ... of the order, each packed into rows (`packing.py`). A
global batch of R rows takes R / L rows from each stream: row i is the next row of stream i mod L. Rank r of W
takes the rows with i mod W == r, in that order, and cuts them into micro-batches. So the sequence of global
batches depends on the corpus, the tokenizer, the context, the seed and L alone.

Shards that are fetched from the hub one after another are read so in the first epoch, the row groups of each
in a seeded order: training begins while later shards are missing. All other epochs mix all row groups.

Where W divides L, i mod L decides i mod W: a rank reads the streams l with l mod W == r and no other. Where
it does not (fewer row groups than ranks), several ranks read the same stream, and each keeps its rows of it.

Shards of tokens need no packing: they are cut into rows as they stand (`token_shards.py`).

The state is one cursor a stream: epoch, position among its row groups, row. Threads tokenize and pack ahead,
but a cursor moves only when a row is drawn: the state is that of the batch not yet drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import requested
from nanochat.data.corpus import Corpus
from nanochat.data.packing import Packed, pack, shuffled
from nanochat.data.parquet_shards import Shard
from nanochat.data.row_stream import Rows, RowStream, fit_streams
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer

FORMAT = 1


class Batch(NamedTuple):
    """A micro-batch: what one forward and backward pass takes.

    Attributes:
        inputs: (B, T) int64 token ids.
        targets: (B, T) int64, -1 where none counts.
        weights: (B, T) fp32 factors on the losses, whose weighted sum is then minimized; None for their mean.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None

    def split(self, rows: int) -> list[Batch]:
        """The same in micro-batches of `rows` rows, the last of what is left."""
        starts = range(0, len(self.inputs), rows)
        return [Batch(*(None if part is None else part[at : at + rows] for part in self)) for at in starts]  # type: ignore[arg-type]


class TrainLoader:
    """An endless sequence of global batches, of which each rank draws its rows."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        sequence_len: int,
        rows_per_batch: int,
        streams: int,
        seed: int,
        world: World,
        device_batch_size: int,
        keep_tails: bool = False,
        threads: int = 2,
    ) -> None:
        """Plan the order; nothing is read before the first batch.

        Args:
            corpus: what to read.
            tokenizer: how.
            sequence_len: T.
            rows_per_batch: R, rows of a global batch over all ranks and micro-batches.
            streams: L; lowered, with a notice, where the corpus has fewer row groups. Each opens with a row
                group, about a million tokens: a wait before the first batch, and memory after it.
            seed: of the order of row groups, and of rows within one.
            world: the ranks.
            device_batch_size: rows of a micro-batch.
            keep_tails: put the remainders of cropped documents back as documents.
            threads: that tokenize and pack ahead.
        """
        self._groups = [(shard, group) for shard in corpus.train_shards for group in range(shard.row_groups)]
        counts = [shard.row_groups for shard in corpus.train_shards]
        self._shard_of = np.repeat(np.arange(len(counts)), counts)
        assert rows_per_batch % streams == 0
        assert rows_per_batch % (world.size * device_batch_size) == 0, "the plan makes it so"
        self.n_streams = fit_streams(streams, rows_per_batch, len(self._groups))
        if self.n_streams < streams:
            world.print0(
                f"{corpus.name} has {len(self._groups)} row groups: {self.n_streams} streams, not {streams}."
            )
        self._corpus, self._tokenizer, self._world = corpus, tokenizer, world
        self._row_slots, self._seed, self._keep_tails = sequence_len + 1, seed, keep_tails
        self._rows_per_stream = rows_per_batch // self.n_streams
        self.device_batch_size = device_batch_size
        rows = range(world.rank, rows_per_batch, world.size)
        self._mine = [(row % self.n_streams, row // self.n_streams) for row in rows]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._fetched: list[list[Batch]] = []
        self._before: dict[int, tuple[int, int, int]] = {}
        self._streams = {index: self._stream(index) for index in sorted({stream for stream, _ in self._mine})}

    def _stream(self, index: int) -> RowStream:
        def load(epoch: int, position: int) -> Future[Rows]:
            return self._pool.submit(self._load, epoch, index + position * self.n_streams)

        return RowStream(load, len(range(index, len(self._groups), self.n_streams)))

    def _load(self, epoch: int, position: int) -> Rows:
        """Read, tokenize, pack and shuffle the row group at a position of an epoch. Runs in a thread."""
        index = int(group_order(self._shard_of, self._seed, epoch, self._corpus.comes_in_order)[position])
        rows, _ = _pack_group(
            self._corpus, self._tokenizer, *self._groups[index], self._row_slots, self._keep_tails
        )
        # Best-fit makes rows of long documents first and of short ones last; training wants them mixed.
        return rows[shuffled(len(rows), self._seed, epoch, index)]

    def fetch(self, batches: int, stop_requested: Callable[[], bool] = requested) -> None:
        """Draw the next global batches, for `next_batch` to hand out.

        Raises:
            Stopped: we are asked to stop while data is waited for; nothing is drawn then.
        """
        self._before = {index: stream.cursor for index, stream in self._streams.items()}
        try:
            self._fetched = [self._draw(stop_requested) for _ in range(batches)]
        except BaseException:  # a batch is drawn from all streams or from none
            self.put_back()
            raise

    def put_back(self) -> None:
        """Take back what `fetch` has drawn: the state is that of before."""
        self._fetched = []
        for index, cursor in self._before.items():
            self._streams[index].move(cursor)

    def next_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        if not self._fetched:
            self.fetch(1)
        return self._fetched.pop(0)

    def _draw(self, stop_requested: Callable[[], bool]) -> list[Batch]:
        for stream in self._streams.values():
            stream.start()
        taken = {i: stream.take(self._rows_per_stream, stop_requested) for i, stream in self._streams.items()}
        tokens = moved(np.stack([taken[stream][row] for stream, row in self._mine]), self._world.device)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        return batch.split(self.device_batch_size)

    @property
    def epoch(self) -> float:
        """Times that this rank's streams have gone through their row groups, on average."""
        return sum(stream.progress() for stream in self._streams.values()) / len(self._streams)

    @property
    def metrics(self) -> dict[str, float]:
        """What the line of a step says of the data."""
        return {"epoch": self.epoch}

    def close(self) -> None:
        """Stop the threads; what they have begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, the same on all ranks, and what decides the order of the rows.

        A collective: every rank has to call it.
        """
        assert not self._fetched, "what was drawn is not used yet"
        cursors = torch.zeros(self.n_streams, 3, dtype=torch.int64)
        for index, stream in self._streams.items():
            if index % self._world.size == self._world.rank:  # of several ranks that read it, one gives it
                cursors[index] = torch.tensor(stream.cursor)
        return {
            "format": FORMAT,
            "corpus": self._corpus.fingerprint,
            "tokenizer": self._tokenizer.fingerprint,
            "sequence_len": self._row_slots - 1,
            "seed": self._seed,
            "keep_tails": self._keep_tails,
            "lanes": self.n_streams,
            "cursors": self._world.all_reduce_sum(cursors.to(self._world.device)).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at this or another world size.

        That it is of the same order of rows has been checked: see `checkpoint.resume`.

        Raises:
            UserError: it is not what `state_dict` gives.
        """
        cursors: Any = state.get("cursors")
        good = state.get("format") == FORMAT and not typed_json.mismatch(cursors, list[list[int]])
        good = good and len(cursors) == self.n_streams
        if not good or not all(map(self._is_cursor, range(self.n_streams), cursors)):
            raise UserError(
                f"the loader's state has no cursors for {self.n_streams} streams in format {FORMAT}; "
                "the checkpoint is damaged."
            )
        for index, stream in self._streams.items():
            stream.move(tuple(cursors[index]))

    def _is_cursor(self, stream: int, cursor: list[int]) -> bool:
        """Whether it is (epoch, position, row), and the row group is one of the stream's."""
        in_range = len(cursor) == 3 and all(0 <= number < 1 << 40 for number in cursor)  # of a tensor, too
        return in_range and stream + cursor[1] * self.n_streams < len(self._groups)


def moved(rows: NDArray[np.int32], device: torch.device) -> Tensor:
    """Rows of tokens as int64 on the device; a GPU gets them without a wait."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return tokens.to(device, non_blocking=True)


def group_order(shard_of: NDArray[np.int64], seed: int, epoch: int, in_order: bool) -> NDArray[np.int64]:
    """The row groups of an epoch in the order in which they are dealt to the streams.

    Args:
        shard_of: (n,) the shard of each row group, ascending.
        seed: of the order.
        epoch: each has another.
        in_order: shard by shard in the first epoch, as they are fetched.
    """
    order = shuffled(len(shard_of), seed, epoch)
    if in_order and epoch == 0:
        order = order[np.argsort(shard_of[order], kind="stable")]
    return order


def _pack_group(
    corpus: Corpus, tokenizer: Tokenizer, shard: Shard, row_group: int, row_slots: int, keep_tails: bool
) -> Packed:
    if shard.holds_tokens:  # their tokenizer put BOS, its last id, before every document
        rows = corpus.read_rows(shard, row_group, row_slots, tokenizer.bos_id + 1)
        return Packed(rows, filled=0)
    ids, offsets = tokenizer.encode_batch(corpus.read_block(shard, row_group), num_threads=1)
    return pack(ids, offsets, bos_id=tokenizer.bos_id, row_slots=row_slots, keep_tails=keep_tails)


class ValBatches:
    """A fixed list of rows of one split, of which each rank has every W-th, to iterate over again and again.

    Of shards of tokens they are the stream from its beginning, as the races on such shards take it. Rows of
    text are packed like those of training, by default with the remainders of cropped documents, so that every
    token of the split is in one row and is a target once (BOS aside); targets in the empty end of a row
    group's last row are -1. The rows are made in the first pass and kept (4 bytes a token).
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        sequence_len: int,
        rows: int,
        world: World,
        max_tokens: int | None = None,
        split: str = "val",
        keep_tails: bool = True,
    ) -> None:
        """Read nothing yet.

        Args:
            corpus: what to read.
            tokenizer: how.
            sequence_len: T.
            rows: of a batch; the last may have fewer.
            world: each rank gets every W-th row; one may get a row more than another, or none.
            max_tokens: how many targets at least, over all ranks; None for the whole split.
            split: "val", or "train" to compare with it.
            keep_tails: as the run has it: without, figures compare with those of loaders that crop.
        """
        self._corpus, self._tokenizer, self._world = corpus, tokenizer, world
        self._row_slots, self._batch_rows, self._split = sequence_len + 1, rows, split
        self._keep_tails = keep_tails
        self._max_rows = math.inf if max_tokens is None else max(1, -(-max_tokens // sequence_len))
        self._rows: NDArray[np.int32] | None = None  # (n, T + 1); -1 where the documents ran out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches: (inputs, targets), (B, T) int64 each."""
        if self._rows is None:
            self._rows = self._pack()
        for start in range(0, len(self._rows), self._batch_rows):
            tokens = moved(self._rows[start : start + self._batch_rows], self._world.device)
            inputs = tokens[:, :-1].masked_fill(tokens[:, :-1] < 0, self._tokenizer.bos_id)
            yield inputs, tokens[:, 1:].contiguous()

    def _pack(self) -> NDArray[np.int32]:
        shards = self._corpus.val_shards if self._split == "val" else self._corpus.train_shards
        parts = [np.empty((0, self._row_slots), np.int32)]
        seen = 0
        for index, (shard, group) in enumerate((s, g) for s in shards for g in range(s.row_groups)):
            if seen >= self._max_rows:
                break
            rows, filled = _pack_group(
                self._corpus, self._tokenizer, shard, group, self._row_slots, self._keep_tails
            )
            rows[len(rows) - 1 :, self._row_slots - filled :] = -1
            if not shard.holds_tokens:
                # Best-fit puts long documents first; what max_tokens leaves should be like all of it.
                rows = rows[shuffled(len(rows), 0, index)]
            rows = rows[: int(min(len(rows), self._max_rows - seen))]
            parts.append(rows[(self._world.rank - seen) % self._world.size :: self._world.size])
            seen += len(rows)
        return np.concatenate(parts)
