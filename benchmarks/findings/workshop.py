"""What the findings share: the commands that they run, each once, and what they end with."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from fm_stages import plots

ROOT = Path(__file__).parents[2]

CONFIG = "configs/fashion_mnist_dit.yaml"
"""What is trained, in the widths below: 7x7 patches of 28x28 images, so that many runs fit on one CPU core."""

SEEDS = 0, 1
"""Of the trainings. Of a number that is measured for each of them the mean is given, and its standard error."""

STEPS, SAVED_EVERY = 4000, 1000

WIDTHS = {"small": 32, "large": 64}
"""Channels, 16 to a head, in 4 blocks."""

NUM_IMAGES = 2500
"""Drawn for an FID: too few to compare it with published ones, enough to compare two of these."""


@dataclass
class Finding:
    """What a finding ends with.

    Attributes:
        title: of its page.
        text: what was found, in Markdown, with its numbers and their uncertainty.
        rows: all numbers of the figure.
        figure: made here, or the file of one that a command made.
    """

    title: str
    text: str
    rows: list[dict[str, Any]]
    figure: Figure | Path


@dataclass
class Workshop:
    """Runs commands in a folder, where what is finished is not made again.

    Attributes:
        folder: of trainings and measurements.
        commands: that a finding needed, as a person would type them.
    """

    folder: Path
    commands: list[str] = field(default_factory=list)

    def run(self, *words: object, unless: Path) -> None:
        """``fm-stages`` with these arguments, unless the file that it writes last is there.

        Raises:
            SystemExit: if that file was made by other arguments.
        """
        line = shlex.join(str(word) for word in words).replace(f"{self.folder}/", "runs/reproduce/")
        self.commands.append(f"fm-stages {line}")
        made_by = unless.with_name(f"{unless.name}.command")
        if unless.is_file():
            if made_by.is_file() and made_by.read_text() != line:
                raise SystemExit(f"{unless} was made by another command: fm-stages {made_by.read_text()}. Remove it")
            return
        print(f"\n$ fm-stages {line}", flush=True)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, "-m", "fm_stages", *map(str, words)], cwd=ROOT, env=env, check=True)
        made_by.write_text(line)

    def train(self, name: str, seed: int = 0, *options: object, width: int) -> Path:
        """The folder of a training, which goes on where it was stopped."""
        run = self.folder / f"{name}_{seed}"
        self.run(
            "fit", "--config", CONFIG, *options, "--seed_everything", seed,
            "--model.network.init_args.hidden_size", width, "--model.network.init_args.num_heads", width // 16,
            "--trainer.max_steps", STEPS, "--trainer.val_check_interval", 500, "--trainer.limit_val_batches", 8,
            "--trainer.logger", "CSVLogger", "--samples.every_n_steps", 0,
            "--checkpoints.monitor", "null", "--checkpoints.every_n_train_steps", SAVED_EVERY,
            "--checkpoints.save_top_k", -1, "--trainer.default_root_dir", run, "--ckpt_path", "last",
            unless=run / f"checkpoints/step_{STEPS:07d}.ckpt",
        )  # fmt: skip
        return run

    def network(self, name: str, seed: int = 0) -> Path:
        """The last checkpoint of one of the networks of `WIDTHS`, trained on all images and all t."""
        return self.train(name, seed, width=WIDTHS[name]) / f"checkpoints/step_{STEPS:07d}.ckpt"

    def profile(self) -> Path:
        """The profile of the data that `CONFIG` trains on."""
        out = self.folder / "profile"
        self.run("profile", "--data", CONFIG, "--out", out, unless=out / "study.json")
        return out / "profile.json"

    def fid(self, name: str, *options: object) -> float:
        """FID of images that are drawn with these options of ``fm-stages evaluate``, always of the same noise."""
        features = self.folder / "features/features.safetensors"
        self.run("features", "--config", "configs/features_fashion_mnist.yaml", "--out", features, unless=features)
        out = self.folder / "evaluations" / name
        self.run(
            "evaluate", *options, "--features", features, "--num", NUM_IMAGES, "--num_memorization", 0,
            "--batch_size", 500, "--out", out,
            unless=out / "evaluation.json",
        )  # fmt: skip
        return json.loads((out / "evaluation.json").read_text())["scores"]["fid"]


def suggestion(profile: Path, name: str) -> dict[str, float]:
    """The numbers of one of the suggestions of ``fm-stages profile``.

    Raises:
        KeyError: if it makes no such suggestion for these data.
    """
    study = json.loads(profile.with_name("study.json").read_text())
    return {one["name"]: one["numbers"] for one in study["recommendations"]}[name]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: of two values half of their distance."""
    return mean(values), stdev(values) / len(values) ** 0.5


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    """a - b, paired by seed, with its standard error, in words."""
    found, error = mean_and_error([x - y for x, y in zip(a, b, strict=True)])
    return f"{found:+.2f} ± {error:.2f}"


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows in Markdown; columns by the text of their heads: how a row is written there."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(form.format(**row) for form in columns.values())} |" for row in rows)])


def write(name: str, finding: Finding, commands: list[str], out: Path) -> None:
    """Write ``<name>.md``, its figure, and the figure's data as CSV."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(finding.figure, Figure):
        plots.save(finding.figure, out / f"{name}.png")
    else:
        (out / f"{name}.png").write_bytes(finding.figure.read_bytes())
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(finding.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(finding.rows)
    listed = "\n".join(dict.fromkeys(commands))
    (out / f"{name}.md").write_text(
        f"# {finding.title}\n\n{finding.text.strip()}\n\n![{finding.title}]({name}.png)\n\n"
        f"The numbers of the figure are in [{name}.csv]({name}.csv). `python benchmarks/reproduce.py {name}` makes "
        f"this page; the commands that it runs:\n\n```bash\n{listed}\n```\n"
    )
