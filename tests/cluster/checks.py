"""What both checks of a cluster share: a run that is long enough to be stopped, and a count of what holds."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
STEPS, EVERY = 160, 40
NETWORK = "--model.network.init_args"
OPTIONS = [
    *(f"--config={REPOSITORY}/configs/digits_dit.yaml", "--trainer.accelerator=cpu", "--trainer.logger=CSVLogger"),
    *(f"{NETWORK}.hidden_size=16", f"{NETWORK}.depth=1", f"{NETWORK}.num_heads=2", "--monitor.every_n_steps=40"),
    *(f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={EVERY}", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--samples.num_samples=0", "--samples.num_predictions=0"),
]
LIMIT_SEC = 400
counts = {"passed": 0, "failed": 0}


def check(what: str, holds: bool, seen: object = "") -> None:
    """Print and count one fact; what was seen instead, where it does not hold."""
    counts["passed" if holds else "failed"] += 1
    print(f"  {'ok' if holds else 'FAILED'}: {what}{'' if holds or seen == '' else f' ({seen})'}", flush=True)


def wait_for(what: str, condition: Callable[[], bool], logs: str = "*.out") -> None:
    """Give up, with the end of the logs, what does not come."""
    end = time.monotonic() + LIMIT_SEC
    while not condition():
        if time.monotonic() > end:
            print("\n".join(file.read_text()[-3000:] for file in Path().glob(logs)))
            check(f"{what}, within {LIMIT_SEC} s", False)
            finish()
        time.sleep(0.1)


def weights(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and weights of a run's last checkpoint."""
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


def check_same_end(run: Path, other: Path) -> None:
    """Two runs ended at the last step, with the same weights."""
    (step, mine), (_, theirs) = weights(run), weights(other)
    check(f"it ends at step {STEPS}", step == STEPS, step)
    same = mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())
    check(f"its weights are those of the run {other}, bit for bit", same)


def finish() -> None:
    """The last line and the status."""
    print("{passed} passed, {failed} failed".format(**counts))
    sys.exit(counts["failed"] > 0)
