"""What the ranks of a run tell each other outside of a step: small values of each, and what rank 0 alone has done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist

from fm_stages.oracle import gather_objects


def gather(value: Any) -> list[Any]:
    """One small picklable value of each rank, in order; every rank calls this, if there are others."""
    return gather_objects(value, dist.group.WORLD if dist.is_initialized() else None)


def on_rank_0(trainer: L.Trainer, failed: str, work: Callable[[], Any]) -> Any:
    """What comes of some work of rank 0, on all ranks, which wait for it.

    Args:
        trainer: of the run.
        failed: begins the message, should it fail.
        work: done on rank 0.

    Raises:
        ValueError: on every rank, if it fails.
    """
    result, failure = None, ""
    if trainer.is_global_zero:
        try:
            result = work()
        except Exception as error:  # torch raises many kinds
            failure = f"{failed}: {error}"
    result, failure = trainer.strategy.broadcast((result, failure))
    if failure:
        raise ValueError(failure)
    return result
