"""Policies: what measured stages should change about training. Each changes one thing, and says what it follows.

A policy turns what was measured into a few positive numbers, and numbers into a change of the module. `StageAware`
decides when, smooths the numbers, logs them and keeps them in the checkpoint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from fm_stages.flow import (
    ShiftedTimesteps,
    StageWeighting,
    TimestepSampler,
    UniformTimesteps,
    shift_for_share,
    weights_for_share,
)
from fm_stages.oracle import Curves, Oracle, StageProfile
from fm_stages.training.module import FlowMatching
from fm_stages.training.targets import BlendTarget, ConditionalTarget, HybridTarget

HAND_OVER = 1.05
"""A blended target ends at this many times the boundary: a table has no jumps."""


class NoProposalError(Exception):
    """Nothing can be proposed from what was measured; the message says why."""


class Policy(ABC):
    """A rule from measured stages to training.

    Args:
        warmup_steps: optimizer steps before the first change.
        every_n_steps: steps between changes.
        smoothing: share of the old numbers that a change keeps, in logarithms; 0 jumps.
        dry_run: whether to log what it would do, and leave training alone.
    """

    steers: str
    """What it changes: timesteps, weighting or target. Two policies may not change the same."""

    follows: str
    """The data (the boundary, which no training moves) or the model (the gap)."""

    num_fixed = 0
    """How many of its first numbers are places in t, which are not smoothed."""

    def __init__(
        self, warmup_steps: int = 0, every_n_steps: int = 1000, smoothing: float = 0.0, dry_run: bool = False
    ) -> None:
        if warmup_steps < 0 or every_n_steps < 1 or not 0 <= smoothing < 1:
            raise ValueError(
                f"warmup_steps={warmup_steps} must be 0 or more, every_n_steps={every_n_steps} 1 or more, and "
                f"smoothing={smoothing} lie in [0, 1)"
            )
        self.warmup_steps, self.every_n_steps = warmup_steps, every_n_steps
        self.smoothing, self.dry_run = smoothing, dry_run

    @abstractmethod
    def start(self, module: FlowMatching) -> list[float]:
        """Remember what the module was configured with, and the numbers that leave it so."""

    @abstractmethod
    def propose(self, profile: StageProfile, curves: Curves | None) -> tuple[list[float], str]:
        """Positive numbers and the reason for them.

        Args:
            profile: of the training data.
            curves: by timestep of the last window of measurements, if there was one.

        Raises:
            NoProposalError: if nothing follows from these.
        """

    @abstractmethod
    def apply(self, module: FlowMatching, oracle: Oracle, numbers: Sequence[float]) -> None:
        """Change the module."""

    @abstractmethod
    def scalars(self, numbers: Sequence[float]) -> dict[str, float]:
        """The numbers by logged name."""


class ShiftToBoundary(Policy):
    """Shifts the density of t so that a given fraction of draws falls before the boundary. Follows the data.

    s = q (1 - b) / ((1 - q) b) with q the fraction's quantile under the configured density.

    What navigation wins, refinement pays for. On Fashion-MNIST at 14x14 (fraction 0.7, 2000 steps, 3 seeds) the gap was
    7.5 % smaller before the boundary (30 % near t = 0.05) and 3.8 % larger past it; over all t no difference was shown.

    Args:
        fraction: of draws before the boundary, in (0, 1).
        smallest: bound of the shift.
        largest: bound of the shift.
        kwargs: as for `Policy`.
    """

    steers, follows = "timesteps", "data"

    def __init__(
        self,
        fraction: float = 0.5,
        smallest: float = 0.1,
        largest: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < fraction < 1 or not 0 < smallest <= largest < math.inf:
            raise ValueError(
                f"fraction={fraction} must lie in (0, 1), and 0 < smallest={smallest} <= largest={largest}"
            )
        self.fraction, self.smallest, self.largest = fraction, smallest, largest
        self._base: TimestepSampler = UniformTimesteps()

    def start(self, module: FlowMatching) -> list[float]:
        """See `Policy`."""
        self._base = module.timesteps
        return [1.0]

    def propose(self, profile: StageProfile, curves: Curves | None) -> tuple[list[float], str]:
        """See `Policy`."""
        b = _boundary(profile)
        shift = shift_for_share(self.fraction, b, self._base)
        bounded = min(max(shift, self.smallest), self.largest)
        bound = "" if bounded == shift else f", bounded from {shift:.3g}"
        return [bounded], f"{self.fraction:.0%} of the draws before the boundary, t = {b:.3f}{bound}"

    def apply(self, module: FlowMatching, oracle: Oracle, numbers: Sequence[float]) -> None:
        """See `Policy`."""
        if isinstance(self._base, ShiftedTimesteps):  # two shifts are one, and its number is what is logged
            module.draw_from(ShiftedTimesteps(numbers[0] * self._base.shift, self._base.base))
        else:
            module.draw_from(ShiftedTimesteps(numbers[0], self._base))

    def scalars(self, numbers: Sequence[float]) -> dict[str, float]:
        """See `Policy`."""
        configured = self._base.shift if isinstance(self._base, ShiftedTimesteps) else 1.0
        return {"stages/shift": numbers[0] * configured}


class StageWeights(Policy):
    """Weighs the loss so that navigation has a given share of the weight, and leaves t as it is. Follows the data.

    It takes the place of the configured weighting. On Fashion-MNIST at 14x14 (fraction 0.7, 2000 steps, 3 seeds) the
    gap before the boundary was 10 % smaller than with uniform weights, and no difference was shown past it.

    Args:
        fraction: of the weight before the boundary, under the module's density of t.
        width: of the hand-over, in logit(t).
        kwargs: as for `Policy`.
    """

    steers, follows = "weighting", "data"
    num_fixed = 1

    def __init__(
        self,
        fraction: float = 0.5,
        width: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < fraction < 1 or not width > 0:
            raise ValueError(f"fraction={fraction} must lie in (0, 1) and width={width} be positive")
        self.fraction, self.width = fraction, width
        self._timesteps: TimestepSampler = UniformTimesteps()

    def start(self, module: FlowMatching) -> list[float]:
        """See `Policy`."""
        if isinstance(module.weighting, nn.Module):
            raise ValueError(
                f"StageWeights would take the place of {type(module.weighting).__name__}, which learns weights of its "
                "own: choose one of them"
            )
        # the objective's density of t
        self._timesteps = UniformTimesteps() if module.importance_weights else module.timesteps
        return [0.5, 1.0, 1.0]

    def propose(self, profile: StageProfile, curves: Curves | None) -> tuple[list[float], str]:
        """See `Policy`."""
        b = _boundary(profile)
        try:
            weights = weights_for_share(self.fraction, b, self.width, self._timesteps)
        except ValueError as error:
            raise NoProposalError(str(error)) from error
        return [b, *weights], f"{self.fraction:.0%} of the weight before the boundary, t = {b:.3f}"

    def apply(self, module: FlowMatching, oracle: Oracle, numbers: Sequence[float]) -> None:
        """See `Policy`."""
        b, navigation, refinement = numbers
        module.weigh_by(StageWeighting(b, navigation, refinement, self.width))

    def scalars(self, numbers: Sequence[float]) -> dict[str, float]:
        """See `Policy`."""
        return {"stages/weight_navigation": numbers[1], "stages/weight_refinement": numbers[2]}


class TargetByStage(Policy):
    """The oracle, or a share of it, before the boundary and the conditional target after it. Follows the data.

    Args:
        share: of the oracle before the boundary, in (0, 1].
        kwargs: as for `Policy`.
    """

    steers, follows = "target", "data"

    def __init__(
        self,
        share: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must lie in (0, 1]")
        self.share = share

    def start(self, module: FlowMatching) -> list[float]:
        """See `Policy`."""
        if not isinstance(module.target, ConditionalTarget):
            raise ValueError(
                f"TargetByStage would take the place of {type(module.target).__name__}: leave the target conditional"
            )
        return [1e-3]  # as good as no oracle

    def propose(self, profile: StageProfile, curves: Curves | None) -> tuple[list[float], str]:
        """See `Policy`."""
        b = _boundary(profile)
        return [b], f"the oracle's target differs from the conditional one before the boundary, t = {b:.3f}"

    def apply(self, module: FlowMatching, oracle: Oracle, numbers: Sequence[float]) -> None:
        """See `Policy`."""
        b = numbers[0]
        target = HybridTarget(b) if self.share == 1 else BlendTarget([b, min(1.0, HAND_OVER * b)], [self.share, 0.0])
        target.attach(oracle)
        module.target = target

    def scalars(self, numbers: Sequence[float]) -> dict[str, float]:
        """See `Policy`."""
        return {"stages/target_boundary": numbers[0]}


def _boundary(profile: StageProfile) -> float:
    """The boundary, if there is one.

    Raises:
        NoProposalError: if the data has one stage only.
    """
    b = profile.boundary
    if not 0 < b < 1:
        has = "has always collapsed" if b == 0 else "never collapses"
        raise NoProposalError(f"no boundary was found (t = {b:g}): the posterior {has}")
    return b
