"""All numbers of one set of images against real ones, with what could not be computed and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fm_stages.oracle import gather_objects, together
from fm_stages.studies.evaluate.features import FeatureSet, Moments, moments_of
from fm_stages.studies.evaluate.metrics import (
    frechet_distance,
    has_fidelity,
    inception_score,
    kernel_distance,
    memorization_distance,
    memorization_informed,
    precision_recall,
)
from fm_stages.studies.features.networks import INSTALL
from fm_stages.studies.ranks import Job

MISSING = f"torch-fidelity is not installed: {INSTALL}"

CONSTANT = 1e-14
"""Variance over squared mean below which a feature is the same everywhere, but for the rounding of float32."""


@dataclass
class Scores:
    """What a set of images comes to; numbers that could not be computed are not in ``values``.

    Attributes:
        name: of the images.
        num: how many there are.
        against: the images that they are compared with.
        values: numbers by name: fid, kid, kid_std, inception_score, inception_score_std, precision, recall, mifid,
            memorization_distance.
        missing: why a number was not computed, by its name.
        settings: kid_subset, images in a subset.
    """

    name: str
    num: int
    against: str
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def measure_all(
    samples: FeatureSet, reference: FeatureSet, other: FeatureSet, job: Job, seed: int = 0, device: Any = "cpu"
) -> tuple[Scores, Scores]:
    """The samples' scores, and those of real images, which say what the samples' mean. Every rank calls this.

    Rank 0 computes, and all have what it found.

    Args:
        samples: measured images.
        reference: real images that they are compared with.
        other: real images of the other split, as the yardstick; one of the two is of the training images.
        job: the ranks.
        seed: of subsets.
        device: where distances are computed.

    Raises:
        ValueError: if all reference images have the same features.
    """
    found: tuple[Scores, Scores] | None = None
    with together(job.group):
        check_constant(reference)
        if job.rank == 0:
            training, held_out = (reference, other) if _is_training(reference) else (other, reference)
            with tqdm(total=2, desc="Comparing features", unit="set") as bar:
                of_samples = _scores(samples, reference, training, samples, seed, device)
                bar.update()
                yardstick = _scores(other, reference, training, _first(held_out, samples.num), seed, device)
                bar.update()
            found = of_samples, yardstick
    both = gather_objects(found, job.group)[0]
    assert both is not None
    return both


def _is_training(images: FeatureSet) -> bool:
    return images.images.record.get("split") == "train"


def _scores(
    images: FeatureSet, reference: FeatureSet, training: FeatureSet, informed: FeatureSet, seed: int, device: Any
) -> Scores:
    """Scores of images against the reference; MIFID of ``informed``, which are not training images, against those."""
    scores = Scores(images.images.name, images.num, f"{reference.num} {reference.images.name}")
    one, other = (x.features.to(device) for x in (images, reference))
    scores.values["fid"] = distance_of(images.moments, reference.moments)
    _put(scores, ("kid", "kid_std"), lambda: _kid(scores, one, other, seed))
    if images.logits is None:
        scores.missing["inception_score"] = "the extractor gives no class scores"
    else:
        logits = images.logits
        _put(scores, ("inception_score", "inception_score_std"), lambda: inception_score(logits, seed))
    _put(scores, ("precision", "recall"), lambda: precision_recall(one, other))
    try:
        distance = memorization_distance(training.features.to(device), informed.features.to(device))
    except ValueError as error:  # ours: no features to compare
        scores.missing |= dict.fromkeys(("mifid", "memorization_distance"), str(error))
    else:
        frechet = distance_of(informed.moments, training.moments)
        scores.values |= {"mifid": memorization_informed(frechet, distance), "memorization_distance": distance}
    scores.settings |= {"mifid_images": f"{informed.num} {informed.images.name}"}
    scores.settings |= {"mifid_against": f"{training.num} {training.images.name}"}
    return scores


def _first(images: FeatureSet, num: int) -> FeatureSet:
    """The first images of a set: the nearest of more images is nearer."""
    if images.num <= num:
        return images
    features = images.features[:num]
    return replace(images, num=num, features=features, moments=moments_of(features, Job()))


def distance_of(one: Moments, other: Moments) -> float:
    """FID of two sets."""
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


def _kid(scores: Scores, one: Tensor, other: Tensor, seed: int) -> tuple[float, float]:
    mean, std, scores.settings["kid_subset"] = kernel_distance(one, other, seed)
    return mean, std


def _put(scores: Scores, names: tuple[str, str], compute: Callable[[], tuple[float, float]]) -> None:
    """Two numbers of torch-fidelity, or why there are none."""
    plain = [name for name in names if not name.endswith("_std")]
    if not has_fidelity():
        scores.missing |= dict.fromkeys(plain, MISSING)
        return
    try:
        scores.values |= dict(zip(names, compute(), strict=True))
    except ValueError as error:  # ours: too few images
        scores.missing |= dict.fromkeys(plain, str(error))


def check_constant(reference: FeatureSet) -> None:
    """Raise a ValueError if all real images have the same features."""
    if bool(_constant(reference.moments).all()):
        raise ValueError(
            f"the extractor gives all {reference.num} {reference.images.name} the same features, so nothing can be "
            "compared by them: its weights, or what it does with uint8 images, are wrong"
        )


def _constant(moments: Moments) -> Tensor:
    """Which features (F,) are the same for all images."""
    return moments.covariance.diagonal() <= CONSTANT * moments.mean.square()


def warnings_of(samples: FeatureSet, reference: FeatureSet, other: FeatureSet) -> list[str]:
    """What a reader has to know before the numbers, a sentence each."""
    found = []
    num_features = reference.features.shape[1]
    for one in (samples, reference, other):
        if one.num <= num_features:
            found.append(
                f"{one.num} {one.images.name} for {num_features} features: their covariance is singular (rank "
                f"{one.num - 1} at most). FID and MIFID can be computed, but are far above what more images would "
                f"give: take {num_features + 1} at least, better {10 * num_features}."
            )
    if bool(_constant(samples.moments).all()):
        found.append(f"All {samples.num} samples have the same features: to the extractor they are one image.")
    if (num := int(_constant(reference.moments).sum())) > 0:
        found.append(
            f"{num} of {num_features} features are the same for all {reference.images.name}: they tell nothing."
        )
    for one in (samples, reference, other):
        if one.skipped:
            named = "; ".join(one.skipped[:5]) + ("; ..." if len(one.skipped) > 5 else "")
            found.append(
                f"{len(one.skipped)} of {one.images.num} {one.images.name} could not be read and are left out: {named}"
            )
    return found


def balance(labels: Tensor, num_classes: int) -> list[int] | None:
    """How many images each class has; None where none has a label. Labels of no class are left out."""
    known = labels[(labels >= 0) & (labels < num_classes)]
    return torch.bincount(known, minlength=num_classes).tolist() if len(known) else None
