"""SIGKILL at random moments: each run goes on with the same command, and must end as one that was never killed.

    make test-faults                                   all workloads, 60 kills or more, some 20 minutes on 2 cores
    python tests/faults/kills.py --seed 7 --only fit   those whose name begins so, at other moments

Prints what was killed, where it fell and what came of it; ends with status 1 where anything differs, stays behind, or
lives on for more than a minute.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tests.end_to_end.processes import Command, kill_processes
from tests.faults.forked import Forked
from tests.faults.outcomes import differences
from tests.faults.phases import COLLECTIVE, PHASES, STACKS, phase_of, stacks_of
from tests.faults.workloads import Workload, Workloads

ROOT = Path(__file__).parents[2]

LONGEST_SEC = 60
"""In which all processes of a command have to end after one of them was killed."""

TIMEOUT_SEC = 300
"""Of a command that is not killed."""


def everything(command: Command | Forked) -> list[int]:
    """All processes of a command."""
    return list(command.processes())


def one_rank(command: Command | Forked) -> list[int]:
    """The last rank, once it is there."""
    return command.rank(1)


def first_process(command: Command | Forked) -> list[int]:
    """torchrun without its ranks, or a comparison without the run that it trains."""
    return [command.first]


def children(command: Command | Forked) -> list[int]:
    """The run that a comparison trains, once it is there."""
    return [number for number in command.processes() if number != command.first]


@dataclass(frozen=True)
class Attack:
    """A workload, and how it is killed.

    Attributes:
        workload: the command.
        kills: how many are wanted.
        victims: which of its processes; none yet: it is asked again.
        aim: from the random moment on, wait until this is so: given the command, its folder and that of its stacks.
        name: of the kind of kill, for the table.
        fresh: started as a person does it: half of the kills then fall before the work has begun.
    """

    workload: Workload
    kills: int
    victims: Callable[[Command | Forked], list[int]] = everything
    aim: Callable[[Command | Forked, Path, Path], bool] | None = None
    name: str = "at random"
    fresh: bool = False


@dataclass
class Tally:
    """What came of an attack.

    Attributes:
        phases: kills, by where they fell.
        runs: that were completed and compared.
        equal_kills: kills of runs that ended as if there had been none.
        ended_sec: the longest time from a kill to the end of the last process.
        defects: what was not as it should be, in words.
    """

    phases: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    equal_kills: int = 0
    ended_sec: float = 0.0
    defects: list[str] = field(default_factory=list)


def writes_checkpoint(command: Command | Forked, out: Path, stacks: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((out / "checkpoints").glob("*.part"))


def writes(command: Command | Forked, out: Path, stacks: Path) -> bool:
    """Whether any file is being written."""
    return any(out.rglob("*.part"))


def in_collective(command: Command | Forked, out: Path, stacks: Path) -> bool:
    """Whether a rank is inside a collective of the oracle."""
    return phase_of(stacks_of(command.processes(), stacks)) == COLLECTIVE


class Killing:
    """All attacks of one call.

    Args:
        folder: for everything that the commands write.
        seed: of the moments.
        tell: takes a line of text.
        on_kill: called after each.
    """

    def __init__(
        self, folder: Path, seed: int, tell: Callable[[str], object], on_kill: Callable[[], object] = lambda: None
    ) -> None:
        self.folder, self.seed, self.tell, self.on_kill = folder, seed, tell, on_kill
        self._references: dict[tuple[str, bool], tuple[Path, float]] = {}
        self._locks: defaultdict[tuple[str, bool], threading.Lock] = defaultdict(threading.Lock)

    def reference(self, workload: Workload, fresh: bool) -> tuple[Path, float]:
        """What the command leaves without kills, and its seconds."""
        with self._locks[workload.name, fresh]:
            if (workload.name, fresh) not in self._references:
                place, start = self._new_place(workload, f"reference{' fresh' * fresh}"), time.monotonic()
                if status := self._start(workload, place, fresh).finish(TIMEOUT_SEC):
                    raise RuntimeError(f"{workload.name} ends with {status} without kills: {place / 'output.log'}")
                self._references[workload.name, fresh] = place / "out", time.monotonic() - start
            return self._references[workload.name, fresh]

    def attack(self, attack: Attack) -> Tally:
        """Kill as often as wanted, in runs of some kills each."""
        workload, tally = attack.workload, Tally()
        draw = random.Random(f"{self.seed} {workload.name} {attack.name}")
        expected, life_sec = self.reference(workload, attack.fresh)
        number = 0
        while tally.phases.total() < attack.kills and number < 10 * attack.kills:
            place, number = self._new_place(workload, f"{attack.name} {number}"), number + 1
            wanted = min(draw.choice((1, 2, 3)), attack.kills - tally.phases.total())
            kills = 0
            for _ in range(wanted):
                if not self._kill_one(attack, place, draw.uniform(0, life_sec), tally):
                    life_sec *= 0.7  # the machine is less busy now
                    break
                kills += 1
            self._finish(attack, place, expected, kills, tally)
        return tally

    def _kill_one(self, attack: Attack, place: Path, after_sec: float, tally: Tally) -> bool:
        """Start the command and kill it some seconds later; whether that was before its end."""
        command = self._start(attack.workload, place, attack.fresh)
        moment = time.monotonic() + after_sec
        while not command.ended:
            command.end_others()  # to dump the stacks of a process may crash it: then the others would wait for it
            if time.monotonic() < moment - 0.01:
                time.sleep(min(0.01, moment - time.monotonic()))
                continue
            victims = attack.victims(command)
            if victims and (attack.aim is None or attack.aim(command, place / "out", place / "stacks")):
                break
            time.sleep(0.0005)
        else:
            command.kill()
            return False
        phase = phase_of(stacks_of(victims, place / "stacks")) if attack.aim is not in_collective else COLLECTIVE
        if attack.victims is everything:
            command.kill()
        else:
            kill_processes(victims)
            self._wait_for_end(command, attack, phase, tally)
        tally.phases[phase] += 1
        self.tell(f"{attack.workload.name}, {attack.name}: killed after {after_sec:.1f} s or more ({phase})")
        self.on_kill()
        return True

    def _wait_for_end(self, command: Command | Forked, attack: Attack, phase: str, tally: Tally) -> None:
        """Those that were not killed have a minute."""
        start = time.monotonic()
        while command.processes() and time.monotonic() < start + LONGEST_SEC:
            command.end_others()
            time.sleep(0.05)
        tally.ended_sec = max(tally.ended_sec, time.monotonic() - start)
        if command.processes():
            tally.defects.append(f"{len(command.processes())} processes live {LONGEST_SEC} s after a kill in {phase}")
        command.kill()

    def _finish(self, attack: Attack, place: Path, expected: Path, kills: int, tally: Tally) -> None:
        """Run the command to its end and compare."""
        command = self._start(attack.workload, place, attack.fresh)
        status = command.finish(TIMEOUT_SEC)
        found = [f"status {status}"] if status else differences(expected, place / "out")
        tally.runs += 1
        if found:
            tally.defects += [f"{what} (kept: {place})" for what in found]
        else:
            tally.equal_kills += kills
            shutil.rmtree(place)
        if left := command.processes():
            tally.defects.append(f"{len(left)} processes are left after the end")
            command.kill()

    def _new_place(self, workload: Workload, name: str) -> Path:
        place = self.folder / workload.name.replace(",", "").replace(" ", "_") / name.replace(" ", "_")
        (place / "stacks").mkdir(parents=True)
        return place

    def _start(self, workload: Workload, place: Path, fresh: bool) -> Command | Forked:
        environment = {"FM_STAGES_STACKS": str(place / "stacks"), "WANDB_MODE": "offline"}
        environment["PYTHONPATH"] = f"{STACKS}:{ROOT}"
        words = workload.words(place / "out")
        start = Command if fresh else Forked
        return start(*words, ranks=workload.ranks, log=place / "output.log", environment=environment)


def table(tallies: dict[tuple[str, str], Tally]) -> str:
    """One line for each attack, and the sum."""
    columns = [phase for phase in PHASES if any(tally.phases[phase] for tally in tallies.values())]
    head = ["command", "killed", "kills", *columns, "equal", "not", "all ended (s)"]
    rows = [head]
    for (name, kind), tally in tallies.items():
        kills = tally.phases.total()
        longest = f"{tally.ended_sec:.1f}" if tally.ended_sec else ""
        where = [str(tally.phases[phase] or "") for phase in columns]
        rows.append([name, kind, str(kills), *where, str(tally.equal_kills), str(kills - tally.equal_kills), longest])
    sums = [str(sum(int(row[i] or 0) for row in rows[1:])) for i in range(2, len(head) - 1)]
    rows.append(["all", "", *sums, ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        lines.append("  ".join(words + [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]))
    return "\n".join(line.rstrip() for line in lines)


def plan(work: Workloads) -> tuple[list[Attack], list[Attack]]:
    """The attacks on commands of one process, two at a time, and those on commands of two ranks, one beside them."""
    alone = [
        Attack(work.fit, 2, fresh=True, name="at random, from its start on"),
        Attack(work.fit, 8),
        Attack(work.fit, 3, aim=writes_checkpoint, name="while it writes a checkpoint"),
        Attack(work.compare, 3),
        Attack(work.compare, 1, victims=first_process, name="without its run"),
        Attack(work.compare, 1, victims=children, name="only its run"),
        Attack(work.encode, 4),
        Attack(work.encode, 2, aim=writes, name="while it writes"),
        Attack(work.sample, 3),
        Attack(work.sample_npz, 3),
        Attack(work.profile, 2),
        Attack(work.evaluate, 2),
    ]
    together = [
        Attack(work.fit_ddp, 5),
        Attack(work.fit_ddp, 1, aim=writes_checkpoint, name="while it writes a checkpoint"),
        Attack(work.fit_sharded, 4),
        Attack(work.fit_sharded, 4, aim=in_collective, name="inside the oracle's collective"),
        Attack(work.fit_sharded, 2, victims=one_rank, name="one rank alone"),
        Attack(work.fit_sharded, 2, victims=one_rank, aim=in_collective, name="one rank, inside the collective"),
        Attack(work.fit_sharded, 1, victims=one_rank, fresh=True, name="one rank of torchrun's"),
        Attack(work.fit_sharded, 1, victims=first_process, fresh=True, name="torchrun alone"),
        Attack(work.encode_ranks, 3),
        Attack(work.sample_ranks, 3),
        Attack(work.sample_ranks, 1, victims=one_rank, name="one rank alone"),
    ]
    return alone, together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="workloads whose name begins so")
    parser.add_argument("--folder", type=Path, default=None, help="where everything goes; default: a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fm-stages-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    work = Workloads(folder.resolve() / "inputs")
    start = time.monotonic()
    print(f"Kills at moments of seed {options.seed}; everything is in {folder}", flush=True)
    work.make(folder / "inputs.log")
    alone, together = ([a for a in part if a.workload.name.startswith(options.only)] for part in plan(work))
    attacks = [*alone, *together]
    tallies: dict[tuple[str, str], Tally] = {}
    with tqdm(total=sum(attack.kills for attack in attacks), desc="Killing", unit="kill") as bar:
        killing = Killing(folder.resolve() / "runs", options.seed, bar.write, bar.update)
        with ThreadPoolExecutor(2) as lanes, ThreadPoolExecutor(1) as pairs:
            running = [lanes.submit(killing.attack, attack) for attack in alone]
            running += [pairs.submit(killing.attack, attack) for attack in together]
            found = [(attack, tally.result()) for attack, tally in zip(attacks, running, strict=True)]
        tallies = {(attack.workload.name, attack.name): tally for attack, tally in found}
    print(f"\n{table(tallies)}\n")
    defects = [f"{name}, {kind}: {what}" for (name, kind), tally in tallies.items() for what in tally.defects]
    print("\n".join(f"DIFFERENT  {defect}" for defect in defects) or "Every run ended as one that was never killed.")
    print(f"{sum(t.phases.total() for t in tallies.values())} kills in {(time.monotonic() - start) / 60:.1f} minutes.")
    if options.folder is None and not defects:
        shutil.rmtree(folder)
    return int(bool(defects))


if __name__ == "__main__":
    sys.exit(main())
