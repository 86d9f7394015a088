"""Weights of published networks: a file that is named, or was downloaded before, or the one on the network."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fm_stages.data import load_tensors, locked, whole_file

REACH_SEC = 5
"""How long a host may take to answer before it counts as out of reach."""


def find_weights(file: str | None, sha256: str | None, url: str, name: str) -> tuple[Path, str]:
    """A file of weights, and its sha256.

    Args:
        file: that was named; None: what lies among the downloads of torch, or else at the address.
        sha256: that it has to have, as hexadecimal digits; None: any.
        url: where it was published.
        name: of the file among the downloads.

    Raises:
        FileNotFoundError: if there is none and the address cannot be reached.
        ValueError: if it has another sha256.
    """
    path = Path(file).expanduser() if file else Path(torch.hub.get_dir()) / "checkpoints" / name
    advice = f"fetch {url} on a machine with a network and put it at {path}, or name it with --features.weights FILE"
    if not path.is_file() and file:
        raise FileNotFoundError(f"there is no file {path}: the weights are at {url}")
    if not path.is_file():
        try:  # one question with an end, which goes through a proxy if there is one
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SEC).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise FileNotFoundError(
                f"the weights {name} are not here and cannot be had ({reason}): {advice}"
            ) from error
        with locked(path.parent, name, timeout_sec=3600):
            if not path.is_file():  # another rank had it before
                with whole_file(path) as part:
                    torch.hub.download_url_to_file(url, str(part))
    found = sha256_of(path)
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{path} has the sha256 {found}, not {sha256}: it is another file, or was damaged; {advice}")
    return path, found


def sha256_of(path: Path) -> str:
    """Of a whole file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, out of a ``.safetensors`` or of a file of torch; nothing else is unpickled.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("it holds other things than tensors")
    except Exception as error:  # torch and safetensors fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no file of weights ({type(error).__name__}: {reason}): fetch it again") from error
    return state


def digest_of(module: nn.Module) -> str:
    """Sha256 of all weights and buffers with their names: tells extractors apart, however they were made."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
