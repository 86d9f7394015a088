"""The runs of a comparison: each a process of its own, so that one that crashes takes no other along."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import yaml

from fm_stages.studies.compare.arms import Arm
from fm_stages.studies.text_files import write_text

POLL_SEC = 0.5
"""Between two looks at a process."""


class RunFailedError(Exception):
    """A run ended without a model; the message says how, and where its log is."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: what to train.
        seed: of weights, noise, times, label dropout and the order of the data.
        out: folder of the comparison.
        base: the configuration's files.
        profile: file of the measured stages, if they are those that this arm's network sees.
        milestones: number of equal parts of the run after which its weights are kept, to be measured.
    """

    arm: Arm
    seed: int
    out: Path
    base: tuple[str, ...]
    profile: Path | None = None
    milestones: int = 1

    @property
    def name(self) -> str:
        """As ``--run`` takes it."""
        return f"{self.arm.name}/{self.seed}"

    @property
    def folder(self) -> Path:
        """Of everything that the run leaves."""
        return self.out / self.arm.name / f"seed_{self.seed}"

    @property
    def checkpoint(self) -> Path:
        """Of the last step."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def milestone_folder(self) -> Path:
        """Of the weights along the way, until they are measured."""
        return self.folder / "milestones"

    @property
    def result_file(self) -> Path:
        """Written when everything else is done."""
        return self.folder / "result.json"

    def arguments(self) -> list[str]:
        """Of ``fm-stages``: the base, the arm on top, and what all arms of this seed share."""
        overlay = [f"--config={self.out / 'arms' / f'{self.arm.name}.yaml'}"] if self.arm.overrides else []
        shared = [f"--seed_everything={self.seed}", f"--model.seed={self.seed}"]
        if "seed" in (self.arm.config["data"].get("init_args") or {}):  # data of the user's own may have none
            shared.append(f"--data.init_args.seed={self.seed}")
        return [
            "fit",
            *(f"--config={file}" for file in self.base),
            *overlay,
            *shared,
            f"--trainer.default_root_dir={self.folder}",
            f"--checkpoints.dirpath={self.checkpoint.parent.absolute()}",
            *([f"--monitor.profile={self.profile}"] if self.profile else []),
            *self._keep_time(),
            *self._keep_milestones(),
        ]

    def _keep_time(self) -> list[str]:
        """Lightning's timer, whose seconds are in the checkpoint, so that they add up over interruptions."""
        trainer = self.arm.config["trainer"]
        if any(str(callback.get("class_path")).endswith(".Timer") for callback in trainer["callbacks"] or []):
            return []
        # beside a timer in the list the Trainer ignores its own max_time
        arguments = {"duration": trainer["max_time"], "interval": "step"}
        timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": arguments}
        return [f"--trainer.callbacks+={json.dumps(timer)}"]

    def _keep_milestones(self) -> list[str]:
        every_n_steps = (self.arm.config["trainer"]["max_steps"] or -1) // self.milestones
        if self.milestones == 1 or every_n_steps < 1:
            return []
        arguments = {"dirpath": str(self.milestone_folder), "every_n_train_steps": every_n_steps}
        arguments |= {"save_top_k": -1, "save_weights_only": True, "filename": "{step}"}
        arguments |= {"enable_version_counter": False}  # of a run that was killed, the same step comes again
        keeper = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}
        return [f"--trainer.callbacks+={json.dumps(keeper)}"]

    def result(self) -> dict[str, Any] | None:
        """What was measured, if the run is finished."""
        return json.loads(self.result_file.read_text()) if self.result_file.is_file() else None


def write_arms(out: Path, arms: Sequence[Arm]) -> None:
    """Write the overrides that the runs read."""
    for arm in arms:
        write_text(out / "arms" / f"{arm.name}.yaml", yaml.safe_dump(arm.overrides))


