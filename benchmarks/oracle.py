"""How much more than its two matrix products does the exact oracle cost, and how much memory, and how exact is it?

Time: `Oracle.posterior` of B queries on Fashion-MNIST's training set (N = 60 000 rows of D = 784 values), over the time
of the two float32 products that a dense posterior needs: x_t @ X.T into a given (B, N), and G @ X with a dense G in
(0, 1). The two are timed in turn, and the ratio is taken pair by pair. It can fall below 1: the oracle leaves out the
second product where all weights of a piece are negligible. For class-conditional queries the products are those with
the rows of the class, too. The plain full softmax (all logits, softmax, G @ X) stands beside the oracle; it gives the
mean alone, the oracle also top1, ess, entropy and variance.

Memory: what a call takes beyond bank and queries at its peak, each in a process of its own: resident memory on a CPU,
allocated memory on a GPU.

Error: of the posterior mean against float64, ||m - m_64|| over the root mean square norm of the rows, largest of a few
queries.

Fashion-MNIST is looked for as everywhere in fm-stages (FM_STAGES_DATA or data/); without it rows are random, which are
farther apart than images, so that most of the regimes are alike. Shapes: B queries, N rows, D values per row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import alternate, full_precision_products, machine, parser, positive, spread, table
from torch import Tensor
from tqdm import tqdm

from fm_stages.data import FashionMNIST
from fm_stages.flow import LinearPath, keyed_generator, keyed_normal
from fm_stages.oracle import DataBank, Oracle

PATH = LinearPath()
NUM_ROWS, NUM_DIMS, NUM_CLASSES = 60_000, 784, 10
TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99)
STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def load_bank(num_rows: int, device: str) -> tuple[DataBank, str]:
    """Fashion-MNIST's bank with labels, or random rows in its place; and which of the two in words."""
    try:
        bank = FashionMNIST(num_train=num_rows).bank()
        name = "Fashion-MNIST"
    except FileNotFoundError:
        bank = random_bank(num_rows, NUM_DIMS)
        name = "RANDOM ROWS (no Fashion-MNIST under FM_STAGES_DATA or data/)"
    return bank.to(device), f"{name}, {bank.num_rows} x {bank.num_dims}"


def random_bank(num_rows: int, num_dims: int) -> DataBank:
    """Uniform rows in [-1, 1] with labels."""
    generator = keyed_generator("benchmark rows", num_rows)
    x1 = torch.empty(num_rows, num_dims).uniform_(-1, 1, generator=generator)
    return DataBank(x1, torch.randint(NUM_CLASSES, (num_rows,), generator=generator))


def queries(bank: DataBank, num: int, lo: float, hi: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_t (B, ...) of real rows at t ~ U(lo, hi), t (B,), and the labels of the rows (B,)."""
    generator = keyed_generator("benchmark queries")
    index = torch.randint(bank.num_rows, (num,), generator=generator)
    t = (lo + (hi - lo) * torch.rand(num, generator=generator)).to(bank.device)
    x0 = keyed_normal(("benchmark noise",), torch.arange(num), bank.shape).to(bank.device)
    return PATH.interpolate(x0, bank.rows(index), t), t, bank.labels_of(index)


def two_products(x_t: Tensor, rows: Tensor) -> Callable[[], None]:
    """The two float32 products of queries (B, D) with rows (N, D), into memory that is there already."""
    logits = torch.empty(len(x_t), len(rows), device=rows.device)  # (B, N)
    weights = torch.rand(len(x_t), len(rows), generator=keyed_generator("benchmark weights")).to(rows.device)  # (B, N)
    mean = torch.empty_like(x_t)

    def work() -> None:
        torch.mm(x_t, rows.T, out=logits)
        torch.mm(weights, rows, out=mean)

    return work


def full_softmax(x_t: Tensor, t: Tensor, rows: Tensor, square: Tensor) -> Tensor:
    """The posterior mean (B, D) as one would write it at first; ``square`` (N,) are the rows' squared norms."""
    a, s = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]  # (B, 1)
    logits = (a / s**2) * (x_t @ rows.T) - (a**2 / (2 * s**2)) * square  # (B, N)
    return torch.softmax(logits, 1) @ rows


