"""A data set and a network of a size that trains in milliseconds, and the monitor's numbers by their definition."""

import csv
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from fm_stages import plots
from fm_stages.data import ImageData, Splits
from fm_stages.flow import CosinePath, LinearPath
from fm_stages.networks import DiT
from fm_stages.training import FlowMatching

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 60, 24, 3


class Patterns(ImageData):
    """Random 4x4 images, brighter the higher their class is."""

    def read(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(NUM_TRAIN + NUM_VAL) % NUM_CLASSES
        noise = torch.randint(0, 160, (len(labels), 1, 4, 4), generator=generator)
        images = (noise + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
        split = images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:]
        return Splits(*split, ["dark", "grey", "bright"])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    """What a run writes without being told where stays out of the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _quick_figures(request, monkeypatch) -> None:
    """A figure takes a second, and few tests look at one: those ask for ``real_figures``."""
    if "real_figures" not in request.fixturenames:
        monkeypatch.setattr(plots, "save", lambda figure, path: path)


@pytest.fixture
def real_figures() -> None:
    """See `_quick_figures`."""


@pytest.fixture
def make_data() -> Callable[..., Patterns]:
    return lambda batch_size=20, **kwargs: Patterns(batch_size=batch_size, **kwargs)


def tiny_network(hidden_size: int = 16, num_classes: int = NUM_CLASSES, input_size: int = 4) -> DiT:
    """A DiT whose velocity is not zero from the start: all its weights get gradients."""
    torch.manual_seed(0)
    network = DiT(input_size, 2, 1, hidden_size, 1, 2, num_classes)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture
def make_network() -> Callable[..., DiT]:
    return tiny_network


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


@pytest.fixture
def make_module() -> Callable[..., FlowMatching]:
    def make(network=None, optimizer=adam, **kwargs) -> FlowMatching:
        return FlowMatching(network or tiny_network(), optimizer=optimizer, **kwargs)

    return make


def quiet_trainer(max_steps: int = 4, **kwargs) -> L.Trainer:
    """One CPU process; what a run logs or saves, and where, the test says itself."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "max_epochs": -1,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(max_steps=max_steps, **{**quiet, **kwargs})


@pytest.fixture
def make_trainer() -> Callable[..., L.Trainer]:
    return quiet_trainer


class Recorder(L.Callback):
    """Keeps what each training step returned, as it was returned."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.held_out: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append({name: x.detach().clone() for name, x in outputs.items()})

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.held_out.append({name: x.detach().clone() for name, x in outputs.items()})

    @property
    def losses(self) -> list[float]:
        return [outputs["loss"].item() for outputs in self.steps]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class FakeTrainer(SimpleNamespace):
    """What a step reads of a Trainer, for one of several ranks."""

    def __init__(self, global_step: int = 0, num_ranks: int = 1, rank: int = 0, accumulation: int = 1, **kwargs):
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
        super().__init__(
            global_step=global_step,
            world_size=num_ranks,
            global_rank=rank,
            accumulate_grad_batches=accumulation,
            optimizers=[optimizer],
            **{"training": True, **kwargs},
        )


@pytest.fixture
def attach() -> Callable[..., FlowMatching]:
    """Give a module a Trainer that is none, and let it log nowhere."""

    def attach_to(module: FlowMatching, **kwargs) -> FlowMatching:
        module._trainer = FakeTrainer(**kwargs)
        module.log = lambda *args, **kwargs: None
        return module

    return attach_to


# the monitor's numbers, by their definition, in float64 ---------------------------------------------------------------


def coefficients(path, t: Tensor) -> tuple[Tensor, ...]:
    """alpha, sigma and their derivatives (B, 1), written again."""
    t = t.double()[:, None]
    if isinstance(path, LinearPath):
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    assert isinstance(path, CosinePath)
    half = math.pi / 2
    alpha, sigma = torch.sin(half * t), torch.sin(half * (1 - t))
    return alpha, sigma, half * sigma, -half * alpha


def split_by_definition(
    rows: Tensor, row_labels: Tensor | None, path, outputs: dict[str, Tensor], prediction: str = "prediction"
) -> dict[str, np.ndarray]:
    """regular, gap, floor, ... of a batch, one value per sample, from all differences to all rows of its label."""
    rows = rows.double().flatten(1)  # (N, D)
    x0, x1, v = (outputs[name].double().flatten(1) for name in ("x0", "x1", prediction))  # (B, D)
    a, s, da, ds = coefficients(path, outputs["t"])  # (B, 1)
    x_t, conditional = a * x1 + s * x0, da * x1 + ds * x0
    labels = outputs.get("labels", torch.full(x1.shape[:1], -1))
    allowed = torch.ones(len(x1), len(rows), dtype=torch.bool)
    if row_labels is not None:
        allowed = (labels[:, None] == -1) | (labels[:, None] == row_labels)
    logits = -(x_t[:, None] - a[:, None] * rows).square().sum(2) / (2 * s**2)  # (B, N)
    weight = torch.softmax(logits.masked_fill(~allowed, -torch.inf), 1)
    mean = weight @ rows
    scale = (da * s - a * ds) / s
    oracle = conditional + scale * (mean - x1)
    variance = (weight * (rows - mean[:, None]).square().sum(2)).sum(1)

    centre = rows.mean(0)
    covariance = (rows - centre).T @ (rows - centre) / len(rows)
    identity = torch.eye(rows.shape[1], dtype=torch.float64)
    gain = torch.linalg.solve(
        a[:, :, None] ** 2 * covariance + s[:, :, None] ** 2 * identity, a[:, :, None] * covariance
    )
    linear = centre + ((x_t - a * centre)[:, None] @ gain)[:, 0]

    gap, floor = (v - oracle).square().mean(1), scale[:, 0] ** 2 * variance / rows.shape[1]
    residual = 2 * ((v - oracle) * (oracle - conditional)).mean(1)
    numbers = {
        "t": outputs["t"].double(),
        "regular": (v - conditional).square().mean(1),
        "gap": gap,
        "floor": floor,
        "residual": residual,
        "identity": residual / (gap + floor),
        "top1": weight.max(1).values,
        "ess": 1 / weight.square().sum(1),
        "zero": oracle.square().mean(1),
        "wiener": (scale * (linear - mean)).square().mean(1),
    }
    return {name: x.numpy() for name, x in numbers.items()}


@pytest.fixture(scope="session")
def by_definition() -> Callable[..., dict[str, np.ndarray]]:
    return split_by_definition


class BinnedByDefinition:
    """Means by bin and averages over uniform t of samples' numbers, from the samples themselves."""

    def __init__(self, samples: list[dict[str, np.ndarray]], edges: list[float]) -> None:
        self.samples = {name: np.concatenate([part[name] for part in samples]) for name in samples[0]}
        self.edges = np.array(edges)
        self.bin = np.minimum(np.searchsorted(self.edges, self.samples["t"], side="right"), len(edges) - 1) - 1

    def of(self, name: str, k: int) -> np.ndarray:
        return self.samples[name][self.bin == k]

    def average(self, name: str, lo: float = 0.0, hi: float = 1.0) -> float:
        """Over uniform t in [lo, hi], which are edges; bins without samples do not count."""
        inside = [k for k in range(len(self.edges) - 1) if lo <= self.edges[k] and self.edges[k + 1] <= hi]
        inside = [k for k in inside if len(self.of(name, k))]
        width = np.diff(self.edges)[inside]
        return float(np.sum(width * [self.of(name, k).mean() for k in inside]) / width.sum())

    def z_score(self) -> float:
        identity = self.samples["identity"]
        return float(identity.sum() / np.sqrt(np.square(identity).sum()))


@pytest.fixture(scope="session")
def binned() -> type[BinnedByDefinition]:
    return BinnedByDefinition


def read_table(path: Path) -> dict[str, list[float]]:
    """Columns of a CSV file; empty cells are NaN."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in rows[0]}


@pytest.fixture(scope="session")
def read_csv() -> Callable[[Path], dict[str, list[float]]]:
    return read_table
