"""Guards: planted NaN and spikes under each policy, against runs that leave the same steps out by hand."""

import json
import math
import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from fm_stages.data.loading import EpochSampler
from fm_stages.training import Checkpoints, Guards, GuardStop, OracleMonitor, fit_with_rewinds, read_checkpoint
from fm_stages.training.checkpoints.files import NEEDED
from fm_stages.training.guards.rewinding import find_good
from fm_stages.training.guards.spikes import MIN_VALUES, SpikeDetector
from fm_stages.training.guards.step_numbers import measure_step

STEPS = 8  # of 3 to an epoch
LAST = Path("checkpoints/last.ckpt")


class Spoil(L.Callback):
    """Multiplies the images of one micro-batch of a step, each time or once."""

    def __init__(self, step: int, factor: float = math.nan, micro_batch: int = 0, times: int = 1, until: int = -1):
        self.steps, self.factor, self.micro_batch, self.times = (
            range(step, max(until, step + 1)),
            factor,
            micro_batch,
            times,
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == self.micro_batch
        if trainer.global_step in self.steps and first and self.times:
            self.times -= 1
            batch["x1"].mul_(self.factor)


class LeaveOut(L.Callback):
    """The reference: a step's gradients are thrown away, and its average is put back, without any guard."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step in self.steps:
            self.average = {name: x.clone() for name, x in pl_module.network_ema.state_dict().items()}
            optimizer.zero_grad()

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step - 1 in self.steps:
            pl_module.network_ema.load_state_dict(self.average)


class Rows(L.Callback):
    """Which images each step was trained on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append((trainer.global_step, batch["index"].tolist()))


@pytest.fixture
def fit(make_module, make_data, make_trainer):
    """Weights, average and the optimizer's state after a run."""

    def run(
        folder: str,
        *callbacks: L.Callback,
        steps: int = STEPS,
        ckpt_path=None,
        every: int = 2,
        save_all=False,
        **kwargs,
    ):
        checkpoints = Checkpoints(monitor=None, every_n_train_steps=every, save_top_k=-1 if save_all else 1)
        settings = {"default_root_dir": folder, "enable_checkpointing": True, "gradient_clip_val": 1.0, **kwargs}
        module = make_module(warmup_steps=3, ema_decay=0.9)
        trainer = make_trainer(steps, callbacks=[*callbacks, checkpoints], **settings)
        fit_with_rewinds(trainer, model=module, datamodule=make_data(), ckpt_path=ckpt_path)
        moments = trainer.optimizers[0].state_dict()["state"]
        named = {f"{number}.{name}": x for number, state in moments.items() for name, x in state.items()}
        return {**module.state_dict(), **named}

    return run


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def records(folder: str = "run") -> list[str]:
    return sorted(path.name for path in Path(folder, "flight").glob("*"))


def read(name: str, folder: str = "run") -> dict:
    return json.loads(Path(folder, "flight", name, "record.json").read_text())


CLIPPING = [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}]


@pytest.mark.parametrize(
    "options", [*({**clip, "accumulate_grad_batches": 2} for clip in CLIPPING), {"gradient_clip_val": None}]
)
def test_where_nothing_happens_the_run_is_the_same_to_the_last_bit(fit, options):
    """Gradients are clipped, by the norm that the guards computed or otherwise, or not."""
    guards = Guards(spike="skip", nonfinite="rewind")
    guarded = fit("run", guards, **options)
    assert same(guarded, fit("plain", **options))
    assert guards.events == []
    assert not records()


