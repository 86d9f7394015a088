"""Networks that draw one after the other, each an expert for its stage of t.

Source: arXiv 2512.02826, Table 1, where a small network before the boundary and a large one after it come near to the
large one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fm_stages.flow.guidance import Guidance
from fm_stages.flow.solvers import Velocity

Networks = nn.Module | Sequence[tuple[float, nn.Module]]
"""``network(x, t, y) -> velocity``; or several, each with the time from which on it draws, the first from 0."""


def experts_of(networks: Networks) -> list[tuple[float, nn.Module]]:
    """The networks with the times from which on they draw; one alone draws from 0 on.

    Raises:
        ValueError: if the times do not increase from 0.
    """
    experts = [(0.0, networks)] if isinstance(networks, nn.Module) else list(networks)
    starts = [start for start, _ in experts]
    if starts[:1] != [0] or not all(a < b < 1 for a, b in pairwise(starts)):
        raise ValueError(f"experts draw from increasing times on, the first from 0 and all before 1; got {starts}")
    return experts


def fields_of(networks: Networks, guidance: Guidance, labels: Tensor) -> list[tuple[float, Velocity]]:
    """Their velocity as `integrate` takes it.

    Args:
        networks: one, or several in the order of their times.
        guidance: of each of them, within its interval.
        labels: (B,) int64, -1 = unconditional.
    """
    fields: list[tuple[float, Velocity]] = []
    for start, network in experts_of(networks):
        own = guidance.fields(network, labels)
        held = [velocity for begin, velocity in own if begin <= start][-1]  # the first begins at 0
        # a stage ends where the next begins, with whatever jumps it had left
        fields = [field for field in fields if field[0] < start]
        fields += [(start, held), *(field for field in own if field[0] > start)]
    return fields
