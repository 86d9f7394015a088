"""The checks at the start: each way in which the monitor's numbers would be wrong is refused, with its remedy."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fm_stages.flow import CosinePath, LinearPath
from fm_stages.oracle import DataBank, Oracle
from fm_stages.training import OracleMonitor
from fm_stages.training.monitor.checks import check_first_batch, outputs_of


@pytest.fixture
def bank() -> DataBank:
    generator = torch.Generator().manual_seed(0)
    return DataBank(torch.randn(40, 1, 3, 3, generator=generator), torch.arange(40) % 4)


@pytest.fixture
def seen(bank) -> dict[str, torch.Tensor]:
    """A healthy first batch: 12 rows of the bank with their labels, some of them dropped, and their index."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(40, (12,), generator=generator)
    x0, x1, t = torch.randn(12, 1, 3, 3, generator=generator), bank.rows(index), torch.linspace(0, 1, 12)
    labels = torch.where(torch.arange(12) % 3 == 0, -1, bank.labels_of(index))
    x_t = LinearPath().interpolate(x0, x1, t)
    return {"x0": x0, "x1": x1, "x_t": x_t, "t": t, "prediction": x0, "labels": labels, "index": index}


def renewed(seen, **changes) -> dict[str, torch.Tensor]:
    """The batch with other data, and the x_t that belongs to it."""
    seen = {**seen, **changes}
    return {**seen, "x_t": LinearPath().interpolate(seen["x0"], seen["x1"], seen["t"])}


class TestFirstBatch:
    @pytest.fixture
    def check(self, bank):
        return lambda seen, path=None: check_first_batch(Oracle(bank, path or LinearPath()), seen)

    def test_a_healthy_batch_passes(self, check, seen):
        check(seen)
        check({name: x for name, x in seen.items() if name not in ("labels", "index")})
        check({**seen, "labels": torch.full((12,), -1)})

    def test_x_t_rounded_to_bfloat16_passes(self, check, seen):
        check({**seen, "x_t": seen["x_t"].bfloat16().float()})

    def test_another_normalisation(self, check, seen):
        with pytest.raises(ValueError, match="12 of 12 rows .* not in the bank.* Use the same normalisation"):
            check(renewed(seen, x1=seen["x1"] / 2 + 0.5))

    def test_rows_that_the_bank_lacks(self, check, seen):
        x1 = seen["x1"].clone()
        x1[2:5] += 0.1
        with pytest.raises(ValueError, match="3 of 12 rows of the first training batch are not in the bank"):
            check(renewed(seen, x1=x1))

    def test_flips_that_the_bank_lacks(self, check, seen):
        with pytest.raises(ValueError, match="no random augmentation but flips that the bank holds"):
            check(renewed(seen, x1=seen["x1"].flip(-1)))

    def test_labels_that_count_from_one(self, check, seen):
        labels = torch.where(seen["labels"] == -1, -1, (seen["labels"] + 1) % 4)
        with pytest.raises(
            ValueError, match="8 of 12 rows .* carry another label in the bank .*number the classes alike"
        ):
            check({**seen, "labels": labels})

    def test_a_null_label_given_by_its_number(self, check, seen):
        """As networks count it: the row behind the classes."""
        labels = torch.where(seen["labels"] == -1, 4, seen["labels"])
        with pytest.raises(ValueError, match="reports label 4, .* labels run from 0 to 3: report dropped .* as -1"):
            check({**seen, "labels": labels})

    def test_another_negative_label(self, check, seen):
        with pytest.raises(ValueError, match="reports label -2"):
            check({**seen, "labels": torch.where(seen["labels"] == -1, -2, seen["labels"])})

    def test_labels_where_the_bank_has_none(self, bank, seen):
        with pytest.raises(ValueError, match=r"the bank has none: build it as DataBank\(x1, labels\)"):
            check_first_batch(Oracle(DataBank(bank.rows(torch.arange(40))), LinearPath()), seen)

    @pytest.mark.parametrize("wrong", ["time reversed", "cosine", "swapped"])
    def test_x_t_of_another_path_or_direction(self, check, seen, wrong):
        x0, x1, t = seen["x0"], seen["x1"], seen["t"]
        x_t = {
            "time reversed": LinearPath().interpolate(x0, x1, 1 - t),
            "cosine": CosinePath().interpolate(x0, x1, t),
            "swapped": LinearPath().interpolate(x1, x0, t),
        }[wrong]
        remedy = "uses another path: give" if wrong == "cosine" else "runs time the other way.* return 1 - t as t"
        with pytest.raises(ValueError, match=rf"x_t differs from LinearPath.interpolate\(x0, x1, t\) .*{remedy}"):
            check({**seen, "x_t": x_t})

    def test_data_at_t_0_as_in_rectified_flow(self, check, seen):
        exchanged = renewed({**seen, "x0": seen["x1"], "x1": seen["x0"]})
        with pytest.raises(ValueError, match="x0 .* is the data, and x1 the noise.* the noise as x0, .* 1 - t as t"):
            check(exchanged)

    def test_x_t_that_is_not_a_number(self, check, seen):
        with pytest.raises(ValueError, match="x_t differs"):
            check({**seen, "x_t": seen["x_t"] * torch.nan})

    def test_an_index_of_other_rows(self, check, seen):
        with pytest.raises(ValueError, match="12 of 12 rows that the module names by index are other rows"):
            check({**seen, "index": (seen["index"] + 1) % 40})

    @pytest.mark.parametrize("row", [-1, 40])
    def test_an_index_outside_the_bank(self, check, seen, row):
        index = seen["index"].clone()
        index[3] = row
        with pytest.raises(ValueError, match="the bank has 40 rows: report the row in the bank, or no index"):
            check({**seen, "index": index})


