"""A study on several ranks, started by torchrun or srun: which of them this process is, and how they meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fm_stages.training import find_launcher


@dataclass(frozen=True)
class Job:
    """This process among those that were started together.

    Attributes:
        rank: its number, from 0.
        local_rank: its number on this node.
        num_ranks: how many there are on all nodes.
        group: in which they talk, over gloo; None where there is one.
    """

    rank: int = 0
    local_rank: int = 0
    num_ranks: int = 1
    group: dist.ProcessGroup | None = None

    def device(self, asked: str | None = None) -> torch.device:
        """Where this rank works: what was asked for, or else a GPU of its own, or else the CPU.

        Raises:
            ValueError: if that device does not work.
        """
        its_own = f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros(1, device=asked or its_own).item()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split(". ")[0]
            raise ValueError(
                f"--device {asked or its_own} cannot be used, leave it out or take cpu: {reason}"
            ) from error
        return torch.device(asked or its_own)


@contextmanager
def ranks_of_the_job() -> Iterator[Job]:
    """Meet the other ranks, if torchrun or srun started some; leave them at the end.

    Ranks have half an hour to appear. After that they wait for each other for 30 days: the parts of a study may take
    that long on one rank and no time on another one.
    """
    launcher = find_launcher()
    if launcher is None or not launcher.creates_processes_externally or launcher.world_size() == 1:
        yield Job()
        return
    # from the job's number and its nodes under srun; both leave what they find in os.environ, where torch looks
    _ = launcher.main_address, launcher.main_port
    rank, num_ranks = launcher.global_rank(), launcher.world_size()
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        assert isinstance(group, dist.ProcessGroup)
        yield Job(rank, launcher.local_rank(), num_ranks, group)
    finally:
        dist.destroy_process_group()
