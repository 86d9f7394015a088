"""The machine that this process runs on: its memory and processors, and which process shows progress."""

import os
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only


def is_first_rank() -> bool:
    """Whether this is the rank that shows progress bars."""
    return getattr(rank_zero_only, "rank", 0) == 0


def available_memory_bytes() -> int:
    """Memory that can be used without swapping, on Linux; elsewhere all there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_processors() -> int:
    """Processors for this rank, 16 at most, where its launcher says how many ranks share the machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(here // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 16)
