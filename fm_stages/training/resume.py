"""``--ckpt_path last``: which file that is, and that all ranks go on from the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

LAST = "last.ckpt"


def find_last(folder: str) -> str | None:
    """The last checkpoint in a run's folder of checkpoints; None, and a line that says so, before there is one."""
    file = Path(folder) / LAST
    if file.exists():
        return str(file)
    rank_zero_info(f"There is no {file} yet: the run starts at step 0.")
    return None


class SameStart(L.Callback):
    """Refuses a run whose ranks read different checkpoints: nodes that do not share the folder, or see it late.

    Attributes:
        step: of the checkpoint that this rank read; 0: of none.
    """

    def __init__(self) -> None:
        self.step = 0

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Compare, before anything of the checkpoint is used.

        Raises:
            ValueError: on every rank, if they differ.
        """
        if trainer.world_size == 1:
            return
        steps: list[int] = [0] * trainer.world_size
        dist.all_gather_object(steps, self.step)
        if len(set(steps)) > 1:
            found = ", ".join(f"rank {rank} step {step}" for rank, step in enumerate(steps))
            raise ValueError(
                f"the ranks found different checkpoints ({found}; 0 is none): all nodes need the same "
                "--trainer.default_root_dir, on a file system that they share"
            )