def time_cases(bank: DataBank, num_queries: int, rounds: int) -> list[list[str]]:
    """Rows of the table of times."""
    oracle = Oracle(bank, PATH)
    rows = bank.rows(torch.arange(bank.num_rows)).flatten(1)  # (N, D)
    square = rows.square().sum(1)
    everywhere = queries(bank, num_queries, 0, 1)
    flat = everywhere[0].flatten(1)
    products = two_products(flat, rows)

    labels, row_labels = everywhere[2], bank.labels_of(torch.arange(bank.num_rows))
    by_class = [two_products(flat[labels == c], rows[row_labels == c]) for c in labels.unique().tolist()]

    def class_products() -> None:
        for work in by_class:
            work()

    def posterior(lo: float, hi: float) -> Callable[[], object]:
        x_t, t, _ = queries(bank, num_queries, lo, hi)
        return lambda: oracle.posterior(x_t, t)

    cases = {
        "oracle, t in (0, 1)": (products, posterior(0, 1)),
        "oracle, navigation: t in (0, 0.3)": (products, posterior(0, 0.3)),
        "oracle, refinement: t in (0.4, 1)": (products, posterior(0.4, 1)),
        "oracle, own class, over products with the class": (class_products, lambda: oracle.posterior(*everywhere)),
        "oracle, own class, over products with all rows": (products, lambda: oracle.posterior(*everywhere)),
        "plain full softmax, t in (0, 1)": (products, lambda: full_softmax(flat, everywhere[1], rows, square)),
    }
    measured = alternate(cases, rounds, bank.device)
    return [
        [name, f"{1e3 * statistics.median(p.b):.1f}", f"{1e3 * statistics.median(p.a):.1f}", *spread(p.ratios)]
        for name, p in measured.items()
    ]


def exact_mean(x_t: Tensor, t: Tensor, bank: DataBank) -> Tensor:
    """Posterior mean (B, D) in float64, from the rows themselves in pieces."""
    a, s = PATH.alpha(t.double())[:, None], PATH.sigma(t.double())[:, None]  # (B, 1)
    wide = x_t.double().flatten(1)
    pieces = torch.arange(bank.num_rows).split(4096)
    logits = []
    for piece in pieces:
        rows = bank.rows(piece).double().flatten(1)
        logits.append(a / s**2 * (wide @ rows.T) - a**2 / (2 * s**2) * rows.square().sum(1))
    weights = torch.softmax(torch.cat(logits, 1), 1)  # (B, N)
    mean = torch.zeros_like(wide)
    for part, piece in zip(weights.split(4096, 1), pieces, strict=True):
        mean += part @ bank.rows(piece).double().flatten(1)
    return mean


def error_rows(bank: DataBank, num_queries: int) -> list[list[str]]:
    """Rows of the table of errors: oracle and plain float32 softmax at each time."""
    oracle = Oracle(bank, PATH)
    rows = bank.rows(torch.arange(bank.num_rows)).flatten(1)
    square = rows.square().sum(1)
    lines = []
    for time in tqdm(TIMES, "errors", unit="time"):
        x_t, t, _ = queries(bank, num_queries, time, time)
        truth = exact_mean(x_t, t, bank)
        posterior = oracle.posterior(x_t, t)
        means = {"oracle": posterior.mean, "plain": full_softmax(x_t.flatten(1), t, rows, square)}
        errors = [float((m.flatten(1) - truth).norm(dim=1).max() / bank.rms_norm) for m in means.values()]
        lines.append([f"{time}", *(f"{e:.1e}" for e in errors), f"{posterior.top1.mean():.3f}"])
    return lines


def memory_of(num_rows: int, num_dims: int, num_queries: int, device: str) -> dict[str, float]:
    """Peak memory in bytes beyond bank and queries, of the oracle and the plain softmax, and of building the bank."""
    _working_memory(random_bank(4096, num_dims).to(device), num_queries, device)  # what libraries load is not counted
    generator = keyed_generator("benchmark rows", num_rows)
    x1 = torch.empty(num_rows, num_dims).uniform_(-1, 1, generator=generator)
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=generator)
    building, bank = _peak_bytes(lambda: DataBank(x1, labels), "cpu")
    bank.to(device)
    return {
        "building": building,
        "rows": 4 * num_rows * num_dims,
        **_working_memory(bank, num_queries, device),
    }


