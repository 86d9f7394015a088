"""What ``fm-stages profile`` prints: tables and sentences that a newcomer understands."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from fm_stages.oracle import StageCurves, StageProfile
from fm_stages.studies.facts import Facts
from fm_stages.studies.profile.recommend import Recommendation
from fm_stages.studies.profile.study import Study
from fm_stages.studies.profile.trends import FEWEST, RowTrend, TrendPoint

WIDTH = 110

STAGES = (
    ("navigation ends", "navigation_end", "median top1 = 0.1"),
    ("boundary", "boundary", "0.5"),
    ("refinement complete", "refinement_complete", "0.9"),
)

COLUMNS = {
    "top1": "top1",
    "ess": "ess (median)",
    "entropy": "entropy",
    "own": "own weight",
    "floor": "floor",
}
"""What the table over t shows."""


def summary(study: Study) -> str:
    """All that was found about a training set, as text of many lines."""
    profile = study.profile
    parts = [_stages(profile), _curves(profile), _facts(study.facts)]
    parts += [_wrapped(f"Note: {warning}") for warning in study.warnings]
    parts.append(_floors(study.floors))
    if study.recommendations:
        parts.append(_recommendations(study.recommendations))
    else:
        parts.append(_wrapped("No suggestions: the boundary lies at an end of [0, 1], so there is only one stage."))
    if study.row_trend:
        parts.append(_row_trend(study.row_trend))
    if profile.num_rows < study.source.num_rows:
        parts.append(_part_of_rows(study.row_trend, profile, study.source.num_rows))
    if study.dim_trend:
        parts.append(_dim_trend(study.dim_trend))
    return "\n\n".join(parts)


def comparison_table(studies: Sequence[Study]) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and a row of cells for each of several training sets."""
    columns = ["data", "N", "D", "effective D", "nearest", "std", "nav. ends", "boundary", "ref. complete"]
    columns += ["floor", "shift"]
    rows = []
    for study in studies:
        facts, profile = study.facts, study.profile
        rows.append(
            [
                study.source.name,
                str(facts.num_rows),
                str(facts.num_dims),
                f"{facts.effective_dims:.1f}",
                f"{facts.nearest_distance:.3f}",
                f"{facts.std:.3f}",
                f"{profile.navigation_end:.3f}",
                f"{profile.boundary:.3f}",
                f"{profile.refinement_complete:.3f}",
                f"{profile.expected_floor()[0]:.4f}",
                study.recommendations[0].value if study.recommendations else "-",
            ]
        )
    return columns, rows


def comparison(studies: Sequence[Study]) -> str:
    """One line for each of several training sets."""
    columns, rows = comparison_table(studies)
    width = max(12, *(len(name) for name, *_ in rows))
    lines = [f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in (columns, *rows)]
    note = (
        "effective D: participation ratio of the covariance. nearest: median distance to the nearest other row, root "
        "mean square per value (the noise has 1). floor: of the regular loss, uniform t. shift: of training timesteps, "
        "unvalidated. Floors of different encodings are in different units: compare shapes, not values."
    )
    return "\n".join(lines) + "\n" + _wrapped(note)


