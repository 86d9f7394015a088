"""The runs behind docs/reading.md: a healthy one, and each fault that the page describes, really made.

    python benchmarks/reading_guide.py                  # all cases, then docs/images/reading
    python benchmarks/reading_guide.py overfit          # one of them (overfit, scale, time, null: after `healthy`)

Each case prints the commands that it runs, as a person would type them; the faults are the classes below, or an option
of a command that is given wrongly. Data are the 1438 digits of the demo, seeds are fixed. No training takes longer
than the demo's, 3 minutes on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fm_stages import plots
from fm_stages.data import Digits
from fm_stages.flow import Guidance, LinearPath, sample
from fm_stages.networks import DiT
from fm_stages.oracle import nearest_rows
from fm_stages.studies.convert.weights import reverse_time
from fm_stages.studies.diagnose.measure import diagnose as measure
from fm_stages.studies.models import load_trained
from fm_stages.studies.text_files import write_json
from fm_stages.training import OracleMonitor, allow_imports, network_weights, read_checkpoint, save_grid

ROOT = Path(__file__).parents[1]
CONFIG = "configs/digits_dit.yaml"
FEW = 128
"""Training images of the overfit case."""

SHORTER = ("--trainer.max_steps", 700)
"""Half of the demo is enough to see these faults."""

GUIDANCE = 1, 4, 8
"""Guidance scales of the drawn digits; 1 is none."""

OWN = ("--allow-import", "reading_guide")
"""For configurations and checkpoints that name a class of this file."""

UNSCALED = 7.3
"""Times the digits' standard deviation of 0.75: 5.5, that of SD-VAE's latents before they are multiplied by 0.18215."""


class FewDigits(Digits):
    """The first digits alone; the held-out ones are all there."""

    def read(self):
        splits = super().read()
        return splits._replace(train_images=splits.train_images[:FEW], train_labels=splits.train_labels[:FEW])


class UnscaledDigits(Digits):
    """The fault: data at the scale of a VAE's raw output, which nobody multiplied by the scaling factor."""

    def open(self):
        opened = super().open()
        for rows in (opened.train, opened.val):
            rows.scale, rows.shift = rows.scale * UNSCALED, rows.shift * UNSCALED
        return opened

    def to_pixels(self, images: Tensor) -> Tensor:
        return super().to_pixels(images / UNSCALED)


class ReversedStep(L.LightningModule):
    """The fault: a training step of a project where t = 0 is data, under a monitor that is not told."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.label_dropout = LinearPath(), 0.0
        self.network = DiT(8, 2, 1, 32, 1, 2, 10)

    def training_step(self, batch, batch_idx):
        x1, y = batch["x1"], batch["labels"]
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        x_t = (1 - t.view(-1, 1, 1, 1)) * x1 + t.view(-1, 1, 1, 1) * x0
        v = self.network(x_t, t, y)
        loss = (v - (x0 - x1)).square().mean()
        return {"loss": loss, "x0": x0, "x1": x1, "x_t": x_t, "t": t, "prediction": v.detach(), "labels": y}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def command(*arguments: object) -> None:
    """Run ``fm-stages`` with the classes of this file in reach."""
    words = [str(word) for word in arguments]
    print(f"\n$ fm-stages {shlex.join(words)}", flush=True)
    places = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run([sys.executable, "-m", "fm_stages", *words], cwd=ROOT, env=env, check=True)


def fit(folder: Path, *options: object) -> None:
    """The demo with other options; `checkpoints/last.ckpt` and figures in the folder."""
    often = ("--trainer.val_check_interval", 100, "--trainer.logger", "CSVLogger")
    command("fit", "--config", CONFIG, *often, "--trainer.default_root_dir", folder, *options)


def last(folder: Path) -> Path:
    return folder / "checkpoints/last.ckpt"


def diagnose(checkpoint: Path, out: Path, *options: object) -> None:
    command("diagnose", "--ckpt", checkpoint, "--out", out / "diagnose", "--num_samples", 1438, *options)


def healthy(out: Path) -> None:
    """The demo as it ships."""
    fit(out / "healthy")
    diagnose(last(out / "healthy"), out / "healthy")


def underfit(out: Path) -> None:
    """A network too small: 16 channels in place of 128."""
    network = "--model.network.init_args"
    fit(out / "underfit", f"{network}.hidden_size", 16, f"{network}.num_heads", 2)
    diagnose(last(out / "underfit"), out / "underfit")


def overfit(out: Path) -> None:
    """The demo on 128 images in place of 1438."""
    fit(out / "overfit", "--data", "reading_guide.FewDigits", *OWN)
    diagnose(last(out / "overfit"), out / "overfit", *OWN)
    allow_imports("reading_guide")
    for name, data in (("healthy", Digits()), ("overfit", FewDigits())):
        data.setup()
        network = load_trained(last(out / name)).network
        drawn = sample(network, torch.arange(200) % 10, data.shape)
        held_out = torch.cat([batch["x1"] for batch in data.val_dataloader()])
        near = [nearest_rows(data.bank(), x, num=1)[0].median() / math.sqrt(64) for x in (drawn, held_out)]
        print(f"{name}: median distance to the nearest training image, root mean square per value: "
              f"samples {near[0]:.3f}, held-out images {near[1]:.3f}")  # fmt: skip


def scale(out: Path) -> None:
    """Data too large, for a training and for the healthy network; the profile says so before either."""
    unscaled = "--data", "reading_guide.UnscaledDigits", *OWN
    command("profile", *unscaled, "--out", out / "scale/profile")
    fit(out / "scale", *unscaled, *SHORTER)
    diagnose(last(out / "scale"), out / "scale", *OWN)
    diagnose(last(out / "healthy"), out / "scale/other", *unscaled, "--weights", "ema")


def time(out: Path) -> None:
    """The healthy network as a project hands it out where t = 0 is data, imported as if it were SiT's."""
    folder = out / "time"
    folder.mkdir(parents=True, exist_ok=True)
    theirs, wrong, right = folder / "theirs.pt", folder / "wrong.ckpt", folder / "right.ckpt"
    for file in (theirs, wrong, right):
        file.unlink(missing_ok=True)
    torch.save(reverse_time(network_weights(read_checkpoint(last(out / "healthy")), ema=True)), theirs)
    for noise_at, file in ((0, wrong), (1, right)):
        command("import", "--ckpt", theirs, "--out", file, "--num_heads", 4, "--noise_at", noise_at)
        diagnose(file, folder / file.stem, "--data", "Digits")
    draw_digits(wrong, folder / "samples.png")
    trainer = L.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[OracleMonitor()]
    )
    print("\nA training step that runs time the other way, under the monitor:")
    try:
        trainer.fit(ReversedStep(), datamodule=Digits())
    except ValueError as error:
        print(f"ValueError: {error}")


