"""``fm-stages replay``: the step of a flight record once more: where a value stops being finite, or the loss by t.

The record is written by the guards of ``fm-stages fit``. Images, noise and times are those of the record; weights are
those that the step began with where the record holds them, else the newest checkpoint's from before it.
"""

from __future__ import annotations

import math
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_stages.data import Planned, TrainingData, load_safetensors, read_json, read_yaml
from fm_stages.flow import keyed_normal
from fm_stages.oracle import oracle_of
from fm_stages.studies.commands import command_parser, parse_options
from fm_stages.studies.replay.measure import Found, gradient_norm, replay_part
from fm_stages.studies.runs import build_run
from fm_stages.training import CONFIG_KEY, FlowMatching, explain, find_before, flight, read_checkpoint

LISTS = ("t", "index", "position", "labels", "error")
"""What a part of a record has a number of for each sample."""

NUM_WORST = 5
"""Samples with the largest errors that are listed."""


def replay_command(arguments: list[str] | None = None) -> None:
    """The command: prints what it finds.

    Args:
        arguments: those after ``fm-stages replay``; None: of this process.
    """
    parser = command_parser("replay", __doc__)
    parser.add_argument("--record", type=str, required=True, help="folder: RUN/flight/step_XXXXXXX")
    parser.add_argument("--ckpt", type=str | None, default=None, help="weights of this checkpoint, whatever there is")
    options = parse_options(parser, arguments)
    folder = Path(options.record)
    record = read_record(folder)
    print(f"{folder}: step {record['step']}, {record['kind']}, {record['action']}. {record['what']}.")
    module, data, weights = _rebuild(folder, record, options.ckpt)
    print(f"Weights: {weights}.")
    module.to("cuda" if record["device"] == "cuda" and torch.cuda.is_available() else "cpu").train()
    if module.device.type != record["device"]:
        print(f"The run was on {record['device']}, this is {module.device.type}: last digits differ.")
    module.zero_grad()
    tensors = {rank: _tensors(folder, rank) for rank in {part["rank"] for part in record["parts"]}}
    try:
        found = [_replay(module, data, record, part, tensors[part["rank"]]) for part in record["parts"]]
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be replayed: {error}") from error
    print(_report(record, found, gradient_norm(module)))


def read_record(folder: Path) -> dict[str, Any]:
    """What ``record.json`` says.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is none.
    """
    file = folder / flight.JSON
    if not file.is_file():
        raise FileNotFoundError(f"--record {folder}: there is no {flight.JSON}; a record is RUN/flight/step_XXXXXXX")
    try:
        record = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}: it is not a flight record") from error
    needed = {"step", "kind", "action", "what", "device", "precision", "seed", "parts", "config", "loss_by_t"}
    if missing := needed - set(record if isinstance(record, dict) else ()):
        raise ValueError(f"{file} is not a flight record: it lacks {', '.join(sorted(missing))}")
    _check_record(record, file)
    if not record["parts"] or not all("t" in part for part in record["parts"]):
        raise ValueError(f"{file} does not say at which t it was: only steps of FlowMatching can be replayed")
    return record


def _check_record(record: dict[str, Any], file: Path) -> None:
    """Refuse a record whose parts are not what the guards write: a file is opened by the number of a rank.

    Raises:
        ValueError: with what is wrong.
    """
    wrong = [name for name in ("kind", "action", "what", "device", "precision") if not isinstance(record[name], str)]
    wrong += [name for name in ("step", "seed") if type(record[name]) is not int or abs(record[name]) >= 2**63]
    wrong += [] if isinstance(record["config"], str | None) else ["config"]
    wrong += [] if _is_number(record.get("gradient_norm")) else ["gradient_norm"]
    wrong += [name for name in ("parts", "loss_by_t") if not isinstance(record[name], list)]
    wrong += [] if "loss_by_t" in wrong or _are_bins(record["loss_by_t"]) else ["loss_by_t"]
    for number, part in enumerate(record["parts"] if "parts" not in wrong else ()):
        sizes = {len(part[name]) for name in LISTS if isinstance(part, dict) and isinstance(part.get(name), list)}
        numbers = isinstance(part, dict) and all(
            type(part.get(name)) is int and 0 <= part[name] < 2**31 for name in ("rank", "micro_batch")
        )
        lists = numbers and all(isinstance(part[name], list) for name in LISTS if name in part)
        if not lists or len(sizes) != 1 or not all(_are_numbers(part[name]) for name in LISTS if name in part):
            wrong.append(f"parts[{number}]")
    if wrong:
        raise ValueError(f"{file} is not a flight record: {wrong[0]} is not what the guards write there")


