"""Loaders of planned batches, and what signals do to their processes."""

import signal
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fm_stages.data.loading import EpochSampler, HeldOutSampler, LabelledRows

Loader = DataLoader[dict[str, Tensor]]

WORKER_GRACE_SEC = 30
"""Seconds for which a worker goes on after SIGTERM."""


def planned_loader(dataset: LabelledRows, sampler: EpochSampler | HeldOutSampler, num_workers: int) -> Loader:
    """Batches of rows as a sampler has planned them.

    Args:
        dataset: the rows.
        sampler: of which an item is a whole batch of this rank.
        num_workers: processes that load; 0: this one.
    """
    return _ResumableLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # an item of the sampler is a whole batch
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=torch.cuda.is_available() and dataset.on_host,
        generator=torch.Generator(),  # seeds the workers; the global one would advance with every iteration
    )


class _ResumableLoader(Loader):
    """Spares a resumed run Lightning's warning of unreliable results: the place is in the data module's state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _leave_signals_to_the_run(worker: int) -> None:
    """Let what ends a run not end its workers at once: SLURM and terminals signal all processes.

    The run finishes its step, for which it may need a batch, and then ends its workers. Should it wait for one to obey
    SIGTERM, it does not wait long.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SEC))
