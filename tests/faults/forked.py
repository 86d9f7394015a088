"""Commands that begin where all libraries are imported already: a kill then falls into the work, and costs little."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.end_to_end.processes import kill_processes

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["fm_stages.cli", "fm_stages.training", "fm_stages.studies", "sklearn.datasets", "tests.faults.forked"]
)


class Forked:
    """As `tests.end_to_end.processes.Command`, without a launcher: ranks are numbered as torchrun does it.

    Args:
        arguments: of the command.
        ranks: how many.
        log: file that the output is appended to.
        environment: variables beside those of this process.
    """

    def __init__(self, *arguments: object, ranks: int, log: Path, environment: Mapping[str, str]) -> None:
        shared = dict(environment)
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            shared |= {"TORCHELASTIC_RUN_ID": log.parent.name, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self._running, self._told = [], False
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"} if ranks > 1 else {}
            words = [str(word) for word in arguments]
            process = _CONTEXT.Process(target=_run, args=(words, {**shared, **own}, str(log), os.getcwd()))
            process.start()
            self._running.append(process)

    @property
    def ended(self) -> bool:
        """Whether no rank runs any more."""
        return not any(process.is_alive() for process in self._running)

    def finish(self, timeout_sec: float) -> int:
        """Wait for the end of all ranks; the first status that is not 0."""
        end = time.monotonic() + timeout_sec
        for process in self._running:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                self.kill()
                raise TimeoutError(f"still there after {timeout_sec} s")
        return next((process.exitcode for process in self._running if process.exitcode), 0)

    def kill(self) -> None:
        """SIGKILL to each process of the command."""
        while found := self.processes():
            kill_processes(found)
            time.sleep(0.005)
        for process in self._running:
            process.join()

    def end_others(self) -> None:
        """As torchrun and srun do it: SIGTERM to the other ranks where one has failed."""
        if any(process.exitcode for process in self._running) and not self._told:
            self._told = True
            for process in self._running:
                process.terminate()

    def processes(self) -> list[int]:
        """Its processes that are alive: those of its ranks' sessions."""
        ours, found = {process.pid for process in self._running}, []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal():
                    after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                    # a rank that has just been started is in no session of its own yet
                    if after_name[0] != "Z" and ours & {int(entry.name), int(after_name[3])}:
                        found.append(int(entry.name))
            except OSError:
                continue
        return found

    @property
    def first(self) -> int:
        """The process that was started first."""
        return int(self._running[0].pid or 0)

    def rank(self, number: int) -> list[int]:
        """The process of a rank, if it is there."""
        return [process.pid for process in self._running[number : number + 1] if process.pid and process.is_alive()]


def _run(words: list[str], environment: dict[str, str], log: str, folder: str) -> None:
    """In the new process: as the command line would."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(folder)
    stacks = open(Path(environment["FM_STAGES_STACKS"]) / str(os.getpid()), "w")  # noqa: SIM115 - for good
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from fm_stages import cli, plots

    plots.save = lambda figure, path: path  # a second each; their tables are compared
    print(f"\n$ fm-stages {' '.join(words)}")
    sys.argv = ["fm-stages", *words]
    cli.main()
