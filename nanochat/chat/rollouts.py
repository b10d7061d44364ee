"""Rollouts: replies that the model draws itself, judged, as the weighted batches of a policy gradient.

The loader of RL has the interface of pretraining's, so the trainer is the same. A step asks P questions and
draws S replies to each (a *group*) from the model as it is. The gradient is REINFORCE with the mean reward of
the group as baseline: a sampled token of a reply of reward r has the loss weight A / M, with the advantage
A = r - mean of the group's rewards, and M the sampled tokens of all P groups, over all ranks. The end of a
reply is sampled, so when to stop is learned too; what a tool wrote is not, and has weight 0.

A group whose rewards are all equal teaches nothing. Further questions take the place of such groups, up to
twice P in a step; where even these do not suffice, the groups left over count in M, and a step without any
other has weights of 0: its gradient is zero, and the weights move by the momentum of earlier steps only.

What is drawn depends on the seed, the step, the number of the question and that of the reply. So a resumed
run draws the same, and so does another number of ranks, but for the rounding of rows in other batches.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from nanochat.chat import conversation, packing, tasks
from nanochat.chat.replies import ReplyEngine
from nanochat.chat.tasks import Row
from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped, requested
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.engine import Reason, Sampling
from nanochat.model.attention import SPARE_DOCUMENTS, TOKENS_A_DOCUMENT
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

FORMAT = 1
MOST_QUESTIONS = 2  # asked in a step, in multiples of those that it wants
MEASURED_EVERY = 10  # steps between estimates of entropy and KL, which cost a forward pass each
REASONS: tuple[Reason, ...] = get_args(Reason)


class Question(NamedTuple):
    """A row of a task as it is asked.

    Attributes:
        number: its number in the run; a question is asked once.
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

    @property
    def prompt_len(self) -> int:
        """Tokens before the first one that was drawn."""
        return self.sampled.index(True)


Group = list[Rollout]


def rollouts(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    samples: int,
    sampling: Sampling,
    step: int,
    world: World,
) -> list[Group]:
    """Draw and judge `samples` replies to each question. A collective: every rank gets all groups.

    Args:
        model: as it is now.
        tokenizer: its own.
        questions: the same on all ranks, which share the work.
        samples: replies to each question.
        sampling: temperature 1 and all tokens, so that what is sampled is the distribution that is scored.
        step: of the run; the draws depend on it.
        world: the ranks.
    """
    mine = range(world.rank, len(questions), world.size)
    drawn = ReplyEngine(model, tokenizer).replies(
        [questions[i].ids for i in mine],
        sampling,
        samples,
        constrained=False,  # the loss knows no forbidden tokens, so sampling may not either
        names=[f"{step}/{questions[i].number}" for i in mine],
    )
    flat: list[int] = []
    for i, replies in zip(mine, drawn, strict=True):
        for reply in replies:
            parts = conversation.parts_of(tokenizer, reply.ids)
            reward = int(reply.reason == "stop" and bool(tasks.right(questions[i].row, parts)))
            tokens = [2 * token + drew for token, drew in zip(reply.ids, reply.sampled, strict=True)]
            if reply.reason == "stop":  # what ended it was drawn, too
                tokens.append(2 * tokenizer.special_id("<|assistant_end|>") + 1)
            flat += [i, reward, REASONS.index(reply.reason), len(tokens), *tokens]
    size = world.max_over_ranks(len(flat))
    groups: list[Group] = [[] for _ in questions]
    for values in world.gather_ints(flat + [-1] * (size - len(flat))):
        for i, reward, reason, tokens in _records(values):
            prompt = questions[i].ids
            ids = prompt + [token >> 1 for token in tokens]
            sampled = [False] * len(prompt) + [bool(token & 1) for token in tokens]
            groups[i].append(Rollout(ids, sampled, reward, REASONS[reason]))
    return groups


def _records(values: list[int]) -> Iterator[tuple[int, int, int, list[int]]]:
    """What a rank has written of its replies: question, reward, reason, tokens; -1 fills the end."""
    at = 0
    while at < len(values) and values[at] >= 0:
        i, reward, reason, count = values[at : at + 4]
        yield i, reward, reason, values[at + 4 : at + 4 + count]
        at += 4 + count


