"""A folder of latents while it is written: started or taken up again, shard by shard, by several processes at once.

One process opens the folder and holds the lock ``encode`` while all work; each that has finished a shard adds it to the
index under the lock ``index``. A shard carries what it belongs to, so that one whose process was killed before it told
the index is adopted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fm_stages.data.atomic_files import PART, whole_file
from fm_stages.data.latent_index import (
    INDEX,
    SOURCES,
    STATISTICS,
    LatentIndex,
    Shard,
    check_shards,
    locked,
    read_index,
    sha256_of,
    write_index,
)
from fm_stages.data.statistics import write_statistics

_JOB = "encoding"
"""The one entry of a shard's metadata. Of several, safetensors would choose another order each time."""


def list_of_sources(folder: Path, files: list[str]) -> tuple[bytes, dict[str, Any]]:
    """What ``sources.txt`` holds, a line for each image, and what the index says of it.

    Args:
        folder: of the images.
        files: relative to it, without line breaks.
    """
    content = b"".join(os.fsencode(file) + b"\n" for file in files)
    sha256 = hashlib.sha256(content).hexdigest()
    return content, {"file": SOURCES, "sha256": sha256, "folder": str(folder.resolve())}


def open_folder(folder: Path, wanted: LatentIndex, sources: bytes, shard_rows_given: bool) -> LatentIndex:
    """Start a folder, or take up the one that is there; called by one process, which holds the lock ``encode``.

    Shards that are finished but not in the index are adopted; those that are in the index and whose files are gone are
    to be encoded again.

    Args:
        folder: where the latents go.
        wanted: what is to be encoded, without shards.
        sources: the list of images.
        shard_rows_given: whether the shards of an earlier call have to be as long as wanted.

    Returns:
        The index of the folder.

    Raises:
        ValueError: if the folder holds something else, other latents, or a shard that is not what the index says.
        OSError: if it cannot be written.
    """
    check_own_files(folder)
    index = read_index(folder)
    if index is None:
        index = wanted
    elif changed := _changes(index, wanted, shard_rows_given):
        raise ValueError(f"--out {folder} holds other latents: {'; '.join(changed)}. Undo that, or give another folder")
    for path in folder.iterdir():
        if _is_leftover(path) and path.name.endswith(PART):
            path.unlink(missing_ok=True)
    list_file = folder / SOURCES
    if not list_file.exists() or sha256_of(list_file) != index.sources["sha256"]:
        with whole_file(list_file) as part:
            part.write_bytes(sources)
    if not (folder / STATISTICS).exists():
        index.normalisation = {}  # which is no finished folder: they are made again
    _take_up(folder, index)
    write_index(folder, index)
    return index


def check_own_files(folder: Path) -> None:
    """Raise a ValueError if a folder without an index holds files that are not of one that was just begun."""
    if not folder.is_dir() or (folder / INDEX).exists():
        return
    if other := sorted(path.name for path in folder.iterdir() if not _is_leftover(path) and path.name != SOURCES):
        raise ValueError(f"--out {folder} holds other files ({other[0]}, ...): give a new or an empty folder")


def _is_leftover(path: Path) -> bool:
    """Whether a file is a lock, or was being written when a process was killed."""
    if path.name in (".encode.lock", ".index.lock"):
        return True
    return path.name.endswith(PART) and path.name.startswith((INDEX, SOURCES, STATISTICS, "latents_rank00_shard"))


def _changes(old: LatentIndex, new: LatentIndex, shard_rows_given: bool) -> list[str]:
    """What makes the rows of two indices, or their places, differ; in words."""
    changed = []
    if old.sources["sha256"] != new.sources["sha256"]:
        changed.append(f"the list of images was another one ({old.num_rows} images, now {new.num_rows})")
    classes = old.class_names, new.class_names  # of held-out images those of the training set, which number the labels
    if classes[0] != classes[1] and max(map(len, classes)) > 1:  # one alone has the name of a folder that may move
        changed.append(f"the classes were other ones ({len(classes[0])}, now {len(classes[1])})")
    if old.vae["sha256"] != new.vae["sha256"]:
        named = [f"{vae['name']} ({vae['kind']}, {vae['sha256'][:12]})" for vae in (old.vae, new.vae)]
        changed.append(f"the VAE was {named[0]} and is {named[1]}")
    names = {**old.encoding, **new.encoding}
    pairs: list[tuple[str, Any, Any]] = [(name, old.encoding.get(name), new.encoding.get(name)) for name in names]
    if shard_rows_given:
        pairs.append(("shard_rows", old.shard_rows, new.shard_rows))
    return changed + [f"{name} was {before} and is {now}" for name, before, now in pairs if before != now]


def _take_up(folder: Path, index: LatentIndex) -> None:
    """Hold the listed shards against their files, forget those that are gone, and list those that are finished."""
    for number in range(index.num_shards):
        file = folder / index.file_of(number)
        if not file.exists():
            index.shards.pop(number, None)
            continue
        if number in index.shards:
            check_shards(folder, index, shards=range(number, number + 1))
        if _job_of(file) != job_of(index, number):
            raise ValueError(f"{file} was not encoded with these settings and images: move it out of {folder}")
        if number not in index.shards:
            index.shards[number] = _described(file, index, number)
            check_shards(folder, index, shards=range(number, number + 1))


def job_of(index: LatentIndex, number: int) -> str:
    """What is written into a shard: tells settings, images and place from all others."""
    job = [index.num_rows, index.shard_rows, index.tensors, index.vae["sha256"], index.encoding]
    digest = hashlib.sha256(json.dumps([*job, index.sources["sha256"]], sort_keys=True).encode())
    return f"{digest.hexdigest()[:32]} shard {number}"


def _job_of(file: Path) -> str | None:
    try:
        with safe_open(file, framework="np") as shard:
            return (shard.metadata() or {}).get(_JOB)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file} ({error}): remove it and run the same fm-stages encode again") from error


def _described(file: Path, index: LatentIndex, number: int, name: str | None = None) -> Shard:
    return Shard(name or file.name, len(index.rows_of(number)), file.stat().st_size, sha256_of(file))


def write_shard(folder: Path, index: LatentIndex, number: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard, and put it into the index on the disk, whatever other processes put there meanwhile.

    Raises:
        ValueError: if it cannot be written; what was finished before stays.
    """
    file = folder / index.file_of(number)
    with _space_for(file):
        with whole_file(file) as part:
            save_file(tensors, part, metadata={_JOB: job_of(index, number)})
            shard = _described(part, index, number, file.name)
        with locked(folder, "index"):
            listed = _index_there(folder)
            listed.shards[number] = shard
            write_index(folder, listed)


def complete_folder(folder: Path, statistics: dict[str, Tensor]) -> LatentIndex:
    """Check that all shards are there, and write the statistics; called by one process at the end.

    Raises:
        ValueError: if a shard is missing or not what the index says, or the file cannot be written.
    """
    file = folder / STATISTICS
    with locked(folder, "index"), _space_for(file):
        index = _index_there(folder)
        check_shards(folder, index)
        write_statistics(file, statistics)
        index.normalisation = {"file": file.name, "sha256": sha256_of(file), "rows": "all"}
        write_index(folder, index)
        return index


def _index_there(folder: Path) -> LatentIndex:
    """The index that `open_folder` wrote."""
    index = read_index(folder)
    if index is None:
        raise ValueError(f"{folder / INDEX} is gone: run the same fm-stages encode again, which makes it anew")
    return index


@contextmanager
def _space_for(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot write {file} ({reason}): make room there and run the same fm-stages encode again, which goes on "
            "from the finished shards"
        ) from error
