"""What the commands have in common: how they read their options and refuse them, and how Ctrl-C ends them."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentParser, Namespace


def command_parser(name: str, purpose: str | None) -> ArgumentParser:
    """A parser without options yet; ``purpose`` is what its help begins with."""
    return ArgumentParser(prog=f"fm-stages {name}", description=purpose, exit_on_error=False, allow_abbrev=False)


def parse_options(parser: ArgumentParser, arguments: list[str] | None) -> Namespace:
    """The options of a command.

    Args:
        parser: that knows them.
        arguments: those after the command's name; None: of this process.

    Raises:
        ValueError: if one is not understood.
    """
    with refusing(parser):
        return parser.parse_args(sys.argv[2:] if arguments is None else arguments)


@contextmanager
def refusing(parser: ArgumentParser) -> Iterator[None]:
    """Around what parses options, or makes objects of them.

    Raises:
        ValueError: in the place of what the parser says, with the option and where to read of all of them.
    """
    try:
        yield
    except ArgumentError as error:
        reason = re.sub(r'Parser key "(\w+)":\s*', r"--\1: ", str(error))
        raise ValueError(f"{reason} ({parser.prog} --help lists what can be given)") from error


def check_least(options: Namespace, least: int, *names: str) -> None:
    """Refuse numbers that are too small; those that were not given are fine.

    Raises:
        ValueError: with the option and its value.
    """
    for name in names:
        if options[name] is not None and options[name] < least:
            raise ValueError(f"--{name} {options[name]} must be {least} or more")


@contextmanager
def interruptible(told: str = "") -> Iterator[None]:
    """Let Ctrl-C end a command with a line and status 130; ``told`` is what becomes of the work so far."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nfm-stages: interrupted{told and f'; {told}'}", file=sys.stderr)
        sys.exit(130)
