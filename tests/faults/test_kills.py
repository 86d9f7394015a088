"""The short form of the kill test, and that it would notice what it looks for."""

from pathlib import Path

import pytest
import torch

from tests.faults.kills import Attack, Killing, in_collective, table, writes_checkpoint
from tests.faults.outcomes import differences
from tests.faults.phases import COLLECTIVE, START, TRAINING, WRITING, phase_of
from tests.faults.workloads import HERE, Workload, fit_words

SHORT = ("--config", HERE / "short.yaml")
SHARDED = ("--trainer.devices", 2, "--data.init_args.shard_bank", "true", "--monitor.every_n_steps", 1)


@pytest.mark.timeout(900)
def test_a_short_run_ends_as_if_it_was_never_killed(tmp_path):
    fit = Workload("fit", lambda out: fit_words(out, *SHORT))
    survive(tmp_path, Attack(fit, 1), Attack(fit, 1, aim=writes_checkpoint, name="while it writes a checkpoint"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_short_runs_on_two_ranks_end_as_if_they_were_never_killed(tmp_path):
    fit = Workload("fit on 2 ranks", lambda out: fit_words(out, *SHORT, *SHARDED), 2)
    survive(tmp_path, Attack(fit, 1), Attack(fit, 1, aim=in_collective, name="inside the oracle's collective"))


def survive(folder: Path, *attacks: Attack) -> None:
    killing = Killing(folder, seed=0, tell=print)
    tallies = {(attack.workload.name, attack.name): killing.attack(attack) for attack in attacks}
    print(table(tallies))
    assert [defect for tally in tallies.values() for defect in tally.defects] == []
    assert sum(tally.equal_kills for tally in tallies.values()) == len(attacks)


class TestDifferences:
    @pytest.fixture
    def folders(self, tmp_path) -> list[Path]:
        for name in ("one", "two"):
            folder = tmp_path / name / "checkpoints"
            folder.mkdir(parents=True)
            state = {"weights": torch.tensor([0.0, 1.0]), "time_elapsed": len(name), "path": f"{folder}/last.ckpt"}
            torch.save({"state_dict": state, "nothing": float("nan")}, folder / "last.ckpt")
            (folder.parent / "config.yaml").write_text(f"root: {folder.parent}\nckpt_path: {name}\n")
            (folder.parent / "table.csv").write_text("t,gap\n0.5,1.0\n")
            (folder.parent / "sampling.json").write_text('{"calls": [' + ", ".join(["1"] * len(name)) + '], "num": 1}')
        return [tmp_path / name for name in ("one", "two")]

    def test_seconds_and_the_folders_name_are_none(self, folders):
        (folders[1] / "sampling.json").write_text('{"calls": [], "num": 1}')
        assert differences(*folders) == []

    def test_a_bit_of_a_weight(self, folders):
        file = folders[1] / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(file)
        checkpoint["state_dict"]["weights"][0] = -0.0
        torch.save(checkpoint, file)
        assert differences(*folders) == ["checkpoints/last.ckpt: /state_dict/weights differs by up to 0.0"]

    def test_a_digit_of_a_table(self, folders):
        (folders[1] / "table.csv").write_text("t,gap\n0.5,1.1\n")
        (told,) = differences(*folders)
        assert told.startswith("table.csv: bytes differ (14 and 14), line 2 was '0.5,1.0' and is '0.5,1.1'")

    def test_files_that_are_missing_or_left(self, folders):
        (folders[0] / "table.csv").unlink()
        (folders[0] / "new.csv.17.part").touch()
        assert differences(*folders) == ["new.csv.17.part is missing", "table.csv is left over"]

    def test_a_number_of_a_record(self, folders):
        (folders[1] / "sampling.json").write_text('{"calls": [], "num": 2}')
        assert differences(*folders) == ["sampling.json: /num was '1' and is '2'"]


def test_phases_are_told_from_stacks():
    training = (
        'File "lightning/pytorch/loops/training_epoch_loop.py", line 1 in advance\nFile "fm_stages/cli.py" in main'
    )
    collective = f'File "fm_stages/oracle/ranks.py", line 3 in reduce\n{training}'
    writing = f'File "torch/serialization.py", line 3 in save\nFile "x.py", line 3 in save_checkpoint\n{training}'
    assert phase_of([]) == START
    assert phase_of([training]) == TRAINING
    assert phase_of([training, collective]) == COLLECTIVE
    assert phase_of([collective, writing]) == WRITING
