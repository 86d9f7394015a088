"""What a stage profile suggests before any network exists: numbers, each with its rule and the lines to paste.

No rule here has been confirmed by a sweep on the data at hand; each says what was tried.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch

from fm_stages.flow import (
    LogitNormalTimesteps,
    ShiftedTimesteps,
    TimestepSampler,
    UniformTimesteps,
    shift_for_share,
    weights_for_share,
)
from fm_stages.oracle import StageProfile
from fm_stages.training import expected_floors

UNVALIDATED = "unvalidated"
"""The status of a rule until a sweep has confirmed it."""

TRIED = "tried in one sweep"
"""The status of a rule that one sweep, of small networks on Fashion-MNIST, has found near the best."""

SHARE = 1 / 3
"""Of draws or steps to spend early: of the sampling grids in arXiv 2512.02826, Table 2, that with 34 % of its steps
before t = 0.2 is best."""

EARLY = 2.0
"""That t = 0.2 is twice the boundary there."""

LOGIT_STD = 1.0
"""Of the logit-normal density that did best in arXiv 2403.03206."""


@dataclass
class Recommendation:
    """A suggested setting.

    Attributes:
        name: what is set.
        value: to what, in words.
        numbers: the same as numbers.
        rule: where it comes from.
        yaml: lines to paste into a config; empty where no part of this package takes it.
        status: whether a sweep has confirmed the rule.
    """

    name: str
    value: str
    numbers: dict[str, float]
    rule: str
    yaml: str = ""
    status: str = UNVALIDATED


def recommend(profile: StageProfile, share: float = SHARE) -> list[Recommendation]:
    """Settings that follow from where the stages lie.

    Args:
        profile: of the training data.
        share: of draws (or steps) to spend early, in (0, 1).

    Returns:
        Recommendations; none if the boundary lies at 0 or 1, where there is only one stage.

    Raises:
        ValueError: if the share is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of early draws must lie in (0, 1), got {share}")
    b = profile.boundary
    if not 0 < b < 1:
        return []
    found = [training_shift(b, share), logit_normal(b, share)]
    with contextlib.suppress(ValueError):  # so close to an end that the hand-over reaches beyond it
        found.append(stage_weights(b, share))
    found.append(sampling_shift(b, share))
    if profile.label_dropout < 1:
        found.append(guidance(profile))
    return found


def training_shift(b: float, share: float) -> Recommendation:
    """Shift of uniform t with which the share of draws falls before the boundary b."""
    shift = shift_for_share(share, b)
    return Recommendation(
        "shift of training timesteps",
        f"{shift:.3g}",
        {"shift": shift},
        f"{share:.0%} of the draws fall before the boundary: s = f (1 - b) / ((1 - f) b), f = {share:.3g}, b = {b:.3g}",
        _yaml("timesteps", "fm_stages.flow.ShiftedTimesteps", shift=shift),
    )


def logit_normal(b: float, share: float) -> Recommendation:
    """Logit-normal density with the same share before the boundary b."""
    quantile = torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).item()
    mean = math.log(b / (1 - b)) - LOGIT_STD * quantile
    return Recommendation(
        "logit-normal timesteps instead",
        f"mean {mean:.2f}, std {LOGIT_STD:.2f}",
        {"mean": mean, "std": LOGIT_STD},
        f"std as in SD3 (arXiv 2403.03206); mean so that {share:.0%} of the draws fall before the boundary",
        _yaml("timesteps", "fm_stages.flow.LogitNormalTimesteps", mean=mean, std=LOGIT_STD),
    )


def stage_weights(b: float, share: float) -> Recommendation:
    """Weights of the loss that emphasise the stages as the shift does, with uniform t; b is the boundary."""
    early, late = weights_for_share(share, b)
    return Recommendation(
        "stage weights instead",
        f"navigation {early:.3g}, refinement {late:.3g}",
        {"navigation": early, "refinement": late},
        f"navigation has {share:.0%} of the weight under uniform t, the smooth hand-over at the boundary included",
        _yaml("weighting", "fm_stages.flow.StageWeighting", boundary=b, navigation=early, refinement=late),
    )


