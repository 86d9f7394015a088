"""What ``fm-stages sample`` left in a folder, read without the package, for the tests of it."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Written out, not by the package."""
    return ((images.double() + 1) * 127.5).round().clamp(0, 255)


def pngs(folder: str = "out") -> torch.Tensor:
    files = sorted(Path(folder, "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(len(files))]
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))[:, None]


def record(folder: str = "out") -> dict:
    return json.loads(Path(folder, "sampling.json").read_text())


def assert_same(found: torch.Tensor, images: torch.Tensor) -> None:
    """Equal, but for values that lie within the rounding of float32 of the middle between two pixels."""
    difference = (found.double() - images).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-3
