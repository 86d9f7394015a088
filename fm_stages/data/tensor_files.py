"""Rows in ``.safetensors`` files: one file, or the shards of latents that LightningDiT's extract_features.py writes."""

import re
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from fm_stages.data.foreign import load_safetensors
from fm_stages.data.stored_rows import StoredRows, as_labels, check_shape, kept_dtype

_NAMES = ("latents", "images", "x1")
_LABELS, _FLIP = "labels", "latents_flip"
_MOMENTS, _MOMENTS_FLIP = ("mean", "std"), ("mean_flip", "std_flip")


def open_tensors(files: list[Path]) -> StoredRows:
    """The rows of all files, one after another, and after them their flips; without rows that a sampler repeated.

    Raises:
        ValueError: if it is not clear which tensor holds the rows, the files differ in kind, or a tensor does not fit.
    """
    shards = [load_safetensors(file) for file in files]
    is_moments = shards[0].keys() - {_LABELS, *_MOMENTS_FLIP} == set(_MOMENTS)
    names, flips = (_MOMENTS, _MOMENTS_FLIP) if is_moments else ((_name_of_rows(shards[0], files[0]),), (_FLIP,))
    known = {*names, *flips, _LABELS}
    held = known & shards[0].keys()
    versions: list[tuple[str, ...]] = [names, flips] if set(flips) <= held else [names]
    rows, dtype = shards[0][names[0]], kept_dtype(shards[0][names[0]].dtype, files[0])
    labels = []
    for file, shard in zip(files, shards, strict=True):
        if differing := held ^ (known & shard.keys()):
            raise ValueError(f"only one of {files[0]} and {file} has {' and '.join(sorted(differing))}")
        size = len(shard[names[0]]) if shard[names[0]].ndim else 0
        check_shape(shard[names[0]].shape, file)
        for name in (name for version in versions for name in version):
            expected = (size, *rows.shape[1:])
            if shard[name].dtype != rows.dtype or shard[name].shape != expected:
                raise ValueError(
                    f"{file} holds {name} of {shard[name].dtype} and shape {tuple(shard[name].shape)}: its "
                    f"{names[0]}, and those of {files[0].name}, call for {rows.dtype} and shape {expected}"
                )
        if _LABELS in held:
            labels.append(as_labels(shard[_LABELS], size, file))

    sizes = [len(shard[names[0]]) for shard in shards]
    own = _own_rows(files, sizes, labels)
    row_labels = torch.cat(labels) if labels else None
    if own is not None and row_labels is not None:
        row_labels = row_labels[own]
    read = _ShardRows(files, versions, sizes, own, dtype, shards)
    shape = (2, *rows.shape[1:]) if is_moments else tuple(rows.shape[1:])
    return StoredRows(
        num_rows=len(versions) * (sum(sizes) if own is None else len(own)),
        shape=shape,
        dtype=dtype,
        read=read,
        labels=None if row_labels is None else row_labels.repeat(len(versions)),
        has_flips=len(versions) == 2,
        is_moments=is_moments,
        name_of=read.name_of,
    )


class _ShardRows:
    """Reads rows of files that are mapped into memory; another process maps them anew.

    Args:
        files: in order.
        versions: names of the tensors that make a row, and of those that make its flip.
        sizes: rows of each file.
        own: which rows of the files there are (n,); None: all.
        dtype: of rows in memory.
        shards: the tensors of each file.
    """

    def __init__(
        self,
        files: list[Path],
        versions: list[tuple[str, ...]],
        sizes: list[int],
        own: Tensor | None,
        dtype: torch.dtype,
        shards: list[dict[str, Tensor]],
    ) -> None:
        self.files, self.versions, self.own, self.dtype = files, versions, own, dtype
        self.ends = torch.tensor(sizes).cumsum(0)
        self.num_images = int(self.ends[-1]) if own is None else len(own)
        self._map(shards)

    def _map(self, shards: list[dict[str, Tensor]]) -> None:
        self._parts = [[tuple(shard[name] for name in version) for shard in shards] for version in self.versions]
        self._starts = [0, *self.ends.tolist()[:-1]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map([load_safetensors(file) for file in self.files])

    def name_of(self, row: int) -> str:
        """Where a row lies."""
        version, image = divmod(row, self.num_images)
        place = image if self.own is None else int(self.own[image])
        shard = int(torch.searchsorted(self.ends, place, right=True))
        return f"{self.versions[version][0]}[{place - self._starts[shard]}] of {self.files[shard]}"

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (M,), flips after all others: (M, *shape)."""
        image = rows % self.num_images
        place = image if self.own is None else self.own[image]
        shard = torch.searchsorted(self.ends, place, right=True)
        # views of single rows, copied once: fewer bytes move than in sorting them by file
        where = zip((rows // self.num_images).tolist(), shard.tolist(), place.tolist(), strict=True)
        views = [part[at - self._starts[i]] for version, i, at in where for part in self._parts[version][i]]
        out = torch.stack(views) if views else torch.empty(0, *self._parts[0][0][0].shape[1:])
        made_of = len(self.versions[0])
        return (out if made_of == 1 else out.unflatten(0, (-1, made_of))).to(self.dtype)


def _name_of_rows(tensors: dict[str, Tensor], file: Path) -> str:
    found = [name for name in _NAMES if name in tensors] or [name for name in tensors if name not in (_LABELS, _FLIP)]
    if len(found) != 1:
        held = ", ".join(sorted(tensors)) or "no tensor"
        raise ValueError(f"{file} holds {held}: call the one tensor that holds the rows {', '.join(_NAMES[:-1])} or x1")
    return found[0]


def _own_rows(files: list[Path], sizes: list[int], labels: list[Tensor]) -> Tensor | None:
    """Which rows of the files, counted one after another, are a data set's own: (n,) int64, rising; None for all.

    Row j of rank r of W is item j W + r of a sampler that repeats its first items until all ranks have equally many.
    How many there were is in no file, but items come in order of their classes, so that the labels fall where the
    repetition starts. Such rows have to be found by index: they were encoded anew and equal no other.

    Args:
        files: the files, in order.
        sizes: the number of rows of each.
        labels: those of each file, or none at all.
    """
    of_rank: dict[str, int] = {}
    for file, size in zip(files, sizes, strict=True):
        named = re.fullmatch(r"latents_rank(\d+)_shard\d+", file.stem)
        if named is None:
            return None
        of_rank[named[1]] = of_rank.get(named[1], 0) + size
    ranks = len(of_rank)
    if ranks == 1:
        return None
    fewest, most = min(of_rank.values()), max(of_rank.values())
    if fewest < most:
        warn(
            f"{files[0].parent}: its {ranks} ranks hold {fewest} to {most} rows, though all write equally many: see "
            "whether a shard is missing. All rows are taken",
            stacklevel=2,
        )
        return None
    if labels:
        by_item = torch.cat(labels).view(ranks, -1).T.flatten()
        falls = (by_item.diff() < 0).nonzero().flatten().tolist()
        if not falls and by_item[0] < by_item[-1]:
            return None
        repeated = sum(sizes) - falls[0] - 1 if len(falls) == 1 else 0
        if 0 < repeated < ranks and by_item[-repeated:].equal(by_item[:repeated]):
            return torch.arange(sum(sizes)).view(ranks, -1).T.flatten()[:-repeated].sort().values
    warn(
        f"{files[0].parent}: {ranks} ranks wrote these files, and their labels do not tell whether the last rows "
        f"repeat others: up to {ranks - 1} of {sum(sizes)} rows may be there twice",
        stacklevel=2,
    )
    return None
