"""Commands on one or two ranks that are run to their end, or killed in the midst of it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "FM_STAGES_COMMAND"
"""Environment variable by which a command's processes are found, wherever torchrun has put them."""


class Command:
    """``fm-stages`` with these arguments on some ranks, started; its output goes to a file.

    Args:
        arguments: of the command.
        ranks: how many; more than one are started by torchrun.
        log: file that the output is appended to.
    """

    def __init__(self, *arguments: object, ranks: int, log: Path) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        words = [sys.executable, *launcher, "-m", "fm_stages", *(["--"] if ranks > 1 else []), *map(str, arguments)]
        self.words = " ".join(words[words.index("fm_stages") + 1 :]).removeprefix("-- ")
        with log.open("a") as output:
            print(f"\n$ {' '.join(words)}", file=output, flush=True)
            environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"}
            self.running = subprocess.Popen(words, stdout=output, stderr=output, env=environment)

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
        while found := self._processes():
            for process in found:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        self.running.wait()

    def _processes(self) -> list[int]:
        mine, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mine in (entry / "environ").read_bytes():  # empty of one that is dead
                    found.append(int(entry.name))
            except OSError:
                continue
        return found
