"""Regular loss = gap + floor: the identity sample by sample, in the mean, and broken where it has to be."""

import math

import pytest
import torch
from torch import Tensor

from fm_stages.flow import LinearPath, VPPath
from fm_stages.oracle import DataBank, Decomposition, Oracle, Wiener, decompose


def model(x_t: Tensor, t: Tensor) -> Tensor:
    """Some velocity that depends on x_t and t alone, and is neither good nor linear."""
    return torch.tanh(2 * x_t.roll(1, -1)) - t.view(-1, *[1] * (x_t.ndim - 1)) * x_t + 0.3


@pytest.fixture
def batch(digits, generator, path) -> dict[str, Tensor]:
    """Digits at times up to where the path of the design is measured."""
    x, labels = digits
    index = torch.randint(len(x), (60,), generator=generator)
    t = torch.sigmoid(torch.linspace(-6, 5, 60))
    if isinstance(path, VPPath):
        t = t.clamp(max=path.max_time)
    x0, x1 = torch.randn(60, 1, 8, 8, generator=generator), x[index]
    asked = torch.where(torch.arange(60) % 2 == 0, labels[index], -1)
    prediction = model(path.interpolate(x0, x1, t), t)
    return {"x0": x0, "x1": x1, "t": t, "prediction": prediction, "labels": asked, "index": index}


def per_value(x: Tensor) -> Tensor:
    return x.double().flatten(1).square().mean(1)


