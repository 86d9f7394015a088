"""The doctor on the oracle beside the run: where the stages lie, and what measuring them costs."""

from __future__ import annotations

from pathlib import Path

import torch

from fm_stages.oracle import DataBank, StageProfile, describe, rows_per_query
from fm_stages.studies.doctor.lines import Line, judged
from fm_stages.studies.doctor.run import PlannedRun
from fm_stages.training import OracleMonitor, StageAware, step_flops

NUM_QUERIES, NUM_TIMES = 64, 12
"""Of a rough profile: its boundary is good to some 0.01."""

DEAR = 0.25
"""Share of the run's arithmetic that the oracle may take without a word."""


def measure_roughly(run: PlannedRun) -> StageProfile:
    """The stages, measured with few queries, for the labels that the network will see."""
    share = run.module.label_dropout if run.bank.has_labels else 1.0
    return StageProfile.measure(run.oracle, share, NUM_QUERIES, num_times=NUM_TIMES, progress=True)


def check_stages(run: PlannedRun, profile: StageProfile) -> Line:
    """The boundary, which data that is broken does not have."""
    file = run.config.monitor.profile
    source = f"read from {Path(file)}" if file else f"{profile.num_queries} queries a time"
    error = profile.time_sem["boundary"]
    there = 0 < profile.boundary < 1
    steering = run.callback(StageAware)
    policies = bool(steering is not None and steering.policies)
    missing = "The posterior has one stage only: is the scale of the data what it should be, are rows distinct?"
    return judged(
        "stages",
        f"navigation until t = {profile.navigation_end:.3f}, boundary {profile.boundary:.3f} ± {error:.3f}, refinement "
        f"complete at {profile.refinement_complete:.3f} ({source})",
        ("red", not there and policies, f"{missing} Policies of `steering` would have nothing to follow."),
        ("yellow", not there, missing),
    )


def check_cost(run: PlannedRun) -> Line:
    """The oracle's arithmetic beside that of training."""
    seen, bank, module = run.first_batch(), run.bank, run.module
    num = len(seen["x1"])  # of a micro-batch of a rank
    step = step_flops(module, seen["x_t"], seen["t"], seen["labels"])
    monitor = run.callback(OracleMonitor)
    every = 1 if module.target.needs_oracle else monitor.every_n_steps
    # of a mixture it says what it can
    found = describe(bank, num, module.label_dropout, run.num_ranks, step)  # type: ignore[arg-type]
    found += " It is the target of every step." if every == 1 else f" Every {every} steps."
    if step is None or not isinstance(bank, DataBank):
        return judged("cost of oracle", found)
    flops = 4 * num * rows_per_query(bank, module.label_dropout) * bank.num_dims
    # of a step's micro-batches the monitor measures the last one
    share = flops / step / (every if every == 1 else every * run.accumulation)
    remedy = f"Measure less often (--monitor.every_n_steps {2 * every}), or take a GPU: there it is a matrix product."
    if every == 1:
        remedy = (
            "Past the boundary the oracle adds nothing: HybridTarget or TargetByStage ask it before the boundary only."
        )
    return judged(
        "cost of oracle",
        f"{found} In all at most {share:.2%} of the run's arithmetic.",
        ("yellow", share > DEAR, remedy),
    )


def rows_at_hand(run: PlannedRun) -> Line | None:
    """A line if the bank cannot be made here, on one process: then what needs its rows is left out."""
    try:
        with torch.no_grad():
            _ = run.bank
    except MemoryError as error:
        remedy = "Start the doctor where one process has the memory; what needs the rows was left out."
        return Line("bank", "yellow", f"{error}", remedy)
    return None
