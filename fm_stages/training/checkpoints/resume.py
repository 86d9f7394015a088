"""``--ckpt_path last``: which file that is, and that all ranks go on from the same one."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fm_stages.training.checkpoints.files import LAST, check_sums, resumable_step, whole_checkpoints
from fm_stages.training.ranks import gather


def find_last(folder: str, run_id: str | None = None) -> str | None:
    """The checkpoint that a run goes on from: last.ckpt, or else the newest that is whole.

    A line says which was passed over and why; or that there is none yet.

    Args:
        folder: of a run's checkpoints.
        run_id: of the run; checkpoints of others in the folder are passed over.

    Returns:
        Its path; None where no checkpoint was ever written.

    Raises:
        ValueError: if there are checkpoints, and none of them can be gone on from.
    """
    last = Path(folder) / LAST
    passed_over: dict[Path, str] = {}
    try:
        resumable_step(last)
        check_sums(last)
        return str(last)
    except (OSError, ValueError) as error:
        passed_over[last] = str(error)
    step, file = next(whole_checkpoints(Path(folder), run_id=run_id, passed_over=passed_over), (0, None))
    found = [path for path in passed_over if path.exists()]
    if file is None and not found:
        rank_zero_info(f"There is no {last} yet: the run starts at step 0.")
        return None
    why = "; ".join(f"{path.name}: {reason}" for path, reason in passed_over.items())
    if file is None:
        raise ValueError(f"no checkpoint in {folder} can be gone on from ({why}): remove them to start anew")
    rank_zero_info(f"Going on from {file}, of step {step}, and not from {why}.")
    return str(file)


@contextmanager
def blaming(checkpoint: str | Path | None) -> Iterator[None]:
    """Name the checkpoint where Lightning cannot make sense of a state in it.

    Raises:
        ValueError: in the place of what Lightning raised; what this package says of a checkpoint stays as it is.
    """
    try:
        yield
    except Exception as error:
        frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        restoring = any(Path(code.co_filename).name == "checkpoint_connector.py" for code in frames)
        ours = Path(frames[-1].co_filename).is_relative_to(Path(__file__).parents[2])
        if checkpoint is None or not restoring or ours:
            raise
        raise ValueError(
            f"{checkpoint} holds a state that cannot be gone on from ({type(error).__name__}: {error})"
        ) from error


class SameStart(L.Callback):
    """Refuses a run whose ranks read different checkpoints: nodes that do not share the folder, or see it late.

    Attributes:
        start: step and name of the checkpoint that this rank read.
    """

    def __init__(self) -> None:
        self.start = 0, "none"

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Compare, before anything of the checkpoint is used.

        Raises:
            ValueError: on every rank, if they differ.
        """
        starts = gather(self.start)
        if len(set(starts)) > 1:
            found = ", ".join(f"rank {rank} {name} of step {step}" for rank, (step, name) in enumerate(starts))
            raise ValueError(
                f"the ranks found different checkpoints ({found}): all nodes need the same "
                "--trainer.default_root_dir, on a file system that they share"
            )
