"""``fm-stages diagnose``: regular loss, gap and floor by t of a trained checkpoint, without training."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from fm_stages import plots
from fm_stages.data import TrainingData, pictures_of
from fm_stages.oracle import Curves, StageProfile, oracle_of
from fm_stages.studies.diagnose_measure import diagnose
from fm_stages.studies.runs import load_run
from fm_stages.training import FlowMatching, network_weights, predict_data, prediction_figure, report


def diagnose_command(arguments: list[str] | None = None) -> None:
    """The command: measures raw and EMA weights, prints the report, writes tables, JSON and a figure.

    Args:
        arguments: those after ``fm-stages diagnose``; None: of this process.
    """
    parser = ArgumentParser(prog="fm-stages diagnose", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of fm-stages fit")
    parser.add_argument("--data", type=str | None, default=None, help="class path of other data; default: the run's")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the results; default: beside the run")
    parser.add_argument("--num_samples", type=int, default=2048, help="images of each split")
    parser.add_argument("--seed", type=int, default=0, help="of noise and times")
    options = parser.parse_args(sys.argv[2:] if arguments is None else arguments)

    checkpoint, module, data = load_run(options.ckpt, options.data)
    out = Path(options.out or Path(options.ckpt).absolute().parent.parent / "diagnose")
    profile = None
    for weights, ema in (("raw", False), ("EMA", True)):
        state = network_weights(checkpoint, ema)
        if state is None:
            continue
        module.network.load_state_dict(state)
        module.to("cuda" if torch.cuda.is_available() else "cpu")
        train, held_out, profile = diagnose(module, module.network, data, options.num_samples, options.seed, profile)
        print(f"\n{weights} weights of {options.ckpt}, step {checkpoint.get('global_step')}\n")
        print(report(train, {"": held_out}, profile.boundary, weights))
        folder, step = out / weights.lower(), f"step {checkpoint['global_step']}"
        _write(folder, train, held_out, profile, f"{weights} weights, {step}")
        _draw_predictions(module, data, profile, folder, weights, step, options.seed)
    print(f"\nTables and figures: {out}")


def _write(folder: Path, train: Curves, held_out: Curves, profile: StageProfile, title: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, curves in (("training", train), ("held_out", held_out)):
        curves.write_csv(folder / f"{name}.csv")
    (folder / "curves.json").write_text(
        json.dumps({"training": asdict(train), "held_out": asdict(held_out), "profile": asdict(profile)}, indent=1)
    )
    figure = plots.gap_by_t(train.edges, train.mean, train.sem, profile.boundary, held_out.mean, title)
    plots.save(figure, folder / "gap_by_t.png")


def _draw_predictions(
    module: FlowMatching, data: TrainingData, profile: StageProfile, folder: Path, weights: str, step: str, seed: int
) -> None:
    """``predictions.png``: what the module's network takes noisy training images for, beside the oracle."""
    oracle = oracle_of(data.bank(), module.path)
    shown = pictures_of(oracle.bank, data)
    if shown is None:
        return
    to_picture, note = shown
    found = predict_data({weights: module.network}, oracle, profile, seed=seed)
    plots.save(prediction_figure(found, to_picture, step, note), folder / "predictions.png")
