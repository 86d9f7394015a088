"""OracleMonitor: the exact oracle beside any training run, on the minibatches that the run trains on anyway."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor

from fm_stages import plots
from fm_stages.flow import Path
from fm_stages.oracle import (
    Curves,
    DataBank,
    Oracle,
    StageProfile,
    Wiener,
    decompose,
    describe,
    linear_reference,
    oracle_of,
    timestep_bins,
)
from fm_stages.training.alerts import alert
from fm_stages.training.checks import check_first_batch, check_num_rows, outputs_of
from fm_stages.training.flops import step_flops
from fm_stages.training.held_out import HeldOut
from fm_stages.training.loggers import log_curves, log_figure, log_metrics, run_folder
from fm_stages.training.report import held_out_metrics, report, train_metrics
from fm_stages.training.stages import (
    check_label_dropout,
    density_of,
    describe_stages,
    label_dropout_of,
    measure_profile,
    read_profile,
    stage_metrics,
)
from fm_stages.training.window import Window

QUANTITIES = ("regular", "gap", "floor", "residual", "identity", "top1", "ess", "zero", "wiener")

ALARM = 5.0
"""|z| of the identity's residual that two windows running must exceed to raise the alarm."""


class OracleMonitor(L.Callback):
    """Splits the regular loss into gap and floor by timestep while training goes on, and logs both by stage.

    Works with any LightningModule whose ``training_step`` returns a dict with ``loss, x0, x1, x_t, t, prediction`` and,
    where the network sees classes, ``labels`` after label dropout (-1 = null). ``index`` (row in the bank) is used
    where it is there. Held-out batches are measured if ``validation_step`` returns the same, with ``prediction_ema``
    for averaged weights.

    The bank comes from ``datamodule.bank()`` and the path from ``module.path``, unless they are given.

    Args:
        every_n_steps: optimizer steps between measurements of a minibatch.
        window: measurements that are accumulated before a line is logged.
        num_bins: timestep bins, even in logit(t).
        bank: the training set, if the datamodule does not say.
        path: between noise and data, if the module does not say.
        label_dropout: share of training samples that the network sees without a label; None: the module's attribute of
            that name, or else the share in the first batch. It decides where the stages lie.
        profile: file that ``fm-stages profile`` wrote for this data and path; None: the stages are measured.

    Raises:
        ValueError: if a number lies outside its range.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        window: int = 8,
        num_bins: int = 18,
        bank: DataBank | None = None,
        path: Path | None = None,
        label_dropout: float | None = None,
        profile: str | None = None,
    ) -> None:
        if every_n_steps < 1 or window < 1:
            raise ValueError(f"every_n_steps={every_n_steps} and window={window} must be 1 or more")
        timestep_bins(num_bins)  # refuses a bad number now
        self.every_n_steps = every_n_steps
        self.window = window
        self.num_bins = num_bins
        self.bank = bank
        self.path = path
        self.label_dropout = label_dropout
        self.profile_file = profile
        self.wiener: Wiener | None = None
        self.profile: StageProfile | None = None
        self.train: Curves | None = None
        """Curves of the last window on training inputs (raw weights)."""
        self.logged_step = 0
        """Step at which that window ended."""
        self.held_out: dict[str, Curves] = {}
        """Curves of the last validation, by suffix: "" raw, "_ema" averaged weights."""
        self._oracle: Oracle | None = None
        self._window: Window | None = None
        self._restored: dict[str, Any] | None = None
        self._held_out_sums: HeldOut | None = None
        self._checked = self._alarming = self._measuring = False
        self._last_step = 0
        self._share: float | None = None  # of unlabelled samples that the profile is for, once it is known

    @property
    def oracle(self) -> Oracle:
        """The oracle of the training set, from `setup` on."""
        assert self._oracle is not None
        return self._oracle

    # set-up ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find bank and path, before any training time is spent."""
        path = self.path or getattr(pl_module, "path", None)
        if not isinstance(path, Path):
            raise ValueError(
                f"OracleMonitor needs to know the path: {type(pl_module).__name__} has no attribute `path`; give "
                "OracleMonitor(path=LinearPath()), or the path that x_t is made with"
            )
        datamodule = getattr(trainer, "datamodule", None)
        bank = self.bank
        if bank is None:
            if datamodule is None or not hasattr(datamodule, "bank"):
                raise ValueError(
                    "OracleMonitor needs the training set: give the Trainer a datamodule with bank(), or "
                    "OracleMonitor(bank=DataBank(x1, labels))"
                )
            bank = datamodule.bank()
        if self._oracle is None or self._oracle.bank is not bank or self._oracle.path is not path:
            self.profile = self.wiener = self._share = None  # of other data
        self._oracle = oracle_of(bank, path)
        if self.profile is None and self.profile_file is not None:
            self.profile = read_profile(self.profile_file, self._oracle)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, seen: dict[str, Tensor], share: float) -> None:
        """Say what the bank costs, and measure the stages of the data and the linear reference, once."""
        bank = self.oracle.bank.to(pl_module.device)
        flops = step_flops(pl_module, seen["x_t"], seen["t"], seen.get("labels"))
        cost = describe(bank, len(seen["t"]), share, trainer.world_size, flops)
        rank_zero_info(f"Oracle: {cost}")
        if self.profile is not None and self.profile_file is not None:
            check_label_dropout(self.profile, share, self.profile_file)
            source = f"read from {self.profile_file}"
        else:
            rank_zero_info("Oracle: measuring the stages ...")
            start = time.perf_counter()
            self.profile = measure_profile(trainer, self.oracle, share)
            source = f"measured in {time.perf_counter() - start:.0f} s"
        self._share = share
        self.wiener = linear_reference(bank, self.oracle.path)
        density = density_of(pl_module)
        rank_zero_info(f"Oracle: stages {source}: {describe_stages(self.profile, density)}")
        if not 0 < self.profile.boundary < 1:
            text = (
                "the posterior has always collapsed" if self.profile.boundary == 0 else "the posterior never collapses"
            )
            alert(trainer, "No boundary between the stages was found", f"{text}: is the data what it should be?")

    # training --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the bank's size; begin anew, or go on with what the checkpoint holds."""
        check_num_rows(self.oracle, trainer)
        self._last_step = trainer.global_step
        state = self._restored or {"train": None, "held_out": {}, "alarming": False, "logged_step": 0}
        self._checked, self._alarming, self.logged_step = False, state["alarming"], state["logged_step"]
        self.train = None if state["train"] is None else Curves(**state["train"])
        self.held_out = {suffix: Curves(**curves) for suffix, curves in state["held_out"].items()}
        self._window = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the minibatch that was just trained on, every n-th optimizer step."""
        if not self._checked:
            self._begin(trainer, pl_module, outputs)
        step = trainer.global_step
        if step == self._last_step or step % self.every_n_steps:
            return  # inside a step of accumulated gradients, or not this step's turn
        self._last_step = step
        start = _clock(pl_module.device)
        seen = outputs_of(outputs, pl_module)
        parts = decompose(
            self.oracle,
            seen["x0"],
            seen["x1"],
            seen["t"],
            seen["prediction"],
            seen.get("labels"),
            seen.get("index") if self.oracle.collapses else None,
            self.wiener,
        )
        assert self._window is not None
        self._window.add(parts.t, {name: getattr(parts, name) for name in QUANTITIES})
        self._window.oracle_sec += _clock(pl_module.device) - start
        if self._window.num_measured >= self.window:
            gap = self._log_window(trainer, pl_module)
            # for the progress bar, and for callbacks that watch a number
            pl_module.log("oracle/gap", gap, prog_bar=True, logger=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what an unfinished window holds, if there is nothing better, and say what the run found."""
        if self.train is None and self._window is not None and self._window.num_measured:
            self._log_window(trainer, pl_module)
        self._print_report(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What is measured so far. Every rank calls this, as Lightning does when it writes a checkpoint."""
        return {
            "window": None if self._window is None else self._window.state_dict(),
            "train": None if self.train is None else asdict(self.train),
            "held_out": {suffix: asdict(curves) for suffix, curves in self.held_out.items()},
            "alarming": self._alarming,
            "logged_step": self.logged_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next fit go on from `state_dict`."""
        self._restored = state_dict

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        """Check the first batch against the bank, and open the first window."""
        seen = outputs_of(outputs, pl_module)
        self.oracle.bank.to(pl_module.device)
        check_first_batch(self.oracle, seen)
        self._checked = True
        share = label_dropout_of(trainer, pl_module, self.oracle, self.label_dropout, seen.get("labels"))
        if self._share != share:
            self._prepare(trainer, pl_module, seen, share)
        self._window = self._new_window(pl_module)
        if self._restored is not None and self._restored["window"] is not None:
            self._window.load_state_dict(self._restored["window"])
        self._restored = None

    def _new_window(self, pl_module: L.LightningModule) -> Window:
        assert self.profile is not None
        edges = timestep_bins(self.num_bins, boundary=self.profile.boundary)
        return Window(QUANTITIES, edges, pl_module.device)

    def _log_window(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
        """Reduce over ranks, log scalars, table and figure, test the identity, open a new window; returns the gap."""
        start = _clock(pl_module.device)
        assert self._window is not None
        self.train = self._window.compute()  # on every rank: the sums are reduced
        assert self.profile is not None
        metrics = train_metrics(self.train, self.profile.boundary)
        metrics |= stage_metrics(self.profile, density_of(pl_module))
        metrics["oracle/share"] = self._window.share(start)
        shift = getattr(getattr(pl_module, "timesteps", None), "shift", None)
        if shift is not None:
            metrics["stages/shift"] = shift
        log_metrics(trainer, metrics)
        self._test_identity(trainer, metrics["oracle/identity_z"])
        log_curves(trainer, "oracle/gap_by_t", self.train)
        self._draw(trainer)
        self._window = self._new_window(pl_module)
        # what was just spent on logging counts for the window that it delays
        self._window.start, self._window.oracle_sec = start, _clock(pl_module.device) - start
        self.logged_step = trainer.global_step
        return metrics["oracle/gap"]

    def _test_identity(self, trainer: L.Trainer, z: float) -> None:
        """Warn when regular = gap + floor fails beyond chance in two windows running."""
        alarming = abs(z) > ALARM
        if alarming and self._alarming:
            alert(
                trainer,
                "The identity regular = gap + floor is broken",
                f"z = {z:.1f}, two windows running. The bank is not the distribution that the network trains on "
                "(another augmentation, coupling of noise and data, or labels): do not trust gap and floor.",
            )
        self._alarming = alarming

    # held-out --------------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin new held-out curves."""
        self._held_out_sums = None
        self._measuring = not trainer.sanity_checking

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a held-out batch; a module that returns nothing of use is left in peace."""
        if not self._measuring or not isinstance(outputs, dict) or "prediction" not in outputs:
            return
        seen = outputs_of(outputs, pl_module)
        if self._share is None:  # `validate` without a fit
            share = label_dropout_of(trainer, pl_module, self.oracle, self.label_dropout, seen.get("labels"))
            self._prepare(trainer, pl_module, seen, share)
        assert self.profile is not None
        if self._held_out_sums is None:
            edges = timestep_bins(self.num_bins, boundary=self.profile.boundary)
            self._held_out_sums = HeldOut(edges, self.profile.boundary, pl_module.device)
        self._held_out_sums.update(self.oracle, self.wiener, seen)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log held-out numbers, each with the suffix of its weights."""
        if self._held_out_sums is None or self.profile is None:
            return
        self.held_out = self._held_out_sums.compute()
        self._held_out_sums = None
        metrics: dict[str, float] = {}
        for suffix, curves in self.held_out.items():
            metrics |= held_out_metrics(curves, self.profile.boundary, suffix)
            log_curves(trainer, f"oracle_val/gap_by_t{suffix}", curves)
        log_metrics(trainer, metrics)
        if trainer.state.fn == "validate":
            self._print_report(trainer)

    # what a person sees ----------------------------------------------------------------------------------------------

    @rank_zero_only
    def _draw(self, trainer: L.Trainer) -> None:
        assert self.train is not None
        assert self.profile is not None
        held_out = self.held_out.get("")
        title = f"step {trainer.global_step}, raw weights"
        figure = plots.gap_by_t(
            self.train.edges,
            self.train.mean,
            self.train.sem,
            self.profile.boundary,
            held_out.mean if held_out else None,
            title,
        )
        log_figure(trainer, "oracle/gap_by_t", figure)

    @rank_zero_only
    def _print_report(self, trainer: L.Trainer) -> None:
        if self.profile is None or (self.train is None and not self.held_out):
            print(f"OracleMonitor measured nothing: the run ended before step {self.every_n_steps}.")
            return
        if self.train is not None:
            self._draw(trainer)  # with the newest held-out curve
        print("\n" + report(self.train, self.held_out, self.profile.boundary))
        if self.train is not None:
            print(f"\nTraining rows: mean of the last window of measurements, which ended at step {self.logged_step}.")
        checkpoint = getattr(trainer.checkpoint_callback, "dirpath", None)
        print(f"\nFigures and tables: {run_folder(trainer)}" + (f"\nCheckpoints: {checkpoint}" if checkpoint else ""))


def _clock(device: torch.device) -> float:
    """Seconds, after the device has done what it was asked to: only measured steps wait."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
