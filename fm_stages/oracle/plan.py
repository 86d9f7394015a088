"""What a bank costs, before any time is spent on it: memory and work, and whether each rank holds a copy or a shard.

A rank's work is the same either way, all queries against its shard or its own queries against all rows, and a copy
needs no messages. So a bank is sharded only where copies would take memory that training wants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fm_stages.oracle.bank import NUM_EXTRA, DataBank

COPY_SHARE = 0.1
"""Share of a rank's memory up to which the whole bank is copied to it."""

MAX_SHARE = 0.6
"""Share of a rank's memory that a shard may take; the rest is for the model."""

INDEX_BYTES = 8
"""Per row of the whole bank on every rank: where it is stored and, if measured, how near the nearest other image is."""


@dataclass
class BankPlan:
    """How a bank of N rows of D values is held by R ranks.

    Attributes:
        num_rows: N, flips included.
        num_dims: D.
        value_bytes: bytes of a stored value.
        num_ranks: R.
        sharded: whether each rank holds a part.
    """

    num_rows: int
    num_dims: int
    value_bytes: int
    num_ranks: int
    sharded: bool

    @property
    def bytes_per_rank(self) -> int:
        """Memory on the rank that has most."""
        rows = math.ceil(self.num_rows / self.num_ranks) if self.sharded else self.num_rows
        return rows * self.row_bytes + INDEX_BYTES * self.num_rows

    @property
    def row_bytes(self) -> int:
        """Memory of a stored row, with its extra columns."""
        return self.num_dims * self.value_bytes + 4 * NUM_EXTRA

    def rows_of(self, rank: int) -> range:
        """The rows, by their index in the data set, that a rank brings."""
        if not self.sharded:
            return range(self.num_rows)
        return range(rank * self.num_rows // self.num_ranks, (rank + 1) * self.num_rows // self.num_ranks)


def plan_bank(
    num_rows: int,
    num_dims: int,
    value_bytes: int,
    memory_bytes: float,
    num_ranks: int = 1,
    sharded: bool | None = None,
) -> BankPlan:
    """Choose between copies and shards.

    Args:
        num_rows: N, flips included.
        num_dims: D.
        value_bytes: bytes of a stored value.
        memory_bytes: of each rank, where the bank will lie; infinite, where that is not known.
        num_ranks: R.
        sharded: decides, if it is not None.

    Raises:
        MemoryError: if the bank does not fit, with what would.
        ValueError: if there are more ranks than rows.
    """
    if num_ranks > num_rows:
        raise ValueError(f"{num_rows} rows leave some of {num_ranks} ranks without any: use fewer ranks")
    copies, shards = (BankPlan(num_rows, num_dims, value_bytes, num_ranks, each) for each in (False, num_ranks > 1))
    if sharded is None:
        sharded = copies.bytes_per_rank > COPY_SHARE * memory_bytes
    plan = shards if sharded else copies
    if plan.bytes_per_rank <= MAX_SHARE * memory_bytes:
        return plan
    room = int(MAX_SHARE * memory_bytes)
    ranks = math.ceil(num_rows * copies.row_bytes / max(room - INDEX_BYTES * num_rows, 1))
    remedies = [f"at least {ranks} ranks with a sharded bank" if ranks > num_ranks or not sharded else ""]
    remedies += ["rows in 8 or 16 bits" if value_bytes > 2 else "", f"at most {room // copies.row_bytes} rows per rank"]
    raise MemoryError(
        f"the bank of {num_rows} rows of {num_dims} values needs {gibibytes(plan.bytes_per_rank)} on each of "
        f"{num_ranks} ranks, which have {gibibytes(memory_bytes)}; {MAX_SHARE:.0%} of it may be used. Take "
        + ", or ".join(remedy for remedy in remedies if remedy)
    )


def rows_per_query(bank: DataBank, label_dropout: float) -> float:
    """How many rows a query is held against on average: all, or those of its class.

    Args:
        bank: the bank.
        label_dropout: share of queries that are conditioned on no label.
    """
    if not bank.has_labels:
        return bank.num_rows
    # a sample's class is drawn as the rows are
    own = sum(count**2 for count in bank.label_counts.values()) / bank.num_rows
    return label_dropout * bank.num_rows + (1 - label_dropout) * own


def nearest_pays(num_rows: int, num_queries: int, num_calls: int, share: float = 1.0) -> bool:
    """Whether `fm_stages.oracle.measure_nearest`, N^2 products of rows, is less than what it saves.

    It saves both products, for the share of uniform t that is certified: a quarter or more on images.

    Args:
        num_rows: N.
        num_queries: B of a call, on all ranks that measure together.
        num_calls: how often the oracle will be asked for a target.
        share: of the rows, that a query is held against (`rows_per_query`).
    """
    return num_rows < 0.25 * 2 * num_queries * share * num_calls


def describe(
    bank: DataBank, num_queries: int, label_dropout: float, num_ranks: int = 1, step_flops: int | None = None
) -> str:
    """What a bank holds, and what measuring a batch takes, in one line.

    Args:
        bank: the bank.
        num_queries: samples of a batch on this rank.
        label_dropout: share of them that is conditioned on no label.
        num_ranks: ranks that train.
        step_flops: floating point operations of a training step on this rank, if they are known.
    """
    rows = rows_per_query(bank, label_dropout)
    flops = 4 * num_queries * rows * bank.num_dims  # two products; what is skipped is not known yet
    where = "" if num_ranks == 1 else f" on each of {num_ranks} ranks, {'a copy' if bank.group is None else 'a shard'}"
    share = "" if not step_flops else f", {flops / step_flops:.1%} of a training step's {_flops(step_flops)}"
    # distributions take no products: what their logarithms cost is not known in these terms
    cost = (
        f" Measuring {num_queries} samples takes at most {_flops(flops)}{share}." if isinstance(bank, DataBank) else ""
    )
    dtype = str(bank.dtype).removeprefix("torch.")
    return f"{bank}, {dtype}, {bank.num_bytes / 2**20:.1f} MiB{where}, on {bank.device}.{cost}"


def gibibytes(num_bytes: float) -> str:
    """Memory, to be read."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _flops(number: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e6:.1f} MFLOP"
