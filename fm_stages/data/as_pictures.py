"""How rows of a training set are shown: images as they are, latents decoded, or else by their first channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fm_stages.data.loading import to_model_range
from fm_stages.data.module import TrainingData
from fm_stages.flow import keyed_generator
from fm_stages.oracle import DataBank, GaussianMixtureBank, gather_objects

SPREAD = 2.5
"""Standard deviations of a latent channel on either side of its mean that are drawn from black to white."""

NUM_SAMPLED = 1024
"""Rows from which these are estimated."""

Pictures = Callable[[Tensor], np.ndarray]
"""Makes of rows (..., *shape of a row) pictures (..., H, W[, 3]) with values in [-1, 1]."""


def pictures_of(bank: DataBank | GaussianMixtureBank, data: object = None) -> tuple[Pictures, str] | None:
    """How rows are shown, and what is to be said about it; None for rows that are no pictures.

    Of a sharded bank every rank calls this.

    Args:
        bank: of the rows.
        data: the data module that they are of, which may know how to decode them.
    """
    can_decode = (
        isinstance(data, TrainingData)
        and len(bank.shape) == 3
        and data.picture_shape(data.shape) not in (None, bank.shape)
    )
    # each rank looks for a VAE by itself, and a node may lack it: without one the bank is asked, which all ranks do
    if isinstance(data, TrainingData) and all(gather_objects(can_decode, bank.group)):

        def decoded(x: Tensor) -> np.ndarray:
            pixels = data.to_pixels(x.flatten(0, -4)).unflatten(0, x.shape[:-3])
            return _to_numpy(to_model_range(pixels).movedim(-3, -1))

        return decoded, "; decoded by the VAE"
    if len(bank.shape) == 2:
        return _to_numpy, ""
    if len(bank.shape) != 3:
        return None
    channels = bank.shape[0]
    if channels == 1:
        return lambda x: _to_numpy(x[..., 0, :, :]), ""
    if channels == 3:
        return lambda x: _to_numpy(x.movedim(-3, -1)), ""
    generator = keyed_generator("pictures scale")
    index = torch.randint(bank.num_rows, (NUM_SAMPLED,), generator=generator)
    used = 3 if channels > 3 else 1
    std, centre = torch.std_mean(bank.draw(index, generator)[:, :used], (0, 2, 3))
    std = std.clamp(min=1e-6)  # a channel that is the same everywhere is grey, not 0 / 0

    def to_picture(x: Tensor) -> np.ndarray:
        channels_last = (x.to(centre).movedim(-3, -1)[..., :used] - centre) / (SPREAD * std)
        return _to_numpy(channels_last if used == 3 else channels_last[..., 0])

    which = "first three" if used == 3 else "first"
    return to_picture, f"; {which} of {channels} channels, mean ± {SPREAD} standard deviations"


def _to_numpy(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
