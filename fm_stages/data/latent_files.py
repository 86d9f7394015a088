"""Latents on disk, in any of the layouts that are in use, opened as one set of rows.

index.json beside shards       what `fm_stages.data.latent_index` describes; latents or moments
latents_rank*_shard*           LightningDiT's shards, with their flips; padded duplicates are dropped by index
.npy files, one for each row   SpeedrunDiT's latents, REPA's and EDM2's moments, with dataset.json; EDM2's zip too
"""

import os
from pathlib import Path

from fm_stages.data.array_files import open_array_folder, open_array_zip
from fm_stages.data.latent_index import INDEX, LatentIndex, check_shards, compare_checksums, read_index
from fm_stages.data.stored_rows import StoredRows
from fm_stages.data.tensor_files import open_tensors

LAYOUTS = (
    f"a folder of {INDEX} and its shards, of LightningDiT's .safetensors shards, or of one .npy file for each latent, "
    "or EDM2's .zip of those"
)


def open_latents(place: Path, verify: slice | None = None) -> tuple[StoredRows, LatentIndex | None]:
    """Find out what there is, without reading the rows.

    Args:
        place: the folder, or a ``.zip``.
        verify: the shards of an index, by number, that are read whole to compare their checksums; None: none.

    Returns:
        The rows as they are stored, and the index where there is one.

    Raises:
        FileNotFoundError: if there is no such place.
        ValueError: if it holds something else, files differ in kind, or a shard is not what the index says.
    """
    if not place.exists():
        raise FileNotFoundError(f"there is no {place.resolve()}: give {LAYOUTS}")
    if not place.is_dir():
        if place.suffix.lower() != ".zip":
            raise ValueError(f"{place} is no folder: give {LAYOUTS}")
        return open_array_zip(place), None
    index = read_index(place)
    if index is not None:
        check_shards(place, index)
        if verify is not None:
            compare_checksums(place, index, range(index.num_shards)[verify])
        rows = open_tensors([place / index.shards[number].file for number in range(index.num_shards)])
        return rows._replace(class_names=list(index.class_names)), index
    if verify is not None:
        raise ValueError(f"verify compares the checksums of {INDEX}, which {place} lacks: leave it out")
    suffixes: dict[str, tuple[str, ...]] = {".safetensors files": (".safetensors",), ".npy files": (".npy",)}
    shards, arrays = files_below(place, suffixes).values()
    if bool(shards) == bool(arrays):
        held = " and ".join(suffixes) if shards else "no latents"
        raise ValueError(f"{place} holds {held}: give {LAYOUTS}")
    if arrays:
        return open_array_folder(place, arrays), None
    if nested := [file for file in shards if file.parent != place]:  # another split may lie beside it
        raise ValueError(f"{nested[0]} lies deeper than {place}: give the folder that holds the shards")
    return open_tensors(shards), None


def files_below(folder: Path, suffixes: dict[str, tuple[str, ...]]) -> dict[str, list[Path]]:
    """Files of a folder at any depth, in order, by their kinds, of which each has its ``suffixes``."""
    files = sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return {kind: [file for file in files if file.suffix.lower() in ends] for kind, ends in suffixes.items()}
