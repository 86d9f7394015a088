"""Files that are there as a whole or not at all, whenever the process that writes them is killed."""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"
"""Ends the name of a file that is being written."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` once all of it is on the disk; nothing stays of what failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        part.touch()
        mode = part.stat().st_mode  # which others may read; safetensors and tempfile make files for the owner alone
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A name for a folder to be made, which becomes ``path``, new or empty, once all of it is there.

    Nothing stays of what failed, nor of what a killed process was making in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PART}"):
        writer = left.name.removesuffix(PART).rpartition(".")[2]
        if writer.isdecimal() and _is_done(int(writer)):
            shutil.rmtree(left, ignore_errors=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Remove from a folder what `whole_file` was writing for processes that were killed.

    Of another process that lives on this machine nothing is removed; on other ones none may be writing there now.
    """
    for file in folder.glob(f"*{PART}"):
        writer = re.fullmatch(rf".+\.[a-z]+\.(\d+){re.escape(PART)}", file.name)  # films come in parts, too
        if writer and _is_done(int(writer[1])):
            file.unlink(missing_ok=True)


def _is_done(process: int) -> bool:
    """Whether it writes no more: this one has not begun yet, and has the number of one before it."""
    return process == os.getpid() or not _lives(process)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True
