"""Whether a folder that a command left after kills is the one that it leaves without, bit for bit."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

WALL_CLOCK = {"time_elapsed", "train_sec", "seconds", "calls"}
"""Keys whose values are seconds, or a list of calls with how long each took."""

SPEED = ("oracle/share", "speed/")
"""Beginnings of columns that hold shares of seconds, or numbers per second."""

# what a command says of its own calls, reports whose text holds seconds, and the id of a run
UNLIKE = ("run_id.txt", "*.log", "log.txt", "report.md", "report.json", "progress.png", "differences.png")


def differences(expected: Path, found: Path, unlike: tuple[str, ...] = UNLIKE) -> list[str]:
    """What is not the same in two folders; nothing if they are equal.

    Checkpoints are compared value by value, JSON without seconds, all else byte by byte; a folder's own name in them
    counts as the other's.

    Args:
        expected: the folder without kills.
        found: the one with them.
        unlike: patterns of files that only have to be there.
    """
    names = [{str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} for folder in (expected, found)]
    told = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    told += [f"{name} is left over" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        if not any(fnmatch(Path(name).name, pattern) for pattern in unlike):
            ours, theirs = (_content(folder / name, folder) for folder in (expected, found))
            told += [f"{name}: {where}" for where in _unequal(ours, theirs)][:3]
    return told


def _content(file: Path, folder: Path) -> Any:
    if file.suffix == ".ckpt":
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint.get("continuity", {}).pop("run", None)  # the id of the run
        return _plain(checkpoint, str(folder))
    raw = file.read_bytes().replace(str(folder).encode(), b"<folder>")
    if file.suffix == ".json":
        return _plain(json.loads(raw), str(folder))
    if file.name == "metrics.csv":
        return _without_speed(raw.decode())
    if file.suffix == ".yaml":
        return _without_call(raw.decode())
    return raw


def _plain(value: Any, folder: str) -> Any:
    """Without seconds and the folder's name."""
    if isinstance(value, Mapping):
        return {_plain(k, folder): _plain(v, folder) for k, v in value.items() if k not in WALL_CLOCK}
    if isinstance(value, list | tuple):
        return [_plain(v, folder) for v in value]
    return _without_call(value.replace(folder, "<folder>")) if isinstance(value, str) else value


def _without_call(text: str) -> str:
    """A configuration without the checkpoint that it was started from: none at first."""
    return re.sub(r"^ckpt_path:.*$", "ckpt_path:", text, flags=re.MULTILINE)


def _without_speed(text: str) -> bytes:
    """The rows of a table of metrics, without columns of speed."""
    table = csv.DictReader(io.StringIO(text))
    kept = [name for name in table.fieldnames or [] if not name.startswith(SPEED)]
    return "\n".join([",".join(kept), *(",".join(row[name] or "" for name in kept) for row in table)]).encode()


def _unequal(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """The places at which two nested values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            if key not in ours or key not in theirs:
                yield f"{where}/{key} is {'missing' if key in ours else 'left over'}"
            else:
                yield from _unequal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _unequal(*pair, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.dtype != theirs.dtype or not torch.equal(_bits(ours), _bits(theirs)):
            away = float((ours.double() - theirs.double()).abs().max()) if ours.shape == theirs.shape else "shape"
            yield f"{where} differs by up to {away}"
    elif isinstance(ours, bytes) and isinstance(theirs, bytes):
        if ours != theirs:
            yield f"{where}bytes differ ({len(ours)} and {len(theirs)}){_first_line(ours, theirs)}"
    elif type(ours) is not type(theirs) or (
        ours != theirs and not (isinstance(ours, float) and math.isnan(ours) and math.isnan(theirs))
    ):
        yield f"{where} was {str(ours)[:80]!r} and is {str(theirs)[:80]!r}"


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else x


def _first_line(ours: bytes, theirs: bytes) -> str:
    lines = zip(ours.splitlines(), theirs.splitlines(), strict=False)
    found = next(((i, a, b) for i, (a, b) in enumerate(lines) if a != b), None)
    if found is None or any(byte > 127 or byte < 9 for line in found[1:] for byte in line):
        return ""
    return f", line {found[0] + 1} was {found[1][:60].decode()!r} and is {found[2][:60].decode()!r}"
