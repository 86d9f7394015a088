"""The options of ``fm-stages evaluate``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from fm_stages.studies.commands import check_least, command_parser, parse_options
from fm_stages.studies.evaluate.images import SPLITS
from fm_stages.studies.sample.options import add_drawing_options, check_drawing_options

NUM = 10_000
"""Images that are drawn unless told otherwise: as many as Fashion-MNIST and CIFAR-10 hold out, several times the 2048
features of Inception, and a fifth of the work of the 50 000 that papers take."""

ANYWAY = ("batch_size", "device")
"""Drawing options that mean something for images in files as well."""


def evaluate_parser(purpose: str) -> ArgumentParser:
    """The options of the command; ``purpose`` is what its help begins with."""
    parser = command_parser("evaluate", purpose)
    option = parser.add_argument
    option(
        "--samples", type=str | None, default=None, metavar="PLACE",
        help="in the place of --ckpt: a folder of fm-stages sample, an .npz, or a folder of images",
    )  # fmt: skip
    features = option(
        "--features", type=nn.Module, required=True,
        help="extractor: the file of fm-stages features, or the class path of any nn.Module, as InceptionFeatures, "
        "DinoFeatures (--features.weights FILE --features.sha256 DIGITS)",
    )  # fmt: skip
    vars(features)["extra_help"] = str  # else the help lists every module of torch that there is
    option("--data", type=str | None, default=None, help="config, checkpoint or class path of the real images; "
           "default: those that the checkpoint was trained on")  # fmt: skip
    option("--reference", choices=SPLITS, default="held_out", help="real images to compare with; default: %(default)s")
    option("--num", type=int | None, default=None, help=f"images that are measured; default: {NUM}, of files all")
    option("--num_reference", type=int | None, default=None, help="real images to compare with; default: all")
    option("--num_memorization", type=int, default=2000, help="samples held against their neighbours; 0: none")
    option("--out", type=str | None, default=None, help="folder of the report; default: beside the run or the samples")
    option("--wandb", type=str | None, default=None, help="project to log the results to; default: none")
    add_drawing_options(parser)
    return parser


def parse(arguments: list[str] | None, purpose: str) -> tuple[ArgumentParser, Namespace]:
    """The options, checked as far as they can be without the network; and the parser, which makes the extractor.

    Raises:
        ValueError: if they do not go together; the message names the option.
    """
    parser = evaluate_parser(purpose)
    options = parse_options(parser, _features_by_file(sys.argv[2:] if arguments is None else arguments))
    check_least(options, 2, "num", "num_reference")
    check_least(options, 0, "num_memorization")
    if options.samples is None:
        if options.ckpt is None and not options.expert:
            raise ValueError("--ckpt names a checkpoint to draw from, --samples images in files: give one of them")
        options.num = options.num or NUM
        check_drawing_options(options)
        return parser, options
    if given := [name for name in _drawing_names() if options[name] != parser.get_default(name)]:
        raise ValueError(f"--{given[0]} is of drawing, and --samples {options.samples} was drawn before: leave it out")
    check_least(options, 1, "batch_size")
    return parser, options


def _features_by_file(arguments: list[str]) -> list[str]:
    """A file of ``fm-stages features`` is short for the class that reads it."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--features=") else [word])]
    found = []
    for before, word in zip(["", *words], words, strict=False):
        is_file = before == "--features" and word.endswith(".safetensors")
        found += ["fm_stages.studies.ClassifierFeatures", "--features.file", word] if is_file else [word]
    return found


def _drawing_names() -> list[str]:
    """Names of the options that only drawing has."""
    parser = ArgumentParser()
    add_drawing_options(parser)
    names: list[Any] = [action.dest for action in parser._actions]
    return [name for name in names if name not in (*ANYWAY, "help")]


def out_folder(options: Namespace, settings: dict[str, Any]) -> Path:
    """Where the report goes: beside the run in a folder named by what was drawn, or beside the samples."""
    if options.out:
        return Path(options.out)
    if options.samples:
        place = Path(options.samples).absolute()
        if (place / "sampling.json").is_file():
            return place / "evaluation"
        return place.with_name(f"{place.name if place.is_dir() else place.stem}_evaluation")
    file = Path(options.ckpt or options.expert[0]).absolute()
    run = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    steps = settings["num_steps"] or settings["tolerance"]
    words = [f"step_{_joined(settings['step'])}", _joined(settings["weights"]), f"{settings['solver']}_{steps}"]
    words += [f"num_{options.num}"]
    words += [f"guidance_{settings['guidance_scale']:g}"] if settings["guidance_scale"] != 1 else []
    words += [options.features.class_path.rpartition(".")[2], _told_apart(options, settings)]
    return run / "evaluation" / "_".join(words)


def _told_apart(options: Namespace, settings: dict[str, Any]) -> str:
    """Six digits for all other settings: calls that differ in any of them do not write over each other."""
    everything = [settings, *(options[name] for name in ("reference", "num_reference", "data"))]
    everything.append(options.features.as_dict())
    return hashlib.blake2b(json.dumps(everything, default=str, sort_keys=True).encode(), digest_size=3).hexdigest()


def _joined(value: Any) -> str:
    """A value, or those of two networks."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
