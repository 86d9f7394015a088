"""``fm-stages doctor``: what would waste a run, found before it starts, in lines of green, yellow and red.

Takes all that fm-stages fit takes, builds what that would train, and checks data, draws, network,
schedule and machine. Nothing is written into the run's folder. What fit would refuse at once is refused
here in its words.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fm_stages.studies.commands import interruptible
from fm_stages.studies.doctor.data import check_identity, check_labels, check_membership, check_rows
from fm_stages.studies.doctor.draws import check_batch, check_noise, check_times
from fm_stages.studies.doctor.lines import LEVELS, Line, worst
from fm_stages.studies.doctor.machine import check_machine
from fm_stages.studies.doctor.network import check_network, load_weights
from fm_stages.studies.doctor.oracle import check_cost, check_stages, measure_roughly, rows_at_hand
from fm_stages.studies.doctor.run import PlannedRun, plan_run
from fm_stages.studies.doctor.schedule import check_schedule
from fm_stages.training import read_profile

Check = Callable[[], Iterable[Line]]


def doctor_parser() -> argparse.ArgumentParser:
    """The options of the command that are not those of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="fm-stages doctor",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="fm-stages doctor --config X.yaml [--config Y.yaml] [options] [any option of fm-stages fit]",
        description=__doc__,
        epilog="Status: 0 without a red line, 1 with one (--strict: or a yellow one), 2 for a mistake in the input.\n"
        "Ranks of the job, which are only planned for: --trainer.devices 8 --trainer.num_nodes 2.\n"
        "Options of a run: fm-stages fit --help.",
    )
    parser.add_argument(
        "--ckpt",
        metavar="FILE",
        help="trained weights whose direction of time to check; default: what the run starts with",
    )
    parser.add_argument(
        "--profile", metavar="FILE", help="stages that fm-stages profile measured; default: measured roughly"
    )
    parser.add_argument("--json", metavar="FILE", help="write the lines there as well")
    parser.add_argument("--strict", action="store_true", help="status 1 for a yellow line, too")
    return parser


def doctor_command(arguments: list[str] | None = None) -> None:
    """The command: prints a line for each check as it is made, and ends with a status for scripts.

    Args:
        arguments: those after ``fm-stages doctor``; None: of this process.

    Raises:
        SystemExit: with status 1 if a line is red.
        ValueError: for what ``fm-stages fit`` would refuse.
    """
    start = time.perf_counter()
    options, of_fit = doctor_parser().parse_known_args(sys.argv[2:] if arguments is None else arguments)
    if options.json is not None:
        _check_file(Path(options.json).absolute())
    if options.profile is not None:
        of_fit += ["--monitor.profile", options.profile]
    with _quiet():
        run = plan_run(of_fit)
        weights = load_weights(run, options.ckpt or run.config.ckpt_path)
        with interruptible():
            lines = examine(run, weights)
    counts = Counter(line.level for line in lines)
    print(f"\n{', '.join(f'{counts[level]} {level}' for level in LEVELS)}, in {time.perf_counter() - start:.0f} s")
    if options.json is not None:
        report = {"level": worst(counts), "ranks": run.num_ranks, "lines": [asdict(line) for line in lines]}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")  # which may be /dev/stdout
    if counts["red"] or (options.strict and counts["yellow"]):
        sys.exit(1)


def _check_file(file: Path) -> None:
    """Refuse now what could not be written after all checks."""
    if not file.parent.is_dir():
        raise ValueError(f"--json {file.name}: there is no folder {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"--json {file}: is a folder, or may not be written: give another file")


def examine(run: PlannedRun, weights: str | None) -> list[Line]:
    """Make all checks, printing each line as it is found.

    Args:
        run: the run.
        weights: what they are called, if they are trained.

    Raises:
        ValueError: if a file that is named is not what it should be.
    """
    missing = rows_at_hand(run)
    file = run.config.monitor.profile
    stages = [read_profile(file, run.oracle)] if file and missing is None else []

    def measured() -> Iterator[Line]:
        if not stages:
            stages.append(measure_roughly(run))
        yield check_stages(run, stages[0])

    rows: list[Check] = [lambda: check_rows(run), lambda: check_labels(run), lambda: check_membership(run)]
    oracle: list[Check] = [measured, lambda: [check_identity(run)], lambda: [check_cost(run)]]
    times: Check = lambda: [check_times(run, stages[0] if stages else None)]  # noqa: E731 - as the others
    checks: dict[str, list[Check]] = {
        **({"data": rows, "oracle": oracle} if missing is None else {"data": [lambda: [missing]]}),
        "draws": [lambda: check_noise(run), lambda: [check_batch(run)], times],
        "network": [lambda: check_network(run, weights)],
        "schedule": [lambda: check_schedule(run)],
        "machine": [lambda: check_machine(run)],
    }
    lines = []
    for section, each in checks.items():
        print(f"\n{section}", flush=True)
        for line in _made(section, each):
            print(line.text(colour=sys.stdout.isatty()), flush=True)
            lines.append(line)
    return lines


def _made(section: str, checks: list[Check]) -> Iterator[Line]:
    """The lines of a section; a check that fails on what it looks at is a finding, and the others are made."""
    for check in checks:
        try:
            yield from check()
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            yield Line(section, "red", f"could not be looked at: {reason}", "Training would fail on the same.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines on devices, which are those of this process and not of the job."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
