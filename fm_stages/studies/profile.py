"""``fm-stages profile``: where the stages of a training set lie, and what follows, before any network exists."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from fm_stages import flow, plots
from fm_stages.flow import TimestepSampler
from fm_stages.oracle import Oracle
from fm_stages.studies.pictures import draw_pictures
from fm_stages.studies.profile_text import comparison, summary
from fm_stages.studies.recommend import SHARE
from fm_stages.studies.sources import open_source
from fm_stages.studies.study import LABEL_DROPOUT, Study, study_stages


def profile_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(prog="fm-stages profile", description=__doc__, exit_on_error=False)
    parser.add_argument(
        "--data",
        type=str,
        nargs="+",
        required=True,
        help="training sets, each a config or checkpoint of fm-stages fit, a class path or {class_path: ..., "
        "init_args: {...}}, a .npy or .safetensors file, a folder of images or of latents; NAME=... names one",
    )
    parser.add_argument(
        "--path", type=flow.Path | None, default=None, help="between noise and data; default: the config's, or linear"
    )
    parser.add_argument(
        "--labels", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=True, help="use the labels"
    )
    parser.add_argument(
        "--label_dropout",
        type=float | None,
        default=None,
        help=f"share of samples that the network sees without label; default: the config's, or {LABEL_DROPOUT}",
    )
    parser.add_argument(
        "--timesteps",
        type=TimestepSampler | None,
        default=None,
        help="density of t for the expected floor of the loss; default: uniform",
    )
    parser.add_argument("--share", type=float, default=SHARE, help="of draws (or steps) to spend early")
    parser.add_argument("--rows", type=int | None, default=None, help="draw this many rows at random; default: all")
    parser.add_argument("--image_size", type=int | None, default=None, help="side of the images of a folder")
    parser.add_argument("--num_queries", type=int, default=1024, help="draws per time; errors fall with its root")
    parser.add_argument("--num_times", type=int, default=32, help="times measured")
    parser.add_argument(
        "--trends", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=False, help="what moves the boundary"
    )
    parser.add_argument(
        "--pictures", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=True, help="pictures of the stages"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--device", type=str | None, default=None, help="default: the GPU if there is one")
    parser.add_argument("--out", type=str, default="runs/profile", help="folder of the results")
    parser.add_argument("--wandb", type=str | None, default=None, help="project to log the results to; default: none")
    return parser


def profile_command(arguments: list[str] | None = None) -> None:
    """The command: measures each training set, prints what it found, writes JSON and figures.

    Args:
        arguments: those after ``fm-stages profile``; None: of this process.
    """
    parser = profile_parser()
    parsed = parser.parse_args(sys.argv[2:] if arguments is None else arguments)
    options = parser.instantiate_classes(parsed)
    _check(options)
    out = Path(options.out)
    studies: list[Study] = []
    for spec in options.data:
        source = open_source(spec, options.rows, options.seed, options.image_size, options.path, options.labels)
        if any(source.name == other.source.name for other in studies):
            source.name = f"{source.name}-{len(studies) + 1}"
        source.bank.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        print(f"\n{source.name}: {source.bank}", flush=True)
        measured = {name: options[name] for name in ("label_dropout", "timesteps", "share", "trends")}
        study = study_stages(
            source, **measured, num_queries=options.num_queries, num_times=options.num_times, seed=options.seed
        )
        studies.append(study)
        folder = out / source.name if len(options.data) > 1 else out
        _write(study, folder)
        print("\n" + summary(study))
        if options.pictures:
            curves = study.profile.unconditional or study.profile
            draw_pictures(Oracle(source.bank, source.path), curves.boundary, folder, seed=options.seed)
        print(f"\nFigures and JSON: {folder}")
    if len(studies) > 1:
        print("\n" + comparison(studies))
        profiles = {study.source.name: asdict(study.profile) for study in studies}
        log_snr = {study.source.name: study.log_snr for study in studies}
        path = plots.save(plots.compare_stages(profiles, log_snr), out / "comparison.png")
        print(f"\nCompared in {path}")
    if options.wandb:
        from fm_stages.studies.profile_wandb import log_studies  # wandb takes a second to import

        log_studies(studies, options.wandb, out)


def _check(options: Namespace) -> None:
    """Refuse what would fail after a long measurement."""
    if not 0 < options.share < 1:
        raise ValueError(f"--share {options.share} must lie in (0, 1)")
    if options.label_dropout is not None and not 0 <= options.label_dropout <= 1:
        raise ValueError(f"--label_dropout {options.label_dropout} must lie in [0, 1]")
    if options.num_queries < 2 or options.num_times < 3:
        raise ValueError(f"--num_queries {options.num_queries} must be 2 or more, --num_times {options.num_times} 3")


def _write(study: Study, folder: Path) -> None:
    """``profile.json`` for other commands, ``study.json`` with all the rest, and the figures."""
    profile = study.profile
    profile.save(folder / "profile.json")
    (folder / "study.json").write_text(study.to_json() + "\n")
    interval = profile.guidance_interval() if profile.guidance and 0 < profile.boundary < 1 else None
    title = (
        f"{study.source.name}: {profile.num_rows} rows x {profile.num_dims} values, {profile.path}, boundary at t = "
        f"{profile.boundary:.3f}, {profile.num_queries} draws per time, bands are two standard errors"
    )
    plots.save(plots.stage_curves(asdict(profile), interval, title), folder / "stages.png")
    if study.row_trend or study.dim_trend:
        rows = asdict(study.row_trend) if study.row_trend else None
        dims = [asdict(point) for point in study.dim_trend] if study.dim_trend else None
        plots.save(plots.boundary_trends(rows, dims, study.source.num_rows), folder / "trends.png")
