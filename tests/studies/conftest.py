"""A profile made by hand, and a checkpoint as fit leaves it, of a small network with random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from fm_stages.networks import DiT
from fm_stages.oracle import StageCurves, StageProfile
from fm_stages.training import CONFIG_KEY

SIZES = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}


def made_profile(boundary: float = 0.1, navigation_end: float = 0.1, **fields) -> StageProfile:
    """Floor 1 - t with an error of 0.01, at 101 times; labels in nine of ten draws."""
    t = [i / 100 for i in range(101)]
    flat = [0.01] * len(t)
    curves = {name: [0.5] * len(t) for name in ("top1", "top1_median", "ess", "entropy", "own")}
    curves |= {"floor": [1 - x for x in t], "sem": dict.fromkeys((*curves, "floor"), flat)}
    times = {"navigation_end": navigation_end, "boundary": boundary, "refinement_complete": 0.95}
    curves |= {**times, "time_sem": dict.fromkeys(times, 0.002)}
    alone = StageCurves(**curves)
    return StageProfile(
        **{
            **curves,
            **{"t": t, "num_rows": 1000, "num_distinct": 1000, "num_dims": 16, "rms_norm": 4.0, "num_queries": 64},
            **{"label_dropout": 0.1, "path": "LinearPath", "unconditional": alone, "conditional": alone},
            **{"guidance": [0.2 * (1 - x) for x in t], "guidance_sem": flat},
            **fields,
        }
    )


@pytest.fixture(scope="session")
def profile_of() -> Callable[..., StageProfile]:
    return made_profile


def make_network(seed: int, num_classes: int = 10) -> DiT:
    """Its velocity is far from zero, and depends on the label."""
    network = DiT(**SIZES, num_classes=num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return network.eval()


def save_checkpoint(
    file: Path, ema: bool = True, num_classes: int = 10, data: bool = True, seeds: tuple[int, int] = (1, 2), **model
) -> Path:
    """Of the digits; raw and EMA weights by their seeds; fields of section ``model`` may be given."""
    sizes = {**SIZES, "num_classes": num_classes}
    network = {"class_path": "fm_stages.networks.DiT", "init_args": sizes}
    config: dict = {"model": {"network": network, **model}}
    if data:
        config["data"] = {"class_path": "fm_stages.data.Digits"}
    kinds = {"network.": seeds[0], **({"network_ema.": seeds[1]} if ema else {})}
    state = {
        f"{prefix}{name}": weight
        for prefix, seed in kinds.items()
        for name, weight in make_network(seed, num_classes).state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": 7, CONFIG_KEY: yaml.safe_dump(config)}, file)
    return file


@pytest.fixture(scope="session")
def random_network() -> Callable[..., DiT]:
    return make_network


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    return save_checkpoint
