"""Started on two ranks by test_faults.py; each leaves what it saw. Usage: torchrun ... faulty_ranks.py FOLDER.

The same short run again and again, by the command: undisturbed, with a logger that raises whatever is called, with a
disk that is full for figures and tables, and with one that is full for a checkpoint.
"""

import os
import resource
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger

from fm_stages import cli
from fm_stages.training import FlowMatching
from fm_stages.training.lifeline import Lifeline

RANK = int(os.environ.get("RANK", "0"))
CONFIG = Path(__file__).parents[2] / "configs/digits_dit.yaml"
NETWORK = "--model.network.init_args"
OPTIONS = [
    *(f"--config={CONFIG}", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=8"),
    *(f"{NETWORK}.hidden_size=16", f"{NETWORK}.depth=1", f"{NETWORK}.num_heads=2", "--data.init_args.batch_size=32"),
    *("--trainer.val_check_interval=4", "--monitor.every_n_steps=1", "--monitor.window=2", "--monitor.num_probe=0"),
    *("--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
    *("--samples.num_samples=10", "--samples.num_steps=2", "--samples.every_n_steps=4"),
]
METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
FULL_BYTES = 2000
end: dict[str, torch.Tensor] = {}


class KeptEnd(Lifeline):
    def teardown(self, trainer, pl_module, stage) -> None:
        end.clear()
        end.update({name: x.clone() for name, x in pl_module.state_dict().items()})
        super().teardown(trainer, pl_module, stage)


def fit(run: str, *options: str) -> dict:
    """Status, weights at the end, and what was warned of."""
    sys.argv = ["fm-stages", "fit", *OPTIONS, f"--trainer.default_root_dir={run}", *options]
    status = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
    told = [str(w.message) for w in seen if "Training goes on" in str(w.message) and "spike" not in str(w.message)]
    return {"status": status, "weights": dict(end), "warnings": told}


def fail(*args, **kwargs):
    raise RuntimeError("the service is gone")


def fill_disk(*_) -> None:
    """No file can grow beyond `FULL_BYTES` on rank 0, by the kernel's word."""
    if RANK == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, resource.RLIM_INFINITY))


def empty_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    torch.set_num_threads(1)
    import fm_stages.training.config as config

    config.Lifeline = KeptEnd
    found = {"whole": fit("whole", "--trainer.logger=false")}

    kept = {name: vars(CSVLogger)[name] for name in METHODS if name in vars(CSVLogger)}
    for name in METHODS:
        setattr(CSVLogger, name, fail)
    experiment, CSVLogger.experiment = CSVLogger.experiment, property(fail)
    found["logger"] = fit("logger", "--trainer.logger=CSVLogger")
    CSVLogger.experiment = experiment
    for name in METHODS:
        delattr(CSVLogger, name)
    for name, method in kept.items():
        setattr(CSVLogger, name, method)

    config.Lifeline.on_train_start = fill_disk
    found["tables"] = fit("tables", "--trainer.logger=CSVLogger", "--trainer.enable_checkpointing=false")
    empty_disk()

    del config.Lifeline.on_train_start
    step = FlowMatching.training_step

    def full_from_step_5(self, *args, **kwargs):
        if self.global_step == 5:
            fill_disk()
        return step(self, *args, **kwargs)

    FlowMatching.training_step = full_from_step_5
    found["checkpoint"] = fit("checkpoint", "--trainer.logger=false")
    empty_disk()
    torch.save(found, f"rank{RANK}.pt")
