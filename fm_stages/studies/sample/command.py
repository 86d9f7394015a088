"""``fm-stages sample``: draw images from a checkpoint to files; the same command goes on where it was stopped.

With ``--expert EARLY --expert LATE --split T`` one network draws from noise to t = T, and another one from there on.

Image i of a seed is the same on any number of ranks and with any batch size, to 1e-5 of a value in float32, before
rounding to pixels; with dopri5 to about its tolerance, unless --batch_size is 1. Several ranks are started with
``torchrun --nproc_per_node 8 -m fm_stages -- sample ...`` (without the ``--`` torchrun takes ``--num`` for its own), or
in a SLURM job by ``srun fm-stages sample ...``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from tqdm import tqdm

from fm_stages.data import PART, read_json, whole_file
from fm_stages.flow import SAME_IMAGE
from fm_stages.oracle import gather_objects, together
from fm_stages.studies.commands import interruptible
from fm_stages.studies.drawing import Drawing
from fm_stages.studies.ranks import Job, ranks_of_the_job
from fm_stages.studies.sample.costs import COUNTED, Meter, costs_per_image, describe_costs
from fm_stages.studies.sample.files import FORMATS, ImageFiles
from fm_stages.studies.sample.options import one_or_all, parse
from fm_stages.studies.sources import open_data
from fm_stages.studies.text_files import write_json
from fm_stages.training import save_grid

RECORD = "sampling.json"
IN_GRID = 64


def sample_command(arguments: list[str] | None = None) -> None:
    """The command: draws what is missing, then writes a grid of the first images and ``sampling.json``.

    Args:
        arguments: those after ``fm-stages sample``; None: of this process.
    """
    options = parse(arguments, __doc__ or "")
    with interruptible(f"the same command goes on with what is in {options.out}"), ranks_of_the_job() as job:
        _Drawing(options, job).run()


class _Drawing:
    """One call of the command on one rank."""

    def __init__(self, options: Namespace, job: Job) -> None:
        self.options, self.job, self.out = options, job, Path(options.out)
        with together(job.group):
            self.device = job.device(options.device)
            self.drawing = Drawing.of(options, self.device)
            self.settings, self.shape = self.drawing.settings, self.drawing.shape
            data = open_data(options.data) if options.data else self.drawing.data
            pixels = None if data is None else data.picture_shape(self.shape)
            # what a network draws, where nothing says how it becomes pixels: latents without a VAE
            self.to_pixels = None if data is None or pixels is None else data.to_pixels
            if self.to_pixels is None and options.format != "safetensors":
                lacks = "names no data" if data is None else "names data without a VAE"
                named = f"--data {options.data}" if options.data else self.drawing.files[0]
                raise ValueError(
                    f"--format {options.format}: {named} {lacks}, so nothing says how values become pixels: name data "
                    "that does with --data, or --format safetensors writes them as they are, in float32"
                )
            self.files: ImageFiles = FORMATS[options.format](self.out, options.num, pixels or self.shape)
            self.record = self._open() if job.rank == 0 else {}
        for note in self.drawing.notes if job.rank == 0 else ():
            print(f"fm-stages: note: {note}", file=sys.stderr)

    def run(self) -> None:
        """Draw this rank's part; rank 0 then completes the folder."""
        parts = gather_objects(self._draw(), self.job.group)  # also the end of all drawing
        if self.job.rank == 0:
            self._complete(parts)

    def _open(self) -> dict[str, Any]:
        """Make the folder, or take it up again; what ``sampling.json`` says."""
        file = self.out / RECORD
        new = {"num": self.options.num, "format": self.options.format, **self.settings.plain}
        new |= {"data": self.options.data} if self.options.data else {}
        record: dict[str, Any] = {"checkpoint": one_or_all(list(self.drawing.files)), "settings": new}
        record |= {"finished": False, "flops": COUNTED, "calls": []}
        there = sorted(path.name for path in self.out.iterdir()) if self.out.is_dir() else []
        # a first call that was killed at once leaves nothing but its record, half written
        there = [name for name in there if not (name.startswith(f"{RECORD}.") and name.endswith(PART))]
        if there and not file.exists():
            raise ValueError(f"--out {self.out} holds other files ({there[0]}, ...): give a new or an empty folder")
        if file.exists():
            try:
                record = read_json(file)
                old, calls = record["settings"], record["calls"]
                if not isinstance(old, dict) or not isinstance(calls, list):
                    raise TypeError("settings are a mapping, and calls a list")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is not what this command writes: give another --out") from error
            changed = [f"{k} was {old.get(k)} and is {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
            if changed:
                raise ValueError(f"--out {self.out} holds other images: {', '.join(changed)}; give another folder")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for part in self.out.rglob(f"*{PART}"):  # of a call that was killed
                part.unlink(missing_ok=True)
            self._write(record)
        except OSError as error:
            raise ValueError(f"--out {self.out} cannot be written ({error.strerror}): give another folder") from error
        return record

    def _write(self, record: dict[str, Any]) -> None:
        write_json(self.out / RECORD, record)

    def _draw(self) -> dict[str, Any]:
        """Draw what is missing of this rank's part; what that took."""
        meter = Meter(self.drawing.networks)
        missing = self.files.missing(self.job.rank, self.job.num_ranks)
        name = "Sampling" if self.job.num_ranks == 1 else f"Sampling (rank 0 of {self.job.num_ranks})"
        start = time.perf_counter()
        with tqdm(total=len(missing), desc=name, unit="image", disable=self.job.rank > 0 or not len(missing)) as bar:
            try:
                for index in missing.split(self.options.batch_size) if len(missing) else ():
                    with meter.counting(len(index)):
                        images = self.drawing.draw(index)
                    pixels = (self.to_pixels(images) if self.to_pixels else images).cpu()
                    self.files.add(index, pixels, self.drawing.labels(index))
                    bar.update(len(index))
            finally:
                self.files.flush()
        seconds = time.perf_counter() - start
        return {"images": len(missing), "seconds": seconds, "evaluations": meter.evaluations, "rows": meter.rows}

    def _complete(self, parts: list[dict[str, Any]]) -> None:
        """The grid, the last files, and what is to be said."""
        images, seconds = sum(part["images"] for part in parts), max(part["seconds"] for part in parts)
        if images:
            costs = costs_per_image(self.drawing.networks, self.shape, parts)
            call = {
                "images": images,
                "seconds": round(seconds, 3),
                "images_per_sec": images / seconds,
                **costs,
                "ranks": self.job.num_ranks,
                "batch_size": self.options.batch_size,
                "device": _name_of(self.device),
            }
            self.record["calls"].append(call)
            described = describe_costs(costs, self.settings.split)
            print(f"{images} images: {call['images_per_sec']:.3g} images/s, {described}")
        if self.to_pixels and not (self.out / "grid.png").exists():
            first = self.files.first(min(IN_GRID, self.options.num))
            with whole_file(self.out / "grid.png") as part:
                save_grid(first / 127.5 - 1, part, columns=8)
        files = self.files.finish()
        self._write({**self.record, "finished": True, "files": files, "same_image": self._guarantee()})
        print(f"{self.options.num} images in {self.out}: {files[0]}{' ...' if len(files) > 1 else ''}, {RECORD}")

    def _guarantee(self) -> str:
        """How far an image depends on the batch that it was drawn in."""
        plain = self.settings.plain
        if plain["precision"] == "bf16":
            return "to the rounding of bfloat16, whatever the batch and the number of ranks"
        if plain["solver"] == "dopri5":
            return f"to about the tolerance, {plain['tolerance']:g}; exactly if drawn with batch_size 1"
        return f"to {SAME_IMAGE:g} of a value before rounding to pixels, whatever the batch and the number of ranks"


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
