"""Copies, near copies and duplicates among samples: found by brute force in float64, and planted ones counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fm_stages.data import Digits
from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank, Wiener
from fm_stages.studies.memorization.calibration import draw_calibration
from fm_stages.studies.memorization.measure import Share, measure, nearest_sources
from fm_stages.studies.memorization.references import source_of
from fm_stages.studies.memorization.study import NotMeasured, References, study_memorization
from fm_stages.studies.models import load_trained
from fm_stages.studies.ranks import Job
from tests.studies.memorization import memorization_on_ranks as on_ranks


def true_distances(images: Tensor, rows: Tensor) -> Tensor:
    """Root mean squares (n, N) of differences, in float64."""
    away = images.double().flatten(1)[:, None] - rows.double().flatten(1)[None]
    return away.square().mean(2).sqrt()


@pytest.fixture(scope="module")
def data() -> Digits:
    data = Digits()
    data.setup()
    return data


@pytest.fixture(scope="module")
def references(data) -> References:
    return References.of(data, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_checkpoint):
    return load_trained(write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints/last.ckpt"))


class TestReferences:
    def test_three_disjoint_sets_two_of_them_equal(self, data, references):
        held_out = data.val_dataloader().dataset
        every = held_out[torch.arange(len(held_out)), torch.arange(len(held_out))]
        known = {
            tuple(row): label
            for row, label in zip(every["x1"].flatten(1).tolist(), every["labels"].tolist(), strict=True)
        }
        training = {tuple(row) for row in references.whole.rows(torch.arange(data.num_train)).flatten(1).tolist()}
        own = [tuple(row) for row in references.held_out.rows(torch.arange(references.num_each)).flatten(1).tolist()]
        fresh = [tuple(row) for row in references.fresh.flatten(1).tolist()]
        t = [tuple(row) for row in references.train.rows(torch.arange(references.num_each)).flatten(1).tolist()]
        assert set(t) <= training
        assert set(own) | set(fresh) <= set(known)
        assert not set(own) & set(fresh)
        assert len(references.train) == len(references.held_out) == references.num_each
        assert references.train.label_counts == references.held_out.label_counts
        assert [known[row] for row in fresh] == references.fresh_labels.tolist()
        assert references.num_each + len(fresh) + references.num_left_out == data.num_val
        assert references.num_left_out == 0  # of every class there are more training images

    def test_drawn_by_the_seed(self, data, references):
        again, other = References.of(data, seed=1), References.of(data, seed=2)
        index = torch.arange(references.num_each)
        assert torch.equal(again.train.rows(index), references.train.rows(index))
        assert torch.equal(again.fresh, references.fresh)
        assert not torch.equal(other.train.rows(index), references.train.rows(index))
        assert not torch.equal(other.fresh, references.fresh)

    def test_a_small_training_set_makes_small_banks(self):
        """Held-out images without a partner are left out, and counted; so are those of classes never trained on."""

        class Few(Digits):
            def read(self):
                splits = super().read()
                chosen = (splits.train_labels != 7).nonzero()[:30, 0]
                return splits._replace(
                    train_images=splits.train_images[chosen], train_labels=splits.train_labels[chosen]
                )

        references = References.of(Few(batch_size=10))
        assert references.num_train == references.num_each == 30
        assert references.train.label_counts == references.held_out.label_counts
        assert 7 not in references.train.label_counts
        assert 7 not in references.fresh_labels
        assert references.num_left_out > 200

    def test_flips_in_all_banks_but_not_among_the_fresh(self):
        data = Digits(flip=True)
        references = References.of(data)
        assert references.flips
        for bank in (references.train, references.held_out):
            assert len(bank) == 2 * references.num_each
            index = torch.arange(references.num_each)
            assert torch.equal(bank.rows(index).flip(-1), bank.rows(index + references.num_each))
        assert len(references.fresh) < data.num_val / 4

    def test_too_few_held_out_images(self, data, monkeypatch):
        monkeypatch.setattr("fm_stages.studies.memorization.references.MIN_HELD_OUT", data.num_val + 1)
        with pytest.raises(NotMeasured, match=f"{data.num_val} held-out images are too few.*hold out more"):
            References.of(data)


class TestNearest:
    def test_against_brute_force(self, references, generator_of):
        images = references.fresh[:40] + 0.2 * torch.randn(40, 1, 8, 8, generator=generator_of(0))
        images = torch.cat([images, images[:2], images[:1] + 1e-3, references.whole.rows(torch.arange(3))])
        found = measure(references, images, torch.arange(len(images)), False, Job())
        rows = references.whole.rows(torch.arange(len(references.whole))).flatten(1).unique(dim=0)
        near = true_distances(images, rows).sort(dim=1).values
        np.testing.assert_allclose(found.nearest, near[:, 0], atol=1e-12)
        np.testing.assert_allclose(found.second, near[:, 1], atol=1e-12)
        np.testing.assert_allclose(found.ratio, near[:, 0] / near[:, 1], atol=1e-10)
        for name, bank in (("train", references.train), ("held_out", references.held_out)):
            near = true_distances(images, bank.rows(torch.arange(len(bank)))).min(1).values
            np.testing.assert_allclose(getattr(found, name), near, atol=1e-12)
        among = true_distances(images, images)
        np.testing.assert_allclose(found.other, torch.where(among == 0, torch.inf, among).min(1).values, atol=1e-12)
        assert found.equal.tolist() == (among == 0).sum(1).tolist()
        assert found.equal[[0, 1, 40, 41]].tolist() == [2] * 4
        assert found.duplicate[[0, 1, 40, 41, 42]].all()
        assert found.copied[-3:].all()
        assert found.nearest[-3:].tolist() == [0] * 3
        assert found.index.tolist() == list(range(len(images)))

    def test_the_flip_of_the_nearest_is_no_second(self):
        """Row 2 is the flip of row 0 and nearly the same: the second nearest is row 1."""
        images = torch.tensor([[[[0.0, 0.1]]], [[[1.0, 1.0]]], [[[3.0, -3.0]]]])
        bank = DataBank(torch.cat([images, images.flip(-1)]))
        distance, row = nearest_sources(bank, torch.tensor([[[[0.0, 0.08]]]]), flip=True)
        assert row.tolist() == [[0, 1]]
        assert nearest_sources(bank, torch.tensor([[[[0.0, 0.08]]]]), flip=False)[1].tolist() == [[0, 3]]
        expected = [0.02 / 2**0.5, ((1 + 0.92**2) / 2) ** 0.5]
        np.testing.assert_allclose(distance[0], expected, rtol=1e-6)

    def test_an_image_that_is_there_as_another_ones_flip(self):
        image = torch.tensor([[[[0.0, 0.1]]]])
        images = torch.cat([image, image.flip(-1), image + 1])
        bank = DataBank(torch.cat([images, images.flip(-1)]))
        assert source_of(bank, torch.tensor([0, 1, 2, -1]), True).unique().tolist()[0] == -1
        assert nearest_sources(bank, image, True)[1].tolist()[0][1] in (2, 5)

    def test_one_source_has_no_second(self):
        image = torch.tensor([[[[0.0, 0.1]]]])
        distance, row = nearest_sources(DataBank(torch.cat([image, image.flip(-1)])), image, flip=True)
        assert distance.tolist() == [[0, np.inf]]
        assert row.tolist() == [[0, -1]]


@pytest.fixture
def generator_of():
    return lambda seed: torch.Generator().manual_seed(seed)


def planted(references: References, share: float, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Fresh images of which a share are replaced by noisy training images; and which these are."""
    generator = torch.Generator().manual_seed(seed)
    images = references.fresh.clone()
    chosen = torch.randperm(len(images), generator=generator)[: round(share * len(images))]
    rows = torch.randperm(len(references.whole), generator=generator)[: len(chosen)]
    copies = references.whole.rows(rows)
    images[chosen] = copies + noise * torch.randn(copies.shape, generator=generator)
    return images, torch.zeros(len(images), dtype=torch.bool).index_fill(0, chosen, True)


