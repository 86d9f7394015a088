"""How much more than its two matrix products does the exact oracle cost, how much less than other ways to the same
target, how much memory does it take, and how exact is it?

Products: `Oracle.posterior` (or `target`, where a row says so) of B queries on Fashion-MNIST's training set (N = 60 000
rows of D = 784 values), over the time of the two float32 products that a dense posterior needs: x_t @ X.T into a given
(B, N), and G @ X with a dense G in (0, 1). The two are timed in turn, and the ratio is taken pair by pair. It can fall
below 1: the oracle leaves out rows whose weight is certainly negligible. The plain full softmax (all logits, softmax,
G @ X) stands beside the oracle; it gives the mean alone, the oracle also top1, ess, entropy and variance. In the row
with nearest neighbours these are measured beforehand, and only for the rows of the batch, which alone are looked up.

Other ways: the target of Stable Target Field and of Stable Velocity, as their formula is written down: a
(queries, rows, D) tensor, in slices. Where this takes minutes a stated part is timed and scaled.

Memory: what a call takes beyond bank and queries at its peak (`memory`).

Error: of the posterior mean against float64, ||m - m_64|| over the root mean square norm of the rows, largest of a few
queries.

Goals hold for one thread or more; with one, the clock counts processor seconds, which other work does not touch.
Shapes: B queries, N rows, D values per row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from banks import PATH, all_rows, as_bytes, load_bank, queries, random_rows
from memory import memory_table
from peers import error, exact_mean, full_softmax, measure_nearest_of, multi_sample_target, two_products
from timing import alternate, full_precision_products, machine, parser, positive, spread, table
from tqdm import tqdm

from fm_stages.oracle import DataBank, Oracle

NUM_ROWS = 60_000
TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99)
PARTS = ("products", "others", "errors", "memory")

SLICE_QUERIES, SLICE_ROWS = 16, 6000
"""Of Stable Target Field's tensor."""

CLASS_ROWS, CLASS_DIMS, CLASS_CHUNK = 1300, 4096, 64
"""A class of ImageNet in latents; rows of a chunk of Stable Velocity's tensor, which takes 0.3 GB with 256 queries."""


@dataclass
class Case:
    """Two things to be timed in turn; the time of ``b`` is multiplied where it is a part of the work."""

    name: str
    a: Callable[[], object]
    b: Callable[[], object]
    goal: str = "-"
    scale: float = 1.0


def time_cases(cases: list[Case], rounds: int, device: torch.device | str) -> list[list[str]]:
    """Rows of a table: name, ms of B and of A, the ratio B / A, its smallest to largest, the goal."""
    lines = []
    measured = alternate({case.name: (case.a, case.b) for case in cases}, rounds, device)
    for case in cases:
        pairs = measured[case.name]
        pairs.b = [case.scale * b for b in pairs.b]
        ms = [f"{1e3 * statistics.median(times):.1f}" for times in (pairs.b, pairs.a)]
        lines.append([case.name, *ms, *spread(pairs.ratios), case.goal])
    return lines


def against_products(bank: DataBank, num_queries: int) -> list[Case]:
    """The oracle over the two products, and own class over all classes."""
    oracle, everything, pixels = Oracle(bank, PATH), Oracle(bank, PATH, tolerance=0), Oracle(as_bytes(bank), PATH)
    pixels.bank.to(bank.device)
    rows = all_rows(bank)  # (N, D)
    square = rows.square().sum(1)
    anywhere, early = queries(bank, num_queries, 0, 1), queries(bank, num_queries, 0, 0.3)
    late = queries(bank, num_queries, 0.4, 1)
    products, allocating = (two_products(anywhere.flat, rows, allocate) for allocate in (False, True))

    skipping = Oracle(DataBank(rows.reshape(-1, *bank.shape), bank.labels_of(torch.arange(bank.num_rows))), PATH)
    measure_nearest_of(skipping.bank, anywhere.index)
    labels, row_labels = anywhere.labels, bank.labels_of(torch.arange(bank.num_rows))
    by_class = [two_products(anywhere.flat[labels == c], rows[row_labels == c]) for c in labels.unique().tolist()]

    def class_products() -> None:
        for work in by_class:
            work()

    def posterior(oracle: Oracle, batch=anywhere, labels=None) -> Callable[[], object]:
        return lambda: oracle.posterior(batch.x_t, batch.t, labels)

    def target() -> object:
        return skipping.target(anywhere.x0, anywhere.x1, anywhere.t, index=anywhere.index)

    return [
        Case("t in (0, 1)", products, posterior(oracle), "<= 0.90"),
        Case("navigation: t in (0, 0.3)", products, posterior(oracle, early), "<= 1.10"),
        Case("t in (0, 1), over products with results of their own", allocating, posterior(oracle), "<= 0.90"),
        Case("t in (0, 0.3), over products with results of their own", allocating, posterior(oracle, early), "<= 1.10"),
        Case("refinement: t in (0.4, 1)", products, posterior(oracle, late)),
        Case("t in (0, 1), tolerance 0", products, posterior(everything)),
        Case("t in (0, 0.3), tolerance 0", products, posterior(everything, early)),
        Case("t in (0, 1), bank in uint8", products, posterior(pixels)),
        Case("t in (0, 1), target, nearest neighbours known", products, target),
        Case("t in (0, 1), own class, over products with the class", class_products,
             posterior(oracle, anywhere, labels)),
        Case("t in (0, 1), own class, over the oracle of all 10", posterior(oracle),
             posterior(oracle, anywhere, labels), "<= 0.15"),
        Case("t in (0, 0.3), own class, over the oracle of all 10", posterior(oracle, early),
             posterior(oracle, early, early.labels)),
        Case("plain full softmax, t in (0, 1)", products,
             lambda: full_softmax(anywhere.flat, anywhere.t, rows, square)),
    ]  # fmt: skip


