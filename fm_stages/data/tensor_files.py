"""Rows in ``.safetensors`` files: one file, or the shards of latents that LightningDiT's extract_features.py writes."""

import re
from pathlib import Path
from warnings import warn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fm_stages.data.array_files import StoredRows, as_labels, by_pieces, check_shape, kept_dtype

_NAMES = ("latents", "images", "x1")
_LABELS, _FLIP = "labels", "latents_flip"
_STATS = "latents_stats.pt"


def open_tensors(files: list[Path]) -> StoredRows:
    """The rows of all files, one after another, and after them their flips; without rows that a sampler repeated.

    Raises:
        ValueError: if it is not clear which tensor holds the rows, the files differ in kind, or a tensor or the
            statistics beside them do not fit.
    """
    shards = [_tensors(file) for file in files]
    name = _name_of_rows(shards[0], files[0])
    held = {name, _FLIP, _LABELS} & shards[0].keys()
    versions = [version for version in (name, _FLIP) if version in held]
    rows, dtype = shards[0][name], kept_dtype(shards[0][name].dtype, files[0])
    labels = []
    for file, shard in zip(files, shards, strict=True):
        if differing := held ^ ({name, _FLIP, _LABELS} & shard.keys()):
            raise ValueError(f"only one of {files[0]} and {file} has {' and '.join(sorted(differing))}")
        check_shape(shard[name].shape, file)
        for version in versions:
            expected = (len(shard[name]), *rows.shape[1:])
            if shard[version].dtype != rows.dtype or shard[version].shape != expected:
                raise ValueError(
                    f"{file} holds {version} of {shard[version].dtype} and shape {tuple(shard[version].shape)}: its "
                    f"{name}, and those of {files[0].name}, call for {rows.dtype} and shape {expected}"
                )
        if _LABELS in held:
            labels.append(as_labels(shard[_LABELS], len(shard[name]), file))

    parts = [shard[version] for version in versions for shard in shards]
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    sizes = [len(shard[name]) for shard in shards]
    own = _own_rows(files, sizes, labels)
    places = torch.cat([own + sum(sizes) * version for version in range(len(versions))])  # rows, then their flips
    shape = tuple(rows.shape[1:])

    def read(wanted: Tensor) -> Tensor:
        place = places[wanted]
        part = torch.searchsorted(ends, place, right=True)
        pieces = [parts[i][place[part == i] - (ends[i] - len(parts[i]))] for i in part.unique().tolist()]
        return torch.cat(pieces)  # in order, because the places rise

    def take(wanted: Tensor) -> Tensor:
        return by_pieces(wanted, shape, dtype, read)

    scale, shift = (1.0, 0.0) if dtype == torch.uint8 else _normalisation(files[0].with_name(_STATS), shape)
    row_labels = torch.cat(labels)[places % sum(sizes)] if labels else None
    return StoredRows(len(places), shape, dtype, take, row_labels, scale, shift)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped into memory without being read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file} ({error}): repair or remove it") from error


def _name_of_rows(tensors: dict[str, Tensor], file: Path) -> str:
    found = [name for name in _NAMES if name in tensors] or [name for name in tensors if name not in (_LABELS, _FLIP)]
    if len(found) != 1:
        held = ", ".join(sorted(tensors)) or "no tensor"
        raise ValueError(f"{file} holds {held}: call the one tensor that holds the rows {', '.join(_NAMES[:-1])} or x1")
    return found[0]


def _own_rows(files: list[Path], sizes: list[int], labels: list[Tensor]) -> Tensor:
    """Which rows of the files, counted one after another, are a data set's own: (n,) int64, in rising order.

    Row j of rank r of W is item j W + r of a sampler that repeats its first items until all ranks have equally many.
    How many there were is in no file, but items come in order of their classes, so that the labels fall where the
    repetition starts. Such rows have to be found by index: they were encoded anew and equal no other.

    Args:
        files: the files, in order.
        sizes: the number of rows of each.
        labels: those of each file, or none at all.
    """
    every = torch.arange(sum(sizes))
    of_rank: dict[str, int] = {}
    for file, size in zip(files, sizes, strict=True):
        named = re.fullmatch(r"latents_rank(\d+)_shard\d+", file.stem)
        if named is None:
            return every
        of_rank[named[1]] = of_rank.get(named[1], 0) + size
    ranks = len(of_rank)
    if ranks == 1:
        return every
    fewest, most = min(of_rank.values()), max(of_rank.values())
    if fewest < most:
        warn(
            f"{files[0].parent}: its {ranks} ranks hold {fewest} to {most} rows, though all write equally many: see "
            "whether a shard is missing. All rows are taken",
            stacklevel=2,
        )
        return every
    if labels:
        by_item = torch.cat(labels).view(ranks, -1).T.flatten()
        falls = (by_item.diff() < 0).nonzero().flatten().tolist()
        if not falls and by_item[0] < by_item[-1]:
            return every
        repeated = len(every) - falls[0] - 1 if len(falls) == 1 else 0
        if 0 < repeated < ranks and by_item[-repeated:].equal(by_item[:repeated]):
            return every.view(ranks, -1).T.flatten()[:-repeated].sort().values
    warn(
        f"{files[0].parent}: {ranks} ranks wrote these files, and their labels do not tell whether the last rows "
        f"repeat others: up to {ranks - 1} of {len(every)} rows may be there twice",
        stacklevel=2,
    )
    return every


def _normalisation(file: Path, shape: tuple[int, ...]) -> tuple[float | Tensor, float | Tensor]:
    """Scale and shift, float32 tensors that broadcast to a row, which make (x - mean) / std; 1 and 0 without a file."""
    if not file.exists():
        return 1.0, 0.0
    try:
        stats = dict(torch.load(file, map_location="cpu", weights_only=True))
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
    return (1 / std).float(), (-mean / std).float()
