"""Several checkpoints on one probe: in which stage does a larger network, or longer training, change the gap?

All networks see the same noisy images with the same labels, so that what differs is the networks, and differences to
the first one have errors much smaller than those of the gaps themselves.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fm_stages import plots
from fm_stages.data import TrainingData, whole_file
from fm_stages.oracle import (
    Curves,
    Oracle,
    StageProfile,
    TimestepCurves,
    Wiener,
    linear_reference,
    mean_square,
    oracle_of,
    timestep_bins,
)
from fm_stages.studies.diagnose.measure import predict, probe
from fm_stages.studies.models import Trained, load_trained
from fm_stages.studies.text_files import write_json
from fm_stages.training import closed

TRAINING = ("gap", "regular", "wiener", "gap_change", "regular_change")
HELD_OUT = ("regular", "regular_change")
STAGES = ("navigation", "refinement", "all t")

DATA_KEYS = ("batch_size", "val_batch_size", "micro_batch_size", "num_workers", "shard_bank", "residency")
"""Arguments of data that change no image."""

SHOWN = 2.0
"""Standard errors beyond which a difference is said to be there."""


@dataclass(frozen=True)
class CheckpointCurves:
    """What was measured of one checkpoint.

    Attributes:
        checkpoint: its file.
        weights: raw or ema.
        step: of the weights.
        num_weights: numbers that were learnt.
        train: by t on training images, `TRAINING`; changes are differences to the first checkpoint, draw by draw.
        held_out: by t on held-out images, `HELD_OUT`.
    """

    checkpoint: str
    weights: str
    step: int
    num_weights: int
    train: Curves
    held_out: Curves

    def change(self, first: CheckpointCurves, lo: float, hi: float) -> tuple[float, float]:
        """Change of the gap over t in [lo, hi] as a share of the first one's gap there, and its standard error."""
        reference = first.train.average("gap", lo, hi) or math.nan
        change, error = self.train.average("gap_change", lo, hi), self.train.average_sem("gap_change", lo, hi)
        return change / reference, error / reference


