"""Ranks of a study: two tasks as srun starts them meet, and a process of a job that is no task stays alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from fm_stages.studies.ranks import Job, ranks_of_the_job

MEET = """
import torch.distributed as dist
from fm_stages.studies.ranks import ranks_of_the_job
with ranks_of_the_job() as job:
    said = [None] * job.num_ranks
    dist.all_gather_object(said, (job.rank, job.local_rank), group=job.group)
    print(said)
print(dist.is_initialized())
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_tasks_of_srun_meet():
    """The first node's name is all that says where: here it is this machine's."""
    job = {"SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "sample", "SLURM_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    step = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **job, **step, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("MASTER_ADDR", None)
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", MEET],
            env={**environment, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    try:
        printed = [task.communicate(timeout=120)[0].split("\n") for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [lines[:2] for lines in printed] == [["[(0, 0), (1, 1)]", "False"]] * 2


def test_a_batch_script_stays_alone(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    with ranks_of_the_job() as job:
        assert job == Job(rank=0, local_rank=0, num_ranks=1, group=None)
