"""Small folders of latents as encoders leave them, each in its layout; and their values, by the images' numbers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fm_stages.data.latent_index import LatentIndex, Shard, sha256_of, write_index

SHAPE = (4, 6, 6)
NUM, NUM_CLASSES = 43, 3
VAE = {"name": "some/vae", "revision": "abc", "kind": "AutoencoderKL", "sha256": "0" * 64}
VAE |= {"scaling_factor": 0.5, "shift_factor": 0.25}


def values(name: str, num: int = NUM, seed: int = 0) -> Tensor:
    """The tensor of that name: (num, *SHAPE) float32, off the centre and of another scale in each channel."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, name)))
    x = torch.randn(num, *SHAPE, generator=generator)
    channels = torch.arange(1.0, 5).view(4, 1, 1)
    return x.abs() * 0.3 if name.startswith("std") else x * channels + channels


def labels(num: int = NUM) -> Tensor:
    return torch.arange(num) * NUM_CLASSES // num


def write_indexed(
    folder: Path, names: tuple[str, ...] = ("latents", "latents_flip"), num: int = NUM, seed: int = 0,
    dtype: torch.dtype = torch.float32, shard_rows: int = 10,
) -> LatentIndex:  # fmt: skip
    """What ``fm-stages encode`` leaves, without statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"dtype": str(dtype).removeprefix("torch."), "shape": list(SHAPE)}
    tensors = {**dict.fromkeys(names, kind), "labels": {"dtype": "int64", "shape": []}}
    index = LatentIndex(num, shard_rows, tensors, ["cat", "dog", "fox"], VAE, {}, {"file": "sources.txt"})
    held = {name: values(name, num, seed).to(dtype) for name in names} | {"labels": labels(num)}
    for number in range(index.num_shards):
        file = folder / index.file_of(number)
        own = slice(index.rows_of(number).start, index.rows_of(number).stop)
        save_file({name: x[own].contiguous() for name, x in held.items()}, file)
        index.shards[number] = Shard(file.name, own.stop - own.start, file.stat().st_size, sha256_of(file))
    write_index(folder, index)
    return index


def write_lightning(folder: Path, num: int = NUM, ranks: int = 4, per_shard: int = 4) -> Tensor:
    """LightningDiT's shards, padded with encodings of their own; which images the rows are of, without the padding."""
    folder.mkdir(parents=True, exist_ok=True)
    padded = torch.arange(-(-num // ranks) * ranks)
    held = {name: torch.cat([values(name, num), values(name, len(padded) - num, 7)]) for name in NAMES}
    for rank in range(ranks):
        for shard, items in enumerate(padded[rank::ranks].split(per_shard)):
            tensors = {name: x[items].contiguous() for name, x in held.items()} | {"labels": labels(num)[items % num]}
            save_file(tensors, folder / f"latents_rank{rank:02d}_shard{shard:03d}.safetensors")
    order = torch.cat([padded[rank::ranks] for rank in range(ranks)])
    return order[order < num]


NAMES = ("latents", "latents_flip")


def write_files(place: Path, moments: bool, num: int = NUM) -> None:
    """REPA's moments, or SpeedrunDiT's latents, with dataset.json; EDM2's zip if the name ends so."""
    kind = "img-mean-std" if moments else "img-latents"
    rows = torch.cat([values("mean", num), values("std", num)], 1) if moments else values("latents", num)
    names = [f"{i // 10:05d}/{kind}-{i:08d}.npy" for i in range(num)]
    listed = {"labels": [[name, int(label)] for name, label in zip(names, labels(num), strict=True)]}
    folder = place.with_suffix(".unpacked") if place.suffix == ".zip" else place
    for name, row in zip(names, rows, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, row.numpy())
    (folder / "dataset.json").write_text(json.dumps(listed))
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name in [*names, "dataset.json"]:
                archive.write(folder / name, name)
