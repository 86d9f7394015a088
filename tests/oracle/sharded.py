"""Started on several ranks by test_sharded.py: asks a sharded bank everything, and leaves the answers in a folder.

Usage: python -m torch.distributed.run --standalone --nproc_per_node R sharded.py FOLDER DEVICE

A case is data that every process makes for itself. `answers` is what both a rank and the test, which has the whole bank
in one process, ask of it; a rank asks with its share of the queries.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path as FilePath

import torch
import torch.distributed as dist
from torch import Tensor

from fm_stages.flow import CosinePath, LinearPath, Path, VPPath
from fm_stages.oracle import DataBank, Oracle, StageProfile, Wiener, decompose, exact
from fm_stages.oracle.skipping import certified, measure_nearest

TIMEOUT_SEC = 200
"""A launch takes some 20 s; after this time a rank ends itself and says where it stood."""

NUM_QUERIES = 24
QUERIES = {
    1: [(24,)],
    2: [(24, 0), (5, 19)],
    3: [(11, 0, 13), (1, 23, 0)],
    4: [(3, 0, 20, 1), (0, 0, 24, 0)],
}
"""Of so many ranks: how many of a case's queries each has, in a first and in a second call."""

ROWS = {1: [1.0], 2: [0.7, 0.3], 3: [7 / 30, 20 / 30, 3 / 30], 4: [0.3, 0.05, 0.4, 0.25]}
"""Share of the rows that each rank brings."""


@dataclass
class Case:
    """A training set with its queries: x_t = interpolate(x0, rows of index, t)."""

    x1: Tensor
    labels: Tensor | None
    index: Tensor
    t: Tensor
    asked: Tensor | None  # labels of the queries
    path: Path
    affine: tuple = (1.0, 0.0)
    tolerance: float = 1e-12  # small, so that what a rank leaves out does not show
    max_queries: int = exact.MAX_QUERIES
    copied: bool = False  # the last rank brings nothing but copies of the first rank's rows

    def shard(self, rank: int, num_ranks: int) -> slice:
        ends = [round(sum(ROWS[num_ranks][:r]) * len(self.x1)) for r in range(num_ranks + 1)]
        return slice(ends[rank], ends[rank + 1])

    def bank(self, device: str, rank: int = 0, num_ranks: int = 1, group: dist.ProcessGroup | None = None) -> DataBank:
        own = self.shard(rank, num_ranks)
        labels = None if self.labels is None else self.labels[own].to(device)
        return DataBank(self.x1[own].to(device), labels, *self.affine, group=group)

    def x0(self) -> Tensor:
        return torch.randn(len(self.t), *self.x1.shape[1:], generator=torch.Generator().manual_seed(5))


