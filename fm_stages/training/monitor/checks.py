"""What the monitor checks before it believes a number: the module's outputs, the bank's rows, the labels' meaning."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from fm_stages.flow import Path
from fm_stages.oracle import DataBank, GaussianMixtureBank, Oracle, together

REQUIRED = ("x0", "x1", "x_t", "t", "prediction")
OPTIONAL = ("prediction_ema", "labels", "index")

ROUNDING = 0.05
"""Of x_t: bfloat16 rounds values of this size by up to 0.02."""

REVERSED = "1 - t as t, and the prediction with its sign changed (the velocity turns round with time)"
"""What a module returns whose t = 1 is noise."""

SUFFIXES = ("", "_ema")
"""Of the names of numbers, and of predictions: raw and averaged weights."""


def outputs_of(outputs: Any, module: L.LightningModule) -> dict[str, Tensor]:
    """The tensors that a step returned, detached and in float32; labels and index as they are.

    Raises:
        ValueError: if something is missing, with the contract.
    """
    found = set(outputs) if isinstance(outputs, dict) else set()
    if missing := [name for name in REQUIRED if name not in found]:
        raise ValueError(
            f"OracleMonitor finds no {', '.join(missing)} in what {type(module).__name__}'s step returns. Return "
            '{"loss": loss, "x0": noise, "x1": data, "x_t": x_t, "t": t, "prediction": velocity, "labels": labels '
            "after label dropout, -1 for null}; all but the loss detached"
        )
    kept = {name: outputs[name].detach() for name in (*REQUIRED, *OPTIONAL) if outputs.get(name) is not None}
    return {name: x if name in ("labels", "index") else x.float() for name, x in kept.items()}


def find_path(module: L.LightningModule) -> Path:
    """The path that a module trains on.

    Raises:
        ValueError: if it does not say, with the remedy.
    """
    path = getattr(module, "path", None)
    if not isinstance(path, Path):
        raise ValueError(
            f"OracleMonitor needs to know the path that x_t is made with: {type(module).__name__} has no attribute "
            "`path`; give it one, or OracleMonitor(path=LinearPath()), of fm_stages.flow"
        )
    return path


def find_bank(trainer: L.Trainer) -> DataBank | GaussianMixtureBank:
    """The training set, as the datamodule says it.

    Raises:
        ValueError: if it does not, with the remedy.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None or not hasattr(datamodule, "bank"):
        raise ValueError(
            "OracleMonitor needs the training set: give the Trainer a datamodule with bank(), or "
            "OracleMonitor(bank=DataBank(x1, labels)), of fm_stages.oracle: all training images as they are trained on"
        )
    return datamodule.bank()


def check_num_rows(oracle: Oracle, trainer: L.Trainer) -> None:
    """Refuse a bank that has not one row (or, with flips, two) for each training image."""
    loader: Any = trainer.train_dataloader
    try:
        num_images = len(loader.dataset)
    except (AttributeError, TypeError):
        return  # an endless or nested loader has no length to compare with; the first batch is still looked up
    flip = getattr(getattr(trainer, "datamodule", None), "flip", None)
    views = (1,) if flip is False else (2,) if flip is True else (1, 2)
    expected = [num_images * v for v in views]
    if oracle.bank.num_rows not in expected:
        wanted = " or ".join(map(str, expected))
        raise ValueError(
            f"the bank has {oracle.bank.num_rows} rows, the training set {num_images} images (flip={flip}): the bank "
            f"must hold the training distribution point by point, {wanted} rows, without padding or held-out images"
        )


def check_first_batch(oracle: Oracle, seen: dict[str, Tensor]) -> None:
    """Refuse numbers that would be wrong: another path, rows that are not in the bank, labels of another meaning.

    Args:
        oracle: of the training set.
        seen: what `outputs_of` returned.

    Raises:
        ValueError: what is wrong, with the remedy.
    """
    group = oracle.bank.group
    with together(group):
        _check_interpolation(oracle, seen)
    if not oracle.collapses:  # rows are distributions: no batch holds one
        if "labels" in seen:
            with together(group):
                _check_labels(oracle, seen["labels"])
        return
    tolerance = 1e-4 * oracle.bank.rms_norm
    away, exchanged = _distance(oracle, seen["x1"], None), _distance(oracle, seen["x0"], None)
    with together(group):
        _check_rows(oracle, seen["x1"], away > tolerance, bool((exchanged <= tolerance).all()))
    if "index" in seen:
        with together(group):
            _check_index_range(oracle, seen["index"])
        away = (oracle.bank.rows(seen["index"]) - seen["x1"]).flatten(1).norm(dim=1)
        with together(group):
            _check_index(away > tolerance)
    labels = seen.get("labels")
    if labels is None:
        return
    with together(group):
        _check_labels(oracle, labels)
    if oracle.bank.has_labels:
        distance = _distance(oracle, seen["x1"], labels)
        with together(group):
            _check_meaning(labels, distance > tolerance)


