"""The findings that the project stands on, made again from the training data alone.

    python benchmarks/reproduce.py                    # all of them: some hours on one CPU core
    python benchmarks/reproduce.py stages handover    # some of them

Each becomes a page with a figure and its data in docs/results. Trainings and measurements are kept in runs/reproduce;
the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from findings.workshop import ROOT, Workshop, write
from tqdm import tqdm

FINDINGS = (
    "stages",
    "trends",
    "targets",
    "generalisation",
    "handover",
    "sizes",
    "capacity",
    "sampling_shift",
    "guidance_interval",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FINDINGS)}; default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/reproduce", help="folder of what is trained")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="folder of the pages")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in FINDINGS]:
        parser.error(f"there is no finding {unknown[0]!r}; there are {', '.join(FINDINGS)}")
    for name in tqdm(options.names or FINDINGS, desc="findings", unit="page"):
        workshop = Workshop(options.work.absolute())
        found = import_module(f"findings.{name}").measure(workshop)
        write(name, found, workshop.commands, options.out)
        print(f"\n{found.title}: {options.out / name}.md", flush=True)


if __name__ == "__main__":
    main()
