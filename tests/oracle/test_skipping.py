"""Queries that need no pass: distances, certificates, and what comes of them, against float64."""

import math

import pytest
import torch
from torch import Tensor

from fm_stages.flow import LinearPath, Path, VPPath
from fm_stages.oracle import DataBank, Oracle, skipping, stream
from fm_stages.oracle.skipping import certified, measure_nearest

PATH = LinearPath()


def true_nearest(x: Tensor) -> Tensor:
    """Distance to the nearest other row, from the differences, in float64: (N,)."""
    flat = x.double().flatten(1)
    distance = torch.stack([(flat - row).norm(dim=1) for row in flat])
    return distance.fill_diagonal_(math.inf).amin(1)


def mass_of_others(x: Tensor, x_t: Tensor, t: Tensor, index: Tensor, path: Path, coefficients) -> Tensor:
    """Posterior mass (B,) on rows whose values differ from those of the row ``index``, by the definition."""
    flat, (alpha, sigma, _, _) = x.double().flatten(1), coefficients(path, t)
    other = {i: (flat != flat[i]).any(1) for i in index.unique().tolist()}
    mass = []
    for query, a, s, i in zip(x_t.double().flatten(1), alpha, sigma, index.tolist(), strict=True):
        weight = torch.softmax(-(query - a * flat).square().sum(1) / (2 * s**2), 0)
        mass.append(weight[other[i]].sum())
    return torch.stack(mass)


def measured(x: Tensor, labels: Tensor | None = None, **kwargs) -> DataBank:
    bank = DataBank(x, labels, **kwargs)
    measure_nearest(bank)
    return bank


