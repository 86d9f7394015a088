"""One rank dies: the others end at once, with the words of the one that died; under each way to start ranks."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm_stages.training import lifeline
from fm_stages.training.lifeline import GOODBYE, Lifeline

SCRIPT = Path(__file__).with_name("dying_rank.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def die(folder: Path, launcher: list[str], how: str, where: str, rank: int) -> tuple[int, str]:
    """Status, and what was printed; how long the others lived on is printed, too."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "HOW": how, "WHERE": where, "WHO": str(rank)}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    print(f"the last rank ended {time.time() - float((folder / 'died').read_text()):.0f} s after the first")
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.slow  # each starts two ranks
@pytest.mark.parametrize(
    ("launcher", "how", "where", "rank"),
    [
        (TORCHRUN, "raise", "validation", 1),
        (TORCHRUN, "kill", "oracle", 0),
        ([], "kill", "sampling", 1),
        ([], "raise", "step", 1),
        ([], "exit", "step", 0),
        (TORCHRUN, "worker", "step", 1),
    ],
)
def test_the_others_end_with_the_words_of_the_one_that_died(tmp_path, launcher, how, where, rank):
    status, said = die(tmp_path, launcher, how, where, rank)
    assert status == 1 if launcher else status != 0, said[-3000:]  # Lightning's launcher may kill rank 0, too
    word = {"raise": "OverflowError: the planted error", "worker": "DataLoader worker"}.get(how, "without a word")
    assert re.search(rf"fm-stages: rank {rank} \(.*\) ended with.*{word}", said) or word in said, said[-3000:]
    assert "peer" not in said, said[-3000:]  # no traceback of a connection that is gone
    if rank > 0:  # rank 0 may die while it writes: the next start removes what is left of that
        assert (tmp_path / "run/checkpoints/last.ckpt").exists()
        assert not list(tmp_path.rglob("*.part"))


def test_a_token_is_one_word_of_a_line(monkeypatch):
    """A byte of it that ended a line made a rank in eight a stranger."""
    monkeypatch.setattr("secrets.token_bytes", lambda num: b"\n" * num)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    line = Lifeline()
    broadcast = SimpleNamespace(broadcast=lambda offer: offer)
    line.setup(SimpleNamespace(world_size=2, global_rank=0, strategy=broadcast), None, "fit")
    with socket.create_connection(("127.0.0.1", line._server.getsockname()[1])) as peer:
        peer.sendall(line._token + b"rank 1 (here)\n")
        assert line._welcome() is not None
    line.close()


def test_who_does_not_know_the_token_is_not_listened_to():
    line = Lifeline()
    line._server, line._token = lifeline._listen(), b"x" * lifeline.TOKEN_BYTES
    port = line._server.getsockname()[1]
    for words in (b"y" * lifeline.TOKEN_BYTES + b"rank 1\n", b"\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            assert line._welcome() is None
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(line._token + b"rank 1 (here)\n")
        known = line._welcome()
        peer.sendall(b"rank 1 (here) ended with Oops: no")
        peer.shutdown(socket.SHUT_WR)
        assert line._last_word(known) == "rank 1 (here) ended with Oops: no"
    line.close()


@pytest.mark.parametrize(("said", "cause"), [(GOODBYE, ""), (b"", "rank 3 ended without a word")])
def test_last_words(said, cause):
    line = Lifeline()
    ours, theirs = socket.socketpair()
    line._peers[ours] = "rank 3"
    theirs.sendall(said)
    theirs.close()
    assert line._last_word(ours).startswith(cause)
    assert bool(cause) == bool(line._peers == {} and cause)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:19139"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed"), False),
    ],
)
def test_what_only_says_that_a_connection_is_gone(error, lost):
    assert lifeline._is_lost(error) is lost
    outer = KeyError("x")
    outer.__cause__ = error
    assert lifeline._is_lost(outer) is lost
