"""Pictures during training on two ranks that share a bank: no rank waits for ever, and training does not notice."""

from pathlib import Path

import pytest
import torch

from fm_stages.data import Digits
from fm_stages.flow import LinearPath
from fm_stages.networks import DiT
from fm_stages.oracle import Oracle, StageProfile
from fm_stages.training import predict_data

SCRIPT = Path(__file__).parent / "pictures_on_ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pictures_on_ranks")


@pytest.fixture(scope="module")
def ranks(launch, folder) -> list[dict]:
    return launch(SCRIPT, folder, 2, "cpu")


def test_weights_are_those_of_a_run_without(ranks):
    for rank in ranks:
        assert rank["weights"].keys() == rank["plain"].keys()
        assert all(torch.equal(x, rank["plain"][name]) for name, x in rank["weights"].items())


def test_one_rank_writes_them(ranks, folder):
    names = ("raw", "raw_guided", "ema", "ema_guided", "predictions")
    expected = {f"{name}_000000{step}.png" for name in names for step in (2, 4)}
    assert {path.name for path in (folder / "pictures/samples").glob("*.png")} == expected
    assert not (folder / "plain/samples").exists()


def test_a_shared_bank_predicts_what_a_whole_one_does(ranks):
    data = Digits()
    data.setup()
    network = DiT(8, 4, 1, 16, 1, 2, 10).eval()
    for rank in ranks:
        prefix = "network."
        network.load_state_dict({k.removeprefix(prefix): x for k, x in rank["weights"].items() if k.startswith(prefix)})
        profile = StageProfile.from_json(rank["profile"])
        expected = predict_data({"raw": network}, Oracle(data.bank(), LinearPath()), profile, num_draws=3)
        found = rank["found"]
        assert found.t == expected.t
        assert torch.equal(found.x_t, expected.x_t)
        assert torch.equal(found.labels, expected.labels)
        torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.predicted["raw"], expected.predicted["raw"], rtol=0, atol=1e-5)


def test_ranks_show_rows_alike_where_one_cannot_decode_them(ranks):
    for rank in ranks:
        assert "first three of 4 channels" in rank["note"]
