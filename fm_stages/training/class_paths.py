"""Which classes a configuration may name: it may come from a stranger, and to import a module is to run it.

A configuration is a YAML file, the words of a command line, or the text that a checkpoint carries. What it names has to
be a class of the type that stands at that place, out of `PACKAGES`, or of a package that whoever started the command
has said to trust: ``--allow-import my_package``, or `allow_imports` in a program.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

PACKAGES = ("fm_stages", "torch", "lightning", "torchvision", "timm", "diffusers", "torchmetrics", "wandb")
"""What may be named without a word."""

REFUSED = (
    # source, pickles and libraries that run as they are read
    *("torch.fx", "torch.hub", "torch.jit", "torch.load", "torch.package", "torch.export", "torch.onnx"),
    *("torch.classes", "torch.ops", "torch.library", "torch.serialization", "torch.compiler", "torch.compile"),
    *("torch._C", "torch._classes", "torch._dynamo", "torch._export", "torch._functorch", "torch._inductor"),
    *("torch._library", "torch._lowrank", "torch._ops", "torch._higher_order_ops", "torch._prims", "torch._refs"),
    *("torch.utils", "torch.testing", "torch.contrib", "torch.cuda.jiterator", "torch.monitor", "torch.save"),
    # processes and servers
    *("torch.multiprocessing", "torch.distributed.elastic", "torch.distributed.launch", "torch.distributed.launcher"),
    *("torch.distributed.run", "torch.distributed.rpc", "lightning.pytorch.serve", "lightning.pytorch.cli"),
    *("lightning.fabric.cli", "lightning.pytorch.demos", "wandb.cli", "wandb.apis", "wandb.sdk.launch"),
)
"""Parts of them that no run has a use for, and through which a value in a configuration becomes code."""

ALLOWED_BY = "FM_STAGES_ALLOW_IMPORT"
"""Environment variable with further packages, separated by commas: processes that a command starts inherit it."""

_DENIED = re.compile(
    r"Importing '([\w.]+)' is not allowed, denied by .*? set_parsing_settings to allow it\.", re.DOTALL
)

# `Any` is no type that a class could be held against: there a mapping stays a mapping
set_parsing_settings(
    instantiate_subclass_spec_in_any=False,
    import_path_denylist=["*", *REFUSED],
    import_path_allowlist=[*PACKAGES, "torch._C._nn"],  # where torch.nn.functional.gelu and others are defined
)


def allow_imports(*packages: str) -> None:
    """Trust further packages, or modules, in this process.

    Raises:
        ValueError: if one is not the name of a package.
    """
    for package in packages:
        if package == "jsonargparse" or not all(part.isidentifier() for part in package.split(".")):
            raise ValueError(f"--allow-import {package!r}: name a package or a module, as my_package")
        set_parsing_settings(import_path_allowlist=[package])


allow_imports(*filter(None, os.environ.get(ALLOWED_BY, "").split(",")))


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """``parser.instantiate``, of classes alone.

    The parser would take a function as well, by the type that it says to return, and call it: among those of torch are
    some that compile their argument.

    Raises:
        ValueError: if a class path names something else.
    """
    check_classes(config)
    return parser.instantiate(config)


def check_classes(config: Namespace) -> None:
    """Refuse class paths of what is no class, unless its package is one that was said to be trusted.

    Raises:
        ValueError: with the first of them.
    """
    for key, path in _class_paths(config.as_dict()):
        if path.partition(".")[0] in PACKAGES and not isinstance(_locate(path), type):
            raise ValueError(f"{key}: {path} is no class, and class_path takes nothing else")


def explain(message: str) -> str:
    """The parser's message on an import that is denied, in words for whoever started a command."""

    def said(match: re.Match[str]) -> str:
        path = match[1]
        if path.partition(".")[0] in (*PACKAGES, *sys.stdlib_module_names, "jsonargparse"):
            return f"{path} may not be named in a configuration, which could run any code through it"
        package = path.partition(".")[0]
        return (
            f"{path} is not imported: it is outside {', '.join(PACKAGES)}, and to import it is to run its code; if you "
            f"trust that, add --allow-import {package}"
        )

    found = _DENIED.search(message)
    if found is None:
        return message
    before = message[: found.start()].partition("Problem with given class_path")[0]
    place = re.match(r"(.*?)Parser key \"([\w.]+)\":", before, re.DOTALL)  # what follows are other ways to read it
    return (f"{place[1]}{place[2]}: " if place else before) + said(found)


def _class_paths(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every class path in nested values, with the key that it stands at."""
    if isinstance(tree, dict):
        if isinstance(tree.get("class_path"), str):
            yield key, tree["class_path"]
        for name, value in tree.items():
            yield from _class_paths(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _class_paths(value, key)


def _locate(path: str) -> Any:
    """What a path names; its module has been imported by the parser."""
    parts = path.split(".")
    num = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in sys.modules), 0)
    found = sys.modules.get(".".join(parts[:num]))
    for part in parts[num:]:
        found = getattr(found, part, None)
    return found
