"""Images to latents and back: an autoencoder of diffusers, from a folder or from the Hugging Face hub.

Latents are what the encoder gives, as it gives them. Where a network is to see them at about unit scale they are
normalised by ``latents_stats.pt``, or by the VAE's own two numbers: (latent - shift_factor) * scaling_factor.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fm_stages.data.foreign import read_json
from fm_stages.data.without_memory import without_memory

PRECISIONS = ("fp32", "bf16")
WEIGHTS = "diffusion_pytorch_model.safetensors"
_FILES = ["config.json", WEIGHTS, f"{WEIGHTS}.index.json", "diffusion_pytorch_model-*.safetensors"]
_PROBE = 64
"""Side of the image that is encoded to see what the encoder makes of it; no factor in use is larger."""

_REACH_SEC = 5


class VAE:
    """An encoder and decoder of images, frozen.

    Any class of diffusers will do whose ``encode`` takes images (B, 3, H, W) in [-1, 1] and gives ``latent_dist``, the
    diagonal Gaussian of an AutoencoderKL, or nothing but latents (AutoencoderDC, AutoencoderTiny): the standard
    deviation is then 0.

    In bf16 products and convolutions run under autocast. On a CPU that is as accurate as weights of bfloat16 (the mean
    of SD-VAE's architecture is off by 1.3 % of its standard deviation either way), on a GPU norms stay in float32. In
    fp32 torch's settings decide whether a GPU convolves in TF32, which it does by default.

    Args:
        model: of diffusers, with float32 weights.
        name: what the index of latents says of it: a folder, or a name on the hub.
        revision: commit on the hub; None of a folder.
        precision: ``fp32`` or ``bf16``; what comes out is float32.
        device: where it runs.

    Attributes:
        kind: the class, e.g. AutoencoderKL.
        sha256: of class, configuration and weights.
        scaling_factor: of the VAE's configuration; 1 where there is none.
        shift_factor: the same; 0 where there is none.
        channels: of a latent.
        factor: side of an image over that of its latent.
        gaussian: whether it gives a distribution and not one latent.

    Raises:
        ValueError: if it is no autoencoder of images, or precision is another word.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        revision: str | None = None,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}: there are {' and '.join(PRECISIONS)}")
        config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
        self.name, self.revision, self.kind, self.precision = name, revision, type(model).__name__, precision
        self.sha256 = _digest(self.kind, config, model)
        self.scaling_factor = float(config.get("scaling_factor") or 1.0)
        self.shift_factor = float(config.get("shift_factor") or 0.0)
        self._model: Any = model.eval().requires_grad_(False)
        self.to(device)
        self.channels, self.factor, self.gaussian = self._probe()

    def to(self, device: torch.device | str) -> VAE:
        """Move it, in place; returns itself."""
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"  # where convolutions on tensor cores want channels last
        self._layout = torch.channels_last if on_gpu else torch.contiguous_format
        self._model = self._model.to(self.device).to(memory_format=self._layout)
        return self

    @property
    def record(self) -> dict[str, Any]:
        """What an index of latents says of it."""
        kept = ("name", "revision", "kind", "sha256", "scaling_factor", "shift_factor")
        return {name: getattr(self, name) for name in kept}

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images.

        Args:
            images: (B, 3, H, W) float32 in [-1, 1]; H and W are multiples of ``factor``.

        Returns:
            Two tensors (B, channels, H / factor, W / factor), float32, on the device.

        Raises:
            ValueError: if the factor does not divide H or W.
        """
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise ValueError(
                f"images of {images.shape[-1]}x{images.shape[-2]} pixels have no whole number of latents: the sides "
                f"must be multiples of {self.factor}, the factor of {self.name}"
            )
        images = images.to(self.device, non_blocking=True, memory_format=self._layout)
        with self._autocast():
            encoded = self._model.encode(images)
        if not self.gaussian:
            mean = encoded[0].float()
            return mean, torch.zeros_like(mean)
        posterior = encoded.latent_dist
        return posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())  # its own std may be of bfloat16

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: (B, channels, h, w) as they were encoded, without normalisation.

        Returns:
            (B, 3, factor * h, factor * w) float32 in [-1, 1], on the device.
        """
        latents = latents.to(self.device, torch.float32, non_blocking=True, memory_format=self._layout)
        with self._autocast():
            images = self._model.decode(latents).sample
        return images.float().clamp(-1, 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _probe(self) -> tuple[int, int, bool]:
        """Channels, factor, and whether there is a distribution: seen, because configurations of classes differ."""
        images = torch.zeros(1, 3, _PROBE, _PROBE, device=self.device)
        try:
            with torch.no_grad():
                encoded = self._model.encode(images)
            gaussian = hasattr(encoded, "latent_dist")
            latents = encoded.latent_dist.mean if gaussian else encoded[0]
            _, channels, height, width = latents.shape
            if height != width or _PROBE % height:
                raise ValueError(f"an image of {_PROBE}x{_PROBE} pixels becomes {height}x{width} latents")
        except Exception as error:  # those of video and of sound fail in many ways
            raise ValueError(
                f"{self.name} is of class {self.kind}, which encodes no RGB images ({error}): give an AutoencoderKL or "
                "another autoencoder of images of diffusers"
            ) from error
        return channels, _PROBE // height, gaussian


def load_vae(
    name: str, revision: str | None = None, precision: str = "fp32", device: torch.device | str = "cpu"
) -> VAE:
    """A VAE out of a folder, or from the hub.

    Args:
        name: a folder in diffusers' layout, or one of a pipeline, which holds it as ``vae``; else a name on the hub,
            ``owner/name``, which is looked for among what was downloaded before, and downloaded if it is not there.
        revision: branch, tag or commit on the hub; None: its main branch.
        precision: see `VAE`.
        device: see `VAE`.

    Raises:
        FileNotFoundError: if there is no such folder and the hub cannot be reached or has no such VAE.
        ValueError: if the folder holds no VAE that can be read, or a revision is given for it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision} is of a name on the hub, and {folder} is a folder: leave it out")
        return VAE(_read(_model_folder(folder)), str(folder.resolve()), None, precision, device)
    snapshot = _snapshot(name, revision)
    return VAE(_read(_model_folder(snapshot)), name, snapshot.name, precision, device)


def _model_folder(folder: Path) -> Path:
    """Where configuration and weights lie: here, or in ``vae`` of a pipeline."""
    places = [place for place in (folder, folder / "vae") if (place / "config.json").is_file()]
    for place in places:
        if (place / WEIGHTS).is_file() or (place / f"{WEIGHTS}.index.json").is_file():
            return place
    if places:
        there = ", ".join(sorted(file.name for file in places[0].iterdir()))
        raise ValueError(
            f"{places[0]} holds no {WEIGHTS}, only {there}: weights of pickles are not read; save the VAE once more "
            "with diffusers' save_pretrained"
        )
    raise ValueError(f"{folder} is no VAE in diffusers' layout: it, or vae inside it, holds config.json and {WEIGHTS}")


def _read(folder: Path) -> nn.Module:
    """The model of a folder, of the class that its configuration names, with float32 weights."""
    import diffusers  # takes a second to import

    try:
        config = read_json(folder / "config.json")
        kind = config["_class_name"]
        cls = getattr(diffusers, kind)
        if not issubclass(cls, diffusers.ModelMixin):
            raise TypeError(f"{kind} is no model")
        held = sum(file.stat().st_size for file in _weights(folder))
        with without_memory(4 * held, kind, f"its files have {held}"):  # which may be of 16 bits
            cls.from_config(config)
        # low_cpu_mem_usage would want accelerate, and warn
        return cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers, safetensors and torch fail in many ways
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot read a VAE from {folder} ({type(error).__name__}: {reason})") from error


def _weights(folder: Path) -> list[Path]:
    """The files of a model, which lie in its folder whatever the index of several calls them."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    names = set(read_json(index)["weight_map"].values())
    if strange := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index.name} names a file elsewhere, {strange[0]}")
    return [folder / name for name in names]