class TestColumns:
    @pytest.fixture
    def parts(self, batch, digits, path) -> Decomposition:
        bank = DataBank(*digits)
        return decompose(Oracle(bank, path), **batch, wiener=Wiener(bank, path))

    def test_one_number_per_sample(self, parts, batch):
        for name in Decomposition.__dataclass_fields__:
            column = getattr(parts, name)
            assert column.shape == (60,), name
            assert column.dtype == torch.float32, name
            assert column.isfinite().all(), name
        assert torch.equal(parts.t, batch["t"])

    def test_against_float64(self, parts, batch, digits, path, brute_force, path_coefficients):
        x0, x1, t, prediction = (batch[name].double() for name in ("x0", "x1", "t", "prediction"))
        x_t = path.interpolate(batch["x0"], batch["x1"], batch["t"])
        truth = brute_force(*digits, x_t, batch["t"], path, batch["labels"])
        alpha, sigma, scale, pull = (c.view(-1, 1, 1, 1) for c in path_coefficients(path, t))
        conditional = (scale + pull * alpha) * x1 + pull * sigma * x0
        best = conditional + scale * (truth.mean.view_as(x1) - x1)
        early = t < 0.95  # beyond, the error of float32 x_t in the truth itself is what A multiplies
        for name, expected in {
            "regular": per_value(prediction - conditional),
            "gap": per_value(prediction - best),
            "floor": truth.floor,
            "residual": 2 * ((prediction - best) * (best - conditional)).flatten(1).mean(1),
            "zero": per_value(best),
            "top1": truth.top1,
            "ess": truth.ess,
        }.items():
            torch.testing.assert_close(getattr(parts, name).double()[early], expected[early], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(parts.regular.double(), per_value(prediction - conditional), rtol=1e-5, atol=1e-5)
        assert parts.floor[~early].max() < 1e-6

    def test_identity_of_every_sample(self, parts, batch, path, digits):
        """||v - u_cond||^2 = ||v - u*||^2 + ||u* - u_cond||^2 + 2 <v - u*, u* - u_cond>, exactly."""
        x0, x1, t = batch["x0"], batch["x1"], batch["t"]
        best = Oracle(DataBank(*digits), path).target(x0, x1, t, batch["labels"])
        own = per_value(best - path.velocity(x0, x1, t))
        rest = parts.regular.double() - parts.gap.double() - own
        scale = parts.regular.double() + own  # what was subtracted
        assert ((parts.residual.double() - rest).abs() / scale).max() < 1e-6

    def test_zero_and_wiener_are_the_gaps_of_these_predictions(self, parts, batch, digits, path):
        bank = DataBank(*digits)
        oracle, reference = Oracle(bank, path), Wiener(bank, path)
        given = {name: batch[name] for name in ("x0", "x1", "t", "labels")}
        nothing = decompose(oracle, prediction=torch.zeros_like(batch["x1"]), **given)
        torch.testing.assert_close(parts.zero, nothing.gap, rtol=1e-6, atol=1e-7)
        x_t = path.interpolate(batch["x0"], batch["x1"], batch["t"])
        linear = path.velocity_from_mean(reference.mean(x_t, batch["t"]), x_t, batch["t"])
        expected = decompose(oracle, prediction=linear, **given).gap
        early = batch["t"] < 0.95
        torch.testing.assert_close(parts.wiener[early], expected[early], rtol=1e-3, atol=1e-4)

    def test_without_a_linear_reference(self, batch, digits, path):
        assert decompose(Oracle(DataBank(*digits), path), **batch).wiener.isnan().all()

    def test_a_perfect_model_has_no_gap(self, batch, digits, path):
        oracle = Oracle(DataBank(*digits), path)
        given = {name: batch[name] for name in ("x0", "x1", "t", "labels")}
        parts = decompose(oracle, prediction=oracle.target(**given), **given)
        assert parts.gap.max() < 1e-8
        assert parts.residual.abs().max() < 1e-3
        memorizing = decompose(oracle, prediction=path.velocity(batch["x0"], batch["x1"], batch["t"]), **given)
        assert memorizing.regular.max() == 0

    def test_index_stands_for_the_row(self, batch, digits, path):
        oracle = Oracle(DataBank(*digits), path)
        whole = decompose(oracle, **batch)
        rounded = decompose(oracle, **(batch | {"x1": (batch["x1"] * 0.999).bfloat16()}))
        for name in ("regular", "gap", "floor", "residual"):
            assert torch.equal(getattr(rounded, name), getattr(whole, name))

    def test_predictions_in_half_precision_are_taken_as_they_are(self, batch, digits, path):
        oracle = Oracle(DataBank(*digits), path)
        half = batch["prediction"].bfloat16()
        one = decompose(oracle, **(batch | {"prediction": half}))
        other = decompose(oracle, **(batch | {"prediction": half.float()}))
        assert torch.equal(one.gap, other.gap)
        assert one.gap.dtype == torch.float32

    def test_nothing_is_differentiated(self, batch, digits, path):
        prediction = batch["prediction"].requires_grad_()
        parts = decompose(Oracle(DataBank(*digits), path), **(batch | {"prediction": prediction}))
        assert not any(getattr(parts, name).requires_grad for name in Decomposition.__dataclass_fields__)


class TestMeans:
    """Over many draws, in two dimensions, where stages overlap."""

    NUM = 100_000

    @pytest.fixture
    def draws(self, generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows = torch.randn(40, 2, generator=generator) * torch.tensor([1.5, 0.5]) + 0.3
        labels = (rows[:, 0] > 0.3).long()
        index = torch.randint(40, (self.NUM,), generator=generator)
        x0 = torch.randn(self.NUM, 2, generator=generator)
        return rows, labels, index, x0, torch.rand(self.NUM, generator=generator) * 0.95

    @staticmethod
    def z(residual: Tensor) -> float:
        return (residual.double().sum() / residual.double().square().sum().sqrt()).item()

    @pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
    def test_regular_is_gap_plus_floor(self, draws, dropout, generator):
        rows, labels, index, x0, t = draws
        path, kept = LinearPath(), torch.rand(self.NUM, generator=generator) >= dropout
        asked = torch.where(kept, labels[index], -1)
        prediction = model(path.interpolate(x0, rows[index], t), t)
        parts = decompose(Oracle(DataBank(rows, labels), path), x0, rows[index], t, prediction, asked)
        assert abs(self.z(parts.residual)) < 4
        surplus = (parts.regular - parts.gap - parts.floor).double()
        assert abs(surplus.mean() / surplus.std()) * math.sqrt(self.NUM) < 4
        assert parts.floor.mean() > 0.1 * parts.regular.mean()

    def test_every_path(self, draws, path):
        rows, _, index, x0, t = draws
        parts = decompose(
            Oracle(DataBank(rows), path), x0, rows[index], t, model(path.interpolate(x0, rows[index], t), t)
        )
        assert abs(self.z(parts.residual)) < 4
        surplus = (parts.regular - parts.gap - parts.floor).double()
        assert abs(surplus.mean() / surplus.std()) * math.sqrt(self.NUM) < 4

    @pytest.mark.parametrize("wrong", ["half a bank", "labels", "coupling", "scale", "peeks"])
    def test_what_breaks_it_is_seen(self, draws, wrong, generator):
        rows, labels, index, x0, t = draws
        path, x1 = LinearPath(), rows[index]
        bank = DataBank(rows, labels)
        if wrong == "half a bank":
            bank = DataBank(rows[:20])
        elif wrong == "coupling":
            x0 = (x0 + x1) / math.sqrt(2)
        elif wrong == "scale":
            bank = DataBank(1.1 * rows)
        prediction = model(path.interpolate(x0, x1, t), t)
        if wrong == "labels":  # which the network sees, and of which the oracle is not told
            prediction = prediction + 0.5 * labels[index][:, None]
        elif wrong == "peeks":  # a prediction that knows more than x_t and t
            prediction = prediction + 0.1 * x1
        parts = decompose(Oracle(bank, path), x0, x1, t, prediction)
        assert abs(self.z(parts.residual)) > 5

    def test_closed_is_zero_for_the_linear_reference_and_one_for_the_oracle(self, draws):
        rows, _, index, x0, t = draws
        path, bank = LinearPath(), DataBank(rows)
        oracle, reference = Oracle(bank, path), Wiener(bank, path)
        x_t = path.interpolate(x0, rows[index], t)
        linear = path.velocity_from_mean(reference.mean(x_t, t), x_t, t)
        parts = decompose(oracle, x0, rows[index], t, linear, wiener=reference)
        assert parts.gap.mean().item() == pytest.approx(parts.wiener.mean().item(), rel=1e-3)
        assert abs(self.z(parts.residual)) < 4
        # regular losses are ordered: the oracle's is the floor, the linear one is better than nothing
        assert parts.floor.mean() < parts.regular.mean() < (parts.zero + parts.floor).mean()


class TestEdges:
    def test_the_last_times_a_sampler_draws(self, digits, path, generator):
        bank = DataBank(digits[0])
        t = torch.tensor([1 - 1e-5, path.max_time if isinstance(path, VPPath) else 1 - 2**-24])
        x0, x1 = torch.randn(2, 1, 8, 8, generator=generator), digits[0][:2]
        u_cond = path.velocity(x0, x1, t)
        parts = decompose(Oracle(bank, path), x0, x1, t, u_cond + 0.1)
        torch.testing.assert_close(parts.gap, parts.regular, rtol=1e-4, atol=0)
        assert parts.regular.tolist() == pytest.approx([0.01, 0.01], rel=0.01)
        assert parts.floor.max() < 1e-6
        assert parts.residual.abs().max() < 1e-5

    def test_at_one(self, digits, generator):
        path, x1 = LinearPath(), digits[0][:8]
        x0 = torch.randn(8, 1, 8, 8, generator=generator)
        parts = decompose(Oracle(DataBank(digits[0]), path), x0, x1, torch.ones(8), x1 - x0 + 0.1)
        torch.testing.assert_close(parts.gap, parts.regular, rtol=1e-4, atol=0)
        assert parts.floor.tolist() == [0] * 8
        assert parts.residual.isfinite().all()

    @pytest.mark.parametrize("t", [0.9, 0.999, 1 - 1e-6])
    def test_the_linear_gap_near_one(self, digits, t, generator):
        """With m - x_1 from its parts in the covariance's directions, none of which cancels."""
        path, bank, num = LinearPath(), DataBank(digits[0]), 256
        x0, x1 = torch.randn(num, 1, 8, 8, generator=generator), digits[0][:num]
        a, s = torch.tensor(t).double(), 1 - torch.tensor(t).double()
        values, vectors = torch.linalg.eigh(bank.covariance())
        noise, data = x0.double().flatten(1) @ vectors, (x1.double().flatten(1) - bank.mean) @ vectors
        spread = values.clamp(min=0) * (values > 1e-9)
        away = (a * spread * s * noise - s**2 * data) / (a**2 * spread + s**2)  # m - x_1
        u_cond = (x1 - x0).double().flatten(1)
        best = Oracle(bank, path).target(x0, x1, torch.full((num,), t)).double().flatten(1)
        truth = (u_cond + (away / s) @ vectors.T - best).square().mean(1)
        parts = decompose(Oracle(bank, path), x0, x1, torch.full((num,), t), x0, wiener=Wiener(bank, path))
        assert parts.wiener.mean().item() == pytest.approx(truth.mean().item(), rel=1e-3)

    def test_one_row(self, generator):
        path, x1 = LinearPath(), torch.ones(9, 1, 2, 2)
        x0, t = torch.randn(9, 1, 2, 2, generator=generator), torch.linspace(0, 1, 9)
        parts = decompose(Oracle(DataBank(x1[:1]), path), x0, x1, t, torch.zeros_like(x1))
        torch.testing.assert_close(parts.gap, parts.regular)
        assert parts.floor.tolist() == [0] * 9
        assert parts.residual.tolist() == [0] * 9

    @pytest.mark.parametrize("name", ["x0", "prediction"])
    def test_other_shapes_raise(self, digits, name):
        given = {key: torch.zeros(2, 1, 8, 8) for key in ("x0", "x1", "prediction")}
        given[name] = torch.zeros(2, 1, 8, 1)  # would broadcast
        with pytest.raises(ValueError, match=r"one shape: .*\(2, 1, 8, 1\)"):
            decompose(Oracle(DataBank(digits[0]), LinearPath()), t=torch.zeros(2), **given)

    def test_other_wrong_inputs_raise(self, digits):
        oracle, x = Oracle(DataBank(digits[0]), LinearPath()), torch.zeros(2, 1, 8, 8)
        with pytest.raises(ValueError, match="one time per sample"):
            decompose(oracle, x, x, torch.zeros(1), x)
        with pytest.raises(ValueError, match="times must lie"):
            decompose(oracle, x, x, torch.tensor([0.0, 1.5]), x)
        with pytest.raises(ValueError, match="no labels"):
            decompose(oracle, x, x, torch.zeros(2), x, labels=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="data are floating point.*uint8"):
            decompose(oracle, x, x.to(torch.uint8), torch.zeros(2), x)
