"""How fast is a training step, beside a bare loop over the published SiT layout?

A is a plain loop as SiT's train.py has it (forward, mean square, backward, AdamW, an average of the weights one
parameter after the other), over the layout of its transformer written down here. B is the Trainer with FlowMatching and
DiT: the same sizes, weights, batch and precision. Both take random latents (4, 32, 32) with labels of 1000 classes.
Blocks of steps alternate within one Trainer.fit.

On a GPU both run under bfloat16 autocast, and B compiles its blocks; on a CPU both are float32 and nothing is compiled.
That both networks are the same function is checked first.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from copy import deepcopy

import lightning as L
import torch
from lightning_overhead import WARM_UP, Alternate
from timing import machine, parser, positive, spread, table
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fm_stages.networks import DiT_B, DiT_S
from fm_stages.training import FlowMatching

SIZES = {"DiT-S/2": DiT_S, "DiT-B/2": DiT_B}
SHAPE, NUM_CLASSES = (4, 32, 32), 1000
EMA_DECAY = 0.9999


class PlainBlock(nn.Module):
    """A block of SiT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class PlainSiT(nn.Module):
    """SiT's forward pass, over the weights of a DiT whose head has no learned sigma."""

    def __init__(self, network: DiT_S | DiT_B) -> None:
        super().__init__()
        self.width, self.patch = network.pos_embed.shape[2], network.patch_size
        self.num_classes = network.num_classes
        self.x_embedder, self.t_mlp = deepcopy(network.x_embedder), deepcopy(network.t_embedder.mlp)
        self.table = deepcopy(network.y_embedder.embedding_table)
        self.pos_embed = nn.Parameter(network.pos_embed.clone(), requires_grad=False)
        heads = network.blocks[0].attn.num_heads
        self.blocks = nn.ModuleList(PlainBlock(self.width, heads) for _ in network.blocks)
        self.blocks.load_state_dict(network.blocks.state_dict())
        self.norm_final = nn.LayerNorm(self.width, elementwise_affine=False, eps=1e-6)
        self.linear = deepcopy(network.final_layer.linear)
        self.adaLN_modulation = deepcopy(network.final_layer.adaLN_modulation)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = 128
        freqs = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / half).to(t.device)
        args = t[:, None].float() * freqs[None]
        c = self.t_mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1)) + self.table(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = self.linear(_modulate(self.norm_final(x), shift, scale))
        side, p = int(x.shape[1] ** 0.5), self.patch
        x = x.reshape(len(x), side, side, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, side * p, side * p)


class PlainLoop:
    """The loop around it, with fresh random numbers at each step."""

    def __init__(self, network: DiT_S | DiT_B, x1: Tensor, labels: Tensor) -> None:
        self.network = PlainSiT(network)
        self.average = deepcopy(self.network)
        self.x1, self.labels = x1, labels

    def to(self, device: torch.device) -> None:
        """Move to the device, and make the optimizer."""
        self.device = device
        self.network.to(device)
        self.average.to(device)
        self.x1, self.labels = self.x1.to(device), self.labels.to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=0)

    def run(self, num_steps: int) -> None:
        """Train."""
        for _ in range(num_steps):
            dropped = torch.rand(len(self.labels), device=self.device) < 0.1
            y = torch.where(dropped, NUM_CLASSES, self.labels)
            t = torch.rand(len(self.x1), device=self.device)
            x0 = torch.randn_like(self.x1)
            wide = t[:, None, None, None]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                v = self.network(wide * self.x1 + (1 - wide) * x0, t, y)
            loss = (v.float() - (self.x1 - x0)).square().flatten(1).mean(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                for kept, current in zip(self.average.parameters(), self.network.parameters(), strict=True):
                    kept.mul_(EMA_DECAY).add_(current.data, alpha=1 - EMA_DECAY)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def check_same(network: DiT_S | DiT_B, plain: PlainSiT) -> float:
    """The largest difference of the two velocities, with weights that are not zero."""
    generator = torch.Generator().manual_seed(1)
    trial, other = deepcopy(network), deepcopy(plain)
    with torch.no_grad():
        ours, theirs = trial.final_layer, other
        for a, b in ((ours.linear, theirs.linear), (ours.adaLN_modulation[1], theirs.adaLN_modulation[1])):
            a.weight.normal_(std=0.02, generator=generator)
            b.weight.copy_(a.weight)
        for a, b in zip(trial.blocks, other.blocks, strict=True):
            a.adaLN_modulation[1].weight.normal_(std=0.02, generator=generator)
            b.adaLN_modulation[1].weight.copy_(a.adaLN_modulation[1].weight)
        x = torch.randn(2, *SHAPE, generator=generator)
        t, y = torch.tensor([0.2, 0.7]), torch.tensor([3, 7])
        return (trial(x, t, y) - other(x, t, y)).abs().max().item()


def measure(kind: type[DiT_S | DiT_B], batch_size: int, steps: int, rounds: int) -> Alternate:
    """Alternate blocks of both loops."""
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    network = kind(32, 2, 4, NUM_CLASSES, **({"compile_blocks": True} if cuda else {}))
    x1 = torch.randn(batch_size, *SHAPE)
    labels = torch.randint(NUM_CLASSES, (batch_size,))
    plain = PlainLoop(network, x1, labels)
    if (difference := check_same(network, plain.network)) > 1e-5:
        raise SystemExit(f"the two networks differ by {difference:.2g}")
    module = FlowMatching(
        network, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0), ema_decay=EMA_DECAY
    )
    with tqdm(total=rounds, desc=kind.__name__, unit="pair") as bar:
        alternate = Alternate(plain, steps, bar)
        trainer = L.Trainer(
            max_steps=WARM_UP + steps * rounds,
            precision="bf16-mixed" if cuda else "32-true",
            callbacks=[alternate],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        row = {"x1": x1, "labels": labels}
        trainer.fit(module, DataLoader([row] * 1000, batch_size=None))
    return alternate


def main() -> None:
    made = parser(__doc__, rounds=5, of_what="pairs of blocks")
    made.add_argument("--steps", type=positive, default=2, help="steps of a block (default: 2)")
    made.add_argument("--batch_size", type=positive, default=8, help="(default: 8)")
    options = made.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    rows = []
    for name, kind in SIZES.items():
        pairs = measure(kind, options.batch_size, options.steps, options.rounds).pairs
        per_step = [1e3 * x / options.steps for x in pairs.b]
        rows.append(
            [
                name,
                *spread([a / b for a, b in zip(pairs.a, pairs.b, strict=True)]),
                f"{statistics.median(per_step):.0f}",
            ]
        )
    print(f"\nbatch {options.batch_size}; {machine('cuda' if torch.cuda.is_available() else 'cpu')}\n")
    print(table(["network", "bare loop over ours", "min - max", "a step of ours, ms"], rows))


if __name__ == "__main__":
    main()
