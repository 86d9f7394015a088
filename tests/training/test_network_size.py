"""Networks that are too large, or not those of the weights beside them: refused before they are built."""

import pytest
import torch

from fm_stages.networks import DiT
from fm_stages.training import check_network

SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}


def section(**changes):
    return {"class_path": "fm_stages.networks.DiT", "init_args": {**SIZES, "num_classes": 10, **changes}}


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 10**6}, {"hidden_size": 10**15}, {"depth": 10**9}, {"num_classes": 10**12}]
)
def test_sizes_beyond_memory(changes):
    """The depth alone takes seconds: its blocks are made one by one until they are too many."""
    with pytest.raises(ValueError, match=r"takes \d+ bytes or more, and .* GiB|more than 2\^63 bytes|more than 10000"):
        check_network(section(**changes))


def test_usual_sizes_pass_and_draw_nothing():
    state = torch.random.get_rng_state()
    check_network(section())
    check_network({"class_path": "fm_stages.networks.DiT_XL", "init_args": {
        "input_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000}})  # fmt: skip
    assert torch.random.get_rng_state().equal(state)


def test_weights_of_another_network():
    weights = DiT(**SIZES, num_classes=10).state_dict()
    check_network(section(), weights)
    for changes in ({"hidden_size": 64}, {"depth": 3}, {"depth": 1}, {"num_classes": 9}):
        with pytest.raises(ValueError, match="its weights are not those of the fm_stages.networks.DiT"):
            check_network(section(**changes), weights)
    with pytest.raises(ValueError, match=r"takes \d+ bytes or more, and the file holds \d+"):
        check_network(section(hidden_size=4096), weights)


def test_what_is_not_built_without_memory_is_left_to_be_built():
    check_network(section(patch_size=3))  # which it refuses itself
    check_network({"class_path": "tests.studies.planted.Straight"})  # one's own
    check_network("torch.nn.Identity")
