"""Where every random number comes from: generators keyed by what a draw is *for*, never by the rank that makes it.

A key names the purpose and the counters, e.g. ``("noise", seed, step)``. Draws for a batch are made in blocks of
``BLOCK`` consecutive positions of the *global* batch, so a rank makes only the blocks that it needs, and one process or
eight produce the same numbers.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 32
"""Positions that share one generator: few enough that a small local batch wastes little, many enough to be cheap."""


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on ``key`` alone (and on the kind of device: CPU and CUDA streams differ)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


def _by_block(
    draw: Callable[[torch.Generator], Tensor], positions: Tensor, key: tuple[int | str, ...], device: torch.device
) -> Tensor:
    """Rows ``positions`` (B,) of an endless table whose block b is ``draw(generator of (*key, b))``."""
    if not len(positions):  # what a rank without samples of its own has to draw
        return draw(keyed_generator(*key, 0, device=device))[:0]
    blocks, inverse = torch.unique(positions.cpu() // BLOCK, return_inverse=True)
    table = torch.cat([draw(keyed_generator(*key, b, device=device)) for b in blocks.tolist()])
    return table[(inverse * BLOCK + positions.cpu() % BLOCK).to(device)]


def keyed_normal(
    key: tuple[int | str, ...], positions: Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise, one row for each of ``positions``.

    Args:
        key: what the noise is for, e.g. ``("noise", seed, step)``.
        positions: (B,) int64, places in the global batch (or indices into a data set).
        shape: shape of one row.
        device: where the numbers are drawn.

    Returns:
        (B, *shape) float32.
    """
    device = torch.device(device)
    return _by_block(lambda g: torch.randn(BLOCK, *shape, generator=g, device=device), positions, key, device)


def keyed_uniform(key: tuple[int | str, ...], positions: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in [0, 1), one for each of ``positions`` (B,): (B,) float32."""
    device = torch.device(device)
    return _by_block(lambda g: torch.rand(BLOCK, generator=g, device=device), positions, key, device)


def stratified_uniform(key: tuple[int | str, ...], positions: Tensor, num_strata: int) -> Tensor:
    """One uniform number in each of ``num_strata`` equal strata, dealt to the positions by a keyed permutation.

    The marginal of each number is uniform in [0, 1); together they cover the interval evenly, which takes most of
    the variance over t out of a batch's mean loss.

    Args:
        key: what the numbers are for.
        positions: (B,) int64 in [0, num_strata): places in the global batch.
        num_strata: size of the global batch.

    Returns:
        (B,) float32 on the CPU.
    """
    generator = keyed_generator("strata", *key)
    strata = torch.randperm(num_strata, generator=generator)
    jitter = torch.rand(num_strata, generator=generator, dtype=torch.float64)
    positions = positions.cpu()
    u = (strata[positions] + jitter[positions]) / num_strata
    return u.float().clamp(max=1 - 2**-24)  # rounding to float32 may reach 1, which no draw should
