"""The shipped script for several machines, on two of them: the run of one machine, also where one of the two is lost.

Started by two_hosts.sh in an empty folder. Usage: python check_two_hosts.py NAMESPACE NAMESPACE
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from checks import LIMIT_SEC, OPTIONS, REPOSITORY, check, check_same_end, finish, wait_for, weights

HOSTS = sys.argv[1:]
SCRIPTS = REPOSITORY / "configs/cluster"
WHOLE = Path("one_host")


def start(host: str, log: str, *command: object) -> subprocess.Popen:
    """A command on a host, which also has the host's name."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host, *map(str, command)]
    with Path(f"{log}_{host}.out").open("a") as file:
        return subprocess.Popen(["ip", "netns", "exec", host, *named], stdout=file, stderr=file)


def start_on_both(run: str) -> list[subprocess.Popen]:
    """The same line on both hosts, as its first comment says."""
    line = (SCRIPTS / "torchrun_nodes.sh", f"{HOSTS[0]}:29400", 2, 1, *OPTIONS, f"--trainer.default_root_dir={run}")
    return [start(host, run, *line) for host in HOSTS]


def pids(host: str) -> list[int]:
    return [int(pid) for pid in subprocess.check_output(["ip", "netns", "pids", host]).split()]


def launcher(host: str) -> int:
    """The process of torchrun."""
    (pid,) = (p for p in pids(host) if b"torchrun" in Path(f"/proc/{p}/cmdline").read_bytes())
    return pid


def wait_for_both(started: list[subprocess.Popen]) -> list[int]:
    wait_for("the end on both hosts", lambda: all(process.poll() is not None for process in started))
    return [process.returncode for process in started]


def log_of(run: str) -> str:
    return "\n".join(Path(f"{run}_{host}.out").read_text()[-2000:] for host in HOSTS)


def check_goes_on(run: str) -> None:
    """The same commands again."""
    stopped_at, _ = weights(Path(run))
    ended = wait_for_both(start_on_both(run))
    check(f"the same commands again go on after step {stopped_at}", ended == [0, 0], log_of(run))
    check_same_end(Path(run), WHOLE)
    check("no run waits to be resumed", not Path(run, "preempted.txt").exists())


def main() -> None:
    print("Two ranks on one host")
    line = (SCRIPTS / "torchrun_one_node.sh", 2, *OPTIONS, f"--trainer.default_root_dir={WHOLE}")
    one = start(HOSTS[0], "one_host", *line)
    wait_for("the end", lambda: one.poll() is not None)
    check("it ends well", one.returncode == 0, one.returncode)

    print("One rank on each of two hosts")
    ended = wait_for_both(start_on_both("two_hosts"))
    check("both end well", ended == [0, 0], log_of("two_hosts"))
    check_same_end(Path("two_hosts"), WHOLE)

    print("One host is asked to stop: SIGTERM to its torchrun")
    run = "stopped"
    started = start_on_both(run)
    wait_for("a checkpoint", Path(run, "checkpoints/last.ckpt").exists)
    os.kill(launcher(HOSTS[1]), signal.SIGTERM)
    ended = wait_for_both(started)
    check("both end, with an error status", 0 not in ended, ended)
    check("preempted.txt says that the run waits", Path(run, "preempted.txt").exists(), log_of(run))
    check_goes_on(run)

    print("One host is lost: SIGKILL to all its processes")
    run = "lost"
    started = start_on_both(run)
    wait_for("a checkpoint", Path(run, "checkpoints/last.ckpt").exists)
    time.sleep(1)
    begin = time.monotonic()
    for pid in pids(HOSTS[1]):
        os.kill(pid, signal.SIGKILL)
    ended = wait_for_both(started)
    seconds = time.monotonic() - begin
    check(f"the other one ends with an error, after {seconds:.0f} s", ended[0] > 0 and seconds < LIMIT_SEC / 2, ended)
    check("it does not say that it was pre-empted", not Path(run, "preempted.txt").exists())
    check_goes_on(run)


if __name__ == "__main__":
    main()
    finish()
