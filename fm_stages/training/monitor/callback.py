"""OracleMonitor: the exact oracle beside any training run, on the minibatches that the run trains on anyway."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor

from fm_stages.flow import Path
from fm_stages.oracle import (
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
from fm_stages.training.flops import step_flops
from fm_stages.training.logs.loggers import current_step, log_metrics, write_curves
from fm_stages.training.monitor.checks import check_first_batch, check_num_rows, find_bank, find_path, outputs_of
from fm_stages.training.monitor.figures import Figures
from fm_stages.training.monitor.findings import Findings
from fm_stages.training.monitor.generalisation import best_step_metrics, named, validation_metrics
from fm_stages.training.monitor.identity import IdentityAlarm
from fm_stages.training.monitor.report import print_report, train_metrics
from fm_stages.training.monitor.stages import (
    density_of,
    find_stages,
    kept_profile,
    label_dropout_of,
    read_profile,
    stage_metrics,
)
from fm_stages.training.monitor.validation import Validation
from fm_stages.training.monitor.window import Window

QUANTITIES = ("regular", "gap", "floor", "residual", "identity", "top1", "ess", "zero", "wiener")


class OracleMonitor(Findings, L.Callback):
    """Splits the regular loss into gap and floor by timestep while training goes on, and logs both by stage.

    Works with any LightningModule whose ``training_step`` returns a dict with ``loss, x0, x1, x_t, t, prediction`` and,
    where the network sees classes, ``labels`` after label dropout (-1 = null). ``index`` (row in the bank) is used
    where it is there. Held-out batches are measured if ``validation_step`` returns the same, with ``prediction_ema``
    for averaged weights, and beside them a probe of training images if the module has `FlowMatching.predict_fixed`.
    `EarlyStopping` and `ModelCheckpoint` can monitor whatever a validation finds, under the logged names.

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
        num_probe: training images that each validation measures beside the held-out ones, at most as many as those;
            0 = none.

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
        num_probe: int = 1024,
    ) -> None:
        if every_n_steps < 1 or window < 1 or num_probe < 0:
            raise ValueError(
                f"every_n_steps={every_n_steps} and window={window} must be 1 or more, num_probe={num_probe} 0 or more"
            )
        timestep_bins(num_bins)  # refuses a bad number now
        super().__init__()
        self.every_n_steps = every_n_steps
        self.window = window
        self.num_bins = num_bins
        self.bank = bank
        self.path = path
        self.label_dropout = label_dropout
        self.profile_file = profile
        self.num_probe = num_probe
        self.wiener: Wiener | None = None
        self.profile: StageProfile | None = None
        self._oracle: Oracle | None = None
        self._window: Window | None = None
        self._restored: dict[str, Any] | None = None
        self._validation: Validation | None = None
        self._alarm, self._figures = IdentityAlarm(), Figures()
        self._checked = self._measuring = False
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
        path = self.path or find_path(pl_module)
        bank = self.bank or find_bank(trainer)
        if self._oracle is None or self._oracle.bank is not bank or self._oracle.path is not path:
            self.profile = self.wiener = self._share = None  # of other data
        self._oracle = oracle_of(bank, path)
        if self.profile is None and self.profile_file is not None:
            self.profile = read_profile(self.profile_file, self._oracle)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, seen: dict[str, Tensor], share: float) -> None:
        """Say what the bank costs, and measure the stages of the data and the linear reference, once."""
        flops = step_flops(pl_module, seen["x_t"], seen["t"], seen.get("labels"))
        bank = self.oracle.bank.to(pl_module.device)
        rank_zero_info(f"Oracle: {describe(bank, len(seen['t']), share, trainer.world_size, flops)}")
        known, file = (self.profile, self.profile_file) if self.profile_file is not None else (None, None)
        if known is None and (kept := kept_profile(self._restored, self.oracle, share)) is not None:
            known, file = kept, "the checkpoint"
        self.profile = find_stages(trainer, pl_module, self.oracle, share, known, file)
        self._share = share
        self.wiener = linear_reference(bank, self.oracle.path)

    # training --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the bank's size; begin anew, or go on with what the checkpoint holds."""
        check_num_rows(self.oracle, trainer)
        self._last_step = trainer.global_step
        self._checked, self._alarm.alarming = False, False
        self.forget()
        if self._restored is not None:
            self._alarm.alarming = self._restored["alarming"]
            self.restore(self._restored)
        self._figures = Figures()
        self._window = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the minibatch that was just trained on, every n-th optimizer step."""
        if trainer.global_step == getattr(pl_module, "skipped_step", -1):
            return  # left out by `Guards`: one NaN would be the mean of the window
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
        if self._window is None and self._restored is not None:
            window = self._restored["window"]  # no batch has come since the run went on
        else:
            window = None if self._window is None else self._window.state_dict()
        return {
            "window": window,
            "alarming": self._alarm.alarming,
            "profile": None if self.profile is None else self.profile.to_json(),
            "share": self._share,
            **self.findings(),
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
        share = self._share_of(trainer, pl_module, seen)
        if self._share != share:
            self._prepare(trainer, pl_module, seen, share)
        self._window = Window(QUANTITIES, self._edges(), pl_module.device)
        if self._restored is not None and self._restored["window"] is not None:
            self._window.load_state_dict(self._restored["window"])
        self._restored = None

    def _share_of(self, trainer: L.Trainer, pl_module: L.LightningModule, seen: dict[str, Tensor]) -> float:
        """Share of samples without label, which is known or is counted once in a run."""
        kept = (self._restored or {}).get("share")
        told = kept if self.label_dropout is None and not hasattr(pl_module, "label_dropout") else self.label_dropout
        return label_dropout_of(trainer, pl_module, self.oracle, told, seen.get("labels"))

    def _edges(self) -> list[float]:
        """Of the timestep bins, with the boundary among them."""
        assert self.profile is not None
        return timestep_bins(self.num_bins, boundary=self.profile.boundary)

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
        self._alarm.test(trainer, metrics["oracle/identity_z"])
        write_curves(trainer, "oracle/gap_by_t", self.train)
        self.logged_step = trainer.global_step
        self.windows.add(self.logged_step, {"train": self.train})
        self._figures.draw(trainer, self)
        self._window = Window(QUANTITIES, self._edges(), pl_module.device)
        # what was just spent on logging counts for the window that it delays
        self._window.start, self._window.oracle_sec = start, _clock(pl_module.device) - start
        return metrics["oracle/gap"]

    # held-out --------------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin new held-out curves."""
        self._validation = None
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
            self._prepare(trainer, pl_module, seen, self._share_of(trainer, pl_module, seen))
        assert self.profile is not None
        if self._validation is None:
            boundary, device = self.profile.boundary, pl_module.device
            self._validation = Validation(self.oracle, self.wiener, self._edges(), boundary, device)
        self._validation.add(seen)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the probe; log what was found, each number with the suffix of its weights."""
        if self._validation is None or self.profile is None:
            return
        self.held_out, self.probe = self._validation.finish(trainer, pl_module, self.num_probe)
        self._validation, self.validated_step = None, current_step(trainer)
        metrics = validation_metrics(self.held_out, self.probe, self.profile.boundary)
        if trainer.state.fn == "fit":
            best = best_step_metrics(self.validations, self.profile.boundary)
            self.validations.add(self.validated_step, named(self.held_out, self.probe), best.values())
            metrics |= best_step_metrics(self.validations, self.profile.boundary)
        log_metrics(trainer, metrics)
        for name, value in metrics.items():  # for callbacks that watch a number; all ranks have the same ones
            pl_module.log(name, value, logger=False, sync_dist=True)
        for suffix, curves in self.held_out.items():
            write_curves(trainer, f"oracle_val/gap_by_t{suffix}", curves)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw; after ``validate`` say what was found."""
        if not self._measuring:
            return
        if trainer.state.fn == "validate":
            self._print_report(trainer)
        else:
            self._figures.draw(trainer, self)

    # what a person sees ----------------------------------------------------------------------------------------------

    @rank_zero_only
    def _print_report(self, trainer: L.Trainer) -> None:
        self._figures.draw(trainer, self, now=True)
        print_report(trainer, self)


def _clock(device: torch.device) -> float:
    """Seconds, after the device has done what it was asked to: only measured steps wait."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