def null(out: Path) -> None:
    """A network that always saw the label, in a file which does not tell, beside the healthy one: gap and guidance."""
    folder = out / "null"
    fit(folder, "--model.label_dropout", 0, *SHORTER)
    imported = imported_plainly(last(folder), folder)
    diagnose(imported, folder, "--data", "Digits")
    for name, file in (("trained", last(out / "healthy")), ("never_trained", imported)):
        without_label(file, folder / f"{name}.json")
        for strength in GUIDANCE:
            draw_digits(file, folder / f"{name}_{strength}.png", strength)


def without_label(checkpoint: Path, to: Path) -> None:
    """Curves of inputs that have no label, in the form in which `fm-stages diagnose` writes those of the usual mix."""
    trained = load_trained(checkpoint)
    data = Digits()
    data.setup()
    train, held_out, profile = measure(trained.module, trained.network, data, 1438, label_dropout=1.0)
    gap, error = (ask("gap", 0, profile.boundary) for ask in (train.average, train.average_sem))
    print(f"{checkpoint}, inputs without label: gap in navigation {gap:.4f} ± {error:.4f}")
    found = {"training": asdict(train), "held_out": asdict(held_out), "profile": asdict(profile)}
    write_json(to, found)


def draw_digits(checkpoint: Path, to: Path, guidance: float = 1.0, num: int = 40) -> None:
    """A grid with a column for each class; from what a file alone tells, `fm-stages sample` would make no pixels."""
    network = load_trained(checkpoint).network
    drawn = sample(network, torch.arange(num) % 10, (1, 8, 8), guidance=Guidance(guidance))
    save_grid(drawn, to, columns=10)


def imported_plainly(checkpoint: Path, folder: Path) -> Path:
    """The averaged weights as a project hands them out, names and numbers alone, and imported again."""
    theirs, imported = folder / "theirs.pt", folder / "imported.ckpt"
    for file in (theirs, imported):
        file.unlink(missing_ok=True)
    torch.save(network_weights(read_checkpoint(checkpoint), ema=True), theirs)
    command("import", "--ckpt", theirs, "--out", imported, "--num_heads", 4)
    return imported


CASES = {case.__name__: case for case in (healthy, underfit, overfit, scale, time, null)}

PANELS = {
    "healthy": ("healthy/diagnose/ema/curves.json", "healthy/samples/ema_0001400.png"),
    "underfit: a network too small": ("underfit/diagnose/ema/curves.json", "underfit/samples/ema_0001400.png"),
    f"overfit: {FEW} training images": ("overfit/diagnose/ema/curves.json", "overfit/samples/ema_0001400.png"),
    "wrong scale: data of std 5.5": ("scale/diagnose/ema/curves.json", "scale/samples/ema_0000700.png"),
    "wrong time direction": ("time/wrong/diagnose/raw/curves.json", "time/samples.png"),
    "null label never trained": ("null/never_trained.json", f"null/never_trained_{GUIDANCE[-1]}.png"),
}
"""Curves and samples of each case; of the last one, curves of inputs without label, and guided samples."""


