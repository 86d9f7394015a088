"""The doctor on the network: what one forward says of shapes, of the null class and of the direction of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fm_stages.flow import Path, keyed_normal
from fm_stages.networks import forward_flops
from fm_stages.oracle import mean_square
from fm_stages.studies.doctor.lines import Line, judged
from fm_stages.studies.doctor.run import PlannedRun
from fm_stages.training import network_weights, read_checkpoint

TIMES = (0.1, 0.2, 0.8, 0.9)
"""None near 0.5, where reversed time is the same time."""

NUM_IMAGES = 64
"""Under noise at each of the times; fewer of a large network."""

FRESH = "fresh weights"

FLOPS = 4e12
"""Of all forwards together: minutes on a laptop's CPU, were it more."""

CLEAR = 3.0
"""Standard errors by which one direction must explain the velocity better than another."""

OTHERS = {
    "-v(x, t)": "the velocity points from data to noise (SD3's and REPA's sign): negate it",
    "v(x, 1-t)": "the network takes t = 0 for data: give it 1 - t",
    "-v(x, 1-t)": "time runs the other way (t = 0 is data there): import such weights with `fm-stages import`",
}
"""What a network would have learned elsewhere."""


def check_network(run: PlannedRun, weights: str | None) -> Iterator[Line]:
    """One forward on noisy training images, and for trained weights which way their velocity points.

    Args:
        run: its network has its weights.
        weights: what `load_weights` called them; None: fresh ones.
    """
    network = run.module.network
    network.eval()
    seen = noisy_images(run)
    try:
        velocity = predict(network, seen["x_t"], seen["t"], seen["labels"])
        null = predict(network, seen["x_t"][:2], seen["t"][:2], torch.full_like(seen["labels"][:2], -1))
    except Exception as error:  # what somebody else's network raises is anybody's guess
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        yield Line("forward", "red", f"{weights or FRESH}: network(x, t, y) fails on the data: {reason}", _CONTRACT)
        return
    yield check_forward(seen["x_t"], velocity, null, weights or FRESH)
    if weights is not None and velocity.shape == seen["x_t"].shape:
        yield check_direction(run.module.path, network, seen, velocity)


_CONTRACT = (
    "A network is forward(x, t, y) -> velocity, x (B, C, H, W), t (B,), y (B,) with -1 for the null class: build it "
    "for the data's shape and classes."
)


def load_weights(run: PlannedRun, file: str | None) -> str | None:
    """Give the network a checkpoint's weights, EMA where they are kept; says which they are, None: fresh ones.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or does not fit.
    """
    if file is None:
        return f"weights of {run.config.init_from}" if run.config.init_from else None
    checkpoint = read_checkpoint(file)
    kept = {kind: network_weights(checkpoint, ema=kind == "EMA") for kind in ("EMA", "raw")}
    kind, state = next(((k, s) for k, s in kept.items() if s is not None), ("", None))
    if state is None:
        raise ValueError(f"{file} holds no weights named network.*")
    try:
        run.module.network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the network of the config: {' '.join(str(error).split())}") from error
    return f"{kind} weights of {file}, step {checkpoint.get('global_step', 0)}"


