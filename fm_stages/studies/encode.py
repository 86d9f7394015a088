"""``fm-stages encode``: a folder of images to latents, once; the same command goes on where it was stopped or killed.

The images are those of a folder, or of class folders as for ImageFolder; with ``train`` and ``val`` inside, both are
encoded. What is written is what LightningDiT's extract_features.py writes, and an index.json beside it: one posterior
draw of each image and of its flip (or mean and standard deviation of both), as the encoder gives it, and the mean and
standard deviation of each channel over all of it. Several ranks are started with
``torchrun --nproc_per_node 8 -m fm_stages -- encode ...``, or in a SLURM job by ``srun fm-stages encode ...``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from jsonargparse import Namespace
from tqdm import tqdm

from fm_stages.data import (
    PRECISIONS,
    VAE,
    Encoder,
    Encoding,
    ImageFiles,
    LatentIndex,
    check_own_files,
    combine_sums,
    complete_folder,
    list_images,
    list_of_sources,
    load_vae,
    locked,
    open_folder,
    planned_index,
    rows_per_shard,
    splits_of,
    statistics_of,
    sums_of_shard,
    write_shard,
)
from fm_stages.oracle import gather_objects, together
from fm_stages.studies.commands import check_least, command_parser, interruptible, parse_options
from fm_stages.studies.ranks import Job, ranks_of_the_job


def encode_command(arguments: list[str] | None = None) -> None:
    """The command: encodes what is missing, then computes the statistics.

    Args:
        arguments: those after ``fm-stages encode``; None: of this process.
    """
    options = parse(arguments)
    out = Path(options.out).expanduser()
    with interruptible(f"the same command goes on with what is in {out}"), ranks_of_the_job() as job:
        with together(job.group):
            splits = _splits(Path(options.data).expanduser(), out)
            vae = load_vae(options.vae, options.revision, options.precision, job.device(options.device))
        class_names: list[str] | None = None
        for name, folder in splits.items():
            flip = options.flip and name != "val"
            encoding = Encoding(options.image_size, flip, options.moments, options.precision, options.seed)
            split = _Split(options, job, vae, encoding, folder, out / name, class_names)
            split.run()
            class_names = split.index.class_names


def parse(arguments: list[str] | None) -> Namespace:
    """The options, of this process where no arguments are given.

    Raises:
        ValueError: if one is not understood, or lies outside its range.
    """
    parser = command_parser("encode", __doc__)
    option = parser.add_argument
    option("--data", type=str, required=True, help="folder of images, of class folders, or of train and val")
    option(
        "--vae", type=str, required=True,
        help="folder of an autoencoder in diffusers' layout, or its name on the Hugging Face hub",
    )  # fmt: skip
    option("--out", type=str, required=True, help="folder of the latents; a new one, or one to go on with")
    option("--image_size", type=int, default=256, help="side of the square cut out of each image; default: 256")
    option("--flip", type=bool, default=True, help="encode the mirrored images too (of val: never); default: true")
    option("--moments", action="store_true", help="keep mean and std of the posterior in the place of one draw")
    option("--precision", choices=list(PRECISIONS), default="fp32", help="of the VAE; default: fp32")
    option("--seed", type=int, default=0, help="of the draws")
    option("--batch_size", type=int, default=32, help="images that a rank encodes together")
    option("--num_workers", type=int | None, default=None, help="threads that decode images; default: the processors")
    option("--shard_rows", type=int | None, default=None, help="images of a shard; default: 10000, fewer of small sets")
    option("--revision", type=str | None, default=None, help="of a VAE on the hub: branch, tag or commit")
    option("--device", type=str | None, default=None, help="default: a GPU for each rank if there are any")
    options = parse_options(parser, arguments)
    check_least(options, 1, "image_size", "batch_size", "num_workers", "shard_rows")
    return options


def _splits(data: Path, out: Path) -> dict[str, Path]:
    """The folders of images, by the name of the folder inside --out that each goes to."""
    splits = splits_of(data)
    if out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out {out} lies inside {data}, where it would pass for images: give a folder elsewhere")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a new or an empty folder")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() and "" not in splits else []
    if other := [name for name in there if name not in splits]:
        raise ValueError(f"--out {out} holds other files ({other[0]}, ...): give a new or an empty folder")
    return splits


class _Notices:
    """What ranks tell each other while they work, without waiting: images that are done, and that one has failed."""

    def __init__(self, group: dist.ProcessGroup | None, name: str) -> None:
        self._store = group.get_group_store() if group is not None else None
        self._name, self._own = name, 0

    def done(self, num: int) -> int:
        """Count images; how many that makes on all ranks."""
        if self._store is not None:
            return self._store.add(f"{self._name} done", num)
        self._own += num
        return self._own

    def fail(self) -> None:
        """Ask the other ranks to stop."""
        if self._store is not None:
            self._store.set(f"{self._name} failed", "1")

    @property
    def failed(self) -> bool:
        """Whether a rank asks for that."""
        return self._store is not None and self._store.check([f"{self._name} failed"])


class _AnotherRankFailed(Exception):
    """Which tells what happened once all have stopped."""


class _Split:
    """The work of one rank on one folder of images, and on the folder of its latents."""

    index: LatentIndex
    images: ImageFiles

    def __init__(
        self,
        options: Namespace,
        job: Job,
        vae: VAE,
        encoding: Encoding,
        folder: Path,
        out: Path,
        class_names: list[str] | None,
    ) -> None:
        self.options, self.job, self.vae, self.encoding = options, job, vae, encoding
        self.folder, self.out, self.class_names = folder, out, class_names

    def run(self) -> None:
        """Encode this rank's part of what is missing; rank 0 then completes the folder."""
        job = self.job
        with ExitStack() as held:
            plan: list[Any] = [None]
            with together(job.group):
                if job.rank == 0:
                    plan = [self._open(held)]
            if job.group is not None:  # and not gathered: the names of a million images, once for each rank
                dist.broadcast_object_list(plan, group_src=0, group=job.group)
            self.images, self.index = plan[0]
            if self.index.complete and self.index.normalisation:
                self._say(f"nothing to do: {self.out} holds the latents of all {self.index.num_rows} images")
                return
            start, missing = time.perf_counter(), self.index.num_rows - self._rows_there()
            num_enlarged = self._encode_missing()
            seconds = time.perf_counter() - start
            parts = self._sums()
            with together(job.group):
                if job.rank == 0:
                    self.index = complete_folder(self.out, statistics_of(combine_sums(parts)))
            enlarged = sum(gather_objects(num_enlarged, job.group))
            self._report(missing, seconds, enlarged)

    def _open(self, held: ExitStack) -> tuple[ImageFiles, LatentIndex]:
        """Find the images and start the folder of their latents, or take it up; nobody else may until ``held`` ends."""
        images = list_images(self.folder, self.class_names)
        content, sources = list_of_sources(images.folder, images.files)
        given = self.options.shard_rows
        shard_rows = given or rows_per_shard(len(images.files), self.job.num_ranks)
        wanted = planned_index(images, sources, self.vae, self.encoding, shard_rows)
        check_own_files(self.out)  # before it makes a lock there
        try:
            held.enter_context(locked(self.out, "encode", timeout_sec=0))
            return images, open_folder(self.out, wanted, content, shard_rows_given=given is not None)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"--out {self.out} cannot be written ({reason}): make room, or give another") from error

    def _rows_there(self) -> int:
        return sum(shard.num_rows for shard in self.index.shards.values())

    def _encode_missing(self) -> int:
        """Encode what no rank has encoded; how many images were smaller than the square, on this rank."""
        missing = [number for number in range(self.index.num_shards) if number not in self.index.shards]
        there, ranks = self._rows_there(), self.job.num_ranks
        bar = tqdm(
            desc=f"Encoding into {self.out}" + (f" on {ranks} ranks" if ranks > 1 else ""),
            total=self.index.num_rows, initial=there, unit="image", disable=self.job.rank > 0 or not missing,
        )  # fmt: skip
        with bar:
            with together(self.job.group):
                num_enlarged = self._encode(
                    missing[self.job.rank :: ranks], lambda done: bar.update(there + done - bar.n)
                )
            bar.update(self.index.num_rows - bar.n)  # what the others did after rank 0 had ended
        return num_enlarged

    def _encode(self, numbers: list[int], on_progress: Callable[[int], object]) -> int:
        """Encode these shards, each of which is written while the next one is encoded."""
        options, notices = self.options, _Notices(self.job.group, f"encode {self.out}")
        encoder = Encoder(self.vae, self.images, self.index, self.encoding, options.batch_size, options.num_workers)
        writing: Future[None] | None = None

        def on_batch(num: int) -> None:
            on_progress(notices.done(num))
            if writing is not None and writing.done():
                writing.result()  # raises what the writer raised
            if notices.failed:
                raise _AnotherRankFailed

        with ThreadPoolExecutor(1) as writer:
            try:
                for number, tensors in encoder.shards(numbers, on_batch):
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(write_shard, self.out, self.index, number, tensors)
                if writing is not None:
                    writing.result()
            except _AnotherRankFailed:
                pass  # the shard that is being written may end
            except Exception:
                notices.fail()
                raise
        return encoder.num_enlarged

    def _sums(self) -> list[Any]:
        """For the statistics: those of all shards, in order, of which this rank computes a part."""
        rank, num_ranks = self.job.rank, self.job.num_ranks
        own = range(rank, self.index.num_shards, num_ranks)
        with together(self.job.group):
            files = tqdm(own, "Statistics", unit="shard", disable=rank > 0, delay=2)
            sums = {number: sums_of_shard(self.out / self.index.file_of(number), self.encoding) for number in files}
        every = {number: parts for those in gather_objects(sums, self.job.group) for number, parts in those.items()}
        return [part for number in sorted(every) for part in every[number]]

    def _report(self, num: int, seconds: float, num_enlarged: int) -> None:
        """Say what there is now, and what to do with it."""
        index, size = self.index, sum(shard.num_bytes for shard in self.index.shards.values())
        kind = "mean and std" if self.encoding.moments else "one draw"
        shape = "x".join(str(side) for side in next(iter(index.tensors.values()))["shape"])
        flips = " and of its flip" if self.encoding.flip else ""
        self._say(
            f"{index.num_rows} images in {self.out}: {kind} of each{flips}, {shape}, in {index.num_shards} shards of "
            f"{size / 2**30:.3g} GiB"
        )
        if num:
            speed = f"{num / seconds:.3g} images/s" + (", each with its flip" if self.encoding.flip else "")
            self._say(f"{num} of them were encoded in this call: {speed}")
        if num_enlarged:
            self._say(f"{num_enlarged} images were smaller than {self.encoding.image_size} pixels and were enlarged")
        if not self.encoding.moments and self.out.name != "val":
            self._say(f"where their stages lie: fm-stages profile --data {self.out}")

    def _say(self, text: str) -> None:
        if self.job.rank == 0:
            print(text)
