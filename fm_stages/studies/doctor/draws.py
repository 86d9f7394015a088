"""The doctor on what a step draws: noise that differs between ranks and steps, the batch, and the density of t."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from fm_stages.data import describe_shares
from fm_stages.oracle import StageProfile
from fm_stages.studies.doctor.lines import Line, judged
from fm_stages.studies.doctor.run import PlannedRun
from fm_stages.training import StageAware

NUM_STEPS = 2
"""Steps whose noise is compared."""

SHOWN = 16
"""Values of a noise image that tell it apart."""

NUM_TIMES = 8192
"""Draws of t, at least."""

NUM_BINS = 20

BARS = " ▁▂▃▄▅▆▇█"

LEAST_SHARE = 0.05
"""Of the draws before the boundary, and after it."""

FAR = 2.0
"""Kolmogorov's statistic sqrt(n) D that independent draws exceed in 7 of 10 000 cases; stratified ones scatter less."""


def check_noise(run: PlannedRun) -> Iterator[Line]:
    """Draws two steps of every rank, and compares noise, images and places."""
    noise, rows, places = [], [], []
    for rank in range(run.num_ranks):
        for number, batch in enumerate(islice(run.batches(rank), NUM_STEPS * run.accumulation)):
            step = number // run.accumulation
            with run.trainer.speaking_for(rank, step):
                x0 = run.module.draw(batch["x1"], batch["labels"], batch["position"])[1]
            noise.append(x0.flatten(1)[:, :SHOWN].clone())
            # image and its flip are one image
            rows.append(batch["index"] % run.data.num_train + step * run.data.num_train)
            places.append(batch["position"] + step * run.data.batch_size)
    yield judged_noise(torch.cat(noise), torch.cat(rows), torch.cat(places), run)


def judged_noise(noise: Tensor, rows: Tensor, places: Tensor, run: PlannedRun) -> Line:
    """The line on noise (n, values), images (n,) and places (n,) of all ranks and two steps, each step's apart."""
    same = len(noise) - len(noise.unique(dim=0))
    shared, gaps = len(rows) - len(rows.unique()), len(places) - len(places.unique())
    far = abs(noise.mean().item()) * noise.numel() ** 0.5
    keyed = "Key draws by (seed, step, position in the global batch), never by rank or by time alone"
    return judged(
        "noise",
        f"{len(noise)} noise images of {run.num_ranks} rank{'s' * (run.num_ranks > 1)} x {run.accumulation} "
        f"micro-batch{'es' * (run.accumulation > 1)} x {NUM_STEPS} steps: {same or 'no'} repeated; {shared or 'no'} "
        f"training images twice in a step; mean {noise.mean():.3f}, std {noise.std():.3f}",
        ("red", same > 0, f"Ranks or steps see the same noise. {keyed}: has the data `position` right?"),
        ("red", shared > 0, "Ranks are dealt the same images: give the sampler rank and number of ranks."),
        ("red", gaps > 0, "Two images of a step have the same position: number the places of the global batch."),
        ("red", far > 6 or abs(noise.std().item() - 1) > 0.2, "The noise is not N(0, 1)."),
    )


def check_batch(run: PlannedRun) -> Line:
    """Images per optimizer step over all ranks and micro-batches, and how often that is the whole set."""
    data, steps = run.data, run.max_steps
    epochs = steps / run.steps_per_epoch
    left = data.num_train % data.batch_size
    per_step = data.batch_size // (run.num_ranks * run.accumulation)
    return judged(
        "batch",
        f"{describe_shares(data.batch_size, run.num_ranks, run.accumulation)}; {run.steps_per_epoch} steps see all "
        f"{data.num_train} images, max_steps {steps:g} {epochs:.3g} times",
        ("yellow", epochs < 1, "The run ends before it has seen every image: is max_steps meant?"),
        ("yellow", left > data.num_train / 4, f"{left} images of an epoch are left over: take a smaller batch_size."),
        ("yellow", per_step == 1 < data.batch_size, "A rank takes one image at a time: it will idle; take fewer ranks "
         "or a larger micro_batch_size."),
    )  # fmt: skip


def draw_times(run: PlannedRun) -> Tensor:
    """Times (n,) float64 as the first steps of the run draw them."""
    size = run.data.batch_size
    blank, labels, place = torch.zeros(size, 1), torch.full((size,), -1), torch.arange(size)
    found = []
    for step in range(-(-NUM_TIMES // size)):
        with run.trainer.speaking_for(0, step):
            found.append(run.module.draw(blank, labels, place)[0].double())
    return torch.cat(found)


def check_times(run: PlannedRun, profile: StageProfile | None) -> Line:
    """The histogram of t, against the density that the run believes in and the stages of the data."""
    t = draw_times(run)
    timesteps = run.module.timesteps
    inside = bool(((t >= 0) & (t <= run.module.path.max_time)).all())
    counts = torch.histc(t, NUM_BINS, 0, 1)
    empty = [f"{i / NUM_BINS:.2f}" for i, count in enumerate(counts.tolist()) if count == 0]
    spread = t.std().item()
    far = _distance(t, timesteps.cdf(t).double()) if inside else 0.0
    found = (
        f"{type(timesteps).__name__}, {len(t)} draws from t = {t.min():.4f} to {t.max():.4f}, median {t.median():.3f}"
    )
    thin_early = thin_late = False
    if profile is not None and 0 < profile.boundary < 1:
        before = (t < profile.boundary).double().mean().item()
        found += f"; {before:.1%} before the boundary"
        thin_early, thin_late = before < LEAST_SHARE, before > 1 - LEAST_SHARE
    steering = run.callback(StageAware)
    if steering is not None and any(p.steers == "timesteps" and not p.dry_run for p in steering.policies):
        found += "; until the run's policy moves them"
    found += f"\nnoise t=0 |{histogram(counts)}| t=1 data"
    return judged(
        "times",
        found,
        ("red", not inside, f"t must lie in [0, {run.module.path.max_time:g}]: correct the sampler's icdf."),
        ("red", spread < 1e-3, "All draws are at one t: a network learns no flow from that."),
        ("red", far > FAR, f"Draws do not follow the sampler's own cdf (sqrt(n) D = {far:.1f}): icdf must be its "
         "inverse. Floors and importance weights rely on it."),
        ("yellow", bool(empty) and spread >= 1e-3, f"Bins without a draw, beginning at {', '.join(empty[:5])}: the "
         "network is never trained there, and a sampler passes through. Fine for an expert of one stage."),
        ("yellow", thin_early, "Few draws navigate: the gap can only be won before the boundary. `fm-stages profile` "
         "suggests a shift."),
        ("yellow", thin_late, "Few draws refine: details will be missing. `fm-stages profile` suggests a shift."),
    )  # fmt: skip


def histogram(counts: Tensor) -> str:
    """One character for each of (bins,) counts."""
    heights = (counts / counts.max() * (len(BARS) - 1)).ceil().int().tolist()
    return "".join(BARS[height] for height in heights)


def _distance(t: Tensor, expected: Tensor) -> float:
    """Kolmogorov's sqrt(n) D of draws (n,) whose distribution function takes these values (n,) there."""
    order = t.argsort()
    empirical = (torch.arange(len(t), dtype=torch.float64) + 0.5) / len(t)
    return ((expected[order] - empirical).abs().max() * len(t) ** 0.5).item()
