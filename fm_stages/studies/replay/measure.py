"""A step of training once more, with an eye on where values stop being finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fm_stages.training import FlowMatching


@dataclass
class Found:
    """What a micro-batch gave, this time.

    Attributes:
        error: (B,) squared error of each sample.
        first: where the first value arose that is not finite, in words; empty if all are finite.
        gradients: trained tensors whose gradient is not finite, so far.
    """

    error: Tensor
    first: str
    gradients: list[str] = field(default_factory=list)


class Watch:
    """Notes the first value that is not finite, in a network's forward and backward pass."""

    def __init__(self) -> None:
        self.first = ""

    def note(self, value: Any, where: str) -> None:
        """Note ``where``, if it is the first place with a tensor that is not finite."""
        if self.first:
            return
        tensors = [x for x in (value if isinstance(value, tuple | list) else [value]) if isinstance(x, Tensor)]
        bad = [x for x in tensors if x.is_floating_point() and not x.isfinite().all()]
        if bad:
            wrong = ~bad[0].isfinite()
            rows = wrong.flatten(1).any(1).nonzero()[:, 0].tolist() if wrong.ndim > 1 else []
            some = f", in rows {_some(rows)} of {len(wrong)}" if rows else ""
            self.first = f"{where}: {int(wrong.sum())} of {wrong.numel()} values{some}"

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """Watch a network."""
        handles = []
        for name, module in network.named_modules():
            title = f"{'network' + '.' * bool(name) + name} ({type(module).__name__})"
            handles += [
                module.register_forward_hook(self._after_forward(title)),
                module.register_full_backward_pre_hook(self._before_backward(title)),
                module.register_full_backward_hook(self._after_backward(title)),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_forward(self, title: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            weights = [name for name, p in module.named_parameters(recurse=False) if not p.isfinite().all()]
            why = f", whose {weights[0]} is not finite itself" if weights else ", whose inputs are finite"
            self.note(output, f"forward, output of {title}{why}")

        return hook

    def _before_backward(self, title: str) -> Any:
        return lambda module, gradients: self.note(gradients, f"backward, gradient that arrives at {title}")

    def _after_backward(self, title: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            self.note(inputs, f"backward, gradient that leaves {title}, which a finite one arrived at")

        return hook


def replay_part(module: FlowMatching, part: dict[str, Tensor], step: int, precision: str, share: float) -> Found:
    """A micro-batch forward and backward; gradients add up in the module.

    Args:
        module: with the weights of the step, and on its device.
        part: ``x1, x0, t, labels`` and, where known, ``index``, (B, ...) each.
        step: of the run.
        precision: of the run's Trainer.
        share: of the micro-batch in the step's loss.
    """
    watch = Watch()
    for name in ("x1", "x0", "t"):
        watch.note(part[name], f"input, {name} of the batch")
    x0, x1, t, labels = (part[name] for name in ("x0", "x1", "t", "labels"))
    x_t = module.path.interpolate(x0, x1, t)
    watch.note(x_t, "input, x_t of the batch")
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    module.target.step = step
    with (
        torch.autocast(x1.device.type, dtype=dtype, enabled=dtype is not None),
        watch.of(module.network),
        torch.compiler.set_stance("force_eager"),
    ):
        prediction = module.network(x_t, t, labels).float()
        watch.note(prediction, "forward, the prediction")
        target = module.target(module.path, x0, x1, t, labels, part.get("index"))
        watch.note(target, "the target")
        error = (prediction - target).square().flatten(1).mean(1)
        watch.note(error, "the squared error")
        weight = module.weighting(t)
        watch.note(weight, "the loss's weights")
        loss = (weight * error).mean()
        watch.note(loss, "the loss")
        with warnings.catch_warnings():  # that a hook sees no gradient of x_t, which nobody asks for
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            (share * (loss + module.weighting.own_loss(t, error))).backward()
    bad = [name for name, p in module.network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if bad and not watch.first:
        watch.first = f"backward, gradient of network.{bad[-1]}"
    return Found(error.detach(), watch.first, bad)


def gradient_norm(module: nn.Module) -> float:
    """Of everything that has a gradient."""
    return get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
