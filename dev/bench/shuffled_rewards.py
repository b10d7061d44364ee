"""The control of RL: chat_rl with the rewards of each step dealt to other replies of the step.

    python -m dev.bench.shuffled_rewards --base d4-sft --run control --task bigsum

It has the flags of chat_rl. What it changes has nothing to do with what is right, and should be little.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from nanochat.chat.rollouts import Group, Question, RolloutLoader
from scripts import chat_rl

Draw = Callable[[RolloutLoader, Sequence[Question]], list[Group]]


def dealing(draw: Draw) -> Draw:
    """A drawing of replies as `draw`, whose rewards are dealt anew among them."""
    rng = random.Random(0)  # noqa: S311

    def groups(loader: RolloutLoader, questions: Sequence[Question]) -> list[Group]:
        drawn = draw(loader, questions)
        rewards = [rollout.reward for group in drawn for rollout in group]
        rng.shuffle(rewards)
        return [[rollout._replace(reward=rewards.pop()) for rollout in group] for group in drawn]

    return groups


if __name__ == "__main__":
    RolloutLoader._groups = dealing(RolloutLoader._groups)  # type: ignore[method-assign]
    chat_rl.main()