def _stages(profile: StageProfile) -> str:
    """The three times, for each kind of queries."""
    kinds: dict[str, StageCurves] = {}
    if profile.unconditional and profile.conditional:
        kinds = {"unconditional": profile.unconditional, "conditional": profile.conditional}
    mix = "unconditional" if profile.label_dropout == 1 else f"as trained ({profile.label_dropout:.0%} unlabelled)"
    kinds = {mix: profile, **kinds} if profile.label_dropout < 1 else {mix: profile}
    lines = [f"{'stages, in t (0 = noise, 1 = data)':36}" + "".join(f"{kind:>28}" for kind in kinds)]
    for words, name, level in STAGES:
        cells = [f"{getattr(c, name):.3f} ± {c.time_sem[name]:.3f}" for c in kinds.values()]
        lines.append(f"{f'{words} ({level})':36}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def _curves(profile: StageProfile) -> str:
    """About a dozen of the times, spread over the change of the mean top1."""
    guided = profile.guidance is not None
    header = [*COLUMNS.values(), *(["label adds"] if guided else [])]
    lines = [f"{'t':>8}" + "".join(f"{name:>18}" for name in header)]
    every = max(1, len(profile.t) // 12)
    for i in sorted({*range(0, len(profile.t), every), len(profile.t) - 1}):
        cells = [_with_error(getattr(profile, name)[i], profile.sem[name][i]) for name in COLUMNS]
        if profile.guidance is not None and profile.guidance_sem is not None:
            cells.append(_with_error(profile.guidance[i], profile.guidance_sem[i]))
        lines.append(f"{profile.t[i]:8.4f}" + "".join(f"{cell:>18}" for cell in cells))
    note = (
        f"Means of {profile.num_queries} noisy training samples (ess: medians) ± standard error; all {len(profile.t)} "
        "times are in the JSON. top1: largest posterior weight of a training sample. ess: how many samples share the "
        "weight. own weight: that of the sample which the noisy one was made from. floor: of the regular loss, per "
        "value."
    )
    if guided:
        note += " label adds: E||u*(label) - u*||² / D. Curves with and without labels are in the JSON and the figure."
    return "\n".join([*lines, _wrapped(note)])


def _facts(facts: Facts) -> str:
    classes = f", {facts.num_classes} classes" if facts.num_classes else ""
    return _wrapped(
        f"Data: {facts.num_rows} rows ({facts.num_distinct} distinct) x {facts.num_dims} values{classes}; mean "
        f"{facts.mean:.3f}, std {facts.std:.3f}; effective dimension {facts.effective_dims:.1f}; median distance to "
        f"the nearest other row {facts.nearest_distance:.3f} per value (root mean square; the noise has 1)."
    )


def _floors(floors: Sequence[dict[str, Any]]) -> str:
    """What the loss cannot go below."""
    lines = [f"{'what the regular loss cannot go below':44}{'draws in navigation':>22}{'all t':>20}{'navigation':>20}"]
    for row in floors:
        early, overall = "-", _with_error(row["floor"], row["floor_sem"])
        if row["floor_navigation"] is not None:
            early = _with_error(row["floor_navigation"], row["floor_navigation_sem"])
        lines.append(f"{row['density']:44}{row['share_navigation']:>22.0%}{overall:>20}{early:>20}")
    if floors[0]["floor_navigation"] is not None:
        lines.append(
            _wrapped(
                f"Before the boundary your regular loss cannot go below {floors[0]['floor_navigation']:.4g} "
                f"({floors[0]['density']}), however good the model: a curve that hovers there is not stuck."
            )
        )
    return "\n".join(lines)


def _recommendations(recommendations: Sequence[Recommendation]) -> str:
    """Each with its rule and the lines to paste."""
    lines = ["Suggestions (rules, not measurements of your training; in brackets whether a sweep has tried them)"]
    for one in recommendations:
        lines += ["", f"  {one.name}: {one.value}   [{one.status}]", _wrapped(f"rule: {one.rule}", 4)]
        if one.yaml:
            lines.append(textwrap.indent(one.yaml, " " * 6))
        else:
            lines.append(_wrapped("(for drawing: fm-stages sample --guidance_scale SCALE --profile profile.json)", 4))
    return "\n".join(lines)


def _row_trend(trend: RowTrend) -> str:
    """The stages over N."""
    lines = [f"{'rows':>10}{'navigation ends':>20}{'boundary':>20}{'refinement complete':>22}"]
    for p in trend.points:
        cells = [f"{getattr(p, name):.3f} ± {p.time_sem[name]:.3f}" for _, name, _ in STAGES]
        lines.append(f"{p.num_rows:>10}{cells[0]:>20}{cells[1]:>20}{cells[2]:>22}")
    lines.append(
        _wrapped(
            f"The boundary moves with log N: {trend.slope * math.log(10):+.3f} per tenfold number of rows, by a line "
            "through the larger half of these banks."
        )
    )
    return "\n".join(lines)


def _part_of_rows(trend: RowTrend | None, profile: StageProfile, all_rows: int) -> str:
    """What a part of the rows does to the stages, and where the line leads."""
    text = f"WARNING: {profile.num_rows} of {all_rows} rows were used. With all of them every stage lies later"
    if trend:
        text += (
            f": the line puts the boundary near {trend.boundary_at(all_rows):.3f} (extrapolated, not measured), where "
            f"{profile.boundary:.3f} was found"
        )
    else:
        text += f", by how much cannot be told from so few: {2 * FEWEST} or more show a trend"
    return _wrapped(text + ". Measure all rows before you rely on a number.")


def _dim_trend(points: Sequence[TrendPoint]) -> str:
    lines = [f"{'unconditional':>16}{'N':>10}{'D':>8}{'boundary':>20}"]
    for p in points:
        boundary = f"{p.boundary:.3f} ± {p.time_sem['boundary']:.3f}"
        lines.append(f"{p.kind:>16}{p.num_rows:>10}{p.num_dims:>8}{boundary:>20}")
    return "\n".join(lines)


def _with_error(value: float, error: float) -> str:
    """A number with as many digits as its error has a use for."""
    if value >= 1000:
        return f"{value:.0f} ± {error:.0f}"
    return f"{value:.1f} ± {error:.1f}" if value >= 10 else f"{value:.4f} ± {error:.4f}"


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2 * (indent > 0)))