def advantages(group: Group) -> list[float]:
    """The reward of each reply, less the mean of its group."""
    mean = sum(rollout.reward for rollout in group) / len(group)
    return [rollout.reward - mean for rollout in group]


def has_variance(group: Group) -> bool:
    """Whether two rewards differ."""
    return len({rollout.reward for rollout in group}) > 1


class Laid(NamedTuple):
    """Rollouts laid into rows, several in a row.

    Attributes:
        ids: (n, T + 1) int64.
        sampled: (n, T + 1) bool.
        advantages: (n, T + 1) fp64, 0 where nothing is sampled.
    """

    ids: NDArray[np.int64]
    sampled: NDArray[np.bool_]
    advantages: NDArray[np.float64]


def lay(groups: Sequence[Group], row_slots: int, most: int, filler: int) -> Laid:
    """Pack the rollouts of some groups into rows.

    Args:
        groups: of which every rollout has at most `row_slots` tokens.
        row_slots: T + 1.
        most: rollouts of a row at most.
        filler: the token of empty slots; not BOS, which would begin a document.
    """
    every = [
        (rollout, advantage)
        for group in groups
        for rollout, advantage in zip(group, advantages(group), strict=True)
    ]
    lengths = np.array([len(rollout.ids) for rollout, _ in every], np.int64)
    packed = packing.pack(lengths, np.arange(len(every)), row_slots, most)
    shape = (len(packed.rows) - 1, row_slots)
    laid = Laid(np.full(shape, filler, np.int64), np.zeros(shape, np.bool_), np.zeros(shape))
    for r, (first, end) in enumerate(itertools.pairwise(packed.rows.tolist())):
        at = 0
        for rollout, advantage in (every[i] for i in packed.conversations[first:end].tolist()):
            here = slice(at, at + len(rollout.ids))
            laid.ids[r, here], laid.sampled[r, here] = rollout.ids, rollout.sampled
            laid.advantages[r, here] = np.where(rollout.sampled, advantage, 0.0)
            at = here.stop
    return laid


