"""Training: the LightningModule, its targets, the callbacks, and the command line that puts them together."""

from fm_stages.training.checkpoints.callback import Checkpoints
from fm_stages.training.checkpoints.continuity import Continuity
from fm_stages.training.checkpoints.preemption import Preempted, Preemption
from fm_stages.training.checkpoints.weights import CONFIG_KEY, init_from, network_weights, read_checkpoint
from fm_stages.training.class_paths import ALLOWED_BY, allow_imports, explain, instantiate
from fm_stages.training.config import SECTIONS, TrainingCLI, config_files
from fm_stages.training.ema import ramped_decay
from fm_stages.training.flops import step_flops
from fm_stages.training.guards import flight
from fm_stages.training.guards.callback import Guards, GuardStop
from fm_stages.training.guards.rewinding import Rewind, find_before, fit_with_rewinds
from fm_stages.training.launcher import find_launcher
from fm_stages.training.logs.loggers import choose_wandb_mode
from fm_stages.training.logs.metrics_table import MetricsTable
from fm_stages.training.module import FlowMatching
from fm_stages.training.monitor.callback import QUANTITIES, OracleMonitor
from fm_stages.training.monitor.checks import check_first_batch, check_num_rows
from fm_stages.training.monitor.held_out import HeldOut
from fm_stages.training.monitor.report import closed, report
from fm_stages.training.monitor.stages import expected_floors, read_profile
from fm_stages.training.network_size import check_network
from fm_stages.training.predictions import Predictions, predict_data, prediction_figure, times_around
from fm_stages.training.samples import SampleGrid, save_grid
from fm_stages.training.sharding import FSDP2Strategy, check_strategy
from fm_stages.training.steering.callback import StageAware
from fm_stages.training.steering.gap_density import GapDensity
from fm_stages.training.steering.policies import Policy, ShiftToBoundary, StageWeights, TargetByStage
from fm_stages.training.subset_targets import ClassSubsetTarget, SharedBatchTarget
from fm_stages.training.targets import (
    BlendTarget,
    ConditionalTarget,
    HybridTarget,
    OracleTarget,
    Target,
    TemperedTarget,
)
from fm_stages.training.throughput import Throughput

__all__ = [
    "ALLOWED_BY",
    "CONFIG_KEY",
    "QUANTITIES",
    "SECTIONS",
    "BlendTarget",
    "Checkpoints",
    "ClassSubsetTarget",
    "ConditionalTarget",
    "Continuity",
    "FSDP2Strategy",
    "FlowMatching",
    "GapDensity",
    "GuardStop",
    "Guards",
    "HeldOut",
    "HybridTarget",
    "MetricsTable",
    "OracleMonitor",
    "OracleTarget",
    "Policy",
    "Preempted",
    "Preemption",
    "Predictions",
    "Rewind",
    "SampleGrid",
    "SharedBatchTarget",
    "ShiftToBoundary",
    "StageAware",
    "StageWeights",
    "Target",
    "TargetByStage",
    "TemperedTarget",
    "Throughput",
    "TrainingCLI",
    "allow_imports",
    "check_first_batch",
    "check_network",
    "check_num_rows",
    "check_strategy",
    "choose_wandb_mode",
    "closed",
    "config_files",
    "expected_floors",
    "explain",
    "find_before",
    "find_launcher",
    "fit_with_rewinds",
    "flight",
    "init_from",
    "instantiate",
    "network_weights",
    "predict_data",
    "prediction_figure",
    "ramped_decay",
    "read_checkpoint",
    "read_profile",
    "report",
    "save_grid",
    "step_flops",
    "times_around",
]
