"""How long does training stand still for a checkpoint, and what share of its time is that?

DiT-B/2 on random latents (4, 32, 32) with AdamW: raw weights, their average and two moments. Every third step is
followed by a checkpoint through the callback of every run (last.ckpt alone). Training stands still while it is
collected and copied; a thread then writes, sends it to the disk, reads back and puts into place, beside the next step.
The step after that is timed once the thread has nothing to do. Processor seconds are those of the thread that does the
part, which other work on the machine does not touch.

A step on a GPU is shorter than here and a checkpoint is not: the last line says which step would keep it at 1 %. What
the thread takes from the steps beside it depends on the processors: with one it takes all of its own time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timing import machine, parser, positive, spread, table
from torch.utils.data import DataLoader
from tqdm import tqdm

from fm_stages.networks import DiT_B, DiT_S
from fm_stages.training import Checkpoints, FlowMatching
from fm_stages.training.checkpoints import background
from fm_stages.training.checkpoints import files as checkpoint_files

SIZES = {"DiT-S/2": DiT_S, "DiT-B/2": DiT_B}
SHAPE, NUM_CLASSES = (4, 32, 32), 1000

INTERVAL = 3
"""Steps between checkpoints: one beside the thread, one without, and the one that ends in a checkpoint."""

STANDSTILL = "all that training waits for"

PARTS = {
    "copy": (background.Writer, "write"),
    "write": (checkpoint_files.torch, "save"),
    "to the disk (fsync)": (checkpoint_files, "send_to_disk"),
    "read back: checksums": (checkpoint_files, "check_sums"),
    "read back: names, shapes": (checkpoint_files, "check_content"),
    "into place": (checkpoint_files, "sync_folder"),
}


class Clock:
    """Seconds by name: of the clock on the wall, and of this thread's processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, and how long it took."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start, start_processor = time.perf_counter(), time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds.setdefault(name, []).append(time.perf_counter() - start)
                self.processor.setdefault(name, []).append(time.thread_time() - start_processor)

        return run


class Steps(L.Callback):
    """Times steps, each up to just before its checkpoint."""

    def __init__(self, clock: Clock, checkpoints: Checkpoints, num_steps: int) -> None:
        self.clock, self.checkpoints, self.bar = clock, checkpoints, tqdm(total=num_steps, desc="steps")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.kind = "step beside the thread" if trainer.global_step % INTERVAL == 0 else "step alone"
        if self.kind == "step alone":
            self.checkpoints.settle(trainer)
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.seconds.setdefault(self.kind, []).append(time.perf_counter() - self.start)
        self.bar.update()


def measure(size: str, rounds: int, batch_size: int, folder: Path) -> tuple[Clock, int]:
    """Train ``rounds`` steps with a checkpoint after each; times, and bytes of a file."""
    clock = Clock()
    checkpoints = Checkpoints(monitor=None, save_top_k=0, every_n_train_steps=INTERVAL)
    num_steps = INTERVAL * (rounds + 1) + 2  # the first is slower, and the last two come after the last checkpoint
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=num_steps,
        callbacks=[Steps(clock, checkpoints, num_steps), checkpoints],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for name, (owner, function) in PARTS.items():
        setattr(owner, function, clock.timed(name, getattr(owner, function)))
    connector = trainer._checkpoint_connector
    connector.dump_checkpoint = clock.timed("collect", connector.dump_checkpoint)  # type: ignore[method-assign]
    checkpoints._save_checkpoint = clock.timed(STANDSTILL, checkpoints._save_checkpoint)  # type: ignore[method-assign]
    data = [(torch.randn(SHAPE), i % NUM_CLASSES) for i in range(batch_size * num_steps)]
    trainer.fit(FlowMatching(SIZES[size](32, 2, 4, NUM_CLASSES)), DataLoader(data, batch_size))
    return clock, (folder / "checkpoints/last.ckpt").stat().st_size


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, 4, "checkpoints that count, after a first one")
    options.add_argument("--size", choices=SIZES, default="DiT-B/2")
    options.add_argument("--batch-size", type=positive, default=1)
    options.add_argument("--folder", help="on the file system to measure (default: the system's temporary one)")
    chosen = options.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers|.*val_dataloader|.*The `dirpath`|.*is not empty")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        clock, num_bytes = measure(chosen.size, chosen.rounds, chosen.batch_size, Path(folder))
    times = {name: values[1 : chosen.rounds + 1] for name, values in clock.seconds.items()}
    own = {name: spread(values[1 : chosen.rounds + 1])[0] for name, values in clock.processor.items()}
    rows = [[name, *spread(times[name]), own[name]] for name in ("collect", "copy", STANDSTILL, *list(PARTS)[1:])]
    steps = [[name, *spread(values), ""] for name, values in sorted(times.items()) if name.startswith("step")]
    print(f"\n{machine()}; {chosen.size} with average and AdamW, a file of {num_bytes / 1e9:.2f} GB\n")
    print(table(["part", "s (median)", "s (range)", "processor s"], rows + steps))
    still, step = (statistics.median(times[name]) for name in (STANDSTILL, "step alone"))
    print(f"\nTraining stands still for {still:.2f} s: {still / step:.2f} steps of {step:.2f} s.")
    print(
        f"One in 1000 steps is {100 * still / (1000 * step):.3f} % of such steps; 1 % of steps of {still / 10:.2f} s."
    )


if __name__ == "__main__":
    main()
