"""What a folder of latents holds: ``index.json`` beside shards in the layout of LightningDiT's extract_features.py.

    latents_rank00_shard000.safetensors ...  latents, latents_flip (n, C, H, W), labels (n,) int64; n the same but for
                                             the last. Of moments: mean, std, mean_flip, std_flip in their place
    sources.txt                              the image that each row is of, a line each, relative to their folder
    latents_stats.pt                         mean and std of each channel, (1, C, 1, 1) float32
    index.json                               what this module reads and writes

Rows come in order, shard by shard, whoever encoded them: item i is row i % shard_rows of shard i // shard_rows, so that
no row is repeated to make ranks equal. The peers' readers, which know the shards and the statistics, read them as
their own. A shard counts as there once the index lists it, with the number of its bytes and their checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from fm_stages.data.atomic_files import whole_file
from fm_stages.data.foreign import read_json
from fm_stages.data.host import is_first_rank

INDEX, SOURCES, STATISTICS = "index.json", "sources.txt", "latents_stats.pt"
VERSION = 1

LOCK_SEC = 600
"""How long one process waits for another that holds a folder's lock, unless told otherwise."""

_AGAIN = "remove it and run the same fm-stages encode again, or copy it once more"

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}


@dataclass
class Shard:
    """A file of rows: how many, its size, and what tells whether it is still what was written."""

    file: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass
