"""The doctor on the training set: its scale, copies, broken images, classes, and whether the bank is what is fed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from fm_stages.flow import keyed_normal, stratified_uniform
from fm_stages.oracle import DataBank, decompose
from fm_stages.studies.doctor.lines import Line, judged
from fm_stages.studies.doctor.run import PlannedRun
from fm_stages.studies.facts import USUAL_STD, Facts, facts_of
from fm_stages.training import check_first_batch, check_num_rows

COPIES = 0.1
"""Share of rows that are copies of others from which the set is not what its size says."""

BROKEN = 0.01
"""Share of constant images from which the set is broken."""

FAR_STD = (1 / 3, 3.0)
"""Within these the standard deviation is near the noise's: pixels in [-1, 1] have 0.5 to 0.8."""

UNEVEN = 3.0
"""Ratio of the largest to the smallest standard deviation of a channel."""

NUM_DRAWS = 512
"""Draws behind the identity."""

SUSPECT_Z, ALARM_Z = 3.0, 5.0
"""The second as in training."""


def check_rows(run: PlannedRun) -> Iterator[Line]:
    """Scale, channels, copies and constant images."""
    bank = run.bank
    if not isinstance(bank, DataBank):
        mean, rms = bank.mean.mean().item(), bank.rms_norm / bank.num_dims**0.5
        found = f"mean {mean:.3g}, root mean square {rms:.3g} per value (rows are distributions)"
        yield judged_scale(found, USUAL_STD[0] <= rms <= USUAL_STD[1])
        return
    facts = facts_of(bank)
    yield check_scale(facts)
    yield check_channels(facts)
    yield check_copies(facts)
    yield check_constant(facts)


def judged_scale(found: str, normalised: bool, near: bool = True) -> Line:
    """The line on mean and standard deviation."""
    remedy = "pixels belong in [-1, 1]; scale latents: --data.init_args.normalisation channels, or vae."
    return judged(
        "scale",
        found,
        ("red", not normalised, f"Nobody has scaled this data, and the noise has mean 0, std 1: {remedy}"),
        ("yellow", not near, f"Far from the noise's std 1: recipes for t expect another scale. Check: {remedy}"),
    )


def check_scale(facts: Facts) -> Line:
    """Mean, standard deviation and range of all values."""
    found = f"mean {facts.mean:.3g}, std {facts.std:.3g}, in [{facts.lowest:.3g}, {facts.highest:.3g}], as fed to the "
    found += "network (noise: mean 0, std 1)"
    return judged_scale(found, facts.is_normalised, FAR_STD[0] <= facts.std <= FAR_STD[1])


def check_channels(facts: Facts) -> Line:
    """The same by channel: one that dominates is what a network fits first."""
    pairs = list(zip(facts.channel_mean, facts.channel_std, strict=True))
    shown = ", ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in pairs[:8]) + (", ..." if len(pairs) > 8 else "")
    low, high = min(facts.channel_std), max(facts.channel_std)
    remedy = "Normalise each channel by itself: --data.init_args.normalisation channels, for latents."
    return judged(
        "channels",
        f"mean ± std of {len(pairs)}: {shown}",
        ("red", low == 0, f"A channel has the same value everywhere: is the data broken? {remedy}"),
        ("yellow", high > UNEVEN * low, f"Channels differ by a factor of {high / max(low, 1e-9):.1f}. {remedy}"),
    )


def check_copies(facts: Facts) -> Line:
    """Rows that are equal, to the last bit."""
    copies = facts.num_rows - facts.num_distinct
    few = (
        "They weigh as often as they are drawn. Fine if meant (an image that is its own flip counts); else remove them."
    )
    many = "Is this padding, or a file that was read twice? Remove the copies."
    return judged(
        "duplicate rows",
        f"{copies} of {facts.num_rows} rows are exact copies of others",
        ("red", copies > COPIES * facts.num_rows, many),
        ("yellow", copies > 0, few),
    )


def check_constant(facts: Facts) -> Line:
    """Images of one value."""
    num = facts.num_constant
    remedy = "Images of one value are mostly files that could not be decoded: look at them, and remove them."
    return judged(
        "constant images",
        f"{num} of {facts.num_rows}",
        ("red", num > BROKEN * facts.num_rows, remedy),
        ("yellow", num > 0, remedy),
    )


def check_labels(run: PlannedRun) -> Iterator[Line]:
    """Each class has rows; the null class is trained, and can be told from the others."""
    counts, dropout = run.bank.label_counts, run.module.label_dropout
    in_network = getattr(run.module.network, "num_classes", None)
    if not counts:
        yield judged(
            "classes",
            f"the data has no labels; the network was built for {in_network} classes"
            if in_network
            else "the data has no labels, and the network takes none",
            ("yellow", bool(in_network), "Its classes are never trained: set the network's num_classes to 0."),
        )
        return
    empty = sorted(set(range(run.data.num_classes)) - set(counts))
    single = [label for label, count in counts.items() if count == 1]
    spare = (in_network or 0) - run.data.num_classes
    seen = dropout < 1
    yield judged(
        "classes",
        f"{run.data.num_classes} classes of {min(counts.values())} to {max(counts.values())} rows; the network knows "
        f"{'an unknown number of' if in_network is None else in_network} classes",
        ("red", seen and bool(empty), f"No row has label {_some(empty)}: the network never learns it, and draws noise "
         "for it. Number the classes from 0 without gaps, or find the missing files."),
        ("yellow", seen and bool(single), f"Label {_some(single)} has a single row, which can only be memorized."),
        ("yellow", seen and spare > 0, f"{spare} classes of the network are never trained: never sample them, or set "
         f"its num_classes to {run.data.num_classes}."),
    )  # fmt: skip
    yield check_null(dropout, run.data.batch_size * run.max_steps)


