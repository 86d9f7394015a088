"""All that is found out about one training set before any network exists."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

from fm_stages.flow import TimestepSampler
from fm_stages.oracle import Oracle, StageProfile
from fm_stages.studies.facts import Facts, facts_of, warnings_of
from fm_stages.studies.profile.recommend import SHARE, Recommendation, floor_table, recommend
from fm_stages.studies.profile.trends import RowTrend, TrendPoint, has_trend, trend_over_dims, trend_over_rows
from fm_stages.studies.sources import Source

LABEL_DROPOUT = 0.1
"""Share of samples without label, where nothing says otherwise: the default of training."""


@dataclass
class Study:
    """All that was found out about one training set.

    Attributes:
        source: the training set.
        profile: its stages.
        facts: its size, scale and defects.
        recommendations: what follows.
        floors: what the regular loss cannot go below, for several densities of t.
        row_trend: how the stages move with the number of rows, if that was asked for.
        dim_trend: how they move with the number of values per row, if that was asked for.
    """

    source: Source
    profile: StageProfile
    facts: Facts
    recommendations: list[Recommendation]
    floors: list[dict[str, str | float | None]]
    row_trend: RowTrend | None = None
    dim_trend: list[TrendPoint] | None = None

    @property
    def warnings(self) -> list[str]:
        """What a person should know before they believe the numbers."""
        return warnings_of(self.facts)

    @property
    def log_snr(self) -> list[float]:
        """log(alpha^2 / sigma^2) at the profile's times (T); infinite where one of them is 0."""
        times = torch.tensor(self.profile.t, dtype=torch.float64)
        return (2 * (self.source.path.alpha(times).log() - self.source.path.sigma(times).log())).tolist()

    def to_json(self) -> str:
        """All but the profile, as JSON text."""
        plain = {
            "name": self.source.name,
            "num_rows_in_all": self.source.num_rows,
            "facts": asdict(self.facts),
            "warnings": self.warnings,
            "recommendations": [asdict(one) for one in self.recommendations],
            "floors": self.floors,
            "row_trend": asdict(self.row_trend) if self.row_trend else None,
            "dim_trend": [asdict(point) for point in self.dim_trend] if self.dim_trend else None,
        }
        return json.dumps(plain, indent=1, allow_nan=False)


def study_stages(
    source: Source,
    label_dropout: float | None = None,
    timesteps: TimestepSampler | None = None,
    share: float = SHARE,
    trends: bool = False,
    num_queries: int = 1024,
    num_times: int = 32,
    seed: int = 0,
) -> Study:
    """Measure a training set, with progress bars.

    Args:
        source: the training set.
        label_dropout: share of samples that the network sees without label; None: the source's, or `LABEL_DROPOUT`.
        timesteps: density of t for the expected floor; None: uniform.
        share: of draws (or steps) to spend early, for the recommendations.
        trends: whether to measure what moves the boundary. How it moves with the number of rows is measured anyway
            where the source holds only a part of them; not where these are too few for a trend.
        num_queries: draws per time.
        num_times: times.
        seed: of all draws.

    Returns:
        What was found.
    """
    bank, path = source.bank, source.path
    facts = facts_of(bank, seed)
    if label_dropout is None:
        label_dropout = LABEL_DROPOUT if source.label_dropout is None else source.label_dropout
    oracle = Oracle(bank, path)
    profile = StageProfile.measure(oracle, label_dropout, num_queries, seed, num_times, by_label=True, progress=True)
    found = Study(source, profile, facts, recommend(profile, share), floor_table(profile, timesteps, share))
    if has_trend(bank) and (trends or bank.num_rows < source.num_rows):
        found.row_trend = trend_over_rows(bank, path, profile.label_dropout, seed=seed)
    if trends:
        found.dim_trend = trend_over_dims(bank, path, seed=seed)
    return found
