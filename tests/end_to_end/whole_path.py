"""One path from pictures on a disk to drawn ones, at size, killed on its way and taken up on other numbers of ranks.

    make test-path                                            20 000 pictures, half an hour on 2 cores
    python tests/end_to_end/whole_path.py --num 600 --folder runs/path

Prints what was run, how long it took and what was seen; ends with "N passed, N failed".
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open

from tests.end_to_end.pictures import NUM_CLASSES, write_pictures
from tests.end_to_end.processes import Command

SIDE = 32
STEPS = {"killed": 120, "on one rank": 200, "all": 300}
"""Optimizer steps at which the run is killed, ends on one rank, and ends on two."""


class WholePath:
    """The stages of the path, one method each, in one folder.

    Args:
        folder: new; everything goes there.
        num: pictures to encode, and to draw.
    """

    def __init__(self, folder: Path, num: int) -> None:
        self.folder, self.num = folder, num
        self.log = folder / "commands.log"
        self.images, self.vae, self.latents, self.run, self.whole, self.out = (
            folder / name for name in ("images", "vae", "latents", "run", "uninterrupted", "drawn")
        )
        self.passed = self.failed = 0

    def check(self, what: str, fine: bool, seen: object) -> None:
        """Say whether something is as it should be."""
        self.passed, self.failed = self.passed + fine, self.failed + (not fine)
        print(f"  {'passed' if fine else 'FAILED'}  {what}: {seen}", flush=True)

    def call(self, *arguments: object, ranks: int) -> None:
        """Run a command to its end, which has to be a good one."""
        start = time.monotonic()
        command = Command(*arguments, ranks=ranks, log=self.log)
        status = command.finish()
        self.check(f"{arguments[0]} on {ranks}", status == 0, f"status {status} after {time.monotonic() - start:.0f} s")
        if status:
            print("\n".join(self.log.read_text().splitlines()[-30:]))
            raise SystemExit(self.close())

    def make(self) -> None:
        """Pictures to train on, held-out ones, and a VAE of random weights with a narrow posterior."""
        write_pictures(self.images / "train", self.num, SIDE, seed=0)
        write_pictures(self.images / "val", max(self.num // 10, 2 * NUM_CLASSES), SIDE, seed=1)
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[8, 16, 16],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=SIDE,
        )
        with torch.no_grad():  # a narrow posterior, as of trained ones: else latents would be noise
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = -8
        vae.save_pretrained(self.vae)
        print(f"{self.num} pictures of {SIDE}x{SIDE}, a VAE of random weights", flush=True)

    def encode(self) -> None:
        """On two ranks; killed when a few shards are there, then continued."""
        words = ("encode", "--data", self.images, "--vae", self.vae, "--out", self.latents, "--image_size", SIDE)
        words = (*words, "--shard_rows", max(self.num // 20, 1), "--batch_size", 64)
        finished = (self.latents / "train").glob
        killed = Command(*words, ranks=2, log=self.log).kill_once(
            lambda: len(list(finished("latents_*.safetensors"))) >= 4
        )
        there = {file: file.stat().st_mtime_ns for file in finished("latents_*.safetensors")}
        self.check(
            "encode is killed in its midst", killed and 4 <= len(there) < 20, f"{len(there)} of 20 shards are there"
        )
        self.call(*words, ranks=2)
        kept = [file.stat().st_mtime_ns == written for file, written in there.items()]
        self.check("what was finished is not done again", all(kept), f"{sum(kept)} of {len(kept)} files are untouched")
        labels = []
        for file in sorted(finished("latents_*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                shapes = [shard.get_slice(name).get_shape() for name in ("latents", "latents_flip")]
                labels.append(shard.get_tensor("labels"))
            if shapes != [[len(labels[-1]), 4, SIDE // 4, SIDE // 4]] * 2:
                self.check("a shard's shape", False, shapes)
        counts = torch.cat(labels).bincount().tolist()
        self.check("every picture is encoded once", counts == [self.num // NUM_CLASSES] * NUM_CLASSES, counts)
        self.check("nothing half-written is left", not list(self.latents.rglob("*.part")), "no .part file")

    def profile(self) -> None:
        """Where the stages of the latents lie."""
        self.call("profile", "--data", self.latents / "train", "--out", self.folder / "profile", ranks=1)
        found = json.loads((self.folder / "profile" / "profile.json").read_text())
        self.check("the profile has a boundary", 0 < found["boundary"] < 1, f"t = {found['boundary']:.3f}")

    def fit(self) -> None:
        """On two ranks with a sharded bank, killed; then on one; then on two. Beside it, one that was never killed."""
        last = self.run / "checkpoints" / "last.ckpt"
        first = Command(*self.fitting(self.run, STEPS["all"], ranks=2), ranks=2, log=self.log)
        killed = first.kill_once(lambda: step_of(last) >= STEPS["killed"])
        at = step_of(last)
        self.check("fit is killed in its midst", killed and at < STEPS["on one rank"], f"last.ckpt is of step {at}")
        self.call(*self.fitting(self.run, STEPS["on one rank"], ranks=1), ranks=1)
        self.check("it goes on on one rank", step_of(last) == STEPS["on one rank"], f"step {at} to {step_of(last)}")
        self.call(*self.fitting(self.run, STEPS["all"], ranks=2), ranks=2)
        self.check("and on two again", step_of(last) == STEPS["all"], f"to step {step_of(last)}")
        self.call(*self.fitting(self.whole, STEPS["all"], ranks=2), ranks=2)
        for prefix in ("network.", "network_ema."):
            mine, theirs = (weights_of(run / "checkpoints" / "last.ckpt", prefix) for run in (self.run, self.whole))
            away = float((mine - theirs).norm() / theirs.norm())
            self.check(f"{prefix}* as of a run that was never killed", away < 1e-4, f"relative distance {away:.1e}")

    def fitting(self, run: Path, steps: int, ranks: int) -> tuple[object, ...]:
        """Words of the command that trains up to a step, from the last checkpoint on if there is one."""
        given = {
            "--config": Path(__file__).with_name("fit.yaml"),
            "--data.init_args.data_dir": self.latents / "train",
            "--data.init_args.val_dir": self.latents / "val",
            "--monitor.profile": self.folder / "profile" / "profile.json",
            "--trainer.default_root_dir": run,
            "--trainer.max_steps": steps,
            "--trainer.devices": ranks,
            "--ckpt_path": "last",
        }
        return ("fit", *(word for pair in given.items() for word in pair))

    def sample(self) -> None:
        """On two ranks, killed; continued on one and on two."""
        words = ("sample", "--ckpt", self.run / "checkpoints" / "last.ckpt", "--num", self.num, "--out", self.out)
        words = (*words, "--num_steps", 10, "--batch_size", 256)
        drawn = (self.out / "images").glob

        def there() -> int:
            return len(list(drawn("*.png")))

        killed = Command(*words, ranks=2, log=self.log).kill_once(lambda: there() >= self.num // 10)
        self.check("sample is killed in its midst", killed and there() < self.num, f"{there()} pictures are there")
        before = there()
        killed = Command(*words, ranks=1, log=self.log).kill_once(lambda: there() >= before + self.num // 10)
        self.check("it goes on on one rank", killed and there() > before, f"{there()} pictures are there")
        self.call(*words, ranks=2)
        files, kinds = list(drawn("*.png")), set()
        for file in files:
            with Image.open(file) as image:
                image.load()
                kinds.add((image.mode, *image.size))
        fine = len(files) == self.num and kinds == {("RGB", SIDE, SIDE)}
        self.check("all are drawn and can be read", fine, f"{len(files)} of {kinds}")

    def evaluate(self) -> None:
        """Of the checkpoint on two ranks and on one, and of the drawn files: the same pictures, so the same numbers."""
        features = self.folder / "features.safetensors"
        pictures = ("--data", "ImageFolder", "--data.data_dir", self.images / "train", "--data.image_size", SIDE)
        self.call("features", *pictures, "--num_epochs", 2, "--out", features, ranks=1)
        num, found = min(self.num, 2000), {}
        own = ("--ckpt", self.run / "checkpoints" / "last.ckpt", "--num_steps", 10)
        for name, ranks, place in (("two", 2, own), ("one", 1, own), ("files", 1, ("--samples", self.out))):
            out = self.folder / f"evaluation_{name}"
            words = ("--num", num, "--num_memorization", 200, "--batch_size", 256, "--out", out)
            self.call("evaluate", *place, "--features", features, *words, ranks=ranks)
            found[name] = json.loads((out / "evaluation.json").read_text())
        fids = {name: report["scores"]["fid"] for name, report in found.items()}
        for other, limit in (("one", 1e-6), ("files", 1e-2)):
            away = abs(fids[other] / fids["two"] - 1)
            self.check(f"FID of {other} as of two", away < limit, f"{fids[other]:.5f}, relative difference {away:.1e}")
        yardstick = found["two"]["yardstick"]["fid"]
        self.check("real pictures are nearer than drawn ones", yardstick < fids["two"], f"{yardstick:.3f}")
        copies = {name: one["copies"]["value"] for name, one in found["two"]["memorization"]["summaries"].items()}
        self.check("the memorizer copies, others do not", copies["memorizer"] > 0.9 > 0.1 > copies["fresh"], copies)

    def close(self) -> int:
        """The last line; the status to end with."""
        print(f"{self.passed} passed, {self.failed} failed")
        return int(self.failed > 0)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint; 0 where there is none that can be read."""
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (OSError, RuntimeError, EOFError, ValueError):
        return 0


def weights_of(checkpoint: Path, prefix: str) -> torch.Tensor:
    """All weights of a kind, one after the other, in float64."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return torch.cat([state[name].flatten().double() for name in sorted(state) if name.startswith(prefix)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=20_000, help="pictures to encode, and to draw")
    parser.add_argument("--folder", type=Path, default=None, help="where everything goes; default: a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fm-stages-path-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = WholePath(folder.resolve(), math.ceil(options.num / 200) * 200)
    start = time.monotonic()
    for stage in (path.make, path.encode, path.profile, path.fit, path.sample, path.evaluate):
        began = time.monotonic()
        stage()
        print(f"{stage.__name__}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"All in {(time.monotonic() - start) / 60:.1f} minutes.")
    status = path.close()
    if options.folder is None and not status:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