def _are_numbers(values: list[Any]) -> bool:
    """Whether these are numbers, or the words that JSON has for those that are not finite."""
    return all(_is_number(x) for x in values)


def _is_number(x: Any) -> bool:
    return x in ("nan", "inf", "-inf") if isinstance(x, str) else type(x) is float or type(x) is int and abs(x) < 2**63


def _are_bins(rows: list[Any]) -> bool:
    """Whether these are what `flight.loss_by_t` makes."""
    return len(rows) == flight.NUM_BINS and all(
        isinstance(row, dict)
        and isinstance(row.get("t"), list)
        and [type(x) for x in row["t"]] == [float, float]
        and all(type(row.get(name)) is int for name in ("num", "num_non_finite"))
        and (row.get("mean") is None or _is_number(row["mean"]))
        for row in rows
    )


def _rebuild(folder: Path, record: dict[str, Any], ckpt: str | None) -> tuple[FlowMatching, TrainingData | None, str]:
    """Module with weights, data (not read), and which weights these are."""
    step, own = record["step"], folder / flight.WEIGHTS
    if ckpt is None and not own.is_file():
        newest = find_before(folder.parent.parent / "checkpoints", step)
        if newest is None:
            raise ValueError(
                f"{folder} holds no weights, nor has its run a checkpoint from before: name one with --ckpt"
            )
        ckpt = str(newest)
    checkpoint = read_checkpoint(ckpt) if ckpt else {}
    text = record["config"] or checkpoint.get(CONFIG_KEY)
    if not text:
        raise ValueError(f"{folder} carries no configuration: name a checkpoint of fm-stages fit with --ckpt")
    weights = None if ckpt else load_safetensors(own)
    try:
        module, data = build_run(read_yaml(text, folder), weights)
        if weights is not None:
            module.network.load_state_dict(weights)
    except (ArgumentError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be replayed: {explain(str(error))}") from error
    if not ckpt:
        return module, data, f"those that step {step} began with, from the record"
    state = {name: x for name, x in checkpoint["state_dict"].items() if not name.startswith("network_ema.")}
    fits = module.load_state_dict(state, strict=False)
    if wrong := [*fits.unexpected_keys, *(name for name in fits.missing_keys if name.startswith("network."))]:
        raise ValueError(f"{ckpt} does not fit the run of {folder}: {len(wrong)} weights differ, {wrong[0]} first")
    away = step - int(checkpoint.get("global_step", 0))
    when = "the step's own" if not away else f"{abs(away)} steps {'before' if away > 0 else 'after'} it"
    return module, data, f"{ckpt}, {when}"


def _tensors(folder: Path, rank: int) -> dict[str, Tensor]:
    file = folder / f"rank{rank}.safetensors"
    return load_safetensors(file) if file.is_file() else {}


def _replay(
    module: FlowMatching,
    data: TrainingData | None,
    record: dict[str, Any],
    part: dict[str, Any],
    tensors: dict[str, Tensor],
) -> Found:
    """One micro-batch of one rank."""
    batch: dict[str, Tensor] = {
        name: torch.tensor(part[name]) for name in ("index", "position", "labels") if name in part
    }
    batch["t"] = torch.tensor([float(t) for t in part["t"]])
    number = part["micro_batch"]
    if f"{number}/x1" in tensors and f"{number}/x0" in tensors:
        batch |= {name: tensors[f"{number}/{name}"] for name in ("x1", "x0")}
    else:
        batch |= _drawn_again(module, data, record, batch)
    if module.target.needs_oracle and module.target.oracle is None and data is not None:
        data.setup()
        module.target.attach(oracle_of(data.bank().to(module.device), module.path))
    batch = {name: x if name == "position" else x.to(module.device) for name, x in batch.items()}
    return replay_part(module, batch, record["step"], record["precision"], 1 / len(record["parts"]))


def _drawn_again(
    module: FlowMatching, data: TrainingData | None, record: dict[str, Any], batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Images by their rows, and noise by its key, of a batch that was too large for the record."""
    if data is None or not {"index", "position"} <= set(batch):
        raise ValueError("the record holds no images, and does not say which they were")
    if record["device"] != module.device.type:
        raise ValueError(f"the record holds no noise, which was drawn on {record['device']}: replay it there")
    data.setup()
    rows: Any = data.train_dataloader().dataset
    x1 = rows[Planned(batch["index"], batch["position"])]["x1"].to(module.device)
    key = ("noise", record["seed"], record["step"])
    x0 = keyed_normal(key, batch["position"], tuple(x1.shape[1:]), device=module.device)
    return {"x1": x1, "x0": x0}


def _report(record: dict[str, Any], found: list[Found], norm: float) -> str:
    """What was found, for a person."""
    lines = [""]
    bad = [(part, one) for part, one in zip(record["parts"], found, strict=True) if one.first]
    if not bad:
        lines.append("Every value is finite, forward and backward.")
    for part, one in bad:
        lines.append(f"First value that is not finite, rank {part['rank']}, micro-batch {part['micro_batch']}:")
        lines.append(f"  {one.first}")
        if one.gradients:
            lines.append(f"  then in the gradients of {len(one.gradients)} tensors")
    now = [{**part, "error": flight.plain(one.error)} for part, one in zip(record["parts"], found, strict=True)]
    lines += ["", "Squared error by t:", f"{'t':>12} {'samples':>8} {'recorded':>12} {'replayed':>12}"]
    for then, here in zip(record["loss_by_t"], flight.loss_by_t(now), strict=True):
        if then["num"]:
            low, high = then["t"]
            lines.append(f"{low:6.1f} - {high:.1f} {then['num']:8} {_mean(then):>12} {_mean(here):>12}")
    recorded = float(record["gradient_norm"])
    lines += ["", f"Gradient norm: recorded {recorded:.4g}, replayed {norm:.4g}"]
    if not math.isfinite(norm) and not bad:
        lines.append("Each gradient is finite: only their norm overflows.")
    return "\n".join([*lines, "", *_worst(now)])


def _mean(row: dict[str, Any]) -> str:
    """Mean of a bin, and how many samples are not in it."""
    mean = "-" if row["mean"] is None else f"{row['mean']:.4g}"
    return mean + (f" ({row['num_non_finite']} not finite)" if row["num_non_finite"] else "")


def _worst(parts: list[dict[str, Any]]) -> list[str]:
    """The samples with the largest errors, those that are not finite first."""
    samples = [(float(e), part, i) for part in parts for i, e in enumerate(part["error"])]
    samples.sort(key=lambda sample: sample[0] if math.isfinite(sample[0]) else math.inf, reverse=True)
    lines = ["Largest errors:"]
    for error, part, i in samples[:NUM_WORST]:
        where = f"rank {part['rank']}, micro-batch {part['micro_batch']}, row {i}"
        image = f", image {part['index'][i]}" if "index" in part else ""
        lines.append(f"  {error:.4g} at t = {float(part['t'][i]):.4f}, label {part['labels'][i]}{image} ({where})")
    return lines