def draw(out: Path, pictures: Path) -> None:
    """Collect the pictures that the runs left, and draw all gaps in one figure."""
    plots.save(overview(out), out / "overview.png")
    plots.save(samples(out), out / "samples.png")
    plots.save(guided(out / "null"), out / "null/guided.png")
    sources = {
        "overview": "overview.png",
        "samples": "samples.png",
        "healthy": "healthy/diagnose/ema/gap_by_t.png",
        "healthy_steps": "healthy/oracle/gap_over_steps.png",
        "underfit": "underfit/diagnose/ema/gap_by_t.png",
        "overfit": "overfit/memorization/regular_by_stage.png",
        "scale": "scale/diagnose/ema/gap_by_t.png",
        "time": "time/wrong/diagnose/raw/gap_by_t.png",
        "time_predictions": "time/wrong/diagnose/raw/predictions.png",
        "null": "null/guided.png",
    }
    pictures.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        picture = Image.open(out / source).convert("RGB")
        if name == "time_predictions":  # two draws of four
            picture = picture.crop((0, 0, picture.width, round(0.54 * picture.height)))
        # 256 colours, which plots hardly exceed, take a third of the bytes
        picture.quantize(256, dither=Image.Dither.NONE).save(pictures / f"{name}.png", optimize=True)


def overview(out: Path) -> Figure:
    """The gap over t of every case beside its references, on the same axes."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for axes, (title, (file, _)) in zip(panels, PANELS.items(), strict=True):
        found = json.loads((out / file).read_text())
        t = _gap(axes, found["training"], found["held_out"], found["profile"]["boundary"])
        axes.set_title(title, pad=16, fontsize=11)
        if title.startswith("null"):
            trained = json.loads((out / "null/trained.json").read_text())["training"]["mean"]["gap"]
            axes.plot(t, trained, color="#c1440e", lw=1, ls="-.", label="the healthy network")
            axes.legend(fontsize=8, loc="lower right", title="inputs without label", title_fontsize=8)
    figure.axes[0].set_ylim(2e-3, 1e2)
    figure.axes[0].legend(fontsize=8, loc="lower right")
    figure.supxlabel("t   (0 = noise, 1 = data)", fontsize=10)
    figure.supylabel("squared distance to the oracle, per value", fontsize=10)
    return figure


def samples(out: Path) -> Figure:
    """What every case draws."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for axes, (title, (_, file)) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        _grid(axes, out / file, f"{title}, guidance {GUIDANCE[-1]}" if title.startswith("null") else title)
    return figure


def guided(folder: Path) -> Figure:
    """Samples with and without guidance, of a network whose null label was trained and of one whose was not."""
    figure = Figure(figsize=(3.4 * len(GUIDANCE), 3.9), layout="constrained")
    names = {"trained": "null label trained", "never_trained": "never trained"}
    for row, (name, title) in zip(figure.subplots(2, len(GUIDANCE)), names.items(), strict=True):
        for axes, strength in zip(row, GUIDANCE, strict=True):
            how = f"guidance {strength}" if strength > 1 else "no guidance"
            _grid(axes, folder / f"{name}_{strength}.png", f"{title}, {how}")
    return figure


def _grid(axes: Axes, file: Path, title: str) -> None:
    picture = Image.open(file)
    axes.imshow(picture.crop((0, 0, picture.width, min(picture.height, 138))))  # four rows of 8x8 digits, enlarged
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def _gap(axes: Axes, train: dict, held_out: dict, boundary: float) -> list[float]:
    edges, mean = train["edges"], train["mean"]
    t = [(lo + hi) / 2 for lo, hi in zip(edges, edges[1:], strict=False)]
    axes.plot(t, mean["zero"], color="0.6", ls=":", label="a network that predicts 0")
    axes.plot(t, mean["wiener"], color="#6a994e", ls="--", label="the best linear model (Wiener)")
    axes.plot(t, held_out["mean"]["regular"], color="#3a7ca5", lw=1, label="held-out regular loss")
    axes.plot(t, mean["gap"], color="#c1440e", marker="o", ms=3, lw=1.8, label="gap of this model")
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    plots.shade_stages(axes, boundary)
    return t


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}, draw; default: all")
    options.add_argument("--out", type=Path, default=ROOT / "runs/reading_guide")
    options.add_argument("--pictures", type=Path, default=ROOT / "docs/images/reading")
    chosen = options.parse_args()
    cases = chosen.cases or [*CASES, "draw"]
    if unknown := set(cases) - {*CASES, "draw"}:
        options.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)} and draw")
    for name in cases:
        if name == "draw":
            draw(chosen.out.absolute(), chosen.pictures)
        else:
            CASES[name](chosen.out.absolute())


if __name__ == "__main__":
    main()
