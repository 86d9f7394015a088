"""Which training rows are nearest to a state, and which hold the largest posterior weights, exactly.

Both look for the largest scores l_i = -||x_t - a x_i||^2 / (2 s^2) (+ log count_i): at a = s = 1, without counts, they
are half the negative squared distances. A float32 product goes over the bank by pieces and leaves a few candidates per
query, which are scored again from direct differences in float64, so that near-duplicates come in their right order. A
query is done if, with a bound on the product's rounding, no row that was left out can be better; the rare others are
compared with all rows in float64, one query after the other. Memory does not grow with the bank.

Shapes: B queries, K candidates, C rows of a piece, D values per row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from fm_stages.flow import LinearPath
from fm_stages.oracle import ranks
from fm_stages.oracle.bank import DataBank, count_columns
from fm_stages.oracle.exact import Oracle
from fm_stages.oracle.inputs import check_tensor
from fm_stages.oracle.kernels import factors, full_precision, products
from fm_stages.oracle.stream import rounding_error

EXTRA_CANDIDATES = 13
"""Candidates beyond what is asked for: among more near-duplicates than these a query is compared with all rows."""

BLOCK = 64
"""Rows whose largest logit is found first: where it is no better than the best so far, none of them is looked at."""

FEW = 8
"""Blocks of a piece in which a query's better rows are looked for one by one."""

MAX_QUERIES, MAX_ROWS, MAX_VALUES = 2048, 1024, 2**21
"""Queries, and rows among which their best are looked for, at a time: no more of each than hold so many values."""

INDEX_PIECE = 2**20
"""Training rows at a time where the data set is searched for the first of equal ones."""


