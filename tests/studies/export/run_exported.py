"""Draws with exported folders where the package is not installed and no machine can be reached: JOBS RESULTS."""

import socket
import sys
from functools import partial

import torch

sys.modules["fm_stages"] = None  # an import of it raises


def refuse(*arguments) -> None:
    raise OSError(f"tried to reach {arguments[1:]}")


socket.socket.connect = refuse

from diffusers import DiffusionPipeline  # noqa: E402

torch.set_num_threads(1)


def draw(pipeline, call: dict):
    """What a call gives; of one that is refused, the message."""
    try:
        return pipeline(**call).images
    except ValueError as error:
        return str(error)


load = partial(DiffusionPipeline.from_pretrained, trust_remote_code=True)
results = {}
jobs = torch.load(sys.argv[1], weights_only=False)  # generators of random numbers
pipelines = {folder: load(folder) for folder in jobs}  # all before the first is used: their files must not mix
for folder, calls in jobs.items():
    pipelines[folder].set_progress_bar_config(disable=True)
    results[folder] = [draw(pipelines[folder], call) for call in calls]
torch.save(results, sys.argv[2])
