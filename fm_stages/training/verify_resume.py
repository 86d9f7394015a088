"""``fit --verify-resume K``: before a long run, a rehearsal of what a resume relies on.

A trial goes K steps, writes a checkpoint and goes K steps more. Another one, built afresh as a start of the command
builds it, goes on from that file for K steps. Both must see the same data, draw the same and end in the same state, on
every rank, to the last bit. What either writes lies in a folder of its own, which is removed, and nothing is logged.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor

from fm_stages.oracle import together
from fm_stages.training.continuity import random_state, set_random_state, tables

FOLDER = "verify_resume"
"""In the run's folder, while the rehearsal goes on."""

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
    folder = Path(start.trainer.default_root_dir) / FOLDER
    first = 0 if begun_from is None else int(torch.load(begun_from, weights_only=True, mmap=True)["global_step"])
    begin, end = first + num_steps, first + 2 * num_steps
    if 0 < start.trainer.max_steps < end:
        raise ValueError(
            f"--verify-resume {num_steps} takes {2 * num_steps} steps from step {first}, and the run ends at "
            f"trainer.max_steps={start.trainer.max_steps}: choose fewer"
        )
    rank_zero_info(f"Verifying the resume: steps {begin} to {end}, then the same again from a checkpoint of {begin}.")
    shared = random_state(torch.device("cpu"))
    file = folder / "checkpoints/replayed.ckpt"  # among those of the trials: they go on with their tables
    _remove(folder)
    trial = build(folder)
    trial.module.load_state_dict(start.module.state_dict())
    expected, lines = _go(trial, Replay(begin, end, file), begun_from)
    del trial
    gc.collect()  # two networks need not be in memory
    trial = build(folder)
    found, again = _go(trial, Replay(begin, end), str(file))
    ranks = trial.trainer.world_size
    set_random_state(shared, torch.device("cpu"))
    with together(torch.distributed.group.WORLD if ranks > 1 else None):
        difference = next(_differences({**expected, **lines}, {**found, **again}), None)
        if difference:
            raise ValueError(
                f"--verify-resume: {num_steps} steps from a checkpoint of step {begin} are others than those of the "
                f"run that wrote it. First of what differs: {difference}"
            )
    _remove(folder)
    rank_zero_info(
        f"Resume verified: {num_steps} steps from the checkpoint of step {begin}, made again by a fresh start from its "
        f"file, are the same to the last bit on {ranks} rank{'s' * (ranks > 1)}: data, draws and losses, "
        f"{len(found)} hashes of them, of weights, optimizer and callbacks; {len(again)} lines of logged numbers."
    )


def _go(trial: Trial, replay: Replay, ckpt_path: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Let a trial run; what was seen, and the lines that were logged by name."""
    trainer: Any = trial.trainer
    trainer.callbacks.append(replay)
    try:
        trainer.fit(trial.module, datamodule=trial.data, ckpt_path=ckpt_path)
    except Verified:
        return replay.seen, _logged(trainer)
    raise ValueError(
        f"--verify-resume: the run ended at step {trainer.global_step}, before the rehearsal: choose fewer"
    )


def states(trainer: L.Trainer) -> Iterator[tuple[str, str]]:
    """Hashes of all that a checkpoint holds, by its place; and of this rank's own part of the weights."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
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
    """The lines of the trial's table, but for the clock."""
    lines = {}
    for table in tables(trainer):
        with Path(table.experiment.metrics_file_path).open(newline="") as text:
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


@rank_zero_only
def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
