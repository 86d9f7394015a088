"""Do samples repeat the training set? Every number is calibrated by a memorizer, a non-memorizer and fresh images.

`study_memorization` is called with samples, however they were drawn; ``fm-stages evaluate`` does. What it says is in
`Memorization.text`, a table that has a column for each kind of images, and it leaves in its folder:

- ``memorization.json``: all of it;
- ``memorization.csv``: a line for each sample;
- ``closest.png``: the samples that are closest to training images, beside fresh images that are;
- ``memorization_index.png``: the index over t, where there are networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fm_stages import plots
from fm_stages.data import TrainingData, pictures_of
from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank, Oracle, StageProfile, Wiener, gather_objects, together
from fm_stages.studies.memorization.calibration import draw_calibration
from fm_stages.studies.memorization.index import MEMORIZER, OWN, WIENER, IndexCurves, memorization_index
from fm_stages.studies.memorization.measure import MEMORIZED, Closest, Summary, measure, nearest_sources
from fm_stages.studies.memorization.references import NotMeasured, References
from fm_stages.studies.memorization.text import table
from fm_stages.studies.ranks import Job
from fm_stages.studies.text_files import write_csv, write_json
from fm_stages.training import FlowMatching

NUM_SHOWN = 8
"""Pairs of each kind in the figure of the closest ones."""


@dataclass(frozen=True)
class Memorization:
    """What was found.

    Attributes:
        summaries: by kind of images: ``samples``, ``memorizer``, ``wiener`` (where there is one), ``fresh``.
        closest: of each sample, in the order of their numbers.
        index: the memorization index over t; None without networks.
        sizes: of the sets that were compared with.
        settings: seed, steps, number of calibration images, path.
        notes: what was not measured or is to be known, in sentences.
    """

    summaries: dict[str, Summary]
    closest: Closest
    index: IndexCurves | None
    sizes: dict[str, int | bool]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """All but the single samples, as JSON takes it."""
        return {
            "summaries": {name: asdict(summary) for name, summary in self.summaries.items()},
            "index": None if self.index is None else self.index.plain(),
            "sizes": self.sizes, "settings": self.settings, "notes": self.notes,
        }  # fmt: skip

    def text(self) -> str:
        """A table for people, with what its lines mean."""
        return table(self.summaries, self.index, self.sizes, self.notes)


@torch.no_grad()
def study_memorization(
    samples: Tensor,
    data: TrainingData,
    module: FlowMatching | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    out: Path | None = None,
    *,
    index: Tensor | None = None,
    seed: int = 0,
    num_calibration: int = 256,
    num_steps: int = 50,
    num_queries: int = 512,
    profile: StageProfile | None = None,
    device: torch.device | str = "cpu",
    job: Job | None = None,
    progress: bool = True,
) -> Memorization:
    """Measure how close samples come to the training set, and how closely networks follow it.

    Every rank calls this, with its own samples, and gets the same result; rank 0 writes the files.

    Args:
        samples: (n, C, H, W) floating point, this rank's (possibly none), in the units of the network.
        data: the training set and its held-out images; set up here if it was not yet, without a Trainer.
        module: says path and label dropout; None: the linear path, and no memorization index.
        networks: whose index to measure, by the name that figures give them, e.g. ``{"EMA weights": network}``, on
            ``device`` and in evaluation mode: ``network(x, t, labels) -> velocity``; None or empty: no index.
        out: folder of the files, made if need be; None: none are written.
        index: (n,) int64 numbers of the samples, different on all ranks; None: by rank, one after the other.
        seed: of everything that is drawn here.
        num_calibration: images of the memorizer and of the Wiener sampler.
        num_steps: Euler steps of these two.
        num_queries: fresh images in each timestep bin of the index.
        profile: the stages of the data, if they were measured before.
        device: where to compute; the bank of ``data`` moves there.
        job: the ranks.
        progress: whether rank 0 shows bars.

    Returns:
        What was found.

    Raises:
        NotMeasured: a ValueError, if these data do not allow it (distributions as rows, too few held-out images,
            training images that are all equal); its message is one sentence for a report.
        ValueError: if samples are no finite images like the training images, or there are none, or a number is out of
            range; on every rank.
    """
    job = job or Job()
    shown = progress and job.rank == 0
    with together(job.group):
        _check_numbers(num_calibration, num_queries, num_steps)
        references = References.of(data, seed, device)
        _check_samples(samples, references)
        _check_sources(references.whole, data.flip)
    bank, path = references.whole, module.path if module else LinearPath()
    sizes = [len(own) for own in gather_objects(torch.arange(len(samples)), job.group)]
    if not sum(sizes):
        raise ValueError("there are no samples: draw some, or name a folder that holds images")
    first = sum(sizes[: job.rank])
    index = torch.arange(first, first + len(samples)) if index is None else index
    notes = _constant(samples, job)
    wiener = None
    try:
        wiener = Wiener(bank, path)
    except ValueError as error:
        notes.append(f"There is no Wiener column: {error}.")

    images = _calibration(references, path, wiener, num_calibration, num_steps, seed, job, shown)
    images = {"samples": (samples, index), **images}
    found = {name: measure(references, *own, data.flip, job, shown) for name, own in images.items()}
    curves = None
    if networks and module is not None:
        share = module.label_dropout if bank.has_labels else 1.0
        profile = profile or StageProfile.measure(Oracle(bank, path), share, seed=seed, progress=shown)
        curves = memorization_index(
            references, networks, path, share, profile.boundary, wiener, num_queries, seed=seed, job=job, progress=shown
        )
    settings = {
        "seed": seed, "num_calibration": num_calibration, "num_steps": num_steps, "path": type(path).__name__,
        "copy_below_ratio": MEMORIZED,
    }  # fmt: skip
    summaries = {name: Summary.of(each) for name, each in found.items()}
    result = Memorization(summaries, found["samples"], curves, references.sizes(), settings, notes)
    if out is not None:
        pairs = [_pairs(references, data, *images[name], found[name], job) for name in ("samples", "fresh")]
        if job.rank == 0:
            _write(result, pairs, out)
    return result


def _check_numbers(num_calibration: int, num_queries: int, num_steps: int) -> None:
    if num_calibration < 2 or num_steps < 1 or num_queries < 2:
        raise ValueError(
            f"num_calibration={num_calibration} and num_queries={num_queries} must be 2 or more, "
            f"num_steps={num_steps} 1 or more"
        )


def _check_samples(samples: Tensor, references: References) -> None:
    shape = references.whole.shape
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"samples are floating point, in the units of the network, got {kind}: to_model_range(pixels)")
    if tuple(samples.shape[1:]) != shape:
        raise ValueError(
            f"samples are (n, *{shape}) like the training images, got {tuple(samples.shape)}: compare them with the "
            "data they were trained on, at the same image_size"
        )
    finite = samples.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        wrong = (~finite).nonzero()[:, 0]
        raise ValueError(
            f"{len(wrong)} of {len(samples)} samples hold NaN or infinity, the first is number {int(wrong[0])}: the "
            "network diverged, or the files are damaged; leave them out"
        )


def _check_sources(bank: DataBank, flip: bool) -> None:
    """Raise NotMeasured if all training images are equal: each would be infinitely nearer than the second nearest."""
    distance, _ = nearest_sources(bank, bank.rows(torch.zeros(1, dtype=torch.int64, device=bank.device)), flip)
    if bool(distance[:, 1].isinf()):
        raise NotMeasured(
            "all training images are equal, so there is no second nearest one to tell a copy by, and memorization is "
            "not measured"
        )


def _constant(samples: Tensor, job: Job) -> list[str]:
    """What is to be said of samples with one value everywhere.

    Raises:
        ValueError: if all are so.
    """
    flat = samples.flatten(1)
    own = int((flat.amax(1) == flat.amin(1)).sum()) if len(samples) else 0
    counts = gather_objects((own, len(samples)), job.group)
    constant, num = (sum(column) for column in zip(*counts, strict=True))
    if constant == num:
        raise ValueError(
            f"all {num} samples have one value everywhere: nothing was drawn; look at the pictures and at the network"
        )
    return [f"{constant} of {num} samples have one value everywhere."] if constant else []


def _calibration(
    references: References,
    path: Any,
    wiener: Wiener | None,
    num: int,
    num_steps: int,
    seed: int,
    job: Job,
    progress: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's calibration images by kind, and their numbers."""
    own = torch.arange(num).tensor_split(job.num_ranks)[job.rank]
    drawn = draw_calibration(references.whole, path, wiener, own, num, seed, num_steps, progress)
    fresh = torch.arange(len(references.fresh)).tensor_split(job.num_ranks)[job.rank]
    return {**{name: (images, own) for name, images in drawn.items()}, "fresh": (references.fresh[fresh], fresh)}