def certificates(bank: DataBank, x_t: Tensor, t: Tensor, index: Tensor, coefficients, tol=1e-6, path=PATH) -> Tensor:
    alpha, sigma = (c[:, None] for c in coefficients(path, t)[:2])
    return certified(bank, x_t.flatten(1), bank.rows(index).flatten(1), alpha, sigma, index, tol)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many queries each pass over the bank took."""
    sizes: list[int] = []
    start = stream.Stream.__init__

    def watch(self, bank, query, *args, **kwargs):
        sizes.append(len(query))
        start(self, bank, query, *args, **kwargs)

    monkeypatch.setattr(stream.Stream, "__init__", watch)
    return sizes


class TestNearest:
    @pytest.mark.parametrize("dims", [1, 2, 30, 784])
    @pytest.mark.parametrize("offset", [0.0, 10.0])
    def test_is_close_below_the_true_distance(self, dims, offset, generator):
        x = torch.randn(300, dims, generator=generator) + offset
        bank, truth = measured(x), true_nearest(x)
        assert bank.nearest.shape == (300,)
        assert (bank.nearest <= truth * (1 + 1e-6)).all()
        # rounding errors of squared norms are taken off: 2e-6 of them
        lost = truth**2 - bank.nearest.double() ** 2
        assert (lost <= 2e-5 * bank.max_norm * (x - x.mean(0)).norm(dim=1).max()).all()

    def test_of_images(self, digits):
        x, labels = digits
        bank, truth = measured(x, labels), true_nearest(x)
        assert (bank.nearest <= truth * (1 + 1e-6)).all()
        assert (bank.nearest >= truth - 1e-3).all()

    @pytest.mark.parametrize(("queries", "rows"), [(1, 1), (7, 50), (64, 7), (5000, 5000)])
    def test_by_pieces(self, queries, rows, generator, monkeypatch):
        x = torch.randn(90, 4, generator=generator)
        whole = measured(x).nearest
        monkeypatch.setattr(skipping, "QUERIES", queries)
        monkeypatch.setattr(skipping, "ROWS", rows)
        torch.testing.assert_close(measured(x).nearest, whole, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("labelled", [False, True])
    def test_copies_of_an_image_are_no_other_image(self, labelled, generator):
        """Under the same label; they have the values of the first."""
        x = torch.randn(40, 6, generator=generator)
        rows, labels = torch.cat([x, x[:10], x[:3]]), torch.arange(40) % 3
        bank = measured(rows, torch.cat([labels, labels[:10], labels[:3]]) if labelled else None)
        truth = true_nearest(x)
        truth = torch.cat([truth, truth[:10], truth[:3]])
        assert (bank.nearest <= truth * (1 + 1e-6)).all()
        assert (bank.nearest >= truth - 1e-3).all()

    def test_an_image_under_two_labels_has_zero(self, generator):
        x = torch.randn(40, 6, generator=generator)
        bank = measured(torch.cat([x, x[:5]]), torch.cat([torch.zeros(40), torch.ones(5)]).long())
        doubled = torch.cat([torch.arange(5), torch.arange(40, 45)])
        assert bank.nearest[doubled].max() <= 1e-3
        assert bank.nearest[5:40].min() > 0.1

    def test_labels_play_no_part(self, generator):
        x = torch.randn(50, 6, generator=generator)
        torch.testing.assert_close(
            measured(x, torch.arange(50) % 7).nearest, measured(x).nearest, rtol=0, atol=1e-4
        )  # rows are in another order: other rounding

    def test_of_flips(self, generator):
        """As rows of their own; a symmetric image is a copy of itself, an almost symmetric one has its flip nearby."""
        x = torch.randn(30, 1, 4, 4, generator=generator)
        x[0, 0, :, 2:] = x[0, 0, :, :2].flip(-1)
        x[1, 0, :, 2:] = x[1, 0, :, :2].flip(-1)
        x[1, 0, 0, 0] += 0.1
        rows = torch.cat([x, x.flip(-1)])
        bank = measured(rows)
        assert bank.nearest[0] > 0.5
        assert bank.nearest[30] == bank.nearest[0]
        assert bank.nearest[[1, 31]].tolist() == pytest.approx([0.1 * math.sqrt(2)] * 2, abs=1e-3)
        torch.testing.assert_close(bank.nearest[:30], bank.nearest[30:], rtol=0, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16])
    def test_is_measured_between_what_the_network_sees(self, dtype, generator):
        x = (255 * torch.rand(60, 3, 4, generator=generator)).to(dtype)
        scale, shift = torch.tensor([0.01, 0.5, 0.002])[:, None], torch.tensor([-1.0, 20.0, 3.0])[:, None]
        bank, truth = measured(x, scale=scale, shift=shift), true_nearest(x.float() * scale + shift)
        assert (bank.nearest <= truth * (1 + 1e-6)).all()
        assert (bank.nearest >= truth - 0.02 * truth.max()).all()

    @pytest.mark.parametrize("copies", [1, 3])
    def test_without_another_row_it_is_infinite(self, copies, path_coefficients, generator):
        x = torch.randn(1, 5, generator=generator).expand(copies, 5)
        bank = measured(x)
        assert bank.nearest.tolist() == [math.inf] * copies
        index, t = torch.zeros(9).long(), torch.linspace(0, 1, 9)
        x0 = torch.randn(9, 5, generator=generator)
        x_t = PATH.interpolate(x0, x[index], t)
        assert certificates(bank, x_t[1:-1], t[1:-1], index[1:-1], path_coefficients).all()
        posterior = Oracle(bank, PATH).posterior(x_t, t, index=index)
        assert torch.equal(posterior.mean, x[index])
        assert posterior.top1.tolist() == [1] * 9
        target = Oracle(bank, PATH).target(x0, x[index], t, index=index)
        torch.testing.assert_close(target, PATH.velocity(x0, x[index], t))

    def test_moves_with_the_bank(self, generator):
        bank = measured(torch.randn(5, 3, generator=generator)).to("meta")
        assert bank.nearest.device.type == "meta"


class TestCertificate:
    """`certified` promises that other rows hold less than the tolerance."""

    @pytest.mark.parametrize("kind", ["scattered", "clusters", "near duplicates", "grid", "copies"])
    @pytest.mark.parametrize("dims", [1, 2, 8, 100])
    @pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
    def test_is_sound(self, kind, dims, tolerance, path, path_coefficients, generator):
        x = torch.randn(60, dims, generator=generator)
        if kind == "clusters":
            x = x[:6].repeat_interleave(10, 0) + 0.05 * torch.randn(60, dims, generator=generator)
        elif kind == "near duplicates":
            x = torch.cat([x[:30], x[:30] + 1e-2])
        elif kind == "grid":
            x = x.round() + torch.arange(60)[:, None]
        elif kind == "copies":
            x = torch.cat([x[:30], x[:10], x[:10], x[:10]])
        bank, num = measured(x), 400
        index = torch.randint(60, (num,), generator=generator)
        t = (1 - torch.logspace(-0.3, -4.5, num)).clamp(max=path.max_time)
        x_t = path.interpolate(torch.randn(num, dims, generator=generator), x[index], t)
        sure = certificates(bank, x_t, t, index, path_coefficients, tolerance, path)
        assert sure.sum() < num
        # this path's last sigma is 1e-3, and in few dimensions rows come close
        assert sure.sum() > 20 or (isinstance(path, VPPath) and dims <= 2)
        mass = mass_of_others(x, x_t, t, index, path, path_coefficients)
        assert (mass[sure] < tolerance).all()

    @pytest.mark.parametrize(("dims", "length"), [(2, 3.0), (2, 7.0), (300, 7.0)])
    @pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
    def test_is_sound_for_the_worst_noise(self, dims, length, tolerance, path_coefficients):
        """Noise that points at all other rows, which lie in one place. It is certified as soon as it may be."""
        num = 300
        x = torch.zeros(num, dims)
        x[1:, 0] = 1.0
        x[1:, 1] = 1e-5 * torch.arange(num - 1)
        bank, x0 = measured(x), torch.zeros(1, dims)
        x0[0, 0] = length
        if dims > 2:
            x0[0, 2:] = 1.0  # beside the direction that matters: ||x0|| = 19, and only 7 of it count
        t = 1 - torch.logspace(-0.3, -3, 3000 if dims == 2 else 300)
        index = torch.zeros(len(t)).long()
        x_t = PATH.interpolate(x0.expand(len(t), dims), x[index], t)
        sure = certificates(bank, x_t, t, index, path_coefficients, tolerance)
        mass = mass_of_others(x, x_t, t, index, PATH, path_coefficients)
        assert sure.any()
        assert (mass[sure] < tolerance).all()
        assert not mass[~sure].max() < 0.3  # the same noise is not always harmless
        if dims == 2:
            # the deterministic bound, and nothing is left to chance: no query that is held back for nothing
            assert mass[sure].max() > 0.7 * tolerance
            assert (mass[~sure] > 0.7 * tolerance).all()

    def test_noise_in_few_dimensions_counts_with_its_length(self, path_coefficients):
        """The deterministic bound: with the same row and time, short noise is certified and long noise is not."""
        x = torch.tensor([[0.0], [1.0]])
        bank, t = measured(x), torch.full((2,), 0.88)
        x_t = PATH.interpolate(torch.tensor([[0.1], [-7.0]]), x[[0, 0]], t)
        assert certificates(bank, x_t, t, torch.zeros(2).long(), path_coefficients).tolist() == [True, False]

    def test_more_tolerance_certifies_more(self, digits, path_coefficients, generator):
        x = digits[0]
        bank, t = measured(x), torch.linspace(0.5, 0.95, 500)
        index = torch.randint(len(x), t.shape, generator=generator)
        x_t = PATH.interpolate(torch.randn(500, 1, 8, 8, generator=generator), x[index], t)
        many, few = (certificates(bank, x_t, t, index, path_coefficients, tol) for tol in (1e-3, 1e-9))
        assert (many >= few).all()
        assert many.sum() > few.sum() > 0

    def test_an_image_under_two_labels_is_never_certain(self, path_coefficients, generator):
        x = torch.randn(20, 30, generator=generator)
        bank = measured(torch.cat([x, x[:1]]), torch.tensor([0] * 20 + [1]))
        t, index = torch.full((3,), 0.99), torch.tensor([0, 20, 1])
        x_t = PATH.interpolate(torch.randn(3, 30, generator=generator), bank.rows(index), t)
        assert certificates(bank, x_t, t, index, path_coefficients).tolist() == [False, False, True]


class TestPosterior:
    @pytest.fixture
    def setting(self, digits, path, generator):
        """Training queries of all times, of mixed labels."""
        x, labels = digits
        bank, num = measured(x, labels), 200
        t = torch.cat([torch.linspace(0, 0.95, 160), 1 - torch.logspace(-1.3, -5, 40)])
        index = torch.randint(len(x), (num,), generator=generator)
        x0 = torch.randn(num, 1, 8, 8, generator=generator)
        asked = torch.where(torch.arange(num) % 2 == 0, labels[index], -1)
        return bank, x0, x[index], t, asked, index

    def test_equals_the_one_without(self, setting, path, brute_force, digits, errors_of, passes):
        bank, x0, x1, t, asked, index = setting
        x_t, oracle = path.interpolate(x0, x1, t), Oracle(bank, path)
        skipped = oracle.posterior(x_t, t, asked, index)
        streamed = sum(passes)
        passes.clear()
        whole = oracle.posterior(x_t, t, asked)
        assert sum(passes) == 200
        assert 50 < streamed < 180
        truth = brute_force(*digits, x_t, t, path, asked)
        for posterior in (skipped, whole):
            assert max(errors_of(posterior, truth, digits[0]).values()) < 2e-5

    def test_targets_equal_those_without(self, setting, path, brute_force_target, digits):
        bank, x0, x1, t, _, index = setting
        t = t.clamp(max=path.max_time)
        oracle = Oracle(bank, path)
        skipped, whole = oracle.target(x0, x1, t, index=index), oracle.target(x0, x1, t)
        truth, conditional = brute_force_target(digits[0], x0, x1, t, path)
        size = conditional.norm(dim=1)
        for target in (skipped, whole):
            assert ((target.double().flatten(1) - truth).norm(dim=1) / size).max() < 2e-5

    def test_at_the_end_the_target_is_the_conditional_one(self, setting, path, brute_force_target, digits):
        bank, x0, x1, _, _, index = setting
        t = torch.full((200,), 1 - 1e-5)
        target = Oracle(bank, path).target(x0, x1, t, index=index)
        truth, conditional = brute_force_target(digits[0], x0, x1, t, path)
        assert (truth - conditional).abs().max() < 1e-9
        torch.testing.assert_close(target.double().flatten(1), conditional, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
    def test_targets_of_the_worst_noise(self, tolerance, brute_force_target):
        """Just after all other mass may be left out, the velocity is off by at most tolerance e / t."""
        x, num = torch.zeros(500, 2), 3000
        x[1:, 0] = 1.0
        x[1:, 1] = 1e-5 * torch.arange(499)
        bank, t = measured(x), 1 - torch.logspace(-0.5, -3, num)
        x0, index = torch.tensor([[3.0, 0.0]]).expand(num, 2), torch.zeros(num).long()
        target = Oracle(bank, PATH, tolerance).target(x0, x[index], t, index=index)
        truth, _ = brute_force_target(x, x0, x[index], t, PATH)
        error = (target.double() - truth).norm(dim=1)
        e = t / (1 - t)  # a d / s
        late = e > 3 + math.sqrt(9 + 2 * math.log(500 / tolerance)) - 0.1
        assert (error <= tolerance * e / t + 2e-4 * (~late) + 1e-6 * x0.norm(dim=1)).all()
        assert error[late].max() > 0.5 * tolerance * e[late].min()

    def test_is_not_used_without_an_index(self, setting, path, passes):
        bank, x0, x1, t, asked, _ = setting
        Oracle(bank, path).posterior(path.interpolate(x0, x1, t), t, asked)
        assert sum(passes) == 200

    def test_is_not_used_without_distances(self, setting, path, digits, passes):
        _, x0, x1, t, asked, index = setting
        Oracle(DataBank(*digits), path).posterior(path.interpolate(x0, x1, t), t, asked, index)
        assert sum(passes) == 200

    def test_is_not_used_without_tolerance(self, setting, path, passes):
        bank, x0, x1, t, asked, index = setting
        Oracle(bank, path, tolerance=0).posterior(path.interpolate(x0, x1, t), t, asked, index)
        assert sum(passes) == 200

    def test_that_needs_no_pass_at_all(self, setting, path, passes):
        bank, x0, x1, _, asked, index = setting
        t = torch.full((200,), 1 - 1e-5)
        posterior = Oracle(bank, path).posterior(path.interpolate(x0, x1, t), t, asked, index)
        assert sum(passes) == 0
        assert torch.equal(posterior.mean, x1)
        assert posterior.top1.tolist() == posterior.ess.tolist() == [1] * 200
        assert posterior.entropy.tolist() == posterior.variance.tolist() == [0] * 200


def test_certificates_start_where_the_docstring_says(fashion_mnist, path_coefficients, generator):
    """Half of the training images at t = 0.73; by the length of the noise alone it would be 0.89."""
    x, _ = fashion_mnist
    index = torch.randint(60_000, (64,), generator=generator)
    flat = x.flatten(1) - x.flatten(1).mean(0)
    chosen = flat[index].double()
    squares = torch.cat(
        [
            (chosen.square().sum(1)[:, None] + p.square().sum(1) - 2 * chosen @ p.T)
            for p in (piece.double() for piece in flat.split(6000))
        ],
        1,
    )
    squares[torch.arange(64), index] = math.inf
    bank = DataBank(x[index])
    bank.nearest, bank.num_rows = squares.amin(1).sqrt().float(), 60_000  # as if the others were there
    own = torch.arange(64)
    x0 = torch.randn(64, 1, 28, 28, generator=generator)

    def share(t: float) -> float:
        times = torch.full((64,), t)
        x_t = PATH.interpolate(x0, x[index], times)
        return certificates(bank, x_t, times, own, path_coefficients).float().mean().item()

    assert share(0.45) < 0.1
    assert share(0.70) < 0.5 < share(0.76)
    assert share(0.89) > 0.95
