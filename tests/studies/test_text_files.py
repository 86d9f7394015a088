"""JSON that every reader takes, and files that are whole."""

import json
import math
from pathlib import Path

import pytest

from fm_stages.studies.text_files import write_json, write_text


def test_what_was_not_measured_is_null(tmp_path):
    write_json(tmp_path / "new" / "numbers.json", {"a": [1.5, math.nan], 3: (math.inf, None, "nan", True)})
    text = (tmp_path / "new" / "numbers.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None], "3": [None, None, "nan", True]}
    assert text.endswith("}\n")


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "numbers.json"
    write_text(file, "old")
    monkeypatch.setattr(Path, "write_text", lambda self, text: self.write_bytes(text[:2].encode()) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
