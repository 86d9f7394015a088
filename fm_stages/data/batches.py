"""How the images of an optimizer step are shared out: over ranks, and over micro-batches that are accumulated.

A user writes how many images a step takes; what a rank takes at once follows from the number of ranks and from what
fits into its memory.
"""

from __future__ import annotations

from typing import Any

import lightning as L


def check_shares(batch_size: int, num_ranks: int, accumulation: int = 1) -> None:
    """Refuse a batch that does not divide into equal parts.

    Raises:
        ValueError: with the nearest batch sizes that do.
    """
    parts = num_ranks * accumulation
    if batch_size % parts:
        below = batch_size // parts * parts
        nearest = f"{below} and {below + parts} do" if below else f"{parts} is the smallest that does"
        micro = f" times {accumulation} accumulated micro-batches" if accumulation > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} images per optimizer step do not divide into {num_ranks} ranks{micro}: {nearest}"
        )


def accumulation_for(batch_size: int, num_ranks: int, micro_batch_size: int) -> int:
    """The smallest number of equal micro-batches per step of which each rank takes micro_batch_size images at most.

    Raises:
        ValueError: if the batch does not divide into ranks.
    """
    check_shares(batch_size, num_ranks)
    per_rank = batch_size // num_ranks
    return next(a for a in range(1, per_rank + 1) if per_rank % a == 0 and per_rank // a <= micro_batch_size)


def accumulate(trainer: L.Trainer, batch_size: int, micro_batch_size: int) -> None:
    """Let a Trainer accumulate so that no rank takes more than micro_batch_size images at once.

    Raises:
        ValueError: if the batch does not divide into ranks, or the Trainer was told how to accumulate.
    """
    accumulation = accumulation_for(batch_size, trainer.world_size, micro_batch_size)
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} is given, and "
            f"micro_batch_size={micro_batch_size}, from which {accumulation} follows: leave one of them out"
        )
    trainer.accumulate_grad_batches = accumulation
    for interval in ("val_check_interval", "limit_train_batches"):  # of which Lightning counts micro-batches
        if isinstance(number := getattr(trainer, interval), int):
            setattr(trainer, interval, number * accumulation)


def describe_shares(batch_size: int, num_ranks: int, accumulation: int) -> str:
    """For example: 256 images per step = 8 ranks x 16 x 2 accumulated."""
    ranks = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
    accumulated = f" x {accumulation} accumulated" if accumulation > 1 else ""
    return f"{batch_size} images per step = {ranks} x {batch_size // (num_ranks * accumulation)}{accumulated}"


def recount(progress: dict[str, Any], old: int, new: int) -> int | None:
    """Count micro-batches as if there had been ``new`` of them in each step and not ``old``.

    Lightning counts micro-batches, and would take those of a checkpoint for as many of this run's.

    Args:
        progress: state of Lightning's batch progress, "total" and "current"; changed in place.
        old: micro-batches per step in the checkpoint.
        new: the same in this run.

    Returns:
        How many more there are in total; None, and no change, inside a step.
    """
    counts = progress["total"], progress["current"]
    if any(count["processed"] % old for count in counts):
        return None
    more = [count["processed"] // old * (new - old) for count in counts]
    for count, change in zip(counts, more, strict=True):
        count.update({name: number + change for name, number in count.items()})
    return more[0]
