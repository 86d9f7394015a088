"""Who started this process beside others: torchrun, srun, or nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import lightning as L
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)


def find_launcher() -> ClusterEnvironment | None:
    """The launcher whose ranks this process is one of, as Lightning knows it; None: nobody that is looked for here.

    Lightning takes any process of a job with several tasks for a rank, also the one of a batch script or of a shell
    inside salloc, which then waits for others that nobody starts. Only srun numbers the tasks of a step.

    Raises:
        RuntimeError: where srun was given --ntasks without --ntasks-per-node.
    """
    if TorchElasticEnvironment.detect():
        end_with_parent()
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return SLURMEnvironment(auto_requeue=False)  # else Lightning saves a checkpoint inside its signal handler
    return LightningEnvironment() if "SLURM_JOB_ID" in os.environ else None


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this rank once torchrun is gone: killed, it takes no rank along.

    They would train on unseen, and write into the folder of the run that is started again.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def check_num_ranks(trainer: L.Trainer, launcher: ClusterEnvironment) -> None:
    """Refuse a Trainer that counts on other ranks than were started: each would train alone, or wait for ever.

    Raises:
        ValueError: on every rank.
    """
    if isinstance(launcher, LightningEnvironment):
        return  # which starts as many as the Trainer wants
    num_ranks, devices, nodes = launcher.world_size(), trainer.num_devices, trainer.num_nodes
    if devices * nodes != num_ranks:
        raise ValueError(
            f"--trainer.devices {devices} (on each node) times --trainer.num_nodes {nodes} are not the {num_ranks} "
            "ranks that were started: give both, as the files in configs/cluster do"
        )
