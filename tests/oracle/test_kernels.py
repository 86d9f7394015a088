"""The matrix products against float64, whatever the rows are stored as and whatever precision is set globally."""

import pytest
import torch
from torch import Tensor

from fm_stages.flow import CosinePath, LinearPath, VPPath
from fm_stages.oracle import DataBank, Oracle, stream
from fm_stages.oracle.bank import NUM_EXTRA
from fm_stages.oracle.kernels import PlainProducts, Products, SplitProducts, full_precision

WAYS = [PlainProducts, SplitProducts]
STORED = ["float32", "bfloat16", "float16", "uint8"]
PIXELS = {"scale": 1 / 127.5, "shift": -1.0}


class PlainBFloat16(Products):
    """What autocast would make of the products."""

    def logits(self, rows: slice, out: Tensor) -> None:
        out.copy_(self.query.bfloat16().float() @ self.bank.table(rows).bfloat16().float().T)

    def accumulate(self, total: Tensor, weights: Tensor, rows: slice) -> None:
        total += weights.bfloat16().float() @ self.bank.table(rows).bfloat16().float()


def weighted_sum(products: Products, weights: Tensor, rows: slice) -> Tensor:
    """The second product alone, (b, D + extra)."""
    total = torch.zeros(len(weights), products.query.shape[1])
    products.accumulate(total, weights, rows)
    return total


def stored_rows(dtype: str, num: int, dims: int, generator: torch.Generator) -> Tensor:
    """Rows whose norms span three powers of ten."""
    if dtype == "uint8":
        brightest = torch.randint(1, 256, (num, 1), generator=generator)
        return (torch.rand(num, dims, generator=generator) * brightest).to(torch.uint8)
    size = 10 ** -(3 * torch.rand(num, 1, generator=generator))
    return (torch.randn(num, dims, generator=generator) * size).to(getattr(torch, dtype))


def float64_table(bank: DataBank, x: Tensor) -> Tensor:
    """Stored rows with their extra columns, in the order of an unlabelled bank, which is that of the data set."""
    seen = bank.rows(torch.arange(len(x))).flatten(1).double()
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    spread = (seen - seen.mean(0)).square().sum(1, keepdim=True)
    return torch.cat([x.double(), spread, ones, 0 * ones, 0 * ones], 1)  # every row occurs once: log counts are 0


def factors(bank: DataBank, x_t: Tensor, t: Tensor) -> Tensor:
    """What gives the logits of unconditional queries on the linear path: (a / s^2) (x_t - a mean), -a^2 / (2 s^2)."""
    a, s = t.double()[:, None], 1 - t.double()[:, None]
    direction, curvature = a / s**2 * (x_t - a * bank.mean), -(a**2) / (2 * s**2)
    return torch.cat([direction, curvature, 0 * a, 0 * a, 0 * a + 1], 1).float()


