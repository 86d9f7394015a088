"""What an exported folder runs on: copied there with all that it needs of the package, and used by nothing else.

diffusers calls 1 - t ``sigma`` and counts its timesteps from 1000 down to 0; its step from one sigma to the next adds
(sigma_next - sigma) times what a model gives, which is why it gets the velocity with the other sign.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fm_stages.flow import SAME_TIME, Guidance, Velocity, shift_time, time_grid


class VelocityNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both name their config file
    """A network in diffusers' clothes: ``forward(x, t, y) -> velocity``, t = 0 is noise and t = 1 data.

    Args:
        arguments: of the network's own class.
    """

    architecture: ClassVar[type[nn.Module]]

    @register_to_config
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network = self.architecture(**arguments)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Velocity at x (B, C, S, S) and t (B,), for labels y (B,), -1 = without: in the shape of x."""
        return self.network(x.to(self.dtype), t, y)


class FlowMatchingPipeline(DiffusionPipeline):
    """Draws images from noise along a network's velocity, by Euler steps: as ``fm-stages sample`` does.

    Args:
        network: a `VelocityNetwork`.
        scheduler: steps along the time grid; its ``shift`` s puts more steps near noise where it is above 1.
        path: the network was trained on; only `LinearPath` allows stochastic_sampling.
        num_classes: labels that the network knows, 0 for none.
        null_class: whether it was trained without labels, too.
        pixels: whether it draws pixels in [-1, 1], and not latents or what nobody told.
        num_inference_steps: unless a call says otherwise, as all that follow.
        guidance_scale: of classifier-free guidance; 1 is none.
        guidance_low: t from which on there is guidance; 0 is noise, 1 is data.
        guidance_high: t up to which there is guidance.
    """

    model_cpu_offload_seq: Any = "network"
    network: Any
    scheduler: Any

    def __init__(
        self,
        network: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        path: str = "LinearPath",
        num_classes: int = 0,
        null_class: bool = True,
        pixels: bool = True,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,  # two numbers: diffusers 0.36 fails on a pair
        guidance_high: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.register_to_config(
            path=path,
            num_classes=num_classes,
            null_class=null_class,
            pixels=pixels,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images; arguments that are None are those of the folder.

        Args:
            class_labels: one for each image, or one for all, -1 = without; None: all without.
            batch_size: number of images, where neither labels nor noise tell it; default: 1.
            num_inference_steps: Euler steps, each with one evaluation of the network.
            guidance_scale: of classifier-free guidance; 1 is none.
            guidance_interval: two times in [0, 1] between which there is guidance; 0 is noise, 1 is data.
            guidance_channels: how many channels it moves; None: all.
            generator: of the noise; one for each image, or one for all.
            latents: the noise itself, (B, C, S, S).
            output_type: ``pil``, ``np`` (B, S, S, C) or ``pt`` (B, C, S, S), in [0, 1]; or ``latent``, (B, C, S, S)
                as the network draws it, not clamped.
            return_dict: whether to return an `ImagePipelineOutput`, and not a tuple.

        Raises:
            ValueError: if the network cannot do what is asked for.
        """
        settings: Any = self.config
        self._check(output_type)
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        low, high = guidance_interval or (settings.guidance_low, settings.guidance_high)
        guidance = Guidance(scale, (low, high), guidance_channels)
        if guidance.is_on and not (settings.num_classes and settings.null_class):
            raise ValueError(f"guidance_scale={scale} needs a network that was trained with labels and without: take 1")
        device = self._execution_device
        labels = self._labels(class_labels, batch_size, latents).to(device)
        inner = self.network.network
        shape = (len(labels), inner.in_channels, inner.input_size, inner.input_size)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, these images need {shape}")
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device).float()
        num_steps = settings.num_inference_steps if num_inference_steps is None else num_inference_steps
        grid = time_grid(num_steps, self.scheduler.config.shift, guidance.nodes)
        x = self._along(grid, guidance.fields(self.network, labels), noise, generator)
        self.maybe_free_model_hooks()
        images = self._as(output_type, x)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _along(self, grid: Tensor, fields: list[tuple[float, Velocity]], x: Tensor, generator: Any) -> Tensor:
        """The scheduler's steps from noise x (B, ...) along a time grid (num_steps + 1,)."""
        scheduler = self.scheduler
        # the scheduler shifts what it is given, and by default it would take another grid
        plain = shift_time(grid[:-1].double(), 1 / scheduler.config.shift)
        scheduler.set_timesteps(sigmas=(1 - plain).tolist(), device=x.device)
        scheduler.set_begin_index(0)
        for timestep in self.progress_bar(scheduler.timesteps):
            t = 1 - timestep / scheduler.config.num_train_timesteps
            velocity = [field for start, field in fields if start <= t + SAME_TIME][-1]
            x = scheduler.step(-velocity(x, t.expand(len(x))), timestep, x, generator=generator, return_dict=False)[0]
        return x

    def _as(self, output_type: str, x: Tensor) -> Any:
        """Images (B, C, S, S) in [-1, 1] as a kind of output."""
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

    def _check(self, output_type: str) -> None:
        """Refuse what would end in wrong images."""
        settings: Any = self.config
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: there are pil, np, pt and latent")
        if output_type != "latent" and not settings.pixels:
            raise ValueError(f"output_type={output_type!r}: the network draws no pixels, take 'latent' and decode them")
        if getattr(self.scheduler.config, "stochastic_sampling", False) and settings.path != "LinearPath":
            raise ValueError(f"stochastic_sampling takes a linear path, and the network was trained on {settings.path}")

    def _labels(self, labels: int | Sequence[int] | Tensor | None, batch_size: int | None, noise: Any) -> Tensor:
        """A label for each image, (B,) int64."""
        settings: Any = self.config
        known, num = settings.num_classes, batch_size or (1 if noise is None else len(noise))
        if labels is None:
            labels = -1
        found = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
        found = found.expand(num) if found.ndim == 0 else found
        if found.ndim != 1 or (batch_size or len(found)) != len(found):
            raise ValueError(f"class_labels are of shape {tuple(found.shape)}: give one, or one for each image")
        if wrong := [label for label in found.tolist() if not -1 <= label < known]:
            classes = f"0 to {known - 1}, and -1 for none" if known else "none, leave class_labels out"
            raise ValueError(f"there is no class {wrong[0]}: the network knows {classes}")
        if bool((found == -1).any()) and not settings.null_class:
            raise ValueError(f"the network was trained with labels only: give class_labels from 0 to {known - 1}")
        return found
