"""Features of images, over ranks: images come in batches, become features, and are gone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors
from tqdm import tqdm

from fm_stages.oracle import gather_objects, together
from fm_stages.studies.evaluate.images import Images
from fm_stages.studies.features.extractor import Extractor
from fm_stages.studies.ranks import Job

IN_FIGURE = 64
"""Images that are kept for the figure."""

ROWS = 4096
"""Rows of features that are made float64 at a time."""


@dataclass
class Moments:
    """Number, mean (F,) and covariance (F, F), float64, of all ranks' features."""

    num: int
    mean: Tensor
    covariance: Tensor


@dataclass
class FeatureSet:
    """Features of a set of images; what is said to be gathered is the same on all ranks.

    Attributes:
        images: that they are of.
        num: images that could be read, over all ranks.
        moments: over all ranks.
        features: (num, F) float32, gathered, in the order of the numbers.
        logits: (num, K), gathered; None where the extractor gives none.
        labels: (num,) int64, gathered; -1 where there is none.
        skipped: files that could not be read, gathered.
        pixels: the first images, gathered, at most `IN_FIGURE`.
        values: (n, ...) what a network sees of those among the first ``keep`` images that this rank read, not gathered;
            None where nothing gives that, on all ranks alike.
        values_index: (n,) int64, their numbers.
    """

    images: Images
    num: int
    moments: Moments
    features: Tensor
    logits: Tensor | None
    labels: Tensor
    skipped: list[str]
    pixels: Tensor
    values: Tensor | None
    values_index: Tensor


@dataclass
class _Parts:
    """What a rank has so far."""

    index: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    no_values: bool = False


def extract(images: Images, extractor: Extractor, batch_size: int, job: Job, keep: int = 0) -> FeatureSet:
    """Features of all images. Every rank calls this.

    Batches are the same on any number of ranks, which take turns with them: features depend on the batch that they were
    made in by their last digits.

    Args:
        images: to measure.
        extractor: of features.
        batch_size: images at a time on a rank.
        job: this rank among the others.
        keep: of how many of the first images to keep what a network sees.

    Raises:
        ValueError: on every rank, if one meets images of another shape, or features that are not finite.
    """
    batches = torch.arange(images.num).split(batch_size)
    parts = _Parts()
    with tqdm(total=images.num, desc=f"Measuring {images.name}", unit="image", disable=job.rank > 0) as bar:
        for first in range(0, len(batches), job.num_ranks):  # in rounds: a rank that fails ends all of them
            with together(job.group):
                if first + job.rank < len(batches):
                    _add(parts, images, extractor, batches[first + job.rank], keep)
            bar.update(sum(len(batch) for batch in batches[first : first + job.num_ranks]))
    skipped = [name for names in gather_objects(parts.skipped, job.group) for name in names]
    numbers, width = _joined(parts.index, (), torch.int64), extractor.num_features
    features = _joined(parts.features, (width,))
    num = sum(gather_objects(len(features), job.group))
    if num < 2:
        raise ValueError(
            f"{images.name}: {num} of {images.num} images could be read{_first(skipped)}; give 2 or more to measure"
        )
    moments = moments_of(features, job)
    order = _gather(numbers, job).argsort()
    logits = None
    if extractor.num_classes is not None:
        logits = _gather(_joined(parts.logits, (extractor.num_classes,)), job)[order]
    no_values = any(gather_objects(parts.no_values, job.group)) or not keep
    return FeatureSet(
        images,
        num,
        moments,
        _gather(features, job)[order],
        logits,
        _gather(_joined(parts.labels, (), torch.int64), job)[order],
        skipped,
        _first_ones(parts.pixels, numbers, IN_FIGURE, job),
        None if no_values else torch.cat(parts.values) if parts.values else torch.empty(0, *extractor.shape),
        numbers[numbers < keep],
    )


def _add(parts: _Parts, images: Images, extractor: Extractor, index: Tensor, keep: int) -> None:
    batch = images.read(index)
    parts.skipped += batch.skipped
    if not len(batch.index):
        return
    features, logits = extractor(batch.pixels)
    parts.index.append(batch.index)
    parts.features.append(features)
    parts.labels.append(batch.labels)
    if logits is not None:
        parts.logits.append(logits)
    parts.pixels.append(batch.pixels[batch.index < IN_FIGURE])
    if batch.values is None:
        parts.no_values = True
    else:
        parts.values.append(batch.values[batch.index < keep].cpu())


def moments_of(features: Tensor, job: Job) -> Moments:
    """Number, mean and covariance over all ranks, in two passes: no difference of large sums is taken.

    Args:
        features: (n, F), this rank's.
        job: the ranks.
    """
    num = sum(gather_objects(len(features), job.group))
    mean = _sum(sum((part.double().sum(0) for part in features.split(ROWS)), _zeros(features.shape[1])), job) / num
    outer = _zeros(features.shape[1], features.shape[1])
    for part in features.split(ROWS):
        centred = part.double() - mean
        outer += centred.T @ centred
    return Moments(num, mean, _sum(outer, job) / (num - 1))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _sum(x: Tensor, job: Job) -> Tensor:
    if job.group is not None:
        dist.all_reduce(x, group=job.group)
    return x


def _gather(x: Tensor, job: Job) -> Tensor:
    """Tensors (n_r, ...) of all ranks, one after the other, on every rank."""
    if job.group is None:
        return x
    return torch.cat(gather_all_tensors(x.contiguous(), job.group))


def _joined(parts: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, *shape, dtype=dtype)


def _first_ones(parts: list[Tensor], numbers: Tensor, num: int, job: Job) -> Tensor:
    """Of what ranks kept of images with numbers below ``num``, all of it in order."""
    own = torch.cat(parts) if parts else torch.empty(0)
    kept = [part for part in gather_objects((numbers[numbers < num], own), job.group) if len(part[1])]
    if not kept:
        return torch.empty(0)
    index = torch.cat([index for index, _ in kept])
    return torch.cat([images for _, images in kept])[index.argsort()]


def _first(names: list[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