def _snapshot(name: str, revision: str | None) -> Path:
    """The folder of a VAE of the hub, downloaded unless it was before; its name is the commit."""
    from huggingface_hub import hf_hub_url, snapshot_download
    from huggingface_hub.utils import HFValidationError, get_session

    wanted = [f"{place}{file}" for place in ("", "vae/") for file in _FILES]
    try:
        return _complete(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no folder {Path(name).resolve()}, nor is {name} a name on the hub"
        ) from error
    except (OSError, ValueError):  # not downloaded, or in part
        pass
    chosen = f" --revision {revision}" if revision else ""
    advice = (
        f"on a machine with a network run 'hf download {name} config.json {WEIGHTS}{chosen} --local-dir FOLDER' (both "
        "are under vae/ in a pipeline), copy FOLDER here and give its path"
    )
    try:
        # one question with an end: the hub's client asks for half a minute until it gives up
        get_session().head(hf_hub_url(name, "config.json", revision=revision), timeout=_REACH_SEC)
    except Exception as error:  # its clients raise errors of their own kinds
        reason = str(error) or type(error).__name__
        raise FileNotFoundError(
            f"there is no folder {Path(name).resolve()}, and the hub cannot be reached for {name} ({reason}): {advice}"
        ) from error
    try:
        return _complete(Path(snapshot_download(name, revision=revision, allow_patterns=wanted)))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(f"the hub gives no VAE {name} ({reason}): correct the name, or {advice}") from error


def _complete(snapshot: Path) -> Path:
    """The folder itself, if there is a VAE in it."""
    _model_folder(snapshot)
    return snapshot


def _digest(kind: str, config: dict[str, Any], model: nn.Module) -> str:
    """Tells apart what encodes differently: class, configuration or weights."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}  # those say whence and by whom
    digest = hashlib.sha256(json.dumps([kind, plain], sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
