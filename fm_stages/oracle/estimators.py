"""Relatives of the oracle from the literature, to be shown beside it. None of them is the oracle of the training set.

* `TemperedOracle` flattens the posterior.  Source: arXiv 2601.19285.
* `ClassBanks`: the exact oracle of a few rows per class, from which x_1 itself is drawn.  Source: StableVM of Stable
  Velocity, arXiv 2602.05435.
* `SharedBatchOracle`: the exact oracle of one reference batch per step, with the batch itself in it.  Source: Stable
  Target Field, arXiv 2302.00670.

The latter two estimate the oracle's target. Where the own x_1 is one of their rows, drawn like the others, the estimate
is unbiased given x_t; without it, it is not. As a *diagnostic* both understate the floor, for few rows leave less doubt
about x_1 than all of them, and call the difference gap. Each says in ``approximate`` what it is; report that wherever
its numbers appear.

Shapes: B queries, N rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fm_stages.flow import Path
from fm_stages.oracle.bank import DataBank
from fm_stages.oracle.exact import Oracle
from fm_stages.oracle.merge import Partial

NULL = -1
"""Label of an unconditional query."""


class TemperedOracle(Oracle):
    """The oracle with its logits -||x_t - a x_i||^2 / (2 s^2) divided by a temperature.

    Equal to the posterior for noise larger by the root of the temperature, in the weights alone: the velocity keeps the
    path's A_t and B_t. Counts of rows are not divided, so k copies weigh k times at any temperature.

    Args:
        bank: the training distribution.
        path: the path that x_t was made with.
        temperature: positive; 1 is the oracle, above 1 the posterior is flatter.
        tolerance: see `Oracle`.

    Raises:
        ValueError: if the temperature is not positive and finite.
    """

    def __init__(self, bank: DataBank, path: Path, temperature: float, tolerance: float = 1e-6) -> None:
        super().__init__(bank, path, tolerance)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"a temperature is positive and finite, got {temperature}")
        self.temperature = temperature
        self._path += f" at temperature {temperature:g}"  # ranks must agree on it, too
        self.approximate = None if temperature == 1 else f"tempered posterior, temperature {temperature:g}"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = super().coefficients(t)
        return alpha, sigma * math.sqrt(self.temperature)

    def _may_skip(self) -> bool:
        return False  # certificates are about the noise that made x_t


class ClassBanks:
    """The last rows of each class, and the last rows of all for the null label: StableVM's memory.

    x_1 is drawn from here in place of the training set, and the target is the exact oracle of these rows. Rows are kept
    in float16, so x_1 has those bits as well. As published the labels are uniform, the null label has the share of the
    dropout, and the conditional target takes over in the half nearer to data (`HybridTarget` at 0.5).

    Args:
        num_classes: labels run from 0 to num_classes - 1; 0 for an unlabelled set.
        size: most rows of a class, and of the null label.
    """

    def __init__(self, num_classes: int, size: int = 256) -> None:
        if num_classes < 0 or size < 1:
            raise ValueError(f"need classes, or 0, and at least one row of each: got {num_classes} and size {size}")
        self.num_classes = num_classes
        self.size = size
        self._rows: dict[int, Tensor] = {}  # oldest first

    def push(self, x1: Tensor, labels: Tensor | None = None) -> None:
        """Add training rows (B, ...), in their order, to the pools of their classes (B,) and to the null label's.

        Raises:
            ValueError: if the labels do not fit, or a value is not finite in float16.
        """
        labels = torch.full((len(x1),), NULL) if labels is None else labels
        if labels.shape != (len(x1),) or bool(((labels < NULL) | (labels >= self.num_classes)).any()):
            raise ValueError(
                f"need a label from 0 to {self.num_classes - 1} for each of {len(x1)} rows, got {tuple(labels.shape)} "
                f"from {labels.min()} to {labels.max()}"
            )
        if not x1.is_floating_point():
            raise ValueError(f"rows are what the network sees, in floating point; got {x1.dtype}")
        if self._rows and x1.shape[1:] != self._rows[NULL].shape[1:]:
            raise ValueError(
                f"rows have the shape {tuple(self._rows[NULL].shape[1:])} so far, got {tuple(x1.shape[1:])}"
            )
        rows = x1.detach().half()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("a row holds values that are not finite in float16")
        for label in labels.unique().tolist():
            if label != NULL:
                self._append(label, rows[labels.to(rows.device) == label])
        self._append(NULL, rows)

    def _append(self, label: int, rows: Tensor) -> None:
        known = self._rows.get(label, rows[:0])
        self._rows[label] = torch.cat([known, rows])[-self.size :].clone()

    def rows_of(self, label: int) -> Tensor:
        """The rows of a class, or of the null label -1, oldest first: (N, ...) float16.

        Raises:
            ValueError: if none was pushed yet.
        """
        if label not in self._rows:
            raise ValueError(f"no row with label {label} was pushed yet: fill the pools before you draw from them")
        return self._rows[label]

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A row of each label's pool, all equally likely.

        Args:
            labels: (B,) int64; -1 draws from the null label's pool.
            generator: on the CPU; one number of it is used per label, whatever the pools hold.

        Returns:
            (B, ...) float32, with the bits of the pool.
        """
        share = torch.rand(len(labels), generator=generator, dtype=torch.float64)
        drawn = torch.empty(len(labels), *self.rows_of(NULL).shape[1:], device=self.rows_of(NULL).device)
        for label in labels.unique().tolist():
            pool, asked = self.rows_of(label), (labels == label).cpu()
            drawn[asked.to(pool.device)] = pool[(share[asked] * len(pool)).long().to(pool.device)].float()
        return drawn

    def oracle(self, path: Path) -> Oracle:
        """The exact oracle of the rows that are here now; queries with label -1 see the null label's pool alone."""
        null = self.num_classes  # the place that a network's null label has
        pools = [(null if label == NULL else label, rows) for label, rows in self._rows.items()]
        if not pools:
            raise ValueError("the pools are empty: push rows first")
        labels = torch.cat([torch.full((len(rows),), label) for label, rows in pools])
        bank = SubsetBank(torch.cat([rows for _, rows in pools]), labels)
        return SubsetOracle(bank, path, f"class banks of at most {self.size} rows, float16", null)


