"""What an oracle refuses to be asked: queries, times, labels and indices that do not fit its bank."""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.flow import check_time, expand_time
from fm_stages.oracle.bank import DataBank
from fm_stages.oracle.inputs import check_index, check_tensor


def check_queries(
    bank: DataBank,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor | None,
    index: Tensor | None,
    x1: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise TypeError or ValueError unless all of this fits the bank; arguments as of `Oracle.posterior`.

    Args:
        bank: of the oracle.
        x_t: the queries, or the noise that makes them of ``x1``.
        t: their times.
        labels: that they are conditioned on, if any.
        index: of the rows that they were made from, if they are known.
        x1: (B, ...) the data that they are made from, if that is given.
        dtype: what values are taken in, and are finite in.
    """
    if tuple(x_t.shape[1:]) != bank.shape or (len(x_t) == 0 and bank.group is None):
        raise ValueError(f"queries are (B, ...) = (B, *{bank.shape}) like the bank's rows, got {tuple(x_t.shape)}")
    check_values("queries", x_t, bank, dtype)
    _check_device("times", t, bank)
    expand_time(t, x_t)
    check_time(t)
    if x1 is not None:
        check_values("data", x1, bank, dtype)
        if x1.shape != x_t.shape:
            raise ValueError(f"noise {tuple(x_t.shape)} and data {tuple(x1.shape)} need one shape")
    if index is not None:
        check_tensor("index", index)
        check_index(index, bank.num_rows)
        if len(index) != len(x_t):
            raise ValueError(f"need one index per query, got {len(index)} for {len(x_t)} queries")
    if labels is not None:
        check_tensor("labels", labels)
        if labels.shape != t.shape or labels.is_floating_point():
            raise ValueError(
                f"need one integer label per query, -1 for unconditional: got {labels.dtype} of shape "
                f"{tuple(labels.shape)} for {len(x_t)} queries"
            )
        for label in labels.unique().tolist():
            bank.slice_of(label)  # raises if there is none


def check_values(name: str, x: Tensor, bank: DataBank, dtype: torch.dtype) -> None:
    """Raise unless these (B, ...) are finite numbers, as the network sees them, where the bank is."""
    _check_device(name, x, bank)
    if not x.is_floating_point():
        raise ValueError(f"{name} are floating point, as the network sees them: got {x.dtype}")
    finite = torch.isfinite(x.to(dtype))
    if not bool(finite.all()):
        row = int((~finite).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"row {row} of the {name} holds NaN or infinity: no posterior belongs to it")


def _check_device(name: str, x: Tensor, bank: DataBank) -> None:
    check_tensor(name, x)
    if x.device != bank.device:
        raise ValueError(f"the bank is on {bank.device}, the {name} on {x.device}: move it: bank.to(...)")
