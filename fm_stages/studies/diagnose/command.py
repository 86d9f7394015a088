"""``fm-stages diagnose``: regular loss, gap and floor by t of trained checkpoints, without training.

With several checkpoints (``--ckpt small=A.ckpt --ckpt large=B.ckpt``) all are measured on the same draws, and each is
held against the first one by stage.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import Namespace

from fm_stages import plots
from fm_stages.data import TrainingData, pictures_of, remove_parts
from fm_stages.networks import LabelEmbedding
from fm_stages.oracle import Curves, StageProfile, oracle_of
from fm_stages.studies.commands import check_least, command_parser, parse_options
from fm_stages.studies.diagnose.measure import diagnose
from fm_stages.studies.diagnose.several import compare_checkpoints, load_checkpoints
from fm_stages.studies.runs import load_run
from fm_stages.studies.sources import split_name
from fm_stages.studies.text_files import write_csv, write_json
from fm_stages.training import FlowMatching, closed, network_weights, predict_data, prediction_figure, report

WEIGHTS = {"raw": "raw", "ema": "EMA"}
"""How weights are called in words."""

NUM_BY_LABEL = 512
"""Images of each, with and without label, whose gaps are held against each other."""


def diagnose_command(arguments: list[str] | None = None) -> None:
    """The command: prints the report, writes tables, JSON and figures, of one checkpoint or of several side by side.

    Args:
        arguments: those after ``fm-stages diagnose``; None: of this process.
    """
    parser = command_parser("diagnose", __doc__)
    option = parser.add_argument
    option(
        "--ckpt", type=str, action="append", required=True, metavar="[NAME=]FILE",
        help="checkpoint of fm-stages fit; given several times, all are measured on the same draws",
    )  # fmt: skip
    option("--weights", choices=[*WEIGHTS, None], default=None, help="default: both; of several checkpoints EMA")
    option("--data", type=str | None, default=None, help="class path of other data; default: the run's")
    option("--out", type=str | None, default=None, help="folder of the results; default: beside the run")
    option("--num_samples", type=int, default=2048, help="images of each split")
    option("--seed", type=int, default=0, help="of noise and times")
    options = parse_options(parser, arguments)
    check_least(options, 1, "num_samples")
    files = _named(options.ckpt)
    folder = Path(next(iter(files.values()))).absolute().parent.parent
    if len(files) == 1:
        _diagnose_one(next(iter(files.values())), Path(options.out or folder / "diagnose"), options)
    else:
        _diagnose_several(files, Path(options.out or folder / "checkpoints_compared"), options)


def _named(specs: list[str]) -> dict[str, str]:
    """Files by name; without a given one by their run's folder and their own name."""
    files: dict[str, str] = {}
    for spec in specs:
        name, file = split_name(spec)
        place = Path(file).absolute()
        name = name or (f"{place.parent.parent.name}/{place.stem}" if len(specs) > 1 else place.stem)
        if name in files:
            raise ValueError(f"--ckpt {spec}: there is a checkpoint called {name} already: name it, as NAME={file}")
        files[name] = file
    return files


def _diagnose_several(files: dict[str, str], out: Path, options: Namespace) -> None:
    if options.data:
        raise ValueError(f"--data {options.data}: several checkpoints are compared on the data of their runs")
    trained = load_checkpoints(files, options.weights)
    data = next(iter(trained.values())).data
    assert data is not None
    data.setup()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = compare_checkpoints(trained, files, data, options.num_samples, options.seed, device)
    found.write(out)
    print(f"\n{found.text()}\n\nTables and figure: {out}")


def _diagnose_one(file: str, out: Path, options: Namespace) -> None:
    checkpoint, module, data = load_run(file, options.data)
    profile, measured = None, False
    for weights in [options.weights] if options.weights else WEIGHTS:
        state = network_weights(checkpoint, ema=weights == "ema")
        if state is None:
            continue
        measured = True
        module.network.load_state_dict(state)
        module.to("cuda" if torch.cuda.is_available() else "cpu")
        train, held_out, profile = diagnose(module, module.network, data, options.num_samples, options.seed, profile)
        words, step = WEIGHTS[weights], f"step {checkpoint['global_step']}"
        print(f"\n{words} weights of {file}, {step}\n")
        print(report(train, {"": held_out}, profile.boundary, words))
        if data.num_classes > 1 and 0 < module.label_dropout < 1:
            print(f"\n{_by_label(module, data, profile, options)}")
        _write(out / weights, train, held_out, profile, f"{words} weights, {step}")
        _draw_predictions(module, data, profile, out / weights, words, step, options.seed)
    if not measured:
        raise ValueError(f"--weights {options.weights}: {file} keeps no such weights")
    print(f"\nTables and figures: {out}")


def _by_label(module: FlowMatching, data: TrainingData, profile: StageProfile, options: Namespace) -> str:
    """The gap in navigation with each image's own label and without any, each against its own oracle."""
    num, b = min(options.num_samples, NUM_BY_LABEL), profile.boundary
    kinds = {"with its own label": 0.0, "without label (null)": 1.0}
    lines, shares = [f"In navigation, {num} images each:"], []
    for kind, dropout in kinds.items():
        curves = diagnose(module, module.network, data, num, options.seed, profile, False, dropout)[0]
        shares.append(closed(curves, b))
        gap, error = curves.average("gap", 0, b), curves.average_sem("gap", 0, b)
        part = "" if math.isnan(shares[-1]) else f", {shares[-1]:.0%} closed"
        lines.append(f"  {kind:22} gap {gap:.4f} ± {error:.4f}{part}")
    tables = [part for part in module.network.modules() if isinstance(part, LabelEmbedding)]
    if any(table.null_is_untrained for table in tables):
        lines.append(
            "  The null label's weights are as large as they were drawn, those of the classes have grown: it was never "
            "trained. Guidance needs it; do not use it with these weights."
        )
    return "\n".join(lines)


def _write(folder: Path, train: Curves, held_out: Curves, profile: StageProfile, title: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    for name, curves in (("training", train), ("held_out", held_out)):
        curves.write_csv(folder / f"{name}.csv")
    numbers = {"training": asdict(train), "held_out": asdict(held_out), "profile": asdict(profile)}
    write_json(folder / "curves.json", numbers)
    figure = plots.gap_by_t(train.edges, train.mean, train.sem, profile.boundary, held_out.mean, title)
    plots.save(figure, folder / "gap_by_t.png")


def _draw_predictions(
    module: FlowMatching, data: TrainingData, profile: StageProfile, folder: Path, weights: str, step: str, seed: int
) -> None:
    """``predictions.png`` and ``.csv``: what the network takes noisy training images for, beside the oracle."""
    oracle = oracle_of(data.bank(), module.path)
    shown = pictures_of(oracle.bank, data)
    if shown is None:
        return
    to_picture, note = shown
    found = predict_data({weights: module.network}, oracle, profile, seed=seed)
    plots.save(prediction_figure(found, to_picture, step, note), folder / "predictions.png")
    write_csv(folder / "predictions.csv", *found.table())
