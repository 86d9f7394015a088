"""The report of a comparison: all numbers as JSON, the two tables that matter as Markdown, and two figures."""

from __future__ import annotations

import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fm_stages import plots
from fm_stages.studies.compare.comparison import COLUMNS, Comparison
from fm_stages.studies.compare.measure import METRICS, NUM_SUBSETS, PROGRESS
from fm_stages.studies.compare.progress import cost_of_step, equal_time, progress_curves
from fm_stages.studies.compare.statistics import mean_of, paired
from fm_stages.studies.text_files import write_json, write_text


def write_report(comparison: Comparison, out: Path) -> None:
    """Write ``report.md``, ``report.json`` and the figures."""
    write_json(out / "report.json", _numbers(comparison))
    figures = any(comparison.results.values())
    if figures:
        curves, boundary = comparison.gap_curves(), comparison.profile.boundary
        gaps = plots.gap_of_arms(comparison.edges(), curves, comparison.reference, boundary, _title(comparison))
        plots.save(gaps, out / "gap_by_t.png")
        forest = {arm: {m: asdict(p) for m, p in pairs.items()} for arm, pairs in comparison.differences().items()}
        title = (
            f"{comparison.name}: difference to {comparison.reference}, mean over seeds and 95 % interval "
            "(green: better, red: worse, grey: the interval holds 0; open: one seed, no interval)"
        )
        plots.save(plots.paired_differences(forest, COLUMNS, title), out / "differences.png")
        names = {name: METRICS[name] for name in ("gap_navigation", "gap_refinement", "held_out_regular")}
        title = f"{comparison.name}: on the way, mean over seeds"
        plots.save(plots.progress_of_arms(progress_curves(comparison.results), names, title), out / "progress.png")
    write_text(out / "report.md", report_text(comparison))