class RolloutLoader:
    """Global batches of fresh rollouts; each rank gets its rows. Has the interface of TrainLoader.

    Attributes:
        device_batch_size: rows of a micro-batch; every one is full, with rows of weight 0 at the end.
        metrics: of the newest step, in the words of TRL's log.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        ask: Callable[[int, int], list[Question]],
        *,
        prompts: int,
        samples: int,
        sampling: Sampling,
        world: World,
        device_batch_size: int,
        reference: GPT | None,
    ) -> None:
        """Draw nothing yet.

        Args:
            model: that which learns.
            tokenizer: its own.
            ask: gives the questions of the numbers from a first one on: ask(first, count).
            prompts: P, questions of a step.
            samples: S, replies to each.
            sampling: how many tokens at most, and the seed.
            world: the ranks.
            device_batch_size: rows of a micro-batch.
            reference: the model of step 0, from which the KL is measured; None to leave it out.
        """
        self._model, self._tokenizer, self._ask, self._sampling = model, tokenizer, ask, sampling
        self._prompts, self._samples, self._world = prompts, samples, world
        self._reference = reference
        self._filler = tokenizer.special_id("<|assistant_end|>")
        self._step = self._asked = 0  # steps drawn, questions asked in them
        self._before = (0, 0)
        self._fetched: list[tuple[list[Batch], dict[str, float]]] = []
        self.device_batch_size = device_batch_size
        self.metrics: dict[str, float] = {}

    def fetch(self, batches: int) -> None:
        """Draw the rollouts of the next steps from the model as it is.

        Raises:
            Stopped: a signal came to any rank; nothing is drawn then, on all ranks.
        """
        self._before = (self._step, self._asked)
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
        batches, self.metrics = self._fetched.pop(0)
        return batches

    def _draw(self) -> tuple[list[Batch], dict[str, float]]:
        began = time.perf_counter()
        drawn: list[Group] = []
        most = MOST_QUESTIONS * self._prompts
        while (missing := self._prompts - sum(map(has_variance, drawn))) > 0 and len(drawn) < most:
            if self._world.any_rank(requested()):
                raise Stopped
            questions = self._ask(self._asked, min(missing, most - len(drawn)))
            self._asked += len(questions)
            how = self._samples, self._sampling, self._step, self._world
            drawn += rollouts(self._model, self._tokenizer, questions, *how)
        metrics = self._summary(drawn) | {"rollout_seconds": time.perf_counter() - began}
        kept = sorted(drawn, key=lambda group: not has_variance(group))[: self._prompts]
        if self._step % MEASURED_EVERY == 0:
            metrics |= self._measure(kept)
        self._step += 1
        return self._batches(kept), metrics

    def _summary(self, groups: list[Group]) -> dict[str, float]:
        """Metrics of all replies of a step, also of those that do not enter its gradient."""
        every = [rollout for group in groups for rollout in group]
        call = self._tokenizer.special_id("<|output_start|>")
        return {
            "reward": statistics.fmean(rollout.reward for rollout in every),
            "reward_std": statistics.fmean(statistics.stdev(r.reward for r in group) for group in groups),
            "frac_reward_zero_std": 1 - statistics.fmean(map(has_variance, groups)),
            "completions/mean_length": statistics.fmean(len(r.ids) - r.prompt_len for r in every),
            "completions/clipped_ratio": statistics.fmean(r.reason in ("length", "context") for r in every),
            "tools/call_frequency": statistics.fmean(r.ids[r.prompt_len :].count(call) for r in every),
            "questions": float(self._asked),
        }

    def _lay(self, groups: list[Group]) -> Laid:
        """This rank's rows, as many as every other's: whole micro-batches, the last rows empty."""
        slots, size = self._model.config.sequence_len + 1, self.device_batch_size
        # An attention kernel for packed rows has so many slots for documents: see `layout_of`.
        most = 1 + SPARE_DOCUMENTS // size + slots // TOKENS_A_DOCUMENT
        laid, block = lay(groups, slots, most, self._filler), self._world.size * size
        rows = len(laid.ids)
        padding = ((0, max(block, -(-rows // block) * block) - rows), (0, 0))
        fills = (self._filler, False, 0.0)
        padded = [np.pad(part, padding, constant_values=fill) for part, fill in zip(laid, fills, strict=True)]
        return Laid(*(part[self._world.rank :: self._world.size] for part in padded))

    def _batches(self, groups: list[Group]) -> list[Batch]:
        """The weighted micro-batches of the groups that teach something."""
        tokens = sum(sum(rollout.sampled) for group in groups for rollout in group)
        laid = self._lay(list(filter(has_variance, groups)))
        weights = laid.advantages[:, 1:] * (self._world.size / tokens)
        targets = np.where(laid.sampled, laid.ids, -1)[:, 1:]
        device = self._world.device
        arrays = laid.ids[:, :-1], targets, weights.astype(np.float32)
        parts = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
        return Batch(*parts).split(self.device_batch_size)

    @torch.no_grad()
    def _measure(self, groups: list[Group]) -> dict[str, float]:
        """Entropy, estimated by the mean of -log p of the sampled tokens; KL to step 0, by Schulman's k3."""
        laid = self._lay(groups)
        ids = torch.from_numpy(laid.ids).to(self._world.device)
        targets = torch.where(torch.from_numpy(laid.sampled).to(ids.device), ids, -1)
        total = torch.zeros(3, dtype=torch.float64, device=ids.device)
        for rows in range(0, len(ids), self.device_batch_size):
            here = slice(rows, rows + self.device_batch_size)
            inputs, wanted = ids[here, :-1], targets[here, 1:].contiguous()
            losses = self._model.loss(inputs, wanted, reduction="none").double()
            if self._reference is not None:
                ratio = losses - self._reference.loss(inputs, wanted, reduction="none").double()
                total[2] += (ratio.exp() - ratio - 1).sum()
            total[:2] += torch.stack((losses.sum(), (wanted >= 0).sum().double()))
        loss, count, kl = self._world.all_reduce_sum(total).tolist()
        return {"entropy": loss / count} | ({} if self._reference is None else {"kl": kl / count})

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
        step, asked = state.get("step"), state.get("asked")
        counts = not typed_json.mismatch([step, asked], list[int]) and min(step, asked) >= 0
        if state.get("format") != FORMAT or not counts:
            raise UserError(
                f"the loader's state has no counts of steps and questions in format {FORMAT}; "
                "the checkpoint is damaged."
            )
        self._step, self._asked = step, asked
