"""Text, JSON and tables of a study as files, each there as a whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fm_stages.data import whole_file


def write_text(path: Path, text: str) -> None:
    """Write a text file, and the folder that it lies in."""
    with whole_file(path) as part:
        part.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write nested numbers and text as JSON, which knows no NaN: null stands for what was not measured."""
    write_text(path, json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table."""
    with whole_file(path) as part, part.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def without_nan(value: Any) -> Any:
    """Nested numbers with None in place of those that are not finite."""
    if isinstance(value, dict):
        return {str(key): without_nan(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
