"""Two figures in one about the exact oracle on a CPU: its cost against N, and its error against t.

Left: time of `Oracle.posterior` for B queries and of the two float32 products that a dense posterior needs, over banks
of N random rows of 784 values; medians of calls timed in turn. All are linear in N. Random rows lie far apart:
with uniform t most posteriors have collapsed, so that the oracle leaves most of the second product out; the case
"nothing left out" (tolerance 0, t in (0, 0.1)) is the dense one.

Right: error of the posterior mean against float64 on Fashion-MNIST, ||m - m_64|| over the root mean square norm of the
rows, largest of a few queries. Beside the oracle (rows stored in float32 and in 8 bits; tolerance 1e-6 and 0) stand
`SplitProducts`, which a GPU uses, in its plain form on the CPU, and the plain softmax with products in float32 and, as
under autocast, in bfloat16. All mass on one row is an error of 0, which is drawn at the foot.

Writes docs/images/oracle_cost_and_error.png and, with all numbers, .json beside it. --redraw draws the numbers that are
there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from banks import NUM_DIMS, PATH, Queries, all_rows, as_bytes, load_bank, queries, random_bank
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from peers import error, exact_mean, full_softmax, two_products
from timing import alternate, full_precision_products, machine, parser, positive
from torch import Tensor
from tqdm import tqdm

from fm_stages.oracle import DataBank, Oracle, stream
from fm_stages.oracle.kernels import SplitProducts
from fm_stages.plots import save

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "oracle_cost_and_error.png"
SIZES = (2000, 4000, 8000, 16_000, 32_000, 64_000, 125_000, 250_000)
TIMES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
FOOT = 1e-9

STYLES = {  # colour, line, marker
    "oracle, t in (0, 1)": ("#c1440e", "-", "o"),
    "oracle, nothing left out": ("#e09f3e", "--", "D"),
    "two float32 products": ("#253237", ":", "^"),
    "oracle, float32 rows": ("#c1440e", "-", "o"),
    "oracle, 8-bit rows": ("#6a994e", "-", "v"),
    "oracle, float32 rows, tolerance 0": ("#e09f3e", "--", "s"),
    "oracle with the GPU's split products": ("#7b2d8b", "-.", "D"),
    "plain softmax, float32": ("#253237", ":", "^"),
    "plain softmax, bfloat16 products": ("#3a7ca5", ":", "x"),
}


def costs(sizes: tuple[int, ...], num_queries: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds by name, one for each N."""
    found: dict[str, list[float]] = {name: [] for name in list(STYLES)[:3]}
    for num_rows in sizes:
        bank = random_bank(num_rows, NUM_DIMS)
        anywhere, early = queries(bank, num_queries, 0, 1), queries(bank, num_queries, 0, 0.1)
        products = two_products(anywhere.flat, all_rows(bank))
        cases = {
            "oracle, t in (0, 1)": (products, _call(Oracle(bank, PATH), anywhere)),
            "oracle, nothing left out": (products, _call(Oracle(bank, PATH, tolerance=0), early)),
        }
        timed = alternate(cases, rounds)
        for name, pairs in timed.items():
            found[name].append(1e3 * statistics.median(pairs.b))
        every = [a for pairs in timed.values() for a in pairs.a]
        found["two float32 products"].append(1e3 * statistics.median(every))
    return found


def errors(bank: DataBank, num_queries: int) -> dict[str, list[float]]:
    """Errors by name, one for each of `TIMES`; and the mean top1."""
    rows, pixels = all_rows(bank), as_bytes(bank)
    square, halves = rows.square().sum(1), rows.bfloat16()
    found: dict[str, list[float]] = {name: [] for name in [*list(STYLES)[3:], "top1"]}
    for time in tqdm(TIMES, "errors", unit="time"):
        batch, other = (queries(b, num_queries, time, time) for b in (bank, pixels))
        truth = exact_mean(batch.x_t, batch.t, bank)
        exact = Oracle(bank, PATH).posterior(batch.x_t, batch.t)
        means = {
            "oracle, float32 rows": exact.mean,
            "oracle, float32 rows, tolerance 0": Oracle(bank, PATH, tolerance=0).posterior(batch.x_t, batch.t).mean,
            "oracle with the GPU's split products": _split(Oracle(bank, PATH), batch),
            "plain softmax, float32": full_softmax(batch.flat, batch.t, rows, square),
            "plain softmax, bfloat16 products": full_softmax(batch.flat, batch.t, halves, square),
        }
        for name, mean in means.items():
            found[name].append(error(mean, truth, bank))
        mean = Oracle(pixels, PATH).posterior(other.x_t, other.t).mean
        found["oracle, 8-bit rows"].append(error(mean, exact_mean(other.x_t, other.t, pixels), pixels))
        found["top1"].append(float(exact.top1.mean()))
    return found


