"""Which launcher is found, from the variables that torchrun, srun, sbatch and salloc leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from fm_stages.training import find_launcher

JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
TASK = {**JOB, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}


@pytest.fixture
def found(monkeypatch):
    """The launcher in an environment of these variables alone."""

    def find(variables: dict[str, str]):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_launcher()

    return find


def test_nobody(found):
    assert found({}) is None


@pytest.mark.parametrize("job_name", ["fit", "bash"])  # bash: srun of two tasks from a shell that salloc gave
def test_a_task_of_srun(found, job_name):
    launcher = found({**TASK, "SLURM_JOB_NAME": job_name})
    assert isinstance(launcher, SLURMEnvironment)
    assert not launcher.auto_requeue
    assert (launcher.global_rank(), launcher.local_rank(), launcher.world_size()) == (1, 1, 2)


def test_torchrun_inside_a_task_of_srun(found):
    """Several nodes: srun starts one torchrun on each."""
    launcher = found({**TASK, **TORCHRUN})
    assert isinstance(launcher, TorchElasticEnvironment)
    assert (launcher.global_rank(), launcher.local_rank(), launcher.world_size()) == (1, 0, 3)


@pytest.mark.parametrize("step", [{}, {"SLURM_PROCID": "0"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}])
def test_a_shell_or_batch_script_of_a_job_is_no_rank(found, step):
    launcher = found({**JOB, **step})
    assert isinstance(launcher, LightningEnvironment)
    assert launcher.world_size() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells a rank")
def test_a_rank_ends_when_torchrun_is_killed():
    rank = "from fm_stages.training import find_launcher; find_launcher(); print('here', flush=True); input()"
    torchrun = (
        "import os, subprocess, sys\n"
        "os.environ['TORCHELASTIC_RUN_ID'] = 'run'\n"
        f"subprocess.run([sys.executable, '-c', {rank!r}])"
    )
    pipe, own = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen([sys.executable, "-c", torchrun], stdin=pipe, stdout=pipe, env=own)
    assert running.stdout.readline() == b"here\n"
    running.kill()
    assert running.stdout.read() == b""  # which ends when the last process that could write has ended
    running.wait()
