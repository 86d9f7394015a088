"""Training and held-out regular loss over the steps of a run: where the two part, a network learns by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fm_stages.plots.style import INK, RUST

COLOURS = {"train": INK, "held_out": RUST}
NAMES = {"train": "training images", "held_out": "held-out images"}


def regular_by_stage(
    steps: Sequence[int],
    stages: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    best: Mapping[str, int],
    title: str = "",
) -> Figure:
    """A panel for each stage: the loss of training and held-out images, of raw and averaged weights.

    Args:
        steps: (S,) of the validations.
        stages: by the stage's name, and there by train, held_out, train_ema, held_out_ema: means and standard errors,
            each (S,), NaN where there is none; what is not there is not drawn.
        best: place in ``steps`` of the lowest held-out loss of the last stage, by ``""`` and ``_ema``.
        title: of the figure.

    Returns:
        The figure; `save` writes it.
    """
    figure = Figure(figsize=(6 * len(stages), 4.8), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (stage, series) in zip(panels, stages.items(), strict=True):
        for name, (mean, sem) in series.items():
            _line(axes, steps, name, mean, sem)
        for suffix, place in best.items():
            if f"held_out{suffix}" in series:
                loss = series[f"held_out{suffix}"][0][place]
                label = (
                    f"best held-out{' EMA' if suffix else ''}: step {steps[place]}"
                    if stage == list(stages)[-1]
                    else None
                )
                axes.plot(steps[place], loss, "*", ms=13, color=COLOURS["held_out"], mec="black", mew=0.6, zorder=5,
                          alpha=0.6 if not suffix else 1.0, label=label)  # fmt: skip
        axes.set_title(stage)
        axes.set_xlabel("step")
        axes.set_ylabel("regular loss (mean square per value, uniform t)")
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def _line(axes: Axes, steps: Sequence[int], name: str, mean: Sequence[float], sem: Sequence[float]) -> None:
    """A series with two standard errors to either side; averaged weights are drawn whole, raw ones dashed."""
    split, ema = name.removesuffix("_ema"), name.endswith("_ema")
    y, error = np.asarray(mean, dtype=float), np.asarray(sem, dtype=float)
    label = f"{NAMES[split]}, {'EMA' if ema else 'raw'} weights"
    width, style = (1.8, "-") if ema else (1.0, "--")
    axes.plot(steps, y, color=COLOURS[split], marker="o", ms=3, lw=width, ls=style, label=label)
    axes.fill_between(steps, y - 2 * error, y + 2 * error, color=COLOURS[split], alpha=0.12, lw=0)
