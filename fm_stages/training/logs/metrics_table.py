"""The table of logged numbers that goes on when a run does, with no row twice and none lost."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from fm_stages.data import whole_file


class MetricsTable(CSVLogger):
    """`CSVLogger`, whose ``metrics.csv`` a resumed run goes on with: see `Continuity`, which tells it where.

    A fresh start begins a folder of its own, ``version_0``, ``version_1``, ..., unless ``version`` names one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._named = self._version is not None

    @property
    @rank_zero_experiment
    def experiment(self) -> _Rows:
        """What is written, on rank 0."""
        if not isinstance(self._experiment, _Rows):
            self._experiment = _Rows(self)
        return self._experiment

    def place(self) -> dict[str, Any]:
        """The version, and how many rows it has so far, after writing them all; on rank 0."""
        self.save()
        rows: Any = self.experiment
        return {"version": self.version, "num_rows": rows.num_rows if isinstance(rows, _Rows) else 0}  # it may fail

    def go_on(self, place: dict[str, Any]) -> None:
        """Go on from `place`, and forget what was logged after it; before anything is written, on rank 0.

        Where that table is not there, or another version was asked for, a new one is begun.
        """
        version, is_there = place["version"], self._file_of(place["version"]).is_file()
        if (self._named and self._version != version) or (place["num_rows"] and not is_there):
            return
        self._version = version
        self.experiment.cut(place["num_rows"])

    def _file_of(self, version: int | str) -> Path:
        folder = version if isinstance(version, str) else f"version_{version}"
        return Path(self.root_dir) / folder / ExperimentWriter.NAME_METRICS_FILE


class _Rows(ExperimentWriter):
    """Writes rows. Its folder is looked up when it is needed: Lightning makes this before anybody can say `go_on`."""

    def __init__(self, table: MetricsTable) -> None:
        self.metrics: list[dict[str, float]] = []
        self.metrics_keys: list[str] = []
        self.hparams: dict[str, Any] = {}
        self.num_rows = 0
        self._table, self._fs = table, get_filesystem(table.save_dir)
        self._torn = False  # whether there may be a part of a row at the end, for the disk was full

    @property
    def log_dir(self) -> str:  # type: ignore[override]
        """Where the table lies; made where it is not there."""
        Path(self._table.log_dir).mkdir(parents=True, exist_ok=True)
        return self._table.log_dir

    @property
    def metrics_file_path(self) -> str:  # type: ignore[override]
        return str(Path(self.log_dir) / self.NAME_METRICS_FILE)

    def save(self) -> None:
        """Append what is new; whatever a fresh start finds in its place goes."""
        if not self.num_rows and self.metrics:
            Path(self.metrics_file_path).unlink(missing_ok=True)
        if self._torn:
            self._write(self._read()[: self.num_rows])
        num_new, self._torn = len(self.metrics), True
        super().save()
        self._torn = False
        self.num_rows += num_new

    def cut(self, num_rows: int) -> None:
        """Keep the first rows, and the columns that they use; a last line that is cut short is not among them."""
        rows = self._read()[:num_rows]
        self.metrics_keys = sorted({key for row in rows for key, value in row.items() if value})
        self.num_rows = len(rows)
        self._write(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """The same with more columns; whole whenever the run is killed."""
        self._write(self._read())

    def _read(self) -> list[dict[str, str]]:
        file = Path(self.metrics_file_path)
        if not file.exists():
            return []
        with file.open(newline="") as text:
            return list(csv.DictReader(text))

    def _write(self, rows: list[dict[str, str]]) -> None:
        with whole_file(Path(self.metrics_file_path)) as part, part.open("w", newline="") as text:
            writer = csv.DictWriter(text, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
