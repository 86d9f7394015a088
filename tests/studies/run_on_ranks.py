"""One call of the command on each rank: python -m torch.distributed.run ... run_on_ranks.py FOLDER DEVICE."""

import json
import os
import sys
from pathlib import Path

import torch

from fm_stages import cli

folder = Path(sys.argv[1])
torch.set_num_threads(1)
sys.argv = ["fm-stages", *json.loads((folder / "arguments.json").read_text())]
cli.main()
torch.save(True, folder / f"rank{os.environ['RANK']}.pt")