def _working_memory(bank: DataBank, num_queries: int, device: str) -> dict[str, float]:
    oracle = Oracle(bank, PATH)
    x_t, t, _ = queries(bank, num_queries, 0, 1)
    flat = x_t.flatten(1)
    oracle_bytes, _ = _peak_bytes(lambda: oracle.posterior(x_t, t), device)
    # a view of the rows: a copy of them would count as the bank
    rows, square = bank.stored(slice(None)), torch.zeros(bank.num_distinct, device=device)
    softmax_bytes, _ = _peak_bytes(lambda: full_softmax(flat, t, rows, square), device)
    return {"oracle": oracle_bytes, "softmax": softmax_bytes}


def _peak_bytes(work: Callable[[], object], device: str) -> tuple[float, object]:
    """How far memory rises above its level while some work is done, and what the work returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    PEAK_RESET.write_text("5")  # sets the peak of the resident set to its present size
    before = _status_bytes("VmRSS")
    result = work()
    return _status_bytes("VmHWM") - before, result


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def memory_rows(sizes: list[int], num_queries: int, device: str) -> list[list[str]]:
    """Rows of the table of memory, one process for each bank."""
    lines = []
    for num_rows in tqdm(sizes, "memory", unit="bank"):
        num_dims = NUM_DIMS
        while _needed_bytes(num_rows, num_dims, num_queries) > _available_bytes() and num_dims > 49:
            num_dims //= 2
        options = ["--memory-of", f"{num_rows}", f"{num_dims}", "--queries", f"{num_queries}", "--device", device]
        command = [sys.executable, __file__, *options, "--threads", f"{torch.get_num_threads()}"]
        # glibc keeps freed blocks below a limit that moves; a fixed, low one gives them back at once, so that memory
        # in use before the call cannot hide memory that the call uses
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        peak = json.loads(done.stdout)
        mib = [f"{peak[name] / 2**20:.0f}" for name in ("rows", "oracle", "softmax")]
        lines.append([f"{num_rows:,}", f"{num_dims}", *mib, f"{peak['building'] / peak['rows']:.1f}"])
    return lines


def _needed_bytes(num_rows: int, num_dims: int, num_queries: int) -> int:
    """Of the rows given, the bank and what making it takes; or else the logits of the plain softmax, some times."""
    return 4 * num_rows * (2 * num_dims + max(3 * num_dims, 4 * num_queries))


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    made = parser(__doc__, rounds=20, of_what="pairs timed for each case")
    made.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    made.add_argument("--queries", type=positive, default=256, help="queries B per call (default: 256)")
    made.add_argument("--rows", type=positive, default=NUM_ROWS, help="bank rows N of the timing (default: 60000)")
    made.add_argument(
        "--sizes", type=positive, nargs="*", default=[60_000, 250_000, 1_000_000], help="bank rows of the memory table"
    )
    made.add_argument("--memory-of", type=positive, nargs=2, help=argparse.SUPPRESS)  # the process of one bank
    options = made.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(*options.memory_of, options.queries, options.device)))
        return

    bank, name = load_bank(options.rows, options.device)
    print(f"{name}, {options.queries} queries, {options.rounds} rounds; {machine(options.device)}\n", flush=True)
    with full_precision_products():
        times = time_cases(bank, options.queries, options.rounds)
        errors = error_rows(bank, min(16, options.queries))
    del bank
    print("\n" + table(["time of", "ms", "two products, ms", "ratio, median", "ratio, min - max"], times))
    print("\n" + table(["t", "error of m: oracle", "plain full softmax, float32", "mean top1"], errors), flush=True)
    if not os.access(PEAK_RESET, os.W_OK):
        print("\nNo table of memory: it is measured through Linux's /proc.")
        return
    memory = memory_rows(options.sizes, options.queries, options.device)
    header = ["N", "D", "rows, MiB", "oracle: beyond them, MiB", "plain full softmax, MiB", "to build the bank, / rows"]
    print("\n" + table(header, memory))


if __name__ == "__main__":
    main()
