"""Drawing images from a velocity network: the same seed and index give the same noise, whatever the batch."""

import torch
from torch import Tensor, nn

from fm_stages.flow.generators import keyed_normal
from fm_stages.flow.solvers import euler, time_grid


@torch.no_grad()
def sample(
    network: nn.Module,
    labels: Tensor,
    shape: tuple[int, ...],
    seed: int = 0,
    num_steps: int = 50,
    shift: float = 1.0,
) -> Tensor:
    """Images drawn by Euler steps from noise to data; ``num_steps`` network evaluations.

    Args:
        network: ``network(x, t, y) -> velocity``.
        labels: (B,) int64 classes, -1 = unconditional. Image i starts from noise i of the seed.
        shape: (C, H, W) of one image.
        seed: of the noise.
        num_steps: number of solver steps.
        shift: of the time grid; > 1 puts more steps near noise.

    Returns:
        (B, C, H, W) float32, in the units of the data the network was trained on.
    """
    # drawn on the CPU, so that one seed means one picture on every machine
    x0 = keyed_normal(("sample", seed), torch.arange(labels.shape[0]), shape).to(labels.device)
    return euler(lambda x, t: network(x, t, labels).float(), x0, time_grid(num_steps, shift))