def report_text(c: Comparison) -> str:
    """The report in Markdown."""
    kind = "averaged weights (EMA)" if c.weights == "ema" else "raw weights"
    finished = sum(map(len, c.results.values()))
    lines = [
        f"# {c.name}: {len(c.arms)} arms, {len(c.seeds)} seed{'s' * (len(c.seeds) != 1)}",
        "",
        f"Base: {', '.join(f'`{file}`' for file in c.base)}. Reference: `{c.reference}`. Finished: {finished} of "
        f"{len(c.arms) * len(c.seeds)} runs. All arms of a seed start from the same weights and are given the same "
        "images, noise and base random numbers; a target that draws rows of its own puts those in the images' place.",
        "",
        *_missing(c.missing),
        *(
            f"- `{arm}` starts from **other weights** than the reference: its network differs."
            for arm in c.other_weights
        ),
        *(
            f"- `{arm}` took **{steps} steps**, the reference {c.steps(c.reference)}: compare at equal time."
            for arm in c.arms
            if (steps := c.steps(arm)) and c.steps(c.reference) and steps != c.steps(c.reference)
        ),
    ]
    lines += [""] if lines[-1] else []
    if finished:
        lines += [f"## Means over seeds, {kind}", "", *_table_of_arms(c), "", *_explanations(c), ""]
        lines += ["## Paired differences", "", *_table_of_differences(c), ""]
        lines += ["![Gap over t](gap_by_t.png)", "", "![Paired differences](differences.png)", ""]
        lines += ["## At equal time", "", *_table_at_equal_time(c), "", "![On the way](progress.png)", ""]
    lines += [
        "## How it was made",
        "",
        f"    fm-stages compare {shlex.join(c.options)}",
        "",
        f"Seeds {', '.join(map(str, c.seeds))}; {machine()}. Numbers of raw weights, of single runs, and curves: "
        "`report.json`.",
    ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """This machine in words."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    processor = platform.processor() or platform.machine()
    cpu = f"{os.cpu_count()} CPU cores ({processor}, torch threads: {torch.get_num_threads()})"
    return f"{cpu}, {kind}, {platform.system()}, torch {torch.__version__}"


def _missing(runs: Mapping[str, str]) -> list[str]:
    """A line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for run, reason in runs.items():
        by_reason.setdefault(reason, []).append(run)
    return [f"- **Missing**: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _table_of_arms(c: Comparison) -> list[str]:
    head = ["arm", "seeds", *COLUMNS.values()]
    rows = []
    for arm in c.arms:
        means = [mean_of(list(c.values(arm, name).values())) for name in COLUMNS]
        rows.append([arm, str(len(c.results.get(arm, {}))), *(_number(x) for x in means)])
    return _table(head, rows)


def _table_of_differences(c: Comparison) -> list[str]:
    """Rows of arm and metric, a star where the interval excludes 0, and what the table can and cannot say."""
    rows = []
    for arm, pairs in c.differences().items():
        for metric, pair in pairs.items():
            star = " *" if pair.shown else ""
            interval = f"{_signed(pair.low)} to {_signed(pair.high)}{star}" if pair.num_seeds > 1 else "none"
            relative = "" if math.isnan(pair.relative) else f"{100 * pair.relative:+.1f} %"
            smallest = "" if pair.smallest is None else _number(pair.smallest)
            rows.append([arm, COLUMNS[metric], _signed(pair.mean), relative, interval, smallest, str(pair.num_seeds)])
    if not rows:
        return ["No arm has a seed in common with the reference yet."]
    head = [f"arm, against {c.reference}", "number", "difference", "relative", "95 % interval", "could show", "seeds"]
    words = [
        "Negative is better than the reference. A star: the 95 % confidence interval (Student's t over seeds, paired) "
        "excludes 0. Without correction for the number of rows: of 20 without a true difference one has a star.",
        "*could show*: the smallest true difference that this many seeds would have shown with probability 80 %, at "
        "the spread seen here. A row without a star rules out nothing smaller.",
    ]
    if len(c.seeds) == 1:
        words = ["One seed has no spread: **no interval and no test**; a difference may be chance. Add seeds."]
    return [*_table(head, rows), "", *words]


def _explanations(c: Comparison) -> list[str]:
    floor = mean_of([run["weights"][c.weights]["floor"] for runs in c.results.values() for run in runs.values()])
    num = c.settings.num_samples
    return [
        f"Less is better. Per value, over uniform t, on one probe for all runs (up to {c.settings.num_probe} training "
        f"and as many held-out images). Navigation is t < {c.profile.boundary:.3f}; the floor of the regular loss on "
        f"the training images is {floor:.4f}. In refinement a smaller gap on training images is better only as far as "
        "the held-out regular loss follows: the rest is memorization.",
        "",
        "*Pixel MMD (not FID)*: squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 on pixels, between "
        f"up to {num} samples ({c.settings.solver_steps} Euler steps, the same noise for all) and as many held-out "
        f"images of the same classes; unbiased, so 0 is perfect. Standard error of one run over {NUM_SUBSETS} parts: "
        f"{_number(_mmd_error(c))}. *Training time* counts monitoring, validation and sample grids, not start-up.",
    ]


def _mmd_error(c: Comparison) -> float:
    runs = [run["weights"][c.weights] for runs in c.results.values() for run in runs.values()]
    return mean_of([math.nan if run.get("pixel_mmd_sem") is None else run["pixel_mmd_sem"] for run in runs])


def _table_at_equal_time(c: Comparison) -> list[str]:
    """What each arm had reached when the fastest one was done, with stars as in the table of differences."""
    found = equal_time(c.results)
    if found is None or c.reference not in found.steps:
        return ["The reference has not finished yet."]
    costs = cost_of_step(c.results, c.reference)
    rows = []
    for arm in found.steps:
        cells = []
        for name, of_seed in found.values[arm].items():
            pair = None if arm == c.reference else paired(of_seed, found.values[c.reference][name])
            relative = "" if pair is None or math.isnan(pair.relative) else f" ({100 * pair.relative:+.1f} %"
            relative += ((" *" if pair is not None and pair.shown else "") + ")") if relative else ""
            cells.append(_number(mean_of(list(of_seed.values()))) + relative)
        cost, low, high = (f"{x:.2f}" for x in costs[arm])
        cost += f" ({low} - {high})" if low < high else ""
        rows.append([arm, cost, f"{found.steps[arm]:.0f}", *cells])
    words = (
        f"After {found.seconds:.0f} s of training, when the fastest arm was done. *Cost*: time per step over that of "
        f"`{c.reference}`, of the fastest run of each, for other work on a machine only adds (range over seeds: how "
        "quiet it was). Read off between measurements along the runs, linear in the logarithm of the step. In "
        "brackets: against the reference, a star as above."
    )
    return [*_table(["arm", "cost", "steps", *(METRICS[name] for name in PROGRESS)], rows), "", words]


def _numbers(c: Comparison) -> dict[str, Any]:
    kinds = ["raw", "ema"] if c.weights == "ema" else ["raw"]
    means = {
        weights: {arm: {m: mean_of(list(c.values(arm, m, weights).values())) for m in COLUMNS} for arm in c.arms}
        for weights in kinds
    }
    differences = {
        weights: {
            arm: {m: asdict(p) | {"relative": p.relative, "shown": p.shown} for m, p in pairs.items()}
            for arm, pairs in found.items()
        }
        for weights in kinds
        for found in [c.differences(weights)]
    }
    reached = equal_time(c.results)
    return {
        **{name: getattr(c, name) for name in ("name", "base", "arms", "reference", "seeds", "missing")},
        **{"other_weights": c.other_weights, "weights": c.weights, "probe": asdict(c.settings)},
        **{"boundary": c.profile.boundary, "command": f"fm-stages compare {shlex.join(c.options)}"},
        **{"machine": machine(), "means": means, "differences": differences, "runs": c.results},
        **({"gap_by_t": c.gap_curves(), "edges": c.edges()} if any(c.results.values()) else {}),
        **{"progress": progress_curves(c.results), "equal_time": None if reached is None else asdict(reached)},
    }


def _title(c: Comparison) -> str:
    band = ", bands are two standard errors over seeds" if len(c.seeds) > 1 else ""
    kind = "averaged weights" if c.weights == "ema" else "raw weights"
    return f"{c.name}: gap to the oracle velocity on training images,\n{kind}{band}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in body]


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.4g}" if abs(x) >= 100 else f"{x:#.3g}"


def _signed(x: float | None) -> str:
    return "" if x is None else ("+" if x >= 0 else "") + _number(x)
