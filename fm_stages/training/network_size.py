"""How large the network of a configuration is, known before it is built: some digits of a width can ask for all memory.

It is built without memory first, on torch's meta device, and given up as soon as it is too large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from fm_stages.data import available_memory_bytes
from fm_stages.training.class_paths import PACKAGES, instantiate

NUM_WEIGHTS = 10_000
"""Tensors of weights that a network may have: a depth of 10^9 is too much, however narrow. DiT-XL has some 400."""


class TooLargeError(ValueError):
    """A network takes more than there is."""


def check_network(section: Any, weights: Mapping[str, Tensor] | None = None) -> None:
    """Refuse a network before memory is taken for it.

    Args:
        section: ``model.network`` of a parsed configuration, or of one that is plain data: class path and arguments.
        weights: that it is to hold, by its own names; None: it starts afresh, and has to fit into memory.

    Raises:
        ValueError: with the bytes that it takes, or with the first weight that differs.
    """
    path = section if isinstance(section, str) else section.get("class_path") if section else None
    if not isinstance(path, str) or path.partition(".")[0] not in PACKAGES:
        return  # a class of one's own may do anything as it is built, and is trusted
    held = None if weights is None else sum(x.numel() * x.element_size() for x in weights.values())
    limit = available_memory_bytes() if held is None else 8 * held + 2**26
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    try:
        with _at_most(limit, path, held), torch.device("meta"), torch.random.fork_rng(devices=[]):
            network = instantiate(parser, parser.parse_object({"network": section})).network
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # the parser raises errors of its own from it
            if isinstance(cause, TooLargeError):
                raise cause from None
            if "overflow" in str(cause):  # torch does not count so far
                raise TooLargeError(f"{path} of these sizes takes more than 2^63 bytes") from error
            cause = cause.__cause__
        return  # it needs values, or its arguments are wrong: to be seen where it is built
    if weights is not None:
        own = network.state_dict()
        wrong = [k for k in {**weights, **own} if k not in own or k not in weights or own[k].shape != weights[k].shape]
        if wrong:
            there, here = (tuple(x[wrong[0]].shape) if wrong[0] in x else "nothing" for x in (weights, own))
            raise ValueError(
                f"its weights are not those of the {path} that it describes: {len(wrong)} differ, first {wrong[0]}, "
                f"{there} in the file and {here} in the network"
            )


@contextmanager
def _at_most(limit: int, name: str, held: int | None) -> Iterator[None]:
    """Let modules register weights of so many bytes."""
    taken = num = 0

    def count(module: nn.Module, weight_name: str, weight: Tensor | None) -> None:
        nonlocal taken, num
        if weight is None:
            return
        taken, num = taken + weight.numel() * weight.element_size(), num + 1
        if num > NUM_WEIGHTS:
            raise TooLargeError(f"{name} of these sizes has more than {NUM_WEIGHTS} tensors of weights")
        if taken > limit:
            there = f"{limit / 2**30:.1f} GiB of memory are available" if held is None else f"the file holds {held}"
            raise TooLargeError(f"{name} of these sizes takes {taken} bytes or more, and {there}")

    handles = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
