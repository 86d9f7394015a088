"""A training set named on the command line: a class path, a config, a checkpoint, files, each as a bank."""

from __future__ import annotations

import os
import re
from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from fm_stages import flow
from fm_stages.data import TrainingData, read_rows, read_yaml, read_yaml_file, some_rows
from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank
from fm_stages.studies.facts import check_distinct
from fm_stages.training import CONFIG_KEY, explain, instantiate, read_checkpoint

FILES = (".npy", ".safetensors")
CONFIGS = (".yaml", ".yml")


@dataclass
class Source:
    """A training set, and what its run says about it.

    Attributes:
        name: short, for tables and figures.
        bank: the rows, those that were asked for.
        num_rows: how many there are in all.
        path: between noise and data.
        label_dropout: share of samples without label, if a config says.
    """

    name: str
    bank: DataBank
    num_rows: int
    path: flow.Path
    label_dropout: float | None = None


def open_source(
    spec: str,
    rows: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    path: flow.Path | None = None,
    labels: bool | None = None,
) -> Source:
    """Read the training set that a word of the command line names.

    Args:
        spec: a config or checkpoint of ``fm-stages fit``; the class path of a data module, or a YAML mapping
            ``{class_path: ..., init_args: {...}}`` of one; or what `fm_stages.data.read_rows` reads. ``NAME=`` before
            it gives the name.
        rows: how many of the rows to draw at random; None: all.
        seed: of that draw.
        image_size: side of the images of a folder.
        path: between noise and data; None: the config's, or else the linear one.
        labels: whether to keep the labels; None: if there are any.

    Returns:
        The source.

    Raises:
        ValueError: if it cannot be read, has fewer rows, less than two that differ, or no labels to keep.
        FileNotFoundError: if there is no such file.
    """
    name, place = split_name(spec)
    try:
        source = _open(name, place, rows, seed, image_size, path, labels is not False)
        if labels and not source.bank.has_labels:
            raise ValueError("there are no labels: leave --labels out")
        check_distinct(source.bank)
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"--data {spec}: {error}") from error
    return source


def _open(
    name: str, spec: str, rows: int | None, seed: int, image_size: int | None, path: flow.Path | None, labels: bool
) -> Source:
    """`open_source`, without a name before it."""
    file = Path(spec).expanduser()
    is_mapping = spec.startswith("{")
    is_config = file.suffix in (*CONFIGS, ".ckpt") and not is_mapping
    if not is_config and not is_mapping and (file.exists() or file.suffix in FILES or "/" in spec):
        read = read_rows(file, image_size, rows, seed)
        bank = DataBank(read.x1, read.labels if labels else None, read.scale, read.shift)
        return Source(name or _name_of(file), bank, read.num_in_all, path or LinearPath())
    if image_size is not None:
        raise ValueError(f"--image_size {image_size} is for a folder of images; a data module has an argument for it")
    if is_config:
        section, own_path, label_dropout = _read_config(file)
        source = _of_module(name or file.stem, section, path or own_path, label_dropout)
    else:
        section = _section(spec)
        source = _of_module(name or section["class_path"].rpartition(".")[2], section, path or LinearPath())
    if rows is not None and not 1 <= rows <= source.num_rows:
        raise ValueError(f"--rows {rows} must lie between 1 and the number of rows, {source.num_rows}")
    if rows is not None or (source.bank.has_labels and not labels):
        source.bank = source.bank.subset(some_rows(source.num_rows, rows, seed), labels)
    return source


def open_data(spec: str) -> TrainingData:
    """The data module that a word of the command line names, not read yet.

    Args:
        spec: a config or checkpoint of ``fm-stages fit``; the class path of a data module, or a YAML mapping
            ``{class_path: ..., init_args: {...}}`` of one.

    Raises:
        ValueError: if it names none.
        FileNotFoundError: if there is no such file.
    """
    file = Path(spec).expanduser()
    try:
        is_config = file.suffix in (*CONFIGS, ".ckpt") and not spec.startswith("{")
        data = _module_of(_read_config(file)[0] if is_config else _section(spec))
        if not isinstance(data, TrainingData):
            raise ValueError(f"{type(data).__name__} is no data module of fm-stages, a TrainingData")
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"--data {spec}: {error}") from error
    return data


def _section(spec: str) -> dict[str, Any]:
    """Section ``data`` of a class path or a mapping."""
    section = read_yaml(spec, "it") if spec.startswith("{") else {"class_path": spec}
    if not isinstance(section.get("class_path"), str):
        raise ValueError("a mapping needs a class_path, with a space after each colon: {class_path: Digits}")
    return section


def _name_of(file: Path) -> str:
    """The last part of a path, without what tells the kind of a file."""
    file = Path(os.path.abspath(file))  # of "." and ".." as well
    return (file.name if file.is_dir() else file.stem) or "data"


def split_name(spec: str) -> tuple[str, str]:
    """The name before ``=``, if there is one, and the rest."""
    match = re.fullmatch(r"(\w[\w.-]*)=(.+)", spec)
    return (match[1], match[2]) if match and not Path(spec).exists() else ("", spec)


def _read_config(file: Path) -> tuple[Any, flow.Path, float | None]:
    """Section ``data``, path and label dropout of a config, or of the one that a checkpoint carries."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.suffix == ".ckpt":
        sections = read_yaml(read_checkpoint(file).get(CONFIG_KEY, ""), f"the configuration in {file}")
    else:
        sections = read_yaml_file(file)
    if not isinstance(sections, dict) or "data" not in sections:
        raise ValueError(f"{file} says nothing about data: it needs a section `data` with a class_path")
    model = sections.get("model") or {}
    if not isinstance(model, dict) or not isinstance(model.get("label_dropout", 0.0), float | int | None):
        raise ValueError(f"{file}: its section `model` is no mapping, or its label_dropout no number")
    path = LinearPath()
    if "path" in model:
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(flow.Path, "path")
        path = instantiate(parser, parser.parse_object({"path": model["path"]})).path
    return sections["data"], path, model.get("label_dropout")


def _module_of(section: Any) -> Any:
    """The data module that a section of a config describes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=L.LightningDataModule, required=True)
    try:
        return instantiate(parser, parser.parse_object({"data": section})).data
    except ArgumentError as error:
        reason = explain(str(error).removeprefix('Parser key "data":').strip())
        raise ValueError(
            f"{reason}; what is no file is the class path of a data module, as Digits, FashionMNIST, CIFAR10 or "
            "ImageFolder, or {class_path: ..., init_args: {...}}"
        ) from error


def _of_module(name: str, section: Any, path: flow.Path, label_dropout: float | None = None) -> Source:
    """The bank of that data module."""
    data = _module_of(section)
    if not hasattr(data, "bank"):
        raise ValueError(f"{type(data).__name__} has no bank(): a data module says there what its training set is")
    data.prepare_data()
    data.setup()
    bank = data.bank()
    if not isinstance(bank, DataBank):
        raise ValueError(
            f"{type(data).__name__} draws its rows anew at every step ({type(bank).__name__}): only a set of points "
            "can be profiled here; StageProfile.measure(oracle_of(bank, path)) measures its stages"
        )
    return Source(name, bank, bank.num_rows, path, label_dropout)
