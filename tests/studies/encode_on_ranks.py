"""Calls of the command on each rank, one after another: torch.distributed.run ... encode_on_ranks.py FOLDER DEVICE.

``calls.json`` of the folder holds the arguments of each; ``rank<r>.pt`` then (status, what it printed) of each.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from fm_stages import cli
from fm_stages.studies import encode
from fm_stages.studies.ranks import ranks_of_the_job

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
torch.set_num_threads(1)
ends = []
with ranks_of_the_job() as job:
    encode.ranks_of_the_job = lambda: contextlib.nullcontext(job)  # ranks meet once in a launch
    for arguments in json.loads((folder / "calls.json").read_text()):
        sys.argv = ["fm-stages", *arguments]
        said = io.StringIO()
        status: object = 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                cli.main()
            except SystemExit as end:
                status = end.code
        ends.append((status, said.getvalue()))
torch.save(ends, folder / f"rank{rank}.pt")
