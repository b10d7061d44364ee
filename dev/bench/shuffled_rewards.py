"""The control of RL: chat_rl with the rewards of each step dealt to other replies of the step.

    python -m dev.bench.shuffled_rewards --base d4-sft --run control --task bigsum

It has the flags of chat_rl. What it changes has nothing to do with what is right, and should be little.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nanochat.chat.rollouts import Group, Question, RolloutLoader
from scripts import chat_rl


def deal(groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """The same replies and the same rewards, in another order."""
    rewards = [rollout.reward for group in groups for rollout in group]
    rng.shuffle(rewards)
    return [[rollout._replace(reward=rewards.pop()) for rollout in group] for group in groups]


def install() -> None:
    """From now on, every RolloutLoader of this process deals its rewards."""
    draw, rng = RolloutLoader._groups, random.Random(0)  # noqa: S311

    def groups(self: RolloutLoader, questions: Sequence[Question]) -> list[Group]:
        return deal(draw(self, questions), rng)

    RolloutLoader._groups = groups  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    chat_rl.main()
