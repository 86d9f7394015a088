"""Files that may be of a stranger: read without running what is in them, nor believing the sizes that they claim."""

from __future__ import annotations

import json
import math
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TEXT_BYTES = 4 * 2**20
"""Of YAML; the configuration of a run has some thousand."""

NODES = 100_000
"""Values in YAML once its aliases are written out: some lines can stand for billions."""

DEPTH = 64
"""Of nested YAML and JSON."""

PIXELS = 2**26
"""Of an image, 0.2 GB once it is decoded: a file of some kilobytes can claim any number."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is refused here, not warned of


def read_yaml(text: str, place: str | Path) -> Any:
    """What YAML says.

    Args:
        text: the YAML.
        place: that it is from, for errors.

    Raises:
        ValueError: if it is none, or would become large: in bytes, in depth, or by aliases of aliases.
    """
    if len(text) > TEXT_BYTES:
        raise ValueError(f"{place}: {len(text)} characters of YAML; a configuration has fewer than {TEXT_BYTES}")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _count_nodes(node, {}, place)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ValueError(f"{place}: its YAML is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{place}: not YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # as of 2024-99-99, or an unhashable key
        message = str(error)
        raise ValueError(message if message.startswith(f"{place}:") else f"{place}: not YAML: {message}") from error


def read_yaml_file(file: Path) -> Any:
    """What a YAML file says.

    Raises:
        OSError: if it cannot be read.
        ValueError: as `read_yaml` does.
    """
    with file.open("rb") as opened:
        content = opened.read(TEXT_BYTES + 1)  # however long it is
    try:
        return read_yaml(content.decode(), file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not YAML: {error}") from error


def _count_nodes(node: yaml.Node, known: dict[int, int], place: str | Path, depth: int = 0) -> int:
    """Values that a node stands for, with aliases written out."""
    if depth > DEPTH:
        raise ValueError(f"{place}: its YAML is nested more than {DEPTH} deep, or holds itself")
    if id(node) not in known:
        inside = [x for pair in node.value for x in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = inside if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_count_nodes(child, known, place, depth + 1) for child in inside)
    if known[id(node)] > NODES:
        raise ValueError(f"{place}: its YAML stands for more than {NODES} values, most of them by aliases")
    return known[id(node)]


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, or nested too deeply.
    """
    return parse_json(file.read_bytes(), file)


def parse_json(text: str | bytes, place: str | Path) -> Any:
    """What JSON text says; ``place`` is for errors. Raises ValueError as `read_json` does."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{place} is not JSON ({reason})") from error


def load_tensors(path: str | Path, mmap: bool = False) -> Any:
    """What a file of ``torch.save`` holds, if that is tensors and plain values: nothing else is unpickled.

    Args:
        path: the file.
        mmap: whether to leave the values on the disk until they are used.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it claims more than it holds: compressed records, buffers or tensors beyond their bytes.
        Exception: what torch raises for a file of another kind; there are many.
    """
    with Path(path).open("rb") as file:
        _check_records(file)
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    for name, x in _tensors(found, ""):
        held = 0 if x.is_meta or x.layout != torch.strided else x.untyped_storage().nbytes()
        size = x.numel() * x.element_size()
        if x.is_meta or size > max(held, 2**20):  # a few numbers may be one that is repeated
            raise ValueError(f"{name} of shape {tuple(x.shape)} takes {size} bytes, and the file holds {held} of them")
    return found


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file by name, mapped into memory; its header is held against the file.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} ({error}): repair or remove it") from error


def _check_records(file: IO[bytes]) -> None:
    """Refuse records that are compressed, and a pickle that makes a buffer out of a number."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size > record.compress_size:
                    claimed = f"{record.file_size} bytes in {record.compress_size}"
                    raise ValueError(f"its record {record.filename} is compressed ({claimed}), which torch never does")
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as pickle:
                        _check_pickle(pickle)
        return
    file.seek(0)
    for _ in range(4):  # torch's older format: three small pickles before that of the object
        _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Refuse ``bytearray(10**12)``, which torch takes for a plain value."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST") and str(argument).endswith(" bytearray"):
            raise ValueError("it makes a buffer of any size: only tensors and plain values are read")


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested values, with where they are."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _tensors(value, f"{name}[{i}]")


@contextmanager
def reading_image(file: str | Path) -> Iterator[None]:
    """Make one error, with the file's name, of the many that PIL's readers raise.

    Raises:
        ValueError: in place of whatever was raised.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read the image {file} ({error}): repair or remove it") from error


def open_picture(file: str | Path) -> Image.Image:
    """The RGB pixels of an image file.

    Raises:
        ValueError: if it claims more of them than `PIXELS`.
        Exception: what PIL's readers raise for a file that they cannot decode; there are many.
    """
    with Image.open(file) as image:
        check_pixels(image)
        return image.convert("RGB")


def check_pixels(image: Image.Image) -> None:
    """Refuse an image, opened but not decoded, that would fill memory.

    Raises:
        ValueError: with its size.
    """
    if image.width * image.height > PIXELS:
        raise ValueError(f"it claims {image.width}x{image.height} pixels, more than {PIXELS}")


def check_array(archive: zipfile.ZipFile, name: str, available_bytes: int) -> None:
    """Refuse an array in a zip that claims more than it holds, or than there is memory, before any is taken for it.

    Args:
        archive: opened; as of ``numpy.savez``.
        name: of the ``.npy`` in it.
        available_bytes: of memory.

    Raises:
        ValueError: with what it claims.
        KeyError: if there is none of that name.
    """
    member = archive.getinfo(name)
    with archive.open(member) as content:
        shape, _, dtype = read_array_header(content)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > member.file_size:
        raise ValueError(
            f"{name} of shape {shape} takes {num_bytes} bytes, and the file says it has {member.file_size}"
        )
    if num_bytes > available_bytes:  # deflate makes a thousand bytes out of one
        raise ValueError(f"{name} of shape {shape} takes {num_bytes / 2**30:.1f} GiB, more than there is memory")


def read_array_header(content: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype, as the header of a ``.npy`` says."""
    version = np.lib.format.read_magic(content)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(content)
