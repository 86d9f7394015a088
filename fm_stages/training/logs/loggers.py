"""Numbers, tables and figures to whatever logger the Trainer has, and to the run's folder in any case."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from matplotlib.figure import Figure

from fm_stages import plots
from fm_stages.data import whole_file
from fm_stages.oracle import Curves

Table = tuple[list[str], list[list[float]]]
"""Columns and rows."""


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run's figures and tables go: to its metrics and checkpoints, if the Trainer was not told a folder.

    Its `default_root_dir` is then the working folder, where one run would write over the figures of another. Where
    checkpoints lie in the working folder, it was told.
    """
    root = Path(trainer.default_root_dir)
    if root != Path.cwd() or not isinstance(trainer.logger, CSVLogger | TensorBoardLogger):
        return root
    of_checkpoints = [Path(str(c.dirpath)) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return root if root / "checkpoints" in of_checkpoints else Path(trainer.logger.log_dir)


def is_trial(trainer: L.Trainer) -> bool:
    """Whether this is a fast_dev_run or a rehearsal, which must not write over a real run's files."""
    return bool(vars(trainer).get("fast_dev_run") or vars(trainer).get("is_rehearsal"))


def mark_as_trial(trainer: L.Trainer) -> None:
    """Let a run write neither checkpoints nor figures, and no record of anything."""
    vars(trainer)["is_rehearsal"] = True


def current_step(trainer: L.Trainer) -> int:
    """The step that the weights are of; in ``validate`` the checkpoint's."""
    return trainer.global_step or getattr(trainer.lightning_module, "loaded_step", 0)


@rank_zero_only
def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Scalars, at once: `LightningModule.log` would drop those of steps that the Trainer does not log."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=current_step(trainer))


@rank_zero_only
def write_curves(trainer: L.Trainer, name: str, curves: Curves) -> None:
    """Curves of this step as a table, ``<run>/<name>_<step>.csv``."""
    write_table(trainer, f"{name}_{current_step(trainer):07d}", curves.table())


@contextmanager
def dispensable(trainer: L.Trainer, name: str) -> Iterator[None]:
    """Around the writing of a file that training does not need: where the disk is full it goes on.

    The first such failure of a run is told at once, and how many there were by `tell_lost_files`.
    """
    try:
        yield
    except OSError as error:
        lost = _LOST_FILES.setdefault(trainer, [])
        lost.append(f"{name}: {error}")
        if len(lost) == 1:
            rank_zero_warn(
                f"{name} could not be written ({error}). Training goes on; a checkpoint that cannot be written ends it."
            )


def tell_lost_files(trainer: L.Trainer) -> None:
    """At the end of a run: how many files are missing, if any are."""
    if lost := _LOST_FILES.pop(trainer, []):
        rank_zero_info(f"{len(lost)} figures or tables could not be written, first {lost[0]}.")


_LOST_FILES: WeakKeyDictionary[L.Trainer, list[str]] = WeakKeyDictionary()


@rank_zero_only
def write_table(trainer: L.Trainer, name: str, table: Table) -> None:
    """A table as ``<run>/<name>.csv``, whole whenever a run is killed."""
    if is_trial(trainer):
        return
    with (
        dispensable(trainer, f"{name}.csv"),
        whole_file(run_folder(trainer) / f"{name}.csv") as part,
        part.open("w", newline="") as file,
    ):
        columns, rows = table
        csv.writer(file).writerows([columns, *rows])


def keep_until(file: Path, step: int) -> None:
    """Take out of a file of JSON lines those of later steps, and a last one that is cut short; none is no file."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with whole_file(file) as part:
        part.write_text("".join(kept))


@rank_zero_only
def log_table(trainer: L.Trainer, name: str, table: Table, step: int) -> None:
    """A table, to wandb. Each is a file of its own there: not for every window of a long run."""
    columns, rows = table
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and not is_trial(trainer):
            logger.log_table(name, columns=columns, data=rows, step=step)


@rank_zero_only
def log_figure(trainer: L.Trainer, name: str, figure: Figure, table: Table, step: int | None = None) -> None:
    """A figure with the numbers that it shows: ``<run>/<name>.png`` and ``.csv``, the newest.

    To wandb it goes under ``<name>_figure``, for one key holds one kind; at the run's step if none is given.
    """
    if is_trial(trainer):
        return
    write_table(trainer, name, table)
    with dispensable(trainer, f"{name}.png"):
        log_image(trainer, f"{name}_figure", plots.save(figure, run_folder(trainer) / f"{name}.png"), step)


@rank_zero_only
def log_image(trainer: L.Trainer, name: str, path: Path, step: int | None = None) -> None:
    """A picture file, to wandb, at the run's step if none is given."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=current_step(trainer) if step is None else step)


def choose_wandb_mode(host: str = "api.wandb.ai", timeout_sec: float = 2.0) -> str:
    """Set WANDB_MODE to offline if there is no login or no network, unless it is set: a run never waits for wandb.

    Returns:
        The mode, for a message.
    """
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if not _has_wandb_login():
        os.environ["WANDB_MODE"] = "offline"
        return "offline (no login: `wandb login` once, or WANDB_API_KEY)"
    try:
        socket.create_connection((host, 443), timeout=timeout_sec).close()
    except OSError:
        os.environ["WANDB_MODE"] = "offline"
        return f"offline ({host} cannot be reached; `wandb sync` sends the run later)"
    return "online"


@rank_zero_only
def prepare_wandb(trainer: L.Trainer) -> None:
    """Before wandb starts: keep it from two warnings that nobody can do anything about.

    Lightning gives it a setting that it no longer has, and it looks for the repository, whose commit it notes, from a
    folder that it makes later.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        if logger._wandb_init.get("anonymous", "") is None:
            del logger._wandb_init["anonymous"]
        Path(logger.save_dir or ".").mkdir(parents=True, exist_ok=True)


def _has_wandb_login() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
