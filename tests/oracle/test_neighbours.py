"""Nearest rows and largest weights against numpy's float64 differences: order, copies, classes, and what is missing."""

import types

import numpy as np
import pytest
import torch
from torch import Tensor

from fm_stages.flow import LinearPath
from fm_stages.oracle import (
    DataBank,
    GaussianMixtureBank,
    MixtureOracle,
    Oracle,
    TemperedOracle,
    largest_weights,
    nearest_rows,
    neighbours,
)

PATH = LinearPath()


def distinct_of(rows: np.ndarray, labels: np.ndarray | None, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the first of each group of equal rows of a class, and how many they are."""
    own = np.arange(len(rows)) if label == -1 else np.flatnonzero(labels == label)
    _, first, count = np.unique(rows[own], axis=0, return_index=True, return_counts=True)
    return own[first], count


def true_distances(x: Tensor, queries: Tensor, labels: Tensor | None, asked: Tensor) -> list[tuple]:
    """For each query the distance to each distinct row of its class, and these rows' index, nearest first."""
    rows, found = x.double().flatten(1).numpy(), []
    for query, label in zip(queries.double().flatten(1).numpy(), asked.tolist(), strict=True):
        index, _ = distinct_of(rows, None if labels is None else labels.numpy(), label)
        distance = np.sqrt(np.square(query - rows[index]).sum(1))
        order = np.argsort(distance, kind="stable")
        found.append((distance[order], index[order]))
    return found


def true_weights(x: Tensor, x_t: Tensor, t: Tensor, labels: Tensor | None, asked: Tensor, coefficients) -> list[tuple]:
    """For each query the weight of each distinct row of its class, with multiplicity, and these rows' index."""
    rows, found = x.double().flatten(1).numpy(), []
    for query, label, a, s in zip(x_t.double().flatten(1).numpy(), asked.tolist(), *coefficients, strict=True):
        index, count = distinct_of(rows, None if labels is None else labels.numpy(), label)
        logit = -np.square(query - float(a) * rows[index]).sum(1) / (2 * float(s) ** 2) + np.log(count)
        weight = np.exp(logit - logit.max())
        order = np.argsort(-weight, kind="stable")
        found.append(((weight / weight.sum())[order], index[order]))
    return found


def assert_nearest(result: tuple[Tensor, Tensor], truth: list[tuple], num: int, exact: bool = True) -> None:
    distance, index = result
    assert distance.dtype == torch.float64
    assert index.dtype == torch.int64
    assert distance.shape == index.shape == (len(truth), num)
    for own, rows, (true_distance, true_index) in zip(distance, index, truth, strict=True):
        size = min(num, len(true_index))
        np.testing.assert_allclose(own[:size], true_distance[:size], rtol=1e-12, atol=1e-12)
        if exact:
            assert rows[:size].tolist() == true_index[:size].tolist()
        assert own[size:].tolist() == [np.inf] * (num - size)
        assert rows[size:].tolist() == [-1] * (num - size)


def assert_weights(result: tuple[Tensor, Tensor], truth: list[tuple], num: int, tol: float = 2e-5) -> None:
    """Weights are those; so are the rows, but where two weights are equal to rounding."""
    weight, index = result
    assert weight.shape == index.shape == (len(truth), num)
    for own, rows, (true_weight, true_index) in zip(weight, index, truth, strict=True):
        size = min(num, len(true_index))
        np.testing.assert_allclose(own[:size], true_weight[:size], rtol=tol, atol=1e-12)
        of_row = dict(zip(true_index.tolist(), true_weight.tolist(), strict=True))
        assert [of_row[i] for i in rows[:size].tolist()] == pytest.approx(true_weight[:size].tolist(), rel=1e-9)
        assert len(set(rows[:size].tolist())) == size
        assert own[size:].tolist() == [0] * (num - size)
        assert rows[size:].tolist() == [-1] * (num - size)


@pytest.fixture
def compared(monkeypatch) -> list[int]:
    """One entry for each query that was compared with all rows."""
    calls: list[int] = []
    among_all = neighbours._among_all

    def watch(*args, **kwargs):
        calls.append(1)
        return among_all(*args, **kwargs)

    monkeypatch.setattr(neighbours, "_among_all", watch)
    return calls


class TestNearestRows:
    @pytest.mark.parametrize("num", [1, 3, 20])
    def test_digits(self, digits, num, generator, compared):
        x, labels = digits
        queries = torch.randn(40, 1, 8, 8, generator=generator) * torch.linspace(0, 1, 40)[:, None, None, None]
        queries = queries + x[torch.randint(1797, (40,), generator=generator)]
        asked = torch.where(torch.arange(40) % 2 == 0, -1, torch.arange(40) % 10)
        result = nearest_rows(DataBank(x, labels), queries, num, asked)
        assert_nearest(result, true_distances(x, queries, labels, asked), num)
        assert not compared

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_rows_as_they_are_stored(self, dtype, generator):
        x = torch.randn(300, 30, generator=generator).to(dtype)
        queries = torch.randn(20, 30, generator=generator)
        unconditional = torch.full((20,), -1)
        assert_nearest(nearest_rows(DataBank(x), queries), true_distances(x, queries, None, unconditional), 3)

    def test_8_bit_rows_are_compared_as_the_network_sees_them(self, generator):
        x = torch.randint(0, 256, (300, 3, 4, 4), generator=generator, dtype=torch.uint8)
        seen = x.float() * (2 / 255) - 1
        queries = torch.randn(20, 3, 4, 4, generator=generator)
        result = nearest_rows(DataBank(x, scale=2 / 255, shift=-1), queries)
        assert_nearest(result, true_distances(seen, queries, None, torch.full((20,), -1)), 3)

    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_near_duplicates_are_told_apart(self, offset, generator, compared):
        """Distances that differ by 1e-7: a float32 product sees no difference, and there are more than candidates."""
        x = torch.randn(1, 50, generator=generator).repeat(200, 1) + offset
        x[:, 0] = offset + 2 + torch.arange(200)[torch.randperm(200, generator=generator)] * 1e-5 * (1 + offset)
        x = torch.cat([x, torch.randn(100, 50, generator=generator) + offset])
        queries = x[:8] + 0.01 * torch.randn(8, 50, generator=generator)
        truth = true_distances(x, queries, None, torch.full((8,), -1))
        assert min(np.diff(d[:3]).min() for d, _ in truth) < 1e-5
        assert_nearest(nearest_rows(DataBank(x), queries), truth, 3)
        assert compared

    def test_copies_are_one_row_and_go_by_the_first(self, small):
        x, labels = small
        bank = DataBank(x, labels)
        for asked in (torch.full((60,), -1), labels):
            distance, index = nearest_rows(bank, x, 3, asked)
            assert_nearest((distance, index), true_distances(x, x, labels, asked), 3)
            assert (distance[:, 0] == 0).all()
            assert (distance[:, 1] > 0.1).all()

    def test_the_first_of_an_image_under_two_labels(self):
        x = torch.tensor([[5.0], [1.0], [1.0], [5.0]])
        labels = torch.tensor([2, 1, 0, 0])
        bank = DataBank(x, labels)
        assert nearest_rows(bank, torch.tensor([[0.0]]), 3)[1].tolist() == [[1, 0, -1]]
        assert nearest_rows(bank, torch.tensor([[0.0]]), 3, torch.tensor([0]))[1].tolist() == [[2, 3, -1]]

    def test_single_row(self):
        distance, index = nearest_rows(DataBank(torch.tensor([[3.0, 4.0]])), torch.zeros(2, 2))
        assert distance.tolist() == [[5, np.inf, np.inf]] * 2
        assert index.tolist() == [[0, -1, -1]] * 2

    def test_one_value_per_row(self, generator, compared):
        x = torch.linspace(-1, 1, 1000)[torch.randperm(1000, generator=generator), None]
        queries = torch.rand(50, 1, generator=generator) * 2 - 1
        assert_nearest(nearest_rows(DataBank(x), queries), true_distances(x, queries, None, torch.full((50,), -1)), 3)

    @pytest.mark.parametrize(("queries", "rows"), [(1, 1), (3, 7), (64, 5000)])
    def test_by_pieces(self, queries, rows, small, generator, monkeypatch):
        x, labels = small
        x_t, asked = torch.randn(30, 2, 2, 2, generator=generator), torch.arange(30) % 4 - 1
        monkeypatch.setattr(neighbours, "MAX_QUERIES", queries)
        monkeypatch.setattr(neighbours, "MAX_ROWS", rows)
        monkeypatch.setattr(neighbours, "INDEX_PIECE", rows)
        result = nearest_rows(DataBank(x, labels), x_t, 4, asked)
        assert_nearest(result, true_distances(x, x_t, labels, asked), 4)

    @pytest.mark.parametrize(("block", "few"), [(1, 1), (7, 1), (7, 100), (64, 0), (64, 2)])
    @pytest.mark.parametrize("order", ["mixed", "ever nearer", "ever further"])
    def test_whichever_way_candidates_are_found(self, order, block, few, generator, monkeypatch):
        """All rows of a piece, its best blocks, or none: how many of them beat the best so far depends on the order."""
        x = torch.randn(700, 12, generator=generator) * (0.2 + torch.rand(700, 1, generator=generator))
        queries = 0.3 * torch.randn(30, 12, generator=generator)
        if order != "mixed":
            x = x[x.norm(dim=1).argsort(descending=order == "ever nearer")]
        monkeypatch.setattr(neighbours, "BLOCK", block)
        monkeypatch.setattr(neighbours, "FEW", few)
        monkeypatch.setattr(neighbours, "MAX_ROWS", 130)
        result = nearest_rows(DataBank(x), queries, 4)
        assert_nearest(result, true_distances(x, queries, None, torch.full((30,), -1)), 4)

    def test_distances_that_a_float32_product_confuses(self, generator, compared):
        """Near-duplicates, fewer than there are candidates, spread over pieces: none may be taken for far behind."""
        x = 100 + torch.randn(3000, 50, generator=generator)
        queries = x[:6] + 0.01 * torch.randn(6, 50, generator=generator)
        for i in range(6):
            x[500 * i + torch.arange(0, 440, 44)] = queries[i] + 1e-4 * torch.randn(10, 50, generator=generator)
        truth = true_distances(x, queries, None, torch.full((6,), -1))
        assert_nearest(nearest_rows(DataBank(x), queries, 3), truth, 3)
        assert not compared

    def test_lower_precision_does_not_reach_it(self, digits, generator, matmul_precision):
        x, _ = digits
        queries = x[:30] + 0.3 * torch.randn(30, 1, 8, 8, generator=generator)
        truth = true_distances(x, queries, None, torch.full((30,), -1))
        matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_nearest(nearest_rows(DataBank(x), queries), truth, 3)

    @pytest.mark.gpu
    def test_on_a_gpu(self, digits, generator):
        x, labels = digits
        queries = x[:40] + 0.3 * torch.randn(40, 1, 8, 8, generator=generator)
        asked = torch.where(torch.arange(40) % 2 == 0, -1, labels[:40])
        distance, index = nearest_rows(DataBank(x, labels).to("cuda"), queries.cuda(), 3, asked.cuda())
        assert_nearest((distance.cpu(), index.cpu()), true_distances(x, queries, labels, asked), 3)

    def test_shows_a_bar_if_asked(self, small, capsys):
        nearest_rows(DataBank(*small), small[0], progress=True)
        assert "Nearest rows: 100%" in capsys.readouterr().err
        nearest_rows(DataBank(*small), small[0])
        assert not capsys.readouterr().err

    def test_what_is_refused(self, small):
        bank, x = DataBank(*small), small[0]
        with pytest.raises(ValueError, match="num=0 must be 1 or more"):
            nearest_rows(bank, x, 0)
        with pytest.raises(ValueError, match="queries are"):
            nearest_rows(bank, x[:, :1])
        with pytest.raises(ValueError, match="row 3 of the queries holds NaN"):
            nearest_rows(bank, x.index_fill(0, torch.tensor([3]), torch.nan))
        with pytest.raises(ValueError, match="no row of the bank has label 7"):
            nearest_rows(bank, x[:1], labels=torch.tensor([7]))
        with pytest.raises(TypeError, match="tensor"):
            nearest_rows(bank, x.tolist())

    def test_a_sharded_bank_is_refused(self, small, monkeypatch):
        bank = DataBank(*small)
        monkeypatch.setattr(bank, "group", types.SimpleNamespace())
        monkeypatch.setattr(neighbours.ranks, "num_ranks", lambda group: 4)
        for ask in (lambda: nearest_rows(bank, small[0]), lambda: largest_weights(Oracle(bank, PATH), small[0], None)):
            with pytest.raises(ValueError, match="sharded over 4 ranks.*without a group"):
                ask()


class TestLargestWeights:
    def test_digits_at_all_times(self, digits, path, queries_of, path_coefficients):
        x, labels = digits
        x_t, t, asked = queries_of(path, x, labels)
        oracle = Oracle(DataBank(x, labels), path)
        result = largest_weights(oracle, x_t, t, 3, asked)
        assert_weights(result, true_weights(x, x_t, t, labels, asked, path_coefficients(path, t)[:2]), 3)
        torch.testing.assert_close(result[0][:, 0].float(), oracle.posterior(x_t, t, asked).top1, rtol=0, atol=0)

    def test_copies_and_two_labels(self, small, path, queries_of, path_coefficients):
        x, labels = small
        x_t, t, asked = queries_of(path, x, labels)
        coefficients = path_coefficients(path, t)[:2]
        oracle = Oracle(DataBank(x, labels), path)
        for own in (asked, torch.full_like(asked, -1)):
            truth = true_weights(x, x_t, t, labels, own, coefficients)
            assert_weights(largest_weights(oracle, x_t, t, 60, own), truth, 60)
        assert_weights(largest_weights(oracle, x_t, t, 5), truth, 5)

    def test_pure_noise_leaves_only_the_counts(self, small, generator):
        x, _ = small
        oracle = Oracle(DataBank(x), PATH)
        weight, index = largest_weights(oracle, torch.randn(4, 2, 2, 2, generator=generator), torch.zeros(4), 6)
        expected = torch.tensor([4, 4, 3, 2, 2, 1]) / 60  # rows 3 and 4 occur four times, 0 three times, 1 and 2 twice
        torch.testing.assert_close(weight, expected.double().expand(4, 6), rtol=1e-6, atol=0)
        assert [set(row[:2]) for row in index.tolist()] == [{3, 4}] * 4
        assert index[:, 2].tolist() == [0] * 4

    def test_pure_data_leaves_only_the_own_row(self, small, path):
        x, _ = small
        weight, index = largest_weights(Oracle(DataBank(x), path), x[:50], torch.ones(50))
        assert weight[:, 0].tolist() == [1] * 50
        assert weight[:, 1:].max() == 0
        assert index[:, 0].tolist() == list(range(50))

    def test_near_duplicates(self, generator, path_coefficients, compared):
        x = torch.randn(1, 30, generator=generator).repeat(100, 1)
        x[:, 0] = 1 + torch.arange(100) * 1e-6
        t = torch.full((20,), 1 - 1e-5)
        index = torch.randint(100, (20,), generator=generator)
        x_t = PATH.interpolate(torch.randn(20, 30, generator=generator), x[index], t)
        truth = true_weights(x, x_t, t, None, torch.full((20,), -1), path_coefficients(PATH, t)[:2])
        assert_weights(largest_weights(Oracle(DataBank(x), PATH), x_t, t), truth, 3)
        assert compared

    def test_single_row(self, path):
        t = torch.tensor([0.0, 0.5, 1.0])
        weight, index = largest_weights(Oracle(DataBank(torch.ones(1, 2)), path), torch.zeros(3, 2), t)
        assert weight.tolist() == [[1, 0, 0]] * 3
        assert index.tolist() == [[0, -1, -1]] * 3

    def test_of_a_tempered_oracle(self, digits, generator, path_coefficients):
        x, _ = digits
        t = torch.full((20,), 0.4)
        x_t = PATH.interpolate(torch.randn(20, 1, 8, 8, generator=generator), x[:20], t)
        a, s = path_coefficients(PATH, t)[:2]
        truth = true_weights(x, x_t, t, None, torch.full((20,), -1), (a, s * 2))
        assert_weights(largest_weights(TemperedOracle(DataBank(x), PATH, 4.0), x_t, t), truth, 3)

    @pytest.mark.gpu
    def test_on_a_gpu(self, digits, path, queries_of, path_coefficients):
        x, labels = digits
        x_t, t, asked = queries_of(path, x, labels)
        oracle = Oracle(DataBank(x, labels).to("cuda"), path)
        weight, index = largest_weights(oracle, x_t.cuda(), t.cuda(), 3, asked.cuda())
        truth = true_weights(x, x_t, t, labels, asked, path_coefficients(path, t)[:2])
        assert_weights((weight.cpu(), index.cpu()), truth, 3)

    def test_a_mixture_is_refused(self, generator):
        mean = torch.randn(5, 4, generator=generator)
        oracle = MixtureOracle(GaussianMixtureBank(mean, torch.ones_like(mean)), PATH)
        with pytest.raises(TypeError, match="got one of a GaussianMixtureBank"):
            largest_weights(oracle, mean, torch.zeros(5))


def test_fashion_mnist(fashion_mnist, generator, path_coefficients):
    """As the figures use it: 60 000 rows in 8 bits, around the boundary."""
    x, labels = fashion_mnist
    bank = DataBank(((x + 1) * 127.5).round().to(torch.uint8), labels, scale=2 / 255, shift=-1)
    index = torch.randint(60_000, (6,), generator=generator)
    t = torch.tensor([0.05, 0.2, 0.3, 0.35, 0.5, 0.9])
    x_t = PATH.interpolate(torch.randn(6, 1, 28, 28, generator=generator), bank.rows(index), t)
    assert bank.num_distinct == 60_000  # so the truth need not look for copies
    rows = bank.rows(torch.arange(60_000)).flatten(1)
    a, s = path_coefficients(PATH, t)[:2]

    def squares(scale: Tensor) -> np.ndarray:
        pairs = zip(x_t.double().flatten(1), scale, strict=True)
        return np.stack([(query - c * rows).square().sum(1).numpy() for query, c in pairs])

    distance, index = nearest_rows(bank, x_t)
    true = squares(torch.ones(6))
    order = np.argsort(true)[:, :3]
    assert index.tolist() == order.tolist()
    np.testing.assert_allclose(distance, np.sqrt(np.take_along_axis(true, order, 1)), rtol=1e-12)

    weight, index = largest_weights(Oracle(bank, PATH), x_t, t)
    logits = -squares(a) / (2 * s[:, None].numpy() ** 2)
    true, order = torch.softmax(torch.from_numpy(logits), 1).numpy(), np.argsort(-logits)[:, :3]
    assert index.tolist() == order.tolist()
    np.testing.assert_allclose(weight, np.take_along_axis(true, order, 1), rtol=2e-5, atol=1e-12)
