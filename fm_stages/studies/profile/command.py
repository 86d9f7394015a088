"""``fm-stages profile``: where the stages of a training set lie, and what follows, before any network exists."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile

import torch
from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from fm_stages import flow, plots
from fm_stages.data import remove_parts
from fm_stages.flow import TimestepSampler
from fm_stages.oracle import Oracle
from fm_stages.studies.commands import check_least, command_parser, interruptible, parse_options, refusing
from fm_stages.studies.profile.pictures import draw_pictures
from fm_stages.studies.profile.recommend import SHARE
from fm_stages.studies.profile.study import LABEL_DROPOUT, Study, study_stages
from fm_stages.studies.profile.text import comparison, summary
from fm_stages.studies.profile.trends import has_trend
from fm_stages.studies.ranks import Job
from fm_stages.studies.sources import Source, open_source
from fm_stages.studies.text_files import write_text
from fm_stages.training import instantiate

FIGURES = ("trends", "posterior", "oracle_paths")
"""Those that not every run draws."""


def profile_parser() -> ArgumentParser:
    """The options of the command."""
    parser = command_parser("profile", __doc__)
    parser.add_argument(
        "--data",
        type=str,
        nargs="+",
        action="extend",
        required=True,
        help="training sets, each a config or checkpoint of fm-stages fit, a class path or {class_path: ..., "
        "init_args: {...}}, a .npy or .safetensors file, a folder of images or of latents; NAME=... names one",
    )
    parser.add_argument(
        "--path",
        type=flow.Path,
        default=None,
        help="LinearPath, CosinePath or VPPath; default: the config's, or linear",
    )
    parser.add_argument(
        "--labels",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=None,
        help="use the labels; default: if there are any",
    )
    parser.add_argument(
        "--label_dropout",
        type=float | None,
        default=None,
        help=f"share of samples that the network sees without label; default: the config's, or {LABEL_DROPOUT}",
    )
    parser.add_argument(
        "--timesteps",
        type=TimestepSampler,
        default=None,
        help="density of t for the expected floor of the loss, as LogitNormalTimesteps; default: uniform",
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
    options = parse_options(parser, arguments)
    with refusing(parser):
        options = instantiate(parser, options)  # path and density
    device = _check(options)
    sources, out = _sources(options), _folder(options.out)
    with interruptible(f"what was finished is in {out}"):
        _measure(options, sources, out, device)


def _measure(options: Namespace, sources: list[Source], out: Path, device: torch.device) -> None:
    """Measure, print, draw and log one training set after the other, and then all together."""
    measured = {name: options[name] for name in ("label_dropout", "timesteps", "share", "trends")}
    measured |= {name: options[name] for name in ("num_queries", "num_times", "seed")}
    studies: list[Study] = []
    for source in sources:
        source.bank.to(device)
        print(f"\n{source.name}: {source.bank}", flush=True)
        study = study_stages(source, **measured)
        studies.append(study)
        folder = out / source.name if len(options.data) > 1 else out
        _write(study, folder)
        print("\n" + summary(study))
        if options.pictures:
            curves = study.profile.unconditional or study.profile
            with _notes():
                draw_pictures(Oracle(source.bank, source.path), curves.boundary, folder, seed=options.seed)
        print(f"\nFigures and JSON: {folder}")
    if len(studies) > 1:
        print("\n" + comparison(studies))
        profiles = {study.source.name: asdict(study.profile) for study in studies}
        log_snr = {study.source.name: study.log_snr for study in studies}
        path = plots.save(plots.compare_stages(profiles, log_snr), out / "comparison.png")
        print(f"\nCompared in {path}")
    if options.wandb:
        from fm_stages.studies.profile.to_wandb import log_studies  # wandb takes a second to import

        log_studies(studies, options.wandb, out)


def _check(options: Namespace) -> torch.device:
    """Refuse what would fail after a long measurement; the device to measure on."""
    if not 0 < options.share < 1:
        raise ValueError(f"--share {options.share} must lie in (0, 1)")
    if options.label_dropout is not None and not 0 <= options.label_dropout <= 1:
        raise ValueError(f"--label_dropout {options.label_dropout} must lie in [0, 1]")
    check_least(options, 2, "num_queries")
    check_least(options, 3, "num_times")
    return Job().device(options.device)


def _sources(options: Namespace) -> list[Source]:
    """All training sets, each with a name of its own, before the first is measured."""
    sources: list[Source] = []
    for spec in options.data:
        with _notes():
            source = open_source(spec, options.rows, options.seed, options.image_size, options.path, options.labels)
        taken, plain, number = {other.name for other in sources}, source.name, len(sources) + 1
        while source.name in taken:
            source.name, number = f"{plain}-{number}", number + 1
        if options.trends and not has_trend(source.bank):
            raise ValueError(
                f"--trends halves the rows, but {source.name} has only {source.bank.num_rows}: leave it out"
            )
        sources.append(source)
    if options.label_dropout not in (None, 1) and not any(source.bank.has_labels for source in sources):
        raise ValueError(f"--label_dropout {options.label_dropout} is for labels, and none are used: leave it out")
    return sources


def _folder(out: str) -> Path:
    """Make the folder of the results, before they are measured."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
        remove_parts(Path(out))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}): give another folder") from error
    return Path(out)


@contextmanager
def _notes() -> Iterator[None]:
    """Print warnings as lines of the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"Note: {warning.message}")


def _write(study: Study, folder: Path) -> None:
    """``profile.json`` for other commands, ``study.json`` with all the rest, and the figures."""
    profile = study.profile
    remove_parts(folder)
    for name in FIGURES:  # of an earlier run on other data
        (folder / f"{name}.png").unlink(missing_ok=True)
    profile.save(folder / "profile.json")
    write_text(folder / "study.json", study.to_json() + "\n")
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
