"""What is damaged, and the command that then reads it."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from fm_stages.networks import DiT
from fm_stages.studies.features.classifier import Classifier, write_classifier
from tests.fuzz import mutations as m
from tests.studies.conftest import save_checkpoint

Mutation = Callable[[Path, Random], None]

QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
DRAW = ["--num", "4", "--num_steps", "2", "--batch_size", "4", "--device", "cpu"]


@dataclass(frozen=True)
class Subject:
    """A kind of file and who reads it.

    Attributes:
        file: that is damaged, in the folder of all files.
        words: of the command.
        mutations: ways to damage it, of which each case draws one.
        share: of all cases, relative to the others: what is read fast is damaged often.
        said: what an error may name in the place of the file.
        kept: files that a command which fails may leave or change, besides none.
    """

    file: str
    words: tuple[str, ...]
    mutations: tuple[Mutation, ...]
    share: float = 1.0
    said: tuple[str, ...] = ()
    kept: tuple[str, ...] = field(default=())


FIT = ("fit", "--config", "base.yaml")
EVALUATE = ("--features", "classifier.safetensors", "--num_memorization", "0", "--out", "out")
SAMPLES = ("evaluate", "--data", "Digits", *EVALUATE, "--samples")
PROFILE = ("profile", "--num_queries", "4", "--num_times", "4", "--out", "out", "--data")
ENCODE = ("encode", "--data", "images", "--vae", "vae", "--image_size", "16", "--shard_rows", "4", "--device", "cpu")
REPLAY = ("replay", "--record", "flight/step_0000001")

YAML = (m.file_yaml, m.file_yaml, m.file_bytes)
JSON = (m.file_json, m.file_json, m.file_bytes)
CHECKPOINT = (m.file_tensors, m.file_tensors, m.file_bytes)
TENSORS = (m.file_safetensors, m.file_bytes)
NPY = (m.file_npy, m.file_npy, m.file_bytes)
PNG = (m.file_png, m.file_bytes)
ZIP = (m.file_zip, m.file_zip, m.file_bytes)


def subjects() -> dict[str, Subject]:
    """All of them, by name."""
    return {**_configs(), **_checkpoints(), **_samples(), **_data(), **_encoded(), **_records()}


def _configs() -> dict[str, Subject]:
    validate = ("validate", "--config", "base.yaml", "--ckpt_path", "last.ckpt", *QUIET)
    compare = ("compare", "--config", "base.yaml", "--arms", "arms.yaml", "--seeds", "1", "--out", "out", "--dry-run")
    features = ("features", "--config", "features.yaml", "--out", "out.safetensors")
    stages = (*FIT, "--monitor.profile=stages.json", *QUIET)
    of_doctor = ("doctor", "--config", "base.yaml", "--profile", "stages.json")
    return {
        "config, fit": Subject("base.yaml", (*FIT, *QUIET), YAML, 2, kept=("run",)),
        "config, validate": Subject("base.yaml", validate, YAML, 0.5),
        "config, doctor": Subject("base.yaml", ("doctor", "--config", "base.yaml"), YAML, 0.7),
        "config, profile": Subject("base.yaml", (*PROFILE, "base.yaml", "--rows", "40"), YAML, 1, kept=("out",)),
        "config, features": Subject("features.yaml", features, YAML, 0.7),
        "arms, compare": Subject("arms.yaml", compare, YAML, 0.7, ("arm",), ("out",)),
        "profile, fit": Subject("stages.json", stages, JSON, 0.7, kept=("run",)),
        "profile, doctor": Subject("stages.json", of_doctor, JSON, 0.3),
    }


def _checkpoints() -> dict[str, Subject]:
    small = ("--ckpt", "small.ckpt", "--out", "out")
    validate = ("validate", "--config", "base.yaml", "--ckpt_path", "last.ckpt", *QUIET)
    of_doctor = ("doctor", "--config", "base.yaml", "--ckpt", "small.ckpt")
    weights = ("export", "--ckpt", "weights.safetensors", "--out", "out.safetensors")
    foreign = ("import", "--ckpt", "foreign.pt", "--out", "out.ckpt", "--num_heads", "2")
    return {
        "checkpoint, fit": Subject(
            "last.ckpt", (*FIT, "--ckpt_path", "last.ckpt", *QUIET), CHECKPOINT, 1, kept=("run",)
        ),
        "checkpoint, init": Subject(
            "small.ckpt", (*FIT, "--init-from", "small.ckpt", *QUIET), CHECKPOINT, 0.7, kept=("run",)
        ),
        "checkpoint, validate": Subject("last.ckpt", validate, CHECKPOINT, 0.5),
        "checkpoint, doctor": Subject("small.ckpt", of_doctor, CHECKPOINT, 0.4),
        "checkpoint, export": Subject("small.ckpt", ("export", *small[:3], "out.safetensors"), CHECKPOINT, 5),
        "checkpoint, sample": Subject("small.ckpt", ("sample", *small, *DRAW), CHECKPOINT, 2),
        "checkpoint, diagnose": Subject("small.ckpt", ("diagnose", *small), CHECKPOINT, 0.5),
        "checkpoint, handover": Subject("small.ckpt", ("handover", *small), CHECKPOINT, 0.5),
        "checkpoint, evaluate": Subject(
            "small.ckpt", ("evaluate", "--ckpt", "small.ckpt", *EVALUATE, *DRAW), CHECKPOINT, 0.7
        ),
        "weights, export": Subject("weights.safetensors", weights, TENSORS, 2),
        "weights, import": Subject("foreign.pt", foreign, CHECKPOINT, 2),
    }


def _samples() -> dict[str, Subject]:
    record, image = "drawn/sampling.json", "drawn/images/000002.png"
    again = ("sample", "--ckpt", "small.ckpt", "--out", "drawn", *DRAW)
    return {
        "classifier, evaluate": Subject("classifier.safetensors", (*SAMPLES, "drawn"), TENSORS, 1.5),
        "record of samples, evaluate": Subject(record, (*SAMPLES, "drawn"), JSON, 1.5, ("drawn",)),
        "record of samples, sample": Subject(record, again, JSON, 1, ("drawn",), ("drawn",)),
        "npz, evaluate": Subject("samples.npz", (*SAMPLES, "samples.npz"), ZIP, 1.5),
        "image, evaluate": Subject(image, (*SAMPLES, "drawn/images"), PNG, 0.5, ("drawn",)),
    }


def _data() -> dict[str, Subject]:
    shard, statistics = "latents/latents_rank00_shard000.safetensors", "latents/latents_stats.pt"
    rows = (
        ("npy", "rows.npy", "rows.npy", NPY, 1.5),
        ("labels", "rows_labels.npy", "rows.npy", NPY, 0.5),
        ("safetensors", "rows.safetensors", "rows.safetensors", TENSORS, 1.5),
        ("image", "images/000003.png", "images", PNG, 1),
        ("index", "latents/index.json", "latents", JSON, 2),
        ("shard", shard, "latents", TENSORS, 1.5),
        ("statistics", statistics, "latents", CHECKPOINT, 1.5),
        ("one latent", "flat/2.npy", "flat", NPY, 0.5),
        ("labels of latents", "flat/dataset.json", "flat", JSON, 1),
        ("zip", "flat.zip", "flat.zip", ZIP, 1),
    )
    return {
        f"{name}, profile": Subject(file, (*PROFILE, place), ways, share, (place,), ("out",))
        for name, file, place, ways, share in rows
    }


def _encoded() -> dict[str, Subject]:
    weights = "vae/diffusion_pytorch_model.safetensors"
    rows = (
        ("index", "latents/index.json", "latents", JSON, 0.7),
        ("shard", "latents/latents_rank00_shard001.safetensors", "latents", TENSORS, 0.7),
        ("sources", "latents/sources.txt", "latents", (m.file_lines, m.file_bytes), 0.5),
        ("vae's configuration", "vae/config.json", "new", JSON, 1),
        ("vae's weights", weights, "new", TENSORS, 0.7),
        ("image", "images/000003.png", "new", PNG, 0.5),
    )
    return {
        f"{name}, encode": Subject(file, (*ENCODE, "--out", out), ways, share, (file.split("/")[0],), (out,))
        for name, file, out, ways, share in rows
    }


def _records() -> dict[str, Subject]:
    folder = "flight/step_0000001"
    return {
        "record, replay": Subject(f"{folder}/record.json", REPLAY, JSON, 2),
        "tensors of a record, replay": Subject(f"{folder}/rank0.safetensors", REPLAY, TENSORS, 1, ("flight",)),
        "weights of a record, replay": Subject(f"{folder}/weights.safetensors", REPLAY, TENSORS, 1, ("flight",)),
    }


def write_originals(folder: Path, run: Callable, write_vae: Callable) -> None:
    """All files, whole, in a folder; ``run`` calls the command there."""
    network = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    base = {
        "trainer": {"max_steps": 1, "default_root_dir": "run", "accelerator": "cpu", "val_check_interval": 1},
        "model": {
            "network": {"class_path": "fm_stages.networks.DiT", "init_args": {**network, "num_classes": 10}},
            "timesteps": {"class_path": "fm_stages.flow.ShiftedTimesteps", "init_args": {"shift": 2.0}},
            "warmup_steps": 0, "label_dropout": 0.1, "ema_decay": 0.9, "seed": 0,
        },
        "data": {"class_path": "fm_stages.data.Digits", "init_args": {"batch_size": 16, "flip": False, "seed": 0}},
        "monitor": {"every_n_steps": 1}, "samples": {"every_n_steps": 0}, "checkpoints": {"save_top_k": 1},
        "guards": {"nonfinite": "stop"},
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    assert run("fit", "--config", "base.yaml", *QUIET).status == 0
    shutil.copy(folder / "run/checkpoints/last.ckpt", folder / "last.ckpt")
    shutil.rmtree(folder / "run")
    done = run("fit", "--config", "base.yaml", *QUIET, "--model.optimizer=torch.optim.AdamW",
               "--model.optimizer.init_args.lr=1e12", "--trainer.max_steps=4")  # fmt: skip
    records = sorted((folder / "run/flight").glob("step_*"))
    assert records, done.err
    shutil.copytree(records[0], folder / "flight/step_0000001")
    shutil.rmtree(folder / "run")

    save_checkpoint(folder / "small.ckpt")
    assert run("export", "--ckpt", "small.ckpt", "--out", "weights.safetensors").status == 0
    foreign = DiT(**{**network, "input_size": 8}, num_classes=10).state_dict()
    torch.save({"ema": foreign, "model": foreign}, folder / "foreign.pt")
    write_classifier(folder / "classifier.safetensors", Classifier(1, 8, 10), 0.9, {"data": {"class_path": "Digits"}})
    assert run(*PROFILE, "base.yaml").status == 0
    shutil.move(folder / "out/profile.json", folder / "stages.json")
    shutil.rmtree(folder / "out")
    assert run("sample", "--ckpt", "small.ckpt", "--out", "drawn", *DRAW).status == 0

    draw = np.random.default_rng(0)
    np.savez(folder / "samples.npz", arr_0=draw.integers(0, 255, (40, 8, 8, 1), np.uint8), arr_1=np.arange(40) % 10)
    np.save(folder / "rows.npy", draw.normal(size=(40, 1, 4, 4)).astype(np.float32))
    np.save(folder / "rows_labels.npy", np.arange(40) % 3)
    rows = {
        "latents": torch.from_numpy(draw.normal(size=(40, 4, 2, 2)).astype(np.float32)),
        "labels": torch.arange(40) % 3,
    }
    save_file(rows, folder / "rows.safetensors")
    (folder / "images").mkdir()
    for number in range(8):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"images/{number:06d}.png")
    (folder / "flat").mkdir()
    for number in range(4):
        moments = draw.normal(size=(4, 2, 2)).astype(np.float32)
        np.save(folder / f"flat/{number}.npy", moments)
    (folder / "flat/dataset.json").write_text(json.dumps({"labels": [[f"{n}.npy", n % 2] for n in range(4)]}))
    with zipfile.ZipFile(folder / "flat.zip", "w") as archive:
        for file in sorted((folder / "flat").iterdir()):
            archive.write(file, file.name)
    write_vae(folder / "vae")
    encode = subjects()["index, encode"].words
    done = run(*encode)
    assert done.status == 0, done.err
    (folder / "arms.yaml").write_text(yaml.safe_dump({
        "same": None, "late": {"model": {"timesteps": {"class_path": "ShiftedTimesteps", "init_args": {"shift": 3.0}}}},
        "short": {"trainer": {"max_steps": 1}, "model": {"warmup_steps": 1}},
    }))  # fmt: skip
    features = {"data": {"class_path": "Digits", "init_args": {"batch_size": 256}}, "num_epochs": 1, "num_features": 4}
    (folder / "features.yaml").write_text(yaml.safe_dump(features))
    made = folder.parent / "pwned"
    for name in ("evil_networks", "torchvision_evil"):
        (folder / f"{name}.py").write_text(f"open({str(made)!r}, 'w')\nimport torch\nNet = torch.nn.Linear\n")


def imported() -> list[str]:
    """Modules of a stranger that are in this process."""
    return [name for name in ("evil_networks", "torchvision_evil") if name in sys.modules]
