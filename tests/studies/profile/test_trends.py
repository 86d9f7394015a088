"""What moves the boundary: the line through known points, and the directions that the theory gives."""

import math

import numpy as np
import pytest
import torch

from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank
from fm_stages.studies.profile import trends
from fm_stages.studies.profile.trends import TrendPoint, trend_over_dims, trend_over_rows

PATH = LinearPath()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked(monkeypatch) -> list[DataBank]:
    """The banks that were measured, each with a boundary and an error that follow from its number of rows."""
    banks = []

    def point(kind, bank, path, label_dropout, num_queries, seed) -> TrendPoint:
        banks.append(bank)
        boundary, error = BOUNDARIES[bank.num_rows]
        return TrendPoint(kind, bank.num_rows, bank.num_dims, 0.0, boundary, 1.0, {"boundary": error})

    monkeypatch.setattr(trends, "_point", point)
    return banks


BOUNDARIES = {
    1024: (0.40, 0.002),
    512: (0.37, 0.004),
    256: (0.33, 0.004),
    128: (0.30, 0.002),
    64: (0.0, 0.0),
}


class TestOverRows:
    def test_banks_are_halves_within_halves(self, asked):
        bank = DataBank(normal(1024, 4))
        trend = trend_over_rows(bank, PATH, 1.0, progress=False)
        assert [p.num_rows for p in trend.points] == [1024, 512, 256, 128, 64]
        rows = [{row.numpy().tobytes() for row in part.rows(torch.arange(part.num_rows))} for part in asked]
        assert all(small < large for large, small in zip(rows, rows[1:], strict=False))

    @pytest.mark.parametrize("smallest", [(0.33, 0.004), (0.0, 0.0)])
    def test_line_is_the_weighted_least_squares_one(self, asked, monkeypatch, smallest):
        """A boundary at 0 has no spread; it must not draw the line through itself."""
        monkeypatch.setitem(BOUNDARIES, 256, smallest)
        trend = trend_over_rows(DataBank(normal(1024, 4)), PATH, 1.0, progress=False)
        used = [1024, 512, 256]  # the larger half of five
        x, y = np.log(used), np.array([BOUNDARIES[n][0] for n in used])
        w = np.array([max(BOUNDARIES[n][1], 0.001) for n in used]) ** -2.0
        mx, my = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
        slope = (w * (x - mx) * (y - my)).sum() / (w * (x - mx) ** 2).sum()
        assert trend.slope == pytest.approx(slope)
        assert trend.intercept == pytest.approx(my - slope * mx)
        for num_rows in (1, 700, 60_000, 10**9):
            expected = my + slope * (math.log(num_rows) - mx)
            assert trend.boundary_at(num_rows) == pytest.approx(min(1, max(0, expected)))

    def test_too_few_rows_are_refused(self):
        with pytest.raises(ValueError, match="127 rows are too few for a trend: it needs 128"):
            trend_over_rows(DataBank(normal(127, 4)), PATH, 1.0)

    def test_more_rows_move_all_stages_later(self):
        trend = trend_over_rows(DataBank(normal(512, 24)), PATH, 1.0, 128, progress=False)
        for name in ("navigation_end", "boundary", "refinement_complete"):
            first, last = trend.points[0], trend.points[-1]
            error = math.hypot(first.time_sem[name], last.time_sem[name])
            assert getattr(first, name) - getattr(last, name) > 2.5 * error, name
        assert trend.slope > 0
        assert trend.boundary_at(5120) > trend.points[0].boundary


class TestOverDims:
    def test_unit_gaussians_and_pooled_images(self, monkeypatch):
        monkeypatch.setattr(trends, "GAUSSIAN_DIMS", (8, 32, 128))
        images = normal(200, 1, 16, 16).cumsum(2).cumsum(3) / 20
        points = trend_over_dims(DataBank(images), PATH, 128, progress=False)
        assert [(p.kind, p.num_rows, p.num_dims) for p in points] == [
            *(("unit Gaussian", 200, dims) for dims in (8, 32, 128)),
            *(("images, pooled", 200, dims) for dims in (256, 64, 16)),
        ]
        boundaries = [p.boundary for p in points]
        assert boundaries[:3] == sorted(boundaries[:3], reverse=True)
        assert boundaries[3:] == sorted(boundaries[3:])

    def test_pooled_rows_are_means_over_squares(self):
        images = normal(5, 3, 8, 12)
        first, pooled = trends._pooled(DataBank(images))
        assert torch.equal(first.rows(torch.arange(5)), images)
        expected = images.numpy().reshape(5, 3, 4, 2, 6, 2).mean((3, 5))
        np.testing.assert_allclose(pooled.rows(torch.arange(5)), expected, atol=1e-6)

    def test_rows_that_are_no_images_are_not_pooled(self):
        assert list(trends._pooled(DataBank(normal(5, 16)))) == []
