"""Damaged files of every kind, given to the commands that read them.

Each works all the same or ends with one line that names the file and the reason, with status 2: no traceback, no hang,
nothing left in the folder of the output, no memory taken for a size that a header claims, nothing imported that is not
on the list. The short form runs with the other tests; all of it, 900 files, is

    python -m pytest -m "" tests/fuzz -s
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from fm_stages.training import allow_imports
from tests.fuzz.subjects import Subject, imported, subjects, write_originals

SHORT, FULL = 60, 900
LONGEST_SEC = 240
MEMORY_BYTES = 3 * 2**30
"""What a command may take beyond what this process has already."""


class Hang(BaseException):
    pass


@dataclass
class Outcome:
    """How one case ended; ``wrong`` is why it is none of the two that are right."""

    subject: str
    seed: int
    status: int
    said: str
    wrong: str
    sec: float


@pytest.fixture(scope="module")
def originals(tmp_path_factory, write_vae) -> Path:
    """All files, whole."""
    folder = tmp_path_factory.mktemp("fuzz") / "work"  # where the cases are, too: some files hold absolute paths
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        write_originals(folder, lambda *words: _call(patch, words), write_vae)
    return folder.rename(folder.with_name("originals"))


def _call(patch: pytest.MonkeyPatch, words):
    """The command in this process, with what it prints."""
    import contextlib
    import io
    import sys
    from types import SimpleNamespace

    from fm_stages import cli

    patch.setattr(sys, "argv", ["fm-stages", *map(str, words)])
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def cases(num: int, seed: int):
    """Subjects with a seed each: every subject once or more, and by their shares."""
    of = subjects()
    rng = random.Random(seed)
    names = list(of) + rng.choices(list(of), [subject.share for subject in of.values()], k=max(0, num - len(of)))
    for number, name in enumerate(names):
        yield name, of[name], seed * 100_000 + number


def examine(name: str, subject: Subject, seed: int, originals: Path, folder: Path, patch) -> Outcome:
    """Damage one file, call the command, and see what it makes of it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals, folder)
    patch.chdir(folder)
    rng = random.Random(seed)
    random.seed(seed)
    rng.choice(subject.mutations)(folder / subject.file, rng)
    before = _files(folder)
    start, wrong, status, err = time.perf_counter(), "", -1, ""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY_BYTES, limits[1]))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST_SEC)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = _call(patch, subject.words)
        status, err = done.status, done.err
    except Hang:
        wrong = "it hangs"
    except BaseException as error:  # what would be a traceback
        wrong = f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    lines = [line for line in err.splitlines() if line.startswith("fm-stages: ") and "note:" not in line]
    said = lines[-1] if lines else ""
    left = sorted(_files(folder) - before)
    left = [file for file in left if not file.endswith(".lock") and "__pycache__" not in file]
    if not wrong and status == 2:
        named = (subject.file, Path(subject.file).name, *subject.said)
        if len(lines) != 1 or "Traceback" in err:
            wrong = f"{len(lines)} lines: {err[-300:]!r}"
        elif not any(word in said for word in named) and "--" not in said:
            wrong = f"names no file: {said[:400]}"
        elif len(said) > 2500:
            wrong = f"a line of {len(said)} characters"
        elif left and not (subject.kept and all(file.split("/")[0] in subject.kept for file in left)):
            wrong = f"left {left[:5]}, {said[:200]}"
    elif not wrong and status not in (0, 1 if subject.words[0] in ("doctor", "compare") else 0):
        wrong = f"status {status}: {err[-300:]!r}"
    if pwned := [*originals.parent.glob("pwned"), *Path().glob("pwned"), *imported()]:
        wrong = f"it ran {pwned}"
    return Outcome(name, seed, status, said, wrong, time.perf_counter() - start)


def _too_long(*_) -> None:
    raise Hang


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def _files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def table(outcomes: list[Outcome]) -> str:
    """How many of each kind ended how."""
    counts = Counter((outcome.subject, "wrong" if outcome.wrong else min(outcome.status, 2)) for outcome in outcomes)
    lines = [f"{'damaged file, read by':32} {'cases':>6} {'refused':>8} {'works':>6} {'wrong':>6}"]
    for name in dict.fromkeys(outcome.subject for outcome in outcomes):
        refused, wrong = counts[name, 2], counts[name, "wrong"]
        works = counts[name, 0] + counts[name, 1]
        lines.append(f"{name:32} {refused + wrong + works:6} {refused:8} {works:6} {wrong:6}")
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    refused = sum(outcome.status == 2 and not outcome.wrong for outcome in outcomes)
    lines.append(f"{'all':32} {len(outcomes):6} {refused:8} {len(outcomes) - refused - wrong:6} {wrong:6}")
    return "\n".join(lines)


def fuzz(originals: Path, patch, num: int, seed: int) -> list[Outcome]:
    allow_imports("tests")
    patch.setenv("PL_GLOBAL_SEED", "0")
    patch.syspath_prepend(originals.with_name("work"))
    outcomes = []
    for name, subject, case in cases(num, seed):
        outcomes.append(examine(name, subject, case, originals, originals.with_name("work"), patch))
        one = outcomes[-1]
        with (originals.with_name("outcomes.txt")).open("a") as log:  # for whoever looks into one
            log.write(f"{one.subject}, seed {one.seed}: {one.status}, {one.sec:.1f} s, {one.wrong or one.said}\n")
    patch.undo()
    return outcomes


@pytest.mark.parametrize(
    ("num", "seed"), [(SHORT, 0), pytest.param(FULL, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_damaged_files(num, seed, originals, monkeypatch, capsys):
    outcomes = fuzz(originals, monkeypatch, num, seed)
    with capsys.disabled():
        print(f"\n{table(outcomes)}")
    wrong = [f"{outcome.subject}, seed {outcome.seed}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whole_files_work(originals, monkeypatch):
    """What is not damaged is read: else the other test would say nothing."""
    for name, subject in subjects().items():
        whole = Subject(subject.file, subject.words, (lambda file, rng: None,))
        found = examine(name, whole, 0, originals, originals.with_name("work"), monkeypatch)
        print(f"{name:32} {found.sec:.1f} s {found.status}")
        assert not found.wrong, f"{name}: {found.wrong}"
        assert found.status in (0, 1), f"{name}: {found.said}"
