"""What the benchmarks share: pairs timed in turn, the machine in words, tables.

Nothing is compared between runs. Two things are timed A B A B ... in one process, and what is reported is the ratio
within each pair: a machine that slows down for a while slows down both.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm


@dataclass
class Pairs:
    """Seconds of A and of B, measured in turn."""

    a: list[float] = field(default_factory=list)
    b: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """B / A of each pair."""
        return [b / a for a, b in zip(self.a, self.b, strict=True)]


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds, after the device has done what it was asked to.

    With one CPU thread these are the process's own processor seconds, which other work on the machine does not touch.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds that one call takes."""
    start = clock(device)
    work()
    return clock(device) - start


def alternate(
    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, Pairs]:
    """Time A and B of each case in turn, ``rounds`` times over all cases; a first round is not counted."""
    pairs = {name: Pairs() for name in cases}
    with tqdm(total=(rounds + 1) * len(cases), desc="timing", unit="pair") as bar:
        for turn in range(rounds + 1):
            for name, (a, b) in cases.items():
                time_a, time_b = seconds(a, device), seconds(b, device)
                if turn:
                    pairs[name].a.append(time_a)
                    pairs[name].b.append(time_b)
                bar.update()
    return pairs


def spread(values: Sequence[float], form: str = ".2f") -> tuple[str, str]:
    """Median, and smallest to largest, as text."""
    if not values:
        return "-", "-"
    return f"{statistics.median(values):{form}}", f"{min(values):{form}} - {max(values):{form}}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with columns of even width."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(text)


def machine(device: torch.device | str = "cpu") -> str:
    """Where this ran: versions, threads, processor and, where it is used, GPU."""
    gpu = f", {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else ""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_processor()}{gpu}"


def parser(description: str | None, rounds: int, of_what: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=positive, default=rounds, help=f"{of_what} (default: {rounds})")
    made.add_argument("--threads", type=positive, action=_Threads, help="of torch (default: torch's own choice)")
    return made


class _Threads(argparse.Action):
    """Sets them as it is parsed."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        assert isinstance(values, int)
        torch.set_num_threads(values)
        namespace.threads = values


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


@contextmanager
def full_precision_products() -> Iterator[None]:
    """Float32 products in float32, on both sides of a comparison."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
