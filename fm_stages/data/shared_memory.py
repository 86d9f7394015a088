"""Rows in memory, once on each host, however many ranks train there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fm_stages.data.host import available_memory_bytes, is_first_rank
from fm_stages.data.stored_rows import PIECE
from fm_stages.oracle import gather_objects, together

SHM = Path("/dev/shm")


def in_memory(
    shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[Tensor], Tensor], group: dist.ProcessGroup | None
) -> Tensor:
    """Rows (N, ...), read under a progress bar; each rank of a host reads a part of them. All ranks call this.

    Args:
        shape: (N, ...).
        dtype: of the values.
        read: rows (M,) int64 as (M, ...).
        group: of all ranks; None: there is this one.

    Raises:
        MemoryError: on every rank, if they do not fit into the memory of a host.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    hosts = gather_objects(socket.gethostname(), group)
    rank = 0 if group is None else dist.get_rank(group)
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    with together(group):
        available = available_memory_bytes()
        if num_bytes > available:
            raise MemoryError(
                f"{shape[0]} rows take {num_bytes / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are "
                "available: choose residency 'disk', which maps the files"
            )
    rows = torch.empty(shape, dtype=dtype) if group is None else _shared(shape, dtype, num_bytes, rank, here, group)
    own = torch.arange(shape[0]).tensor_split(len(here))[here.index(rank)]
    with (
        together(group),
        tqdm(total=len(own), desc="Loading latents", unit="row", delay=1, disable=not is_first_rank()) as bar,
    ):
        for part in own.split(PIECE):
            rows[part[0] : part[-1] + 1] = read(part)
            bar.update(len(part))
    return rows


def _shared(
    shape: tuple[int, ...], dtype: torch.dtype, num_bytes: int, rank: int, here: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Memory that the ranks of a host share: a file that has no name any more once they have all mapped it."""
    names = gather_objects(f"fm-stages-{uuid.uuid4().hex}", group)
    file = SHM / names[here[0]]
    try:
        with together(group):
            if rank == here[0]:
                _allocate(file, num_bytes)
        with together(group):
            if not file.exists():  # torch would make one, of zeros
                raise FileNotFoundError(
                    f"ranks of {socket.gethostname()} do not share {SHM}, because each is in a container of its own or "
                    "another host has that name: start all ranks of a host in one container, or choose residency 'disk'"
                )
            rows = torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
    finally:  # before it is filled, so that nothing is left of a run that is killed meanwhile
        if rank == here[0]:
            file.unlink(missing_ok=True)
    return rows


def _allocate(file: Path, num_bytes: int) -> None:
    """Make a file with all of its memory: to find none later, on writing, would kill the process."""
    with file.open("xb") as made:
        try:
            os.posix_fallocate(made.fileno(), 0, num_bytes)
        except OSError as error:
            file.unlink()
            if error.errno != errno.ENOSPC:
                raise
            free = shutil.disk_usage(file.parent).free
            raise MemoryError(
                f"the rows take {num_bytes / 2**30:.2f} GiB of {file.parent}, which has {free / 2**30:.2f} GiB: give "
                "it more (docker run --shm-size), or choose residency 'disk'"
            ) from error
