"""Densities of t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from fm_stages.plots.style import over_t


def timestep_density(
    t: Sequence[float], densities: Mapping[str, Sequence[float]], boundary: float | None = None, title: str = ""
) -> Figure:
    """Densities that training draws t from, over uniform t, which is 1 everywhere.

    Args:
        t: (T) increasing times.
        densities: by name, at these times (T).
        boundary: between the stages, if it is known.
        title: of the figure.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.6", ls=":", lw=1, label="uniform")
    for name, density in densities.items():
        axes.plot(t, density, label=name)
    over_t(axes, boundary)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("density of training draws")
    axes.legend(fontsize=8)
    axes.set_title(title, pad=16, fontsize=10)
    return figure
