"""Started on two ranks by test_lifeline.py: a run in which rank $WHO dies of $HOW at $WHERE. Usage: ... FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from faulty_ranks import OPTIONS

from fm_stages import cli
from fm_stages.training import Checkpoints, FlowMatching, OracleMonitor, SampleGrid

RANK = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
PLACES = {
    "step": (FlowMatching, "training_step"),
    "validation": (FlowMatching, "validation_step"),
    "sampling": (SampleGrid, "_draw_grids"),
    "oracle": (OracleMonitor, "_log_window"),
}


def die() -> None:
    """As a process does that is out of memory, has a mistake in it, or leaves in the middle."""
    Path("died").write_text(str(time.time()))
    how = os.environ["HOW"]
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(7)
    if how == "worker":
        import multiprocessing

        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return
    raise OverflowError("the planted error")


def plant() -> None:
    """Let the method at $WHERE, once there is a checkpoint, be the last that this rank does."""
    kind, name = PLACES[os.environ["WHERE"]]
    method, write_last = getattr(kind, name), Checkpoints.write_last
    written = []

    def written_last(self, trainer, **kwargs) -> None:
        write_last(self, trainer, **kwargs)
        written.append(trainer.global_step)

    def dying(self, *args, **kwargs):
        if written and not Path("died").exists():
            die()
        return method(self, *args, **kwargs)

    Checkpoints.write_last = written_last
    if str(RANK) == os.environ["WHO"]:
        setattr(kind, name, dying)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plant()
    sys.argv = [sys.argv[0], "fit", *OPTIONS, "--trainer.max_steps=2000", "--trainer.logger=false"]
    sys.argv += ["--trainer.default_root_dir=run", "--trainer.strategy=ddp"]
    sys.argv += ["--data.init_args.num_workers=2"] if os.environ["HOW"] == "worker" else []
    cli.main()
