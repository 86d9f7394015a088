"""The machine that this process runs on: its memory and processors, and which process shows progress."""

import os
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

PROC, CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where Linux says what memory there is, and what limits there are on a process."""


def is_first_rank() -> bool:
    """Whether this is the rank that shows progress bars."""
    return getattr(rank_zero_only, "rank", 0) == 0


def available_memory_bytes() -> int:
    """Memory that can be used without swapping, on Linux; elsewhere all there is.

    In a container, or a job of a cluster, no more than its limit leaves: the system kills whoever goes beyond.
    """
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        of_machine = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([of_machine, *_left_by_limits()])


def _left_by_limits() -> list[int]:
    """What is left of the limit on each control group (version 2) that this process is in, from its own outwards."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration):
        return []
    left = []
    for folder in (CONTROL_GROUPS / own, *(CONTROL_GROUPS / parent for parent in Path(own).parents)):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        except (OSError, ValueError, KeyError):  # the outermost one has no such files
            continue
        if limit != "max":
            left.append(max(int(limit) - used + int(cached), 0))
    return left


def num_processors() -> int:
    """Processors for this rank, 16 at most, where its launcher says how many ranks share the machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(here // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 16)
