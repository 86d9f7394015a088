"""``fit --verify-resume K``: before a long run, a rehearsal of what a resume relies on.

A trial goes K steps, writes a checkpoint and goes K steps more. Another one, built afresh as a start of the command
builds it, goes on from that file for K steps. Both must see the same data, draw the same and end in the same state, on
every rank, to the last bit. What either writes lies in a folder of its own, which is removed however it ends, and
nothing is logged.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from fm_stages.data import load_tensors
from fm_stages.oracle import gather_objects, together
from fm_stages.training.checkpoints.continuity import random_state, set_random_state, tables
from fm_stages.training.checkpoints.files import CONTINUITY
from fm_stages.training.checkpoints.preemption import Preempted
from fm_stages.training.logs.loggers import mark_as_trial

FOLDER = ".verify_resume_"
"""Begins the name of a folder in the run's, while the rehearsal goes on."""

WALL_CLOCK = ("speed/", "oracle/share")
"""Beginnings of names of logged numbers that say how fast it went."""

PARTS = {"state_dict": "weights", "optimizer_states": "optimizer", "callbacks": "callback", "continuity": "draws"}
"""Of a checkpoint, in the order of what is named first, and what they are called."""


class Trial(NamedTuple):
    """What a fresh start of the command builds."""

    trainer: L.Trainer
    module: L.LightningModule
    data: Any


class Verified(SystemExit):
    """The trial has gone far enough, on all ranks: the way out of a fit, past validations and pictures."""


