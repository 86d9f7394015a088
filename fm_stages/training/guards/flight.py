"""The flight record of a step that went wrong: what it was trained on, and the numbers that show it.

``<run>/flight/step_XXXXXXX/`` holds ``record.json``, ``rank<r>.safetensors`` with tensors of each rank, and the weights
that the step began with where they are small. ``fm-stages replay`` reads it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fm_stages.data import whole_file
from fm_stages.training.ranks import gather

FOLDER = "flight"
JSON = "record.json"
WEIGHTS = "weights.safetensors"

TENSOR_BYTES = 2**26
"""Of the tensors that one rank keeps while a step goes on, and so writes at most."""

WEIGHT_BYTES = 2**28
"""Of weights that are written: those of larger networks are in the checkpoints."""

NUM_BINS = 10
"""Of t, for the loss by t."""

SMALL = ("index", "position", "t", "labels", "error")
LARGE = ("x1", "x0", "prediction")


class Flight:
    """References to what each micro-batch of the current step was made of: nothing is copied until it is written."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Tensor]] = []
        self._num_bytes = 0

    def keep(self, batch: Any, outputs: dict[str, Tensor] | None) -> None:
        """Add a micro-batch: what the loader gave, and what the module's step made of it, if it says so."""
        found = {**(batch if isinstance(batch, dict) else {}), **(outputs or {})}
        part = {name: found[name].detach() for name in SMALL if isinstance(found.get(name), Tensor)}
        large = {name: found[name].detach() for name in LARGE if isinstance(found.get(name), Tensor)}
        self._num_bytes += sum(x.nbytes for x in large.values())
        self.parts.append({**part, **(large if self._num_bytes <= TENSOR_BYTES else {})})

    def clear(self) -> None:
        """Begin another step."""
        self.parts, self._num_bytes = [], 0

    def plain(self, rank: int) -> list[dict[str, Any]]:
        """The micro-batches of this rank as plain data, without images."""
        return [
            {
                "rank": rank,
                "micro_batch": number,
                **{name: plain(part[name]) for name in SMALL if name in part},
                "non_finite_rows": {name: _non_finite_rows(x) for name, x in part.items() if x.is_floating_point()},
            }
            for number, part in enumerate(self.parts)
        ]

    def write_tensors(self, file: Path) -> None:
        """Write the images, noise and predictions that were kept."""
        tensors = {
            f"{number}/{name}": part[name].cpu().contiguous()
            for number, part in enumerate(self.parts)
            for name in LARGE
            if name in part
        }
        if tensors:
            with whole_file(file) as new:
                save_file(tensors, new)


def plain(value: Tensor | float) -> Any:
    """Numbers for JSON, which knows no NaN: those that are not finite as text."""
    if isinstance(value, Tensor):
        return [plain(x) for x in value.tolist()]
    return value if math.isfinite(value) else str(float(value))


def _non_finite_rows(x: Tensor) -> list[int]:
    return (~x.flatten(1).isfinite().all(1) if x.ndim > 1 else ~x.isfinite()).nonzero()[:, 0].tolist()


def loss_by_t(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean squared error in equal bins of t, over the micro-batches of all ranks, of the samples where it is finite."""
    pairs = [(t, error) for part in parts for t, error in zip(part.get("t", []), part.get("error", []), strict=False)]
    rows = []
    for k in range(NUM_BINS):
        inside = [e for t, e in pairs if not isinstance(t, str) and min(int(t * NUM_BINS), NUM_BINS - 1) == k]
        finite = [e for e in inside if not isinstance(e, str)]
        mean = sum(finite) / len(finite) if finite else None
        row = {"t": [k / NUM_BINS, (k + 1) / NUM_BINS], "num": len(inside), "mean": mean}
        rows.append({**row, "num_non_finite": len(inside) - len(finite)})
    return rows


def gradient_norms(module: L.LightningModule, optimizer: Optimizer) -> dict[str, Any]:
    """Norm of each trained tensor's gradient by its name. Where weights are sharded every rank calls this."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    norms = {}
    for name, parameter in module.named_parameters():
        if id(parameter) in trained and parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad)
            norms[name] = plain((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
    return norms


def write_record(
    folder: Path,
    trainer: L.Trainer,
    module: L.LightningModule,
    optimizer: Optimizer,
    flight: Flight,
    facts: dict[str, Any],
) -> str:
    """Write the record of a step. Every rank calls this, before the gradients are dropped.

    Args:
        folder: of the record.
        trainer: of the run.
        module: with its gradients.
        optimizer: whose parameters count.
        flight: what the step was made of.
        facts: what is known already, as plain data.

    Returns:
        Why it could not be written; empty if it was. Training never fails for the want of a record.
    """
    parts = [part for of_rank in gather(flight.plain(trainer.global_rank)) for part in of_rank]
    config = Path(trainer.default_root_dir) / "config.yaml"
    record = {
        **facts,
        "world_size": trainer.world_size,
        "accumulation": trainer.accumulate_grad_batches,
        "precision": trainer.precision,
        "device": module.device.type,
        "seed": getattr(module, "seed", None),
        "learning_rate": optimizer.param_groups[0]["lr"],
        "gradient_norms": gradient_norms(module, optimizer),
        "loss_by_t": loss_by_t(parts),
        "parts": parts,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flight.write_tensors(folder / f"rank{trainer.global_rank}.safetensors")
        if trainer.is_global_zero:
            _write_weights(folder / WEIGHTS, module)
            record["config"] = config.read_text() if config.is_file() else None
            with whole_file(folder / JSON) as new:
                new.write_text(json.dumps(record, indent=1, allow_nan=False))
    except (OSError, SafetensorError) as error:  # safetensors has a name of its own for a full disk
        return str(error)
    return ""


def _write_weights(file: Path, module: L.LightningModule) -> None:
    """The raw weights, if they are whole on this rank and small."""
    network = getattr(module, "network", None)
    if not isinstance(network, torch.nn.Module):
        return
    weights = {name: x for name, x in network.state_dict().items() if isinstance(x, Tensor)}
    if any(isinstance(x, DTensor) for x in weights.values()) or sum(x.nbytes for x in weights.values()) > WEIGHT_BYTES:
        return
    with whole_file(file) as new:
        save_file({name: x.detach().cpu().clone().contiguous() for name, x in weights.items()}, new)