class TestPlanted:
    def test_one_in_twenty(self, references):
        """Fresh real images hardly count as copies, so that planted ones raise the rate by their share."""
        images, _ = planted(references, 0.05, 0.0, 0)
        index = torch.arange(len(images))
        before = measure(references, references.fresh, index, False, Job()).copied.double().mean()
        after = measure(references, images, index, False, Job()).copied.double().mean()
        assert before < 0.01
        assert abs(after - 0.05) < 0.01

    @pytest.mark.parametrize(("noise", "least", "most"), [(0.02, 0.99, 1.0), (0.05, 0.97, 1.0), (0.5, 0.0, 0.2)])
    def test_noisy_copies(self, references, noise, least, most):
        """Noise below a third of the distance between digits (0.33 in the median) is found; more hides a copy."""
        images, copies = planted(references, 1.0, noise, 1)
        found = measure(references, images, torch.arange(len(images)), False, Job())
        assert least <= found.copied[copies].double().mean() <= most

    def test_copies_lie_nearer_to_training(self, references):
        rows = references.train.rows(torch.arange(50)) + 0.1
        found = measure(references, rows, torch.arange(50), False, Job())
        assert (found.train < found.held_out).double().mean() > 0.95


def test_the_interval_of_a_share():
    share = Share.of(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    # Newcombe (1998), Wilson's score interval for 1 of 10
    assert (share.value, round(share.low, 4), round(share.high, 4)) == (0.1, 0.0179, 0.4042)
    assert Share.of(torch.ones(20)).high == 1.0
    assert Share.of(torch.zeros(20)).low == 0.0
    assert Share.of(torch.zeros(20)).high == pytest.approx(0.1611, abs=1e-4)


class TestCalibration:
    def test_one_ends_on_training_images_and_the_other_does_not(self, references):
        path = LinearPath()
        index = torch.arange(24)
        wiener = Wiener(references.whole, path)
        drawn = draw_calibration(references.whole, path, wiener, index, 24, 0, 30)
        copied = {name: measure(references, x, index, False, Job()).copied for name, x in drawn.items()}
        assert copied["memorizer"].all()
        assert not copied["wiener"].any()
        flat = drawn["wiener"].double().flatten(1)
        assert abs(flat.mean() - references.whole.mean.mean()) < 0.1
        part = draw_calibration(references.whole, path, wiener, index[5:9], 24, 0, 30)
        torch.testing.assert_close(part["wiener"], drawn["wiener"][5:9], rtol=0, atol=1e-5)
        assert draw_calibration(references.whole, path, None, index[:0], 24, 0, 30)["memorizer"].shape == (0, 1, 8, 8)


@pytest.fixture(scope="module")
def found(trained, references, tmp_path_factory):
    out = tmp_path_factory.mktemp("memorization")
    trained.data.setup()
    images, _ = planted(References.of(trained.data, seed=0), 0.25, 0.01, 0)
    result = study_memorization(
        images, trained.data, trained.module, {"EMA weights": trained.network}, out,
        num_calibration=16, num_steps=10, num_queries=8, progress=False,
    )  # fmt: skip
    return result, out, images


class TestStudy:
    def test_files(self, found):
        result, out, images = found
        names = {"closest.png", "memorization_index.png", "memorization.json", "memorization.csv"}
        assert {path.name for path in out.iterdir()} == names
        assert json.loads((out / "memorization.json").read_text()) == json.loads(json.dumps(result.plain()))
        lines = (out / "memorization.csv").read_text().splitlines()
        assert len(lines) == 1 + len(images)
        assert lines[0].startswith("image,nearest_training,second_training,ratio,copy")

    def test_numbers(self, found):
        result, _, images = found
        assert list(result.summaries) == ["samples", "memorizer", "wiener", "fresh"]
        summaries = result.summaries
        assert summaries["memorizer"].copies.value == 1
        assert summaries["wiener"].copies.value == summaries["fresh"].copies.value == 0
        assert abs(summaries["samples"].copies.value - 0.25) < 0.02
        assert (summaries["samples"].num, summaries["memorizer"].num) == (len(images), 16)
        text = result.text()
        for word in ("samples", "memorizer", "Wiener", "fresh images", "copies", "EMA weights", "memorization index"):
            assert word in text
        assert max(map(len, text.splitlines())) <= 120

    def test_without_a_network(self, data, references):
        result = study_memorization(references.fresh[:10], data, num_calibration=4, num_steps=4, progress=False)
        assert result.index is None
        assert result.plain()["index"] is None
        assert "memorization index" not in result.text()

    def test_without_a_wiener(self, data, references, monkeypatch):
        monkeypatch.setattr("fm_stages.oracle.wiener.MAX_DIMS", 10)
        result = study_memorization(references.fresh[:10], data, num_calibration=4, num_steps=4, progress=False)
        assert list(result.summaries) == ["samples", "memorizer", "fresh"]
        assert "There is no Wiener column: the Wiener reference decomposes" in result.text()

    @pytest.mark.parametrize(
        ("spoil", "complaint"),
        [
            (lambda x: x[:0], "there are no samples: draw some"),
            (lambda x: x[:, :, :4], r"samples are \(n, \*\(1, 8, 8\)\).*got \(10, 1, 4, 8\).*image_size"),
            (lambda x: x.index_fill(0, torch.tensor([3, 5]), torch.nan), "2 of 10 samples.*the first is number 3"),
            (lambda x: x[:, :, :1, :1].expand(10, 1, 8, 8), "all 10 samples have one value everywhere"),
            (lambda x: x.to(torch.uint8), r"floating point.*got torch.uint8: to_model_range\(pixels\)"),
            (lambda x: x.tolist(), "got list"),
        ],
    )
    def test_bad_samples(self, data, references, spoil, complaint):
        with pytest.raises(ValueError, match=complaint) as caught:
            study_memorization(spoil(references.fresh[:10].clone()), data, progress=False)
        assert "\n" not in str(caught.value)

    def test_some_constant_samples_are_counted(self, data, references):
        samples = references.fresh[:10].clone()
        samples[4] = 0.5
        result = study_memorization(samples, data, num_calibration=4, num_steps=4, progress=False)
        assert "1 of 10 samples have one value everywhere." in result.text()

    @pytest.mark.parametrize("flip", [False, True])
    def test_equal_training_images(self, references, flip):
        """Without a second source everything would be infinitely nearer to the first one: a copy."""

        class Equal(Digits):
            def read(self):
                splits = super().read()
                return splits._replace(train_images=splits.train_images[:1].expand_as(splits.train_images).contiguous())

        with pytest.raises(NotMeasured, match="all training images are equal"):
            study_memorization(references.fresh[:4], Equal(flip=flip), num_calibration=4, num_steps=2, progress=False)

    def test_numbers_out_of_range(self, data, references):
        with pytest.raises(ValueError, match="num_calibration=1 .* must be 2 or more"):
            study_memorization(references.fresh, data, num_calibration=1, progress=False)


def test_two_ranks_find_what_one_does(launch, tmp_path):
    ranks = launch(Path(on_ranks.__file__), tmp_path, 2, "cpu")
    alone = on_ranks.study(slice(None), None, Job())
    assert alone["summaries"]["samples"]["copies"]["value"] > 0.05
    for found in ranks:
        for name in ("study", "none on one"):
            assert_close(found[name], alone)
        assert "rank 1 cannot go on: 2 of 2 samples hold NaN" in found["nan on one"] or found is ranks[1]
        assert "2 of 2 samples hold NaN" in found["nan on one"]
        assert "there are no samples" in found["none anywhere"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"closest.png", "memorization_index.png", "memorization.json", "memorization.csv"}


def assert_close(found, expected) -> None:
    """Plain data, equal but for the rounding of networks and oracles in other batches."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for own, other in zip(found, expected, strict=True):
            assert_close(own, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert found == expected