def check_null(dropout: float, num_samples: float) -> Line:
    """Whether guidance will be possible: the network must have seen samples with label and without."""
    untrained = "The null class is never trained: no guidance, and samples without label are noise. Set "
    return judged(
        "null class",
        f"{dropout:.0%} of training samples have no label ({_number(dropout * num_samples)} in all): "
        + ("guidance is possible" if 0 < dropout < 1 else "no guidance"),
        ("yellow", dropout == 0, f"{untrained}--model.label_dropout 0.1 unless that is meant."),
        ("yellow", dropout == 1, "No label is ever seen, although the data has some: --model.label_dropout 0.1."),
        ("yellow", 0 < dropout < 0.01 or 0.5 < dropout < 1, "Guidance needs both: 0.1 is usual."),
    )


def check_membership(run: PlannedRun) -> Iterator[Line]:
    """Whether the first training batch consists of rows of the bank, bit for bit, and x_t is what the path says."""
    seen, bank = run.first_batch(), run.bank
    found, remedy, same = f"the bank has {bank.num_rows} rows for {run.data.num_train} training images", "", True
    try:
        check_num_rows(run.oracle, _as_trainer(run))
        check_first_batch(run.oracle, seen)
    except ValueError as error:
        remedy = f"{error}."
    else:
        found += f"; the first {len(seen['x1'])} images of rank 0 are among them"
        if "index" in seen and isinstance(bank, DataBank):
            same = torch.equal(bank.rows(seen["index"]), seen["x1"])
            found += ", bit for bit" if same else ", but not bit for bit"
    yield judged(
        "bank",
        found,
        ("red", bool(remedy), remedy),
        ("yellow", not same, "Batches and bank round differently, which near t = 1 looks like a floor: let both take "
         "the same stored values, scale and shift."),
    )  # fmt: skip
    yield check_path(run)


def check_path(run: PlannedRun) -> Line:
    """The path's ends, and that its velocity is its derivative: a custom one may run the other way."""
    path = run.module.path
    x0, x1 = keyed_normal(("doctor path", 0), torch.arange(2 * 64), (1,)).double().chunk(2)
    ends = [path.interpolate(x0, x1, torch.full((64,), t, dtype=torch.float64)) for t in (0.0, path.max_time)]
    wrong = max((end - x).abs().max().item() for end, x in zip(ends, (x0, x1), strict=True))
    t, h = torch.linspace(0.05, 0.95, 64, dtype=torch.float64), 1e-5
    slope = (path.interpolate(x0, x1, t + h) - path.interpolate(x0, x1, t - h)) / (2 * h)
    off = (slope - path.velocity(x0, x1, t)).abs().max().item()
    return judged(
        "path",
        f"{type(path).__name__}: from noise at t = 0 to data at t = 1 within {wrong:.2g}, its velocity is its "
        f"derivative within {off:.2g}",
        ("red", not wrong < 0.1, "t = 0 is noise and t = 1 is data here: turn the path's time round."),
        ("red", not off < 1e-3, "d_alpha and d_sigma are not the derivatives of alpha and sigma: correct them."),
    )


def check_identity(run: PlannedRun) -> Line:
    """Whether regular loss = gap + floor on training draws; it holds for any network, so for one that says 0."""
    num, draws, key = 0, [], ("doctor identity", 0)
    for batch in run.batches():
        size = min(len(batch["x1"]), NUM_DRAWS - num)
        draws.append({name: batch[name][:size] for name in ("x1", "labels")})
        num += size
        if num == NUM_DRAWS:
            break
    x1, labels = (torch.cat([draw[name] for draw in draws]) for name in ("x1", "labels"))
    place = torch.arange(num)
    t = stratified_uniform(key, place, num).clamp(max=run.module.path.max_time)
    x0 = keyed_normal(key, place, tuple(x1.shape[1:]))
    labels = torch.where(stratified_uniform((*key, "labels"), place, num) < run.module.label_dropout, -1, labels)
    parts = decompose(run.oracle, x0, x1, t, torch.zeros_like(x1), labels)
    residual = parts.identity.double()
    spread = residual.std().item() / num**0.5
    z = residual.mean().item() / spread if spread > 0 else 0.0
    remedy = (
        "The bank is not the distribution that is trained on: another augmentation, a coupling of noise and data, or "
        "labels that mean something else. Gap and floor of this run would be wrong."
    )
    return judged(
        "identity",
        f"regular {parts.regular.mean():.3f} = gap {parts.gap.mean():.3f} + floor {parts.floor.mean():.3f} of a "
        f"network that says 0, on {num} draws: z = {z:.1f} (chance: within ±3)",
        ("red", not abs(z) < ALARM_Z, remedy),
        (
            "yellow",
            abs(z) > SUSPECT_Z,
            f"Beyond chance in 1 of 370 cases; watch oracle/identity_z of the run. {remedy}",
        ),
    )


def _as_trainer(run: PlannedRun) -> Any:
    """What `check_num_rows` asks a Trainer for once there are loaders."""
    return SimpleNamespace(train_dataloader=run.data.train_dataloader(), datamodule=run.data)


def _some(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:5])) + (f" and {len(labels) - 5} others" if len(labels) > 5 else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "without end"
