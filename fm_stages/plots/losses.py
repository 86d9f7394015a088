"""What the loss is made of, by t, and the gap beside its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fm_stages.plots.style import BLUE, GREEN, INK, PALE, RUST, over_t

COLOURS = {"gap": RUST, "floor": PALE, "regular": INK, "held_out": BLUE, "wiener": GREEN}

Series = Mapping[str, Sequence[float]]
"""Numbers in each bin (K), by the name of the quantity."""


def gap_by_t(
    edges: Sequence[float],
    mean: Series,
    sem: Series,
    boundary: float,
    held_out: Series | None = None,
    title: str = "",
) -> Figure:
    """Left: what the regular loss is made of, by t. Right: the gap beside the references that give it a meaning.

    Args:
        edges: (K + 1) bin edges.
        mean: by name (regular, gap, floor, zero, wiener) the mean in each bin (K).
        sem: standard errors of the same.
        boundary: between the stages.
        held_out: by name (regular, gap) the means on held-out images (K); the gap is drawn before the boundary.
        title: of the figure.

    Returns:
        The figure; `save` writes it.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    centre = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    _loss_parts(left, centre, mean, held_out)
    _gap_and_references(right, centre, mean, sem, boundary, held_out)
    for axes in (left, right):
        over_t(axes, boundary)
    figure.suptitle(title)
    return figure


def _loss_parts(axes: Axes, t: list[float], mean: Series, held_out: Series | None) -> None:
    axes.stackplot(
        t, mean["floor"], mean["gap"], colors=[COLOURS["floor"], COLOURS["gap"]], alpha=0.85,
        labels=["floor: no model can remove it", "gap: left to win"],
    )  # fmt: skip
    axes.plot(t, mean["regular"], color=COLOURS["regular"], marker="o", ms=3, label="regular loss (training)")
    top = max((v for v in mean["regular"] if v == v), default=1.0)
    if held_out:
        axes.plot(t, held_out["regular"], color=COLOURS["held_out"], ls="--", marker="s", ms=3,
                  label="regular loss (held-out)")  # fmt: skip
        top = max([top, *(v for v in held_out["regular"] if v == v)])
    axes.set_ylim(0, 1.35 * top)
    axes.set_ylabel("mean squared error per value")
    axes.set_title("what the loss is made of", pad=16)
    axes.legend(loc="upper left", fontsize=8)


def _gap_and_references(
    axes: Axes, t: list[float], mean: Series, sem: Series, boundary: float, held_out: Series | None
) -> None:
    axes.plot(t, mean["zero"], color="0.6", ls=":", label="a network that predicts 0")
    axes.plot(t, mean["wiener"], color=COLOURS["wiener"], ls="--", label="the best linear model (Wiener)")
    axes.errorbar(t, mean["gap"], yerr=sem["gap"], color=COLOURS["gap"], marker="o", ms=3, lw=1.6,
                  capsize=2, label="this model")  # fmt: skip
    if held_out:
        early = [(x, y) for x, y in zip(t, held_out["gap"], strict=True) if x <= boundary]
        axes.plot(*zip(*early, strict=True) if early else ([], []), color=COLOURS["held_out"], ls="--", marker="s",
                  ms=3, label="this model, held-out (navigation only)")  # fmt: skip
        axes.plot(t, held_out["regular"], color=COLOURS["held_out"], lw=0.8, alpha=0.7,
                  label="held-out regular loss")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("distance to the oracle, squared, per value")
    axes.set_title("gap to the oracle velocity (the oracle itself is 0)", pad=16)
    axes.legend(loc="best", fontsize=8)
