"""Pictures to train on, made by a formula: gratings of class-dependent direction under a disc, in two colours."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 10


def grating(generator: np.random.Generator, label: int, side: int) -> np.ndarray:
    """One picture, (side, side, 3) uint8."""
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    angle = math.pi * (label + generator.uniform(-0.3, 0.3)) / NUM_CLASSES
    across = generator.uniform(1, 3) * (x * math.cos(angle) + y * math.sin(angle))
    waves = np.sin(2 * math.pi * (across + generator.random()))
    centre, radius = generator.uniform(-0.3, 0.3, 2), generator.uniform(0.1, 0.3)
    disc = 1 / (1 + np.exp((np.hypot(x - centre[0], y - centre[1]) - radius) * side))
    colours = generator.uniform(0, 255, (3, 3))
    share = (0.5 + 0.5 * waves)[..., None]
    picture = share * colours[0] + (1 - share) * colours[1]
    return (picture + disc[..., None] * (colours[2] - picture)).clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, num: int, side: int, seed: int) -> None:
    """``num`` pictures in class folders, as PNG; each depends on seed and number alone."""
    for label in range(NUM_CLASSES):
        (folder / f"class_{label}").mkdir(parents=True)

    def write(number: int) -> None:
        label = number % NUM_CLASSES
        picture = grating(np.random.default_rng((seed, number)), label, side)
        Image.fromarray(picture).save(folder / f"class_{label}" / f"{number:06d}.png", compress_level=1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(num)))