def make_cases(num_ranks: int) -> dict[str, Case]:
    """All cases; the rows are the same for any number of ranks, but for the copies."""
    generator = torch.Generator().manual_seed(1)

    def images(num: int, *shape: int) -> Tensor:
        return torch.randn(num, *shape, generator=generator)

    def queries(num_rows: int) -> dict[str, Tensor]:
        index = torch.randint(num_rows, (NUM_QUERIES,), generator=generator)
        t = torch.cat([torch.tensor([0.0, 1.0]), torch.linspace(0.02, 0.98, NUM_QUERIES - 2)])
        return {"index": index, "t": t[torch.randperm(NUM_QUERIES, generator=generator)]}

    def asking(labels: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Some of the row's class, some unconditional, and some of any class that there is."""
        kind = torch.arange(NUM_QUERIES) % 3
        foreign = labels[torch.randint(len(labels), (NUM_QUERIES,), generator=generator)]
        return torch.where(kind == 0, labels[drawn["index"]], torch.where(kind == 1, -1, foreign))

    cases = {}
    for path in (LinearPath(), CosinePath(), VPPath()):
        rows = images(60, 1, 4, 4)
        cases[f"plain {type(path).__name__}"] = Case(rows, None, **queries(60), asked=None, path=path)
    cases["nothing left out"] = dataclasses.replace(cases["plain LinearPath"], tolerance=0.0)
    cases["usual tolerance"] = dataclasses.replace(cases["plain LinearPath"], tolerance=1e-6)

    # classes 0 to 2 everywhere; 7 in the first rows and 9 in the last row only, so on one rank each
    labels = torch.randint(3, (60,), generator=generator)
    labels[:5], labels[-1] = 7, 9
    drawn = queries(60)
    drawn["index"][:2] = torch.tensor([0, 59])
    asked = asking(labels, drawn)
    asked[:4] = torch.tensor([7, 9, 9, 7])
    cases["classes"] = Case(images(60, 2, 3), labels, **drawn, asked=asked, path=LinearPath())

    # the last rank has copies of the first rank's rows alone, under the same labels; others occur under two labels
    x1, labels = images(60, 12), torch.randint(2, (60,), generator=generator)
    case = Case(x1, labels, **queries(60), asked=None, path=LinearPath(), copied=True)
    first, last = case.shard(0, num_ranks), case.shard(num_ranks - 1, num_ranks) if num_ranks > 1 else slice(50, 60)
    middle = slice(last.start - 3, last.start)
    x1[middle], labels[middle] = x1[1:4], 1 - labels[1:4]
    source = torch.arange(last.stop - last.start) % min(4, first.stop)
    x1[last], labels[last] = x1[source], labels[source]
    case.index[:6] = torch.tensor([0, 1, 2, 3, 59, 58])
    case.t[:6] = torch.tensor([0.6, 0.8, 0.9, 0.95, 0.9, 0.7])
    cases["copies"] = dataclasses.replace(case, asked=asking(labels, {"index": case.index}))
    cases["copies without labels"] = dataclasses.replace(case, labels=None)

    pixels = torch.randint(256, (60, 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.arange(60) % 2
    per_value = torch.linspace(0.5, 2, 16).reshape(1, 4, 4) / 127.5, torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    for name, x1, affine in (
        ("uint8", pixels, (1 / 127.5, -1.0)),
        ("uint8 by value", pixels, per_value),
        ("bfloat16", images(60, 1, 4, 4).bfloat16(), (1.0, 0.0)),
        ("float16", images(60, 1, 4, 4).half(), (0.7, 0.1)),
        ("float64", images(60, 1, 4, 4).double(), (1.0, 0.0)),
    ):
        drawn = queries(60)
        cases[name] = Case(x1, labels, **drawn, asked=asking(labels, drawn), path=LinearPath(), affine=affine)

    # pairs that differ by one grey level in one value, their halves far apart in the bank: float32 logits confuse them
    half = torch.randint(256, (40, 16, 16), generator=generator) / 127.5 - 1
    twin = half.clone()
    twin[:, 3, 5] += 1 / 127.5
    drawn = queries(80)
    drawn["t"] = torch.tensor([0.95, 0.98, 0.99, 0.995, 0.999, 0.9999]).repeat(4)
    cases["twins"] = Case(torch.cat([half, twin]), None, **drawn, asked=None, path=LinearPath())

    labels = torch.arange(500) % 5
    drawn = queries(500)
    cases["several passes"] = Case(
        images(500, 8), labels, **drawn, asked=asking(labels, drawn), path=LinearPath(), max_queries=5
    )
    return cases


def answers(case: Case, bank: DataBank, own: slice) -> dict[str, object]:
    """All that can be asked of a bank, with some of the case's queries."""
    device = bank.device
    index, t, x0 = case.index[own].to(device), case.t[own].to(device), case.x0()[own].to(device)
    asked = None if case.asked is None else case.asked[own].to(device)
    oracle, wiener = Oracle(bank, case.path, case.tolerance), Wiener(bank, case.path)
    exact.MAX_QUERIES = case.max_queries
    rows = bank.rows(index)
    x_t = case.path.interpolate(x0, rows, t)
    inside = (t > 0) & (t < 1)
    prediction = torch.cos(3 * x_t)
    parts = decompose(oracle, x0, rows, t, prediction, asked, wiener=wiener)
    by_index = decompose(oracle, x0, torch.full_like(x0, torch.nan), t, prediction, asked, index)
    return {
        **{f"posterior.{name}": x for name, x in vars(oracle.posterior(x_t, t, asked)).items()},
        "velocity": oracle.velocity(x_t[inside], t[inside], None if asked is None else asked[inside]),
        "target": oracle.target(x0, rows, t, asked),
        "target by index": oracle.target(x0, torch.full_like(x0, torch.nan), t, asked, index),
        **{f"decompose.{name}": x for name, x in vars(parts).items()},
        "gap by index": by_index.gap,
        "wiener": wiener.mean(x_t, t),
        "rows": rows,
        "labels_of": bank.labels_of(index),
        "rows in a matrix's index type": bank.rows(index.int()),
    }


def facts(case: Case, bank: DataBank) -> dict[str, object]:
    """What a bank knows, the same on all ranks."""
    oracle = Oracle(bank, case.path, case.tolerance)
    profile = StageProfile.measure(oracle, 0.5, num_queries=16, num_times=4, by_label=True)
    return {
        "mean": bank.mean,
        "covariance": bank.covariance(),
        "norms": torch.tensor([bank.rms_norm, bank.max_norm, bank.max_spread]).double(),
        "label_counts": bank.label_counts,
        "counts": (bank.num_rows, bank.num_distinct, len(bank), bank.classes, bank.has_labels, bank.shape),
        **{f"profile.{name}": x for name, x in as_tensors(dataclasses.asdict(profile)).items()},
    }


def as_tensors(fields: dict[str, object]) -> dict[str, object]:
    """Numbers and lists of numbers, nested ones by name.name, as tensors; the rest as it is."""
    found = {}
    for name, x in fields.items():
        if isinstance(x, dict):
            found |= {f"{name}.{inner}": y for inner, y in as_tensors(x).items()}
        else:
            found[name] = x if x is None or isinstance(x, str) else torch.tensor(x)
    return found


def profiles(case: Case, bank: DataBank) -> dict[int, dict[str, object]]:
    """Profiles by number of queries, of which some ranks may have none."""
    oracle = Oracle(bank, case.path, case.tolerance)
    found = {num: StageProfile.measure(oracle, 0.4, num_queries=num, num_times=12) for num in (1, 2, 3, 33)}
    return {num: as_tensors(dataclasses.asdict(profile)) for num, profile in found.items()}


def skipping(case: Case, bank: DataBank, own: slice) -> dict[str, object]:
    """Targets by index with queries left out, those of the first half of the case's queries all."""
    case = dataclasses.replace(case, t=late_first(case))
    measure_nearest(bank)
    device = bank.device
    index, t, x0 = case.index[own].to(device), case.t[own].to(device), case.x0()[own].to(device)
    rows, wide = bank.rows(index), t.double()
    coefficients = case.path.alpha(wide)[:, None], case.path.sigma(wide)[:, None]
    x_t = case.path.interpolate(x0, rows, t)
    oracle = Oracle(bank, case.path)
    return {
        "skipped": certified(bank, x_t.flatten(1), rows.flatten(1), *coefficients, index, oracle.tolerance),
        "target": oracle.target(x0, rows, t, None, index),
        "gap": decompose(oracle, x0, rows, t, torch.cos(3 * x_t), None, index).gap,
        "mean": oracle.posterior(x_t, t, None, index).mean,
        "mean without": oracle.posterior(x_t, t).mean,
    }


def skippers(rank: int) -> slice:
    """Queries of a rank: even ranks skip all of theirs."""
    return slice(0, NUM_QUERIES // (2 - rank % 2))


def late_first(case: Case) -> Tensor:
    """Times of which the first half are so late that their queries are skipped, and some of the others are not."""
    half = len(case.t) // 2
    return torch.cat([torch.full((half,), 0.999), torch.linspace(0.1, 0.9, len(case.t) - half)])


def num_bytes(bank: DataBank) -> int:
    """Memory of all tensors that a bank holds, each storage once."""
    storages = [x.untyped_storage() for x in vars(bank).values() if isinstance(x, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory(rank: int, num_ranks: int, group: dist.ProcessGroup, device: str) -> dict[str, float]:
    """Bytes that this rank holds over its share of the data's."""
    generator, num = torch.Generator().manual_seed(rank), 6000
    found = {}
    for dtype, measured in ((torch.float32, True), (torch.bfloat16, True), (torch.uint8, False)):
        x1 = torch.randint(256, (num // num_ranks, 784), generator=generator, dtype=torch.uint8).to(device, dtype)
        bank = DataBank(x1, torch.arange(len(x1), device=device) % 10, 0.5, group=group)
        if measured:
            bank.nearest = torch.zeros(bank.num_rows, device=device)
        found[str(dtype)] = num_bytes(bank) / (bank.num_rows * 784 * x1.element_size() / num_ranks)
    return found


def mistakes(
    rank: int, num_ranks: int, group: dist.ProcessGroup, device: str, case: Case, bank: DataBank
) -> dict[str, Callable[[], object]]:
    """Calls that the last rank, or each rank in its own way, gets wrong."""
    last = rank == num_ranks - 1
    x1 = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(rank)).to(device)
    labels = torch.arange(6, device=device)
    hurt = x1.clone()
    hurt[4, 0, 1, 2] = torch.nan
    by_value = torch.linspace(1, 2, 4, device=device)
    turned = by_value.flip(0) if last else by_value
    oracle = Oracle(bank, case.path)
    x, t, index = x1[:3], torch.full((3,), 0.5, device=device), torch.arange(3, device=device)
    bad_time, bad_index = t.clone(), index.clone()
    bad_time[1] = 1.5 if last else 0.5
    bad_index[1] = bank.num_rows if last else 0
    ones = torch.ones_like(index)

    def other(value: object, usual: object) -> object:
        return value if last else usual

    def wrong_prediction() -> None:
        decompose(oracle, x, x, t, x[:, :, :3] if last else x)

    return {
        "D": lambda: DataBank(x1[..., :3] if last else x1, group=group),
        "dtype": lambda: DataBank(x1.half() if last else x1, group=group),
        "having labels": lambda: DataBank(x1, None if last else labels, group=group),
        "scale": lambda: DataBank(x1, scale=other(0.5, 1.0), group=group),
        "scale by value": lambda: DataBank(x1, scale=turned, group=group),
        "shift": lambda: DataBank(x1, shift=other(0.5, 0.0), group=group),
        "scale that does not fit": lambda: DataBank(x1, scale=other(by_value[:3], 1.0), group=group),
        "no rows": lambda: DataBank(x1[:0] if last else x1, group=group),
        "NaN": lambda: DataBank(hurt if last else x1, group=group),
        "negative label": lambda: DataBank(x1, labels - 1 if last else labels, group=group),
        "no tensor": lambda: DataBank([[1.0]] if last else x1, group=group),
        "tolerance": lambda: Oracle(bank, case.path, other(1e-4, 1e-6)).posterior(x, t),
        "path": lambda: Oracle(bank, other(CosinePath(), case.path)).posterior(x, t),
        "path's numbers": lambda: Oracle(bank, VPPath(other(0.2, 0.1))).posterior(x, t),
        "class": lambda: oracle.posterior(x, t, other(5 * ones, ones)),
        "labels' shape": lambda: oracle.posterior(x, t, other(ones[:2], ones)),
        "shape": lambda: oracle.posterior(x[:, :, :3] if last else x, t),
        "time": lambda: oracle.posterior(x, bad_time),
        "time of a velocity": lambda: oracle.velocity(x, torch.ones_like(t) if last else t),
        "time of a target": lambda: oracle.target(x, x, bad_time, None, index),
        "one time too few": lambda: oracle.target(x, x, t[:2] if last else t, None, index),
        "shape of a target": lambda: oracle.target(x, x[:2] if last else x, t),
        "device": lambda: oracle.posterior(x.to("meta") if last else x, t),
        "device of the times": lambda: oracle.posterior(x, t.to("meta") if last else t),
        "device of a target's data": lambda: oracle.target(x, x.to("meta") if last else x, t),
        "device of a prediction": lambda: decompose(oracle, x, x, t, x.to("meta") if last else x),
        "time of a decomposition": lambda: decompose(oracle, x, x, t[:2] if last else t, x, None, index),
        "NaN in a query": lambda: oracle.posterior(x * (torch.nan if last else 1), t),
        "large rows": lambda: DataBank(x1.float() * (1e25 if last else 1), group=group),
        "index": lambda: bank.rows(bad_index),
        "index of labels": lambda: bank.labels_of(bad_index),
        "index of a target": lambda: oracle.target(x, x, t, None, bad_index),
        "index that is a mask": lambda: bank.rows(other(index > 0, index)),
        "index on one rank": lambda: oracle.target(x, x, t, None, index if last else None),
        "index of a decomposition on one rank": lambda: decompose(oracle, x, x, t, x, None, index if last else None),
        "prediction": wrong_prediction,
    }


def collectives(call: Callable[[], object]) -> dict[str, int]:
    """How often a call goes through each collective."""
    counts = dict.fromkeys(("all_gather", "all_reduce", "all_gather_object"), 0)
    originals = {name: getattr(dist, name) for name in counts}

    def counting(name: str) -> Callable:
        def run(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return run

    for name in counts:
        setattr(dist, name, counting(name))
    try:
        call()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


def to_cpu(value: object) -> object:
    if isinstance(value, dict):
        return {name: to_cpu(x) for name, x in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def run(folder: FilePath, device: str) -> None:
    """Everything, of one rank."""
    rank, num_ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    cases = make_cases(num_ranks)
    left: dict[str, object] = {"answers": {}, "facts": {}, "stored": {}}
    for name, case in cases.items():
        bank = case.bank(device, rank, num_ranks, group)
        left["stored"][name] = bank.num_stored
        left["facts"][name] = facts(case, bank)
        for turn, sizes in enumerate(QUERIES[num_ranks]):
            own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            left["answers"][name, turn] = answers(case, bank, own)
    exact.MAX_QUERIES = Case.max_queries

    case = cases["plain LinearPath"]
    bank = case.bank(device, rank, num_ranks, group)
    oracle, whole = Oracle(bank, case.path), slice(0, NUM_QUERIES)
    index, t, x0 = case.index.to(device), case.t.to(device) * 0.9, case.x0().to(device)
    left["nobody asks"] = answers(case, bank, slice(0, 0))["target by index"].shape
    left["collectives"] = {
        "posterior": collectives(lambda: oracle.posterior(x0, t)),
        "target": collectives(lambda: oracle.target(x0, x0, t, None, index)),
    }
    left["skipping"] = skipping(case, bank, skippers(rank))
    left["nearest"] = bank.nearest
    left["profiles"] = profiles(cases["classes"], cases["classes"].bank(device, rank, num_ranks, group))
    left["all skipped"] = oracle.target(x0, x0, torch.full_like(t, 0.9999), None, index)

    left["memory"] = memory(rank, num_ranks, group, device)
    errors: dict[str, str] = {}
    left["errors"] = errors
    labelled = DataBank(torch.randn(5, 1, 4, 4, device=device), torch.ones(5, device=device).long(), group=group)
    for name, call in mistakes(rank, num_ranks, group, device, case, labelled).items():
        try:
            call()
            errors[name] = "no error"
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
        following = labelled.rows(torch.tensor([rank], device=device))
        assert following.shape == (1, 1, 4, 4), name
    left["afterwards"] = answers(case, bank, whole)["target"]
    left = {name: to_cpu(value) for name, value in left.items()}
    torch.save(left, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT_SEC, exit=True)
    torch.set_num_threads(1)
    where = sys.argv[2]
    if where == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if where == "cuda" else "gloo", timeout=timedelta(seconds=60))
    run(FilePath(sys.argv[1]), where)
    dist.destroy_process_group()
