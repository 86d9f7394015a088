"""The memorization report as text: a table that can be read without knowing the code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fm_stages.studies.memorization.index import MEMORIZER, IndexCurves
from fm_stages.studies.memorization.measure import MEMORIZED, Share, Summary

NAMES = {"samples": "samples", "memorizer": "memorizer", "wiener": "Wiener", "fresh": "fresh images"}

WIDTH, NUMBER = 44, 19


def table(
    summaries: Mapping[str, Summary],
    index: IndexCurves | None,
    sizes: Mapping[str, int | bool],
    notes: Sequence[str],
) -> str:
    """The report.

    Args:
        summaries: by kind, in the order of columns.
        index: the memorization index, or None.
        sizes: of the sets that were compared with.
        notes: sentences at the end.

    Returns:
        Lines.
    """
    each = f"{sizes['T']} training and {sizes['H']} held-out images"
    lines = [
        _line("", [NAMES.get(name, name) for name in summaries]),
        _line("images", [str(s.num) for s in summaries.values()]),
        _line(f"copies (nearest < {MEMORIZED:.2f} x second nearest)", [_share(s.copies) for s in summaries.values()]),
        _line("nearer to training, of equal sets", [_share(s.nearer_to_train) for s in summaries.values()]),
        _line("nearer to training, of all (unequal sets)", [_share(s.nearer_to_all) for s in summaries.values()]),
        _line("distance to nearest training image", [f"{s.nearest:.3f}" for s in summaries.values()]),
        _line("distance to nearest held-out image", [f"{s.held_out:.3f}" for s in summaries.values()]),
        _line("nearest / second nearest", [f"{s.ratio:.3f}" for s in summaries.values()]),
        _line("equal to another of the column", [_share(s.equal) for s in summaries.values()]),
        _line("equal, or nearly so", [_share(s.duplicates) for s in summaries.values()]),
        "",
        "Shares in % with 95 % intervals; distances are medians, root mean square per value, in units of the network.",
        f"Equal sets: {each}; 50 % where nothing is memorized.",
        f"Unequal sets: {sizes['training']} training images, the same held-out ones; all images are nearer to a larger "
        "set.",
        "Memorizer (the oracle's sampler) and Wiener (it knows mean and covariance only): what everything and nothing",
        "copied look like. Fresh images are real, and in no set.",
        f"Nearly equal: another image of the column is nearer than {MEMORIZED:.2f} of the distance to the nearest "
        "held-out image.",
    ]
    if index is not None:
        lines += ["", *_index(index)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _index(index: IndexCurves) -> list[str]:
    """The index by stage."""
    head = _line("memorization index r", [f"t < {index.boundary:.2f}", f"t > {index.boundary:.2f}"])
    lines = [head]
    for name, own in index.of.items():
        numbers = (own.navigation, own.navigation_sem), (own.refinement, own.refinement_sem)
        lines.append(_line(name, [f"{value:.3f} ± {sem:.3f}" for value, sem in numbers]))
    return [
        *lines,
        "",
        "0: knows no more of the training images than of held-out ones; 1: follows the oracle of T, training images "
        "only.",
        f"To be read beside the {MEMORIZER.split(' (')[0]}'s; ± standard error over "
        f"{index.num_queries} fresh images in each timestep bin.",
    ]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:{WIDTH}}" + "".join(f"{cell:>{NUMBER}}" for cell in cells)


def _share(share: Share) -> str:
    """In per cent, with its interval."""
    low, high = (round(100 * x, 1) for x in (share.low, share.high))
    return f"{100 * share.value:.1f} [{low:.3g}, {high:.3g}]"