def _call(oracle: Oracle, batch: Queries) -> Callable[[], object]:
    return lambda: oracle.posterior(batch.x_t, batch.t)


def _split(oracle: Oracle, batch: Queries) -> Tensor:
    with mock.patch.object(stream, "products", SplitProducts):
        return oracle.posterior(batch.x_t, batch.t).mean


def draw(data: dict) -> Figure:
    """The figure of the numbers that `main` writes."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _cost(left, data)
    _error(right, data)
    figure.suptitle("The exact oracle on a CPU", fontsize=12)
    return figure


def _cost(axes: Axes, data: dict) -> None:
    sizes = data["sizes"]
    for name, ms in data["cost_ms"].items():
        colour, line, marker = STYLES[name]
        axes.plot(sizes, ms, color=colour, ls=line, marker=marker, ms=4, label=name)
    last = data["cost_ms"]["two float32 products"][-1]
    axes.plot([sizes[0], sizes[-1]], [last * sizes[0] / sizes[-1], last], color="0.8", lw=5, zorder=-1,
              label="proportional to N")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("N, rows of the bank")
    axes.set_ylabel(f"ms for {data['num_queries']} queries, threads: {data['threads']}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_title(f"cost: {NUM_DIMS} values per row", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", fontsize=8)


def _error(axes: Axes, data: dict) -> None:
    times = data["times"]
    for name, values in data["error"].items():
        if name == "top1":
            continue
        colour, line, marker = STYLES[name]
        hollow = {"mfc": "none", "ms": 8} if marker == "s" else {"ms": 4}  # it lies on another line
        axes.plot(times, [max(v, FOOT) for v in values], color=colour, ls=line, marker=marker, label=name, **hollow)
    collapse = next((t for t, top1 in zip(times, data["error"]["top1"], strict=True) if top1 >= 0.5), None)
    if collapse is not None:
        axes.axvline(collapse, color="0.7", lw=0.8)
        axes.text(collapse, 1, " mean top1 reaches 0.5", transform=axes.get_xaxis_transform(), va="bottom",
                  fontsize=8, color="0.35")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(FOOT / 2, 30)
    axes.set_xlim(0, 1)
    axes.set_xlabel("t   (0 = noise, 1 = data)")
    axes.set_ylabel(f"error of m, largest of {data['error_queries']} queries")
    axes.text(0.99, FOOT * 2, f"{FOOT:g} or less", ha="right", va="bottom", fontsize=8, color="0.35")
    axes.set_title(f"error: {data['bank']}", fontsize=10, pad=16)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", fontsize=8, ncols=2)


def main() -> None:
    made = parser(__doc__, rounds=7, of_what="pairs timed for each N")
    made.add_argument("--queries", type=positive, default=256, help="queries B of the cost (default: 256)")
    made.add_argument("--error-queries", type=positive, default=32, help="queries of the error (default: 32)")
    made.add_argument("--sizes", type=positive, nargs="*", default=SIZES, help="bank rows of the cost")
    made.add_argument("--rows", type=positive, default=60_000, help="bank rows of the error (default: 60000)")
    made.add_argument("--out", type=Path, default=IMAGE, help="the PNG (default: in docs/images)")
    made.add_argument("--redraw", action="store_true", help="draw the numbers that are there")
    options = made.parse_args()
    numbers = options.out.with_suffix(".json")
    if not options.redraw:
        with full_precision_products():
            bank, name = load_bank(options.rows, "cpu")
            data = {
                "bank": name,
                "machine": machine(),
                "threads": torch.get_num_threads(),
                "num_queries": options.queries,
                "sizes": list(options.sizes),
                "cost_ms": costs(options.sizes, options.queries, options.rounds),
                "error_queries": options.error_queries,
                "times": list(TIMES),
                "error": errors(bank, options.error_queries),
            }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{save(draw(json.loads(numbers.read_text())), options.out)} and {numbers.name}")


if __name__ == "__main__":
    main()
