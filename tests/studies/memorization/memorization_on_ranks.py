"""The study on each rank: python -m torch.distributed.run ... memorization_on_ranks.py FOLDER DEVICE."""

import sys
import warnings
from pathlib import Path

import torch

from fm_stages.data import Digits
from fm_stages.flow import LinearPath
from fm_stages.networks import DiT
from fm_stages.oracle import Oracle, StageProfile
from fm_stages.studies.memorization.study import References, study_memorization
from fm_stages.studies.ranks import Job, ranks_of_the_job
from fm_stages.training import FlowMatching


def study(own: slice, out: Path | None, job: Job) -> dict:
    """Of digits, a few of which are copies and duplicates; all of what it finds, as plain data."""
    data = Digits()
    data.setup()
    references = References.of(data)
    samples = references.fresh.clone()
    samples[3:7] = data.bank().rows(torch.arange(4))
    samples[30] = samples[2]
    stages = StageProfile.measure(Oracle(data.bank(), LinearPath()), num_queries=16, num_times=6)
    torch.manual_seed(0)
    network = DiT(8, 4, 1, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    result = study_memorization(
        samples[own], data, FlowMatching(network), {"net": network.eval()}, out, index=torch.arange(len(samples))[own],
        num_calibration=9, num_steps=5, num_queries=7, profile=stages, job=job, progress=False,
    )  # fmt: skip
    return {**result.plain(), "table": result.closest.table()[1]}


def refused(samples: torch.Tensor, job: Job) -> str:
    try:
        study_memorization(samples, Digits(), job=job, progress=False)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with ranks_of_the_job() as job:
        # as uneven as can be
        own = slice(0, 1) if job.rank == 0 else slice(1, None)
        found = {
            "study": study(own, folder / "out", job),
            "none on one": study([slice(0, 0), slice(None)][job.rank], None, job),
        }
        wrong = torch.zeros(2, 1, 8, 8) + torch.arange(2)[:, None, None, None]
        found["nan on one"] = refused(wrong.fill_(torch.nan) if job.rank else torch.rand(2, 1, 8, 8), job)
        found["none anywhere"] = refused(torch.zeros(0, 1, 8, 8), job)
        torch.save(found, folder / f"rank{job.rank}.pt")
