"""What killed processes leave behind goes; what others are writing stays."""

import os
import subprocess
import sys

from fm_stages.data import remove_parts, whole_file


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
