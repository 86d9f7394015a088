"""What does the exact oracle cost on one GPU at ImageNet's size, over its products in float32 and over a training step?

Products: `Oracle.posterior` of B queries over N rows of D values that are stored in float32, uint8 or bfloat16, and the
two products that a dense posterior needs, x_t @ X.T and G @ X, in torch's float32 ("highest") on float32 rows. They are
timed in turn; the table says how many times as long the products take. Error: of the posterior mean against float64,
||m - m_64|| over the root mean square norm of the rows, largest of a few queries.

Training: `Oracle.target` over a step of DiT-XL/2 on the same B (forward, backward, AdamW; bfloat16 autocast, each block
under torch.utils.checkpoint), in one run, with the bank in bfloat16. "Dense" leaves nothing out (tolerance 0, t in
(0, 0.1)); "skipping" is uniform t with nearest neighbours known. Their distances are measured, but only for the rows of
the batch, which alone are looked up.

Rows are uniform in [-1, 1], drawn on the device piece by piece: farther apart than latents, so that the posterior
collapses and skipping begins earlier than on images (mean top1 is printed). A dense posterior costs the same on any
data.

--tiny runs all of it in seconds, on a CPU as well: that is a test of this script and no measurement.
Shapes: B queries, N rows, D = 4 S S values per row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from banks import PATH, Queries, queries, random_labels, random_rows
from memory import peak_bytes
from peers import error, exact_mean, measure_nearest_of, two_products
from timing import alternate, full_precision_products, machine, parser, positive, spread, table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from fm_stages.networks import DiT, DiT_XL
from fm_stages.oracle import DataBank, Oracle

STORED = {torch.float32: 2, torch.uint8: 3, torch.bfloat16: 3}
"""What rows are stored as, the one that trains last, and how many times as fast as the products it should be."""

TINY = {"rows": 3000, "dims": 64, "queries": 16, "classes": 10, "rounds": 2}
ERROR_TIMES = (0.02, 0.05, 0.1, 0.3, 0.7)
CHANNELS = 4
MIB = 2**20


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return checkpoint(self.block, x, condition, use_reentrant=False)


class TrainingStep:
    """A step on one batch, over and over.

    Args:
        network: its blocks are put under activation checkpointing.
        batch: what to train on, (B, C, S, S).
        classes: number of labels.
    """

    def __init__(self, network: DiT, batch: Queries) -> None:
        network.blocks = nn.ModuleList(Checkpointed(block) for block in network.blocks)
        self.network, self.batch = network.to(batch.t.device), batch
        self.device = batch.t.device.type
        weights = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=self.device == "cuda")
        self.target = PATH.velocity(batch.x0, batch.x1, batch.t)

    def __call__(self) -> None:
        batch = self.batch
        with torch.autocast(self.device, torch.bfloat16):
            prediction = self.network(batch.x_t, batch.t, batch.labels)
        loss = (prediction.float() - self.target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def make_bank(options, dtype: torch.dtype) -> tuple[DataBank, float]:
    """A bank of random rows (N, C, S, S) built on the device, and the seconds that took."""
    side = math.isqrt(options.dims // CHANNELS)
    x1, scale, shift = random_rows(options.rows, CHANNELS * side**2, dtype, options.device)
    labels = random_labels(options.rows, options.classes, options.device)
    start = time.perf_counter()
    bank = DataBank(x1.view(options.rows, CHANNELS, side, side), labels, scale, shift)
    return bank, time.perf_counter() - start


def against_products(bank: DataBank, products: Callable[[], None], goal: int, options) -> list[list[str]]:
    """Rows of the table of products, for one way to store rows."""
    name = str(bank.dtype).removeprefix("torch.")
    batches = {"t in (0, 1)": (queries(bank, options.queries, 0, 1), 1e-6, f">= {goal}")}
    batches["dense"] = queries(bank, options.queries, 0, 0.1), 0, f">= {goal}"
    oracles = {case: Oracle(bank, PATH, tolerance) for case, (_, tolerance, _) in batches.items()}

    def posterior(case: str) -> Callable[[], object]:
        return lambda: oracles[case].posterior(batches[case][0].x_t, batches[case][0].t)

    timed = alternate({case: (posterior(case), products) for case in batches}, options.rounds, bank.device)
    lines = []
    for case, (batch, _, said) in batches.items():
        memory = peak_bytes(posterior(case), bank.device)[0]
        top1 = oracles[case].posterior(batch.x_t, batch.t).top1.mean()
        pairs = timed[case]
        ms = [f"{1e3 * statistics.median(times):.2f}" for times in (pairs.a, pairs.b)]
        lines.append([f"{name}, {case}", *ms, *spread(pairs.ratios), said, f"{memory / MIB:.0f}", f"{top1:.2f}"])
    return lines


def largest_error(bank: DataBank, num: int) -> float:
    """Of the posterior mean, at several times."""
    oracle, errors = Oracle(bank, PATH), []
    for t in tqdm(ERROR_TIMES, f"errors, {bank.dtype}", unit="time"):
        batch = queries(bank, num, t, t)
        errors.append(error(oracle.posterior(batch.x_t, batch.t).mean, exact_mean(batch.x_t, batch.t, bank), bank))
    return max(errors)


def against_training(bank: DataBank, options) -> list[list[str]]:
    """Rows of the table of training."""
    anywhere, early = queries(bank, options.queries, 0, 1), queries(bank, options.queries, 0, 0.1)
    side = bank.shape[-1]
    torch.manual_seed(0)
    if options.tiny:
        network = DiT(side, 2, CHANNELS, hidden_size=32, depth=2, num_heads=2, num_classes=options.classes)
    else:
        network = DiT_XL(side, 2, CHANNELS, num_classes=options.classes)
    step = TrainingStep(network, anywhere)
    measure_nearest_of(bank, anywhere.index)
    oracle, everything = Oracle(bank, PATH), Oracle(bank, PATH, tolerance=0)

    def target(oracle: Oracle, batch: Queries, own_class: bool, index: bool) -> Callable[[], object]:
        labels, rows = batch.labels if own_class else None, batch.index if index else None
        return lambda: oracle.target(batch.x0, batch.x1, batch.t, labels, rows)

    goals = {
        "dense": (target(everything, early, False, False), "<= 6 %"),
        "t in (0, 1), nothing skipped": (target(oracle, anywhere, False, False), "-"),
        "t in (0, 1), skipping": (target(oracle, anywhere, False, True), "<= 2 %"),
        "own class, dense": (target(everything, early, True, False), "<= 0.5 %"),
        "own class, t in (0, 1), skipping": (target(oracle, anywhere, True, True), "<= 0.5 %"),
    }
    timed = alternate({name: (step, work) for name, (work, _) in goals.items()}, options.rounds, bank.device)
    lines = []
    for name, (_, goal) in goals.items():
        pairs = timed[name]
        ms = [f"{1e3 * statistics.median(times):.2f}" for times in (pairs.b, pairs.a)]
        lines.append([name, *ms, *spread([100 * ratio for ratio in pairs.ratios]), goal])
    return lines


def main() -> None:
    made = parser(__doc__, rounds=10, of_what="pairs timed for each case")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any")
    made.add_argument("--tiny", action="store_true", help="a test of this script, on any device")
    made.add_argument("--rows", type=positive, default=1_281_167, help="bank rows N (default: ImageNet's)")
    made.add_argument("--dims", type=positive, default=4096, help="values D per row, 4 S S (default: 4096)")
    made.add_argument("--queries", type=positive, default=256, help="queries B (default: 256)")
    made.add_argument("--classes", type=positive, default=1000, help="labels (default: 1000)")
    options = made.parse_args()
    cpu = torch.device(options.device).type == "cpu"
    if cpu and not options.tiny:
        print("No CUDA device: not run. --tiny tries the script on a CPU.")
        return
    if options.tiny:
        vars(options).update(TINY)
        print(f"{'CPU' if cpu else 'GPU'}, tiny: not the benchmark\n")
    size = f"{options.rows} x {options.dims}, {options.classes} classes"
    print(f"{size}, {options.queries} queries, {options.rounds} rounds; {machine(options.device)}", flush=True)

    lines, notes = [], []
    with full_precision_products():
        rows = random_rows(options.rows, options.dims, torch.float32, options.device)[0]
        products = two_products(torch.rand(options.queries, options.dims, device=options.device), rows)
        bank = None
        for dtype, goal in STORED.items():
            del bank  # one at a time beside the rows
            bank, sec = make_bank(options, dtype)
            lines += against_products(bank, products, goal, options)
            worst = largest_error(bank, min(16, options.queries))
            notes.append(f"{dtype}: built in {sec:.0f} s, error of m up to {worst:.1e} (goal: 1e-5)")
        del rows, products
        header = ["rows, case", "oracle, ms", "products, ms", "products / oracle, median", "min - max", "goal",
                  "memory, MiB (goal: 2048)", "mean top1"]  # fmt: skip
        print("\n" + table(header, lines) + "\n\n" + "\n".join(notes), flush=True)
    if not cpu:
        torch.cuda.empty_cache()
    header = ["rows in bfloat16", "oracle, ms", "step, ms", "oracle / step, %, median", "min - max", "goal"]
    print("\n" + table(header, against_training(bank, options)))


if __name__ == "__main__":
    main()
