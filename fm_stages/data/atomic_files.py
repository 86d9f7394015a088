"""Files that are there as a whole or not at all, whenever the process that writes them is killed."""

import os
import re
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


def remove_parts(folder: Path) -> None:
    """Remove from a folder what `whole_file` was writing for processes that were killed.

    Of another process that lives on this machine nothing is removed; on other ones none may be writing there now.
    """
    for file in folder.glob(f"*{PART}"):
        writer = re.fullmatch(rf".+\.[a-z]+\.(\d+){re.escape(PART)}", file.name)  # films come in parts, too
        if writer and (int(writer[1]) == os.getpid() or not _lives(int(writer[1]))):
            file.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True
