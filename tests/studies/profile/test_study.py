"""A study holds what was asked for, about the rows that there are."""

import json
import math

import pytest
import torch

from fm_stages.flow import CosinePath, LinearPath
from fm_stages.oracle import DataBank, StageProfile
from fm_stages.studies import Source, open_source, study_stages
from fm_stages.studies.profile.study import LABEL_DROPOUT
from fm_stages.studies.profile.text import comparison, summary

FEW = {"num_queries": 48, "num_times": 8}


@pytest.fixture(scope="module")
def part():
    return study_stages(open_source("Digits", rows=256), **FEW)


def normal(num: int) -> Source:
    rows = torch.randn(num, 6, generator=torch.Generator().manual_seed(0))
    return Source("normal", DataBank(rows), num, LinearPath())


def test_label_dropout_is_ones_own_or_the_sources_or_the_default(part):
    assert part.profile.label_dropout == LABEL_DROPOUT == 0.1
    source = open_source("Digits", rows=20)
    source.label_dropout = 0.4
    assert study_stages(source, **FEW).profile.label_dropout == 0.4
    assert study_stages(source, 0.0, **FEW).profile.label_dropout == 0.0
    assert study_stages(normal(20), 0.3, **FEW).profile.label_dropout == 1.0


def test_both_kinds_of_queries_are_measured(part):
    profile = part.profile
    assert profile.unconditional is not None
    assert profile.conditional is not None
    assert profile.guidance is not None
    assert profile.conditional.ess[0] < profile.unconditional.ess[0] == pytest.approx(256, rel=1e-3)


def test_log_snr_of_two_paths(part):
    inside = [(t, x) for t, x in zip(part.profile.t, part.log_snr, strict=True) if 0 < t < 1]
    assert [x for _, x in inside] == pytest.approx([2 * math.log(t / (1 - t)) for t, _ in inside])
    assert part.log_snr[0] == -math.inf
    cosine = study_stages(Source("x", part.source.bank, 256, CosinePath()), **FEW)
    inside = [(t, x) for t, x in zip(cosine.profile.t, cosine.log_snr, strict=True) if 0 < t < 1]
    assert [x for _, x in inside] == pytest.approx([2 * math.log(math.tan(math.pi * t / 2)) for t, _ in inside])


def test_a_part_of_the_rows_has_a_trend_that_is_extrapolated(part):
    assert [p.num_rows for p in part.row_trend.points] == [256, 128, 64]
    assert part.dim_trend is None
    text = summary(part)
    assert "WARNING: 256 of 1438 rows were used" in text
    assert f"the line puts the boundary near {part.row_trend.boundary_at(1438):.3f} (extrapolated" in " ".join(
        text.split()
    )
    assert part.row_trend.boundary_at(1438) > part.profile.boundary


def test_a_part_too_small_for_a_trend_still_warns():
    study = study_stages(open_source("Digits", rows=100), **FEW)
    assert study.row_trend is None
    assert "WARNING: 100 of 1438 rows were used" in summary(study)
    assert "128 or more show a trend" in " ".join(summary(study).split())


def test_all_rows_have_a_trend_if_it_is_asked_for():
    assert study_stages(normal(128), **FEW).row_trend is None
    assert "WARNING" not in summary(study_stages(normal(128), **FEW))


def test_json_holds_everything_and_the_profile_comes_back(part, tmp_path):
    plain = json.loads(part.to_json())
    assert plain["name"] == "Digits"
    assert plain["num_rows_in_all"] == 1438
    assert plain["facts"]["num_rows"] == 256
    assert [one["status"] for one in plain["recommendations"]] == [one.status for one in part.recommendations]
    assert plain["recommendations"][0]["numbers"] == part.recommendations[0].numbers
    assert plain["floors"] == part.floors
    assert len(plain["row_trend"]["points"]) == 3
    part.profile.save(tmp_path / "new" / "profile.json")
    assert StageProfile.load(tmp_path / "new" / "profile.json") == part.profile


def test_summary_says_what_was_measured(part):
    text = summary(part)
    profile = part.profile
    for name in ("navigation_end", "boundary", "refinement_complete"):
        for curves in (profile, profile.unconditional, profile.conditional):
            assert f"{getattr(curves, name):.3f} ± {curves.time_sem[name]:.3f}" in text
    assert f"{profile.top1[-1]:.4f} ± " in text
    for one in part.recommendations:
        assert f"{one.name}: {one.value}   [{one.status}]" in text
    assert max(len(line) for line in text.splitlines()) <= 150


def test_comparison_has_one_row_for_each(part):
    other = study_stages(normal(50), **FEW)
    head, first, second, *_ = comparison([part, other]).splitlines()
    assert head.split()[:3] == ["data", "N", "D"]
    assert first.split()[:3] == ["Digits", "256", "64"]
    assert second.split()[:3] == ["normal", "50", "6"]
    assert f"{part.profile.boundary:.3f}" in first.split()
    assert f"{other.facts.effective_dims:.1f}" in second.split()
    assert first.split()[-1] == part.recommendations[0].value
