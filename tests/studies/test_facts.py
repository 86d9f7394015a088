"""Facts of small training sets, written again with numpy in float64."""

import numpy as np
import pytest
import torch

from fm_stages.oracle import DataBank
from fm_stages.studies.facts import Facts, check_distinct, effective_dims, facts_of, warnings_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def participation_ratio(rows: np.ndarray) -> float:
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    return eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
    def test_size_scale_and_defects(self, dtype):
        rows = (normal(90, 2, 3, 3) * 40 + 100).clamp(0, 255).to(dtype)
        rows[7], rows[8] = rows[3], rows[3]  # with its label, and with another one
        rows[20] = 5
        labels = torch.arange(90) % 4
        labels[50], labels[60] = 9, 7
        scale, shift = (2 / 255, -1) if dtype == torch.uint8 else (1.0, 0.0)
        facts = facts_of(DataBank(rows, labels, scale, shift))
        x = rows.double().numpy() * scale + shift
        assert (facts.num_rows, facts.num_distinct, facts.num_dims, facts.num_constant) == (90, 88, 18, 1)
        assert facts.num_classes == 6
        assert sorted(facts.single_classes) == [7, 9]
        for name, value in (("mean", x.mean()), ("std", x.std()), ("lowest", x.min()), ("highest", x.max())):
            assert getattr(facts, name) == pytest.approx(value, rel=1e-5), name

    def test_nearest_other_row_by_brute_force(self):
        rows = torch.cat([normal(120, 1, 4, 4), normal(120, 1, 4, 4)[:30]])  # copies are no other rows
        x = rows.double().flatten(1).numpy()
        distance = np.sqrt(np.square(x[:, None] - x).sum(2))
        distance[distance == 0] = np.inf
        # as torch's median: the lower of the two in the middle
        expected = np.sort(distance.min(1))[(len(x) - 1) // 2] / np.sqrt(16)
        assert facts_of(DataBank(rows)).nearest_distance == pytest.approx(expected, rel=1e-6)

    def test_effective_dims_of_a_bank_smaller_than_the_sample(self):
        scale = torch.linspace(0.2, 3, 12)
        rows = normal(1500, 12) * scale + 5
        assert facts_of(DataBank(rows)).effective_dims == pytest.approx(participation_ratio(rows.numpy()), rel=0.01)

    def test_effective_dims_are_unbiased_with_fewer_rows_than_values(self):
        variance = torch.linspace(0.1, 2, 2000, dtype=torch.float64)
        exact = (variance.sum() ** 2 / variance.square().sum()).item()
        found = effective_dims(normal(300, 2000).double() * variance.sqrt())
        assert found == pytest.approx(exact, rel=0.03)
        assert exact > 5 * 300 * 0.9  # the plain formula cannot say more than there are rows

    def test_effective_dims_are_the_mean_over_pairs(self):
        x = normal(9, 5).double().numpy()
        pairs = [np.dot(x[i], x[j]) ** 2 for i in range(9) for j in range(9) if i != j]
        expected = np.mean([np.dot(row, row) for row in x]) ** 2 / np.mean(pairs)
        assert effective_dims(torch.from_numpy(x)) == pytest.approx(expected)

    def test_one_value_per_row_is_not_constant(self):
        assert facts_of(DataBank(normal(20, 1))).num_constant == 0


@pytest.mark.parametrize("labels", [None, torch.arange(5)])
@pytest.mark.parametrize("num", [1, 5])
def test_fewer_than_two_distinct_rows_are_refused(num, labels):
    bank = DataBank(normal(1, 4).repeat(num, 1), None if labels is None else labels[:num])
    for refuses in (check_distinct, facts_of):
        with pytest.raises(ValueError, match="1 distinct: stages need at least two"):
            refuses(bank)


class TestWarnings:
    FINE = Facts(100, 100, 0, 64, 0, [], -2.0, 2.0, 0.1, 1.0, 10.0, 0.5)

    def only(self, **fields) -> str:
        (text,) = warnings_of(Facts(**{**vars(self.FINE), **fields}))
        return text

    def test_none_for_normalised_data(self):
        assert warnings_of(self.FINE) == []

    def test_copies_and_constants_are_counted(self):
        assert self.only(num_distinct=93).startswith("7 of 100 rows are copies")
        assert "3 rows are constant" in self.only(num_constant=3)

    def test_classes_of_one_sample(self):
        assert self.only(single_classes=[4]).startswith("class 4 has a single sample")
        assert self.only(single_classes=[4, 6, 8]).startswith("3 classes, 4 first, have a single sample")

    @pytest.mark.parametrize(
        "fields",
        [
            {"mean": 128.0, "std": 70.0, "lowest": 0.0, "highest": 255.0},
            {"mean": 0.3, "std": 0.35, "lowest": 0.0, "highest": 1.0},
            {"std": 5.5},
            {"std": 0.1},
            {"mean": -3.0},
        ],
    )
    def test_values_that_are_not_normalised(self, fields):
        text = self.only(**fields)
        facts = {**vars(self.FINE), **fields}
        assert f"mean {facts['mean']:.3g} and std {facts['std']:.3g}" in text
        assert "Subtract the mean and divide by the std" in text
