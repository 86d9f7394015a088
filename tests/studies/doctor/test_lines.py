"""Each line of the doctor at the edges of its colours, from numbers made by hand."""

import os
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fm_stages.oracle import Decomposition
from fm_stages.studies.doctor import data as doctor_data
from fm_stages.studies.doctor import machine as doctor_machine
from fm_stages.studies.doctor.data import (
    check_channels,
    check_constant,
    check_copies,
    check_identity,
    check_labels,
    check_null,
    check_scale,
)
from fm_stages.studies.doctor.draws import histogram, judged_noise
from fm_stages.studies.doctor.lines import Line, judged, worst
from fm_stages.studies.doctor.machine import check_disk, check_folder, check_logger, check_memory, state_bytes
from fm_stages.studies.doctor.oracle import check_cost, check_stages
from fm_stages.studies.doctor.schedule import check_learning_rate, check_weights
from fm_stages.studies.facts import Facts
from fm_stages.training import FlowMatching

FINE = Facts(1000, 1000, 0, 64, 0, [], -1.0, 1.0, -0.4, 0.7, 10.0, 0.5, [-0.4, -0.4], [0.7, 0.6])


class TestText:
    def test_the_worst_fault_decides_and_brings_all_of_its_remedies(self):
        faults = [("yellow", True, "one"), ("red", True, "two"), ("red", True, "three"), ("red", False, "four")]
        assert judged("x", "y", *faults) == Line("x", "red", "y", "two three")
        assert judged("x", "y", faults[0], faults[3]) == Line("x", "yellow", "y", "one")
        assert judged("x", "y", faults[3]) == Line("x", "green", "y", "")

    def test_worst(self):
        assert worst([]) == "green"
        assert worst(["yellow", "green"]) == "yellow"
        assert worst(["yellow", "red", "green"]) == "red"

    def test_lines_are_wrapped_and_colour_is_for_terminals(self):
        text = Line("a name", "red", "word " * 60, "do " * 60).text()
        assert max(map(len, text.splitlines())) <= 110
        assert "-> do" in text
        assert "\033" not in text
        assert "\033[31mred" in Line("a", "red", "b").text(colour=True)

    def test_a_histogram_has_a_bar_for_each_bin(self):
        assert histogram(torch.tensor([0.0, 1.0, 4.0, 8.0])) == " ▁▄█"


class TestData:
    @pytest.mark.parametrize(
        ("check", "fields", "level"),
        [
            (check_scale, {}, "green"),
            (check_scale, {"std": 0.3}, "yellow"),
            (check_scale, {"std": 3.1}, "yellow"),
            (check_scale, {"std": 5.5}, "red"),
            (check_scale, {"std": 0.18}, "red"),
            (check_scale, {"mean": 2.0}, "red"),
            (check_scale, {"lowest": 0.0}, "red"),
            (check_channels, {}, "green"),
            (check_channels, {"channel_std": [0.2, 0.7]}, "yellow"),
            (check_channels, {"channel_std": [0.0, 0.7]}, "red"),
            (check_copies, {}, "green"),
            (check_copies, {"num_distinct": 999}, "yellow"),
            (check_copies, {"num_distinct": 899}, "red"),
            (check_constant, {}, "green"),
            (check_constant, {"num_constant": 1}, "yellow"),
            (check_constant, {"num_constant": 11}, "red"),
        ],
    )
    def test_facts(self, check, fields, level):
        assert check(replace(FINE, **fields)).level == level

    @pytest.mark.parametrize(
        ("dropout", "level", "words"),
        [
            (0.1, "green", "12,800 in all"),
            (0.0, "yellow", "never trained"),
            (1.0, "yellow", "No label is ever seen"),
            (0.005, "yellow", "0.1 is usual"),
            (0.7, "yellow", "0.1 is usual"),
        ],
    )
    def test_null_class(self, dropout, level, words):
        line = check_null(dropout, 128_000)
        assert line.level == level
        assert words in line.found + line.remedy

    @pytest.mark.parametrize(
        ("counts", "known", "level", "words"),
        [
            ({0: 5, 1: 5}, 2, "green", "2 classes of 5 to 5 rows"),
            ({0: 5, 1: 5}, None, "green", "an unknown number"),
            ({0: 5, 1: 5}, 4, "yellow", "2 classes of the network are never trained"),
            ({0: 9, 1: 1}, 2, "yellow", "Label 1 has a single row"),
            ({0: 10}, 2, "red", "No row has label 1"),
            ({}, 3, "yellow", "num_classes to 0"),
            ({}, 0, "green", "takes none"),
        ],
    )
    def test_classes(self, counts, known, level, words):
        run = SimpleNamespace(
            bank=SimpleNamespace(label_counts=counts),
            module=SimpleNamespace(label_dropout=0.1, network=SimpleNamespace(num_classes=known)),
            data=SimpleNamespace(num_classes=2, batch_size=4),
            max_steps=10,
        )
        line = next(iter(check_labels(run)))
        assert line.level == level
        assert words in line.found + line.remedy

    @pytest.mark.parametrize(("z", "level"), [(1.0, "green"), (4.0, "yellow"), (-6.0, "red")])
    def test_identity(self, monkeypatch, z, level):
        residual = torch.randn(512, generator=torch.Generator().manual_seed(0))
        residual = (residual - residual.mean()) / residual.std() + z / 512**0.5
        ones = torch.ones(512)
        parts = Decomposition(*[ones] * 5, residual, *[ones] * 4)
        monkeypatch.setattr(doctor_data, "decompose", lambda *args: parts)
        batch = {"x1": torch.zeros(600, 1, 2, 2), "labels": torch.zeros(600, dtype=torch.int64)}
        module = SimpleNamespace(path=SimpleNamespace(max_time=1.0), label_dropout=0.1)
        line = check_identity(SimpleNamespace(batches=lambda: iter([batch]), oracle=None, module=module))
        assert line.level == level
        assert f"z = {z:.1f}" in line.found


