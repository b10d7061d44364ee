"""Stages of training: pretraining, SFT and RL differ in their data, in how they begin and in their hooks.

The step and the loop are the same for all of them (`run.py`); a stage says what is put into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nanochat.checkpoint.async_saver import Saver
from nanochat.checkpoint.state import Loader, TrainState
from nanochat.config.plan import Plan
from nanochat.data.corpus import Corpus
from nanochat.data.train_loader import TrainLoader
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train.hooks import Hook, PretrainingHooks
from nanochat.train.run_log import RunLog


class Stage(Protocol):
    """What a run trains on, from which weights, and what runs between its steps."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what decides the data, which a resumed run has to have: the tokenizer's among them."""

    def make_loader(self, plan: Plan, model: GPT, world: World) -> Loader:
        """The batches of a run at its beginning. The model is that which learns from them."""

    def begin(self, state: TrainState, world: World) -> None:
        """Prepare a run at step 0, whose weights are those of the plan's seed so far."""

    def hooks(self, plan: Plan, saver: Saver, world: World, log: RunLog) -> list[Hook]:
        """The hooks of a run in the order in which they run between two steps."""


@dataclass(frozen=True)
class Pretraining:
    """The stage of base_train: documents of a corpus, from initial weights."""

    corpus: Corpus
    tokenizer: Tokenizer

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the corpus and of the tokenizer."""
        return {"corpus": self.corpus.fingerprint, "tokenizer": self.tokenizer.fingerprint}

    def make_loader(self, plan: Plan, model: GPT, world: World) -> TrainLoader:  # noqa: ARG002 - as Stage
        """Rows of the corpus from its beginning."""
        return TrainLoader(
            self.corpus,
            self.tokenizer,
            sequence_len=plan.model.sequence_len,
            rows_per_batch=plan.batch_rows,
            streams=plan.lanes,
            seed=plan.args.seed,
            world=world,
            device_batch_size=plan.device_batch_size,
            keep_tails=bool(plan.args.keep_tails),
        )

    def begin(self, state: TrainState, world: World) -> None:
        """Nothing more: a base model begins with the weights of its seed."""

    def hooks(self, plan: Plan, saver: Saver, world: World, log: RunLog) -> list[Hook]:
        """Saving, validation, samples and CORE."""
        return PretrainingHooks(plan, self.corpus, self.tokenizer, saver, world, log).all()
