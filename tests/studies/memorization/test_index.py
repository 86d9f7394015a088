"""The index against its definition in float64, its fixed points, and its standard error against other seeds."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fm_stages.data import Digits
from fm_stages.flow import CosinePath, LinearPath, Path
from fm_stages.oracle import DataBank, Oracle, Wiener
from fm_stages.studies.memorization import index as module
from fm_stages.studies.memorization.index import MEMORIZER, OWN, WIENER, memorization_index
from fm_stages.studies.memorization.references import References

PATH = LinearPath()


class Few(Digits):
    """As many training images as held-out ones: T is nearly all of the training set."""

    def read(self):
        splits = super().read()
        return splits._replace(train_images=splits.train_images[:320], train_labels=splits.train_labels[:320])


@pytest.fixture(scope="module")
def references() -> References:
    return References.of(Few(batch_size=10), seed=0)


class Scaled(nn.Module):
    """A velocity that leads to a multiple of x_t."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x * (0.5 + 0.1 * labels[:, None, None, None].clamp(min=0)) * t[:, None, None, None]


class OfBank(nn.Module):
    """The oracle of a bank, as a network."""

    def __init__(self, bank, path: Path) -> None:
        super().__init__()
        self.oracle = Oracle(bank, path)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.oracle.velocity(x, t, labels)


