"""The shipped job script on a real SLURM, with two tasks: whatever ends a run early, it goes on, to the last bit.

Started by slurm.sh in an empty folder. Usage: python check_slurm.py
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

from checks import OPTIONS, REPOSITORY, STEPS, check, check_same_end, finish, wait_for

LOGGERS = "--trainer.logger=" + json.dumps(
    [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": "."}}
        for name in ("CSVLogger", "WandbLogger")
    ]
)


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Job:
    """The shipped script, submitted for two tasks on the only node."""

    def __init__(self, run: str, *options: str) -> None:
        self.run = Path(run)
        command = ["sbatch", "--parsable", "--ntasks-per-node", "2", f"{REPOSITORY}/configs/cluster/fit.sbatch"]
        self.id = call(*command, *OPTIONS, LOGGERS, f"--trainer.default_root_dir={run}", *options).strip()
        self.last = self.run / "checkpoints/last.ckpt"

    def field(self, name: str) -> str:
        return re.search(rf"\b{name}=(\S+)", call("scontrol", "show", "job", self.id)).group(1)

    def wait_for_state(self, *states: str) -> None:
        wait_for(f"job {self.id} to be {states}", lambda: self.field("JobState") in states)

    def wait_for_checkpoint(self) -> None:
        wait_for(f"a checkpoint in {self.run}", self.last.exists)

    @property
    def log(self) -> str:
        return Path(f"fm-stages-{self.id}.out").read_text()

    @property
    def run_id(self) -> str:
        return (self.run / "run_id.txt").read_text().strip()

    def logged_steps(self) -> list[int]:
        """Steps with a loss, in the one table of all starts."""
        (table,) = self.run.glob("version_*/metrics.csv")
        with table.open(newline="") as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]


def check_continued(job: Job, whole: Job, run_id: str) -> None:
    """The same weights as the uninterrupted run, and each step logged once; at wandb it is one run."""
    check_same_end(job.run, whole.run)
    steps = job.logged_steps()
    check("its table holds every step once", steps == list(range(STEPS)), steps[-3:])
    check("no run waits to be resumed", not (job.run / "preempted.txt").exists())
    at_wandb = [folder.name.rpartition("-")[2] for folder in job.run.glob("wandb/offline-run-*")]
    check("each start is the same run at wandb", at_wandb == [run_id] * 2 and job.run_id == run_id, at_wandb)


def main() -> None:
    print("A run from start to end")
    whole = Job("whole")
    whole.wait_for_state("COMPLETED", "FAILED")
    check("the job completes", whole.field("JobState") == "COMPLETED", whole.log[-2000:])
    check("the first start says that there is nothing to go on from", whole.log.count("the run starts at step 0") == 1)
    check(
        "two tasks are two ranks of one run", "2 processes" in whole.log and whole.logged_steps() == list(range(STEPS))
    )

    print("scancel --signal=USR1, as before the time limit")
    job = Job("signal")
    job.wait_for_checkpoint()
    run_id = job.run_id
    call("scancel", "--signal=USR1", job.id)
    wait_for("the job to be requeued", lambda: job.field("Restarts") == "1")
    check("preempted.txt says that it waits", (job.run / "preempted.txt").exists())
    job.wait_for_state("COMPLETED", "FAILED", "CANCELLED")
    check("the job is requeued and completes", job.field("JobState") == "COMPLETED", job.log[-2000:])
    check_continued(job, whole, run_id)

    print("scontrol requeue, as when SLURM takes the nodes")
    job = Job("requeue")
    job.wait_for_checkpoint()
    run_id = job.run_id
    call("scontrol", "requeue", job.id)
    wait_for("the job to be requeued", lambda: job.field("Restarts") == "1")
    job.wait_for_state("COMPLETED", "FAILED", "CANCELLED")
    check("the job completes", job.field("JobState") == "COMPLETED", job.log[-2000:])
    check("and was requeued once", job.field("Restarts") == "1", job.field("Restarts"))
    check_continued(job, whole, run_id)

    print("scancel, and the same submitted again")
    job = Job("cancel")
    job.wait_for_checkpoint()
    run_id = job.run_id
    call("scancel", job.id)
    job.wait_for_state("CANCELLED", "COMPLETED", "FAILED")
    wait_for("its processes to end", lambda: "steps" not in call("squeue", "--noheader", "--format", "steps"))
    check("a cancelled job is not requeued", (job.field("JobState"), job.field("Restarts")) == ("CANCELLED", "0"))
    again = Job("cancel")
    again.wait_for_state("COMPLETED", "FAILED", "CANCELLED")
    check("the second job completes", again.field("JobState") == "COMPLETED", again.log[-2000:])
    check_continued(again, whole, run_id)

    print("A mistake")
    job = Job("mistake", "--data.init_args.batch_size=63")
    job.wait_for_state("COMPLETED", "FAILED", "CANCELLED")
    check("fails at once and is not requeued", (job.field("JobState"), job.field("Restarts")) == ("FAILED", "0"))
    check("with one line that says why", "batch_size=63" in job.log, job.log[-2000:])

    print("fm-stages sample by srun; and processes of a job that are no tasks")
    tasks = ("--ntasks-per-node", "2")
    call(
        "srun",
        *tasks,
        "fm-stages",
        "sample",
        "--ckpt",
        str(whole.last),
        "--num",
        "6",
        "--num_steps",
        "2",
        "--out",
        "drawn",
    )
    (drawn,) = json.loads(Path("drawn/sampling.json").read_text())["calls"]
    check("two tasks draw together", (drawn["ranks"], drawn["images"]) == (2, 6), drawn)
    alone = "from fm_stages.training import find_launcher; print(type(find_launcher()).__name__)"
    for way in (("salloc", *tasks), ("salloc", *tasks, "srun", "--ntasks", "1", "--ntasks-per-node", "1")):
        found = call(*way, sys.executable, "-c", alone).split()
        check(f"{' '.join(way)}: one process is no rank", found == ["LightningEnvironment"], found)


if __name__ == "__main__":
    main()
    finish()
