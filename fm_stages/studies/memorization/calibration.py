"""What calibrates a memorization number: images of a sampler that memorizes, and of one that cannot.

Both draw from the same noise with the same Euler steps. The memorizer follows the oracle velocity of the training set,
each image conditioned on the class of a random training image, and ends on training images. The non-memorizer follows
the Wiener velocity, which knows mean and covariance only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from fm_stages.flow import Path, Velocity, euler, keyed_generator, keyed_normal, time_grid
from fm_stages.oracle import DataBank, Oracle, Wiener

BATCH = 256
"""Images drawn together."""


def draw_calibration(
    bank: DataBank,
    path: Path,
    wiener: Wiener | None,
    index: Tensor,
    num: int,
    seed: int,
    num_steps: int,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Images of the memorizer and, where there is one, of the Wiener sampler.

    Args:
        bank: the training set.
        path: from noise to data.
        wiener: its linear reference, or None.
        index: (n,) int64 numbers of the images to draw, below ``num``.
        num: how many there are on all ranks.
        seed: of noise and classes.
        num_steps: Euler steps.
        progress: whether to show a bar.

    Returns:
        By name, (n, C, H, W) float32 on the bank's device.
    """
    sources = torch.randint(bank.num_rows, (num,), generator=keyed_generator("memorization classes", seed))
    labels = bank.labels_of(sources.to(bank.device))[index.to(bank.device)]
    oracle, grid = Oracle(bank, path), time_grid(num_steps)
    drawn: dict[str, list[Tensor]] = {"memorizer": [], **({} if wiener is None else {"wiener": []})}
    with tqdm(total=len(drawn) * len(index), desc="Calibration", unit="image", disable=not progress) as bar:
        for part in torch.arange(len(index)).split(BATCH) if len(index) else ():
            x0 = keyed_normal(("memorization calibration", seed), index[part], bank.shape).to(bank.device)
            for name, own in drawn.items():
                own.append(euler(_velocity(name, oracle, wiener, labels[part.to(labels.device)]), x0, grid))
                bar.update(len(part))
    nothing = torch.zeros(0, *bank.shape, device=bank.device)
    return {name: torch.cat([nothing, *own]) for name, own in drawn.items()}


def _velocity(name: str, oracle: Oracle, wiener: Wiener | None, labels: Tensor) -> Velocity:
    if name == "memorizer" or wiener is None:
        return lambda x, t: oracle.velocity(x, t, labels)
    return lambda x, t: oracle.path.velocity_from_mean(wiener.mean(x, t), x, t)