def against_other_ways(bank: DataBank, num_queries: int) -> list[Case]:
    """Other ways to the same target over the oracle."""
    batch, oracle = queries(bank, num_queries, 0, 1), Oracle(bank, PATH)
    rows = all_rows(bank)
    num = min(SLICE_QUERIES, num_queries)
    few = slice(0, num)
    x1 = random_rows(CLASS_ROWS, CLASS_DIMS, torch.float32, str(bank.device))[0]
    class_oracle = Oracle(DataBank(x1), PATH)
    noisy = queries(class_oracle.bank, num_queries, 0, 0.5)
    return [
        Case(f"Stable Target Field, {bank.num_rows} x {bank.num_dims}, t in (0, 1); {num} queries x {SLICE_ROWS} rows, "
             f"timed for {num} queries x all rows, times {num_queries / num:g}",
             lambda: oracle.target(batch.x0, batch.x1, batch.t),
             lambda: multi_sample_target(batch.flat[few], batch.t[few], rows, SLICE_ROWS),
             ">= 150", num_queries / num),
        Case(f"Stable Velocity, class of {CLASS_ROWS} x {CLASS_DIMS}, t in (0, 0.5); {num_queries} queries x "
             f"{CLASS_CHUNK} rows",
             lambda: class_oracle.target(noisy.x0, noisy.x1, noisy.t),
             lambda: multi_sample_target(noisy.x_t, noisy.t, x1, CLASS_CHUNK), ">= 100"),
    ]  # fmt: skip


def error_rows(bank: DataBank, num_queries: int) -> list[list[str]]:
    """Rows of the table of errors: oracle and plain float32 softmax at each time."""
    oracle, rows = Oracle(bank, PATH), all_rows(bank)
    square = rows.square().sum(1)
    lines = []
    for time in tqdm(TIMES, "errors", unit="time"):
        batch = queries(bank, num_queries, time, time)
        truth = exact_mean(batch.x_t, batch.t, bank)
        posterior = oracle.posterior(batch.x_t, batch.t)
        means = posterior.mean, full_softmax(batch.flat, batch.t, rows, square)
        lines.append([f"{time}", *(f"{error(m, truth, bank):.1e}" for m in means), f"{posterior.top1.mean():.3f}"])
    return lines


def main() -> None:
    made = parser(__doc__, rounds=20, of_what="pairs timed for each case")
    made.add_argument("--slow-rounds", type=positive, default=3, help="the same, of the other ways (default: 3)")
    made.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    made.add_argument("--queries", type=positive, default=256, help="queries B per call (default: 256)")
    made.add_argument("--rows", type=positive, default=NUM_ROWS, help="bank rows N of the timing (default: 60000)")
    made.add_argument(
        "--sizes", type=positive, nargs="*", default=[60_000, 250_000, 1_000_000], help="bank rows of the memory table"
    )
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables to make (default: all)")
    options = made.parse_args()

    bank, name = load_bank(options.rows, options.device)
    print(f"{name}, {options.queries} queries, {options.rounds} rounds; {machine(options.device)}", flush=True)
    ratios = ["ratio, median", "min - max", "goal"]
    with full_precision_products():
        if "products" in options.parts:
            lines = time_cases(against_products(bank, options.queries), options.rounds, bank.device)
            print("\n" + table(["oracle", "ms", "products or all classes, ms", *ratios], lines), flush=True)
        if "others" in options.parts:
            lines = time_cases(against_other_ways(bank, options.queries), options.slow_rounds, bank.device)
            print("\n" + table(["over the oracle", "ms", "oracle, ms", *ratios], lines), flush=True)
        if "errors" in options.parts:
            lines = error_rows(bank, min(16, options.queries))
            header = ["t", "error of m: oracle", "plain full softmax, float32", "mean top1"]
            print("\n" + table(header, lines), flush=True)
    del bank
    if "memory" in options.parts:
        print("\n" + memory_table(options.sizes, options.queries, options.device))


if __name__ == "__main__":
    main()
