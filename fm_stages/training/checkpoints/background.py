"""Checkpoints that are written while training goes on: what is in them is copied, and one thread does the rest."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fm_stages.data import whole_file
from fm_stages.training.checkpoints.files import WholeFiles, check_sums, send_to_disk, sync_folder


class Writer:
    """Writes, reads back and removes files in the order in which it was asked to, and nothing more once a write failed.

    So an older file goes after the newer one has been read back, and stays if that fails: a folder is never empty.
    Lightning's AsyncCheckpointIO removes at once.

    Attributes:
        failure: what could not be written, and why; empty while all is well.
    """

    def __init__(self, files: WholeFiles) -> None:
        self.failure = ""
        self._files = files
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._tasks: list[Future[None]] = []

    def write(self, checkpoint: dict[str, Any], path: str) -> None:
        """Copy a checkpoint, which training may then change, and write it."""
        self._add(path, self._files.save_checkpoint, copied(checkpoint), path)

    def copy(self, source: str, path: str) -> None:
        """Make another file of one that was written before."""
        self._add(path, _copy, Path(source), Path(path))

    def remove(self, path: str) -> None:
        """Remove a file; one that stays is no failure."""
        self._add(path, self._remove, path)

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return not all(task.done() for task in self._tasks)

    def wait(self) -> None:
        """Until there is not."""
        for task in self._tasks:
            task.result()
        self._tasks = []

    def _add(self, path: str, work: Callable[..., None], *args: Any) -> None:
        self._tasks.append(self._thread.submit(self._run, path, work, *args))

    def _run(self, path: str, work: Callable[..., None], *args: Any) -> None:
        if self.failure:
            return
        try:
            work(*args)
        except Exception as error:  # told by whoever asks, on all ranks
            self.failure = f"{path} was not saved: {error}"

    def _remove(self, path: str) -> None:
        try:
            self._files.remove_checkpoint(path)
        except OSError as error:
            rank_zero_warn(f"{path} could not be removed: {error}")


def copied(tree: Any) -> Any:
    """A tree of which nothing is shared, with its tensors in the memory of the host."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        new: Any = copy.copy(tree)  # of its kind, and with what torch notes beside the weights
        for key, value in tree.items():
            new[key] = copied(value)
        return new
    if type(tree) in (list, tuple):
        return type(tree)(copied(value) for value in tree)
    return copy.deepcopy(tree)


def _copy(source: Path, path: Path) -> None:
    with whole_file(path) as part:
        shutil.copyfile(source, part)
        send_to_disk(part)
        check_sums(part)
    sync_folder(path.parent)
