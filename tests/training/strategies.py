"""Started on two ranks by test_sharding.py: training under DDP and FSDP2, alone and in turn from one checkpoint.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 strategies.py FOLDER short|long
"""

from __future__ import annotations

import faulthandler
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fm_stages import cli, plots
from fm_stages.data import Digits
from fm_stages.flow import LearnedWeighting
from fm_stages.networks import DiT, UNet
from fm_stages.training import (
    FlowMatching,
    FSDP2Strategy,
    OracleMonitor,
    SampleGrid,
    ShiftToBoundary,
    StageAware,
    Throughput,
)

CONFIGS = Path(__file__).parents[2] / "configs"
TIMEOUT_SEC = {"short": 220, "long": 560}
NUM_STEPS = 20
SAVED = (5, 10, 15)
BATCH = 48
"""Images of a step."""


def make_network(**options: Any) -> DiT:
    """Every weight gets a gradient from the start; no number of rows or blocks is even but those that must be."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # other weights on each rank: rank 0's count
    network = DiT(8, 4, 1, 36, 3, 3, 10, qk_norm=True, **options)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def make_unet() -> UNet:
    """Two levels with attention in the lower one, computed again in the backward pass."""
    torch.manual_seed(0)
    levels = {"channels": (8, 16), "layers_per_block": 1, "attention_levels": (1,), "head_size": 8, "norm_groups": 4}
    return UNet(8, 1, 10, **levels, activation_checkpointing=True)


class Recorder(L.Callback):
    """What each step returned, and at each end of a validation or a fit what the callbacks hold."""

    def __init__(self, save: Path | None = None) -> None:
        self.seen: dict[str, Any] = {"losses": {}, "val": {}, "files": {}, "norms": []}
        self.save = save

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step - (not trainer.fit_loop.epoch_loop._should_accumulate())
        self.seen["losses"].setdefault(step, []).append(outputs["loss"].detach().clone())
        if self.save and trainer.global_step in SAVED and step < trainer.global_step:
            trainer.save_checkpoint(self.save / f"{trainer.global_step}.ckpt")

    def on_train_start(self, trainer, pl_module) -> None:
        parameters = [*pl_module.network.parameters(), *pl_module.network_ema.parameters()]
        self.seen["sharded"] = [isinstance(p, DTensor) for p in parameters]
        self.seen["kept"] = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        self.seen["dtypes"] = {p.dtype for p in parameters}
        self.seen["num_parts"] = sum(isinstance(part, FSDPModule) for part in pl_module.modules())

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            numbers = {name: float(trainer.callback_metrics[name]) for name in ("val/loss", "val/loss_ema")}
            self.seen["val"][trainer.global_step] = numbers

    def on_train_end(self, trainer, pl_module) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, OracleMonitor) and callback.train is not None:
                self.seen["table"] = callback.train.table()
                self.seen["profile"] = callback.profile.to_json()
        self.seen["shift"] = getattr(pl_module.timesteps, "shift", None)
        whole = trainer.strategy.lightning_module_state_dict()
        self.seen["weights"] = {name: x.clone() for name, x in whole.items()}


def train(
    folder: Path,
    strategy: Any,
    devices: int,
    *,
    max_steps: int = NUM_STEPS,
    ckpt_path: Path | None = None,
    save: Path | None = None,
    shard_bank: bool | None = None,
    network: Any = None,
    module: dict[str, Any] | None = None,
    gradients: int = 0,
    with_pictures: bool = False,
    micro_batch_size: int = 12,
    **trainer: Any,
) -> dict[str, Any]:
    """Train on the digits with all callbacks; returns what `Recorder` saw."""
    warnings.filterwarnings("ignore", ".*does not have many workers")
    recorder = Recorder(save)
    pictures = SampleGrid(every_n_steps=0, num_samples=10, num_steps=2, num_predictions=2)
    steering = StageAware([ShiftToBoundary(0.6, warmup_steps=4)], gradients_every_n_steps=gradients)
    profile = folder.parent / "profile.json"  # of the first run: to measure the stages takes longer than to train
    monitor = OracleMonitor(every_n_steps=1, window=10, num_bins=6, profile=str(profile) if profile.exists() else None)
    L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        gradient_clip_val=0.05,  # of norms near 0.5
        use_distributed_sampler=False,
        callbacks=[monitor, steering, *([pictures] if with_pictures else []), Throughput(every_n_steps=4), recorder],
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    ).fit(
        FlowMatching(
            network or make_network(),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01),
            warmup_steps=3,
            ema_decay=0.9,
            **(module or {}),
        ),
        datamodule=Digits(
            batch_size=BATCH,
            val_batch_size=181,
            flip=True,
            micro_batch_size=micro_batch_size,
            shard_bank=shard_bank,
        ),
        ckpt_path=ckpt_path,
    )
    return recorder.seen


def refusal(folder: Path, **options: Any) -> str:
    """What is said of a run that FSDP2 cannot train."""
    try:
        train(folder, FSDP2Strategy(), 2, max_steps=2, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def by_command(folder: Path) -> None:
    """The real command, with a network that compiles nothing and pictures that take no time."""
    small = ("network.init_args.hidden_size=24", "network.init_args.depth=1", "network.init_args.num_heads=2")
    sys.argv = [
        *("fm-stages", "fit", "--config", str(CONFIGS / "digits_dit.yaml")),
        *("--config", str(CONFIGS / "strategy_fsdp.yaml"), *(f"--model.{option}" for option in small)),
        *("--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.default_root_dir={folder}"),
        *("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"),
        *(
            "--trainer.logger=CSVLogger",
            "--samples.num_samples=10",
            "--samples.num_steps=2",
            "--samples.every_n_steps=0",
        ),
        *("--monitor.every_n_steps=1", "--monitor.window=2"),
        "--data.init_args.micro_batch_size=32",
    ]
    cli.main()


STRATEGIES = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy}


def short(folder: Path) -> dict[Any, Any]:
    """Both for 20 steps; in turn from one checkpoint; what is refused; the command."""
    runs: dict[Any, Any] = {
        ("ddp", False): train(folder / "ddp", "ddp", 2, shard_bank=False),
        ("fsdp2", True): train(folder / "fsdp2", FSDP2Strategy(), 2, shard_bank=True, with_pictures=True),
    }
    # each from the file of the one before, the first from a single process's; and with other micro-batches
    for first, name, micro in zip(SAVED, ("fsdp2", "ddp", "fsdp2"), (24, 6, 12), strict=True):
        ckpt_path = folder / ("single" if first == SAVED[0] else "in_turn") / f"{first}.ckpt"
        options = {"max_steps": first + 5, "micro_batch_size": micro, "ckpt_path": ckpt_path}
        runs["in turn", first] = train(folder / "in_turn", STRATEGIES[name](), 2, save=folder / "in_turn", **options)
    runs["refused"] = {
        "weighting": refusal(folder / "refused", module={"weighting": LearnedWeighting()}),
        "gradients": refusal(folder / "refused", gradients=2),
    }
    by_command(folder / "command")
    return runs


def long(folder: Path) -> dict[Any, Any]:
    """The other way to hold the bank, other networks and precision, and what else may be combined."""
    runs: dict[Any, Any] = {}
    for name, strategy in STRATEGIES.items():
        runs[name, "bank"] = train(folder / f"{name}_bank", strategy(), 2, shard_bank=name == "ddp")
        runs[name, "bf16"] = train(folder / f"{name}_bf16", strategy(), 2, max_steps=5, precision="bf16-mixed")
        runs[name, "unet"] = train(folder / f"{name}_unet", strategy(), 2, max_steps=3, network=make_unet())
    for name, options, module in (
        ("recomputed", {"activation_checkpointing": True}, {}),
        ("compiled blocks", {"compile_blocks": True}, {}),
        ("compiled and recomputed", {"compile_blocks": True, "activation_checkpointing": True}, {}),
        ("compiled", {}, {"compile": True}),
    ):
        network = make_network(**options)
        runs[name] = train(folder / name, FSDP2Strategy(), 2, max_steps=5, network=network, module=module)
    return runs


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT_SEC[sys.argv[2]], exit=True)
    torch.set_num_threads(1)
    plots.save = lambda figure, path: path  # a figure takes a second, and nobody looks at these
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    torch.save({"short": short, "long": long}[sys.argv[2]](folder), folder / f"rank{dist.get_rank()}.pt")
