"""When memorization sets in: past the boundary the held-out loss rises while the training one falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

RISE = 3.0
"""Standard errors by which the held-out loss has to rise."""


class MemorizationWatch:
    """Tells at which validation memorization sets in: the two losses of the refinement stage part.

    It has set in when in two validations running the held-out regular loss lies more than `RISE` standard errors above
    its minimum, and the training one below what it was at that minimum. It is told once; after a new minimum it can be
    told again.

    The lowest of m noisy numbers is lower than they are, by about the normal quantile at 1 - 1 / (m + 1) in standard
    errors. With that allowance noise alone raises an alarm in 1 of 100 runs of 50 validations and in 3 of 100 of 200;
    by 3 standard errors of one validation and nothing else, it would in 60 and in nearly all of 100. Where validations
    share images and noise, as `FlowMatching`'s do, they scatter less against one another than these errors say: then it
    tells late rather than wrongly.
    """

    def __init__(self) -> None:
        self.step = -1
        """Of the last validation."""
        self.num = 0
        """Validations so far."""
        self.best_step = -1
        """Of the minimum: the weights to keep."""
        self.best = self.best_error = self.training = math.inf
        self.num_above = 0
        """Validations running that lie above."""

    def update(self, step: int, held_out: float, error: float, training: float) -> str | None:
        """Add a validation.

        Args:
            step: of the weights; one that is not later than the last is ignored, as after a resume.
            held_out: regular loss on held-out images, past the boundary.
            error: its standard error.
            training: regular loss or gap on training images, past the boundary.

        Returns:
            What to tell, at the validation at which memorization sets in; otherwise None.
        """
        if step <= self.step or not all(math.isfinite(x) for x in (held_out, error, training)):
            return None
        self.step = step
        self.num += 1
        if held_out < self.best:
            self.best_step, self.best, self.best_error, self.training = step, held_out, error, training
            self.num_above = 0
            return None
        by_chance = NormalDist().inv_cdf(self.num / (self.num + 1)) * self.best_error
        risen = held_out - self.best > by_chance + RISE * error
        self.num_above = self.num_above + 1 if risen and training < self.training else 0
        if self.num_above != 2:
            return None
        return (
            f"past the boundary the held-out regular loss has risen from {self.best:.4f} ± {self.best_error:.4f} at "
            f"step {self.best_step} to {held_out:.4f} ± {error:.4f} at step {step}, while the training one fell from "
            f"{self.training:.4f} to {training:.4f}: the network learns training images by heart. Keep the weights of "
            f"step {self.best_step}, or train on more data or with a smaller network."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: if it holds other names.
        """
        if set(state) != set(vars(self)):
            raise ValueError(
                f"this is no state of a MemorizationWatch: it holds {sorted(state)}, not {sorted(vars(self))}"
            )
        vars(self).update(state)
