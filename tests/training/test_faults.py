"""What must not stop a run, on two ranks: loggers that fail, a disk that is full; and what stops all ranks together."""

import re
from pathlib import Path

import pytest
import torch

from fm_stages.training import read_checkpoint


@pytest.mark.slow  # five runs on two ranks
def test_two_ranks(launch, tmp_path):
    ranks = launch(Path(__file__).with_name("faulty_ranks.py"), tmp_path, 2, "cpu")
    whole = ranks[0]["whole"]["weights"]
    for seen in ranks:
        for run in ("whole", "logger", "tables"):
            assert seen[run]["status"] == 0, run
            assert all(torch.equal(x, seen[run]["weights"][name]) for name, x in whole.items()), run
        assert seen["whole"]["warnings"] == []
        assert seen["checkpoint"]["status"] == 74
    (of_logger,) = ranks[0]["logger"]["warnings"]
    assert re.match(r"MetricsTable\.\w+ failed \(RuntimeError: the service is gone\)\. Training goes on", of_logger)
    of_files = [text for text in ranks[0]["tables"]["warnings"] if "checkpoint that cannot be written" in text]
    assert len(of_files) == 1
    assert "File too large" in of_files[0]
    assert ranks[1]["logger"]["warnings"] == ranks[1]["tables"]["warnings"] == []
    folder = tmp_path / "checkpoint/checkpoints"
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 4
    assert not list(tmp_path.rglob("*.part"))
