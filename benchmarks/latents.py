"""Shuffled batches of latents: each residency of `Latents` against one opened file per sample, and the opening itself.

    python benchmarks/latents.py

What is compared: batches of 256 latents of 4x32x32, normalised, with labels, in shuffled order, in one process. One
file per sample is how LightningDiT's data set reads: it opens the shard, takes a slice of the latents or of their flips
and of the labels, normalises, and the loader collates. The shards are written anew and were just read, so that the page
cache holds them all, on both sides: what is measured is the work and not the disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from memory import PEAK_RESET, peak_bytes
from safetensors import safe_open
from safetensors.torch import save_file
from timing import alternate, machine, parser, positive, spread, table
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from fm_stages.data import Latents
from fm_stages.data.latent_index import LatentIndex, Shard, write_index

SHAPE = (4, 32, 32)
SHARD_ROWS = 10_000
BATCH = 256
GOALS = {"disk": 20.0, "ram": 100.0, "device": None}
IMAGENET = 1_281_167
GOAL_SEC, GOAL_MIB = 1.0, 200


def write_folder(folder: Path, num_rows: int, sparse: bool = False) -> None:
    """An encoded folder of random latents and their flips; sparse: of shards that are right in all but values."""
    kind = {"dtype": "float32", "shape": list(SHAPE)}
    tensors = {"latents": kind, "latents_flip": kind, "labels": {"dtype": "int64", "shape": []}}
    vae = {"name": "none", "sha256": "", "scaling_factor": 1.0, "shift_factor": 0.0}
    index = LatentIndex(num_rows, SHARD_ROWS, tensors, [str(i) for i in range(1000)], vae, {}, {})
    folder.mkdir(parents=True)
    for number in tqdm(range(index.num_shards), "writing shards", unit="shard"):
        file, rows = folder / index.file_of(number), len(index.rows_of(number))
        if sparse:
            _write_sparse(file, rows)
        else:
            x = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(number))
            save_file(
                {"latents": x, "latents_flip": x.flip(-1).contiguous(), "labels": torch.arange(rows) % 1000}, file
            )
        index.shards[number] = Shard(file.name, rows, file.stat().st_size, "")
    stats = {name: torch.full((1, SHAPE[0], 1, 1), value) for name, value in (("mean", 0.1), ("std", 1.1))}
    torch.save(stats, folder / "latents_stats.pt")
    write_index(folder, index)


def _write_sparse(file: Path, rows: int) -> None:
    """A shard of zeros that takes no room on the disk."""
    size, header, at = 4 * rows * torch.Size(SHAPE).numel(), {}, 0
    latents = ("F32", [rows, *SHAPE], size)
    wanted = {"labels": ("I64", [rows], 8 * rows), "latents": latents, "latents_flip": latents}
    for name, (dtype, shape, num_bytes) in wanted.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as content:
        content.write(len(text).to_bytes(8, "little") + text)
        content.write((torch.arange(rows) % 1000).numpy().tobytes())
        content.truncate(8 + len(text) + at)


class FilePerSample:
    """A data set that opens the sample's shard each time, with fair flips."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        self.where = []
        for file in self.files:
            with safe_open(file, framework="pt", device="cpu") as shard:
                self.where += [(file, i) for i in range(shard.get_slice("labels").get_shape()[0])]
        stats = torch.load(folder / "latents_stats.pt", weights_only=True)
        self.mean, self.std = stats["mean"], stats["std"]
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A latent (C, H, W) and its label."""
        file, at = self.where[index]
        flip = torch.rand(1, generator=self.generator) > 0.5
        with safe_open(file, framework="pt", device="cpu") as shard:
            x = shard.get_slice("latents_flip" if flip else "latents")[at : at + 1]
            label = shard.get_slice("labels")[at : at + 1]
        return ((x - self.mean) / self.std).squeeze(0), label.squeeze(0)

    def batches(self) -> Iterator[object]:
        """Shuffled, without end."""
        while True:
            for rows in torch.randperm(len(self.where), generator=self.generator).split(BATCH):
                yield default_collate([self[row] for row in rows.tolist()])


def batches(data: Latents) -> Iterator[object]:
    """Those of the data module, without end."""
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def some(source: Iterator[object], num: int) -> Callable[[], None]:
    """Take so many batches."""

    def work() -> None:
        for _ in range(num):
            next(source)

    return work


def opening(folder: Path) -> str:
    """Seconds and MiB of `setup` in a process of its own, five times."""
    command = [sys.executable, __file__, "--open", str(folder)]
    runs = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) for _ in range(5)]
    sec, mib = spread([run["sec"] for run in runs]), spread([run["bytes"] / 2**20 for run in runs], ".0f")
    rows = [[f"{runs[0]['rows']:,}", *sec, f"{GOAL_SEC:g}", *mib, GOAL_MIB]]
    return table(["rows", "s", "least - most", "goal", "MiB", "least - most", "goal"], rows)


def open_folder(folder: str) -> None:
    """The process of one opening: prints what it took, as JSON."""
    data = Latents(folder, batch_size=BATCH)
    start = time.perf_counter()
    peak, _ = peak_bytes(data.setup, "cpu")
    print(json.dumps({"sec": time.perf_counter() - start, "bytes": peak, "rows": data.num_train + data.num_val}))


def main() -> None:
    made = parser(__doc__, rounds=7, of_what="times that each side reads its batches, in turn")
    made.add_argument("--rows", type=positive, default=100_000, help="images of the set (default: 100000)")
    made.add_argument("--batches", type=positive, default=40, help="batches of a turn; of files per sample a fifth")
    made.add_argument("--folder", help="where to write the shards, 32 KiB for each image (default: a temporary place)")
    made.add_argument("--open", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.open:
        open_folder(options.open)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as made_here:
        folder = Path(made_here)
        write_folder(folder / "latents", options.rows)
        peer, cases = FilePerSample(folder / "latents"), {}
        few = max(1, options.batches // 5)
        for residency in GOALS:
            data = Latents(str(folder / "latents"), residency=residency, batch_size=BATCH)  # type: ignore[arg-type]
            cases[residency] = (some(peer.batches(), few), some(batches(data), options.batches))
        pairs = alternate(cases, options.rounds)
        print(f"\n{machine()}\n{options.rows:,} images, 32 KiB each with its flip; batches of {BATCH}; one process\n")
        lines = []
        for residency, times in pairs.items():
            ratios = [options.batches / few / ratio for ratio in times.ratios]
            per_sec = spread([BATCH * options.batches / sec for sec in times.b], ",.0f")
            peers = spread([BATCH * few / sec for sec in times.a], ",.0f")
            lines.append([residency, per_sec[0], peers[0], *spread(ratios, ".0f"), GOALS[residency] or "-"])
        header = ["residency", "samples/s", "a file per sample: samples/s", "ratio", "least - most", "goal"]
        print(table(header, lines))
        if PEAK_RESET.exists():
            write_folder(folder / "imagenet", IMAGENET, sparse=True)
            print(f"\nOpening an index, in a process of its own\n\n{opening(folder / 'imagenet')}")


if __name__ == "__main__":
    main()
