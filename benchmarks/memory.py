"""Peak memory of the oracle beyond bank and queries, each bank in a process of its own.

Resident memory on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from banks import NUM_CLASSES, NUM_DIMS, PATH, Queries, queries, random_bank, random_labels, random_rows
from peers import full_softmax
from timing import positive, table
from tqdm import tqdm

from fm_stages.oracle import DataBank, Oracle

STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GOAL_MIB = {"cpu": 256, "cuda": 2048}


def memory_table(sizes: list[int], num_queries: int, device: str) -> str:
    """The table of memory over N, or why there is none."""
    if not os.access(PEAK_RESET, os.W_OK):
        return "No table of memory: it is measured through Linux's /proc."
    lines = []
    for num_rows in tqdm(sizes, "memory", unit="bank"):
        num_dims = NUM_DIMS
        while _needed_bytes(num_rows, num_dims, num_queries) > _available_bytes() and num_dims > 49:
            num_dims //= 2
        options = [f"{num_rows}", f"{num_dims}", f"{num_queries}", device, f"{torch.get_num_threads()}"]
        # glibc keeps freed blocks below a limit that moves; a fixed, low one gives them back at once, so that memory
        # in use before the call cannot hide memory that the call uses
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, *options]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        peak = json.loads(done.stdout)
        mib = [f"{peak[name] / 2**20:.0f}" for name in ("rows", "oracle", "dense", "softmax")]
        lines.append([f"{num_rows:,}", f"{num_dims}", *mib, f"{peak['building'] / peak['rows']:.1f}"])
    goal = GOAL_MIB[torch.device(device).type]
    header = ["N", "D", "rows, MiB", f"oracle: beyond them, MiB (goal: {goal})", "tolerance 0, t in (0, 0.3), MiB",
              "plain full softmax, MiB", "to build the bank, / rows"]  # fmt: skip
    return table(header, lines)


def peak_bytes(work: Callable[[], object], device: torch.device | str) -> tuple[float, object]:
    """How far memory rises above its level while some work is done, and what the work returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    PEAK_RESET.write_text("5")  # sets the peak of the resident set to its present size
    before = _status_bytes("VmRSS")
    result = work()
    return _status_bytes("VmHWM") - before, result


def memory_of(num_rows: int, num_dims: int, num_queries: int, device: str) -> dict[str, float]:
    """Peak memory in bytes of the oracle, of the plain softmax, and of building the bank from its rows."""
    _working_memory(random_bank(4096, num_dims).to(device), num_queries, device)  # what libraries load is not counted
    x1 = random_rows(num_rows, num_dims, torch.float32, "cpu")[0]
    labels = random_labels(num_rows, NUM_CLASSES, "cpu")
    building, bank = peak_bytes(lambda: DataBank(x1, labels), "cpu")
    assert isinstance(bank, DataBank)
    bank.to(device)
    rows = 4 * num_rows * num_dims
    return {"building": building, "rows": rows, **_working_memory(bank, num_queries, device)}


def _working_memory(bank: DataBank, num_queries: int, device: str) -> dict[str, float]:
    everywhere, early = queries(bank, num_queries, 0, 1), queries(bank, num_queries, 0, 0.3)
    flat = everywhere.flat
    # a view of the rows: a copy of them would count as the bank
    rows, square = bank.stored(slice(None)), torch.zeros(bank.num_distinct, device=device)
    softmax, _ = peak_bytes(lambda: full_softmax(flat, everywhere.t, rows, square), device)
    return {
        "oracle": _of_oracle(Oracle(bank, PATH), everywhere, device),
        "dense": _of_oracle(Oracle(bank, PATH, tolerance=0), early, device),
        "softmax": softmax,
    }


def _of_oracle(oracle: Oracle, batch: Queries, device: str) -> float:
    return peak_bytes(lambda: oracle.posterior(batch.x_t, batch.t), device)[0]


def _needed_bytes(num_rows: int, num_dims: int, num_queries: int) -> int:
    """Of the rows given, the bank and what making it takes; or else the logits of the plain softmax, some times."""
    return 4 * num_rows * (2 * num_dims + max(3 * num_dims, 4 * num_queries))


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    made = argparse.ArgumentParser(description="The process of one bank: prints peaks in bytes as JSON.")
    for name in ("rows", "dims", "queries"):
        made.add_argument(name, type=positive)
    made.add_argument("device")
    made.add_argument("threads", type=positive)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(memory_of(options.rows, options.dims, options.queries, options.device)))


if __name__ == "__main__":
    main()
