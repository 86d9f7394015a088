"""The data module: bank and batches agree, and a stopped run goes on with the batches it would have had."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from fm_stages.data import ImageData, Splits

NUM_TRAIN, NUM_VAL, BATCH = 23, 7, 4
STEPS = NUM_TRAIN // BATCH  # per epoch


class Noise(ImageData):
    """Random pixels: no two images are alike."""

    def read(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (NUM_TRAIN + NUM_VAL, 1, 3, 3), generator=generator, dtype=torch.uint8)
        labels = torch.arange(len(images)) % 3
        return Splits(images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:], ["a", "b", "c"])


class Recorder(pl.LightningModule):
    """Keeps what each micro-batch held, and the optimizer step it was part of."""

    def __init__(self, reads_estimate: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.reads_estimate = reads_estimate
        self.seen: list[tuple] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, batch["index"].tolist(), batch["position"].tolist()))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.reads_estimate:  # makes the loader before the loops are restored
            assert self.trainer.estimated_stepping_batches == 4 * STEPS
        return torch.optim.SGD(self.parameters(), 0.1)


class Recounting(Recorder):
    """As `FlowMatching` does."""

    def on_load_checkpoint(self, checkpoint) -> None:
        self.trainer.datamodule.recount(checkpoint)


class SaveAt(pl.Callback):
    """Saves once, in the given hook of the given step or, with a fraction, of a micro-batch inside the step."""

    def __init__(self, path, hook: str, step: float) -> None:
        self.path, self.hook, self.step = path, hook, step

    def _save(self, trainer, hook: str) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed / trainer.accumulate_grad_batches
        if hook == self.hook and done == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "batch end")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "validation end")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch end")


def fit(
    ckpt_path=None,
    callbacks=(),
    accumulation=1,
    limit="epochs",
    reads_estimate=False,
    data=None,
    module=Recorder,
    **kwargs,
):
    module = module(reads_estimate)
    limits = {"max_epochs": 4} if limit == "epochs" else {"max_epochs": None, "max_steps": 4 * STEPS}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulation,
        callbacks=list(callbacks),
        **limits,
        **kwargs,
    )
    data = data or Noise(batch_size=BATCH, flip=True)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


class TestResume:
    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("limit", ["epochs", "steps"])
    @pytest.mark.parametrize(
        ("hook", "step", "options"),
        [
            ("batch end", STEPS + 2, {}),
            ("batch end", STEPS + 3, {"reads_estimate": True}),
            ("batch end", 2 * STEPS, {}),
            ("batch end", 2 * STEPS, {"limit_val_batches": 0}),
            ("validation end", STEPS + 4, {"val_check_interval": 0.4}),
            ("validation end", 2 * STEPS, {}),
            ("epoch end", 2 * STEPS, {"reads_estimate": True}),
        ],
    )
    @pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch")
    def test_goes_on_with_the_very_same_batches(self, tmp_path, accumulation, limit, hook, step, options):
        options = {"accumulation": accumulation, "limit": limit, **options}
        whole = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", hook, step)], **options)
        assert len(whole) == 4 * STEPS * accumulation
        assert fit(tmp_path / "a.ckpt", **options) == whole[step * accumulation :]

    def test_when_lightning_counts_an_epoch_twice(self, tmp_path):
        """At an epoch's end without validation, under max_steps, Lightning restarts the finished epoch."""
        options = {"limit": "steps", "limit_val_batches": 0}
        whole = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "epoch end", 2 * STEPS)], **options)
        assert fit(tmp_path / "a.ckpt", **options) == whole[2 * STEPS :]

    def test_with_worker_processes(self, tmp_path):
        data = Noise(batch_size=BATCH, flip=True, num_workers=1)
        whole = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", STEPS + 2)])
        options = {"data": data, "reads_estimate": True, "limit_val_batches": 0}
        assert fit(tmp_path / "a.ckpt", **options) == whole[STEPS + 2 :]

    def test_epochs_cut_short(self, tmp_path):
        options = {"limit_train_batches": 3}
        whole = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", 5)], **options)
        assert len({tuple(index) for _, index, _ in whole}) == 12
        assert fit(tmp_path / "a.ckpt", **options) == whole[5:]

    def test_resumed_twice(self, tmp_path):
        whole = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", 3)])
        fit(tmp_path / "a.ckpt", callbacks=[SaveAt(tmp_path / "b.ckpt", "batch end", STEPS + 4)])
        assert fit(tmp_path / "b.ckpt") == whole[STEPS + 4 :]

    def test_a_fresh_fit_forgets_the_checkpoint(self, tmp_path):
        data = Noise(batch_size=BATCH, flip=True)
        whole = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", STEPS + 2)], data=data)
        fit(tmp_path / "a.ckpt", data=data)
        assert fit(data=data) == whole

    def test_inside_a_step_warns_and_keeps_the_order(self, tmp_path):
        whole = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", 2.5)], accumulation=2)
        with pytest.warns(UserWarning, match="2 of its 4 images were done, but their gradients"):
            assert fit(tmp_path / "a.ckpt", accumulation=2) == whole[5:]

    def test_other_batches_within_an_epoch_raise(self, tmp_path):
        fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", STEPS + 2)])
        message = "inside epoch 1, after 8 images, .* batch_size was 4 and is 6, seed was 0 and is 1"
        with pytest.raises(ValueError, match=message):
            fit(tmp_path / "a.ckpt", data=Noise(batch_size=6, seed=1, flip=True))
        with pytest.raises(ValueError, match="accumulation was 1 and is 2"):
            fit(tmp_path / "a.ckpt", accumulation=2)

    @pytest.mark.parametrize(("old", "new"), [(1, 2), (4, 1)])
    @pytest.mark.parametrize("limit", ["epochs", "steps"])
    @pytest.mark.parametrize(
        ("hook", "step", "options"),
        [
            ("batch end", STEPS + 2, {"reads_estimate": True}),
            ("batch end", 2 * STEPS, {"limit_val_batches": 0}),
            ("validation end", STEPS + 4, {"val_check_interval": 3, "check_val_every_n_epoch": None}),
            ("epoch end", 2 * STEPS, {}),
        ],
    )
    def test_other_accumulation_goes_on_with_the_same_steps(self, tmp_path, old, new, limit, hook, step, options):
        """On another number of ranks another accumulation follows: steps keep their images, and validations theirs."""
        options = {"limit": limit, "module": Recounting, **options}
        found = []
        for first in (old, new):
            callbacks = [SaveAt(tmp_path / "a.ckpt", hook, step)]
            fit(
                data=Noise(batch_size=BATCH, flip=True, micro_batch_size=BATCH // first), callbacks=callbacks, **options
            )
            validated: list[int] = []
            callbacks = [
                LambdaCallback(on_validation_start=lambda trainer, _, v=validated: v.append(trainer.global_step))
            ]
            data = Noise(batch_size=BATCH, flip=True, micro_batch_size=BATCH // new)
            found.append((fit(tmp_path / "a.ckpt", callbacks, data=data, **options), validated))
        assert len(found[0][0]) == (4 * STEPS - step) * new
        assert found[0] == found[1]

    def test_a_limited_batch_is_accumulated(self):
        data = Noise(batch_size=BATCH, flip=True, micro_batch_size=1)
        whole = fit(data=data)
        assert {len(index) for _, index, _ in whole} == {1}
        steps = [[i for s, index, _ in whole if s == step for i in index] for step in range(4 * STEPS)]
        assert steps == [index for _, index, _ in fit()]
        assert fit(data=data) == whole  # under a second Trainer

    def test_other_batches_from_the_next_epoch_on(self, tmp_path):
        fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", 2 * STEPS)])
        seen = fit(tmp_path / "a.ckpt", data=Noise(batch_size=6, flip=True))
        rest = fit(data=Noise(batch_size=6, flip=True))[2 * (NUM_TRAIN // 6) :]
        assert [batch[1:] for batch in seen] == [batch[1:] for batch in rest]

    def test_validation_with_another_accumulation_reads_the_checkpoint(self, tmp_path):
        fit(callbacks=[SaveAt(tmp_path / "a.ckpt", "batch end", 2.5)], accumulation=2)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer.validate(Recorder(), datamodule=Noise(batch_size=BATCH), ckpt_path=tmp_path / "a.ckpt")


def on_rank(rank: int, num_ranks: int, batches_done: int = 0, data: ImageData | None = None) -> ImageData:
    """A data module attached to what it reads of a Trainer."""
    data = data or Noise(batch_size=BATCH, flip=True, val_batch_size=3)
    total = SimpleNamespace(state_dict=lambda: {"processed": batches_done})
    data.setup("fit")
    data.trainer = SimpleNamespace(
        world_size=num_ranks,
        global_rank=rank,
        accumulate_grad_batches=1,
        num_training_batches=float("inf"),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))),
    )
    return data


class TestRanks:
    def test_one_epoch_and_the_held_out_set_over_two_ranks(self):
        one = [batch["index"] for batch in on_rank(0, 1).train_dataloader()]
        two = [[batch["index"] for batch in on_rank(rank, 2).train_dataloader()] for rank in range(2)]
        assert [torch.cat(parts).tolist() for parts in zip(*two, strict=True)] == [rows.tolist() for rows in one]
        parts = [batch["position"] for rank in range(2) for batch in on_rank(rank, 2).val_dataloader()]
        assert sorted(torch.cat(parts).tolist()) == list(range(NUM_VAL))

    def test_resumed_on_another_number_of_ranks(self):
        state = on_rank(0, 1, batches_done=STEPS + 2).state_dict()
        assert (state["epoch"], state["samples"]) == (1, 2 * BATCH)
        rest = []
        for rank in range(2):
            data = on_rank(rank, 2, batches_done=STEPS + 2)
            data.load_state_dict(state)
            rest.append([batch["index"] for batch in data.train_dataloader()])
        loader = Noise(batch_size=BATCH, flip=True).train_dataloader()
        loader.sampler.set_epoch(1)
        expected = [batch["index"].tolist() for batch in loader][2:]
        assert [torch.cat(parts).tolist() for parts in zip(*rest, strict=True)] == expected


class TestBank:
    @pytest.mark.parametrize("flip", [False, True])
    def test_rows_are_the_batches_rows_bit_for_bit(self, flip):
        data = Noise(batch_size=BATCH, flip=flip)
        bank = data.bank()
        assert len(bank) == NUM_TRAIN * (1 + flip)
        assert bank.num_distinct == len(bank)
        loader = data.train_dataloader()
        for epoch in range(4):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                assert torch.equal(bank.rows(batch["index"]), batch["x1"])
                assert torch.equal(bank.labels_of(batch["index"]), batch["labels"])
        assert data.bank() is bank

    def test_flips_are_the_rows_behind(self):
        bank = Noise(flip=True).bank()
        rows = torch.arange(NUM_TRAIN)
        assert torch.equal(bank.rows(NUM_TRAIN + rows), bank.rows(rows).flip(-1))
        assert torch.equal(bank.labels_of(NUM_TRAIN + rows), bank.labels_of(rows))


class TestWithoutTrainer:
    def test_a_plain_loop(self):
        data = Noise(batch_size=BATCH, val_batch_size=3)
        loader = data.train_dataloader()
        assert len(loader) == len(list(loader)) == STEPS
        assert [len(batch["x1"]) for batch in data.val_dataloader()] == [3, 2, 2]
        assert data.shape == (1, 3, 3)
        assert (data.num_train, data.num_val, data.num_classes) == (NUM_TRAIN, NUM_VAL, 3)

    def test_the_place_is_the_trainers(self):
        with pytest.raises(RuntimeError, match="plain loop"):
            Noise().state_dict()


class TestErrors:
    def test_arguments(self):
        with pytest.raises(ValueError, match="batch_size=0"):
            Noise(batch_size=0)
        with pytest.raises(ValueError, match="batch_size=24 must lie between 1 and .* 23"):
            Noise(batch_size=24).train_dataloader()
        with pytest.raises(TypeError, match="batchsize"):
            Noise(batchsize=4)

    def test_overfit_batches(self):
        with pytest.raises(ValueError, match="overfit_batches=2"):
            fit(overfit_batches=2)

    def test_an_empty_split(self, monkeypatch):
        splits = Noise().read()
        monkeypatch.setattr(Noise, "read", lambda _: splits._replace(val_images=splits.val_images[:0]))
        with pytest.raises(ValueError, match="at least one uint8 image"):
            Noise().setup()
