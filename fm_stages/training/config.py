"""The command line of training: LightningCLI with the callbacks of every run, and the config in the checkpoint."""

from __future__ import annotations

import re
import sys
import warnings
from argparse import ArgumentError
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fm_stages.data import TrainingData, describe_shares, read_yaml_file
from fm_stages.training.checkpoints.callback import Checkpoints, checkpoint_folder
from fm_stages.training.checkpoints.continuity import Continuity, is_own
from fm_stages.training.checkpoints.preemption import Preemption, listening
from fm_stages.training.checkpoints.resume import SameStart, blaming, find_last
from fm_stages.training.checkpoints.run_ids import kept_id, name_at_wandb, new_id
from fm_stages.training.checkpoints.verify_resume import Trial, verify_resume
from fm_stages.training.checkpoints.weights import init_from, read_checkpoint
from fm_stages.training.class_paths import check_classes
from fm_stages.training.guards.callback import Guards
from fm_stages.training.guards.rewinding import fit_with_rewinds
from fm_stages.training.launcher import check_num_ranks, find_launcher
from fm_stages.training.lifeline import Lifeline
from fm_stages.training.logs.loggers import choose_wandb_mode, prepare_wandb, tell_lost_files
from fm_stages.training.logs.patience import finish_loggers, make_patient
from fm_stages.training.module import FlowMatching
from fm_stages.training.monitor.callback import OracleMonitor
from fm_stages.training.network_size import check_network
from fm_stages.training.progress import StepProgressBar
from fm_stages.training.run_config import RunConfig, logger_arguments, loggers_of
from fm_stages.training.samples import SampleGrid
from fm_stages.training.sharding import check_strategy
from fm_stages.training.silence import silence
from fm_stages.training.steering.callback import StageAware
from fm_stages.training.throughput import Throughput

BASE = str(files("fm_stages") / "base.yaml")
"""The default configuration, which configs/*.yaml and the command line lie on top of."""

SECTIONS = (
    "seed_everything",
    "trainer",
    "model",
    "data",
    "monitor",
    "steering",
    "samples",
    "throughput",
    "checkpoints",
    "guards",
    "init_from",
    "verify_resume",
    "ckpt_path",
    "weights_only",
)
"""Top-level keys of a configuration."""

CSV_LOGGER, METRICS_TABLE = "lightning.pytorch.loggers.CSVLogger", "fm_stages.training.MetricsTable"
"""What --trainer.logger CSVLogger names, and what a run has in its place: Lightning's begins anew with each start."""

NEEDED = {
    "model.network": "network is named: choose one with --model.network DiT and its arguments",
    "data": "data is named: choose some with --data FashionMNIST",
}
"""Keys that have no default, and what to say of them."""

KEYWORDS = ("last", "best", "hpc")
"""Values of --ckpt_path that Lightning looks up itself."""


def config_files(arguments: list[str]) -> list[str]:
    """The files that command-line arguments name with --config."""
    after = [file for flag, file in zip(arguments, arguments[1:], strict=False) if flag == "--config"]
    return after + [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]


