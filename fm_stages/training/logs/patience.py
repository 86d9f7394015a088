"""Loggers that may fail, hang or die while training goes on.

Whoever logs over a network calls what can raise, and what can wait for ever: a service that was killed, a disk that is
full, a server that takes the connection and says nothing. Each logger gets a thread that makes its calls in their
order. Training waits for each of them, as ever, until the logger has used up its patience; then it goes on without.
"""

from __future__ import annotations

import functools
import inspect
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

PATIENCE_SEC = 60.0
"""Seconds for which a logger may hold up a run, in all; what a call takes below `QUICK_SEC` is not counted."""

QUICK_SEC = 1.0

ONE_CALL_SEC = 30.0
"""Seconds that training waits for one call."""

FINISH_SEC = 90.0
"""Seconds that a finished run waits for what is still to be sent."""

HURRY_SEC = 20.0
"""The same for a run that was stopped, whose machine may be taken."""

MAX_WAITING = 20_000
"""Calls that wait behind one that hangs; those after them are lost."""

PROPERTIES = ("experiment", "name", "version")
"""Of loggers: reading one may open files and connections."""


class Silent:
    """In the place of an experiment that cannot be had: takes everything, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Call:
    def __init__(self, what: str, function: Callable[[], Any]) -> None:
        self.what, self.function = what, function
        self.done = threading.Event()
        self.result: Any = None


class Patience:
    """The thread that makes one logger's calls, and how long training has waited for it.

    Args:
        name: of the logger, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_calls = self.num_lost = 0
        self.left_sec = PATIENCE_SEC
        self._first = ""
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._behind: _Call | None = None  # that was not waited for to its end
        self._thread = threading.Thread(target=self._work, name=f"calls of {name}", daemon=True)
        self._thread.start()

    def call(self, what: str, function: Callable[[], Any], default: Any = None) -> Any:
        """Make a call; its result, or ``default`` if it fails or is not waited for."""
        if threading.current_thread() is self._thread:
            return function()  # a part of another call
        self.num_calls += 1
        if self._calls.qsize() >= MAX_WAITING:
            self._lose(what, "too many calls wait behind one that hangs")
            return default
        call = _Call(what, function)
        call.result = default
        self._calls.put(call)
        if self._behind is not None and not self._behind.done.is_set():
            return default
        self._wait(call)
        return call.result if call.done.is_set() else default

    def finish(self, what: str, function: Callable[[], Any], limit_sec: float) -> None:
        """Make the last call, and tell what was lost."""
        call = _Call(what, function)
        self._calls.put(call)
        if not call.done.wait(limit_sec):
            self.num_lost += self._calls.qsize() + 1
            self._first = self._first or f"{what} did not end within {limit_sec:.0f} s"
            # past the others that wait: wandb then does not wait again when Python ends
            last = threading.Thread(target=function, daemon=True)
            last.start()
            last.join(QUICK_SEC)
        if self.num_lost:
            rank_zero_info(
                f"{self.name}: {self.num_lost} of {self.num_calls + 1} calls were lost ({self._first}). The run's own "
                "figures, tables and checkpoints do not depend on it."
            )

    def _wait(self, call: _Call) -> None:
        start, limit = time.monotonic(), min(ONE_CALL_SEC, self.left_sec)
        call.done.wait(limit)
        self.left_sec = max(self.left_sec - max(time.monotonic() - start - QUICK_SEC, 0), 0)
        if not call.done.is_set():
            self._behind = call
            rank_zero_warn(
                f"{self.name}.{call.what} did not end within {limit:.0f} s. Training goes on; what is logged waits for "
                "it, and the end of the run says what was lost."
            )

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call.result = call.function()
            except BaseException as error:  # whatever a logger raises
                self._lose(call.what, f"{type(error).__name__}: {error}")
            call.done.set()

    def _lose(self, what: str, why: str) -> None:
        self.num_lost += 1
        if not self._first:
            self._first = f"the first, {what}: {' '.join(why.split())}"
            rank_zero_warn(
                f"{self.name}.{what} failed ({' '.join(why.split())}). Training goes on; the end of the run says how "
                "many calls were lost."
            )


def make_patient(logger: Logger) -> None:
    """Let all public methods of a logger, and `PROPERTIES`, be called in its own thread; it stays what it is."""
    kind = type(logger)
    if hasattr(kind, "patience"):
        return
    patience = Patience(kind.__name__)
    members: dict[str, Any] = {"patience": patience, "__module__": __name__, "__doc__": kind.__doc__}
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        if isinstance(member, property) and name in PROPERTIES:
            members[name] = property(
                _in_thread(patience, name, member.fget, Silent() if name == "experiment" else None)
            )
        elif inspect.isfunction(member) and not name.startswith("_"):
            members[name] = _in_thread(patience, name, member)
    # another name: configurations choose loggers by the names of all classes there are
    logger.__class__ = type(f"Patient{kind.__name__}", (kind,), members)


def call_logger(logger: Logger, what: str, function: Callable[[], Any]) -> None:
    """Make a call that is none of the logger's methods in its place among them."""
    patience = getattr(logger, "patience", None)
    if isinstance(patience, Patience):
        patience.call(what, function)
    else:
        function()


def finish_loggers(loggers: Iterable[Logger], status: int) -> None:
    """Let loggers end, and tell what they lost.

    wandb sends the rest when the process ends, and waits for that as long as it takes, also for a service that hangs:
    here it gets `FINISH_SEC`, or `HURRY_SEC`.

    Args:
        loggers: of the run, made patient.
        status: that the process is going to end with; wandb takes any but 0 for a failed run.
    """
    for logger in loggers:
        patience = getattr(logger, "patience", None)
        if not isinstance(patience, Patience):
            continue
        last: Callable[[], Any] = _nothing
        if isinstance(logger, WandbLogger):
            last = functools.partial(_end_wandb, status)
        patience.finish("teardown", last, FINISH_SEC if status == 0 else HURRY_SEC)


def _end_wandb(status: int) -> None:
    import wandb

    try:
        wandb.teardown(exit_code=status)
    finally:
        wandb.run = None  # else the next run of this process would go on with one whose service is gone


def _nothing() -> None:
    """What comes after all calls that still wait."""


def _in_thread(patience: Patience, what: str, function: Any, default: Any = None) -> Callable[..., Any]:
    process = os.getpid()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() != process:
            return function(*args, **kwargs)  # a worker, which has no such thread
        return patience.call(what, functools.partial(function, *args, **kwargs), default)

    return call
