"""Where a command was when it was killed, told from the stacks of its processes."""

import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

STACKS = Path(__file__).parent / "stacks"
"""To go first into PYTHONPATH: see the file in it."""

START, IMPORTS, SETUP, TRAINING, VALIDATION, COLLECTIVE, OTHER_COLLECTIVE, WRITING, WORK, END = (
    "start", "imports", "set-up", "training", "validation", "oracle collective", "other collective", "writing",
    "work", "end",
)  # fmt: skip

# the first that fits in any process names the phase: what is rare before what is around it
_SIGNS = {
    WRITING: r"in (whole_file|save_checkpoint|write_shard|write_index|write_atomically|save_file|_write)\b",
    COLLECTIVE: r"oracle/ranks\.py",
    OTHER_COLLECTIVE: r"distributed_c10d\.py|torch/distributed/.*in (synchronize|barrier)\b",
    END: r"in (on_train_end|on_run_end|teardown|_teardown|on_fit_end|_complete|_report|complete_folder|_shutdown)\b",
    VALIDATION: r"evaluation_loop\.py",
    TRAINING: r"training_epoch_loop\.py",
    WORK: r"in (_draw|_encode_missing|_measure|measure|_sums|score|study_stages)\b",
    IMPORTS: r"<frozen importlib",
    SETUP: r"fm_stages/",
}
PHASES = [START, IMPORTS, SETUP, TRAINING, VALIDATION, COLLECTIVE, OTHER_COLLECTIVE, WORK, WRITING, END]


def stacks_of(processes: Iterable[int], folder: Path, timeout_sec: float = 0.5) -> list[str]:
    """The stacks of these processes now, as they write them to ``folder``; none of those that have not begun yet."""
    files = [file for number in processes if (file := folder / str(number)).exists()]
    before = {file: file.stat().st_size for file in files}
    for file in files:
        try:
            os.kill(int(file.name), signal.SIGUSR2)
        except ProcessLookupError:
            continue
    end = time.monotonic() + timeout_sec
    while time.monotonic() < end and not all(file.stat().st_size > before[file] for file in files):
        time.sleep(0.001)
    found = [file.read_bytes()[before[file] :].decode(errors="replace") for file in files]
    return [stack for stack in found if "torch/distributed/run.py" not in stack or "fm_stages/" in stack]


def phase_of(stacks: Iterable[str]) -> str:
    """What a command does whose processes have these stacks."""
    together = "\n".join(stacks)
    return next((phase for phase, sign in _SIGNS.items() if re.search(sign, together)), START)