class Replay(Checkpoint):
    """Writes down what each micro-batch was and what all of it ended in; after all other callbacks.

    Args:
        begin: step after which to write down.
        end: step after which to end.
        save: file to write a checkpoint to at ``begin``, if any.
    """

    def __init__(self, begin: int, end: int, save: Path | None = None) -> None:
        self.begin, self.end, self.save = begin, end, save
        self.seen: dict[str, str] = {}
        """Hashes by what they are of, in the order of time."""
        self.lines: dict[str, str] = {}
        """Logged values, by line and name."""
        self._micro_batch = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note a micro-batch; save, or end."""
        step = trainer.global_step
        whole = not trainer.fit_loop.epoch_loop._should_accumulate()
        self._micro_batch = 0 if whole else self._micro_batch + 1
        if step + (not whole) > self.begin:
            place = f"step {step + (not whole)}" + ("" if whole else f", micro-batch {self._micro_batch}")
            outputs = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
            self.seen[f"{place}: the data"] = digest(batch)
            drawn = {name: x for name, x in outputs.items() if name not in ("loss", "prediction")}
            self.seen[f"{place}: noise, times and labels"] = digest(drawn)
            self.seen[f"{place}: the loss"] = digest(outputs.get("loss"))
        if whole and step == self.begin and self.save is not None:
            trainer.save_checkpoint(self.save, weights_only=False)
        if whole and step == self.end:
            self.seen.update(states(trainer))
            raise Verified


def verify_resume(build: Callable[[Path], Trial], start: Trial, num_steps: int, begun_from: str | None) -> None:
    """Rehearse a resume, and tell how it went; every rank calls this.

    Args:
        build: makes a `Trial` in a folder.
        start: the run that is to be made; its weights are those that the rehearsal begins with.
        num_steps: K.
        begun_from: checkpoint that the run itself goes on from, if any.

    Raises:
        ValueError: naming what differs first; or if the run is too short.
    """
    group = _meet(start)
    with together(group):
        first = 0 if begun_from is None else int(load_tensors(begun_from, mmap=True)["global_step"])
    begin, end = first + num_steps, first + 2 * num_steps
    if 0 < start.trainer.max_steps < end:
        raise ValueError(
            f"--verify-resume {num_steps} takes {2 * num_steps} steps from step {first}, and the run ends at "
            f"trainer.max_steps={start.trainer.max_steps}: choose fewer"
        )
    rank_zero_info(f"Verifying the resume: steps {begin} to {end}, then the same again from a checkpoint of {begin}.")
    device = start.trainer.strategy.root_device
    shared = random_state(device)
    with _own_folder(start.trainer, group) as folder:
        file = folder / "checkpoints/replayed.ckpt"  # among those of the trials: they go on with their tables
        with together(group):
            trial = build(folder)
            trial.module.load_state_dict(start.module.state_dict())
        expected = _go(trial, Replay(begin, end, file), begun_from, group)
        del trial
        gc.collect()  # two networks need not be in memory
        with together(group):
            trial = build(folder)
        found = _go(trial, Replay(begin, end), str(file), group)
        with together(group):
            difference = next(_differences(expected.seen | expected.lines, found.seen | found.lines), None)
            if difference:
                raise ValueError(
                    f"--verify-resume: {num_steps} steps from a checkpoint of step {begin} are others than those of "
                    f"the run that wrote it. First of what differs: {difference}"
                )
    set_random_state(shared, device)
    ranks = start.trainer.world_size
    rank_zero_info(
        f"Resume verified: {num_steps} steps from the checkpoint of step {begin}, made again by a fresh start from its "
        f"file, are the same to the last bit on {ranks} rank{'s' * (ranks > 1)}: data, draws and losses, "
        f"{len(found.seen)} hashes of them, of weights, optimizer and callbacks; {len(found.lines)} lines of logged "
        "numbers."
    )


def _meet(start: Trial) -> dist.ProcessGroup | None:
    """Start the other ranks, where Lightning does that, and let all meet, which a fit would do otherwise."""
    trainer, strategy = start.trainer, start.trainer.strategy
    strategy.connect(start.module)
    if strategy.launcher is None:
        strategy.setup_environment()
    else:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    return dist.group.WORLD if trainer.world_size > 1 else None


@contextmanager
def _own_folder(trainer: L.Trainer, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """A new folder in the run's, the same on all ranks, of which nothing stays."""
    run, own, is_new = Path(trainer.default_root_dir), "", False
    try:
        with together(group):
            if trainer.is_global_zero:
                is_new = not run.exists()
                run.mkdir(parents=True, exist_ok=True)
                own = tempfile.mkdtemp(prefix=FOLDER, dir=run)
        yield Path(gather_objects(own, group)[0])
    finally:
        if own:
            shutil.rmtree(own, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # somebody has put something there
                run.rmdir()


def _go(trial: Trial, replay: Replay, ckpt_path: str | None, group: dist.ProcessGroup | None) -> Replay:
    """Let a trial run and see what it does."""
    trainer: Any = trial.trainer
    trainer.callbacks.append(replay)
    mark_as_trial(trainer)
    try:
        trainer.fit(trial.module, datamodule=trial.data, ckpt_path=ckpt_path)
    except Verified:
        with together(group):
            replay.lines = _logged(trainer)
        return replay
    except Preempted:
        rank_zero_info("Stopped in the rehearsal; nothing was begun.")
        raise
    raise ValueError(
        f"--verify-resume: the run ended at step {trainer.global_step}, before the rehearsal: choose fewer"
    )


def states(trainer: L.Trainer) -> Iterator[tuple[str, str]]:
    """Hashes of all that a checkpoint holds, by its place; and of this rank's own part of the weights."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    for name in ("run", "tables"):  # the id is rank 0's alone, and lines are compared by themselves
        checkpoint.get(CONTINUITY, {}).pop(name, None)
    for name, tensor in trainer.lightning_module.state_dict().items():
        yield f"weights {name}", digest(tensor)
    for part, kind in PARTS.items():
        for place, leaf in _leaves(checkpoint.get(part), ""):
            yield f"{kind}{place}", digest(leaf)
    for part in sorted(checkpoint.keys() - PARTS.keys() - {"loops"}):  # whose counts restart by Lightning's own rules
        for place, leaf in _leaves(checkpoint[part], ""):
            yield f"{part}{place}", digest(leaf)


def digest(value: Any) -> str:
    """A hash of the bits of tensors, and of anything else as text."""
    found = hashlib.sha256()
    for place, leaf in _leaves(value, ""):
        found.update(place.encode())
        if isinstance(leaf, Tensor):
            own = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            found.update(f"{tuple(own.shape)} {own.dtype}".encode())
            found.update(own.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _leaves(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{place}/{key}")
    elif isinstance(tree, list | tuple) and any(isinstance(x, Mapping | list | tuple | Tensor) for x in tree):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{place}/{i}")
    else:
        yield place, tree


def _logged(trainer: L.Trainer) -> dict[str, str]:
    """The lines of the trial's table, but for the clock; before the first one there is no file."""
    lines = {}
    files = [Path(table.experiment.metrics_file_path) for table in tables(trainer)]
    for file in filter(Path.exists, files):
        with file.open(newline="") as text:
            for number, row in enumerate(csv.DictReader(text)):
                for name, value in row.items():
                    if value and not name.startswith(WALL_CLOCK):
                        lines[f"logged line {number}: {name} of step {row['step']}"] = value
    return lines


def _differences(expected: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    """What is not the same in both, or not there in one, in the order of time."""
    for a, b in zip_longest(expected, found):
        name = a if a is not None else b
        assert name is not None
        if a != b:
            yield f"{name} (the other has {b if a is not None else 'none'} in its place)"
        elif expected[name] != found[name]:
            yield name