class TestOutputs:
    @pytest.mark.parametrize("missing", ["x0", "x1", "x_t", "t", "prediction"])
    def test_what_is_missing_is_named_with_the_contract(self, seen, missing):
        outputs = {name: x for name, x in seen.items() if name != missing}
        with pytest.raises(ValueError, match=f"finds no {missing} in what LightningModule's step returns. Return") as e:
            outputs_of(outputs, L.LightningModule())
        assert '"labels": labels after label dropout, -1 for null' in str(e.value)

    @pytest.mark.parametrize("outputs", [None, torch.tensor(1.0), {"loss": torch.tensor(1.0)}])
    def test_a_step_that_returns_the_loss_alone(self, outputs):
        with pytest.raises(ValueError, match="finds no x0, x1, x_t, t, prediction"):
            outputs_of(outputs, L.LightningModule())

    def test_half_precision_is_widened_and_the_graph_let_go(self, seen):
        prediction = torch.ones(12, 1, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        kept = outputs_of({**seen, "prediction": prediction, "labels": None, "loss": torch.tensor(1.0)}, None)
        assert kept["prediction"].dtype == torch.float32
        assert not kept["prediction"].requires_grad
        assert kept["index"].dtype == torch.int64
        assert set(kept) == {"x0", "x1", "x_t", "t", "prediction", "index"}


class Loaders(L.LightningDataModule):
    """Training images of a bank that is told apart from them."""

    def __init__(self, images, labels, bank) -> None:
        super().__init__()
        self.data, self.bank = TensorDataset(images, labels), lambda: bank

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)


class TestInARun:
    """The messages reach whoever calls `fit`, before the first optimizer step has been measured."""

    @pytest.fixture
    def images(self, bank):
        rows = torch.arange(40)
        return bank.rows(rows), bank.labels_of(rows)

    @pytest.fixture
    def fit(self, make_trainer):
        class Module(L.LightningModule):
            def __init__(self, path=None, change=lambda outputs: outputs):
                super().__init__()
                self.layer, self.change = torch.nn.Linear(1, 1), change
                if path is not None:
                    self.path = path

            def training_step(self, batch, batch_idx):
                x1, labels = batch
                x0, t = torch.randn_like(x1), torch.rand(len(x1))
                x_t = LinearPath().interpolate(x0, x1, t)
                v = self.layer(x_t[..., None])[..., 0]
                outputs = {"x0": x0, "x1": x1, "x_t": x_t, "t": t, "prediction": v.detach(), "labels": labels}
                return self.change({"loss": (v - x1 + x0).square().mean(), **outputs})

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        def fit(data, path=LinearPath(), change=lambda outputs: outputs, loader=None, **kwargs):  # noqa: B008
            trainer = make_trainer(1, callbacks=[OracleMonitor(1, 1, **kwargs)])
            trainer.fit(
                Module(path, change), **({"datamodule": data} if loader is None else {"train_dataloaders": loader})
            )

        return fit

    def test_a_healthy_run(self, fit, images):
        fit(Loaders(*images, DataBank(*images)))

    def test_no_bank(self, fit, images):
        message = r"needs the training set: give the Trainer a datamodule with bank\(\), or OracleMonitor\(bank="
        with pytest.raises(ValueError, match=message):
            fit(None, loader=DataLoader(TensorDataset(*images)))

    @pytest.mark.parametrize("path", [None, "linear"])
    def test_no_path(self, fit, images, path):
        with pytest.raises(
            ValueError, match=r"Module has no attribute `path`; give it one, or OracleMonitor\(path=LinearPath\(\)\)"
        ):
            fit(Loaders(*images, DataBank(*images)), path=path)

    def test_padded_rows(self, fit, images):
        """As a distributed sampler pads: the last row twice."""
        padded = [torch.cat([x, x[-1:]]) for x in images]
        with pytest.raises(ValueError, match="the bank has 41 rows, the training set 40 images .* without padding"):
            fit(Loaders(*images, DataBank(*padded)))

    def test_held_out_images_in_the_bank(self, fit, images):
        with pytest.raises(ValueError, match="the bank has 40 rows, the training set 30 images"):
            fit(Loaders(images[0][:30], images[1][:30], DataBank(*images)))

    def test_missing_rows(self, fit, images):
        with pytest.raises(ValueError, match="the bank has 36 rows, the training set 40 images .* 40 or 80 rows"):
            fit(Loaders(*images, DataBank(images[0][4:], images[1][4:])))

    @pytest.mark.parametrize("flip", [False, True])
    def test_flips_in_the_bank_and_not_in_the_data_or_the_other_way(self, make_module, make_data, make_trainer, flip):
        data, other = make_data(flip=flip), make_data(flip=not flip)
        wanted, found = (120, 60) if flip else (60, 120)
        with pytest.raises(ValueError, match=rf"the bank has {found} rows, .*\(flip={flip}\).* {wanted} rows"):
            make_trainer(1, callbacks=[OracleMonitor(bank=other.bank())]).fit(make_module(), datamodule=data)

    def test_time_reversed(self, fit, images):
        def reverse(outputs):
            return {**outputs, "t": 1 - outputs["t"]}

        with pytest.raises(ValueError, match="time the other way"):
            fit(Loaders(*images, DataBank(*images)), change=reverse)

    def test_a_step_that_returns_the_loss_alone(self, fit, images):
        with pytest.raises(ValueError, match="finds no x0, x1, x_t, t, prediction in what Module's step returns"):
            fit(Loaders(*images, DataBank(*images)), change=lambda outputs: outputs["loss"])

    def test_another_image_size(self, fit, images):
        with pytest.raises(ValueError, match=r"\(B, 1, 2, 2\)|bank's rows"):
            fit(Loaders(*images, DataBank(images[0][..., :2, :2], images[1])))
