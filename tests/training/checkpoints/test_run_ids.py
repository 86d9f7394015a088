"""The id of a run: kept with the run, and not that of another one in the same folder."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from fm_stages.training import Checkpoints, Continuity, Guards, fit_with_rewinds, read_checkpoint
from fm_stages.training.checkpoints.resume import find_last
from fm_stages.training.checkpoints.run_ids import FILE, keep_id, kept_id, name_at_wandb, new_id
from tests.training.guards.test_callback import Spoil


class TestNames:
    def test_it_is_written_and_read(self, tmp_path):
        assert kept_id(tmp_path) is None
        first, second = new_id(), new_id()
        assert first != second
        keep_id(SimpleNamespace(default_root_dir=tmp_path, logger=None), first)
        assert kept_id(tmp_path) == first == (tmp_path / FILE).read_text().strip()
        (tmp_path / FILE).write_text("")
        assert kept_id(tmp_path) is None

    @pytest.mark.parametrize(("arguments", "expected"), [({}, "1234"), ({"id": "mine"}, "mine")])
    def test_wandb_takes_it_unless_it_was_given_one(self, tmp_path, arguments, expected):
        logger = WandbLogger(save_dir=tmp_path, **arguments)
        name_at_wandb(SimpleNamespace(loggers=[logger]), "1234")
        assert logger.version == logger._wandb_init["id"] == expected
        assert logger._wandb_init["resume"] == "allow"


@pytest.fixture
def fit(make_module, make_data, make_trainer, tmp_path):
    def run(steps: int, *callbacks, folder="run", ckpt_path=None, lr=1e-3) -> str:
        continuity = Continuity()
        callbacks = [*callbacks, Checkpoints(None, save_top_k=-1, every_n_train_steps=4), continuity]
        trainer = make_trainer(
            steps, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path / folder
        )
        module = make_module(optimizer=lambda p: torch.optim.Adam(p, lr))
        fit_with_rewinds(trainer, model=module, datamodule=make_data(), ckpt_path=ckpt_path)
        return continuity.run_id

    return run


class TestCheckpoints:
    def test_a_run_that_goes_on_keeps_its_id_and_one_that_branches_off_has_its_own(self, fit, tmp_path):
        first = fit(4)
        own = tmp_path / "run/checkpoints/step_0000004.ckpt"
        assert fit(6, ckpt_path=own) == first
        assert fit(6, ckpt_path=own, folder=".") != first  # although it lies inside that folder
        assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["continuity"]["run"] == first

    def test_guards_never_go_back_to_another_run_in_the_same_folder(self, fit, tmp_path):
        old = fit(8, lr=1e-2)
        for name in ("step_0000004.ckpt", "step_0000008.ckpt"):
            (tmp_path / "run/checkpoints" / name).rename(tmp_path / "run/checkpoints" / f"older_{name}")
        new = fit(10, Guards(nonfinite="rewind"), Spoil(9), lr=1e-4)
        assert old != new
        last = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
        assert last["continuity"]["run"] == new
        assert last["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4
        assert last["global_step"] == 10

    def test_the_newest_of_this_run(self, fit, tmp_path):
        fit(8)
        folder = tmp_path / "run/checkpoints"
        (folder / "step_0000008.ckpt").rename(folder / "older.ckpt")
        run_id = fit(6)
        (folder / "last.ckpt").write_bytes(b"PK")
        assert find_last(str(folder), run_id) == str(folder / "step_0000004.ckpt")
        assert find_last(str(folder)) == str(folder / "older.ckpt")


def test_continuity_alone_is_refused(make_module, make_data, make_trainer):
    trainer = make_trainer(callbacks=[Continuity()], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"add Checkpoints\(\) to the callbacks"):
        trainer.fit(make_module(), datamodule=make_data())
