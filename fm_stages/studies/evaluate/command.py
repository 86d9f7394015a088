"""``fm-stages evaluate``: how good images are, by FID, KID, Inception score, precision, recall and MIFID.

Of a checkpoint, whose images are drawn, measured and forgotten (--ckpt), or of images in files (--samples). They are
compared with held-out images by an extractor of features, and so are training images in their place: an FID says
something only beside that one.

Several ranks are started with ``torchrun --nproc_per_node 8 -m fm_stages -- evaluate ...``, or in a SLURM job by ``srun
fm-stages evaluate ...``; they share the images, and end with the same numbers as one.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fm_stages.data import TrainingData, remove_parts
from fm_stages.oracle import together
from fm_stages.studies.commands import interruptible
from fm_stages.studies.drawing import Drawing
from fm_stages.studies.evaluate.features import FeatureSet, extract
from fm_stages.studies.evaluate.files import open_images, read_record
from fm_stages.studies.evaluate.images import SPLITS, Images, drawn, picture_shape, rows_of
from fm_stages.studies.evaluate.memorization import FILES, memorization_of
from fm_stages.studies.evaluate.options import out_folder, parse
from fm_stages.studies.evaluate.report import make_report, text_of, write_report
from fm_stages.studies.evaluate.scores import measure_all
from fm_stages.studies.features.extractor import Extractor
from fm_stages.studies.ranks import Job, ranks_of_the_job
from fm_stages.studies.runs import open_run
from fm_stages.studies.sources import open_data
from fm_stages.training import instantiate

SEED = 0
"""Of the subsets of metrics, and of the choice of training images."""


def evaluate_command(arguments: list[str] | None = None) -> None:
    """The command: measures, prints the report, writes it as Markdown, JSON, CSV and a figure.

    Args:
        arguments: those after ``fm-stages evaluate``; None: of this process.
    """
    parser, options = parse(arguments, __doc__ or "")
    with interruptible("no report was written"), ranks_of_the_job() as job:
        _Evaluation(parser, options, job).run()


class _Evaluation:
    """One call of the command on one rank."""

    def __init__(self, parser: ArgumentParser, options: Namespace, job: Job) -> None:
        self.options, self.job = options, job
        with together(job.group):
            self.device = job.device(options.device)
            module = instantiate(parser, options).features  # first: what it lacks is soon said
            self.drawing = None if options.samples else Drawing.of(options, self.device)
            self.data = self._data()
            shape = picture_shape(self.data)
            self.extractor = Extractor.of(module, shape, self.device)
            self.trained_on = self._trained_on()
            self.samples = self._samples(shape)
            other = SPLITS[1 - SPLITS.index(options.reference)]
            self.reference = rows_of(self.data, options.reference, options.num_reference, self.device, SEED)
            there_are = self.data.num_train if other == "train" else self.data.num_val
            self.other = rows_of(self.data, other, min(self.samples.num, there_are), self.device, SEED)
            self.out = out_folder(options, self.samples.record)
            if job.rank == 0:
                _make(self.out)
        with together(job.group) as meeting:  # a network that is made anew on each rank has other weights there
            meeting.alike = {"the weights of --features": self.extractor.record["weights_sha256"]}
        for note in self.drawing.notes if self.drawing and job.rank == 0 else ():
            print(f"fm-stages: note: {note}", file=sys.stderr)

    def run(self) -> dict[str, Any]:
        """Measure on all ranks; rank 0 then writes the report, which all return."""
        sets = tuple(self._extract(images) for images in (self.samples, self.reference, self.other))
        samples, reference, other = sets
        scores = measure_all(samples, reference, other, self.job, SEED, self.device)
        report = make_report(scores, (samples, reference, other), self.extractor.record, self.data.class_names, SEED)
        if self.options.num_memorization:
            report["memorization"] = memorization_of(
                samples, self.trained_on, self.drawing, self.out, self.job, SEED, self.device
            )
        with together(self.job.group):
            if self.job.rank == 0:
                self._finish(report, (samples, reference, other))
        return report

    def _data(self) -> TrainingData:
        """The data of the real images."""
        if self.options.data:
            return open_data(self.options.data)
        if self.drawing is not None:
            if self.drawing.data is None:
                raise ValueError(f"{self.drawing.files[0]} names no data to compare with: give it with --data")
            return self.drawing.data
        place = Path(self.options.samples)
        if (file := self._drawn_from(place)) is None:
            raise ValueError(f"--samples {place} does not say which real images to compare with: give them with --data")
        try:
            data = open_run(file)[2]
        except FileNotFoundError as error:
            raise ValueError(
                f"{place} was drawn from {file}, which is not there (any more): name the real images with --data"
            ) from error
        if data is None:
            raise ValueError(f"{file} names no data to compare with: give it with --data")
        return data

    def _trained_on(self) -> TrainingData:
        """What the network was trained on, set up; the reference's data where that is not known or not there."""
        data: TrainingData | None = None
        if self.drawing is not None:
            data = self.drawing.data
        elif self.options.data and (file := self._drawn_from(Path(self.options.samples))) is not None:
            with suppress(FileNotFoundError):
                data = open_run(file)[2]
        if data is None or data is self.data:
            return self.data
        data.prepare_data()
        data.setup()
        return data

    @staticmethod
    def _drawn_from(place: Path) -> str | None:
        """The (first) checkpoint that a folder of ``fm-stages sample`` names."""
        record = read_record(place) if place.is_dir() else None
        files = record["checkpoint"] if record else None
        return files[0] if isinstance(files, list) else files

    def _samples(self, shape: tuple[int, int, int]) -> Images:
        if self.drawing is None:
            return open_images(Path(self.options.samples), self.options.num, shape, self.trained_on)
        return drawn(self.drawing, self.trained_on, shape, self.options.num)

    def _extract(self, images: Images) -> FeatureSet:
        keep = self.options.num_memorization if images is self.samples else 0
        return extract(images, self.extractor, self.options.batch_size, self.job, keep)

    def _finish(self, report: dict[str, Any], sets: tuple[FeatureSet, FeatureSet, FeatureSet]) -> None:
        files = write_report(report, sets, self.out)
        files += [path for name in FILES if (path := self.out / name).exists()]
        print(f"\n{text_of(report)}\n\n{self.out}: {', '.join(file.name for file in files)}")
        if self.options.wandb:
            from fm_stages.studies.evaluate.to_wandb import log_report  # wandb takes a second to import

            log_report(report, files, self.options.wandb, self.out)


def _make(out: Path) -> None:
    """The folder of the report, without an earlier one: found out before hours of drawing that it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_parts(out)
        for name in FILES:
            (out / name).unlink(missing_ok=True)  # of an earlier call, which may have been of other samples
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}): give another folder") from error
