"""Reinforcement learning with verifiable rewards: a chat model learns from its own replies, right or wrong.

One trainer serves pretraining, SFT and RL. Here are the questions, the plan and the stage; the rollouts and
their weights are `rollouts.py`.

The optimizer is gradient descent with momentum, at one rate for all matrices and tables. Muon and Adam make a
step as long as their rate says, whatever the gradient, so where the rewards say little, weights wander: at
depth 4 that cost other tasks up to 13 points, and plain descent costs them 1 (dev/LOG.md, 2026-12-01).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.chat import conversation, corpus, evaluate, finetune, made
from nanochat.chat.rollouts import MOST_QUESTIONS, Question, RolloutLoader
from nanochat.chat.tasks import Row
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.async_saver import Saver
from nanochat.checkpoint.state import Base, TrainState
from nanochat.common.errors import UserError
from nanochat.config.arguments import RlArgs
from nanochat.config.plan import GroupPlan, Plan
from nanochat.data.packing import shuffled
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train.hooks import Hook, saving
from nanochat.train.run_log import RunLog

BIGSUM_STEPS = 64
# Of a micro-batch, in rows of the whole context: replies are shorter, so that there are more of them.
ROWS = 4
# AdamW's denominator is sqrt(v) + eps, and sqrt(v) of these gradients is far below 1: what is left is m.
# Scalars stay as they are: the stream of every task goes through them, and they bring RL nothing.
SCALARS = ("resid", "x0", "smear")
DESCENT = GroupPlan("adamw", lr=1.0, beta1=0.9, beta2=0.999, eps=1.0, weight_decay=0.0)

_order = functools.lru_cache(2)(shuffled)


class Questions:
    """The questions of a run in their order: all rows in a seeded order, then again in another.

    Attributes:
        rows: those whose prompt leaves room for a reply.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, context: int, seed: int) -> None:
        """Render the prompts of all rows.

        Raises:
            UserError: no prompt is shorter than the context.
        """
        asked = [conversation.read(row, f"question {row['id']}")[:-1] for row in rows]
        prompts = [conversation.prompt(tokenizer, one) for one in asked]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < context]
        if not fitting:
            raise UserError(
                f"none of the {len(rows)} questions leaves room for a reply in the model's context of "
                f"{context} tokens. Begin with a run of a larger --max-seq-len."
            )
        self.rows, self._prompts = [rows[i] for i in fitting], [prompts[i] for i in fitting]
        self._seed = seed

    def ask(self, first: int, count: int) -> list[Question]:
        """The questions of the numbers first .. first + count - 1."""
        places = [divmod(number, len(self.rows)) for number in range(first, first + count)]
        indices = [int(_order(len(self.rows), self._seed, epoch)[place]) for epoch, place in places]
        return [Question(first + i, self.rows[at], self._prompts[at]) for i, at in enumerate(indices)]


@dataclass(eq=False)
class Rl:
    """The stage of chat_rl: rollouts of the model itself, from the weights of an SFT run."""

    args: RlArgs
    base: Base
    questions: Questions

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        return self.base.tokenizer

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the questions and of the tokenizer."""
        digest = hashlib.sha256(json.dumps(self.questions.rows, sort_keys=True).encode()).hexdigest()
        return {"questions": digest, "tokenizer": self.tokenizer.fingerprint}

    def make_loader(self, plan: Plan, model: GPT, world: World) -> RolloutLoader:
        """The rollouts of the model from step 0 on; beside it stands the base, to measure the KL from."""
        reference = copy.deepcopy(model)
        reference.load_state_dict(self.base.weights)
        models, rows = (model, reference), plan.device_batch_size
        return RolloutLoader(*models, self.tokenizer, self.questions.ask, self.args, world, rows)

    def begin(self, state: TrainState, world: World) -> None:
        """Take the weights of the base."""
        state.model.load_state_dict(self.base.weights)
        world.print0(f"begins with step {self.base.step} of run {self.base.run}: weights alone")

    def hooks(self, plan: Plan, saver: Saver, world: World, log: RunLog) -> list[Hook]:
        """Saving, and the evaluation of the tasks if it is asked for."""
        return [*saving(plan, saver, world), *evaluate.hooks(plan, self.args, self.tokenizer, world, log)]


def prepare(args: RlArgs, world: World) -> tuple[Plan, Rl]:
    """The plan and the stage of a run of RL.

    The batch of the plan is the most that a step can have: replies as long as the context. So tokens and
    speed in the log are upper bounds.

    Raises:
        UserError: there is no such base or it is no chat model, or the questions are not on the disk or do
            not fit the context.
    """
    finetune.require_base(args, "chat_rl")
    base = checkpoint_state.read_base(args.base, args.base_step)
    if base.finetune is None:
        raise UserError(
            f"run {args.base!r} is no chat model, whose replies could be judged. Finetune it first: "
            f"python -m scripts.chat_sft --base {args.base}"
        )
    steps = args.num_iterations or BIGSUM_STEPS
    if args.task == "bigsum":
        rows = made.examples(args.task, "train", MOST_QUESTIONS * args.prompts * steps, args.seed)
    else:
        rows = list(corpus.rows(args.task, "train"))
        steps = args.num_iterations or max(1, len(rows) // args.prompts)
    questions = Questions(rows, base.tokenizer, base.model.sequence_len, args.seed)
    if left_out := len(rows) - len(questions.rows):
        world.print0(f"{left_out:,} of {len(rows):,} questions are longer than the context and left out")
    batch_rows = -(-args.prompts * args.samples // world.size) * world.size
    plan = finetune.plan(
        "rl",
        dataclasses.replace(args, device_batch_size=args.device_batch_size or ROWS),
        base,
        world.size,
        batch_tokens=batch_rows * base.model.sequence_len,
        steps=steps,
        warmdown_steps=steps,
        group=lambda kind, _: dataclasses.replace(DESCENT, lr=0.0 if kind in SCALARS else args.lr),
        document_mask=False,  # a reply has a row of its own
    )
    return plan, Rl(args, base, questions)