@torch.no_grad()
def nearest_rows(
    bank: DataBank, x: Tensor, num: int = 3, labels: Tensor | None = None, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The nearest distinct training rows ||x - x_i||.

    Args:
        bank: the training set; not sharded.
        x: (B, ...) floating point, in the units of the bank: samples, held-out images, states.
        num: how many rows for each.
        labels: (B,) int64, the class among whose rows to look, -1 = all rows; None: all rows for all.
        progress: whether to show a bar.

    Returns:
        Distances (B, num) float64, increasing, and the rows' index (B, num) int64 in the data set, the first one of
        equal rows. Where there are fewer distinct rows: infinity and -1.

    Raises:
        ValueError: if the bank is sharded, or the queries do not fit it.
    """
    _check(bank, num)
    check_tensor("queries", x)
    # what the oracle would refuse has no nearest row either
    asked = Oracle(bank, LinearPath()).check(ranks.Meeting(), x, torch.ones(len(x), device=x.device), labels, None)
    flat = x.reshape(len(x), -1).double()
    one = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    scores, rows = _best(bank, flat, one, one, asked, num, counted=False, progress=progress)
    return (-2 * scores).clamp(min=0).sqrt(), _first_index(bank, rows)


@torch.no_grad()
def largest_weights(
    oracle: Oracle, x_t: Tensor, t: Tensor, num: int = 3, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The largest posterior weights, and the training rows that hold them; k copies are one row of k times the weight.

    Args:
        oracle: of a bank that is not sharded.
        x_t: (B, ...), in the units of the bank.
        t: (B,), in [0, 1]; where sigma(t) = 0 the nearest row has all the weight.
        num: how many rows for each.
        labels: (B,) int64, as in `Oracle.posterior`.

    Returns:
        Weights (B, num) float64, decreasing, and the rows' index (B, num) int64 in the data set, the first one of equal
        rows. Where there are fewer distinct rows: 0 and -1. Which of equally large weights come first is not specified.

    Raises:
        TypeError: if the oracle is of a mixture.
        ValueError: if the bank is sharded, or the queries do not fit it.
    """
    bank = oracle.bank
    if not isinstance(bank, DataBank):
        raise TypeError(f"largest_weights needs the oracle of a DataBank, got one of a {type(bank).__name__}")
    _check(bank, num)
    top1 = oracle.posterior(x_t, t, labels).top1.double()
    asked = torch.full((len(x_t),), -1, device=x_t.device) if labels is None else labels.to(x_t.device)
    flat = x_t.reshape(len(x_t), -1).to(oracle.query_dtype).double()  # as the posterior takes it
    scores, rows = _best(bank, flat, *oracle.coefficients(t), asked, num, counted=True)
    return top1[:, None] * torch.exp(scores - scores[:, :1]), _first_index(bank, rows)


def piece_sizes(bank: DataBank) -> tuple[int, int]:
    """How many queries, and how many rows, are compared at a time."""
    values = MAX_VALUES // bank.num_dims
    return max(1, min(MAX_QUERIES, values)), max(1, min(MAX_ROWS, values))


def _check(bank: DataBank, num: int) -> None:
    if bank.group is not None:
        raise ValueError(
            f"the bank is sharded over {ranks.num_ranks(bank.group)} ranks, each of which would find its own: build "
            "it without a group (shard_bank: false)"
        )
    if num < 1:
        raise ValueError(f"num={num} must be 1 or more")


def _best(
    bank: DataBank, x: Tensor, a: Tensor, s: Tensor, labels: Tensor, num: int, counted: bool, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The largest scores (B, num) float64 of queries (B, D) float64, decreasing, and where their rows are stored.

    Without so many rows: minus infinity and -1.
    """
    scores = torch.full((len(x), num), -torch.inf, dtype=torch.float64, device=x.device)
    rows = torch.full((len(x), num), -1, dtype=torch.int64, device=x.device)
    size, _ = piece_sizes(bank)
    with tqdm(total=len(x), desc="Nearest rows", unit="query", disable=not progress) as bar:
        for label in labels.unique().tolist():
            for queries in (labels == label).nonzero()[:, 0].split(size):
                own = (x[queries], a[queries], s[queries])
                scores[queries], rows[queries] = _best_of_label(bank, *own, label, num, counted)
                bar.update(len(queries))
    return scores, rows


def _best_of_label(
    bank: DataBank, x: Tensor, a: Tensor, s: Tensor, label: int, num: int, counted: bool
) -> tuple[Tensor, Tensor]:
    """`_best` of queries that share a label."""
    column = count_columns(torch.full((len(x),), label, device=x.device))
    query, offset = factors(bank, x, a, s, column if counted else None)
    error = rounding_error(query, bank)
    margin = 2.25 * error  # a row that is further behind is so even if both logits, and this, are rounded
    with full_precision(x.device):
        coarse, rows = _candidates(bank, query, label, int(column[0]), margin.float(), num)
    hopeful = (coarse.double() >= (coarse[:, num - 1].double() - margin)[:, None]) & (rows != -1)
    scores = torch.full_like(coarse, -torch.inf, dtype=torch.float64)
    for each in range(rows.shape[1]):
        own = hopeful[:, each].nonzero()[:, 0]
        counts = column[own] if counted else None
        scores[own, each] = _score(bank, x[own], a[own], s[own], rows[own, each], counts)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    scores, rows = scores[:, :num], rows.gather(1, order)[:, :num]
    left_out = coarse[:, -1].double() + offset + error  # none of them has a larger score
    for i in (left_out > scores[:, -1]).nonzero()[:, 0].tolist():
        query_alone = (x[i : i + 1], a[i : i + 1], s[i : i + 1])
        scores[i], rows[i] = _among_all(bank, *query_alone, label, int(column[0]), num, counted)
    return scores, rows


def _candidates(
    bank: DataBank, query: Tensor, label: int, column: int, margin: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """The largest logits (B, K) float32, decreasing, of factors (B, D + NUM_EXTRA), and where their rows are stored.

    Rows that are more than the margin (B,) behind the ``num``-th best may be missing.
    """
    product, num_kept = products(bank, query), num + EXTRA_CANDIDATES
    best = query.new_full((len(query), num_kept), -torch.inf)
    rows = torch.full(best.shape, -1, dtype=torch.int64, device=query.device)
    pieces = _pieces(bank, label)
    size = -(-max(part.stop - part.start for part in pieces) // BLOCK) * BLOCK
    padded = query.new_empty(len(query), size)
    for part in pieces:
        num_rows = part.stop - part.start
        padded[:, num_rows:] = -torch.inf
        logits = padded[:, :num_rows]
        product.logits(part, logits)
        aside = _stands_aside(bank, part, column)
        if bool(aside.any()):
            logits.masked_fill_(aside, -torch.inf)
        threshold = torch.maximum(best[:, -1], best[:, num - 1] - margin)
        _take_in(best, rows, padded, part.start, threshold[:, None])
    return best, rows


def _take_in(best: Tensor, rows: Tensor, logits: Tensor, first: int, threshold: Tensor) -> None:
    """Put logits (B, S) above the threshold (B, 1) among the K ``best`` (B, K) so far, and their rows beside them.

    Once a few pieces are done there are not many: most blocks hold none.
    """
    blocks = logits.unflatten(1, (-1, BLOCK))
    near = blocks.amax(2) > threshold
    many = near.sum(1) > FEW
    full = many.nonzero()[:, 0]
    if len(full):
        new, place = (logits if len(full) == len(logits) else logits[full]).topk(min(best.shape[1], logits.shape[1]))
        new_rows = torch.where(new == -torch.inf, -1, first + place)
        best[full], rows[full] = _largest(best[full], rows[full], new, new_rows)
    query, block = (near & ~many[:, None]).nonzero(as_tuple=True)
    if not len(query):
        return
    own = blocks[query, block]  # (P, BLOCK)
    which, column = (own > threshold[query]).nonzero(as_tuple=True)
    active, position, counts = query[which].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(which), device=which.device) - (counts.cumsum(0) - counts)[position]
    new = best.new_full((len(active), int(counts.max())), -torch.inf)
    new_rows = torch.full(new.shape, -1, dtype=torch.int64, device=new.device)
    new[position, place], new_rows[position, place] = own[which, column], first + block[which] * BLOCK + column
    best[active], rows[active] = _largest(best[active], rows[active], new, new_rows)


def _among_all(
    bank: DataBank, x: Tensor, a: Tensor, s: Tensor, label: int, column: int, num: int, counted: bool
) -> tuple[Tensor, Tensor]:
    """The largest scores (1, num) of one query (1, D), and where their rows are stored, all from direct differences."""
    best = x.new_full((1, num), -torch.inf)
    rows = torch.full(best.shape, -1, dtype=torch.int64, device=x.device)
    for part in _pieces(bank, label):
        places = torch.arange(part.start, part.stop, device=x.device)
        scores = _score(bank, x, a, s, places, torch.full_like(places, column) if counted else None)
        aside = _stands_aside(bank, part, column)
        scores, places = scores.masked_fill(aside, -torch.inf)[None], places.masked_fill(aside, -1)[None]
        best, rows = _largest(best, rows, scores, places)
    return best, rows


def _pieces(bank: DataBank, label: int) -> list[slice]:
    """The stored rows of a label, a few at a time."""
    own = bank.slice_of(label)
    _, size = piece_sizes(bank)
    return [slice(start, min(start + size, own.stop)) for start in range(own.start, own.stop, size)]


def _stands_aside(bank: DataBank, part: slice, column: int) -> Tensor:
    """Which rows (C,) are copies that a row of another label stands for: the log count of no other is negative."""
    return bank.parts(part)[1][:, column] < 0


def _largest(best: Tensor, rows: Tensor, new: Tensor, new_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The K largest among the ``best`` (B, K) so far and new scores (B, C), decreasing, and their rows."""
    best, order = torch.cat([best, new], 1).topk(best.shape[1], dim=1)
    return best, torch.cat([rows, new_rows], 1).gather(1, order)


def _score(bank: DataBank, x: Tensor, a: Tensor, s: Tensor, rows: Tensor, column: Tensor | None) -> Tensor:
    """Scores (B,) float64 of stored rows (B,) for queries (B, D), or for one (1, D) of all these rows."""
    rows = rows.clamp(min=0)  # -1 is masked afterwards
    scores = -torch.linalg.vector_norm(x - a * bank.stored(rows), dim=1).square() / (2 * s[:, 0] ** 2)
    return scores if column is None else scores + bank.log_count(rows, column)


def _first_index(bank: DataBank, rows: Tensor) -> Tensor:
    """The first training row that each stored row (B, num) stands for, or -1 for -1: (B, num) int64."""
    wanted, inverse = rows.unique(return_inverse=True)
    first = torch.full_like(wanted, bank.num_rows)
    for index in torch.arange(bank.num_rows, device=bank.device).split(INDEX_PIECE):
        place = bank.place_of(index)
        found = torch.searchsorted(wanted, place).clamp(max=len(wanted) - 1)
        hit = wanted[found] == place
        first.scatter_reduce_(0, found[hit], index[hit], "amin")
    return torch.where(wanted == -1, -1, first)[inverse]
