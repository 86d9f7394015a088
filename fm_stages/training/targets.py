"""Regression targets: what the network is asked to predict at x_t. One small class each."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fm_stages.flow import Path
from fm_stages.oracle import Oracle


class Target(ABC):
    """A velocity for each sample of a batch."""

    needs_oracle = False
    """Whether `attach` must be called before the first step."""

    can_skip = False
    """Whether it asks at all times, so that some queries could be skipped (`fm_stages.oracle.measure_nearest`)."""

    def __init__(self) -> None:
        self.oracle: Oracle | None = None

    def attach(self, oracle: Oracle) -> None:
        """Hand over the oracle of the training set."""
        self.oracle = oracle

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
