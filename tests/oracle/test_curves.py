"""Numbers by timestep against the same numbers from the raw samples."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fm_stages.oracle import Curves, TimestepCurves, timestep_bins


class TestBins:
    def test_are_even_in_logit(self):
        edges = timestep_bins(num_bins=18, reach=4.0)
        assert len(edges) == 19
        assert (edges[0], edges[-1]) == (0, 1)
        logits = [math.log(t / (1 - t)) for t in edges[1:-1]]
        assert logits == pytest.approx(np.linspace(-4, 4, 17).tolist(), abs=1e-9)

    def test_the_boundary_is_an_edge(self):
        plain = timestep_bins(18)
        for boundary in (0.02, 0.1, 0.31, 0.5, 0.97):
            edges = timestep_bins(18, boundary=boundary)
            assert boundary in edges
            moved = [(a, b) for a, b in zip(plain, edges, strict=True) if a != b]
            assert len(moved) <= 1
            for a, b in moved:  # the nearest one, less than half a step of 0.5 away
                assert abs(math.log(a / (1 - a)) - math.log(b / (1 - b))) <= 0.25 + 1e-9

    @pytest.mark.parametrize("boundary", [None, 0.0, 1.0])
    def test_a_boundary_at_an_end_changes_nothing(self, boundary):
        assert timestep_bins(6, boundary=boundary) == timestep_bins(6)

    @settings(deadline=None)
    @given(num=st.integers(3, 60), reach=st.floats(0.5, 12), boundary=st.floats(0, 1))
    def test_edges_rise(self, num, reach, boundary):
        edges = timestep_bins(num, reach, boundary)
        assert len(edges) == num + 1
        assert (edges[0], edges[-1]) == (0, 1)
        assert all(lo < hi for lo, hi in zip(edges, edges[1:], strict=False))
        assert boundary in edges

    @pytest.mark.parametrize("num_bins", [2, 0, -1])
    def test_too_few_raise(self, num_bins):
        with pytest.raises(ValueError, match=f"got {num_bins}"):
            timestep_bins(num_bins)


EDGES = [0.0, 0.1, 0.3, 0.6, 0.9, 1.0]
NAMES = ("gap", "residual")


def samples(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """No sample lies in 0.6 .. 0.9; one lies in 0.9 .. 1."""
    t = torch.rand(num, generator=generator) * 0.6
    t[0] = 0.95
    return t, 1 + t + torch.randn(num, generator=generator), 1e3 * torch.randn(num, generator=generator)


def measured(t: Tensor, gap: Tensor, residual: Tensor, batches: int = 1) -> TimestepCurves:
    sums = TimestepCurves(NAMES, EDGES)
    for part in zip(t.chunk(batches), gap.chunk(batches), residual.chunk(batches), strict=True):
        sums.update(part[0], gap=part[1], residual=part[2])
    return sums


@pytest.fixture
def raw(generator) -> tuple[Tensor, Tensor, Tensor]:
    return samples(500, generator)


# torchmetrics warns of sums that are still empty, which a rank without samples has
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
class TestSums:
    @pytest.mark.parametrize("batches", [1, 7, 500])
    def test_means_and_standard_errors_are_numpys(self, raw, batches):
        curves = measured(*raw, batches).compute()
        t, *values = (x.double().numpy() for x in raw)
        assert curves.edges == EDGES
        assert sum(curves.count) == 500
        for name, value in zip(NAMES, values, strict=True):
            for k, (lo, hi) in enumerate(zip(EDGES, EDGES[1:], strict=False)):
                inside = value[(t >= lo) & (t < hi)]
                assert curves.count[k] == len(inside)
                if len(inside) == 0:
                    assert math.isnan(curves.mean[name][k])
                else:
                    assert curves.mean[name][k] == pytest.approx(inside.mean(), rel=1e-12)
                if len(inside) < 2:
                    assert math.isnan(curves.sem[name][k])
                else:
                    assert curves.sem[name][k] == pytest.approx(inside.std(ddof=1) / math.sqrt(len(inside)), rel=1e-10)

    def test_a_sample_on_an_edge_belongs_above_it(self):
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        sums = TimestepCurves(("x",), [0.0, 0.5, 1.0])
        sums.update(t, x=torch.tensor([1.0, 2.0, 4.0]))
        assert sums.compute().count == [1, 2]
        assert sums.compute().mean["x"] == [1, 3]

    def test_equal_samples_have_no_error(self):
        sums = TimestepCurves(("x",), [0.0, 0.5, 1.0])
        sums.update(torch.full((1000,), 0.2), x=torch.full((1000,), 0.1))
        assert sums.compute().sem["x"][0] == pytest.approx(0, abs=1e-9)

    def test_ranks_reduce_to_the_whole(self, raw):
        whole = measured(*raw).compute()
        for cut in (0, 1, 200):
            one = measured(*(x[:cut] for x in raw)) if cut else TimestepCurves(NAMES, EDGES)
            one.merge_state(measured(*(x[cut:] for x in raw)))
            merged = one.compute()
            assert merged.count == whole.count
            for name in NAMES:
                np.testing.assert_allclose(merged.mean[name], whole.mean[name], rtol=1e-12)
                np.testing.assert_allclose(merged.sem[name], whole.sem[name], rtol=1e-9)

    def test_is_not_stuck_at_what_it_computed_first(self, raw):
        sums = measured(*raw)
        sums.compute()
        sums.update(*(x[:1] for x in raw[:1]), gap=raw[1][:1], residual=raw[2][:1])
        assert sum(sums.compute().count) == 501
        sums.compute()
        sums.merge_state(measured(*raw))
        assert sum(sums.compute().count) == 1001
        sums.reset()
        assert sum(sums.compute().count) == 0

    def test_state_survives_a_checkpoint_and_stays_float64(self, raw):
        sums = measured(*raw)
        restored = TimestepCurves(NAMES, EDGES)
        restored.load_state_dict(copy.deepcopy(sums.state_dict()))
        assert restored.compute().mean["gap"] == pytest.approx(sums.compute().mean["gap"], nan_ok=True)
        assert all(
            getattr(sums.float().to("cpu"), name).dtype == torch.float64 for name in ("count", "total", "square")
        )

    def test_many_large_samples_lose_no_digits(self, generator):
        """A hundred thousand ess of 6e4 +- 1: float32 sums would see no spread at all."""
        value = 6e4 + torch.randn(100_000, generator=generator, dtype=torch.float64)
        sums = TimestepCurves(("ess",), [0.0, 0.5, 1.0])
        for part in value.chunk(50):
            sums.update(torch.full(part.shape, 0.3), ess=part)
        curves = sums.compute()
        assert curves.mean["ess"][0] == pytest.approx(value.mean().item(), rel=1e-12)
        assert curves.sem["ess"][0] == pytest.approx(value.std().item() / math.sqrt(100_000), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
class TestCurves:
    @pytest.fixture
    def curves(self) -> Curves:
        nan = math.nan
        return Curves([0.0, 0.1, 0.3, 0.6, 1.0], [5, 0, 1, 4], {"x": [1.0, nan, 3.0, 7.0]}, {"x": [0.1, nan, nan, 0.2]})

    def test_average_is_over_uniform_time(self, curves):
        assert curves.average("x") == pytest.approx((0.1 * 1 + 0.3 * 3 + 0.4 * 7) / 0.8)
        assert curves.average("x", 0.5, 1.0) == pytest.approx((0.1 * 3 + 0.4 * 7) / 0.5)
        assert curves.average("x", 0.65, 0.75) == pytest.approx(7)
        assert math.isnan(curves.average("x", 0.1, 0.3))
        assert math.isnan(curves.average("x", 0.4, 0.4))

    def test_average_does_not_follow_the_training_density(self, generator):
        """E over uniform t of 2 t is 1, also where most of the draws are near noise."""
        t = torch.rand(200_000, generator=generator, dtype=torch.float64) ** 3
        sums = TimestepCurves(("x",), timestep_bins(40))
        sums.update(t, x=2 * t)
        curves = sums.compute()
        assert curves.average("x") == pytest.approx(1, abs=0.01)
        assert curves.average("x", 0.0, 0.5) == pytest.approx(0.5, abs=0.02)
        assert (2 * t).mean() < 0.6

    def test_samples_that_are_no_numbers_are_not_passed_over(self):
        sums = TimestepCurves(("x",), [0.0, 0.5, 1.0])
        sums.update(torch.tensor([0.2, 0.3, 0.7, 0.8]), x=torch.tensor([1.0, 3.0, math.nan, 1.0]))
        curves = sums.compute()
        assert curves.average("x", 0.0, 0.5) == 2
        assert math.isnan(curves.average("x"))
        assert math.isnan(curves.average_sem("x"))

    def test_error_of_the_average(self, curves):
        expected = math.sqrt((0.1 * 0.1) ** 2 + (0.4 * 0.2) ** 2) / 0.5
        assert curves.average_sem("x") == pytest.approx(expected)
        assert math.isnan(curves.average_sem("x", 0.1, 0.6))

    def test_error_of_the_average_is_its_spread_over_repetitions(self, generator):
        edges, averages, errors = [0.0, 0.2, 0.7, 1.0], [], []
        for _ in range(300):
            t = torch.rand(200, generator=generator)
            sums = TimestepCurves(("x",), edges)
            sums.update(t, x=torch.bucketize(t, torch.tensor(edges[1:-1])) + torch.randn(200, generator=generator))
            averages.append(sums.compute().average("x"))
            errors.append(sums.compute().average_sem("x"))
        assert np.std(averages) == pytest.approx(np.mean(errors), rel=0.15)

    def test_coverage(self, curves):
        assert curves.coverage() == pytest.approx(0.8)
        assert TimestepCurves(("x",), [0.0, 0.5, 1.0]).compute().coverage() == 0

    def test_z_score_is_that_of_the_raw_samples(self, raw):
        curves = measured(*raw).compute()
        for name, value in zip(NAMES, raw[1:], strict=True):
            expected = value.double().sum() / value.double().square().sum().sqrt()
            assert curves.z_score(name) == pytest.approx(expected.item(), rel=1e-9)

    def test_z_score_without_samples(self):
        empty = TimestepCurves(("x",), [0.0, 0.5, 1.0]).compute()
        assert math.isnan(empty.z_score("x"))
        assert math.isnan(empty.average("x"))
        assert math.isnan(empty.average_sem("x"))

    def test_centres(self, curves):
        assert curves.centre == pytest.approx([0.05, 0.2, 0.45, 0.8])

    def test_table(self, raw, tmp_path):
        curves = measured(*raw).compute()
        columns, rows = curves.table()
        assert columns == ["t_lo", "t_hi", "count", "gap", "residual", "gap_sem", "residual_sem"]
        assert len(rows) == 5
        assert rows[1][:3] == [0.1, 0.3, curves.count[1]]
        assert rows[1][3:] == [curves.mean["gap"][1], curves.mean["residual"][1]] + [curves.sem[n][1] for n in NAMES]
        curves.write_csv(tmp_path / "curves.csv")
        with (tmp_path / "curves.csv").open() as file:
            read = list(csv.reader(file))
        assert read[0] == columns
        np.testing.assert_allclose([[float(x) for x in line] for line in read[1:]], rows, rtol=1e-15)
