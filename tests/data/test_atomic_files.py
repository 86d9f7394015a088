"""What killed processes leave behind goes; what others are writing stays."""

import os
import subprocess
import sys

import pytest

from fm_stages.data import remove_parts, whole_file, whole_folder


def test_parts_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for writer in (dead.pid, os.getpid(), os.getppid(), 10**30):
        (tmp_path / f"table.csv.{writer}.part").touch()
    for name in ("table.csv", "mine.part", "table.csv.part"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    left = {"table.csv", "mine.part", "table.csv.part", f"table.csv.{os.getppid()}.part"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_what_is_being_written_has_such_a_name(tmp_path):
    with whole_file(tmp_path / "table.csv") as part:
        part.touch()
        remove_parts(tmp_path)
        assert not part.exists()  # this process begins anew: it has written nothing yet
        part.touch()
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_no_folder_has_no_parts(tmp_path):
    remove_parts(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_there_as_a_whole_and_nothing_stays_of_what_was_killed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    others = [f".other.{dead.pid}.part", f".model.{os.getppid()}.part", ".model.mine.part"]
    for name in (f".model.{dead.pid}.part", *others):
        (tmp_path / name / "inside").mkdir(parents=True)
    with whole_folder(tmp_path / "model") as part:
        (part / "network").mkdir(parents=True)
        assert not (tmp_path / "model").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model", *others])
    assert (tmp_path / "model/network").is_dir()


def test_nothing_stays_of_a_folder_that_failed(tmp_path):
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "model") as part:
        [(part / "network").mkdir(parents=True) for _ in range(2)]
    assert not list(tmp_path.iterdir())
