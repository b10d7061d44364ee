"""Rollouts: replies that the model draws itself, judged, as the weighted batches of a policy gradient.

The loader of RL has the interface of pretraining's, so the trainer is the same. A step asks P questions and
draws S replies to each (a *group*) from the model as it is. The gradient is REINFORCE with the mean reward of
the group as baseline: a sampled token of a reply of reward r has the loss weight A / M, with the advantage
A = r - mean of the group's rewards, and M the sampled tokens of all P groups, over all ranks. The end of a
reply is sampled, so when to stop is learned too; what a tool wrote is not, and has weight 0. Sampling is from
the distribution that is scored: temperature 1, all tokens, none forbidden. A reply that draws a token which
may not come ends there, and has reward 0 as one that is cut off.

A group whose rewards are all equal teaches nothing. Further questions take the place of such groups, up to
twice P in a step; where even these do not suffice, the groups left over count in M, and a step without any
other has no weights but 0: its gradient is zero, and the weights move by the momentum of earlier steps only.

What is drawn depends on the seed, the step, the number of the question and that of the reply. So a resumed
run draws the same, and so does another number of ranks, but for the rounding of rows in other batches.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.chat import conversation, tasks
from nanochat.chat.replies import ReplyEngine
from nanochat.chat.tasks import Row
from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped, requested
from nanochat.config.arguments import RlArgs
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.engine import Reason, Sampling
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

FORMAT = 1
MOST_QUESTIONS = 2  # asked in a step, in multiples of those that it wants
MEASURED_EVERY = 10  # steps between estimates of entropy and KL, which cost two forward passes
REASONS: tuple[Reason, ...] = get_args(Reason)


class Question(NamedTuple):
    """A row of a task as it is asked.

    Attributes:
        number: its number in the run; each is asked once.
        row: with the answer.
        ids: the prompt.
    """

    number: int
    row: Row
    ids: list[int]


class Rollout(NamedTuple):
    """A reply with its prompt.

    Attributes:
        ids: prompt, reply, and the special token that ended it, if one did.
        sampled: (len(ids),) True where the model drew the token: neither in the prompt nor in tool outputs.
        reward: 1 for a reply that is right and ended by itself, else 0.
        reason: why it ended.
    """

    ids: list[int]
    sampled: list[bool]
    reward: int
    reason: Reason


Group = list[Rollout]


def advantages(group: Group) -> list[float]:
    """The reward of each reply, less the mean of its group."""
    mean = statistics.fmean(rollout.reward for rollout in group)
    return [rollout.reward - mean for rollout in group]


def has_variance(group: Group) -> bool:
    """Whether two rewards differ."""
    return len({rollout.reward for rollout in group}) > 1


class RolloutLoader:
    """Global batches of fresh rollouts; each rank gets its rows. Has the interface of TrainLoader.

    Attributes:
        device_batch_size: a micro-batch has at most as many tokens as so many rows of the whole context.
        metrics: of the newest step, in the words of TRL's log.
    """

    def __init__(
        self,
        model: GPT,
        reference: GPT,
        tokenizer: Tokenizer,
        ask: Callable[[int, int], list[Question]],
        args: RlArgs,
        world: World,
        device_batch_size: int,
    ) -> None:
        """Draw nothing yet.

        Args:
            model: that which learns.
            reference: the model of step 0, from which the KL is measured.
            tokenizer: of both.
            ask: gives the questions of the numbers from a first one on: ask(first, count).
            args: P is `prompts`, S is `samples`; the tokens of a reply at most, and the seed.
            world: the ranks.
            device_batch_size: see above.
        """
        self._model, self._reference, self._tokenizer = model, reference, tokenizer
        self._ask, self._args, self._world = ask, args, world
        self._step = self._asked = 0  # steps drawn, questions asked in them
        self._before = (0, 0)
        self._fetched: list[list[Batch]] = []
        self.device_batch_size = device_batch_size
        self.metrics: dict[str, float] = {}

    def fetch(self, batches: int) -> None:
        """Draw the rollouts of the next steps from the model as it is.

        Raises:
            Stopped: a signal came to any rank; nothing is drawn then, on all ranks.
        """
        self._before = self._step, self._asked
        try:
            self._fetched = [self._draw() for _ in range(batches)]
        except BaseException:
            self.put_back()
            raise

    def put_back(self) -> None:
        """Take back what `fetch` has drawn: it will be drawn again, the same."""
        self._fetched = []
        self._step, self._asked = self._before

    def next_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        if not self._fetched:
            self.fetch(1)
        return self._fetched.pop(0)

    def _draw(self) -> list[Batch]:
        began, drawn = time.perf_counter(), list[Group]()
        most, wanted = MOST_QUESTIONS * self._args.prompts, self._args.prompts
        while (missing := wanted - sum(map(has_variance, drawn))) > 0 and len(drawn) < most:
            if self._world.any_rank(requested()):
                raise Stopped
            questions = self._ask(self._asked, min(missing, most - len(drawn)))
            drawn += self._groups(questions)
            self._asked += len(questions)
        self.metrics = self._summary(drawn) | {"rollout_seconds": time.perf_counter() - began}
        if self._step % MEASURED_EVERY == 0:
            self.metrics |= self._measure(drawn)
        self._step += 1
        kept = sorted(drawn, key=has_variance, reverse=True)[:wanted]
        tokens = sum(sum(rollout.sampled) for group in kept for rollout in group)
        return self._batches(list(filter(has_variance, kept)), tokens)

    def _groups(self, questions: Sequence[Question]) -> list[Group]:
        """Judged replies to each question, of which every rank draws some and gets all: a collective."""
        rank, size = self._world.rank, self._world.size
        mine, end = questions[rank::size], self._tokenizer.special_id("<|assistant_end|>")
        drawn = ReplyEngine(self._model, self._tokenizer).replies(
            [question.ids for question in mine],
            Sampling(self._args.max_new_tokens, seed=self._args.seed),
            self._args.samples,
            constrained=False,
            names=[f"{self._step}/{question.number}" for question in mine],
        )
        flat: list[int] = []
        for reply in itertools.chain.from_iterable(drawn):
            tokens = [2 * token + drew for token, drew in zip(reply.ids, reply.sampled, strict=True)]
            tokens += [2 * end + 1] if reply.reason == "stop" else []  # what ended it was drawn, too
            flat += [REASONS.index(reply.reason), len(tokens), *tokens]
        flat += [0] * (self._world.max_over_ranks(len(flat)) - len(flat))
        numbers = [iter(values) for values in self._world.gather_ints(flat)]
        return [
            [self._judged(question, numbers[i % size]) for _ in range(self._args.samples)]
            for i, question in enumerate(questions)
        ]

    def _judged(self, question: Question, numbers: Iterator[int]) -> Rollout:
        """The next reply of a rank: reason, count, and for each token 2 id + 1 if it was drawn, else 2 id."""
        reason, count = REASONS[next(numbers)], next(numbers)
        tokens = list(itertools.islice(numbers, count))
        ids, sampled = [token >> 1 for token in tokens], [bool(token & 1) for token in tokens]
        parts = conversation.parts_of(self._tokenizer, ids[:-1])
        reward = int(reason == "stop" and bool(tasks.right(question.row, parts)))
        return Rollout(question.ids + ids, [False] * len(question.ids) + sampled, reward, reason)

    def _summary(self, groups: list[Group]) -> dict[str, float]:
        """Metrics of all replies of a step, also of those that do not enter its gradient."""
        every, mean = list(itertools.chain.from_iterable(groups)), statistics.fmean
        call = self._tokenizer.special_id("<|output_start|>")
        return {
            "reward": mean(rollout.reward for rollout in every),
            "reward_std": mean(statistics.stdev(rollout.reward for rollout in group) for group in groups),
            "frac_reward_zero_std": mean(not has_variance(group) for group in groups),
            "completions/mean_length": mean(len(one.ids) - one.sampled.index(True) for one in every),
            "completions/clipped_ratio": mean(rollout.reason in ("length", "context") for rollout in every),
            "tools/call_frequency": mean(rollout.ids.count(call) for rollout in every),
        }

    def _batches(self, groups: list[Group], tokens: int) -> list[Batch]:
        """This rank's replies of some groups, a row each, the longest first: weights are A W / tokens.

        Rows of a micro-batch are cut to the longest of them. A rank without a reply has an empty row.
        """
        filler, size = self._tokenizer.special_id("<|assistant_end|>"), self._world.size
        rows = [(one, a) for group in groups for one, a in zip(group, advantages(group), strict=True)]
        rows = sorted(rows, key=lambda row: len(row[0].ids), reverse=True)[self._world.rank :: size]
        rows = rows or [(Rollout([filler] * 2, [False] * 2, 0, "stop"), 0.0)]
        batches = []
        while rows:
            room = self.device_batch_size * self._model.config.sequence_len
            taken, rows = rows[: (count := max(1, room // len(rows[0][0].ids)))], rows[count:]
            ids = pad_sequence([torch.tensor(one.ids) for one, _ in taken], True, filler)
            sampled = pad_sequence([torch.tensor(one.sampled) for one, _ in taken], True, False)
            advantage = torch.tensor([[a] for _, a in taken]) * (size / tokens)
            parts = ids[:, :-1], ids.masked_fill(~sampled, -1)[:, 1:], (sampled * advantage)[:, 1:]
            batches.append(Batch(*(part.contiguous().to(self._world.device) for part in parts)))
        return batches

    @torch.no_grad()
    def _measure(self, groups: list[Group]) -> dict[str, float]:
        """Entropy, estimated by the mean of -log p of the sampled tokens; KL to step 0, by Schulman's k3."""
        total = torch.zeros(3, dtype=torch.float64, device=self._world.device)
        for ids, targets, _ in self._batches(groups, 1):
            now, then = (m.loss(ids, targets, "none").double() for m in (self._model, self._reference))
            k3 = (now - then).exp() - (now - then) - 1
            total += torch.stack((now.sum(), k3.sum(), (targets >= 0).sum().double()))
        entropy, kl, count = self._world.all_reduce_sum(total).tolist()
        return {"entropy": entropy / count, "kl": kl / count}

    def close(self) -> None:
        """Nothing runs beside the training."""

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins, the same on all ranks."""
        assert not self._fetched, "what was drawn is not used yet"
        return {"format": FORMAT, "step": self._step, "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at this or another world size.

        Raises:
            UserError: it is not what `state_dict` gives.
        """
        counts: Any = [state.get("step"), state.get("asked")]
        if state.get("format") != FORMAT or typed_json.mismatch(counts, list[int]) or min(counts) < 0:
            raise UserError(
                f"the loader's state has no counts of steps and questions in format {FORMAT}; "
                "the checkpoint is damaged."
            )
        self._step, self._asked = counts
