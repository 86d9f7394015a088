"""The report of ``fm-stages evaluate``: a table, what was measured how, and the same as JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fm_stages import plots
from fm_stages.studies.evaluate.features import FeatureSet
from fm_stages.studies.evaluate.files import UNKNOWN
from fm_stages.studies.evaluate.scores import Scores, balance, warnings_of
from fm_stages.studies.text_files import write_csv, write_json, write_text

ROWS = (
    ("fid", "FID", "lower is better; falls with the number of images"),
    ("kid", "KID", "lower is better; 0 for equal distributions, whatever the number; ± over subsets"),
    ("inception_score", "Inception score", "higher is better; 1 to the number of classes; ± over ten parts"),
    ("precision", "precision", "higher is better; share of images among the real ones"),
    ("recall", "recall", "higher is better; share of the real images that are reached"),
    ("mifid", "MIFID", "lower is better; FID to training images over this distance"),
    (
        "memorization_distance",
        "distance",
        "mean cosine distance of a training image to the nearest; above 0.1 it counts as 1",
    ),
)
"""Key, name and meaning of each number."""

STATED = (
    "checkpoint",
    "step",
    "weights",
    "weights_digest",
    "solver",
    "num_steps",
    "shift",
    "tolerance",
    "diffusion",
    "guidance_scale",
    "guidance_interval",
    "guidance_channels",
    "split",
    "labels",
    "seed",
    "precision",
)
"""What a report says of samples, ``unknown`` where their files do not tell."""

PACKAGES = ("fm-stages", "torch", "torchmetrics", "torch-fidelity", "timm")


def make_report(
    scores: Sequence[Scores],
    sets: tuple[FeatureSet, FeatureSet, FeatureSet],
    extractor: dict[str, Any],
    class_names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """The whole report as plain data.

    Args:
        scores: of the samples, and of real images.
        sets: samples, reference, and the other real images.
        extractor: what is said of it.
        class_names: of the data.
        seed: of the metrics' subsets.
    """
    samples, reference, other = sets
    of_samples, yardstick = scores
    found = samples.images.record
    return {
        "scores": of_samples.values,
        "yardstick": yardstick.values,
        "missing": {"scores": of_samples.missing, "yardstick": yardstick.missing},
        "samples": {
            **{name: place for name, place in found.items() if name in ("folder", "file")},
            "num": samples.num,
            "num_skipped": len(samples.skipped),
            "skipped": samples.skipped,
            **{name: found.get(name, UNKNOWN) for name in STATED},
        },
        "reference": {**reference.images.record, "num": reference.num},
        "other": {**other.images.record, "num": other.num},
        "features": {name: value for name, value in extractor.items() if name != "warning"},
        "metrics": {**of_samples.settings, "seed": seed, "yardstick_mifid_images": yardstick.settings["mifid_images"]},
        "classes": {
            "names": list(class_names),
            "samples": balance(samples.labels, len(class_names)),
            "reference": balance(reference.labels, len(class_names)),
        },
        "warnings": [
            *([extractor["warning"]] if "warning" in extractor else []),
            *warnings_of(*sets),
            *_unknown_labels(samples, len(class_names)),
        ],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _unknown_labels(samples: FeatureSet, num_classes: int) -> list[str]:
    unknown = samples.labels[samples.labels >= num_classes]
    if not len(unknown):
        return []
    return [f"{len(unknown)} samples have labels of no class of the data (up to {int(unknown.max())}): not counted."]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def table_of(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the numbers, as text."""
    columns = ["", "samples", "real images", "meaning"]
    rows = []
    for key, name, meaning in ROWS:
        cells = [
            _cell(report[kind], report["missing"][where], key) for kind, where in (("scores",) * 2, ("yardstick",) * 2)
        ]
        rows.append([name, *cells, meaning])
    return columns, rows


def _cell(values: dict[str, float], missing: dict[str, str], key: str) -> str:
    if key not in values:
        return "not computed" if key in missing else ""
    spread = f" ± {values[f'{key}_std']:.2g}" if f"{key}_std" in values else ""
    return f"{values[key]:.4g}{spread}"


