"""The arms of a comparison: small YAML overrides of one base configuration, read, filled in and resolved."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from fm_stages.data import read_yaml_file
from fm_stages.oracle import THRESHOLDS, StageProfile
from fm_stages.studies.runs import build_run
from fm_stages.training import SECTIONS, FlowMatching, OracleMonitor, SampleGrid, StageAware, TrainingCLI, instantiate

SHARED = {
    "data": "every arm sees the same images",
    "seed_everything": "every arm runs with the same seeds",
    "model.seed": "every arm runs with the same seeds",
    "model.path": "a gap is measured on one path",
    "init_from": "every arm starts from the same weights",
    "ckpt_path": "every arm starts from the same weights",
    "trainer.default_root_dir": "each run has a folder of its own",
}
"""What an arm may not change, and why."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: short, for tables and folders.
        overrides: of the base, as plain data; times of the measured stages are filled in.
        config: the whole configuration that they make of the base.
        weights_hash: of the network that its first seed starts from.
    """

    name: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    weights_hash: str

    @property
    def config_hash(self) -> str:
        """Of the whole configuration."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


class _Reader(TrainingCLI):
    """Parses what ``fit`` would, and builds nothing: that may need machines that this one is not."""

    def _set_seed(self) -> None:
        """The caller's random numbers are its own."""

    def before_instantiate_classes(self) -> None:
        """Leave the folders of logger and checkpoints to follow from each run's folder."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def resolve(files: Sequence[str | Path]) -> dict[str, Any]:
    """The whole configuration that files make, each on top of the one before, as plain data.

    Raises:
        ValueError: if ``fm-stages fit`` would refuse them.
    """
    # of arguments that are not the command line's, which is what is wanted here
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    try:
        reader = _Reader([f"--config={file}" for file in files], run=False)
        return yaml.safe_load(reader.parser.dump(reader.config, skip_unset=False))
    except (ArgumentError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error


def read_arms(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Overrides by name, in the order of the files.

    Args:
        files: YAML files that map names to overrides, or are the overrides of one arm, which is then called as the
            file; or folders of such files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one cannot be read, two arms have one name, there are less than two, or one changes what all
            arms share.
    """
    arms: dict[str, dict[str, Any]] = {}
    for file in _expand(files):
        for name, overrides in _arms_in(file).items():
            if name in arms:
                raise ValueError(f"--arms {file}: there is an arm {name!r} already; rename one of them")
            _check_overrides(file, name, overrides)
            arms[name] = overrides
    if len(arms) < 2:
        raise ValueError(f"--arms {' '.join(files)}: a comparison needs two arms or more, found {list(arms)}")
    return arms


def choose_reference(arms: Mapping[str, dict[str, Any]], wanted: str | None) -> str:
    """The arm that the others are compared with: the one asked for, or that changes nothing, or the first.

    Raises:
        ValueError: if there is no such arm.
    """
    if wanted is not None and wanted not in arms:
        raise ValueError(f"--reference {wanted}: the arms are {', '.join(arms)}")
    return wanted or next((name for name, overrides in arms.items() if not overrides), next(iter(arms)))


def resolve_arms(files: Sequence[str], arms: Mapping[str, dict[str, Any]], profile: StageProfile) -> list[Arm]:
    """Fill in the measured times, and find mistakes in every arm before the first is trained.

    Args:
        files: the base.
        arms: overrides by name.
        profile: the stages of the data.

    Raises:
        ValueError: with the name of the arm.
    """
    resolved = []
    with TemporaryDirectory() as folder:
        for name, raw in arms.items():
            overlay = Path(folder) / f"{name}.yaml"
            try:
                overrides = _fill(raw, profile)
                overlay.write_text(yaml.safe_dump(overrides))
                config = resolve([*files, *([overlay] if overrides else [])])
                torch.manual_seed(0)
                module = build_run(config)[0]
                _check_callbacks(deepcopy(config), module)  # jsonargparse writes into the lists that it is given
            except (ValueError, TypeError) as error:
                raise ValueError(f"arm {name}: {str(error).replace(f'{overlay} ', '')}") from error
            digest = hashlib.sha256()
            for key, x in module.network.state_dict().items():
                digest.update(key.encode() + x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            resolved.append(Arm(name, overrides, config, digest.hexdigest()[:16]))
    return resolved


def _check_callbacks(config: Mapping[str, Any], module: FlowMatching) -> None:
    """Find now what would end a run as it starts: numbers out of range, policies that contradict each other."""
    parser = LightningArgumentParser(exit_on_error=False)
    sections = {"monitor": OracleMonitor, "steering": StageAware, "samples": SampleGrid}
    for section, callback in sections.items():
        parser.add_lightning_class_args(callback, section)
    built = instantiate(parser, parser.parse_object({name: config[name] for name in sections}))
    built.steering.check(module)
    for policy in built.steering.policies:
        policy.start(module)  # refuses a module that it cannot steer


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first place, with both values, where two nested configurations differ; None if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            found = first_difference(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if repr(before) == repr(now) else (key, before, now)  # NaN is not equal to itself


def _expand(files: Sequence[str]) -> Iterator[Path]:
    for file in map(Path, files):
        if not file.exists():
            raise FileNotFoundError(f"--arms {file}: there is no such file")
        inside = sorted(file.glob("*.y*ml")) if file.is_dir() else [file]
        if not inside:
            raise ValueError(f"--arms {file}: the folder holds no YAML file")
        yield from inside


def _arms_in(file: Path) -> dict[str, dict[str, Any]]:
    try:
        found = read_yaml_file(file)
    except ValueError as error:
        raise ValueError(f"--arms {file}: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"--arms {file} holds a {type(found).__name__}, not a mapping from names to overrides")
    if not found or set(found) <= set(SECTIONS):
        return {file.stem: found or {}}
    return {str(name): overrides or {} for name, overrides in found.items()}


def _check_overrides(file: Path, name: str, overrides: Any) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"--arms {file}: {name!r} names a folder too: use letters, digits, '_', '-' and '.'")
    if not isinstance(overrides, dict) or not set(overrides) <= set(SECTIONS):
        raise ValueError(
            f"--arms {file}: arm {name} is {overrides!r}, not overrides in the shape of a config, such as "
            "{model: {target: ...}}; sections are " + ", ".join(SECTIONS)
        )
    for key, reason in SHARED.items():
        section, _, field = key.partition(".")
        if section in overrides and (not field or field in (overrides[section] or {})):
            raise ValueError(f"--arms {file}: arm {name} changes {key}, but {reason}: change it in the base")


def _fill(overrides: Any, profile: StageProfile) -> Any:
    """Times of the stages in place of ``${boundary}`` and the like."""
    if isinstance(overrides, dict):
        return {key: _fill(value, profile) for key, value in overrides.items()}
    if isinstance(overrides, list):
        return [_fill(value, profile) for value in overrides]
    match = re.fullmatch(r"\$\{(.*)\}", overrides) if isinstance(overrides, str) else None
    if not match:
        return overrides
    if match[1] not in THRESHOLDS:
        raise ValueError(f"{overrides} is not measured; there are {', '.join(f'${{{name}}}' for name in THRESHOLDS)}")
    return round(getattr(profile, match[1]), 4)
