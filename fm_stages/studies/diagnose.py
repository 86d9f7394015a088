"""``fm-stages diagnose``: regular loss, gap and floor by t of a trained checkpoint, without training."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fm_stages import plots
from fm_stages.data import TrainingData, pictures_of
from fm_stages.flow import keyed_normal, keyed_uniform, stratified_uniform
from fm_stages.oracle import (
    Curves,
    StageProfile,
    TimestepCurves,
    decompose,
    linear_reference,
    oracle_of,
    timestep_bins,
)
from fm_stages.training import (
    CONFIG_KEY,
    QUANTITIES,
    FlowMatching,
    HeldOut,
    network_weights,
    predict_data,
    prediction_figure,
    read_checkpoint,
    report,
)


def diagnose(
    module: FlowMatching,
    network: nn.Module,
    data: TrainingData,
    num_samples: int = 2048,
    seed: int = 0,
    profile: StageProfile | None = None,
    progress: bool = True,
) -> tuple[Curves, Curves, StageProfile]:
    """Measure a network against the exact oracle of its training set.

    Args:
        module: says path, label dropout and times.
        network: the weights to measure, of ``module``'s shape.
        data: training and held-out images.
        num_samples: images of each split (fewer if there are not as many), each with one noise and one t.
        seed: of the draws.
        profile: the stages of the data, if they were measured before.
        progress: whether to show a progress bar.

    Returns:
        Curves of training inputs (`QUANTITIES`) and of held-out inputs (regular, gap, wiener), and the profile.
    """
    device = next(network.parameters()).device
    network.eval()
    oracle = oracle_of(data.bank().to(device), module.path)
    profile = profile or StageProfile.measure(oracle, module.label_dropout, seed=seed)
    wiener = linear_reference(oracle.bank, oracle.path)
    edges = timestep_bins(boundary=profile.boundary)
    train = TimestepCurves(QUANTITIES, edges).to(device)
    held_out = HeldOut(edges, profile.boundary, device)
    for split, loader in (("training", data.train_dataloader()), ("held-out", data.val_dataloader())):
        num = min(num_samples, data.num_val if split == "held-out" else len(loader) * data.batch_size)
        for batch in _batches(loader, split, num, progress):
            seen = _predict(module, network, batch, split, num, seed, device)
            if split == "held-out":
                held_out.update(oracle, wiener, seen)
                continue
            draws = {name: seen[name] for name in ("x0", "x1", "t", "prediction", "labels")}
            index = seen["index"] if oracle.collapses else None  # a row that is a distribution is not its x1
            parts = decompose(oracle, **draws, index=index, wiener=wiener)
            train.update(parts.t, **{name: getattr(parts, name) for name in QUANTITIES})
    return train.compute(), held_out.compute()[""], profile


def _batches(loader: DataLoader, split: str, num_samples: int, progress: bool) -> Any:
    """Batches with places 0, 1, ... in the measurement, until there are enough."""
    done = 0
    with tqdm(total=num_samples, desc=split, unit="image", disable=not progress) as bar:
        for batch in loader:
            size = min(len(batch["x1"]), num_samples - done)
            if size == 0:
                return
            yield {**{name: x[:size] for name, x in batch.items()}, "position": torch.arange(done, done + size)}
            done += size
            bar.update(size)


@torch.no_grad()
def _predict(
    module: FlowMatching,
    network: nn.Module,
    batch: dict[str, torch.Tensor],
    split: str,
    num_samples: int,
    seed: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Draw t, noise and label dropout, all fixed by the seed, and predict."""
    key, position = ("diagnose", split, seed), batch["position"]
    x1, labels = batch["x1"].to(device), batch["labels"].to(device)
    t = stratified_uniform(key, position, num_samples).clamp(max=module.path.max_time).to(device)
    x0 = keyed_normal(key, position, tuple(x1.shape[1:])).to(device)
    dropped = keyed_uniform((*key, "labels"), position).to(device) < module.label_dropout
    labels = torch.where(dropped, -1, labels)
    x_t = module.path.interpolate(x0, x1, t)
    prediction = network(x_t, t, labels).float()
    seen = {"x0": x0, "x1": x1, "x_t": x_t, "t": t, "labels": labels, "prediction": prediction}
    return {**seen, "index": batch["index"].to(device)} if "index" in batch else seen


def load_run(path: str | Path, data: str | None = None) -> tuple[dict[str, Any], FlowMatching, TrainingData]:
    """Rebuild module and data of a checkpoint from the configuration that it carries.

    Args:
        path: checkpoint of ``fm-stages fit``.
        data: class path of other data, with defaults for its arguments; None: the run's own.

    Returns:
        The checkpoint, the module (its weights not yet loaded) and the data.

    Raises:
        ValueError: if the file carries no configuration, or was imported and no data is given.
    """
    checkpoint, module, images = open_run(path, data)
    if images is None:
        raise ValueError(f"{path} was imported and does not say on which data it was trained: name it with --data")
    images.setup()
    return checkpoint, module, images


def open_run(path: str | Path, data: str | None = None) -> tuple[dict[str, Any], FlowMatching, Any]:
    """As `load_run`, without reading the data; None for that of an imported network, which names none."""
    checkpoint = read_checkpoint(path)
    if CONFIG_KEY not in checkpoint:
        raise ValueError(f"{path} carries no configuration: only what `fm-stages` fit, import or export wrote does")
    config = yaml.safe_load(checkpoint[CONFIG_KEY])
    if not isinstance(config, dict) or not config.get("model"):
        raise ValueError(f"{path} carries a configuration without a model: it is damaged")
    module, images = build_run({**config, "data": {"class_path": data} if data else config.get("data")})
    return checkpoint, module, images


def build_run(config: dict[str, Any]) -> tuple[FlowMatching, Any]:
    """Module, with fresh weights, and data (or None) of a whole configuration as plain data; nothing is read yet."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(FlowMatching, "model")
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)
    given = {name: config[name] for name in ("model", "data") if config[name] is not None}
    run = parser.instantiate(parser.parse_object(given))
    return run.model, run.get("data")


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
