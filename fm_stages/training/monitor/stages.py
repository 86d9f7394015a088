"""The stage profile of a run: measured, or read from the file of an earlier measurement, and what it promises."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fm_stages.flow import TimestepSampler
from fm_stages.oracle import THRESHOLDS, Oracle, StageProfile
from fm_stages.training.logs.alerts import alert


def read_profile(file: str | Path, oracle: Oracle) -> StageProfile:
    """The profile in a file, if it is one of this bank and path.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it holds no profile, or that of other data; with what differs.
    """
    profile = StageProfile.load(file)
    _check_data(profile, file, oracle)
    return profile


def kept_profile(state: dict[str, Any] | None, oracle: Oracle, share: float) -> StageProfile | None:
    """The profile in a monitor's state, if it holds one of this bank, path and share of unlabelled samples.

    A run goes on with the bins that it began with, to the last bit, also where other ranks would measure them.
    """
    if state is None or state.get("profile") is None or state.get("share") != share:
        return None
    profile = StageProfile.from_json(state["profile"])
    try:
        _check_data(profile, "the checkpoint", oracle)
    except ValueError:
        return None
    return profile


def _check_data(profile: StageProfile, file: str | Path, oracle: Oracle) -> None:
    """Refuse a profile of other data."""
    bank = oracle.bank
    for name, there, here in (
        ("rows", profile.num_rows, bank.num_rows),
        ("values per row", profile.num_dims, bank.num_dims),
        ("path", profile.path, StageProfile.name_of(oracle.path)),
    ):
        if there != here:
            raise ValueError(_other_data(file, f"{name}: {there} there, {here} here"))
    if not math.isclose(profile.rms_norm, bank.rms_norm, rel_tol=1e-4):
        raise ValueError(
            _other_data(file, f"root mean square norm of a row: {profile.rms_norm:.6g} there, {bank.rms_norm:.6g} here")
        )


def check_label_dropout(profile: StageProfile, share: float, file: str | Path) -> None:
    """Refuse a profile read from a file whose mix of labels is not the one that the network sees.

    Raises:
        ValueError: with both shares.
    """
    if abs(profile.label_dropout - share) > 0.01:  # a share may have been counted in one batch
        raise ValueError(
            _other_data(
                file,
                f"share of unlabelled queries: {profile.label_dropout:.3g} there, {share:.3g} here, as counted or as "
                "OracleMonitor(label_dropout=...) tells it",
            )
        )


def find_stages(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    oracle: Oracle,
    share: float,
    known: StageProfile | None,
    file: str | None,
) -> StageProfile:
    """The stages for a mix of labels, told in a line, with an alert where no boundary is found; every rank calls this.

    Args:
        trainer: of the run.
        pl_module: which may say what density t is drawn from.
        oracle: of the training set, on the device where it is asked.
        share: of queries without a label.
        known: what was read from the file, if anything.
        file: its name.

    Raises:
        ValueError: if what was read is for another mix of labels.
    """
    if known is not None and file is not None:
        check_label_dropout(known, share, file)
        profile, source = known, f"read from {file}"
    else:
        rank_zero_info("Oracle: measuring the stages ...")
        start = time.perf_counter()
        profile = measure_profile(trainer, oracle, share)
        source = f"measured in {time.perf_counter() - start:.0f} s"
    rank_zero_info(f"Oracle: stages {source}: {describe_stages(profile, density_of(pl_module))}")
    if not 0 < profile.boundary < 1:
        text = "the posterior has always collapsed" if profile.boundary == 0 else "the posterior never collapses"
        alert(trainer, "No boundary between the stages was found", f"{text}: is the data what it should be?")
    return profile


def measure_profile(trainer: L.Trainer, oracle: Oracle, share: float) -> StageProfile:
    """One measurement, equal on all ranks to the last bit; ranks that share a bank make it together."""
    measures = trainer.is_global_zero or oracle.bank.group is not None
    profile: Any = StageProfile.measure(oracle, share) if measures else None
    return trainer.strategy.broadcast(profile)


def label_dropout_of(
    trainer: L.Trainer, pl_module: L.LightningModule, oracle: Oracle, told: float | None, labels: Tensor | None
) -> float:
    """Share of samples without label: as told; or 1 if a batch (B,) has none; or the module's; or the batch's."""
    if not oracle.bank.has_labels:
        return 1.0
    if told is not None:
        return told
    share = 1.0 if labels is None else (labels == -1).float().mean()
    seen = float(trainer.strategy.reduce(torch.as_tensor(share, device=pl_module.device), reduce_op="mean"))
    return seen if seen == 1.0 else getattr(pl_module, "label_dropout", seen)


def density_of(pl_module: L.LightningModule) -> TimestepSampler | None:
    """The density that a module draws t from, if it says so; in other code ``timesteps`` may be a number."""
    timesteps = getattr(pl_module, "timesteps", None)
    return timesteps if isinstance(timesteps, TimestepSampler) else None


def describe_stages(profile: StageProfile, timesteps: TimestepSampler | None) -> str:
    """Where the stages lie, and what the regular loss of a run cannot go below."""
    text = (
        f"navigation ends at t = {profile.navigation_end:.3f}, boundary {profile.boundary:.3f}, "
        f"refinement complete at {profile.refinement_complete:.3f}."
    )
    floors = expected_floors(profile, timesteps)
    floor, error = floors["stages/floor"]
    draws = "With uniform t" if timesteps is None else "With t as this run draws it"
    text += f" {draws} the regular loss cannot go below {floor:.4f} ± {error:.4f} on average"
    if "stages/floor_navigation" in floors:
        floor, error = floors["stages/floor_navigation"]
        text += f", before the boundary not below {floor:.4f} ± {error:.4f}"
    return text + "."


def expected_floors(profile: StageProfile, timesteps: TimestepSampler | None) -> dict[str, tuple[float, float]]:
    """The floor, and that before the boundary if t is drawn there, with standard errors, by logged name."""
    floors = {"stages/floor": profile.expected_floor(timesteps)}
    if draws_before(profile.boundary, timesteps):
        floors["stages/floor_navigation"] = profile.expected_floor(timesteps, 0.0, profile.boundary)
    return floors


def stage_metrics(profile: StageProfile, timesteps: TimestepSampler | None) -> dict[str, float]:
    """Where the stages lie, and the floors, by logged name."""
    floors = {name: floor for name, (floor, _) in expected_floors(profile, timesteps).items()}
    return {**{f"stages/{name}": getattr(profile, name) for name in THRESHOLDS}, **floors}


def draws_before(time: float, timesteps: TimestepSampler | None) -> bool:
    """Whether a density (None: uniform) has draws to speak of before a time."""
    t = torch.tensor([time], dtype=torch.float64)
    return (t if timesteps is None else timesteps.cdf(t)).item() > 1e-3


def _other_data(file: str | Path, difference: str) -> str:
    return (
        f"the stages in {file} are not those of this run's data ({difference}): measure them with `fm-stages profile` "
        "of this run's config, or leave monitor.profile out"
    )
