"""Throughput against a clock that is set by hand, and the progress bar."""

import pytest
import torch

from fm_stages.training import Throughput, throughput
from fm_stages.training.progress import StepProgressBar


class TestThroughput:
    @pytest.fixture
    def logged(self, monkeypatch) -> list[tuple[int, dict[str, float]]]:
        lines = []
        monkeypatch.setattr(
            throughput, "log_metrics", lambda trainer, metrics: lines.append((trainer.global_step, metrics))
        )
        return lines

    def test_by_a_clock_set_by_hand(self, make_module, attach, logged, monkeypatch):
        """Two ranks of 20 images; per step 1 s of waiting for data and 3 s of work, and a validation of 100 s."""
        clock = iter([0, 3, 4, 7, 107, 110, 111, 114])
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
        module = attach(make_module(), num_ranks=2)
        trainer, callback, batch = module._trainer, Throughput(every_n_steps=2), {"x1": torch.zeros(20, 1)}
        callback.on_train_start(trainer, module)
        for step in (1, 2, 3, 4):
            callback.on_train_batch_start(trainer, module, batch, 0)
            trainer.global_step = step
            callback.on_train_batch_end(trainer, module, None, batch, 0)
            if step == 2:
                callback.on_validation_start(trainer, module)
        (first, one), (second, two) = logged
        assert (first, second) == (2, 4)
        for metrics in (one, two):
            assert metrics["speed/images_per_sec"] == pytest.approx(2 * 2 * 20 / 7)
            assert metrics["speed/data_wait"] == pytest.approx(1 / 7)
            assert metrics["speed/memory_bytes"] > 2**25

    def test_in_a_run_with_accumulation(self, make_module, make_data, make_trainer, logged):
        callbacks = [Throughput(every_n_steps=2)]
        make_trainer(5, accumulate_grad_batches=2, callbacks=callbacks).fit(make_module(), datamodule=make_data())
        assert [step for step, _ in logged] == [2, 4]
        for _, metrics in logged:
            assert metrics["speed/images_per_sec"] > 0
            assert 0 <= metrics["speed/data_wait"] < 1

    def test_an_interval_below_one_raises(self):
        with pytest.raises(ValueError, match="every_n_steps must be 1 or more, got 0"):
            Throughput(0)


class TestProgressBar:
    @pytest.fixture
    def bar(self):
        """A bar that draws into the air and remembers where it was."""

        class Bar(StepProgressBar):
            def __init__(self) -> None:
                super().__init__()
                self.places: list[int] = []

            @property
            def is_enabled(self) -> bool:
                return True

            def on_train_batch_end(self, *args) -> None:
                super().on_train_batch_end(*args)
                self.places.append(self.train_progress_bar.n)

        return Bar

    def test_counts_optimizer_steps_of_the_run(self, make_module, make_data, make_trainer, bar, monkeypatch, capsys):
        monkeypatch.setattr(StepProgressBar, "_should_update", lambda self, n, total: True)
        first = bar()
        trainer = make_trainer(5, accumulate_grad_batches=2, callbacks=[first], enable_progress_bar=True)
        trainer.fit(make_module(), datamodule=make_data())  # three micro-batches make an epoch of one step
        assert first.places == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        assert first.train_progress_bar.total == 5
        trainer.save_checkpoint("a.ckpt")
        second = bar()
        resumed = make_trainer(7, accumulate_grad_batches=2, callbacks=[second], enable_progress_bar=True)
        resumed.fit(make_module(), datamodule=make_data(), ckpt_path="a.ckpt")
        assert second.places == [5, 6, 6, 7]
        assert (second.train_progress_bar.initial, second.train_progress_bar.total) == (5, 7)
        assert "train/loss" in "".join(capsys.readouterr())