def text_of(report: dict[str, Any]) -> str:
    """The report in Markdown, for a screen and for a file."""
    reference, other, metrics = report["reference"], report["other"], report["metrics"]
    columns, rows = table_of(report)
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [
        f"| {' | '.join(word.ljust(width) for word, width in zip(row, widths, strict=True))} |"
        for row in [columns, ["-" * width for width in widths], *rows]
    ]
    parts = [
        "# Evaluation",
        "\n".join(lines),
        f"samples: {report['samples']['num']} images against {_rows_text(reference)}. real images: the same of "
        f"{_rows_text(other)}, as if they were samples: the yardstick, for no model that generalises does much better. "
        f"MIFID is of the samples, and of {metrics['yardstick_mifid_images']}, against {metrics['mifid_against']}.",
    ]
    reasons: dict[str, list[str]] = {}
    for names in report["missing"].values():
        for name, why in names.items():
            if name not in reasons.setdefault(why, []):
                reasons[why].append(name)
    parts += [f"Not computed: {', '.join(names)}: {why}." for why, names in reasons.items()]
    if report["warnings"]:
        parts.append("\n".join(f"- WARNING: {warning}" for warning in report["warnings"]))
    parts.append("\n".join(f"- {name}: {said}" for name, said in _statements(report).items()))
    if memorization := report.get("memorization"):
        parts.append(f"## Memorization\n\n```text\n{memorization['text']}\n```")
    return "\n\n".join(parts)


def _rows_text(rows: dict[str, Any]) -> str:
    kind = {"held_out": "held-out", "train": "training"}[rows["split"]]
    return f"{rows['num']} of {rows['num_in_all']} {kind} images of {rows['data']} ({rows['pixels']})"


def _statements(report: dict[str, Any]) -> dict[str, str]:
    """What was measured how, a line each."""
    samples, features, classes = report["samples"], report["features"], report["classes"]
    place = samples.get("folder") or samples.get("file")
    names = {name: name for name in STATED[1:]} | {"precision": "arithmetic"}  # which is a number of the table
    drawn = ", ".join(f"{name} {_plain(samples[key])}" for key, name in names.items() if samples[key] is not None)
    if all(samples[key] == UNKNOWN for key in names):
        drawn = f"{UNKNOWN}, the files do not say: {', '.join(names.values())}"
    return {
        "samples": f"{samples['num']}{f' in {place}' if place else ''}, checkpoint {_plain(samples['checkpoint'])}",
        "drawn with": drawn + (", no guidance" if samples["guidance_scale"] == 1 else ""),
        "features": ", ".join(f"{name} {_plain(value)}" for name, value in features.items()),
        "classes of the samples": _balance_text(classes["samples"], classes["names"]),
        "classes of the reference": _balance_text(classes["reference"], classes["names"]),
        "KID": f"subsets of {report['metrics'].get('kid_subset', 'no')} images, seed {report['metrics']['seed']}",
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    }


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _balance_text(counts: list[int] | None, names: list[str]) -> str:
    if counts is None:
        return "unknown, or without labels"
    low, high = min(counts), max(counts)
    if low == high:
        return f"{len(counts)}, {low} images each"
    few, many = names[counts.index(low)], names[counts.index(high)]
    return f"{len(counts)}, from {low} images ({few}) to {high} ({many})"


def write_report(report: dict[str, Any], sets: tuple[FeatureSet, FeatureSet, FeatureSet], out: Path) -> list[Path]:
    """Write figure, table, text and JSON, each there as a whole or not at all; the JSON is the last.

    Returns:
        The files.
    """
    samples, reference, _ = sets
    classes = report["classes"]
    figure = plots.evaluation(
        samples.pixels.numpy(), reference.pixels.numpy(),
        {"samples": classes["samples"], "reference": classes["reference"]}, classes["names"],
        f"FID of {samples.num} samples {report['scores']['fid']:.4g}; of {report['other']['num']} real images in their "
        f"place {report['yardstick']['fid']:.4g}",
    )  # fmt: skip
    files = [out / name for name in ("evaluation.png", "evaluation.csv", "evaluation.md", "evaluation.json")]
    plots.save(figure, files[0])
    both = report["scores"], report["yardstick"]
    rows = [[key, *(values.get(key, "") for values in both)] for key in {**both[0], **both[1]}]
    write_csv(files[1], ["number", "samples", "real_images"], rows)
    write_text(files[2], text_of(report) + "\n")
    write_json(files[3], report)
    return files
