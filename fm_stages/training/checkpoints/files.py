"""Files of checkpoints: written beside the one that they replace, read back, and looked through when a run goes on."""

from __future__ import annotations

import io
import math
import os
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from fm_stages.data import load_tensors, whole_file

NEEDED = ("pytorch-lightning_version", "global_step", "state_dict", "loops", "callbacks", "optimizer_states")
"""What a checkpoint holds that a run can go on from; one of weights alone has no optimizer's state."""

LAST = "last.ckpt"

PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Kinds of values that say all of themselves in text."""

CONTINUITY = "continuity"
"""Key of a checkpoint, under which it says of which run it is."""


class WholeFiles(TorchCheckpointIO):
    """Writes beside the file that is replaced, reads back what lies on the disk, and then puts it into its place.

    Lightning writes into $TMPDIR and moves: to another file system that is a copy over the old file, and a run that is
    killed meanwhile has lost both.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: if the disk takes or gives it back otherwise than it was meant; the file before it is untouched.
            ValueError: if it holds what no run could read back.
        """
        path = Path(path)
        with whole_file(path) as part:
            try:
                with checksums():
                    torch.save(checkpoint, part)
            except RuntimeError as error:  # all that torch's writer says of a disk that is full
                free = shutil.disk_usage(path.parent).free
                raise OSError(f"it could not be written ({free / 1e9:.3g} GB are free there)") from error
            send_to_disk(part)
            check_sums(part)
            check_content(part, checkpoint)
        sync_folder(path.parent)


@contextmanager
def checksums() -> Iterator[None]:
    """Let `torch.save` write them, whatever is set for the process: what is read back is held against them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def send_to_disk(file: Path) -> None:
    """Wait until the disk has a file, and let memory forget it: what is read then comes from the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Let the new name be on the disk before an older file is removed."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_sums(file: Path) -> None:
    """Read all of a file and hold it against the checksums in it, at which `torch.load` does not look.

    Raises:
        OSError: if it is cut short, or a bit of it is another one than was written.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"it is cut short or damaged ({error})") from error
    if damaged is not None:
        raise OSError(f"it is damaged: {damaged} does not have the checksum that was written with it")


def check_content(file: Path, meant: dict[str, Any]) -> None:
    """Hold what a file says it contains against what was meant: names, shapes and kinds of tensors, and plain values.

    The tensors' values are not read: `check_sums` has compared them with what torch was given to write.

    Raises:
        ValueError: naming what cannot be read back without running code.
        OSError: naming what is not the same.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds
        strange = next(unreadable(meant), f"{type(error).__name__}")
        raise ValueError(f"it could not be read again: {strange}") from error
    if (place := next(_differences(meant, found, ""), None)) is not None:
        raise OSError(f"what was read back is not what was written, {place} first")


def _differences(meant: Any, found: Any, place: str) -> Iterator[str]:
    """Places of what is not the same in two trees."""
    if isinstance(meant, dict) and isinstance(found, dict):
        if meant.keys() != found.keys():
            yield place or "/"
        for key in meant.keys() & found.keys():
            yield from _differences(meant[key], found[key], f"{place}/{key}")
    elif isinstance(meant, list | tuple) and isinstance(found, list | tuple):
        if len(meant) != len(found):
            yield place
        for i, (a, b) in enumerate(zip(meant, found, strict=False)):
            yield from _differences(a, b, f"{place}/{i}")
    elif isinstance(meant, Tensor) and isinstance(found, Tensor):
        if (meant.shape, meant.dtype) != (found.shape, found.dtype):
            yield place
    elif _text(meant) != _text(found):
        yield place


def _text(leaf: Any) -> Any:
    """What tells a plain value from others, of which NaN is one; of anything else only its kind is compared."""
    if type(leaf) in PLAIN:
        return repr(leaf)
    return sorted(str(_text(x)) for x in leaf) if isinstance(leaf, set | frozenset) else str(type(leaf))


def unreadable(tree: Any, place: str = "") -> Iterator[str]:
    """What in a tree could not be read back from a file without running code, with its place and kind."""
    if type(tree) in (dict, OrderedDict):
        items = [(key, value) for key, value in tree.items()] + [(f"{key!r}, a key,", key) for key in tree]
    elif type(tree) in (list, tuple, set):
        items = list(enumerate(tree))
    elif isinstance(tree, Tensor) or type(tree) in PLAIN or _can_be_read(tree):
        return
    else:
        kind = f"{type(tree).__module__}.{type(tree).__qualname__}"
        yield f"{place} is a {kind}: keep tensors, numbers, text, lists and dicts in a state"
        return
    for key, value in items:
        yield from unreadable(value, f"{place}/{key}")


def _can_be_read(value: Any) -> bool:
    """By trying: people may register classes with `torch.serialization.add_safe_globals`."""
    try:
        torch.save(value, file := io.BytesIO())
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # torch and pickle raise many kinds
        return False
    return True


def resumable_step(file: Path, run_id: str | None = None) -> int:
    """The step of a checkpoint that a run can go on from, by what it says of itself: `check_sums` reads the rest.

    Args:
        file: the checkpoint.
        run_id: of the run; None: any will do. A file that tells none is of an older version, and will do as well.

    Raises:
        ValueError: why none can.
        OSError: if it is not there, or not whole.
    """
    if not file.is_file():
        raise FileNotFoundError("it is not there")
    try:
        found = load_tensors(file, mmap=True)
    except Exception as error:  # torch raises many kinds
        raise OSError(f"it is cut short, damaged or no checkpoint ({type(error).__name__})") from error
    if not isinstance(found, dict) or (missing := [name for name in NEEDED if name not in found]):
        raise ValueError(f"it holds no {missing[0] if isinstance(found, dict) else 'run'} to go on with")
    if type(found["global_step"]) is not int:
        raise ValueError(f"its step is {found['global_step']!r:.50}")
    own = (found.get(CONTINUITY) or {}).get("run", run_id)
    if run_id is not None and own != run_id:
        raise ValueError(f"it is of another run in this folder ({own}, and this one is {run_id})")
    return found["global_step"]


def whole_checkpoints(
    folder: Path, latest: float = math.inf, run_id: str | None = None, passed_over: dict[Path, str] | None = None
) -> Iterator[tuple[int, Path]]:
    """Checkpoints of a folder that a run can go on from and their steps, the newest first; each is read as a whole.

    Of one step last.ckpt comes first: it alone says which batches were passed over.

    Args:
        folder: where they lie.
        latest: step after which none is wanted.
        run_id: of the run, see `resumable_step`.
        passed_over: takes those that are none, and why.
    """
    passed_over = {} if passed_over is None else passed_over
    found: list[tuple[int, bool, str, Path]] = []
    for file in folder.glob("*.ckpt"):
        try:
            found.append((resumable_step(file, run_id), file.name == LAST, file.name, file))
        except (OSError, ValueError) as error:
            passed_over[file] = str(error)
    for step, _, _, file in sorted(found, reverse=True):
        if step > latest:
            continue
        try:
            check_sums(file)
        except OSError as error:
            passed_over[file] = str(error)
        else:
            yield step, file
