"""Regression targets: what the network is asked to predict at x_t. One small class each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fm_stages.flow import Path, expand_time
from fm_stages.oracle import Oracle, TemperedOracle


class Target(ABC):
    """A velocity for each sample of a batch."""

    needs_oracle = False
    """Whether `attach` must be called before the first step."""

    can_skip = False
    """Whether it asks at all times, so that some queries could be skipped (`fm_stages.oracle.measure_nearest`)."""

    step = 0
    """Optimizer step that the next call belongs to, which keys what a target draws."""

    def __init__(self) -> None:
        self.oracle: Oracle | None = None

    def attach(self, oracle: Oracle) -> None:
        """Hand over the oracle of the training set."""
        self.oracle = oracle

    def draw_data(
        self, x1: Tensor, labels: Tensor, index: Tensor | None, position: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Data (B, ...) and rows (B,) to train on in place of the batch's; the batch itself, unless a target says else.

        Args:
            x1: (B, ...) the batch.
            labels: (B,) int64 as the network will see them.
            index: (B,) int64 rows of the training set, where the data knows them.
            position: (B,) places in the global batch.
        """
        return x1, index

    @abstractmethod
    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Target velocity (B, ...), float32.

        Args:
            path: the path between noise and data.
            x0: (B, ...) noise.
            x1: (B, ...) data.
            t: (B,) times.
            labels: (B,) int64 as the network sees them; -1 = unconditional.
            index: (B,) int64 rows of the training set, where the data knows them.
        """

    def _oracle(self) -> Oracle:
        if self.oracle is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the bank of the training set, and none is attached: train with a "
                "datamodule that has bank(), or call attach(Oracle(bank, path))"
            )
        return self.oracle


class ConditionalTarget(Target):
    """The usual one: u_cond = alpha' x_1 + sigma' x_0, a one-sample estimate of the oracle velocity."""

    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Target`."""
        return path.velocity(x0, x1, t)


class OracleTarget(Target):
    """The oracle velocity itself: the same expected gradient without the noise of the one-sample estimate."""

    needs_oracle = True
    can_skip = True

    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Target`."""
        oracle = self._oracle()
        return oracle.target(x0, x1, t, labels, index if oracle.collapses else None)


class HybridTarget(Target):
    """The oracle before the boundary, where the two differ, and the conditional target after it.

    Args:
        boundary: t at which the target changes; `fm_stages.oracle.StageProfile` measures a data set's own.
    """

    needs_oracle = True

    def __init__(self, boundary: float) -> None:
        super().__init__()
        if not 0 <= boundary <= 1:
            raise ValueError(f"the boundary is a time in [0, 1], got {boundary}")
        self.boundary = boundary

    def attach(self, oracle: Oracle) -> None:
        """See `Target`.

        Raises:
            ValueError: if the posterior does not end on one row, so that the two differ on both sides of the boundary.
        """
        if not oracle.collapses:
            raise ValueError(
                f"the posterior of {type(oracle).__name__} does not end on one row, so the floor is not 0 past the "
                "boundary and the conditional target is no oracle there: use OracleTarget for all t"
            )
        super().attach(oracle)

    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Target`."""
        target = path.velocity(x0, x1, t)
        early = t < self.boundary
        shared = self.oracle is not None and self.oracle.bank.group is not None  # its ranks wait for one another
        if bool(early.any()) or shared:
            subset = [None if each is None else each[early] for each in (labels, index)]
            target[early] = self._oracle().target(x0[early], x1[early], t[early], *subset).to(target.dtype)
        return target


class BlendTarget(Target):
    """A share of the oracle and the rest of the conditional target, by t.

    Args:
        t: increasing times (K).
        share: of the oracle at these times, in [0, 1]; linear between them, constant beyond.

    Raises:
        ValueError: if the times do not increase, or a share is outside [0, 1].
    """

    needs_oracle = True

    def __init__(self, t: Sequence[float], share: Sequence[float]) -> None:
        super().__init__()
        if len(t) < 1 or len(t) != len(share) or any(b <= a for a, b in zip(t, t[1:], strict=False)):
            raise ValueError(f"need increasing times and a share for each: got t={list(t)}, share={list(share)}")
        if not all(0 <= s <= 1 for s in share):
            raise ValueError(f"shares of the oracle lie in [0, 1], got {list(share)}")
        self.t, self.share = list(t), list(share)
        self.can_skip = self.share[-1] > 0  # what can be skipped lies past the boundary

    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Target`."""
        target, oracle = path.velocity(x0, x1, t), self._oracle()
        share = torch.as_tensor(np.interp(t.cpu().numpy(), self.t, self.share)).to(t)
        asked = share > 0
        if bool(asked.any()) or oracle.bank.group is not None:  # ranks of a shared bank wait for one another
            rest = [None if each is None else each[asked] for each in (labels, index if oracle.collapses else None)]
            best = oracle.target(x0[asked], x1[asked], t[asked], *rest).to(target.dtype)
            target[asked] = torch.lerp(target[asked], best, expand_time(share[asked], best))
        return target


class TemperedTarget(Target):
    """The velocity of the tempered posterior (`fm_stages.oracle.TemperedOracle`): approximate, on purpose.

    Args:
        temperature: of the posterior's logits; above 1 it is flatter.
    """

    needs_oracle = True

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"a temperature is positive and finite, got {temperature}")
        self.temperature = temperature

    def attach(self, oracle: Oracle) -> None:
        """See `Target`."""
        super().attach(TemperedOracle(oracle.bank, oracle.path, self.temperature, oracle.tolerance))

    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Target`."""
        return self._oracle().target(x0, x1, t, labels)
