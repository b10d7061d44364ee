"""Bits per byte: the loss of a model in a unit that does not depend on its tokenizer.

Models of other vocabularies can be compared by it, where nats per token cannot.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped
from nanochat.config.arguments import TrainArgs
from nanochat.data.corpus import Corpus
from nanochat.data.train_loader import ValBatches
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

Batches = Iterable[tuple[Tensor, Tensor]]

HISTOGRAM_STEP = 0.1  # bits per byte
HISTOGRAM_BINS = 80  # the last holds all documents from 7.9 on


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Loss in nats over the bytes that the predicted tokens spell (RECIPE 1.5).

    >>> round(bits_per_byte(math.log(2) * 8, 8), 12)
    1.0
    """
    return nats / (math.log(2) * n_bytes)


@dataclass(frozen=True)
class Validation:
    """How well a model predicts.

    Attributes:
        bpb: bits per byte, over the targets that spell bytes.
        loss: nats per token, over all targets that count: what training lowers, comparable between models of
            one tokenizer.
    """

    bpb: float
    loss: float


@dataclass(frozen=True)
class BpbProfile(Validation):
    """The same taken apart.

    Attributes:
        positions: (first, last, bits per byte) of the targets at these places of a row, from 1; the places
            double from one to the next, so they show what a longer context is worth.
        documents: how many documents, or pieces that a row cuts of one, have bits per byte from
            i * documents_step on, by i; without the empty bins at the end.
        documents_step: width of a bin.
    """

    positions: list[list[float]]
    documents: list[int]
    documents_step: float = HISTOGRAM_STEP


def batches_of(
    corpus: Corpus,
    tokenizer: Tokenizer,
    trained: TrainArgs,
    sequence_len: int,
    rows: int,
    world: World,
    max_tokens: int,
    split: str = "val",
) -> ValBatches:
    """Batches to evaluate a run on: the same rows during its training and after it.

    Args:
        corpus: of the run.
        tokenizer: of the run.
        trained: the arguments of the run, which say whether remainders of documents count.
        sequence_len: T of the model.
        rows: of a batch; a compiled model wants those of its micro-batches.
        world: each rank gets its rows.
        max_tokens: targets over all ranks.
        split: "val" or "train".
    """
    keep_tails = bool(trained.keep_tails)
    return ValBatches(corpus, tokenizer, sequence_len, rows, world, max_tokens, split, keep_tails)


