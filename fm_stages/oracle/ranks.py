"""What ranks say to each other about a sharded bank. With group None there is one rank, and all of it is free.

Every function is a collective: all ranks of the group call it, in the same order. Uneven lengths are allowed where the
docstring says so. Tensors may lie on the CPU under NCCL: they travel over the GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group."""
    return 1 if group is None else dist.get_world_size(group)


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This rank's number in the group."""
    return 0 if group is None else dist.get_rank(group)


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """One small picklable value of each rank, in order."""
    if group is None:
        return [value]
    values: list[Any] = [None] * num_ranks(group)
    dist.all_gather_object(values, value, group=group)
    return values


def reduce(x: Tensor, group: dist.ProcessGroup | None, op: str = "sum") -> Tensor:
    """Sum, max or min over ranks, element by element."""
    if group is None:
        return x
    travelling = _to_wire(x, group).clone()
    dist.all_reduce(travelling, getattr(dist.ReduceOp, op.upper()), group=group)
    return travelling.to(x.device)


def gather(x: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Tensors (n_r, ...) of all ranks, one after the other: (sum n_r, ...). ``sizes`` are the n_r, known to all."""
    if group is None:
        return x
    wire = _to_wire(x, group)
    padded = wire.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = wire
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(x.device)


def numbers_of(numbers: list[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """A few integers of each rank, in order."""
    if group is None:
        return [numbers]
    wire = _to_wire(torch.tensor(numbers), group)
    parts = [torch.empty_like(wire) for _ in range(num_ranks(group))]
    dist.all_gather(parts, wire, group=group)
    return torch.stack(parts).tolist()


def sizes_of(num: int, group: dist.ProcessGroup | None) -> list[int]:
    """One integer of each rank, in order."""
    return [numbers[0] for numbers in numbers_of([num], group)]


@dataclass
class Meeting:
    """What ranks tell each other at the start of a call.

    Attributes:
        alike: names, and this rank's values, of what has to be the same on all ranks.
        size: a number of this rank.
        sizes: that number of each rank, once they have met.
    """

    alike: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    sizes: list[int] = field(default_factory=list)


@contextmanager
def together(group: dist.ProcessGroup | None) -> Iterator[Meeting]:
    """Turn the error of any rank into one on all: a rank that failed alone would leave the others waiting.

    Around checks of what a rank was given, without collectives inside. Where all is well it costs one small collective.

    Raises:
        ValueError: on every rank if one has failed (its own error on that one), or if the ranks are not `alike`.
    """
    meeting = Meeting()
    own: Exception | None = None
    try:
        yield meeting
    except Exception as error:
        if group is None:
            raise
        own = error
    checksum = zlib.crc32(repr(meeting.alike).encode())
    seen = numbers_of([meeting.size, checksum, own is not None], group)
    meeting.sizes = [size for size, _, _ in seen]
    if all(rest == [seen[0][1], 0] for _, *rest in seen):
        return
    said = gather_objects((None if own is None else str(own), meeting.alike), group)
    if own is not None:
        raise own
    for rank, (message, _) in enumerate(said):
        if message is not None:
            raise ValueError(f"rank {rank} cannot go on: {message}")
    for name in meeting.alike:
        values = [alike.get(name) for _, alike in said]
        if any(value != values[0] for value in values):
            those = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
            raise ValueError(f"the ranks disagree on {name}: {those}; they work together and must be given the same")
    raise ValueError(f"the ranks are in different calls: {[list(alike) for _, alike in said]}")


def _to_wire(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor where the group's backend can send it."""
    x = x.contiguous()
    on_gpu_only = dist.get_backend(group) == "nccl"
    return x.cuda() if on_gpu_only and x.device.type == "cpu" else x
