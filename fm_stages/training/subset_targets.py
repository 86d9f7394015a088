"""The two published targets that ask a few rows in place of the training set. Both are approximate, and say so."""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.flow import Path, keyed_generator, keyed_uniform
from fm_stages.oracle import DataBank, Oracle, SharedBatchOracle, SubsetBank, SubsetOracle
from fm_stages.training.targets import Target

NULL = -1
"""Label of an unconditional sample."""


class ClassSubsetTarget(Target):
    """StableVM's target: data is drawn from a few rows of its class, and the target is the exact oracle of these rows.

    As published (arXiv 2602.05435) the rows of a class are the last 256 that passed by, and those of the null label the
    last 256 of all. Here they are drawn anew every so often, keyed by seed and step, so that a run resumes exactly and
    ranks agree; and they keep the bits of the bank. Unbiased as a target, for the own row is among them.

    Args:
        size: rows of each class, and of the null label.
        refresh_steps: optimizer steps until other rows are drawn.
        seed: of the draws.
    """

    needs_oracle = True

    def __init__(self, size: int = 256, refresh_steps: int = 20, seed: int = 0) -> None:
        super().__init__()
        if size < 1 or refresh_steps < 1:
            raise ValueError(f"size={size} and refresh_steps={refresh_steps} must be 1 or more")
        self.size, self.refresh_steps, self.seed = size, refresh_steps, seed
        self._members: dict[int, Tensor] = {}  # rows of the training set by label
        self._pools: dict[int, Tensor] = {}  # those that are drawn from
        self._subset: Oracle | None = None
        self._round = -1

    def attach(self, oracle: Oracle) -> None:
        """See `Target`."""
        super().attach(_of_points(oracle, self))
        every = torch.arange(oracle.bank.num_rows)
        labels = oracle.bank.labels_of(every).cpu()
        self._members = {label: (labels == label).nonzero()[:, 0] for label in oracle.bank.classes} | {NULL: every}
        self._round = -1

    def draw_data(
        self, x1: Tensor, labels: Tensor, index: Tensor | None, position: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `Target`: for each label a row of its pool."""
        self._refresh()
        u = keyed_uniform(("subset draw", self.seed, self.step), position)
        drawn = torch.empty(len(x1), dtype=torch.int64)
        for label in labels.unique().tolist():
            self._oracle().bank.slice_of(label)  # raises if there is no such row
            pool, asked = self._pools[label], (labels == label).cpu()
            drawn[asked] = pool[(u[asked] * len(pool)).long()]
        drawn = drawn.to(x1.device)
        return self._oracle().bank.rows(drawn), drawn

    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Target`."""
        self._refresh()
        assert self._subset is not None
        return self._subset.target(x0, x1, t, labels)

    def _refresh(self) -> None:
        """Draw other rows when it is time."""
        now = self.step // self.refresh_steps
        if now == self._round:
            return
        oracle, self._round = self._oracle(), now
        for label, members in self._members.items():
            order = torch.randperm(len(members), generator=keyed_generator("subset", self.seed, now, label))
            self._pools[label] = members[order[: self.size]]
        null = max(self._members) + 1
        index = torch.cat(list(self._pools.values()))
        labels = torch.cat([torch.full_like(p, null if label == NULL else label) for label, p in self._pools.items()])
        rows = oracle.bank.rows(index.to(oracle.bank.device))
        bank = SubsetBank(rows, labels.to(rows.device))
        self._subset = SubsetOracle(bank, oracle.path, f"oracle of {self.size} rows of each class", null)


class SharedBatchTarget(Target):
    """Stable Target Field's target: one reference batch per step, with the batch itself in it, blind to labels.

    Source: arXiv 2302.00670. See `fm_stages.oracle.SharedBatchOracle`.

    Args:
        num_reference: rows of the reference batch, not fewer than a batch has on a rank.
        seed: of the rows beyond the batch.
    """

    needs_oracle = True

    def __init__(self, num_reference: int = 1024, seed: int = 0) -> None:
        super().__init__()
        if num_reference < 1:
            raise ValueError(f"a reference batch has at least one row, got num_reference={num_reference}")
        self.num_reference, self.seed = num_reference, seed

    def attach(self, oracle: Oracle) -> None:
        """See `Target`."""
        super().attach(_of_points(oracle, self))

    def __call__(
        self, path: Path, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Target`."""
        generator = keyed_generator("shared batch", self.seed, self.step)
        return SharedBatchOracle(self._oracle().bank, path, self.num_reference, generator).target(x0, x1, t)


def _of_points(oracle: Oracle, target: Target) -> Oracle:
    if not isinstance(oracle.bank, DataBank):
        raise ValueError(
            f"{type(target).__name__} draws rows of the training set, which is drawn anew at every step here "
            f"({type(oracle.bank).__name__}): use OracleTarget"
        )
    return oracle
