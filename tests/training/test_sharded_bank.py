"""Training on two ranks that share a bank, under DDP and FSDP2, against training with a copy of it on each."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parent / "sharded_bank.py"


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runs(request, launch, tmp_path_factory) -> list[dict]:
    """By rank, and there by (strategy, whether the bank was sharded)."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    return launch(SCRIPT, tmp_path_factory.mktemp("sharded_bank"), 2, request.param)


def flattened(fields: dict) -> dict:
    """Nested fields by name.name."""
    found = {}
    for name, x in fields.items():
        inner = flattened(x) if isinstance(x, dict) else {"": x}
        found |= {f"{name}.{key}".rstrip("."): value for key, value in inner.items()}
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
class TestSharded:
    def test_bank_is_shared_out(self, runs, strategy):
        assert [run[strategy, True]["num_stored"] for run in runs] == [20, 70]
        assert [run[strategy, False]["num_stored"] for run in runs] == [90, 90]

    def test_same_losses(self, runs, strategy):
        for run in runs:
            assert len(run[strategy, True]["losses"]) == 6
            assert run[strategy, True]["losses"] == pytest.approx(run[strategy, False]["losses"], rel=1e-6)

    def test_same_losses_under_both_strategies(self, runs, strategy):
        for run in runs:
            assert run[strategy, True]["losses"] == pytest.approx(run["ddp", False]["losses"], rel=1e-5)

    def test_monitor_measures_the_same(self, runs, strategy):
        for run in runs:
            sharded, copied = run[strategy, True], run[strategy, False]
            ours, expected = (flattened(json.loads(each["profile"])) for each in (sharded, copied))
            assert ours.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, str | None):
                    assert ours[name] == value, name
                else:  # standard errors are small beside what they are of
                    assert ours[name] == pytest.approx(value, rel=1e-5, abs=2e-5 if "sem" in name else 1e-12), name
            for table in ("table", "held out", "probe"):
                names, rows = copied[table]
                assert sharded[table][0] == names
                assert any(row[names.index("count")] for row in rows)
                ours, rows = (np.array(each, dtype=float) for each in (sharded[table][1], rows))
                np.testing.assert_allclose(ours, rows, rtol=2e-5, atol=1e-5)

    def test_ranks_agree(self, runs, strategy):
        for name in ("profile", "table", "held out", "probe"):
            assert str(runs[0][strategy, True][name]) == str(runs[1][strategy, True][name])


def test_ranks_with_unlike_memory_make_one_plan(runs):
    assert [run.get("planned", True) for run in runs] == [True, True]