class TestSkip:
    @pytest.mark.parametrize(
        ("factor", "accumulation", "micro_batch"), [(math.nan, 1, 0), (math.inf, 2, 0), (1e30, 2, 1)]
    )
    def test_the_run_is_one_that_left_the_step_out(self, fit, factor, accumulation, micro_batch):
        def spoil() -> Spoil:
            return Spoil(4, factor, micro_batch)

        guards = Guards()
        skipped = fit("run", guards, spoil(), accumulate_grad_batches=accumulation)
        assert same(skipped, fit("by hand", spoil(), LeaveOut(4), accumulate_grad_batches=accumulation))
        assert all(x.isfinite().all() for x in skipped.values())
        assert [(e["step"], e["kind"], e["action"]) for e in guards.events] == [(4, "nonfinite", "skip")]
        assert skipped["0.step"] == STEPS - 1  # Adam's own count
        assert records() == ["step_0000004"]
        parts = read("step_0000004")["parts"]
        assert [part["micro_batch"] for part in parts] == list(range(accumulation))
        rows = [part["non_finite_rows"]["error"] for part in parts]
        assert rows[micro_batch] == list(range(20 // accumulation))
        assert all(not rows[other] for other in range(accumulation) if other != micro_batch)

    def test_bfloat16(self, fit):
        guards = Guards()
        left_out = fit("run", guards, Spoil(5), precision="bf16-mixed")
        assert same(left_out, fit("by hand", Spoil(5), LeaveOut(5), precision="bf16-mixed"))
        assert [e["step"] for e in guards.events] == [5]

    def test_a_run_without_guards_is_lost(self, fit):
        assert not all(x.isfinite().all() for x in fit("run", Guards(nonfinite="off", spike="off"), Spoil(4)).values())

    def test_a_step_that_was_left_out_is_no_measurement(self, fit):
        monitor = OracleMonitor(every_n_steps=1, window=STEPS - 1)
        fit("run", Guards(), monitor, Spoil(4))
        assert all(math.isfinite(x) for x, n in zip(monitor.train.mean["gap"], monitor.train.count, strict=True) if n)
        assert sum(monitor.train.count) == 20 * (STEPS - 1)

    def test_too_many_in_a_row_stop_the_run_and_two_records_tell(self, fit):
        guards = Guards(max_skips=2)
        with pytest.raises(GuardStop):
            fit("run", guards, Spoil(3, times=9, until=9))
        assert [(e["step"], e["action"]) for e in guards.events] == [(3, "skip"), (4, "skip"), (5, "stop")]
        assert records() == ["step_0000003", "step_0000005"]

    def test_steps_between_good_ones_are_no_row(self, fit):
        guards = Guards(max_skips=1)
        fit("run", guards, Spoil(3), Spoil(5))
        assert [e["action"] for e in guards.events] == ["skip", "skip"]


class TestStop:
    def test_the_run_ends_and_the_last_checkpoint_stays(self, fit):
        said = pytest.warns(UserWarning, match="step 5: the loss is nan.*replay --record run/flight/step_0000005")
        with said, pytest.raises(GuardStop) as stop:
            fit("run", Guards(nonfinite="stop"), Spoil(5))
        assert stop.value.code == 65
        assert read_checkpoint("run" / LAST)["global_step"] == 4
        assert all(x.isfinite().all() for x in read_checkpoint("run" / LAST)["state_dict"].values())

    def test_what_was_stopped_goes_on_as_if_nothing_had_been(self, fit):
        with pytest.raises(GuardStop):
            fit("run", Guards(nonfinite="stop"), Spoil(5))
        assert same(fit("run", Guards(), ckpt_path="run" / LAST), fit("whole", Guards()))

    def test_a_trial_run_leaves_no_record(self, fit):
        with pytest.raises(GuardStop):
            fit("run", Guards(nonfinite="stop"), Spoil(1), fast_dev_run=3)
        assert not Path("run").exists()


class TestRewind:
    """Equal is: a run that takes the checkpoint of step 4, at its place in the data two batches on, and no guard."""

    def reference(self, fit, make_data) -> dict:
        fit("before", steps=4)
        checkpoint = torch.load("before" / LAST, weights_only=True)
        place = checkpoint["Patterns"]
        assert (place["epoch"], place["samples"]) == (1, 20)
        place.update(epoch=2, samples=0)  # after the other two of the epoch's three batches
        torch.save(checkpoint, "moved.ckpt")
        return fit("reference", ckpt_path="moved.ckpt")

    def test_the_run_is_one_that_never_saw_those_batches(self, fit, make_data):
        guards, rows = Guards(nonfinite="rewind"), Rows()
        back = fit("run", guards, rows, Spoil(5))
        assert same(back, self.reference(fit, make_data))
        assert guards.rewinds == 1
        data = make_data()
        data.setup()
        order = []
        for epoch in range(4):
            sampler = EpochSampler(data.train_dataloader().dataset, 20)
            sampler.set_epoch(epoch)
            order += [planned.rows.tolist() for planned in sampler]
        steps = [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
        batches = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert rows.seen == [(s, order[b]) for s, b in zip(steps, batches, strict=True)]

    def test_what_was_passed_over_once_stays_so(self, fit):
        """A step of which the run has a checkpoint fails, and then another one twice."""
        rows = Rows()
        guards = Guards(nonfinite="rewind", max_rewinds=5)
        fit("run", guards, rows, Spoil(5, times=2), Spoil(4), save_all=True)
        assert guards.rewinds == 3
        assert [step for step, _ in rows.seen] == [0, 1, 2, 3, 4, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7]
        per_epoch = [set().union(*(set(seen) for _, seen in rows.seen[i : i + 3])) for i in range(0, 15, 3)]
        assert all(len(images) == 60 for images in per_epoch)  # each epoch's three batches, none twice

    def test_a_kill_after_it_does_not_bring_the_batches_back(self, fit, make_data):
        class Kill(L.Callback):
            def on_train_start(self, trainer, pl_module) -> None:
                if trainer.global_step == 4:
                    raise KeyError("killed")

        with pytest.raises(KeyError):
            fit("run", Guards(nonfinite="rewind"), Spoil(5), Kill())
        guards = Guards(nonfinite="rewind")
        assert same(fit("run", guards, ckpt_path="run" / LAST), self.reference(fit, make_data))
        assert guards.rewinds == 1
        assert [(e["step"], e["action"]) for e in guards.events] == [(5, "rewind")]

    def test_accumulated_gradients(self, fit, make_data):
        guards = Guards(nonfinite="rewind")
        back = fit("run", guards, Spoil(5, micro_batch=1), accumulate_grad_batches=2)
        fit("before", steps=4, accumulate_grad_batches=2)
        checkpoint = torch.load("before" / LAST, weights_only=True)
        checkpoint["Patterns"].update(epoch=2, samples=0)
        torch.save(checkpoint, "moved.ckpt")
        assert same(back, fit("reference", ckpt_path="moved.ckpt", accumulate_grad_batches=2))

    def test_short_epochs(self, fit):
        back, whole = Rows(), Rows()
        fit("run", Guards(nonfinite="rewind"), back, Spoil(5), limit_train_batches=2)
        fit("whole", whole, steps=10, limit_train_batches=2)
        assert [step for step, _ in back.seen] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
        assert [seen for _, seen in back.seen] == [seen for _, seen in whole.seen]

    def test_older_weights_are_better_than_those_of_the_step_itself(self, tmp_path):
        for step in (2, 4, 6):
            torch.save({**dict.fromkeys(NEEDED), "global_step": step}, tmp_path / f"{step}.ckpt")
        (tmp_path / "torn.ckpt").write_bytes(b"PK")
        good = [find_good(tmp_path, step) for step in (1, 2, 3, 4, 5, 9)]
        assert [path and path.stem for path in good] == [None, "2", "2", "2", "4", "6"]

    def test_too_often_or_nowhere_to_go_stops_the_run(self, fit):
        guards = Guards(nonfinite="rewind", max_rewinds=2)
        with pytest.raises(GuardStop):
            fit("run", guards, Spoil(5, times=9))
        assert [e["action"] for e in guards.events] == ["rewind", "rewind", "stop"]
        assert records() == ["step_0000005", "step_0000005_after_1_rewinds", "step_0000005_after_2_rewinds"]
        guards = Guards(nonfinite="rewind")
        with pytest.raises(GuardStop):
            fit("fresh", guards, Spoil(1))
        assert [e["action"] for e in guards.events] == ["stop"]

    def test_where_there_is_no_way_back_it_is_refused(self, fit, make_trainer, make_module, make_data):
        with pytest.raises(ValueError, match="this run writes none: choose skip or stop"):
            make_trainer(callbacks=[Guards(nonfinite="rewind")]).fit(make_module(), make_data())
        loader = torch.utils.data.DataLoader(torch.zeros(8, 1, 4, 4))
        trainer = make_trainer(callbacks=[Guards(spike="rewind"), Checkpoints()], enable_checkpointing=True)
        with pytest.raises(ValueError, match="needs a data module of fm_stages.data"):
            trainer.fit(make_module(), loader)


class TestSpikes:
    STEPS = MIN_VALUES + 6
    AT = MIN_VALUES + 3

    def test_a_record_alone_changes_nothing(self, fit):
        guards = Guards(window=MIN_VALUES)
        recorded = fit("run", guards, Spoil(self.AT, 30.0), steps=self.STEPS)
        assert same(recorded, fit("plain", Spoil(self.AT, 30.0), steps=self.STEPS))
        assert [(e["step"], e["kind"], e["action"]) for e in guards.events] == [(self.AT, "spike", "record")]
        assert records() == [f"step_{self.AT:07d}"]
        assert "the loss is" in guards.events[0]["what"]

    def test_skip_and_rewind(self, fit):
        skipped = fit("run", Guards(spike="skip"), Spoil(self.AT, 30.0), steps=self.STEPS)
        assert same(skipped, fit("by hand", Spoil(self.AT, 30.0), LeaveOut(self.AT), steps=self.STEPS))
        guards = Guards(spike="rewind")
        fit("back", guards, Spoil(self.AT, 30.0), steps=self.STEPS, every=2)
        assert [(e["step"], e["action"]) for e in guards.events] == [(self.AT, "rewind")]

    def test_a_resumed_run_sees_what_the_whole_one_sees(self, fit):
        whole = Guards(spike="skip")
        weights = fit("whole", whole, Spoil(self.AT, 30.0), steps=self.STEPS)
        fit("run", Guards(spike="skip"), steps=self.AT - 1)
        resumed = Guards(spike="skip")
        assert same(fit("run", resumed, Spoil(self.AT, 30.0), steps=self.STEPS, ckpt_path="run" / LAST), weights)
        assert resumed.state_dict() == whole.state_dict()
        assert len(whole.events) == 1

    def test_a_detector_by_its_definition(self):
        generator = np.random.default_rng(0)
        values = np.concatenate([generator.normal(1.0, 0.3, 60), [4.5, 1.0, 9.0], generator.normal(1, 0.3, 20)])
        spikes, window, threshold = SpikeDetector(30, 6.0), 30, 6.0
        for i, value in enumerate(values):
            before = values[max(0, i - window) : i]
            expected = False
            if len(before) >= MIN_VALUES:
                middle = np.median(before)
                deviation = 1.4826 * np.median(np.abs(before - middle))
                expected = value - middle > max(threshold * deviation, abs(middle))
            assert bool(spikes.excess(float(value))) == expected
            assert expected == (i in (60, 62))

    def test_a_level_that_stays_is_the_new_level(self):
        spikes = SpikeDetector(20, 10.0)
        found = [bool(spikes.excess(x)) for x in [1.0] * 20 + [5.0] * 20]
        assert found[20]
        assert not any(found[31:])

    def test_a_negative_loss(self):
        spikes = SpikeDetector(20, 10.0)
        assert not any(spikes.excess(-1.0 + 0.01 * (i % 3)) for i in range(40))
        assert spikes.excess(0.5)


class TestNumbers:
    def test_the_norm_is_that_of_all_gradients(self):
        generator = np.random.default_rng(0)
        arrays = [generator.normal(size=shape).astype(np.float32) for shape in ((3, 4), (7,), ())]
        parameters = [torch.nn.Parameter(torch.zeros(a.shape)) for a in arrays] + [torch.nn.Parameter(torch.ones(3))]
        for parameter, array in zip(parameters, arrays, strict=False):
            parameter.grad = torch.from_numpy(array)
        loss, norm, _ = measure_step(torch.tensor(0.25), torch.optim.SGD(parameters, 0.1), 1)
        assert loss == 0.25
        assert norm == pytest.approx(math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays)), rel=1e-6)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_one_bad_value_is_enough(self, bad):
        parameter = torch.nn.Parameter(torch.zeros(100))
        parameter.grad = torch.zeros(100)
        parameter.grad[41] = bad
        assert not math.isfinite(measure_step(torch.tensor(0.0), torch.optim.SGD([parameter], 0.1), 1).norm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nonfinite": "record"}, "nonfinite='record' is no policy; there are off, stop, skip, rewind"),
        ({"spike": "ignore"}, "spike='ignore' is no policy"),
        ({"window": 5}, "window=5 must be 20 steps or more"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0"),
        ({"threshold": math.nan}, "threshold=nan must be above 0"),
        ({"max_skips": 0}, "max_skips=0 and max_rewinds=3 must be 1 or more"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match="guards: ") as error:
        Guards(**arguments)
    assert message in str(error.value)


def test_two_ranks(launch, tmp_path):
    """NaN on rank 1 alone: both ranks decide alike, whole weights or sharded ones, and nobody hangs."""
    ranks = launch(Path(__file__).with_name("guarded_ranks.py"), tmp_path, 2, "cpu")
    for strategy in ("ddp", "fsdp"):
        first = ranks[0][strategy]
        for seen in (rank[strategy] for rank in ranks):
            for one, other in (("plain", "quiet"), ("skip", "by hand"), ("rewind", "moved")):
                assert same(seen[one], seen[other]), (strategy, one)
                assert same(seen[one], first[one]), (strategy, one)
            assert not same(seen["skip"], seen["plain"])
            actions = {name: [(e["step"], e["action"]) for e in events] for name, events in seen["events"].items()}
            assert actions == {name: [(3, name)] for name in ("skip", "rewind", "stop")}
            assert "(ranks 1)" in seen["events"]["skip"][0]["what"]
            assert seen["status"] == 65
            assert seen["bad"] == [(1, 0)]
            assert seen["numbers"] == first["numbers"]
        assert {"record.json", "rank0.safetensors", "rank1.safetensors"} <= set(first["files"])
    for name, numbers in ranks[0]["ddp"]["numbers"].items():
        assert numbers == pytest.approx(ranks[0]["fsdp"]["numbers"][name], rel=1e-5)
    for seen in (rank["errors"] for rank in ranks):
        assert seen["find_good"] == "guards: checkpoints could not be read: planted on rank 0"
        assert seen["write_rewound"] == "guards: the way back could not be written: planted on rank 0"
        assert re.search(r"could not be read again: /callbacks/.*Unreadable.*/file is a pathlib", seen["a state"])