class SharedBatchOracle:
    """Stable Target Field: one reference batch per step, shared by all queries and blind to labels.

    The reference is the batch's own x_1 and further rows drawn from the training set with replacement. Its target is
    unbiased if the batch is drawn like them; of batches without replacement up to num_reference / N.

    Args:
        bank: the training set.
        path: the path that x_t was made with.
        num_reference: rows of a reference batch, not fewer than the batch has.
        generator: on the CPU, of the further rows.
    """

    def __init__(self, bank: DataBank, path: Path, num_reference: int, generator: torch.Generator) -> None:
        if num_reference < 1:
            raise ValueError(f"a reference batch has at least one row, got {num_reference}")
        self.bank = bank
        self.path = path
        self.num_reference = num_reference
        self.generator = generator
        self.approximate = f"reference batches of {num_reference} rows, blind to labels"

    def of_batch(self, x1: Tensor) -> Oracle:
        """The exact oracle of a new reference batch, in which x1 (B, ...) is; it takes any labels and ignores them.

        Raises:
            ValueError: if the batch has more rows than the reference.
        """
        num_further = self.num_reference - len(x1)
        if num_further < 0:
            raise ValueError(
                f"a batch of {len(x1)} rows does not fit into a reference of num_reference={self.num_reference}: raise "
                "it to the batch size or above"
            )
        further = torch.randint(self.bank.num_rows, (num_further,), generator=self.generator)
        rows = torch.cat([x1.float(), self.bank.rows(further).reshape(-1, *self.bank.shape)])
        return SubsetOracle(_Unlabelled(rows), self.path, self.approximate)

    def target(
        self, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, ...) float32 of a new reference batch at interpolate(x0, x1, t).

        Arguments as in `Oracle.target`, but labels are ignored. With an index x1 is read from the bank.
        """
        x1 = x1 if index is None else self.bank.rows(index)
        return self.of_batch(x1).target(x0, x1, t)


class SubsetBank(DataBank):
    """Some rows, of which an index in the data set says nothing."""

    def rows_of_all(self, index: Tensor, sizes: list[int]) -> Tensor:
        raise ValueError(
            "an index counts rows of the training set, and this bank holds some of them in another order: pass the x1 "
            "that was drawn, and no index"
        )


class _Unlabelled(SubsetBank):
    """The same whatever the label."""

    def slice_of(self, label: int) -> slice:
        return slice(0, self.num_stored)


class SubsetOracle(Oracle):
    """The exact oracle of a few rows in place of the training set.

    Args:
        bank: these rows.
        path: the path that x_t was made with.
        approximate: see `Oracle`.
        null: what unconditional queries are conditioned on; -1: nothing.
    """

    def __init__(self, bank: DataBank, path: Path, approximate: str, null: int = NULL) -> None:
        super().__init__(bank, path)
        self.approximate = approximate
        self._null = null

    def _may_skip(self) -> bool:
        return False

    def _partial(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Partial:
        return super()._partial(x_t, t, torch.where(labels == NULL, self._null, labels))
