"""What do the oracle targets cost beside a training step, and what do stratified draws of t save?

Cost: steps (forward, backward, AdamW) on batches of Fashion-MNIST with the conditional and with another target, in
turn; the table says how much longer a step takes. Labels are dropped with probability 0.1, as in training. Distances to
nearest neighbours are known, as they are in training where that pays. Networks: DiT-S/4 at batch 256, and the small
default of configs/fashion_mnist_dit.yaml at its batch of 128.

Draws: the loss of a batch, once the small network has left its zero start, with one draw of t in each stratum and with
independent draws, on the same images, noise and labels; the variance over batches, and the ratio.
"""

from __future__ import annotations

from functools import partial

import torch
from banks import PATH, load_bank
from timing import alternate, full_precision_products, machine, parser, spread, table
from torch import Tensor, nn
from tqdm import tqdm

from fm_stages.flow import keyed_generator, keyed_normal, stratified_uniform
from fm_stages.networks import DiT
from fm_stages.oracle import DataBank, Oracle, measure_nearest
from fm_stages.training import ClassSubsetTarget, ConditionalTarget, HybridTarget, OracleTarget, Target

BOUNDARY = 0.308
"""Of Fashion-MNIST with 10 % of the labels dropped."""

WARM_UP_STEPS, NUM_BATCHES = 300, 200
NETWORKS = {
    "DiT-S/4, batch 256": ({"hidden_size": 384, "depth": 12, "num_heads": 6}, 256),
    "small default, batch 128": ({"hidden_size": 128, "depth": 4, "num_heads": 4}, 128),
}


class Training:
    """A network and its optimizer, and batches by step."""

    def __init__(self, bank: DataBank, size: dict[str, int], batch_size: int) -> None:
        torch.manual_seed(0)
        self.bank, self.batch_size = bank, batch_size
        self.network: nn.Module = DiT(28, 4, 1, num_classes=10, **size)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def batch(self, step: int, stratified: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x0, x1, t, labels after dropout, index."""
        generator, num = keyed_generator("benchmark step", step), self.batch_size
        index = torch.randint(self.bank.num_rows, (num,), generator=generator)
        labels = torch.where(torch.rand(num, generator=generator) < 0.1, -1, self.bank.labels_of(index))
        x0 = keyed_normal(("benchmark noise", step), torch.arange(num), self.bank.shape)
        strata = stratified_uniform(("benchmark t", step), torch.arange(num), num)
        t = strata if stratified else torch.rand(num, generator=generator)
        return x0, self.bank.rows(index), t, labels, index

    def error(self, target: Target, step: int, stratified: bool = True) -> Tensor:
        """Squared error per value of each sample (B,)."""
        x0, x1, t, labels, index = self.batch(step, stratified)
        target.step = step
        velocity = target(PATH, x0, x1, t, labels, index)
        prediction = self.network(PATH.interpolate(x0, x1, t), t, labels)
        return (prediction - velocity).square().flatten(1).mean(1)

    def step(self, target: Target, step: int) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        self.error(target, step).mean().backward()
        self.optimizer.step()


def costs(bank: DataBank, rounds: int) -> list[list[str]]:
    """Rows of the table of costs."""
    oracle, lines = Oracle(bank, PATH), []
    targets: dict[str, Target] = {
        "oracle": OracleTarget(),
        f"hybrid, boundary {BOUNDARY}": HybridTarget(BOUNDARY),
        "256 rows of each class": ClassSubsetTarget(),
    }
    for target in targets.values():
        target.attach(oracle)
    for name, (size, batch_size) in NETWORKS.items():
        training = Training(bank, size, batch_size)
        usual = partial(training.step, ConditionalTarget(), 0)
        cases = {kind: (usual, partial(training.step, target, 0)) for kind, target in targets.items()}
        for kind, pairs in alternate(cases, rounds).items():
            more = [100 * (ratio - 1) for ratio in pairs.ratios]
            step_ms = f"{1e3 * sorted(pairs.a)[len(pairs.a) // 2]:.0f}"
            lines.append([name, kind, step_ms, *spread(more, ".1f"), "<= 5" if "S/4" in name else "-"])
    return lines


def variances(bank: DataBank) -> list[str]:
    """Row of the table of draws."""
    training, target = Training(bank, *NETWORKS["small default, batch 128"]), ConditionalTarget()
    for step in tqdm(range(WARM_UP_STEPS), desc="leaving the start"):
        training.step(target, step)
    with torch.no_grad():
        steps = tqdm(range(WARM_UP_STEPS, WARM_UP_STEPS + NUM_BATCHES), desc="losses")
        losses = torch.tensor([[training.error(target, k, s).mean().item() for s in (True, False)] for k in steps])
    stratified, independent = losses.double().var(0).tolist()
    return [f"{stratified:.2e}", f"{independent:.2e}", f"{independent / stratified:.1f}", ">= 2"]


def main() -> None:
    options = parser(__doc__, rounds=5, of_what="pairs of steps of each case")
    options.add_argument("--rows", type=int, default=60_000)
    chosen = options.parse_args()
    bank, name = load_bank(chosen.rows, "cpu")
    measure_nearest(bank)
    print(f"{name}; {machine()}\n")
    with full_precision_products():
        print(
            table(
                ["network", "target", "conditional step, ms", "longer by, %", "min - max", "goal"],
                costs(bank, chosen.rounds),
            )
        )
        print()
        header = ["variance of the loss, stratified t", "independent t", "ratio", "goal"]
        print(table(header, [variances(bank)]))


if __name__ == "__main__":
    main()
