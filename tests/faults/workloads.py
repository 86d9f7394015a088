"""The commands that are killed: each a few seconds of work whose result is promised bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tests.end_to_end.pictures import write_pictures
from tests.end_to_end.processes import Command

HERE = Path(__file__).parent
SIDE = 16


@dataclass(frozen=True)
class Workload:
    """A command of ``fm-stages``.

    Attributes:
        name: for the table.
        words: its arguments, given the folder that it is to fill.
        ranks: how many it is started on.
    """

    name: str
    words: Callable[[Path], list[object]]
    ranks: int = 1


class Workloads:
    """All of them, and what they read.

    Args:
        folder: for what they read; `make` fills it.
    """

    def __init__(self, folder: Path) -> None:
        self.images, self.vae, self.arms = folder / "images", folder / "vae", folder / "arms.yaml"
        self.checkpoint = folder / "trained" / "checkpoints" / "last.ckpt"
        self.trained, self.features = folder / "trained", folder / "features.safetensors"
        self.fit = Workload("fit", lambda out: fit_words(out))
        self.fit_ddp = Workload("fit, 2 ranks, a bank on each", lambda out: fit_words(out, "--trainer.devices", 2), 2)
        sharded = ("--trainer.devices", 2, "--data.init_args.shard_bank", "true", "--monitor.every_n_steps", 1)
        self.fit_sharded = Workload("fit, 2 ranks, sharded bank", lambda out: fit_words(out, *sharded), 2)
        self.encode = Workload("encode", self._encode)
        self.encode_ranks = Workload("encode, 2 ranks", self._encode, 2)
        # drawn one by one an image does not depend on which others were missing
        pictures = ("--num", 160, "--num_steps", 20, "--batch_size", 1)
        self.sample = Workload("sample, PNG", lambda out: self._sample(out, *pictures))
        # whole shards are drawn again, in the same batches
        shards = ("--num", 2048, "--num_steps", 20, "--batch_size", 16, "--format", "safetensors")
        self.sample_ranks = Workload("sample, shards, 2 ranks", lambda out: self._sample(out, *shards), 2)
        npz = ("--num", 1024, "--num_steps", 20, "--batch_size", 16, "--format", "npz")
        self.sample_npz = Workload("sample, one npz", lambda out: self._sample(out, *npz))
        self.compare = Workload("compare", self._compare)
        self.profile = Workload("profile", lambda out: ["profile", "--data", "Digits", "--out", out])
        self.evaluate = Workload("evaluate", self._evaluate)

    def make(self, log: Path) -> None:
        """Write the pictures, a VAE of random weights, a trained network, a feature extractor and the arms."""
        write_pictures(self.images, 240, SIDE, seed=0)
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[16, 16],
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=SIDE,
        ).save_pretrained(self.vae)
        self.arms.write_text("plain: {}\nslow: {model: {optimizer: {init_args: {lr: 1.0e-4}}}}\n")
        features = ["features", "--data", "Digits", "--num_epochs", 1, "--out", self.features]
        made = [Command(*words, ranks=1, log=log) for words in (fit_words(self.trained), features)]
        if any([command.finish() for command in made]):
            raise RuntimeError(f"what the commands read cannot be made: {log}")

    def _encode(self, out: Path) -> list[object]:
        words = ["encode", "--data", self.images, "--vae", self.vae, "--out", out, "--image_size", SIDE]
        return [*words, "--shard_rows", 8, "--batch_size", 4]

    def _sample(self, out: Path, *options: object) -> list[object]:
        return ["sample", "--ckpt", self.checkpoint, "--out", out, *options]

    def _compare(self, out: Path) -> list[object]:
        words = ["compare", "--config", HERE / "fit.yaml", HERE / "short.yaml", "--arms", self.arms, "--seeds", 1]
        small = ("--num_probe", 64, "--num_samples", 32, "--solver_steps", 4, "--milestones", 2)
        return [*words, "--out", out, *small]

    def _evaluate(self, out: Path) -> list[object]:
        small = ("--num", 96, "--num_steps", 4, "--num_memorization", 32, "--batch_size", 32)
        return ["evaluate", "--ckpt", self.checkpoint, "--features", self.features, "--out", out, *small]


def fit_words(out: Path, *options: object) -> list[object]:
    """Training into a folder, from its last checkpoint on if there is one."""
    words = ["fit", "--config", HERE / "fit.yaml", "--trainer.default_root_dir", out, "--ckpt_path", "last"]
    return [*words, *options]