class TrainingCLI(LightningCLI):
    """``fit`` and ``validate``: model, data and trainer from YAML, on top of the package's defaults."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        silence()
        defaults = {"default_config_files": [BASE], "exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            FlowMatching,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={"fit": defaults, "validate": defaults, "exit_on_error": False, "allow_abbrev": False}
            if run
            else defaults,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Which of the Trainer's methods are commands."""
        arguments = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {"fit": arguments, "validate": arguments}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks of every run, each a section of the config, and the weights to start from."""
        (parser.groups or {})["data"].title = "Images or latents to train on"  # Lightning says what a DataModule is
        for callback, section in (
            (Guards, "guards"),
            (OracleMonitor, "monitor"),
            (StageAware, "steering"),
            (SampleGrid, "samples"),
            (Throughput, "throughput"),
            (Checkpoints, "checkpoints"),
        ):
            parser.add_lightning_class_args(callback, section)
        parser.add_argument(
            "--init-from", type=str | None, default=None, help="start from a checkpoint's weights alone (fit only)"
        )
        parser.add_argument(
            "--verify-resume",
            type=NonNegativeInt,
            default=0,
            help="steps to rehearse a resume with before the run; 0: none (fit only)",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a misspelt section is named first, for the parser would complain of what is then missing."""
        self._arguments = arguments = sys.argv[1:] if args is None else list(args)
        for file in config_files(arguments):
            if Path(file).is_file():
                found = read_yaml_file(Path(file))
                if strange := [key for key in found or {} if key not in SECTIONS] if isinstance(found, dict) else []:
                    raise ValueError(f"{file} has a section {strange[0]!r}; there are {', '.join(SECTIONS)}")
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            for key, needed in NEEDED.items():
                if re.search(rf"arguments are required: .*\b(fit|validate)\.{key}\b", str(error)):
                    raise ValueError(f"no {needed}, or with --config FILE that does") from error
            raise
        check_classes(self.config)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint while parsing: `_check` reads it, with a message if it cannot be read."""

    def before_instantiate_classes(self) -> None:
        """Give the logger the run's folder, and wandb a mode that cannot block."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.get("weights_only") is False:
            raise ValueError("weights_only=false would run whatever code a checkpoint holds: leave it out")
        # known before any callback's set-up, for `--ckpt_path last`
        config.checkpoints.dirpath = config.checkpoints.dirpath or checkpoint_folder(config.trainer.default_root_dir)
        self._last: str | None = None
        if self.subcommand == "fit" and config.ckpt_path == "last":
            config.ckpt_path = self._last = find_last(
                config.checkpoints.dirpath, kept_id(Path(config.trainer.default_root_dir))
            )
        goes_on = self.subcommand == "fit" and is_own(config.ckpt_path, config.checkpoints.dirpath)
        if goes_on:
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        self._run_id = (kept_id(Path(config.trainer.default_root_dir)) if goes_on else None) or new_id()
        if any(logger.class_path.endswith("WandbLogger") for logger in loggers_of(config)):
            rank_zero_info(f"wandb: {choose_wandb_mode()}")
        for logger in loggers_of(config):
            if logger.class_path == CSV_LOGGER:
                logger.class_path = METRICS_TABLE
        for arguments in logger_arguments(config):
            if "save_dir" in arguments and arguments["save_dir"] in (None, "."):
                arguments["save_dir"] = config.trainer.default_root_dir

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """The Trainer among the ranks that were started; with one progress bar for the run.

        Checkpoints, what they do on pre-emption, and the bar are only there where they are wanted.
        """
        check_strategy(config["strategy"])
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoints)]
        for checkpoints in [c for c in callbacks if isinstance(c, Checkpoints)]:
            callbacks = [*callbacks, Preemption(checkpoints), Continuity(self._run_id)]
        callbacks = [Lifeline(), SameStart(), *callbacks]
        if config.get("enable_progress_bar") is not False:
            callbacks = [*callbacks, StepProgressBar()]
        given, launcher = config.get("plugins") or [], find_launcher()
        plugins = given if isinstance(given, list) else [given]
        if launcher is not None and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            plugins = [*plugins, launcher]
        trainer = super()._instantiate_trainer({**config, "plugins": plugins}, callbacks)
        if launcher is not None:
            check_num_ranks(trainer, launcher)
        name_at_wandb(trainer, self._run_id)
        for logger in trainer.loggers:
            make_patient(logger)
        return trainer

    def before_fit(self) -> None:
        """Find mistakes before a logger or a folder is made; load the weights that --init-from names."""
        config = self.config[self.subcommand]
        self._check()
        if isinstance(self.datamodule, TrainingData):
            self.datamodule.train_dataloader()  # refuses a batch size that does not fit the data
            shares = self.datamodule.batch_size, self.trainer.world_size, self.trainer.accumulate_grad_batches
            rank_zero_info(describe_shares(*shares))
        try:
            self.model.configure_optimizers()
        except ValueError as error:
            raise ValueError(f"the optimizer refuses its arguments: {error}") from error
        if config.init_from:
            self._start_from_weights(config)
        prepare_wandb(self.trainer)

    def _start_from_weights(self, config: Any) -> None:
        """Load what --init-from names."""
        if config.ckpt_path:
            if is_own(config.ckpt_path, config.checkpoints.dirpath):
                return  # a job that SLURM starts again: it began with these weights, and has gone on since
            raise ValueError("--init-from starts anew from weights, --ckpt_path resumes a run: give one of them")
        model = config.model.clone().as_dict()
        rank_zero_info(init_from(self.model.network, config.init_from, {x: model[x] for x in ("network", "path")}))
        if self.model.network_ema is not None:
            self.model.network_ema.load_state_dict(self.model.network.state_dict())

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, of a network that fits into memory."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        check_network(config.model.network)
        super().instantiate_classes()

    def fit(self, **arguments: Any) -> None:
        """``Trainer.fit``, and again from where the guards go back to; before it, the rehearsal that was asked for."""
        if num_steps := self.config[self.subcommand].verify_resume:
            run = Trial(self.trainer, self.model, self.datamodule)
            verify_resume(self._trial, run, num_steps, arguments.get("ckpt_path"))
        status = 1
        try:
            with listening(self.trainer), blaming(arguments.get("ckpt_path")):
                fit_with_rewinds(self.trainer, **arguments)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
            raise
        finally:
            tell_lost_files(self.trainer)
            finish_loggers(self.trainer.loggers, status)

    def _trial(self, folder: Path) -> Trial:
        """What the same command would build and run in another folder."""
        changes = {
            "trainer.default_root_dir": folder,
            "trainer.logger": METRICS_TABLE,
            "trainer.enable_model_summary": "false",
            "checkpoints.dirpath": "null",
            "ckpt_path": "null",
            "init-from": "null",
        }
        trial = _Trial([*self._arguments, *(f"--{name}={value}" for name, value in changes.items())])
        return Trial(trial.trainer, trial.model, trial.datamodule)

    def before_validate(self) -> None:
        """Validation measures the checkpoint that --ckpt_path names."""
        if self.config[self.subcommand].init_from:
            raise ValueError("--init-from is for fit; name the checkpoint to validate with --ckpt_path")
        if self.config[self.subcommand].ckpt_path in (None, *KEYWORDS):
            raise ValueError("validate measures a checkpoint, not fresh weights: name its file with --ckpt_path")
        self._check()
        prepare_wandb(self.trainer)

    def _check_checkpoint(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Refuse what Lightning would fail on after the run has begun to write."""
        if "pytorch-lightning_version" not in checkpoint:
            raise ValueError(f"{path} holds weights, not a run to go on with: start from it with --init-from")
        theirs, ours = checkpoint["state_dict"], self.model.state_dict()
        wrong = [k for k in {**theirs, **ours} if k not in theirs or k not in ours or theirs[k].shape != ours[k].shape]
        if wrong:
            raise ValueError(f"{path} does not fit the network: {len(wrong)} weights differ, {wrong[0]} first")

    def _check(self) -> None:
        """Data that can be read and fit the network; a checkpoint that can be read."""
        self.model.check_precision(self.trainer)
        if self.trainer.val_check_interval == 0:
            raise ValueError("val_check_interval=0 is no interval: give steps, or set limit_val_batches to 0")
        path = self.config[self.subcommand].ckpt_path
        if path and path not in KEYWORDS:
            checkpoint = read_checkpoint(path, values=path != self._last)  # which `find_last` has read to its end
            self._check_checkpoint(path, checkpoint)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SameStart):
                    callback.start = checkpoint["global_step"], Path(path).name
        self.datamodule.trainer = self.trainer  # what it refuses depends on ranks and accumulation
        self.datamodule.prepare_data()
        self.datamodule.setup(self.subcommand)
        self.model.check_data(self.datamodule)
        interval, parts = self.trainer.val_check_interval, self.trainer.accumulate_grad_batches
        if isinstance(interval, int) and self.trainer.check_val_every_n_epoch is None and interval % parts:
            raise ValueError(
                f"val_check_interval={interval} counts micro-batches where accumulate_grad_batches={parts} is given, "
                "and would validate inside an optimizer step: give a multiple of it, or the data's micro_batch_size in "
                "the place of accumulate_grad_batches, for then it counts steps"
            )
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleGrid) and self.subcommand == "fit":
                callback.check(self.model, self.datamodule)


class _Trial(TrainingCLI):
    """Builds what `TrainingCLI` builds, and leaves it to others to run it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass
