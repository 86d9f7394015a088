"""Ways to damage a file, each drawn by a generator of its own: in its bytes, in its structure, in its header."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ATTACKS = [
    *("evil_networks.Net", "torchvision_evil.Net", "os.system", "torch.hub.load", "torch.os.system"),
    *("torch.fx.graph_module.reduce_graph_module", "fm_stages.training.FlowMatching.load_from_checkpoint"),
    *("builtins.open", "timm.create_model", "lightning.pytorch.Trainer", "torch.nn.Identity", "subprocess.Popen"),
]
"""Class paths; of the allowed ones none fits where it is put, or none does harm."""


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join(['*' + before] * 9)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines that stand for 10^9 values."""


def deep(num: int = 150) -> list:
    tree: list = []
    for _ in range(num):
        tree = [tree]
    return tree


STRANGE: list[Callable[[], Any]] = [
    *(lambda x=x: x for x in (None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 1e-320, 10**9, 10**15, 10**30, -(10**30))),
    *(lambda x=x: x for x in (float("nan"), float("inf"), float("-inf"), "", "x", "nan", "1e999", "null")),
    *(
        lambda x=x: x
        for x in ("../../../etc/passwd", "/etc/passwd", "a/b", "..", "C:\\x", "a\0b", "\ud7ff\u202e", "x" * 5000)
    ),
    *(lambda x=x: x for x in ATTACKS),
    *(list, dict, lambda: [1], lambda: {"a": 1}, lambda: {"class_path": random.choice(ATTACKS)}, deep),
]
"""Values that do not belong where they are put."""


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested values: what holds it, and its key."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from nodes(tree[key])


def mutate_tree(tree: Any, rng: random.Random, weight: Callable[[Any, Any], float] = lambda held, key: 1.0) -> Any:
    """A copy with one or two places changed: another value, gone, doubled, of another name."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2))):
        places = list(nodes(tree))
        if not places:
            return rng.choice(STRANGE)()
        held, key = rng.choices(places, [weight(held, key) for held, key in places])[0]
        match rng.randrange(10):
            case 0:
                del held[key]
            case 1 if isinstance(held, dict):
                held[f"{key}_{rng.randrange(9)}"] = held.pop(key)
            case 2 if isinstance(held, dict):
                held[rng.choice(("", "x", "__class__", "class_path", "\u202e", "0"))] = rng.choice(STRANGE)()
            case 3 if isinstance(held, list):
                held.extend(held[:1] * rng.choice((1, 100)))
            case _:
                held[key] = _changed(held[key], rng)
    return tree


def _changed(value: Any, rng: random.Random) -> Any:
    """Another value, of another kind or of the same."""
    if isinstance(value, torch.Tensor):
        kinds = (
            lambda x: x.flatten(), lambda x: x[None], lambda x: x[:0] if x.ndim else x[None][:0], lambda x: x.double(),
            lambda x: x.to(torch.int8), lambda x: x.float() * float("nan"), lambda x: x.reshape(-1)[:1].expand(10**6),
            lambda x: x.to("meta"), lambda x: x.bool(), lambda x: torch.zeros(3, 3), lambda x: x.to(torch.complex64),
        )  # fmt: skip
        return rng.choice(kinds)(value) if rng.random() < 0.7 else rng.choice(STRANGE)()
    if type(value) in (int, float) and rng.random() < 0.4:
        return rng.choice((-value, value + 1, value * 10**9, str(value), value / 3, value * 1000))
    return rng.choice(STRANGE)()


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, filled, doubled, or with another length in its header."""
    data = bytearray(content)
    size = len(data)
    at = rng.randrange(size) if size else 0
    match rng.randrange(10):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 8, 200))):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        case 2:
            del data[at:]
        case 3:
            data[at:at] = rng.randbytes(rng.choice((1, 7, 300)))
        case 4:
            data[at : at + rng.choice((4, 64, 4096))] = bytes(min(rng.choice((4, 64, 4096)), size - at))
        case 5:  # where formats say how long they are
            number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 10**9, size, size * 3))
            data[: min(8, size)] = struct.pack("<Q", number)[: min(8, size)]
        case 6:  # and where a zip says it
            place = max(0, size - rng.randrange(1, 60))
            data[place : place + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, size * 9)))
        case 7:
            data[at:at] = data[at : at + 500]
        case 8:
            data = bytearray(
                rng.choice((b"", b"\n", b"{}", b"[]", b"PK\x03\x04", b"\x80\x02.", b"\xff" * 40, b"GIF89a"))
            )
        case _:
            data[: min(size, 16)] = rng.randbytes(min(size, 16))
    return bytes(data)


def file_bytes(file: Path, rng: random.Random) -> None:
    file.write_bytes(mutate_bytes(file.read_bytes(), rng))


def file_json(file: Path, rng: random.Random) -> None:
    tree = json.loads(file.read_text())
    text = json.dumps(mutate_tree(tree, rng))
    if rng.random() < 0.1:  # deeper than Python's own reader goes
        text = "[" * 100_000 + text + "]" * 100_000
    file.write_text(text)


def yaml_text(text: str, rng: random.Random) -> str:
    """YAML with another structure, or with what only YAML has."""
    if rng.random() < 0.12:
        return rng.choice(
            (
                "a: &a [x, x, x, x, x, x, x, x, x]\n"
                + "".join(
                    f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
                ),
                "a: &a [*a]\n",
                "data: !!python/object/apply:os.system ['touch pwned']\n",
                "[" * 5000 + "]" * 5000,
                "model: {network: " * 200 + "1" + "}" * 200,
                "data: 2024-99-99\n",
                "? {a: b}\n: 1\n",
                "seed_everything: " + "9" * 6000,
                "<<: [1]\n",
            )
        )
    return yaml.safe_dump(mutate_tree(yaml.safe_load(text), rng), sort_keys=False)


def file_yaml(file: Path, rng: random.Random) -> None:
    file.write_text(yaml_text(file.read_text(), rng))


def file_tensors(file: Path, rng: random.Random) -> None:
    """A checkpoint of torch: its tree, or the configuration in it."""
    tree = torch.load(file, weights_only=True)
    text = next((key for key in ("fm_stages_config",) if isinstance(tree, dict) and key in tree), None)
    if text and rng.random() < 0.6:
        tree[text] = yaml_text(tree[text], rng)
    else:  # the optimizer's states are many
        tree = mutate_tree(tree, rng)
    try:
        torch.save(tree, file)
    except Exception:  # some strange values cannot be written
        torch.save(mutate_tree({"state_dict": {}}, rng), file)


def file_safetensors(file: Path, rng: random.Random) -> None:
    """Its header, with the length that follows or with another one."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    changed = json.dumps(mutate_tree(header, rng)).encode()
    length = len(changed) if rng.random() < 0.8 else rng.choice((0, 2**63, len(changed) * 2, 10**9))
    file.write_bytes(struct.pack("<Q", length) + changed + content[8 + size :])


def npy_header(content: bytes, rng: random.Random) -> bytes:
    """A ``.npy`` of another shape, dtype or order than it holds."""
    array = np.load(io.BytesIO(content))
    shape = rng.choice(
        ((10**12,), (10**9, 10**9), (), (0, *array.shape[1:]), (-1, 3), (*array.shape, 1), array.shape[::-1])
    )
    kind = rng.choice((array.dtype.str, "<f8", "|O", "<U9", "<c16", "|b1", ">f4", "<i8"))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": kind, "fortran_order": rng.random() < 0.3, "shape": tuple(shape)}
    )
    values = array.tobytes()
    return header.getvalue() + values


def file_npy(file: Path, rng: random.Random) -> None:
    file.write_bytes(npy_header(file.read_bytes(), rng))


def file_zip(file: Path, rng: random.Random) -> None:
    """A zip with a member changed, compressed, gone, doubled or called otherwise."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    match rng.randrange(6):
        case 0:
            del members[name]
        case 1:
            members[rng.choice(("../x.npy", "/x.npy", "x", "arr_9.npy"))] = members.pop(name)
        case 2:
            members[name] = mutate_bytes(members[name], rng)
        case 3:
            members[name] = bytes(2 * 10**7)
            kind = zipfile.ZIP_DEFLATED
        case _:
            members[name] = (
                npy_header(members[name], rng) if name.endswith(".npy") else mutate_bytes(members[name], rng)
            )
    with zipfile.ZipFile(file, "w", kind) as archive:
        for each, content in members.items():
            archive.writestr(each, content)


def file_png(file: Path, rng: random.Random) -> None:
    """A PNG that claims other sides; its checksum follows."""
    import zlib

    content = bytearray(file.read_bytes())
    sides = struct.pack(">II", *rng.choice(((100_000, 100_000), (0, 8), (2**31 - 1, 1), (9000, 9000), (8, 7))))
    content[16:24] = sides
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    file.write_bytes(bytes(content))


def file_lines(file: Path, rng: random.Random) -> None:
    """A list of names with one that leads elsewhere, is gone, or there twice."""
    lines = file.read_text().splitlines()
    at = rng.randrange(len(lines))
    change = rng.choice(
        (["../../etc/passwd"], ["/etc/passwd"], [], [lines[at]] * 2, ["a\0b"], ["x" * 5000], ["\u202e"])
    )
    lines[at : at + 1] = change
    file.write_text("\n".join(lines) + "\n")
