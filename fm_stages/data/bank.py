"""The bank of a training set, made without a second copy of its rows; and the memory that there is for it."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from fm_stages.data.loading import LabelledRows
from fm_stages.oracle import DataBank, GaussianMixtureBank, RowReader


def bank_of(train: LabelledRows, own: range, group: dist.ProcessGroup | None) -> DataBank | GaussianMixtureBank:
    """The bank of a training set; ``own`` are the rows that this rank brings."""
    every = own.stop - own.start
    with tqdm(total=2 * every, desc="Making the bank", unit="row", delay=1, disable=not is_first_rank()) as bar:

        def read(index: Tensor) -> Tensor:
            values = train.stored(index + own.start)
            bar.update(len(index))
            return values

        rows = RowReader((every, *train.shape), train.dtype, read, name_of=lambda row: train.name_of(row + own.start))
        labels = None if train.labels is None else train.labels_of(torch.arange(own.start, own.stop))
        make = GaussianMixtureBank.of_moments if train.is_moments else DataBank
        return make(rows, labels, train.scale, train.shift, group)


def is_first_rank() -> bool:
    """Whether this is the rank that shows progress bars."""
    return getattr(rank_zero_only, "rank", 0) == 0


def available_memory_bytes() -> int:
    """Memory that can be used without swapping, on Linux; elsewhere all there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
