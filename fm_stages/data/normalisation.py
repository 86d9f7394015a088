"""What makes of stored latents what a network sees: scale and shift, by channel statistics or by the VAE's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from warnings import warn

import torch
from torch import Tensor
from tqdm import tqdm

from fm_stages.data.foreign import load_tensors
from fm_stages.data.host import is_first_rank
from fm_stages.data.latent_index import INDEX, STATISTICS, LatentIndex, locked
from fm_stages.data.statistics import channel_statistics, write_statistics
from fm_stages.data.stored_rows import PIECE, StoredRows

Normalisation = Literal["channels", "vae", "none"]

LONGEST_SEC = 24 * 3600
"""How long a process waits for another that computes statistics: of a large set on a slow disk they take hours."""


def normalised(
    rows: StoredRows, place: Path, how: Normalisation, multiplier: float = 1.0, index: LatentIndex | None = None
) -> StoredRows:
    """Latents with the scale and shift that make of them what a network sees.

    - ``channels``: (z - mean) / std * multiplier, of each channel over all rows, flips too, from ``latents_stats.pt``.
      Where that is missing it is computed, once, by one process while the others wait, and written.
    - ``vae``: (z - shift_factor) * scaling_factor * multiplier, with the VAE's numbers out of the index.
    - ``none``: z * multiplier.

    Of moments the mean is normalised so, and the std multiplied by the same factor.

    Args:
        rows: (C, H, W) each, or (2, C, H, W) of moments.
        place: folder, or file, that they are in.
        how: one of the three.
        multiplier: of what has unit scale otherwise.
        index: of the folder, if it has one.

    Raises:
        ValueError: if there is no index for ``vae``, or the statistics do not fit.
    """
    if how == "channels":
        mean, std = _statistics(rows, place)
        scale, shift = (multiplier / std).float(), (-mean * multiplier / std).float()
    elif how == "none":
        scale, shift = torch.tensor(multiplier), torch.tensor(0.0)
    else:
        if index is None:
            raise ValueError(
                f"normalisation 'vae' takes scaling_factor and shift_factor from {INDEX}, which {place} lacks: choose "
                "'none' with multiplier set to the scaling factor, as 0.18215 of SD-VAE, or 'channels'"
            )
        factor = index.vae["scaling_factor"] * multiplier
        scale, shift = torch.tensor(factor), torch.tensor(-index.vae["shift_factor"] * factor)
    return rows._replace(scale=scale, shift=shift)


def statistics_file(place: Path) -> Path:
    """Where the statistics of a folder lie, or of a file: ``latents_stats.pt``, of a zip with its name before."""
    if place.is_dir():
        return place / STATISTICS
    return place.with_name(f"{place.stem}.{STATISTICS}" if place.suffix == ".zip" else STATISTICS)


def read_statistics(file: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and std, float64, that broadcast to rows of this shape (C, H, W).

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        stats = dict(load_tensors(file))
        mean, std = (stats[name].double().squeeze(0) for name in ("mean", "std"))
    except Exception as error:  # torch's message would advise to load it with weights_only=False
        raise ValueError(f"cannot read {file}: need torch.save of two tensors, {{'mean': ..., 'std': ...}}") from error
    for name, value in (("mean", mean), ("std", std)):
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{file}: {name} of shape {tuple(value.shape)} does not fit rows of shape {shape}")
    if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"{file}: mean and std must be finite, and std above 0 (its smallest value: {std.min():g})")
    return mean, std


def _statistics(rows: StoredRows, place: Path) -> tuple[Tensor, Tensor]:
    """Those of the file, which is written first if it is not there."""
    file, shape = statistics_file(place), rows.shape[-3:]
    if not file.exists():
        try:
            with locked(file.parent, "statistics", LONGEST_SEC):
                if not file.exists():  # nobody computed it while this process waited
                    write_statistics(file, _computed(rows, place))  # whichever rank was first
        except OSError as error:
            warn(
                f"{file} cannot be written ({error.strerror}), so that each process computes these statistics each "
                "time: let a process that may write there do it once",
                stacklevel=2,
            )
            found = _computed(rows, place, show=is_first_rank())
            return found["mean"][0].double(), found["std"][0].double()
    return read_statistics(file, shape)


def _computed(rows: StoredRows, place: Path, show: bool = True) -> dict[str, Tensor]:
    """Mean and std (1, C, 1, 1) over all rows, in blocks of fixed size, under a progress bar if it is to be shown."""
    blocks = torch.arange(rows.num_rows).split(PIECE)
    with tqdm(total=rows.num_rows, desc="Channel statistics", unit="row", delay=1, disable=not show) as bar:

        def values() -> object:
            for block in blocks:
                x = rows.read(block)
                yield tuple(x.unbind(1)) if rows.is_moments else x
                bar.update(len(block))

        try:
            return channel_statistics(values())  # type: ignore[arg-type]
        except ValueError as error:
            for block in blocks:  # find the row, if that was it
                finite = rows.read(block).isfinite().flatten(1).all(1)
                if not bool(finite.all()):
                    name = rows.name_of(int(block[~finite][0]))
                    raise ValueError(f"{name} holds NaN or infinity: encode that image again") from error
            raise ValueError(f"{place}: {error}") from error