def _check_rows(oracle: Oracle, x1: Tensor, missing: Tensor, exchanged: bool) -> None:
    if bool(missing.any()):
        if exchanged:
            raise ValueError(
                "x0 of the first training batch is the data, and x1 the noise. Here t = 0 is noise and t = 1 is data: "
                f"return the noise as x0, the data as x1, {REVERSED}"
            )
        raise ValueError(
            f"{int(missing.sum())} of {len(x1)} rows of the first training batch are not in the bank. Batch: mean "
            f"{x1.mean():.3f}, std {x1.std():.3f}; bank: mean {oracle.bank.mean.mean():.3f}. Use the same "
            "normalisation and no random augmentation but flips that the bank holds as rows"
        )


def _check_labels(oracle: Oracle, labels: Tensor) -> None:
    bank = oracle.bank
    if not bank.has_labels:
        if bool((labels == -1).all()):
            return
        raise ValueError("the module reports labels, but the bank has none: build it as DataBank(x1, labels)")
    highest = max(bank.label_counts)
    strange = labels[(labels < -1) | (labels > highest)]
    if len(strange):
        raise ValueError(
            f"the module reports label {int(strange[0])}, the bank's labels run from 0 to {highest}: report dropped "
            "(null) labels as -1; only the network maps them to its null row"
        )


def _check_meaning(labels: Tensor, wrong: Tensor) -> None:
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} of {len(labels)} rows of the first training batch carry another label in the bank "
            f"(the module reports {int(labels[wrong][0])} for one of them): both must number the classes alike"
        )


def _check_index_range(oracle: Oracle, index: Tensor) -> None:
    """The rows that the module names must be its data: the oracle reads x1 from them."""
    if int(index.min()) < 0 or int(index.max()) >= oracle.bank.num_rows:
        raise ValueError(
            f"the module reports index from {int(index.min())} to {int(index.max())}, the bank has "
            f"{oracle.bank.num_rows} rows: report the row in the bank, or no index"
        )


def _check_index(wrong: Tensor) -> None:
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} of {len(wrong)} rows that the module names by index are other rows of the bank: "
            "report the row in the bank (of a flipped image the row of its flip), or no index"
        )


def _check_interpolation(oracle: Oracle, seen: dict[str, Tensor]) -> None:
    """x_t must be what the path makes of x0, x1 and t: time reversed or another path would give another oracle."""
    expected = oracle.path.interpolate(seen["x0"], seen["x1"], seen["t"])
    error = (expected - seen["x_t"]).abs().max().item()
    if not error <= ROUNDING:
        mirrored = oracle.path.interpolate(seen["x0"], seen["x1"], 1 - seen["t"])
        is_reversed = bool((mirrored - seen["x_t"]).abs().max() <= ROUNDING)
        raise ValueError(
            f"x_t differs from {type(oracle.path).__name__}.interpolate(x0, x1, t) by up to {error:.2g}: the module "
            + (
                f"runs time the other way. Here t = 0 is noise and t = 1 is data: return {REVERSED}"
                if is_reversed
                else "uses another path: give OracleMonitor(path=...) the one that it uses"
            )
        )


def _distance(oracle: Oracle, x1: Tensor, labels: Tensor | None) -> Tensor:
    """Distance of data (B, ...) to the nearest row that its label allows, (B,): at t = 1 the posterior is that row."""
    ones = torch.ones(len(x1), device=x1.device)
    nearest = oracle.posterior(x1 * oracle.path.alpha(ones[:1]), ones, labels).mean
    return (nearest - x1).flatten(1).norm(dim=1)