@pytest.mark.parametrize("way", WAYS)
class TestProducts:
    @pytest.fixture(params=STORED)
    def rows(self, request, generator) -> Tensor:
        return stored_rows(request.param, 500, 96, generator)

    @pytest.fixture
    def bank(self, rows) -> DataBank:
        return DataBank(rows, **(PIXELS if rows.dtype == torch.uint8 else {}))

    def test_logits(self, way, rows, bank, generator):
        """Queries of all magnitudes in one batch, and single values far above the others of theirs."""
        size = torch.logspace(-12, 12, 60)[:, None]
        query = torch.randn(60, 96 + NUM_EXTRA, generator=generator) * size
        query[::7, 5] *= 1e4
        query[3] = 0
        table, out = float64_table(bank, rows), torch.empty(60, 300)
        way(bank, query).logits(slice(150, 450), out)
        truth = query.double() @ table[150:450].T
        norms = query.double().norm(dim=1)[:, None] * table.norm(dim=1).max()
        assert ((out - truth).abs() / norms.clamp(min=1e-30)).max() < 4e-7
        bound = stream.rounding_error(query, bank) + 1e-6 * query[:, -NUM_EXTRA + 1 :].abs().sum(1)
        assert ((out - truth).abs() <= bound[:, None]).all()

    def test_weighted_sums(self, way, rows, bank, generator):
        weights = torch.exp(-40 * torch.rand(50, 300, generator=generator))
        weights[:, 7] = 1.0
        weights[0] = 1.0
        weights[1] = torch.exp(torch.tensor(-40.0))
        table = float64_table(bank, rows)[150:450]
        sums = weighted_sum(way(bank, torch.zeros(50, 96 + NUM_EXTRA)), weights, slice(150, 450))
        truth = weights.double() @ table
        assert sums.dtype == torch.float32
        # of the weights' sum, or of the weight 1 that some row of the bank has at the peak
        size = weights.double().sum(1).clamp(min=1.0)[:, None]
        assert ((sums - truth).abs() / size / table.norm(dim=1).max()).max() < 5e-7

    def test_small_weights_keep_their_digits(self, way, rows, bank, generator):
        """Those of 1e-7 of the largest, which may matter together: errors are small beside their own sum."""
        weights = torch.exp(-18 + 2 * torch.rand(20, 300, generator=generator))
        table = float64_table(bank, rows)[150:450]
        sums = weighted_sum(way(bank, torch.zeros(20, 96 + NUM_EXTRA)), weights, slice(150, 450))
        size = weights.double().sum(1)[:, None] * table.norm(dim=1).max()
        assert ((sums - weights.double() @ table).abs() / size).max() < 1e-6

    def test_one_query_and_one_row(self, way, rows, bank, generator):
        query, out = torch.randn(1, 96 + NUM_EXTRA, generator=generator), torch.empty(1, 1)
        way(bank, query).logits(slice(3, 4), out)
        assert out.item() == pytest.approx((query.double() @ float64_table(bank, rows)[3]).item(), rel=1e-5, abs=1e-4)
        total = weighted_sum(way(bank, query), torch.ones(1, 1), slice(3, 4))
        torch.testing.assert_close(total[0].double(), float64_table(bank, rows)[3], rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("size", [1e-20, 1e-6, 1e6, 1e15])
    def test_data_of_any_unit(self, way, size, generator):
        x = size * torch.randn(40, 6, generator=generator)
        bank, query = DataBank(x), torch.zeros(9, 6 + NUM_EXTRA)
        query[:, :6] = torch.randn(9, 6, generator=generator) / size
        out = torch.empty(9, 40)
        way(bank, query).logits(slice(0, 40), out)
        torch.testing.assert_close(out.double(), query[:, :6].double() @ x.double().T, rtol=0, atol=1e-5)
        total = weighted_sum(way(bank, query), torch.ones(1, 40), slice(0, 40))[:, :6]
        torch.testing.assert_close(total.double() / size, x.double().sum(0, keepdim=True) / size, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38])
    def test_queries_of_almost_nothing(self, way, size):
        """As at times that are almost 0."""
        bank, query = DataBank(torch.eye(5)), torch.full((2, 5 + NUM_EXTRA), size)
        query[1, :5] = 1.0
        out = torch.empty(2, 5)
        way(bank, query).logits(slice(0, 5), out)
        torch.testing.assert_close(out, torch.tensor([[0.0] * 5, [1.0] * 5]), rtol=0, atol=1e-6)

    def test_a_bank_of_zeros(self, way):
        bank, out = DataBank(torch.zeros(3, 4)), torch.empty(2, 1)
        way(bank, torch.ones(2, 4 + NUM_EXTRA)).logits(slice(0, 1), out)
        torch.testing.assert_close(out, 1 + 2 * torch.full((2, 1), 3.0).log())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dims", "offset"),
    [(1, 0.0), (2, 0.0), (64, 0.0), (784, 0.0), (64, 5.0)],
)
def test_the_bound_on_rounding_holds(way, dims, offset, generator):
    """Differences between float32 logits, against float64; the common part of a query's logits is no error."""
    x = torch.randn(400, dims, generator=generator) + offset
    bank, path = DataBank(x), LinearPath()
    t = torch.sigmoid(torch.linspace(-3, 12, 60))
    x_t = path.interpolate(torch.randn(60, dims, generator=generator), x[:60], t)
    query, logits = factors(bank, x_t, t), torch.empty(60, 400)
    way(bank, query).logits(slice(0, 400), logits)
    a, s = t.double()[:, None, None], 1 - t.double()[:, None, None]
    truth = -(x_t.double()[:, None] - a * x.double()).square().sum(2) / (2 * s[:, 0] ** 2)
    error = logits.double() - truth
    # rows that matter: those within reach of the best one
    for i in range(60):
        reached = truth[i] > truth[i].max() - 30
        spread = error[i][reached]
        assert spread.max() - spread.min() <= 2 * stream.rounding_error(query, bank)[i].item()


@pytest.fixture(scope="module")
def images(fashion_mnist) -> Tensor:
    return fashion_mnist[0][::15].flatten(1)


