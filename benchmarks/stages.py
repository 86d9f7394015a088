"""How long does it take to measure the stages of a training set, how sure are they, and are they right?

`StageProfile.measure` of Fashion-MNIST's 60 000 rows as ``fm-stages profile`` calls it: every draw with and without
label, at 32 times. The largest standard error of the mean top1 says how sure it is. Then the posterior of the same
draws at the boundary that was found is computed from the rows themselves in float64: its median top1 should be a half.

--rows and --dims take random rows in place of Fashion-MNIST, stored as --dtype says, with 1000 classes: --rows 1281167
--dims 4096 --dtype bfloat16 --device cuda is a bank of ImageNet's size. Those rows are farther apart than latents, so
that the posterior collapses earlier; where it is dense the cost is that of any data.
"""

from __future__ import annotations

import torch
from banks import PATH, load_bank, random_rows
from timing import machine, parser, positive, seconds, table
from torch import Tensor
from tqdm import tqdm

from fm_stages.flow import keyed_generator, keyed_normal
from fm_stages.oracle import DataBank, Oracle, StageProfile

NUM_QUERIES, NUM_TIMES = 1024, 32
PIECE = 4096


def top1_in_float64(bank: DataBank, t: float, num_queries: int, seed: int) -> Tensor:
    """Largest posterior weight (Q,) of the draws that `StageProfile.measure` makes with a seed, without labels."""
    index = torch.randint(bank.num_rows, (num_queries,), generator=keyed_generator("profile", seed))
    x0 = keyed_normal(("profile noise", seed), torch.arange(num_queries), bank.shape).to(bank.device)
    times = torch.full((num_queries,), t, device=bank.device)
    x_t = PATH.interpolate(x0, bank.rows(index), times).flatten(1).double()
    a, s = PATH.alpha(times[:1].double()), PATH.sigma(times[:1].double())
    best = torch.full((num_queries,), -torch.inf, dtype=torch.float64, device=bank.device)
    total = torch.zeros_like(best)
    for piece in torch.arange(bank.num_rows).split(PIECE):
        rows = bank.rows(piece).flatten(1).double()
        logits = a / s**2 * (x_t @ rows.T) - a**2 / (2 * s**2) * rows.square().sum(1)  # (Q, C)
        higher = torch.maximum(best, logits.amax(1))
        total = total * (best - higher).exp() + (logits - higher[:, None]).exp().sum(1)
        best = higher
    return 1 / total


def main() -> None:
    options = parser(__doc__, rounds=3, of_what="seeds")
    options.add_argument("--rows", type=positive, default=60_000)
    options.add_argument("--dims", type=positive, help="random rows with so many values")
    options.add_argument("--dtype", default="float32", help="what random rows are stored as")
    options.add_argument("--queries", type=positive, default=NUM_QUERIES)
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    print(machine(chosen.device))
    if chosen.dims:
        x1, scale, shift = random_rows(chosen.rows, chosen.dims, getattr(torch, chosen.dtype), chosen.device)
        labels = torch.randint(1000, (chosen.rows,), generator=keyed_generator("benchmark labels")).to(chosen.device)
        bank, name = DataBank(x1, labels, scale, shift), f"random rows, {chosen.rows} x {chosen.dims} {chosen.dtype}"
        del x1
    else:
        bank, name = load_bank(chosen.rows, chosen.device)
    oracle, lines = Oracle(bank, PATH), []
    for seed_ in tqdm(range(chosen.rounds), desc="seeds"):
        found: list[StageProfile] = []

        def measure(seed: int = seed_, found: list[StageProfile] = found) -> None:
            found.append(
                StageProfile.measure(oracle, 0.1, chosen.queries, seed, NUM_TIMES, by_label=True, progress=True)
            )

        took = seconds(measure, chosen.device)
        curves = found[0].unconditional
        assert curves is not None
        brute = top1_in_float64(bank, curves.boundary, chosen.queries, seed_).median().item()
        lines.append(
            [
                str(seed_),
                f"{took:.0f}",
                f"{max(curves.sem['top1']):.4f}",
                f"{curves.boundary:.4f} ± {curves.time_sem['boundary']:.4f}",
                f"{brute:.3f}",
                f"{found[0].boundary:.4f} ± {found[0].time_sem['boundary']:.4f}",
            ]
        )
    print(f"\n{name}, {chosen.queries} draws, {NUM_TIMES} times, with and without labels\n")
    header = ["seed", "seconds", "largest error of top1", "boundary, no labels", "median top1 there, float64",
              "boundary, 10 % unlabelled"]  # fmt: skip
    print(table(header, lines))


if __name__ == "__main__":
    main()