@dataclass(frozen=True)
class Sums:
    """What validation figures are made of; those of several sources can be added.

    Attributes:
        spelled_nats: loss of the targets that spell bytes.
        n_bytes: that they spell.
        nats: loss of all targets that count.
        tokens: how many those are.
    """

    spelled_nats: float = 0.0
    n_bytes: float = 0.0
    nats: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        """The sums over both."""
        return Sums(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def validation(self) -> Validation:
        """Bits per byte and loss.

        Raises:
            UserError: no target spells a byte.
        """
        _require_bytes(self.n_bytes)
        return Validation(bits_per_byte(self.spelled_nats, int(self.n_bytes)), self.nats / self.tokens)


def add_up(
    model: GPT,
    batches: Batches,
    token_bytes: np.ndarray,
    world: World,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Sums:
    """Losses and bytes of a model over batches, each rank giving its own.

    Tokens that spell no bytes (the special ones) count in the loss, and neither in the bits nor in the bytes.

    Args:
        model: on `world.device`.
        batches: (inputs, targets), each (B, T) int64; a target of -1 is ignored.
        token_bytes: (V,) bytes of each token, 0 for the special ones.
        world: losses and bytes are summed over its ranks, so that the result is the same on all of them.
        stop_requested: called between batches; if it is True on any rank, all of them stop.

    Raises:
        Stopped: by `stop_requested`.
    """
    # fp32 sums of one batch, added in float64 at the end: no wait for the device, no loss of digits.
    wanted = itertools.takewhile(lambda _: not stop_requested(), batches)
    sums = [
        ((nats * (spelled > 0)).sum(), spelled.sum(), nats.sum(), counted.sum())
        for _, nats, spelled, counted in _losses(model, wanted, token_bytes, world)
    ]
    parts = [torch.stack(part).to("cpu", torch.float64).sum() for part in zip(*sums, strict=True)]
    mine = torch.stack(parts) if parts else torch.zeros(4, dtype=torch.float64)
    summed = Sums(*_summed(mine, world))
    if world.any_rank(stop_requested()):
        raise Stopped
    return summed


def evaluate(
    model: GPT,
    batches: Batches,
    token_bytes: np.ndarray,
    world: World,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Validation:
    """Bits per byte and loss of a model over batches; arguments as in `add_up`.

    Raises:
        Stopped: by `stop_requested`.
        UserError: no batch on any rank has a token that spells a byte.
    """
    return add_up(model, batches, token_bytes, world, stop_requested).validation()


def profile_bpb(
    model: GPT, batches: Batches, token_bytes: np.ndarray, world: World, bos_id: int
) -> BpbProfile:
    """Bits per byte, by position and by document; arguments as in `evaluate`.

    A document begins with `bos_id`. What a row holds of it counts as one document.
    """
    length = model.config.sequence_len
    by_position = torch.zeros(2, length, dtype=torch.float64)
    histogram = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)
    totals = torch.zeros(2, dtype=torch.float64)  # nats and tokens
    for inputs, *of_targets in _losses(model, batches, token_bytes, world):
        # One copy, and so one wait for the device; whole numbers are exact in fp32 up to 2^24.
        fields = torch.stack([part.float() for part in (*of_targets, inputs == bos_id)])
        losses, spelled, counted, starts = fields.cpu()
        totals += torch.stack((losses.sum().double(), counted.double().sum()))
        nats = losses * (spelled > 0)
        by_position[:, : nats.size(1)] += torch.stack((nats.sum(0).double(), spelled.double().sum(0)))
        histogram += _histogram(nats, spelled, starts)
    all_nats, tokens = _summed(totals, world)
    summed = _summed(by_position.flatten(), world)
    nats_at, bytes_at = summed[:length], summed[length:]
    _require_bytes(sum(bytes_at))
    positions = []
    for first in (1 << power for power in range(length.bit_length())):
        last = min(2 * first - 1, length)
        if total := sum(bytes_at[first - 1 : last]):
            positions.append([first, last, bits_per_byte(sum(nats_at[first - 1 : last]), int(total))])
    documents = np.trim_zeros(_summed(histogram, world), "b")
    bpb = bits_per_byte(sum(nats_at), int(sum(bytes_at)))
    return BpbProfile(bpb, all_nats / tokens, positions, [int(count) for count in documents])


def _histogram(nats: Tensor, spelled: Tensor, starts: Tensor) -> Tensor:
    """(HISTOGRAM_BINS,) how many documents of the rows (B, T) have so many bits per byte."""
    starts[:, 0] = 1
    document = starts.flatten().long().cumsum(0) - 1
    by_document = torch.zeros(2, int(document[-1]) + 1, dtype=torch.float64)
    by_document[0].index_add_(0, document, nats.flatten().double())
    by_document[1].index_add_(0, document, spelled.flatten().double())
    document_nats, document_bytes = by_document[:, by_document[1] > 0]
    bits = document_nats / (math.log(2) * document_bytes)
    bins = (bits / HISTOGRAM_STEP).nan_to_num(HISTOGRAM_BINS).floor().clamp(0, HISTOGRAM_BINS - 1)
    return torch.bincount(bins.long(), minlength=HISTOGRAM_BINS)


@torch.no_grad()
def _losses(
    model: GPT, batches: Batches, token_bytes: np.ndarray, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each batch the inputs, the losses in nats, the bytes that targets spell, and which targets count."""
    bytes_of = torch.as_tensor(token_bytes, dtype=torch.int64, device=world.device)
    for inputs, targets in batches:
        targets = targets.to(world.device)
        counted = targets >= 0
        spelled = torch.where(counted, bytes_of[targets.clamp(min=0)], 0)
        losses = model.loss(inputs.to(world.device), targets, reduction="none").view(targets.shape)
        yield inputs, losses.float() * counted, spelled, counted


def _summed(values: Tensor, world: World) -> list[float]:
    """(N,) float64, each value added up over the ranks."""
    # The device of a lone rank may lack float64 (mps); the CPU has it.
    where = "cpu" if world.backend is None else world.device
    return [float(value) for value in world.all_reduce_sum(values.to(where)).tolist()]


def _require_bytes(count: float) -> None:
    if not count:
        raise UserError(
            "bits per byte: no tokens to evaluate on: the text for validation fills no row. "
            "Use --keep-tails, a shorter --max-seq-len, or more text."
        )
