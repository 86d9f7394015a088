"""Back to the last good checkpoint, and past the batches between it and the step that went wrong.

The way back is a file: last.ckpt becomes the good checkpoint with another place in the data. Whoever resumes from it,
this process or one that is started after a kill, passes over the same batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from fm_stages.data import TrainingData, load_tensors
from fm_stages.training.checkpoints.files import CONTINUITY, LAST, WholeFiles, whole_checkpoints


class Rewind(Exception):  # noqa: N818 - it is no error: `fit_with_rewinds` goes on
    """Training goes on from another checkpoint, which takes a new ``fit``.

    Attributes:
        path: of that checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"training goes back: resume from {path} (fm-stages fit does so by itself)")
        self.path = path


def fit_with_rewinds(trainer: L.Trainer, **arguments: Any) -> None:
    """``trainer.fit``, again and again from where the guards go back to."""
    while True:
        try:
            return trainer.fit(**arguments)
        except Rewind as back:
            arguments["ckpt_path"] = str(back.path)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback._last_global_step_saved = 0  # else steps that were saved before would not be saved again


def find_before(folder: Path, step: int, run_id: str | None = None) -> Path | None:
    """The newest whole checkpoint in a folder that is not later than a step, of a run if it is named."""
    return next((file for _, file in whole_checkpoints(folder, step, run_id)), None)


def find_good(folder: Path, step: int, run_id: str | None = None) -> Path | None:
    """Where to go back to from a step: to weights that have been through a step since, or else to its own.

    What is wrong at a step may be wrong with the weights that it began with.
    """
    return find_before(folder, step - 1, run_id) or find_before(folder, step, run_id)


def write_rewound(
    good: Path, folder: Path, data: TrainingData, state_key: str, state: dict[str, Any], logged: dict[str, Any]
) -> None:
    """Let last.ckpt be a good checkpoint that goes on with the batches after the one that is being trained on.

    The data never go back: what was passed over once stays so, however often and how far the weights go back.

    Args:
        good: from `find_good`.
        folder: of last.ckpt.
        data: whose place now is the new one.
        state_key: of the guards, in the checkpoint.
        state: numbers of the guards that replace the checkpoint's.
        logged: from `fm_stages.training.checkpoints.continuity.logged_so_far`: what was logged on the way stays in
            the tables.
    """
    checkpoint = load_tensors(good)
    data.pass_over(checkpoint)
    callbacks = checkpoint.setdefault("callbacks", {})
    callbacks[state_key] = {**callbacks.get(state_key, {}), **state}
    if CONTINUITY in checkpoint:
        checkpoint[CONTINUITY].update(logged)
    WholeFiles().save_checkpoint(checkpoint, folder / LAST)
