"""Evaluations on each rank: python -m torch.distributed.run ... evaluate_on_ranks.py FOLDER DEVICE."""

import json
import os
import sys
from pathlib import Path

import torch

from fm_stages.studies.evaluate.command import _Evaluation
from fm_stages.studies.evaluate.options import parse
from fm_stages.studies.ranks import ranks_of_the_job

folder = Path(sys.argv[1])
torch.set_num_threads(1)
calls = json.loads((folder / "arguments.json").read_text())
found = []
with ranks_of_the_job() as job:
    for arguments in calls:
        try:
            found.append(_Evaluation(*parse(arguments, ""), job).run())
        except (ValueError, FileNotFoundError) as error:
            found.append(str(error))
torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