def noisy_images(run: PlannedRun) -> dict[str, Tensor]:
    """Training images under noise at `TIMES`, as many of each as `FLOPS` allows: ``x0, x1, x_t, t, labels``."""
    batch = next(run.batches())
    x1, labels = batch["x1"][:NUM_IMAGES], batch["labels"][:NUM_IMAGES]
    one = forward_flops(run.module.network, x1[:1], torch.zeros(1), labels[:1]) or 0
    calls = len(TIMES) * 2
    num = max(2, min(len(x1), int(FLOPS // (one * calls)) if one else len(x1)))
    x1, labels = x1[:num].repeat(len(TIMES), 1, 1, 1), labels[:num].repeat(len(TIMES))
    if run.module.label_dropout == 1:
        labels = torch.full_like(labels, -1)
    t = torch.tensor(TIMES).repeat_interleave(len(x1) // len(TIMES))
    x0 = keyed_normal(("doctor network", 0), torch.arange(len(x1)), tuple(x1.shape[1:]))
    return {"x0": x0, "x1": x1, "x_t": run.module.path.interpolate(x0, x1, t), "t": t, "labels": labels}


@torch.no_grad()
def predict(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The velocity of noisy images (B, ...), a few at a time, as the network gives it."""
    parts = [part.split(32) for part in (x_t, t, labels)]
    return torch.cat([network(*one) for one in zip(*parts, strict=True)])


def check_forward(x_t: Tensor, velocity: Tensor, null: Tensor, weights: str) -> Line:
    """Shape, kind and finiteness of what came out; with labels and without."""
    fits = velocity.shape == x_t.shape
    finite = bool(velocity.isfinite().all() and null.isfinite().all())
    size = velocity.float().square().mean().sqrt().item()
    return judged(
        "forward",
        f"{weights}: {tuple(velocity.shape[1:])} {str(velocity.dtype).removeprefix('torch.')} for images "
        f"{tuple(x_t.shape[1:])} at t = {TIMES[0]:g} to {TIMES[-1]:g}, with label and without; root mean square "
        f"{size:.3g}{' (a zero start, as DiT draws it)' if size == 0 else ''}",
        ("red", not fits, f"The velocity must have the shape of the images. {_CONTRACT}"),
        ("red", not finite, "Some values are not finite: the weights are broken, or the initialisation is."),
        ("red", not velocity.is_floating_point(), "A velocity is a floating point tensor."),
        ("yellow", finite and size > 100, "Noise and data have values near 1: this start is far out."),
    )


def check_direction(path: Path, network: nn.Module, seen: dict[str, Tensor], velocity: Tensor) -> Line:
    """Whether v(x_t, t) explains x1 - x0 (the path's conditional target) better than the other three directions do."""
    target = path.velocity(seen["x0"], seen["x1"], seen["t"])
    turned = predict(network, seen["x_t"], 1 - seen["t"], seen["labels"]).float()
    guesses = {"v(x, t)": velocity.float(), "-v(x, t)": -velocity.float(), "v(x, 1-t)": turned, "-v(x, 1-t)": -turned}
    losses = {name: mean_square(guess - target).double() for name, guess in guesses.items()}
    ours, zero = losses.pop("v(x, t)"), mean_square(target).double()
    leads = {name: _lead(ours, other) for name, other in losses.items()}
    closest = min(leads, key=lambda name: leads[name])
    unsure = [name for name, lead in leads.items() if lead < CLEAR]
    cosine = torch.cosine_similarity(velocity.float().flatten(1), target.flatten(1)).mean().item()
    return judged(
        "direction",
        f"cosine of v with {'x1 - x0' if type(path).__name__ == 'LinearPath' else 'the target'} {cosine:.2f}; loss "
        f"{ours.mean():.3f}, of 0 {zero.mean():.3f}, "
        + ", ".join(f"of {name} {loss.mean():.3f}" for name, loss in losses.items()),
        ("red", leads[closest] < -CLEAR, f"Wrong way: {OTHERS[closest]}. Here t = 0 is noise, t = 1 is data."),
        ("yellow", _lead(ours, zero) < CLEAR, "No better than a network that says 0: are these weights trained, and on "
         "data of this scale?"),
        ("yellow", bool(unsure), f"Not told from {', '.join(unsure)}: these weights hardly look at t yet."),
    )  # fmt: skip


def _lead(ours: Tensor, other: Tensor) -> float:
    """By how many standard errors our loss (B,) is lower than another on the same draws."""
    difference = other - ours
    error = difference.std().item() / len(difference) ** 0.5
    mean: float = difference.mean().item()
    return mean / error if error > 0 else 0.0
