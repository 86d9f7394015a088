"""Is encoding a data set bound by the VAE?

A is what `fm-stages encode` does on one rank: image files read and decoded, cut, encoded with their flips, draws made,
shards written. B is the VAE alone on the same pixels in memory, in batches of the same size. The VAE has the size of
Stable Diffusion's (34 million weights in its encoder), with random weights; the files are PNG and JPEG of 320x240
pixels, written for this run. The table has the throughput of A over that of B.

With one thread of torch the time is that of the processor, decoding threads included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import alternate, machine, parser, positive, spread, table

from fm_stages.data import (
    VAE,
    Encoder,
    Encoding,
    list_images,
    list_of_sources,
    open_folder,
    planned_index,
    to_model_range,
    write_shard,
)


def random_vae(device: str) -> VAE:
    """Of the architecture of Stable Diffusion's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    model = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    return VAE(model, "random", device=device)


def write_images(folder: Path, num: int) -> None:
    """Smooth pictures with some noise, half of them PNG and half JPEG."""
    draws = np.random.default_rng(0)
    folder.mkdir()
    for i in range(num):
        smooth = Image.fromarray(draws.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((320, 240))
        pixels = np.clip(np.asarray(smooth, dtype=np.int16) + draws.integers(-9, 10, (240, 320, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:05d}.{('png', 'jpg')[i % 2]}")


def main() -> None:
    options = parser(__doc__, rounds=5, of_what="pairs")
    options.add_argument("--num", type=positive, default=16, help="images (default: 16)")
    options.add_argument("--image_size", type=positive, default=64)
    options.add_argument("--batch_size", type=positive, default=8)
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    vae, encoding = random_vae(chosen.device), Encoding(chosen.image_size)
    with tempfile.TemporaryDirectory() as place:
        write_images(Path(place, "images"), chosen.num)
        images, out = list_images(Path(place, "images")), Path(place, "out")
        out.mkdir()
        content, sources = list_of_sources(images.folder, images.files)
        wanted = planned_index(images, sources, vae, encoding, max(chosen.num // 2, 1))
        index = open_folder(out, wanted, content, shard_rows_given=True)
        encoder = Encoder(vae, images, index, encoding, chosen.batch_size)
        pixels = torch.stack([encoder._pixels_of(i)[0] for i in range(chosen.num)])
        batches = [to_model_range(batch).to(vae.device) for batch in pixels.split(chosen.batch_size)]

        def whole() -> None:
            for number, tensors in encoder.shards(list(range(index.num_shards)), lambda _: None):
                write_shard(out, index, number, tensors)

        def bare() -> None:
            for batch in batches:
                vae.moments(batch), vae.moments(batch.flip(-1))

        pairs = alternate({"": (whole, bare)}, chosen.rounds, chosen.device)[""]
    per_sec = [chosen.num / time for time in sorted(pairs.a)]
    print(f"{chosen.num} images of {chosen.image_size}x{chosen.image_size} and their flips; {machine(chosen.device)}\n")
    cells = [f"{per_sec[len(per_sec) // 2]:.3g}", *spread(pairs.ratios, ".3f"), ">= 0.95"]
    print(table(["images/s", "of the bare VAE's throughput", "min - max", "goal"], [cells]))


if __name__ == "__main__":
    main()