@pytest.fixture(scope="module", params=[LinearPath(), CosinePath(), VPPath()], ids=lambda p: type(p).__name__)
def asked(request, images, times, brute_force):
    path, generator = request.param, torch.Generator().manual_seed(1)
    t = torch.tensor(times).repeat(2)
    x1 = images[torch.randint(len(images), t.shape, generator=generator)]
    x_t = path.interpolate(torch.randn(x1.shape, generator=generator), x1, t)
    return path, x_t, t, brute_force(images, None, x_t, t, path)


class TestPosterior:
    """The whole posterior over 4000 of the training images, at all times, with products that are forced upon it."""

    @pytest.mark.parametrize("stored", ["float32", "uint8"])
    @pytest.mark.parametrize("tolerance", [1e-6, 0.0])
    def test_with_split_products(self, stored, tolerance, images, asked, errors_of, monkeypatch):
        path, x_t, t, truth = asked
        bank = DataBank(images) if stored == "float32" else DataBank(pixels_of(images), **PIXELS)
        monkeypatch.setattr(stream, "products", SplitProducts)
        assert (truth.top1 < 0.9).sum() > 5
        errors = errors_of(Oracle(bank, path, tolerance).posterior(x_t, t), truth, images)
        assert errors["mean"] < 1e-5
        assert max(errors[name] for name in ("top1", "variance")) < 1e-4
        assert max(errors[name] for name in ("ess", "entropy")) < 1e-3

    def test_bfloat16_products_fail(self, images, asked, errors_of, monkeypatch):
        path, x_t, t, truth = asked
        monkeypatch.setattr(stream, "products", PlainBFloat16)
        errors = errors_of(Oracle(DataBank(images), path).posterior(x_t, t), truth, images)
        assert errors["mean"] > 1e-3


def pixels_of(images: Tensor) -> Tensor:
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    assert (pixels.float() / 127.5 - 1 - images).abs().max() < 1e-6
    return pixels


class TestFullPrecision:
    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_autocast_and_global_settings_are_ignored_and_restored(
        self, digits, precision, matmul_precision, queries_of, brute_force, errors_of, monkeypatch
    ):
        x, labels = digits
        path, seen = LinearPath(), []
        x_t, t, asked = queries_of(path, x, labels, per_time=3)
        oracle = Oracle(DataBank(x, labels), path)
        mm = torch.mm

        def watch(*args, **kwargs):  # where the device has no faster product, numbers alone would show nothing
            seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
            return mm(*args, **kwargs)

        monkeypatch.setattr(torch, "mm", watch)
        matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = oracle.posterior(x_t, t, asked)
            velocity = oracle.velocity(x_t, t, asked)
            assert torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == precision
        assert set(seen) == {("highest", False)}
        errors = errors_of(posterior, brute_force(x, labels, x_t, t, path, asked), x)
        assert max(errors.values()) < 1e-5
        assert velocity.dtype == torch.float32

    def test_settings_are_restored_after_an_error(self, digits, matmul_precision, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "mm", interrupted)
        matmul_precision("high")
        with pytest.raises(KeyboardInterrupt):
            Oracle(DataBank(digits[0]), LinearPath()).posterior(digits[0][:2], torch.full((2,), 0.5))
        assert torch.get_float32_matmul_precision() == "high"

    @pytest.mark.parametrize("backend", ["cuda.matmul", "mkldnn.matmul", ""])
    def test_the_newer_settings_are_ignored_and_restored_too(self, digits, backend, monkeypatch):
        settings = torch.backends
        for name in filter(None, backend.split(".")):
            settings = getattr(settings, name)
        before = settings.fp32_precision
        try:
            settings.fp32_precision = "tf32" if backend == "cuda.matmul" else "bf16" if backend else "tf32"
            asked_for = settings.fp32_precision
            posterior = Oracle(DataBank(digits[0]), LinearPath()).posterior(digits[0][:2], torch.full((2,), 0.9))
            assert settings.fp32_precision == asked_for
        finally:
            settings.fp32_precision = before
        assert torch.equal(posterior.mean, digits[0][:2])

    def test_may_be_nested(self, matmul_precision):
        matmul_precision("medium")
        with full_precision(torch.device("cpu")), full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"

    @pytest.mark.parametrize("asked_for", [False, True])
    def test_halves_are_never_added_up_as_halves(self, asked_for):
        settings = torch.backends.cuda.matmul
        before = settings.allow_fp16_accumulation
        try:
            settings.allow_fp16_accumulation = asked_for
            with full_precision(torch.device("cpu")):
                assert not settings.allow_fp16_accumulation
            assert settings.allow_fp16_accumulation == asked_for
        finally:
            settings.allow_fp16_accumulation = before
