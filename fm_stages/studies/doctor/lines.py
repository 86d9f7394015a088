"""What the doctor says: lines of three colours, each with what was found and, unless it is green, what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["green", "yellow", "red"]

LEVELS: tuple[Level, ...] = ("green", "yellow", "red")

COLOURS = {"green": 32, "yellow": 33, "red": 31}
"""Of a terminal."""

WIDTH = 110
NAME_WIDTH = 18


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        name: what was looked at.
        level: green: as it should be. yellow: may be meant, worth a look. red: the run would be wasted.
        found: the values.
        remedy: what to do; empty for green.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""

    def text(self, colour: bool = False) -> str:
        """To be read, on as many lines of a terminal as it takes."""
        level = f"{self.level:6}"
        level = f"\033[{COLOURS[self.level]}m{level}\033[0m" if colour else level
        found = self.found.splitlines()
        parts = [*found[:1], *(f"{line}" for line in found[1:])]
        if self.remedy:
            parts.append(f"-> {self.remedy}")
        wrapped = [line for part in parts for line in textwrap.wrap(part, WIDTH - NAME_WIDTH - 11) or [""]]
        return f"  {level}  {self.name:{NAME_WIDTH}} " + ("\n" + " " * (NAME_WIDTH + 11)).join(wrapped)


def judged(name: str, found: str, *faults: tuple[Level, bool, str]) -> Line:
    """The line of the worst fault that is there, with the remedies of all of that level; green where there is none.

    Args:
        name: what was looked at.
        found: the values.
        faults: of each its level, whether it is there, and the remedy.
    """
    present = [(level, remedy) for level, there, remedy in faults if there]
    level = worst(level for level, _ in present)
    return Line(name, level, found, " ".join(remedy for each, remedy in present if each == level))


def worst(levels: Iterable[Level]) -> Level:
    """The worst of some levels; green of none."""
    return max(levels, key=LEVELS.index, default="green")
