"""Does drawing images keep up with the network's forward passes?

A is `sample` with Euler steps: noise from its generators, the steps, the guidance. B is as many forward passes of the
same network on batches of the same sizes, on one x, with nothing between them; with guidance each of them is given
twice the samples. The table has the throughput of A over that of B. Files are not part of it: `fm-stages sample` writes
them while the next batch is drawn.

On a CPU both are float32, on a GPU both run under bfloat16 autocast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch
from timing import alternate, full_precision_products, machine, parser, positive, spread, table
from torch import Tensor, nn

from fm_stages.flow import Guidance, sample
from fm_stages.networks import DiT, DiT_B, DiT_S

LATENT, GREY = (4, 32, 32), (1, 28, 28)
GUIDANCE = Guidance(1.5)


def network_of(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network whose velocity is not zero, in evaluation mode, and the shape of its images."""
    torch.manual_seed(0)
    if name == "small":
        network: nn.Module = DiT(28, 4, 1, hidden_size=128, depth=4, num_heads=4, num_classes=10)
    else:
        network = {"DiT-S/2": DiT_S, "DiT-B/2": DiT_B}[name](32, 2, 4, num_classes=1000)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.02)
    return network.eval().requires_grad_(False), GREY if name == "small" else LATENT


@torch.no_grad()
def forwards(network: nn.Module, x: Tensor, labels: Tensor, num: int) -> None:
    """Nothing but passes of the network, at times in [0, 1)."""
    for t in torch.linspace(0, 1, num + 1, device=x.device)[:-1]:
        network(x, t.expand(len(x)), labels)


def main() -> None:
    options = parser(__doc__, rounds=5, of_what="pairs of each network")
    options.add_argument("--networks", nargs="+", default=["small", "DiT-S/2"], choices=["small", "DiT-S/2", "DiT-B/2"])
    options.add_argument("--batch_size", type=positive, default=16)
    options.add_argument("--num_steps", type=positive, default=10)
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    device, steps = torch.device(chosen.device), chosen.num_steps
    labels = torch.arange(chosen.batch_size, device=device) % 10
    print(f"batch {chosen.batch_size}, {steps} Euler steps; {machine(device)}\n")
    lines = []
    for name in chosen.networks:
        network, shape = network_of(name)
        network.to(device)
        cases = {}
        for kind, guidance, times in (("none", None, 1), (f"{GUIDANCE.scale}", GUIDANCE, 2)):
            x = torch.randn(times * len(labels), *shape, device=device)
            drawn = partial(sample, network, labels, shape, num_steps=steps, guidance=guidance)
            cases[kind] = drawn, partial(forwards, network, x, labels.repeat(times), steps)
        on_gpu: AbstractContextManager = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with full_precision_products(), on_gpu:
            for kind, pairs in alternate(cases, chosen.rounds, device).items():
                per_sec = chosen.batch_size / sorted(pairs.a)[len(pairs.a) // 2]
                share = [100 * ratio for ratio in pairs.ratios]
                lines.append([name, kind, f"{per_sec:.3g}", *spread(share, ".1f"), ">= 97"])
    print(table(["network", "guidance", "images/s", "of the forward throughput, %", "min - max", "goal"], lines))


if __name__ == "__main__":
    main()
