"""Networks built without memory, to see how large they are: some digits of a width can ask for all that there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

NUM_WEIGHTS = 10_000
"""Tensors of weights that a network may have: a depth of 10^9 is too much, however narrow. DiT-XL has some 400."""


class TooLargeError(ValueError):
    """A network takes more than there is."""


@contextmanager
def without_memory(limit: int, name: str, there: str) -> Iterator[None]:
    """Let networks be built on torch's meta device, where weights have shapes and no values, up to a size.

    Args:
        limit: most bytes of weights.
        name: of the network, for the error.
        there: what the limit follows from, for the error.

    Raises:
        TooLargeError: as soon as one is larger. What builds it may raise another error from it.
    """
    taken = num = 0

    def count(module: nn.Module, weight_name: str, weight: Tensor | None) -> None:
        nonlocal taken, num
        if weight is None:
            return
        taken, num = taken + weight.numel() * weight.element_size(), num + 1
        if num > NUM_WEIGHTS:
            raise TooLargeError(f"{name} of these sizes has more than {NUM_WEIGHTS} tensors of weights")
        if taken > limit:
            raise TooLargeError(f"{name} of these sizes takes {taken} bytes or more, and {there}")

    handles = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, TooLargeError):
                raise cause from None
            if "overflow" in str(cause):  # torch does not count so far
                raise TooLargeError(f"{name} of these sizes takes more than 2^63 bytes") from error
            cause = cause.__cause__
        raise
    finally:
        for handle in handles:
            handle.remove()