class TestNoise:
    RUN = SimpleNamespace(num_ranks=2, accumulation=1)

    def line(self, change=lambda x: x, rows=None, places=None) -> Line:
        noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        own = torch.arange(64)
        return judged_noise(change(noise), own if rows is None else rows, own if places is None else places, self.RUN)

    def test_levels(self):
        half = torch.arange(64) % 32
        assert self.line().level == "green"
        assert "same noise" in self.line(lambda x: x[torch.arange(64) % 32]).remedy
        assert "dealt the same images" in self.line(rows=half).remedy
        assert "same position" in self.line(places=half).remedy
        assert "not N(0, 1)" in self.line(lambda x: 2 * x).remedy
        assert "not N(0, 1)" in self.line(lambda x: x + 0.5).remedy


class TestSchedule:
    @pytest.mark.parametrize(
        ("arguments", "level"),
        [
            ((1e-3, "AdamW", 100, 1000), "green"),
            ((1e-3, "AdamW", 300, 1000), "yellow"),
            ((1e-3, "AdamW", 1000, 1000), "red"),
            ((0.0, "AdamW", 0, 1000), "red"),
            ((1e-3, "AdamW", 0, float("inf")), "yellow"),
        ],
    )
    def test_learning_rate(self, arguments, level):
        assert check_learning_rate(*arguments).level == level

    @pytest.mark.parametrize(
        ("decay", "steps", "level", "words"),
        [
            (0.0, 1000, "yellow", "raw"),
            (0.5, 1000, "yellow", "hardly an average"),
            (0.9999, 1000, "green", "112 steps at the end"),  # (10 + 1000) / 9
            (0.999, 100_000, "green", "back over some 1,000 steps"),
            (1.0, 1000, "green", "inf"),
        ],
    )
    def test_weights(self, decay, steps, level, words):
        line = check_weights(decay, steps)
        assert line.level == level
        assert words in line.found + line.remedy


