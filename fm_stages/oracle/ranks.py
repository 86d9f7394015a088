"""What ranks say to each other about a sharded bank. With group None there is one rank, and all of it is free.

Every function is a collective: all ranks of the group call it, in the same order. Uneven lengths are allowed where the
docstring says so. Tensors may lie on the CPU under NCCL: they travel over the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def sizes_of(num: int, group: dist.ProcessGroup | None) -> list[int]:
    """One integer of each rank, in order."""
    if group is None:
        return [num]
    wire = _to_wire(torch.tensor([num]), group)
    parts = [torch.empty_like(wire) for _ in range(num_ranks(group))]
    dist.all_gather(parts, wire, group=group)
    return [int(part) for part in parts]


@contextmanager
def together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turn the ValueError of any rank into one on all: a rank that failed alone would leave the others waiting.

    Around checks of what a rank was given, without collectives inside.
    """
    if group is None:
        yield
        return
    own: ValueError | None = None
    try:
        yield
    except ValueError as error:
        own = error
    if not any(sizes_of(own is not None, group)):
        return
    messages = gather_objects(None if own is None else str(own), group)
    if own is not None:
        raise own
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise ValueError(f"rank {rank} cannot go on: {message}")


def agree(values: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise ValueError, on every rank, if the ranks have different values under a name."""
    if group is None:
        return
    all_values = gather_objects(values, group)
    for name in values:
        seen = [other[name] for other in all_values]
        if any(value != seen[0] for value in seen):
            raise ValueError(
                f"the ranks disagree on {name}: "
                + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(seen))
                + "; the parts of one bank must be alike"
            )


def _to_wire(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor where the group's backend can send it."""
    x = x.contiguous()
    on_gpu_only = dist.get_backend(group) == "nccl"
    return x.cuda() if on_gpu_only and x.device.type == "cpu" else x
