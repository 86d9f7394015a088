"""One rank dies: the others hear of it at once, say whose fault it was, and end.

A rank that has lost another one waits in the next collective: with gloo until the connection breaks, with NCCL up to
the timeout of the process group, half an hour. So each rank holds a connection to rank 0, on which nothing is said but
the last word. Whatever ends a process, an error, a signal or the kernel, also closes its connections.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fm_stages.training.guards.rewinding import Rewind

GOODBYE = b"\0"
"""The last word of a rank that ended as it should."""

TOKEN_BYTES = 32
"""Said first by who connects: anybody can reach the port."""

HEARD_SEC = 5.0
"""Seconds for which a rank whose collective failed waits to hear why."""

GRACE_SEC = 15.0
"""Seconds in which a rank ends by itself after another one has died; a collective that hangs does not."""

CONNECT_SEC = 60.0

MAX_WORDS = 2000
"""Characters of a last word."""

LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
"""In the text of what a collective raises that has lost a rank."""


class RankLost(SystemExit):
    """Another rank has died; what it died of has been printed."""

    def __init__(self) -> None:
        super().__init__(1)


class Lifeline(L.Callback):
    """Ends this rank when another one has died, and prints what of, on the lowest rank that is left.

    Attributes:
        cause: what another rank died of; empty as long as all live.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.cause = ""
        self._heard = threading.Event()
        self._ending = threading.Event()
        self._closed = threading.Event()
        self._peers: dict[socket.socket, str] = {}
        self._server: socket.socket | None = None
        self._token = b""
        self._rank = 0
        self._printed = False

    # from beginning to end --------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Connect, once the ranks have met."""
        self.close()
        if trainer.world_size == 1:
            return
        self._begin()
        self._rank = trainer.global_rank
        offer = 0, b"", ""
        if self._rank == 0:
            self._server = _listen()
            self._token = secrets.token_hex(TOKEN_BYTES // 2).encode()  # no byte of it ends a line
            offer = self._server.getsockname()[1], self._token, _name(0)
        port, token, name = trainer.strategy.broadcast(offer)
        if self._rank > 0:
            address = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
            try:
                peer = socket.create_connection((address, port), timeout=CONNECT_SEC)
            except OSError as error:
                rank_zero_warn(f"rank {self._rank} cannot watch rank 0 over {address}:{port} ({error}).")
                return
            peer.sendall(token + f"{_name(self._rank)}\n".encode())
            self._peers[_kept(peer)] = name
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tell the others what this rank dies of, unless it dies of their death.

        Raises:
            RankLost: in the place of an error that only says that a connection is gone.
        """
        self._ending.set()
        if isinstance(exception, SystemExit | Rewind):  # which all ranks decide together
            self.close()
            return
        if (self._peers or self._heard.is_set()) and _is_lost(exception) and self._heard.wait(HEARD_SEC):
            if not self._printed:
                self._print()
            self.close(self.cause)
            time.sleep(1)  # a launcher sees first who died first
            raise RankLost from exception
        self.close(f"{_name(self._rank)} ended with {type(exception).__name__}: {exception}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """This rank is done."""
        self._ending.set()
        self.close()

    def close(self, word: str = "") -> None:
        """Say a last word to all, and hang up."""
        self._closed.set()
        peers, self._peers = self._peers, {}
        for peer in peers:
            _say(peer, word)
        if self._server is not None:
            self._server.close()
            self._server = None

    # the thread -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Wait for last words; end the process if the others died and it does not end by itself."""
        with selectors.DefaultSelector() as selector:
            for known in (self._server, *self._peers):
                if known is not None:
                    selector.register(known, selectors.EVENT_READ)
            while selector.get_map() and not self.cause:
                for key, _ in selector.select(timeout=0.5):
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    if source is self._server:
                        if (peer := self._welcome()) is not None:
                            selector.register(peer, selectors.EVENT_READ)
                    else:
                        selector.unregister(source)
                        self.cause = self.cause or self._last_word(source)
                if self._closed.is_set():  # and no sooner: a collective may fail before the last word is here
                    break
        if not self.cause:
            return
        if not self._ending.is_set():
            self._print()  # now: a launcher may end this rank before it comes to its next collective
        self._heard.set()
        if not self._ending.wait(GRACE_SEC):
            self.close(self.cause)
        else:
            time.sleep(2 * GRACE_SEC)
        os._exit(1)

    def _welcome(self) -> socket.socket | None:
        """Take the connection of a rank, if it is one."""
        assert self._server is not None
        peer, _ = self._server.accept()
        peer.settimeout(CONNECT_SEC)
        try:
            with peer.makefile("rb", buffering=0) as file:
                said = b""
                while not said.endswith(b"\n") and len(said) < TOKEN_BYTES + MAX_WORDS and (one := file.read(1)):
                    said += one
        except OSError:
            said = b""
        if not hmac.compare_digest(said[:TOKEN_BYTES], self._token):
            peer.close()
            return None
        self._peers[_kept(peer)] = said[TOKEN_BYTES:].decode(errors="replace").strip()
        return peer

    def _last_word(self, peer: socket.socket) -> str:
        """What a rank died of; empty if it did not."""
        name = self._peers.pop(peer, "a rank")
        said = b""
        try:
            while part := peer.recv(MAX_WORDS):
                said += part
        except (ConnectionResetError, BrokenPipeError):
            pass
        except OSError:  # no route any more, or no answer: the collectives will find out
            return ""
        finally:
            peer.close()
        if said.startswith(GOODBYE):
            return ""
        return said.decode(errors="replace") or (
            f"{name} ended without a word: it was killed, by the kernel if the machine was out of memory, or it crashed"
        )

    def _print(self) -> None:
        """Once over all ranks."""
        self._printed = True
        if self._rank == 0 or (self._rank == 1 and "rank 0 (" in self.cause[:8]):
            print(f"\nfm-stages: {self.cause}. The other ranks end, too.", file=sys.stderr, flush=True)


def _listen() -> socket.socket:
    """A server on a free port of all the machine's addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def _kept(peer: socket.socket) -> socket.socket:
    """A connection that waits for ever, and is kept up by the kernel meanwhile."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _say(peer: socket.socket, word: str) -> None:
    try:
        peer.settimeout(1)
        peer.sendall(" ".join(word.split())[:MAX_WORDS].encode() or GOODBYE)
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it is gone as well
    finally:
        peer.close()


def _name(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error says no more than that a connection is gone."""
    while error is not None:
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
