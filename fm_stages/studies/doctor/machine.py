"""The doctor on the machine: memory, disk, the output folder, and the way to wandb."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fm_stages.data import available_memory_bytes
from fm_stages.studies.doctor.lines import Line, judged
from fm_stages.studies.doctor.run import PlannedRun
from fm_stages.studies.doctor.schedule import first_validation
from fm_stages.training import Checkpoints, FlowMatching, choose_wandb_mode

CROWDED = 0.8
"""Share of what is free from which it is tight."""

FOREIGN_STATE = 2
"""Numbers that an optimizer keeps for each weight, where its state cannot be built without memory."""


def check_machine(run: PlannedRun) -> Iterator[Line]:
    """All of it."""
    yield check_memory(run, torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None)
    size = checkpoint_bytes(run.module)
    folder = Path(run.config.checkpoints.dirpath)
    yield check_disk(size, files_kept(run), shutil.disk_usage(existing(folder)).free, folder)
    yield check_folder(Path(run.config.trainer.default_root_dir), run.config.ckpt_path)
    yield check_logger(run.loggers)


def state_bytes(module: FlowMatching) -> int:
    """Memory of the optimizer's state, built of weights that take none."""
    weights = [nn.Parameter(torch.empty_like(p, device="meta")) for p in module.network.parameters() if p.requires_grad]
    optimizer = module.make_optimizer(iter(weights))
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # one that reads its numbers
        return FOREIGN_STATE * sum(weight.nbytes for weight in weights)
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))


def checkpoint_bytes(module: FlowMatching) -> int:
    """Size of a checkpoint: raw and averaged weights, and the optimizer's state."""
    return sum(x.nbytes for x in module.state_dict().values()) + state_bytes(module)


def files_kept(run: PlannedRun) -> float:
    """Checkpoints that lie on the disk together: the best, the last, and the one that is being written."""
    checkpoints = run.callback(Checkpoints)
    if checkpoints is None:
        return 0
    if checkpoints.save_top_k >= 0:
        return checkpoints.save_top_k + 2
    every = getattr(checkpoints, "_every_n_train_steps", 0) or first_validation(run)
    return run.max_steps // every + 2 if math.isfinite(every) else 2


def check_disk(size: int, num: float, free: int, folder: Path) -> Line:
    """Room for the checkpoints."""
    remedy = "Give a folder on another disk (--trainer.default_root_dir), keep fewer (--checkpoints.save_top_k), or "
    remedy += "make room."
    return judged(
        "disk",
        f"{num:g} checkpoints (best, last, and one that is written) of {_size(size)} = {_size(num * size)}; "
        f"{_size(free)} are free at {existing(folder)}",
        ("red", num * size > free, remedy),
        ("yellow", num * size > CROWDED * free, f"It is tight. {remedy}"),
    )


def check_memory(run: PlannedRun, gpu_bytes: int | None) -> Line:
    """The bank beside weights, gradients and optimizer; activations are not known before they are there.

    Args:
        run: the run.
        gpu_bytes: of each rank; None: there is no GPU here.
    """
    module = run.module
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    state = sum(p.nbytes for p in module.parameters()) + gradients + state_bytes(module)
    try:
        plan = run.data.plan_bank(math.inf if gpu_bytes is None else gpu_bytes, run.num_ranks)
    except MemoryError as error:
        return Line("memory", "red", f"the bank does not fit a GPU of {_size(gpu_bytes or 0)}", f"{error}.")
    held = f"{'a shard' if plan.sharded else 'a copy'} of the bank {_size(plan.bytes_per_rank)}"
    found = f"{held} + weights, gradients and optimizer {_size(state)}, and activations on top"
    needed = plan.bytes_per_rank + state
    if gpu_bytes is None:
        here = available_memory_bytes()
        found += f": no GPU here, {_size(needed)} would be needed (this machine: {_size(here)} free)"
        asked = run.accelerator in ("gpu", "cuda")
        return judged("memory", found, ("yellow", needed > here and not asked, "Training on this CPU would not fit."))
    return judged(
        "memory",
        f"{found}; the GPU has {_size(gpu_bytes)}",
        ("red", needed > gpu_bytes, "Shard weights (--config configs/strategy_fsdp.yaml) or the bank "
         "(--data.init_args.shard_bank true) over more ranks."),
        ("yellow", needed > CROWDED * gpu_bytes, "Little is left for activations: lower micro_batch_size, or shard."),
    )  # fmt: skip


def check_folder(folder: Path, resumed: str | None) -> Line:
    """Whether the output folder can be written, and is nobody else's."""
    place = existing(folder)
    blocked = not place.is_dir() or not os.access(place, os.W_OK | os.X_OK)
    holds = not blocked and any((folder / name).exists() for name in ("config.yaml", "checkpoints/last.ckpt"))
    own = holds and resumed is not None and Path(resumed).absolute().is_relative_to(folder.absolute())
    state = "cannot be written" if blocked else "holds a run" if holds else "is new" if place != folder else "is free"
    return judged(
        "output folder",
        f"{folder} {state}{f', which goes on from {resumed}' if own else ''}",
        ("red", blocked, f"{place} is no folder that you may write to: give another --trainer.default_root_dir."),
        ("yellow", holds and not own, "fit would write over its figures and last.ckpt: go on with it (--ckpt_path "
         "last) or give another --trainer.default_root_dir."),
    )  # fmt: skip


def check_logger(loggers: list[str]) -> Line:
    """Whether wandb can be reached; a run waits for it no longer than this does."""
    if not any(name.endswith("WandbLogger") for name in loggers):
        names = ", ".join(name.rpartition(".")[2] for name in loggers)
        remedy = "Loss and curves over steps are kept nowhere but in CSV files: leave --trainer.logger out for wandb."
        return judged("logger", f"{names or 'none'}, not wandb", ("yellow", not loggers, remedy))
    with _environment_kept():
        given = os.environ.get("WANDB_MODE")
        mode = choose_wandb_mode()
    found = f"wandb, {mode}" + (", by WANDB_MODE" if given else "")
    remedy = "The run is kept in its folder and does not wait; `wandb sync` sends it later. To send it at once: `wandb "
    remedy += "login` and a network."
    return judged("logger", found, ("yellow", not given and mode != "online", remedy))


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Forget what is set meanwhile."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