def posterior_mean(rows: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Of queries (B, D) over rows (N, D) on the linear path, from differences in float64."""
    away = (x_t[:, None] - t[:, None, None] * rows[None]).square().sum(2)
    return torch.softmax(-away / (2 * (1 - t[:, None]) ** 2), 1) @ rows


def test_against_the_definition(references, monkeypatch):
    """(E||v - u*_H||^2 - E||v - u*_T||^2) / E||u*_H - u*_T||^2 with each term by itself, in float64, from the draws."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    draw = module._draw

    def watch(*args):
        seen.append(draw(*args))
        return seen[-1]

    monkeypatch.setattr(module, "_draw", watch)
    monkeypatch.setattr(module, "LEAST", 0.0)
    num, num_bins = 20, 6
    network = Scaled()
    curves = memorization_index(references, {"net": network}, PATH, 0.3, 0.4, None, num, num_bins, seed=2)
    x_t, t, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert 0.1 < (labels == -1).double().mean() < 0.5
    own = references.fresh_labels[:num].repeat_interleave(num_bins)
    assert ((labels == -1) | (labels == own)).all()

    flat, wide = x_t.double().flatten(1), t.double()
    means = {}
    for name, bank in (("T", references.train), ("H", references.held_out), ("all", references.whole)):
        index = torch.arange(len(bank))
        rows, of_rows = bank.rows(index).double().flatten(1), bank.labels_of(index)
        means[name] = torch.empty_like(flat)
        for label in labels.unique().tolist():
            chosen, known = labels == label, of_rows == label if label >= 0 else of_rows >= 0
            means[name][chosen] = posterior_mean(rows[known], flat[chosen], wide[chosen])
    velocity = network(x_t, t, labels).double().flatten(1)
    predicted = {"net": flat + (1 - wide[:, None]) * velocity, MEMORIZER: means["all"], OWN: means["T"]}
    bins = torch.arange(num_bins).repeat(num)
    widths = np.diff(curves.edges)
    for edge in range(num_bins):
        assert curves.edges[edge] <= wide[bins == edge].min()
        assert wide[bins == edge].max() <= curves.edges[edge + 1]
    for name, m in predicted.items():
        above = ((m - means["H"]).square() - (m - means["T"]).square()).mean(1)
        below = (means["H"] - means["T"]).square().mean(1)
        by_bin = [(above[bins == k].mean().item(), below[bins == k].mean().item()) for k in range(num_bins)]
        np.testing.assert_allclose(curves.of[name].r, [a / b for a, b in by_bin], rtol=1e-4, atol=1e-4)
        for stage, early in (("navigation", True), ("refinement", False)):
            chosen = [k for k in range(num_bins) if (curves.edges[k + 1] <= 0.4 + 1e-9) == early]
            expected = np.dot([by_bin[k][0] for k in chosen], widths[chosen])
            expected /= np.dot([by_bin[k][1] for k in chosen], widths[chosen])
            assert getattr(curves.of[name], stage) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(
        curves.difference, [math.sqrt((means["H"] - means["T"])[bins == k].square().mean()) for k in range(num_bins)],
        rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("path", [PATH, CosinePath()], ids=lambda path: type(path).__name__)
def test_fixed_points(references, path):
    """The oracle of T is at 1, that of H at -1, also as networks, whose velocities diverge as t -> 1."""
    networks = {"T": OfBank(references.train, path), "H": OfBank(references.held_out, path)}
    wiener = Wiener(references.whole, path)
    curves = memorization_index(references, networks, path, 0.1, 0.5, wiener, 32)
    assert list(curves.of) == ["T", "H", MEMORIZER, OWN, WIENER]
    for name, value, tol in (("T", 1, 1e-3), ("H", -1, 1e-3), (OWN, 1, 1e-9)):
        own = curves.of[name]
        r = np.array(own.r)[np.isfinite(own.r)]
        assert len(r) > 8
        np.testing.assert_allclose(r, value, atol=tol)
        np.testing.assert_allclose([own.navigation, own.refinement], value, atol=tol)
    memorizer, linear = curves.of[MEMORIZER], curves.of[WIENER]
    assert memorizer.navigation > 0.8  # T is nearly all of the training set
    assert memorizer.refinement > 0.8
    assert abs(linear.refinement) < 0.3


def test_bins_without_a_difference_have_no_r(references, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 0.5)
    curves = memorization_index(references, {}, PATH, 0.1, 0.5, None, 16)
    weak = np.square(curves.difference) < 0.5 * np.square(curves.difference).max()
    assert weak[0]
    assert not weak[-1]
    for own in (curves.of[MEMORIZER].r, curves.of[MEMORIZER].sem):
        assert np.isnan(own).tolist() == weak.tolist()


def test_standard_errors(generator_of):
    """With other fresh images, noise and times each time the index scatters by what it says."""

    def draw(num: int) -> Tensor:
        return torch.randn(num, 1, 2, 3, generator=generator)

    generator = generator_of(0)
    rows = draw(90)
    whole, train, held_out = DataBank(rows[:60]), DataBank(rows[:30]), DataBank(rows[60:])
    curves = []
    for seed in range(60):
        own = References(whole, train, held_out, draw(80), torch.full((80,), -1), 60, 30, 0, False)
        curves.append(memorization_index(own, {"net": Scaled()}, PATH, 1.0, 0.5, None, 80, 6, seed=seed))
    for name in ("net", MEMORIZER):
        for stage in ("navigation", "refinement"):
            scatter = np.std([getattr(each.of[name], stage) for each in curves], ddof=1)
            stated = np.mean([getattr(each.of[name], f"{stage}_sem") for each in curves])
            assert 0.7 < scatter / stated < 1.35  # the scatter of 60 is known to 9 %
        scatter = np.std([each.of[name].r for each in curves], axis=0, ddof=1)
        stated = np.mean([each.of[name].sem for each in curves], axis=0)
        reliable = np.array(curves[0].difference) > 0.5 * max(curves[0].difference)
        assert reliable.sum() >= 3
        assert ((scatter / stated)[reliable] > 0.65).all()
        assert ((scatter / stated)[reliable] < 1.45).all()


def test_without_labels_all_queries_are_unconditional(generator_of, monkeypatch):
    """A network of a data set without labels, and a label that the bank does not know, ask about all rows."""
    rows = torch.randn(60, 1, 2, 3, generator=generator_of(1))
    banks = [DataBank(rows), DataBank(rows[:20]), DataBank(torch.randn(20, 1, 2, 3, generator=generator_of(2)))]
    own = References(*banks, rows[:8] + 0.1, torch.full((8,), -1), 60, 20, 0, False)
    curves = memorization_index(own, {}, PATH, 0.0, 0.5, None, 8, 5)
    assert curves.num_queries == 8
    assert curves.of[OWN].refinement == pytest.approx(1, abs=1e-9)


@pytest.fixture
def generator_of():
    return lambda seed: torch.Generator().manual_seed(seed)
