"""What images cost: evaluations of each network, floating point operations and seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fm_stages.flow import count_evaluations
from fm_stages.networks import forward_flops

COUNTED = (
    "two for each product summed up in the networks' matrix products, convolutions and attention; not counted: norms, "
    "activations and other element-wise operations, the solver's sums, noise, files"
)
"""Of floating point operations."""


class Meter:
    """Counts what is asked of networks.

    Attributes:
        networks: that draw.
        evaluations: (n) of each, times the images that were drawn with them.
        rows: (n) of the batches that they were given; a guided image is two.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = networks
        self.evaluations, self.rows = [0] * len(networks), [0] * len(networks)

    @contextmanager
    def counting(self, num_images: int) -> Iterator[None]:
        """Count while so many images are drawn."""
        with ExitStack() as stack:
            sizes = [stack.enter_context(count_evaluations(network)) for network in self.networks]
            yield
        for i, own in enumerate(sizes):
            self.evaluations[i] += len(own) * num_images
            self.rows[i] += sum(own)


def costs_per_image(
    networks: Sequence[nn.Module], shape: tuple[int, ...], parts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Costs of an image, over all ranks.

    Args:
        networks: that drew.
        shape: (C, H, W) of an image.
        parts: of each rank: ``images``, ``seconds``, and of a `Meter` ``evaluations`` and ``rows``.

    Returns:
        ``seconds_per_image`` of one device, ``evaluations_per_image``, ``flops_per_image`` (None where they cannot be
        counted), and under ``networks`` the last two and ``rows_per_image`` of each.
    """
    images = sum(part["images"] for part in parts)
    one = torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    own = []
    for i, network in enumerate(networks):
        rows, flops = sum(part["rows"][i] for part in parts) / images, forward_flops(network, *one)
        own.append(
            {
                "evaluations_per_image": sum(part["evaluations"][i] for part in parts) / images,
                "rows_per_image": rows,
                "flops_per_image": None if flops is None else rows * flops,
            }
        )
    flops_of = [each["flops_per_image"] for each in own]
    return {
        "seconds_per_image": sum(part["seconds"] for part in parts) / images,
        "evaluations_per_image": sum(each["evaluations_per_image"] for each in own),
        "flops_per_image": None if None in flops_of else sum(flops_of),
        "networks": own,
    }


def describe_costs(costs: dict[str, Any], split: float | None) -> str:
    """The same in a line."""
    own = [f"{each['evaluations_per_image']:.5g}" for each in costs["networks"]]
    parts = f" ({own[0]} before t = {split:.3g}, {own[1]} after it)" if len(own) == 2 else ""
    flops = costs["flops_per_image"]
    arithmetic = "an unknown number of FLOP" if flops is None else f"{flops / 1e9:.4g} GFLOP"
    return (
        f"{costs['evaluations_per_image']:.5g} network evaluations each{parts}, {arithmetic} and "
        f"{costs['seconds_per_image']:.3g} s per image"
    )
