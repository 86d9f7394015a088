"""The bank of a training set, made without a second copy of its rows."""

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fm_stages.data.host import is_first_rank
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