@dataclass(frozen=True)
class CheckpointComparison:
    """Several checkpoints on the same draws.

    Attributes:
        checkpoints: by name; the first one is what the others are held against.
        profile: the stages of the data.
        num_samples: draws of training images.
        seed: of the draws.
    """

    checkpoints: dict[str, CheckpointCurves]
    profile: StageProfile
    num_samples: int
    seed: int

    @property
    def reference(self) -> str:
        """Name of the first one."""
        return next(iter(self.checkpoints))

    def stages(self) -> dict[str, tuple[float, float]]:
        """Ends of the stages in t."""
        return dict(zip(STAGES, ((0.0, self.profile.boundary), (self.profile.boundary, 1.0), (0.0, 1.0)), strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each checkpoint and stage, as plain data; `nan` where nothing was measured."""
        first = self.checkpoints[self.reference]
        rows = []
        for name, one in self.checkpoints.items():
            for stage, (lo, hi) in self.stages().items():
                share, share_sem = one.change(first, lo, hi)
                row = {"name": name, "weights": one.weights, "step": one.step, "num_weights": one.num_weights}
                row |= {
                    "stage": stage,
                    "gap": one.train.average("gap", lo, hi),
                    "gap_sem": one.train.average_sem("gap", lo, hi),
                    "gap_change": one.train.average("gap_change", lo, hi),
                    "gap_change_sem": one.train.average_sem("gap_change", lo, hi),
                    "gap_change_share": share,
                    "gap_change_share_sem": share_sem,
                    "closed": closed(one.train, hi) if stage == "navigation" else float("nan"),
                    "regular": one.train.average("regular", lo, hi),
                    "held_out_regular": one.held_out.average("regular", lo, hi),
                    "held_out_regular_change": one.held_out.average("regular_change", lo, hi),
                    "held_out_regular_change_sem": one.held_out.average_sem("regular_change", lo, hi),
                }
                rows.append(row)
        return rows

    def text(self) -> str:
        """The table split by stage, and a sentence for each checkpoint after the first."""
        width = max(12, *(len(name) for name in self.checkpoints)) + 2
        b, first = self.profile.boundary, self.checkpoints[self.reference]
        lines = [
            f"{first.weights} weights, {self.num_samples} draws, the same for all. Navigation is t < {b:.3f}, "
            f"refinement what follows; means over uniform t, per value. In brackets the change against "
            f"{self.reference}.",
            "",
            f"{'':{width}}{'step':>8}{'weights':>12}{'closed':>8}{'held-out regular':>26}",
        ]
        kept = self.rows()
        for name, one in self.checkpoints.items():
            whole, navigation = (_row(kept, name, stage) for stage in ("all t", "navigation"))
            held_out = _with_change(whole["held_out_regular"], whole["held_out_regular_change"], name, self.reference)
            share = "" if navigation["closed"] != navigation["closed"] else f"{navigation['closed']:.0%}"
            lines.append(f"{name:{width}}{one.step:>8}{one.num_weights:>12,}{share:>8}{held_out:>26}")
        lines += ["", f"{'gap':{width}}" + "".join(f"{stage:>30}" for stage in STAGES)]
        for name in self.checkpoints:
            cells = []
            for stage in STAGES:
                row = _row(kept, name, stage)
                cell = f"{row['gap']:.4f}"
                if name != self.reference:
                    cell += f" ({row['gap_change_share']:+.1%} ± {row['gap_change_share_sem']:.1%})"
                cells.append(f"{cell:>30}")
            lines.append(f"{name:{width}}" + "".join(cells))
        return "\n".join([*lines, "", *self.sentences()])

    def sentences(self) -> list[str]:
        """What the paired differences say about the stages, one sentence for each checkpoint after the first."""
        first, sentences = self.checkpoints[self.reference], []
        for name, one in list(self.checkpoints.items())[1:]:
            (early, early_sem), (late, late_sem) = (
                one.change(first, *self.stages()[stage]) for stage in ("navigation", "refinement")
            )
            error = math.hypot(early_sem, late_sem)
            verdict = "no difference between the stages can be told from noise"
            if early * late < 0 and abs(early) > SHOWN * early_sem and abs(late) > SHOWN * late_sem:
                verdict = "the stages go opposite ways"
            elif abs(abs(early) - abs(late)) > SHOWN * error:
                larger = "navigation" if abs(early) > abs(late) else "refinement"
                verdict = f"more in {larger}, as a share of what was there"
            sentences.append(
                f"{name}: against {self.reference} the gap changes by {early:+.1%} ± {early_sem:.1%} in navigation and "
                f"by {late:+.1%} ± {late_sem:.1%} in refinement: {verdict}{self._parts(one)}."
            )
        return sentences

    def _parts(self, one: CheckpointCurves) -> str:
        """Which part of the whole change, over all t, lies in refinement; nothing where there is hardly a change."""
        b, train = self.profile.boundary, one.train
        whole, error = train.average("gap_change"), train.average_sem("gap_change")
        if not abs(whole) > SHOWN * error or not 0 < b < 1:
            return ""
        return f"; {(1 - b) * train.average('gap_change', b, 1) / whole:.0%} of the change over all t is in refinement"

    def figure(self) -> Figure:
        """The gap over t of each, and the paired difference to the first."""
        first = self.checkpoints[self.reference]
        curves = {}
        for name, one in self.checkpoints.items():
            curves[name] = {"mean": one.train.mean["gap"], "sem": one.train.sem["gap"]}
            if name != self.reference:
                curves[name]["relative"] = _divided(one.train.mean["gap_change"], first.train.mean["gap"])
                curves[name]["relative_sem"] = _divided(one.train.sem["gap_change"], first.train.mean["gap"])
        title = f"Gap to the oracle, {first.weights} weights, {self.num_samples} draws, the same for all checkpoints"
        return plots.gap_of_arms(
            first.train.edges, curves, self.reference, self.profile.boundary, title, linear=first.train.mean["wiener"]
        )

    def write(self, out: Path) -> None:
        """Write ``checkpoints.json``, ``checkpoints.csv`` (by stage), ``gap_by_t.csv`` and ``gap_by_t.png``."""
        out.mkdir(parents=True, exist_ok=True)
        plain = {"seed": self.seed, "num_samples": self.num_samples, "stages": self.rows()}
        plain |= {"checkpoints": {name: asdict(one) for name, one in self.checkpoints.items()}}
        plain |= {"profile": asdict(self.profile)}
        write_json(out / "checkpoints.json", plain)
        rows = self.rows()
        with whole_file(out / "checkpoints.csv") as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with whole_file(out / "gap_by_t.csv") as part, part.open("w", newline="") as file:
            tables = {name: one.train.table() for name, one in self.checkpoints.items()}
            columns = next(iter(tables.values()))[0]
            csv.writer(file).writerows(
                [["name", *columns], *([name, *row] for name, (_, rows) in tables.items() for row in rows)]
            )
        plots.save(self.figure(), out / "gap_by_t.png")


def compare_checkpoints(
    trained: Mapping[str, Trained],
    files: Mapping[str, str],
    data: TrainingData,
    num_samples: int = 2048,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> CheckpointComparison:
    """Measure several networks of the same data on the same draws; the oracle is asked once for all of them.

    Args:
        trained: by name; see `load_checkpoints`, which refuses what cannot be compared.
        files: where each comes from.
        data: of all of them, set up.
        num_samples: images of each split (fewer if there are not as many), each with one noise and one t.
        seed: of the draws.
        device: where to compute.
        progress: whether to show bars.

    Returns:
        Curves of each, and the stages.
    """
    module = next(iter(trained.values())).module
    oracle = oracle_of(data.bank().to(torch.device(device)), module.path)
    profile = StageProfile.measure(oracle, module.label_dropout, seed=seed)
    wiener = linear_reference(oracle.bank, oracle.path)
    edges = timestep_bins(boundary=profile.boundary)
    sums = {name: (TimestepCurves(TRAINING, edges), TimestepCurves(HELD_OUT, edges)) for name in trained}
    networks = {name: one.network.to(device) for name, one in trained.items()}

    def draws(split: str) -> Iterator[dict[str, Tensor]]:
        return probe(module, data, split, num_samples, seed, device, progress)

    num = 0
    for seen in draws("training"):
        num += len(seen["t"])
        index = seen.get("index") if oracle.collapses else None
        best = oracle.target(seen["x0"], seen["x1"], seen["t"], seen["labels"], index)
        linear = _linear_gap(oracle, wiener, seen, best)
        found = {name: _errors(oracle, seen, predict(network, seen), best) for name, network in networks.items()}
        first = next(iter(found.values()))
        for name, (regular, gap) in found.items():
            sums[name][0].update(
                seen["t"].cpu(),
                gap=gap, regular=regular, wiener=linear, gap_change=gap - first[1], regular_change=regular - first[0],
            )  # fmt: skip
    for seen in draws("held-out"):
        losses = {name: _errors(oracle, seen, predict(network, seen), None)[0] for name, network in networks.items()}
        first_loss = next(iter(losses.values()))
        for name, loss in losses.items():
            sums[name][1].update(seen["t"].cpu(), regular=loss, regular_change=loss - first_loss)
    measured = {
        name: CheckpointCurves(
            files[name], one.weights, one.step, sum(p.numel() for p in one.network.parameters()),
            sums[name][0].compute(), sums[name][1].compute(),
        )
        for name, one in trained.items()
    }  # fmt: skip
    return CheckpointComparison(measured, profile, num, seed)


def load_checkpoints(files: Mapping[str, str], weights: str | None = None) -> dict[str, Trained]:
    """Read checkpoints of one data set, path and label dropout.

    Args:
        files: by name.
        weights: ``ema`` or ``raw``; None: EMA where they are kept.

    Raises:
        ValueError: if they differ in what fixes the oracle, or hold weights of different kinds.
    """
    trained = {name: load_trained(file, weights) for name, file in files.items()}
    first, *others = trained
    for name in others:
        for what, here, there in zip(
            ("weights", "data", "path", "label_dropout"), _facts(trained[first]), _facts(trained[name]), strict=True
        ):
            if here != there:
                raise ValueError(
                    f"--ckpt {files[first]} and {files[name]} cannot be compared, they differ in {what}: {here} and "
                    f"{there}. All have to be of one training set, path and label dropout"
                )
    if trained[first].data is None:
        raise ValueError(f"--ckpt {files[first]} was imported and does not say on which data it was trained")
    return trained


def _facts(trained: Trained) -> tuple[Any, ...]:
    """What has to be the same, as plain data."""
    data = dict(trained.config.get("data") or {})
    arguments = {k: v for k, v in dict(data.get("init_args") or {}).items() if k not in DATA_KEYS}
    path = trained.module.path
    return (
        trained.weights,
        {**data, "init_args": arguments} if data else None,
        f"{type(path).__name__}{dict(vars(path)) or ''}",
        trained.module.label_dropout,
    )


def _errors(oracle: Oracle, seen: dict[str, Tensor], prediction: Tensor, best: Tensor | None) -> tuple[Tensor, Tensor]:
    """Regular loss and gap, each (B,) on the CPU; the gap is NaN without the oracle's velocity."""
    conditional = oracle.path.velocity(seen["x0"], seen["x1"], seen["t"])
    regular = mean_square(prediction - conditional)
    gap = torch.full_like(regular, torch.nan) if best is None else mean_square(prediction - best)
    return regular.cpu(), gap.cpu()


def _linear_gap(oracle: Oracle, wiener: Wiener | None, seen: dict[str, Tensor], best: Tensor) -> Tensor:
    """The gap (B,) of the best linear model, on the CPU; NaN where there is none."""
    if wiener is None:
        return torch.full((len(best),), torch.nan)
    linear = oracle.target_from_mean(wiener.mean(seen["x_t"], seen["t"]), seen["x0"], seen["x1"], seen["t"])
    return mean_square(linear - best).cpu()


def _divided(values: list[float], by: list[float]) -> list[float]:
    return [x / y if y else float("nan") for x, y in zip(values, by, strict=True)]


def _row(rows: list[dict[str, Any]], name: str, stage: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name and row["stage"] == stage)


def _with_change(value: float, change: float, name: str, reference: str) -> str:
    return f"{value:.4f}" if name == reference else f"{value:.4f} ({change / (value - change):+.1%})"
