"""The mean of the weights over the last steps of a run, which takes their place when it ends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nanochat.errors import UserError


class TailAverage:
    """A running mean, alike on all ranks; it holds nothing where the share is 0.

    Validation, samples and the checkpoint after the last step are of the mean; those before it are of the
    weights as they are.
    """

    def __init__(self, params: Mapping[str, Tensor], steps: int, share: float) -> None:
        """Average the weights after each of the last `share` of `steps` steps."""
        self.params, self.last, self.first = params, steps, steps - round(share * steps)
        on = self.first < self.last
        self.mean = {name: torch.zeros_like(p) for name, p in params.items()} if on else {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take the weights in after so many steps of the run; after the last one they become the mean."""
        if step <= self.first:
            return
        weights, means = list(self.params.values()), list(self.mean.values())
        torch._foreach_lerp_(means, weights, 1 / (step - self.first))
        if step == self.last:
            torch._foreach_copy_(weights, means)

    def state_tensors(self) -> dict[str, Tensor]:
        """The mean by "<parameter>.average", in host memory."""
        return {f"{name}.average": mean.to("cpu", copy=True) for name, mean in self.mean.items()}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take what state_tensors gave.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        for name, mean in self.mean.items():
            found = state.get(f"{name}.average")
            if found is None or found.shape != mean.shape:
                raise UserError(
                    f"optimizer state: {name}.average is missing or has another shape, expected "
                    f"{tuple(mean.shape)}. Take a checkpoint of the same run."
                )
            mean.copy_(found)