class LatentIndex:
    """What is encoded, or to be, in one folder.

    Attributes:
        num_rows: images; flips, which are rows of tensors of their own, are not counted.
        shard_rows: images of a shard, but for the last.
        tensors: of each shard, by name: ``{"dtype": "float32", "shape": [C, H, W]}``, the shape of one row.
        class_names: of the labels 0, 1, ...
        vae: what encoded: ``name``, ``revision``, ``kind``, ``sha256`` of its weights, ``scaling_factor``,
            ``shift_factor``.
        encoding: how: image size, precision, seed, whatever else changes the rows.
        sources: the list of images: ``file`` and its ``sha256``.
        normalisation: the file of the ``statistics``, once they are computed.
        shards: those that are finished, by number.
    """

    num_rows: int
    shard_rows: int
    tensors: dict[str, dict[str, Any]]
    class_names: list[str]
    vae: dict[str, Any]
    encoding: dict[str, Any]
    sources: dict[str, Any]
    normalisation: dict[str, Any] = field(default_factory=dict)
    shards: dict[int, Shard] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        """How many there will be."""
        return math.ceil(self.num_rows / self.shard_rows)

    @property
    def complete(self) -> bool:
        """Whether all shards are finished."""
        return len(self.shards) == self.num_shards

    def file_of(self, shard: int) -> str:
        """Name of a shard; all are equally long, so that their order by name is that of the rows."""
        digits = max(3, len(str(self.num_shards - 1)))
        return f"latents_rank00_shard{shard:0{digits}d}.safetensors"

    def rows_of(self, shard: int) -> range:
        """The images, by number, of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))


def read_index(folder: Path) -> LatentIndex | None:
    """The index of a folder; None where there is none.

    Raises:
        ValueError: if it cannot be read, or a newer version wrote it.
    """
    file = folder / INDEX
    if not file.exists():
        return None
    try:
        found = read_json(file)
        version = found.pop("version")
        found.pop("complete")
        if version == VERSION:
            listed = found.pop("shards")
            shards = {number: Shard(**shard) for number, shard in enumerate(listed) if shard}
            index = LatentIndex(**found, shards=shards)
            _check_index(index, len(listed))
            return index
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not an index of latents ({error!r}): encode the images again") from error
    raise ValueError(f"{file} is of version {version}, this release of fm-stages reads version {VERSION}: update it")


def _check_index(index: LatentIndex, num_listed: int) -> None:
    """Raise a ValueError or TypeError unless numbers are numbers, and names those that this module gives.

    A shard lies in the folder, whatever an index of a stranger calls it.
    """
    for name in ("num_rows", "shard_rows"):
        if type(getattr(index, name)) is not int or getattr(index, name) < 1:
            raise ValueError(f"{name} is {getattr(index, name)!r:.50}")
    if num_listed != index.num_shards:
        raise ValueError(f"{num_listed} shards are listed, {index.num_rows} rows make {index.num_shards}")
    for name in ("vae", "encoding", "sources", "normalisation"):
        if not isinstance(getattr(index, name), dict):
            raise TypeError(f"{name} is no mapping")
    for name in ("scaling_factor", "shift_factor"):
        if not isinstance(number := index.vae.get(name, 0.0), float | int) or not math.isfinite(number):
            raise ValueError(f"{name} of the vae is {number!r:.50}")
    if not isinstance(index.class_names, list) or not all(isinstance(name, str) for name in index.class_names):
        raise TypeError("class_names is no list of names")
    for name, kind in index.tensors.items():
        if not isinstance(kind["dtype"], str) or not all(type(size) is int and size > 0 for size in kind["shape"]):
            raise TypeError(f"tensor {name} is {kind!r:.80}")
    for number, shard in index.shards.items():
        if shard.file != index.file_of(number) or type(shard.num_bytes) is not int or not isinstance(shard.sha256, str):
            raise ValueError(f"shard {number} is {shard!r:.120}")
        if shard.num_rows != len(index.rows_of(number)):
            raise ValueError(f"shard {number} has {shard.num_rows!r:.50} rows, not {len(index.rows_of(number))}")


def write_index(folder: Path, index: LatentIndex) -> None:
    """Put an index in the place of the one that was there, as a whole."""
    plain = asdict(index)
    listed = [plain["shards"].get(number) for number in range(index.num_shards)]
    with whole_file(folder / INDEX) as part:
        text = json.dumps({"version": VERSION, "complete": index.complete, **plain, "shards": listed}, indent=1)
        part.write_text(text + "\n")


@contextmanager
def locked(folder: Path, purpose: str, timeout_sec: float = LOCK_SEC) -> Iterator[None]:
    """Be the only process that does this in a folder; the lock of a process that was killed is free.

    Args:
        folder: where.
        purpose: what is done, a word: it names the lock.
        timeout_sec: how long to wait for another process; 0: not at all.

    Raises:
        ValueError: if another process does it.
        OSError: if nothing can be written there.
    """
    lock = folder / f".{purpose}.lock"
    folder.mkdir(parents=True, exist_ok=True)
    own = FileLock(lock, timeout=timeout_sec)
    try:
        own.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process does this in {folder} ({purpose}; it holds {lock.name}): wait until it has ended"
        ) from error
    try:
        yield
    finally:
        own.release()


def check_shards(folder: Path, index: LatentIndex, shards: range | None = None) -> None:
    """Hold the shards that an index lists against their files: size, tensors, dtypes and shapes.

    Args:
        folder: of the files.
        index: of the folder.
        shards: which to look at; None: all. An unfinished one among them is missing.

    Raises:
        ValueError: on the first file that is missing, truncated or other than the index says, with the remedy.
    """
    for number in range(index.num_shards) if shards is None else shards:
        shard = index.shards.get(number)
        if shard is None:
            raise ValueError(
                f"{folder} is encoded in part, {len(index.shards)} of {index.num_shards} shards: run the same "
                "fm-stages encode again, which goes on"
            )
        file = folder / shard.file
        if not file.is_file():
            raise ValueError(f"{file} is missing, though {INDEX} lists it: {_AGAIN.removeprefix('remove it and ')}")
        if (size := file.stat().st_size) != shard.num_bytes:
            raise ValueError(f"{file} has {size} bytes, {INDEX} says {shard.num_bytes}: {_AGAIN}")
        expected = {name: (kind["dtype"], [shard.num_rows, *kind["shape"]]) for name, kind in index.tensors.items()}
        found = header_of(file)
        if found != expected:
            name = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
            raise ValueError(f"{file} holds {name} as {found.get(name)}, {INDEX} says {expected.get(name)}: {_AGAIN}")


def compare_checksums(folder: Path, index: LatentIndex, shards: range) -> None:
    """Read shards whole, under a progress bar, and hold their checksums against the index.

    Args:
        folder: of the files, for which `check_shards` found no fault.
        index: of the folder.
        shards: which.

    Raises:
        ValueError: on the first that is not what was written, with the remedy.
    """
    for number in tqdm(shards, "Comparing checksums", unit="shard", disable=not is_first_rank(), delay=1):
        file = folder / index.shards[number].file
        if sha256_of(file) != index.shards[number].sha256:
            raise ValueError(f"{file} is not what was written, its checksum differs from {INDEX}'s: {_AGAIN}")


def header_of(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of the tensors of a ``.safetensors`` file, by name, without reading them.

    Raises:
        ValueError: if it is no such file, or cut short.
    """
    try:
        with safe_open(file, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dictionary
            return {name: (_DTYPES.get(x.get_dtype(), x.get_dtype()), x.get_shape()) for name, x in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file} ({error}): repair or remove it") from error


def sha256_of(file: Path) -> str:
    """Checksum of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
