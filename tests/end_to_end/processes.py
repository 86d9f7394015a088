"""Commands on one or two ranks that are run to their end, or killed in the midst of it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

MARK = "FM_STAGES_COMMAND"
"""Environment variable by which a command's processes are found, wherever torchrun has put them."""


class Command:
    """``fm-stages`` with these arguments on some ranks, started; its output goes to a file.

    Args:
        arguments: of the command.
        ranks: how many; more than one are started by torchrun.
        log: file that the output is appended to.
        environment: variables beside those of this process.
    """

    def __init__(self, *arguments: object, ranks: int, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        words = [sys.executable, *launcher, "-m", "fm_stages", *(["--"] if ranks > 1 else []), *map(str, arguments)]
        self.words = " ".join(words[words.index("fm_stages") + 1 :]).removeprefix("-- ")
        with log.open("a") as output:
            print(f"\n$ {' '.join(words)}", file=output, flush=True)
            all_variables = {**os.environ, **(environment or {}), MARK: self.mark, "OMP_NUM_THREADS": "1"}
            self.running = subprocess.Popen(words, stdout=output, stderr=output, env=all_variables)

    def finish(self, timeout_sec: float = 1800) -> int:
        """Wait for its end; its status."""
        try:
            return self.running.wait(timeout_sec)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill_once(self, seen: Callable[[], bool], timeout_sec: float = 900) -> bool:
        """SIGKILL to all its processes as soon as something is seen; whether that was before its end."""
        end = time.monotonic() + timeout_sec
        while time.monotonic() < end and self.running.poll() is None:
            if seen():
                self.kill()
                return True
            time.sleep(0.05)
        self.kill()
        return False

    def kill(self) -> None:
        """SIGKILL to each process of the command."""
        while found := self.processes():
            kill_processes(found)
            time.sleep(0.02)
        self.running.wait()

    @property
    def ended(self) -> bool:
        """Whether the process that was started has ended."""
        return self.running.poll() is not None

    def end_others(self) -> None:
        """What torchrun does itself where one rank has failed."""

    @property
    def first(self) -> int:
        """The process that was started: torchrun, where there are several ranks."""
        return self.running.pid

    def rank(self, number: int) -> list[int]:
        """The process of a rank, if it is there."""
        return [process for process, own in self.processes().items() if own.get("LOCAL_RANK") == str(number)]

    def processes(self) -> dict[int, dict[str, str]]:
        """The environment of each of its processes that are alive, by number."""
        mine, found = f"{MARK}={self.mark}", {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal():
                    variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    if mine in variables:  # those of one that is dead are empty
                        found[int(entry.name)] = dict(line.split("=", 1) for line in variables if "=" in line)
            except OSError:
                continue
        return found


def kill_processes(numbers: Mapping[int, object] | list[int]) -> None:
    """SIGKILL to these processes, as far as they are there."""
    for number in numbers:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