def sampling_shift(b: float, share: float) -> Recommendation:
    """Shift of the sampling grid with which the share of steps is spent before twice the boundary b, at least 1."""
    early = EARLY * b
    shift = max(1.0, shift_for_share(share, early)) if early < 1 else 1.0
    aim = f"{share:.0%} of the steps before t = {early:.3g}," if early < 1 else "uniform steps: t = 1 comes before"
    return Recommendation(
        "shift of the sampling grid",
        f"{shift:.3g}",
        {"shift": shift},
        f"{aim} {EARLY:g} x boundary, where a network's own behaviour "
        "turned (arXiv 2512.02826, Table 2: 34 % before 0.2, its s = 1 / ours), but no fewer than uniform steps have: "
        "a shift below 1 made FID worse on Fashion-MNIST (docs/results/sampling_shift.md)",
        f"samples:\n  shift: {shift:.4g}",
        TRIED,
    )


def guidance(profile: StageProfile) -> Recommendation:
    """Where to guide."""
    start, end = profile.guidance_interval()
    return Recommendation(
        "guidance interval",
        f"[{start:.3g}, {end:.3g}]" + (" (cut off at 1)" if end == 1 else ""),
        {"start": start, "end": end},
        "from the end of navigation to 6 x boundary, empirical (arXiv 2512.02826, Table 3: [0.1, 0.6] at a boundary of "
        "0.1); it cannot be read off the curve of what the label adds, which is largest early. Where t = 1 is noise: "
        f"[{1 - end:.3g}, {1 - start:.3g}]. The best of 11 in a sweep on Fashion-MNIST "
        "(docs/results/guidance_interval.md)",
        status=TRIED,
    )


def floor_table(
    profile: StageProfile, timesteps: TimestepSampler | None, share: float = SHARE
) -> list[dict[str, str | float | None]]:
    """The expected floor of the regular loss under several densities of t.

    Args:
        profile: of the training data.
        timesteps: the density that a run uses; None: uniform.
        share: as for `recommend`.

    Returns:
        For each density its name, the share of draws before the boundary, and the floor with its standard error, over
        all t and before the boundary (None where nothing is drawn there).
    """
    b = profile.boundary
    densities = {_name(timesteps): timesteps or UniformTimesteps()}
    if 0 < b < 1:
        shift, normal = training_shift(b, share).numbers, logit_normal(b, share).numbers
        suggested = (ShiftedTimesteps(shift["shift"]), LogitNormalTimesteps(**normal))
        densities |= {f"{_name(density)}, suggested": density for density in suggested}
    rows = []
    for name, density in densities.items():
        floors = expected_floors(profile, density)
        floor, error = floors["stages/floor"]
        early, early_error = floors.get("stages/floor_navigation", (None, None))
        rows.append(
            {
                "density": name,
                "share_navigation": density.cdf(torch.tensor(b, dtype=torch.float64)).item(),
                "floor": floor,
                "floor_sem": error,
                "floor_navigation": early,
                "floor_navigation_sem": early_error,
            }
        )
    return rows


def _name(timesteps: TimestepSampler | None) -> str:
    """A density in words."""
    if timesteps is None or isinstance(timesteps, UniformTimesteps):
        return "uniform t"
    if isinstance(timesteps, ShiftedTimesteps):
        return f"{_name(timesteps.base)} shifted by {timesteps.shift:.3g}"
    if isinstance(timesteps, LogitNormalTimesteps):
        return f"logit-normal({timesteps.mean:.2f}, {timesteps.std:.2f})"
    return type(timesteps).__name__


def _yaml(section: str, class_path: str, **arguments: float) -> str:
    """Lines of a config that choose a component of the model."""
    lines = [f"      {name}: {value:.4g}" for name, value in arguments.items()]
    return "\n".join(["model:", f"  {section}:", f"    class_path: {class_path}", "    init_args:", *lines])