class TestMachine:
    @pytest.mark.parametrize(("free", "level"), [(1000, "green"), (330, "yellow"), (299, "red")])
    def test_disk(self, tmp_path, free, level):
        assert check_disk(100, 3, free, tmp_path / "a/b").level == level

    def test_folder(self, tmp_path):
        run = tmp_path / "run"
        assert check_folder(run, None).level == "green"
        (run / "checkpoints").mkdir(parents=True)
        assert check_folder(run, None).level == "green"
        last = run / "checkpoints/last.ckpt"
        last.touch()
        assert check_folder(run, None).level == "yellow"
        assert check_folder(run, str(last)).level == "green"
        assert check_folder(run, str(tmp_path / "other.ckpt")).level == "yellow"
        assert check_folder(last, None).level == "red"

    def test_wandb_without_login_without_network_and_with_both(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("WANDB_MODE")
        wandb = ["lightning.pytorch.loggers.WandbLogger"]
        assert "no login" in check_logger(wandb).found
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)

        def refuse(*args, **kwargs):
            raise OSError

        monkeypatch.setattr(socket, "create_connection", refuse)
        line = check_logger(wandb)
        assert "cannot be reached" in line.found
        assert line.level == "yellow"
        assert "WANDB_MODE" not in os.environ
        monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: SimpleNamespace(close=lambda: None))
        assert check_logger(wandb) == Line("logger", "green", "wandb, online")
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert check_logger(wandb) == Line("logger", "green", "wandb, offline, by WANDB_MODE")

    def memory(self, gpu_bytes, monkeypatch=None, bank_bytes=1000) -> Line:
        module = FlowMatching(torch.nn.Linear(10, 10, bias=False), ema_decay=0)  # 400 bytes of weights

        def plan(memory, num_ranks):
            if bank_bytes > memory:
                raise MemoryError("Take more ranks")
            return SimpleNamespace(sharded=False, bytes_per_rank=bank_bytes)

        data = SimpleNamespace(plan_bank=plan)
        return check_memory(SimpleNamespace(module=module, data=data, num_ranks=1, accelerator="auto"), gpu_bytes)

    def test_memory(self):
        # weights and gradients 800, AdamW 800 and its count of 4 bytes
        assert self.memory(10_000).level == "green"
        assert self.memory(2605).level == "yellow"
        assert self.memory(2603).level == "red"
        assert self.memory(999) == Line("memory", "red", "the bank does not fit a GPU of 1.0 KiB", "Take more ranks.")
        line = self.memory(None)
        assert line.level == "green"
        assert "no GPU here, 2.5 KiB would be needed" in line.found

    def test_a_cpu_that_is_too_small(self, monkeypatch):
        monkeypatch.setattr(doctor_machine, "available_memory_bytes", lambda: 100)
        assert self.memory(None).level == "yellow"

    def test_state_of_other_optimizers(self):
        network = torch.nn.Linear(10, 10, bias=False)

        class Reads(torch.optim.SGD):
            def step(self, closure=None):
                self.param_groups[0]["params"][0].sum().item()

        for optimizer, expected in (
            (lambda p: torch.optim.SGD(p, lr=1), 0),
            (lambda p: torch.optim.SGD(p, lr=1, momentum=0.9), 400),
            (lambda p: torch.optim.Adam(p, lr=1), 804),
            (lambda p: Reads(p, lr=1), 800),
        ):
            assert state_bytes(FlowMatching(network, optimizer=optimizer)) == expected


class TestOracle:
    @pytest.mark.parametrize(
        ("boundary", "policies", "level"), [(0.3, [], "green"), (1.0, [], "yellow"), (0.0, ["one"], "red")]
    )
    def test_stages(self, profile_of, boundary, policies, level):
        config = SimpleNamespace(monitor=SimpleNamespace(profile=None))
        run = SimpleNamespace(config=config, callback=lambda kind: SimpleNamespace(policies=policies))
        assert check_stages(run, profile_of(boundary)).level == level

    @pytest.mark.parametrize(
        ("needs_oracle", "every", "level"), [(False, 10, "green"), (False, 3, "yellow"), (True, 10, "yellow")]
    )
    def test_cost(self, monkeypatch, needs_oracle, every, level):
        from fm_stages.oracle import DataBank

        x1 = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr("fm_stages.studies.doctor.oracle.step_flops", lambda *args: 4 * 8 * 50 * 4)
        seen = dict.fromkeys(("x1", "x_t", "t", "labels"), x1[:8])
        run = SimpleNamespace(
            bank=DataBank(x1),
            first_batch=lambda: seen,
            module=SimpleNamespace(label_dropout=0.1, target=SimpleNamespace(needs_oracle=needs_oracle)),
            callback=lambda kind: SimpleNamespace(every_n_steps=every),
            num_ranks=1,
            accumulation=1,
        )
        line = check_cost(run)
        assert line.level == level
        assert f"at most {1 if needs_oracle else 1 / every:.2%} of the run" in line.found