def _pairs(
    references: References, data: TrainingData, images: Tensor, index: Tensor, found: Closest, job: Job
) -> dict[str, Any] | None:
    """Plain data of the images with the smallest ratios, one for each training image; None for rows without pictures.

    Every rank calls this: the images may be another's.
    """
    shown = pictures_of(references.whole, data)
    order = found.ratio.argsort(stable=True)
    first: dict[int, int] = {}  # a training image that many samples repeat is shown once
    for place, row in zip(order.tolist(), found.nearest_row[order].tolist(), strict=True):
        first.setdefault(row, place)
    chosen = torch.tensor(list(first.values())[:NUM_SHOWN])
    wanted = found.index[chosen].tolist()
    own = {number: images[place].float().cpu() for place, number in enumerate(index.tolist()) if number in wanted}
    everyone = {number: image for part in gather_objects(own, job.group) for number, image in part.items()}
    if shown is None:
        return None
    to_picture, note = shown
    device = references.whole.device
    rows = {
        "image": torch.stack([everyone[number] for number in wanted]).to(device),
        "nearest": references.whole.rows(found.nearest_row[chosen].to(device)),
        "second": references.whole.rows(found.second_row[chosen].clamp(min=0).to(device)),
        "held_out": references.held_out.rows(found.held_out_row[chosen].to(device)),
    }
    numbers = {name: getattr(found, name)[chosen].tolist() for name in ("nearest", "second", "held_out", "ratio")}
    pictures = {name: to_picture(x) for name, x in rows.items()}
    return {"pictures": pictures, "distance": numbers, "index": wanted, "num": len(found.index), "note": note}


def _write(result: Memorization, pairs: list[dict[str, Any] | None], out: Path) -> None:
    """The files, each there as a whole or not at all."""
    write_json(out / "memorization.json", result.plain())
    write_csv(out / "memorization.csv", *result.closest.table())
    samples, fresh = pairs
    if samples and fresh:
        plots.save(
            plots.closest_pairs({"samples": samples, "fresh real images": fresh}, MEMORIZED), out / "closest.png"
        )
    if result.index is not None:
        figure = plots.memorization_index(result.index.plain(), (MEMORIZER, OWN, WIENER))
        plots.save(figure, out / "memorization_index.png")
