"""Does the search for nearest training rows cost more than the one matrix product that it needs?

A is the product of samples with all rows of Fashion-MNIST, float32, in pieces of the sizes that the search takes. B is
`nearest_rows` of the same samples, the held-out images, which is exact: product, choice of candidates, their distances
in float64. The bank holds bytes, as training has it, or float32. The table has B over A.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import alternate, full_precision_products, machine, parser, positive, spread, table
from torch import Tensor

from fm_stages.data import FashionMNIST
from fm_stages.oracle import DataBank, nearest_rows
from fm_stages.oracle.neighbours import piece_sizes


def product(rows: Tensor, samples: Tensor, num_queries: int, num_rows: int) -> None:
    """Samples (B, D) times rows (N, D), nothing kept."""
    out = samples.new_empty(num_queries, num_rows)
    for queries in samples.split(num_queries):
        for part in rows.split(num_rows):
            torch.mm(queries, part.T, out=out[: len(queries), : len(part)])


def main() -> None:
    options = parser(__doc__, rounds=5, of_what="pairs of each bank")
    options.add_argument("--num_samples", type=positive, default=10_000, help="of the 10 000 held-out images")
    options.add_argument("--nums", type=positive, nargs="+", default=[2, 3], help="how many nearest rows")
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    data = FashionMNIST()
    data.setup()
    samples = next(iter(FashionMNIST(val_batch_size=chosen.num_samples).val_dataloader()))["x1"].to(device)
    in_bytes = data.bank().to(device)
    rows = in_bytes.rows(torch.arange(len(in_bytes), device=device))
    banks = {"uint8": in_bytes, "float32": DataBank(rows)}
    sizes = piece_sizes(in_bytes)
    plain = partial(product, rows.flatten(1), samples.flatten(1), *sizes)
    cases = {
        (name, num): (plain, partial(nearest_rows, bank, samples, num)) for name, bank in banks.items()
        for num in chosen.nums
    }  # fmt: skip
    print(f"{len(samples)} samples, {len(rows)} rows, {sizes[0]} x {sizes[1]} a piece; {machine(device)}\n")
    with full_precision_products():
        timed = alternate(cases, chosen.rounds, device)
    lines = [
        [name, num, *spread(pairs.a), spread(pairs.b)[0], *spread(pairs.ratios), "<= 1.2"]
        for (name, num), pairs in timed.items()
    ]
    header = ["bank", "nearest", "product, s", "min - max", "search, s", "ratio", "min - max", "goal"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
