"""What is drawn is what the oracle says: the figures' arrays, caught on their way, against its own answers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fm_stages import plots
from fm_stages.flow import CosinePath, LinearPath, euler, keyed_normal, time_grid
from fm_stages.oracle import DataBank, Oracle
from fm_stages.studies.profile.pictures import draw_pictures, integrate

PATH = LinearPath()
TIMES = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    source = load_digits()
    return torch.from_numpy(source.images / 8 - 1).float()[:, None], torch.from_numpy(source.target).long()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def drawn(monkeypatch) -> dict[str, tuple]:
    """What each figure was made of, by its name."""
    caught: dict[str, tuple] = {}
    for name in ("posterior_strips", "oracle_paths"):
        make = getattr(plots, name)

        def watch(*args, name=name, make=make):
            caught[name] = args
            return make(*args)

        monkeypatch.setattr(plots, name, watch)
    return caught


def noise(oracle: Oracle, num: int, seed: int = 0) -> Tensor:
    return keyed_normal(("pictures", seed), torch.arange(num), oracle.bank.shape)


def test_writes_two_figures(digits, tmp_path):
    oracle = Oracle(DataBank(*digits), PATH)
    paths = draw_pictures(oracle, 0.4, tmp_path / "new", num_draws=2, num_steps=10)
    assert paths == [tmp_path / "new" / "posterior.png", tmp_path / "new" / "oracle_paths.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    before = [path.read_bytes() for path in paths]
    draw_pictures(oracle, 0.4, tmp_path / "new", num_draws=2, num_steps=10)
    assert [path.read_bytes() for path in paths] == before
    draw_pictures(oracle, 0.4, tmp_path / "new", num_draws=2, num_steps=10, seed=1)
    assert not any(path.read_bytes() == old for path, old in zip(paths, before, strict=True))


def test_the_posterior_is_the_oracles(digits, drawn, tmp_path):
    x, labels = digits
    oracle = Oracle(DataBank(x, labels), PATH)
    draw_pictures(oracle, 0.4, tmp_path, num_draws=3, times=TIMES, num_steps=5)
    x_t, mean, top, weights, times = drawn["posterior_strips"][:5]
    assert times == TIMES
    rows = x[:, 0].numpy()
    of_row = {row.tobytes(): i for i, row in enumerate(rows)}
    x1 = x_t[:, -1]
    assert all(row.tobytes() in of_row for row in x1)  # a training row at t = 1
    x0 = noise(oracle, 3)[:, 0].numpy()
    for column, time in enumerate(TIMES):
        np.testing.assert_allclose(x_t[:, column], time * x1 + (1 - time) * x0, atol=1e-6)
        posterior = oracle.posterior(torch.from_numpy(x_t[:, column])[:, None], torch.full((3,), time))
        np.testing.assert_allclose(mean[:, column], posterior.mean[:, 0], atol=1e-5)
        np.testing.assert_allclose(weights[:, column, 0], posterior.top1, rtol=1e-5)
    assert all(row.tobytes() in of_row for row in top.reshape(-1, 8, 8))
    assert np.array_equal(top[:, -1, 0], x1)
    assert (np.diff(weights, axis=2) <= 0).all()


def label_of(picture: np.ndarray, x: Tensor, labels: Tensor) -> int:
    """Of the training image that this is, to the last bit."""
    return int(labels[(x[:, 0] == torch.from_numpy(picture)).flatten(1).all(1)][0])


@pytest.mark.parametrize("conditional", [False, True])
def test_the_ode_ends_on_a_training_image(digits, conditional, drawn, tmp_path):
    x, labels = digits
    oracle = Oracle(DataBank(x, labels), PATH)
    asked = torch.tensor([3, 7, -1]) if conditional else None
    draw_pictures(oracle, 0.4, tmp_path, asked, num_draws=3, times=TIMES, num_steps=50)
    states, mean, nearest, distance, times = drawn["oracle_paths"][:5]
    assert times == TIMES
    np.testing.assert_array_equal(states[:, 0], noise(oracle, 3)[:, 0])
    assert distance.max() < 1e-3 * oracle.bank.rms_norm
    np.testing.assert_allclose(states[:, -1], nearest, atol=1e-4)
    own = [x] * 3
    if conditional:
        own = [x[labels == 3], x[labels == 7], x]
        for pictures in (nearest, drawn["posterior_strips"][0][:, -1]):
            assert [label_of(picture, x, labels) for picture in pictures[:2]] == [3, 7]
    for first, rows in zip(mean[:, 0], own, strict=True):  # at t = 0 it is the mean of the class
        np.testing.assert_allclose(first, rows.mean((0, 1)), atol=1e-5)


def test_the_pieces_of_the_path_are_one_path(digits):
    oracle = Oracle(DataBank(*digits), CosinePath())
    x0, labels = noise(oracle, 2), torch.full((2,), -1)
    whole = euler(lambda x, t: oracle.velocity(x, t, labels), x0, time_grid(10))
    nodes = time_grid(10).tolist()
    pieces = integrate(oracle, x0, [nodes[0], nodes[3], nodes[7], nodes[10]], labels, 10)
    torch.testing.assert_close(pieces[-1], whole, rtol=0, atol=1e-5)
    assert torch.equal(pieces[0], x0)


def test_default_times_lie_around_the_boundary(digits, drawn, tmp_path):
    oracle = Oracle(DataBank(digits[0][:50]), PATH)
    for boundary in (0.0, 0.05, 0.4, 0.9, 1.0):
        draw_pictures(oracle, boundary, tmp_path, num_draws=1, num_steps=3)
        times = drawn["posterior_strips"][4]
        assert times == sorted(set(times))
        assert times[0] == 0
        assert times[-1] == 1
        assert boundary in times
        assert drawn["posterior_strips"][6] == drawn["oracle_paths"][6] == boundary


class TestRows:
    def shapes(self, x: Tensor, drawn: dict[str, tuple], folder, **kwargs) -> tuple:
        draw_pictures(Oracle(DataBank(x, **kwargs), PATH), 0.4, folder, num_draws=2, times=TIMES, num_steps=3)
        x_t, mean, top, weights = drawn["posterior_strips"][:4]
        states, path_mean, nearest, distance = drawn["oracle_paths"][:4]
        picture = x_t.shape[2:]
        assert x_t.shape == mean.shape == states.shape == path_mean.shape == (2, 4, *picture)
        assert top.shape == (2, 4, 3, *picture)
        assert weights.shape == (2, 4, 3)
        assert nearest.shape == (2, *picture)
        assert distance.shape == (2,)
        return picture

    def test_of_one_channel_or_none_are_grey(self, generator, drawn, tmp_path):
        assert self.shapes(torch.randn(20, 1, 4, 5, generator=generator), drawn, tmp_path) == (4, 5)
        assert self.shapes(torch.randn(20, 4, 5, generator=generator), drawn, tmp_path) == (4, 5)

    def test_of_three_channels_are_coloured(self, generator, drawn, tmp_path):
        x = torch.randn(20, 3, 4, 5, generator=generator)
        assert self.shapes(x, drawn, tmp_path) == (4, 5, 3)
        last = drawn["posterior_strips"][0][0, -1]
        assert any(np.array_equal(last, row) for row in x.movedim(1, -1).numpy())

    def test_of_8_bits_are_shown_as_the_network_sees_them(self, generator, drawn, tmp_path):
        x = torch.randint(0, 256, (20, 3, 4, 4), generator=generator, dtype=torch.uint8)
        assert self.shapes(x, drawn, tmp_path, scale=2 / 255, shift=-1) == (4, 4, 3)
        last = drawn["posterior_strips"][0][0, -1]
        assert -1 <= last.min() < -0.8 < 0.8 < last.max() <= 1

    @pytest.mark.parametrize(
        ("channels", "picture", "said"), [(4, (4, 4, 3), "first three of 4"), (2, (4, 4), "first of 2")]
    )
    def test_of_latents_are_scaled_by_channel(self, channels, picture, said, generator, drawn, tmp_path):
        scale = torch.tensor([5.0, 0.1, 1, 1])[:channels, None, None]
        x = torch.randn(500, channels, 4, 4, generator=generator) * scale + 10 * scale
        assert self.shapes(x, drawn, tmp_path) == picture
        top = drawn["posterior_strips"][2]
        assert abs(top.mean()) < 0.15
        assert top.std() == pytest.approx(1 / 2.5, rel=0.2)
        for arguments in drawn.values():
            assert f"{said} channels, mean ± 2.5 standard deviations" in arguments[5]

    @pytest.mark.parametrize("shape", [(6,), (2, 3, 4, 4)])
    def test_that_are_no_pictures(self, shape, generator, tmp_path):
        oracle = Oracle(DataBank(torch.randn(20, *shape, generator=generator)), PATH)
        with pytest.warns(UserWarning, match="No pictures: rows of shape") as told:
            assert draw_pictures(oracle, 0.4, tmp_path) == []
        assert len(told) == 1
        assert not list(tmp_path.iterdir())

    def test_of_which_there_are_fewer_than_are_shown(self, generator, drawn, tmp_path):
        self.shapes(torch.randn(1, 1, 4, 4, generator=generator), drawn, tmp_path)
        top, weights = drawn["posterior_strips"][2:4]
        assert np.isfinite(top[:, :, 0]).all()
        assert np.isnan(top[:, :, 1:]).all()
        assert weights.tolist() == [[[1, 0, 0]] * 4] * 2


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"labels": torch.tensor([1])}, "one label for each of 2 draws"),
            ({"labels": torch.tensor([1, 12])}, "no row of the bank has label 12"),
            ({"times": [0.2, 0.1]}, "times increase"),
            ({"times": [0.2, 1.1]}, "times increase"),
            ({"times": []}, "times increase"),
        ],
    )
    def test_are_refused(self, arguments, message, digits, tmp_path):
        with pytest.raises(ValueError, match=message):
            draw_pictures(Oracle(DataBank(*digits), PATH), 0.4, tmp_path, num_draws=2, **arguments)