@contextmanager
def alone(run: Run, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the run's folder: a process that trains there, left by a comparison that was killed, is waited for.

    Yields:
        The descriptor of the lock, for the process that trains: whoever of the two lives longer holds it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def has_begun(folder: Path) -> bool:
    """Whether a run has left something in its folder that is worth keeping, or is being trained there."""
    if (folder / "result.json").is_file() or any(folder.glob("checkpoints/*.ckpt")):
        return True
    if not (folder / "lock").is_file():
        return False
    with (folder / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def train(run: Run, lock: int, group: str, on_poll: Callable[[], None] = lambda: None) -> None:
    """Train one run, from its last checkpoint if it was interrupted.

    Args:
        run: which one.
        lock: from `alone`.
        group: of wandb.
        on_poll: called now and then while it trains.

    Raises:
        RunFailedError: if it does not end well.
    """
    trained = run.folder / "trained"
    if trained.is_file():
        return
    names = {"WANDB_RUN_GROUP": group, "WANDB_JOB_TYPE": run.arm.name, "WANDB_NAME": f"{run.arm.name}, seed {run.seed}"}
    command = [sys.executable, "-m", "fm_stages", *run.arguments()]
    if run.checkpoint.is_file():
        command.append(f"--ckpt_path={run.checkpoint}")
    log = run.folder / "log.txt"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        if not {"", os.getcwd()} & set(sys.path):  # else a file there that is called as a library is would be run
            names["PYTHONSAFEPATH"] = "1"
        # PL_GLOBAL_SEED of this process would be one seed for all
        environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"} | names
        status = _wait(
            Popen(command, stdin=DEVNULL, stdout=file, stderr=file, env=environment, pass_fds=[lock]),
            on_poll,
        )
    if status or not run.checkpoint.is_file():
        reason = f"exit status {status}" if status else "it left no checkpoint (enable_checkpointing must be on)"
        raise RunFailedError(f"{reason}: {_last_line(log)} (log: {log})")
    trained.touch()


def training_seconds(checkpoint: dict[str, Any]) -> float:
    """From the first step on, with monitoring, validation and samples; without start-up and interruptions."""
    return float(checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"])


def _wait(process: Popen[bytes], on_poll: Callable[[], None]) -> int:
    """The exit status; whoever is interrupted while waiting ends the process, too."""
    try:
        while process.poll() is None:
            on_poll()
            time.sleep(POLL_SEC)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process.returncode


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    said = [line for line in lines if line and not line.startswith("$ ")]
    return said[-1][:500] if said else "it said nothing"


def cluster_commands(runs: Sequence[Run], options: Sequence[str]) -> str:
    """Lines that run a comparison's runs anywhere, in any order; a last one collects what they found.

    Args:
        runs: all of them.
        options: of ``fm-stages compare``, those that say what is compared.
    """
    words = shlex.join(options)
    lines = [f"fm-stages compare {words} --run {run.name}" for run in runs]
    array = "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --array=0-{len(runs) - 1}",
            f"runs=({' '.join(run.name for run in runs)})",
            f'fm-stages compare {words} --run "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
        ]
    )
    return (
        "# One line per run; they need a file system in common.\n"
        + "\n".join(lines)
        + "\n\n# The same as a SLURM array, to submit with sbatch (add what your cluster asks for):\n"
        + "\n".join(f"#   {line}" for line in array.splitlines())
        + f"\n\n# When they have ended, the report:\nfm-stages compare {words} --report\n"
    )


def sweep(runs: Sequence[Run], options: Sequence[str], name: str) -> str:
    """The same as a wandb sweep: ``wandb sweep FILE``, then one ``wandb agent`` per machine."""
    return yaml.safe_dump(
        {
            "name": name,
            "method": "grid",
            "command": ["${env}", "fm-stages", "compare", *options, "${args}"],
            "parameters": {"run": {"values": [run.name for run in runs]}},
        },
        sort_keys=False,
    )
