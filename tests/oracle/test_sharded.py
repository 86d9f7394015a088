"""A bank sharded over ranks against the whole one in this process: `sharded.py` asks, on several real processes."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fm_stages.oracle import Oracle

SCRIPT = Path(__file__).parent / "sharded.py"

TOL = {"usual tolerance": 1e-5, "twins": 1e-5}
"""Share of a quantity's largest value by which it may differ, where that is not 1e-6: the mass that is left out, and
float32 logits of long rows, whose rounding depends on how many rows are multiplied at a time."""

DIFFERENCES = ("decompose.residual", "decompose.identity", "decompose.floor")
"""Small differences, and products with A_t^2: 3e-6."""


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sharded", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sharded"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sharded = load_script()


SETTINGS = [
    pytest.param((2, "cpu"), id="2 ranks"),
    pytest.param((3, "cpu"), id="3 ranks", marks=pytest.mark.slow),
    pytest.param((4, "cpu"), id="4 ranks", marks=pytest.mark.slow),
    pytest.param((1, "cuda"), id="1 GPU", marks=pytest.mark.gpu),
    pytest.param((2, "cuda"), id="2 GPUs", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request) -> tuple[int, str]:
    num_ranks, device = request.param
    if device == "cuda" and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    return num_ranks, device


@pytest.fixture(scope="module")
def device(setting) -> str:
    return setting[1]


@pytest.fixture(scope="module")
def left(setting, launch, tmp_path_factory) -> list[dict]:
    return launch(SCRIPT, tmp_path_factory.mktemp("sharded"), *setting)


@pytest.fixture(scope="module")
def cases(left) -> dict:
    return sharded.make_cases(len(left))


@pytest.fixture(scope="module")
def alone(cases, device):
    """Answers and facts of the whole bank in this process, by case; each is found once."""
    found = {}

    def ask(name: str) -> tuple[dict, dict]:
        if name not in found:
            bank = cases[name].bank(device)
            most = sharded.exact.MAX_QUERIES
            try:
                answers = sharded.answers(cases[name], bank, slice(0, sharded.NUM_QUERIES))
            finally:
                sharded.exact.MAX_QUERIES = most
            found[name] = sharded.to_cpu(answers), sharded.to_cpu(sharded.facts(cases[name], bank))
        return found[name]

    return ask


def assert_same(ours: object, expected: object, name: str, tol: float = 1e-6, unit: float | None = None) -> None:
    """Alike to a share of the largest value, or of a unit, for what is small by cancellation."""
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        assert type(ours) is type(expected)
        assert torch.equal(ours, expected) if isinstance(expected, Tensor) else ours == expected, name
        return
    assert ours.shape == expected.shape, name
    assert ours.dtype == expected.dtype, name
    if unit is None:
        finite = expected[expected.isfinite()]
        unit = finite.abs().max().item() if len(finite) else 0.0
    torch.testing.assert_close(
        ours, expected, rtol=tol, atol=tol * unit, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def unit_of(name: str, facts: dict) -> float | None:
    """What a standard error is small beside: its curve, or 1 for a time."""
    if "time_sem" in name:
        return 1.0
    if "sem" not in name:
        return None
    curve = facts[name.replace("_sem", "").replace("sem.", "")]
    return None if curve is None else curve.abs().max().item()


CASES = list(sharded.make_cases(2))


class TestAsInOneProcess:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("turn", [0, 1])
    def test_answers(self, left, alone, case, turn):
        """Each rank has its share of the queries, in some turns none."""
        turn = min(turn, len(sharded.QUERIES[len(left)]) - 1)
        for name, expected in alone(case)[0].items():
            ours = torch.cat([rank["answers"][case, turn][name] for rank in left])
            tol = 3e-6 if name in DIFFERENCES else 1e-6
            assert_same(ours, expected, name, max(tol, TOL.get(case, 0)))

    @pytest.mark.parametrize("case", CASES)
    def test_facts(self, left, alone, case):
        for name, expected in alone(case)[1].items():
            for rank in left:
                unit = unit_of(name, alone(case)[1])
                assert_same(rank["facts"][case][name], expected, name, TOL.get(case, 2e-6), unit)
                # bit for bit the same everywhere: queries are centred at the mean, and stages steer training
                assert_same(rank["facts"][case][name], left[0]["facts"][case][name], name, 0.0)

    def test_stages_of_any_number_of_queries(self, left, cases, device):
        """Also of fewer queries than ranks: the others have no part of them."""
        alone = sharded.to_cpu(sharded.profiles(cases["classes"], cases["classes"].bank(device)))
        for num, fields in alone.items():
            for name, expected in fields.items():
                for rank in left:
                    assert_same(
                        rank["profiles"][num][name], expected, f"{num} queries, {name}", 3e-6, unit_of(name, fields)
                    )
                    assert_same(rank["profiles"][num][name], left[0]["profiles"][num][name], name, 0.0)

    def test_comparison_sees_all_kinds_of_posterior(self, left, alone, cases):
        for case in ("plain LinearPath", "classes", "uint8", "several passes"):
            top1 = alone(case)[0]["posterior.top1"]
            assert (top1 < 0.2).any(), case
            assert ((top1 > 0.3) & (top1 < 0.97)).any(), case
            assert (top1 > 0.999).any(), case

    def test_the_whole_bank_is_shared_out(self, left, alone, cases):
        for name in CASES:
            stored = [rank["stored"][name] for rank in left]
            assert sum(stored) == alone(name)[1]["counts"][1]
            assert all(stored) or cases[name].copied
            if name.startswith("copies") and len(left) > 1:
                assert stored[-1] == 0

    def test_copies_on_other_ranks_count_once_with_multiplicity(self, left, alone, cases, brute_force):
        case = cases["copies"]
        x1 = case.x1.float()
        x_t = case.path.interpolate(case.x0(), x1[case.index], case.t)
        truth = brute_force(x1, case.labels, x_t, case.t.clamp(max=1 - 1e-7), case.path, case.asked)
        inside = case.t < 1
        for name in ("top1", "ess", "entropy", "variance"):
            ours = torch.cat([rank["answers"]["copies", 0][f"posterior.{name}"] for rank in left])
            torch.testing.assert_close(ours[inside].double(), getattr(truth, name)[inside], rtol=1e-4, atol=1e-4)

    def test_twins_are_told_apart(self, left, cases, brute_force):
        case = cases["twins"]
        x_t = case.path.interpolate(case.x0(), case.x1[case.index], case.t)
        truth = brute_force(case.x1, None, x_t, case.t, case.path)
        assert ((truth.top1 > 0.55) & (truth.top1 < 0.95)).any()
        ours = torch.cat([rank["answers"]["twins", 0]["posterior.top1"] for rank in left])
        assert (ours - truth.top1).abs().max() < 1e-4

    def test_classes_of_one_rank_only(self, left, cases):
        """Shards may hold other classes than one another: the bank's are those of all."""
        case, num_ranks = cases["classes"], len(left)
        if num_ranks > 1:
            holders = [{7, 9} & set(case.labels[case.shard(rank, num_ranks)].tolist()) for rank in range(num_ranks)]
            assert (holders[0], holders[-1]) == ({7}, {9})
        assert all(rank["facts"]["classes"]["counts"][3] == [0, 1, 2, 7, 9] for rank in left)


@pytest.fixture(scope="module")
def whole(cases, device) -> tuple[Tensor, dict]:
    """Distances of rows to their neighbours, and what comes of queries that are skipped."""
    bank = cases["plain LinearPath"].bank(device)
    answers = sharded.skipping(cases["plain LinearPath"], bank, slice(0, sharded.NUM_QUERIES))
    return bank.nearest.cpu(), sharded.to_cpu(answers)


class TestSkipping:
    def test_same_distances(self, left, whole):
        for rank in left:
            torch.testing.assert_close(rank["nearest"], whole[0], rtol=1e-5, atol=0)

    def test_same_queries_are_skipped(self, left, whole):
        half = sharded.NUM_QUERIES // 2
        skipped = whole[1]["skipped"]
        assert skipped[:half].all()
        assert skipped[half:].any()
        assert not skipped[half:].all()
        for number, rank in enumerate(left):
            assert torch.equal(rank["skipping"]["skipped"], skipped[sharded.skippers(number)])

    def test_same_answers(self, left, whole):
        for number, rank in enumerate(left):
            own = sharded.skippers(number)
            for name, expected in whole[1].items():
                assert_same(rank["skipping"][name], expected[own], name, 5e-6)

    def test_all_queries_of_all_ranks(self, left, cases):
        case = cases["plain LinearPath"]
        oracle = Oracle(case.bank("cpu"), case.path)
        late = torch.full_like(case.t, 0.9999)
        expected = oracle.target(case.x0(), case.x1[case.index], late)
        for rank in left:
            assert_same(rank["all skipped"], expected, "target", 1e-5)


class TestCost:
    def test_memory(self, left):
        for rank in left:
            for dtype, share in rank["memory"].items():
                assert 1 <= share <= 1.05, dtype

    def test_collectives(self, left):
        """A small one to meet, queries and their times, peaks; then the best rows and the sums. No pickles."""
        for rank in left:
            assert rank["collectives"]["posterior"] == {"all_gather": 4, "all_reduce": 2, "all_gather_object": 0}
            assert rank["collectives"]["target"] == {"all_gather": 5, "all_reduce": 3, "all_gather_object": 0}


class TestMistakes:
    EXPECTED = {
        "D": r"the ranks disagree on the shape of a row: rank 0 has \(1, 4, 4\).*has \(1, 4, 3\)",
        "dtype": "disagree on the dtype of rows: rank 0 has torch.float32.*torch.float16",
        "having labels": "disagree on having labels: rank 0 has True",
        "scale": "disagree on the scale: rank 0 has 1.0.* 0.5",
        "scale by value": "disagree on the scale: rank 0 has 16 values with checksum",
        "shift": "disagree on the shift: rank 0 has 0.0.* 0.5",
        "scale that does not fit": r"scale of shape \(3,\) does not fit rows of shape \(1, 4, 4\)",
        "no rows": r"needs at least one row.*\(0, 1, 4, 4\)",
        "NaN": "row 4 of x1 holds NaN",
        "negative label": "labels of bank rows are 0 or larger, got -1",
        "no tensor": "x1 is a tensor, got list",
        "tolerance": "disagree on the tolerance: rank 0 has 1e-06.* 0.0001",
        "path": "disagree on the path: rank 0 has LinearPath.*CosinePath",
        "path's numbers": "disagree on the path: rank 0 has VPPath.*VPPath",
        "class": "no row of the bank has label 5",
        "labels' shape": r"one integer label per query.*\(2,\) for 3 queries",
        "shape": r"queries are \(B, ...\).*\(3, 1, 3, 4\)",
        "time": r"times must lie in \[0, 1\].*1.5",
        "time of a velocity": "undefined at t = 1",
        "time of a target": r"times must lie in \[0, 1\].*1.5",
        "one time too few": "one time per sample",
        "shape of a target": r"noise \(3, 1, 4, 4\) and data \(2, 1, 4, 4\) need one shape",
        "device": "the bank is on .*, the queries on meta",
        "device of the times": "the bank is on .*, the times on meta",
        "device of a target's data": "the bank is on .*, the data on meta",
        "device of a prediction": "the noise is on .*, the prediction on meta",
        "time of a decomposition": r"one time per sample: t has shape \(2,\)",
        "NaN in a query": "row 0 of the queries holds NaN",
        "large rows": "rows are too large",
        "index": "index runs from 0 to .*, but the bank has",
        "index of labels": "index runs from 0 to .*, but the bank has",
        "index of a target": "index runs from 0 to .*, but the bank has",
        "index that is a mask": r"an index is \(B,\) integers, got torch.bool",
        "index on one rank": "disagree on giving an index: rank 0 has False",
        "index of a decomposition on one rank": "disagree on giving an index: rank 0 has False",
        "prediction": r"noise, data and prediction need one shape.*\(3, 1, 3, 4\)",
    }

    def test_all_are_expected(self, left):
        assert left[0]["errors"].keys() == self.EXPECTED.keys()

    @pytest.mark.parametrize("name", EXPECTED)
    def test_is_a_clear_error_on_every_rank(self, left, name):
        """Made on the last rank alone, or by the ranks' not being alike; none of them hangs."""
        if len(left) == 1 and "disagree" in self.EXPECTED[name]:
            pytest.skip("one rank agrees with itself")
        last = len(left) - 1
        for number, rank in enumerate(left):
            kind, message = rank["errors"][name].split(": ", 1)
            assert kind == ("TypeError" if name == "no tensor" and number == last else "ValueError")
            assert re.search(self.EXPECTED[name], message), message
            if "disagree" not in self.EXPECTED[name] and name != "large rows" and number != last:
                assert message.startswith(f"rank {last} cannot go on: ")

    def test_the_group_works_on(self, left, alone):
        expected = alone("plain LinearPath")[0]["target"]
        for rank in left:
            assert_same(rank["afterwards"], expected, "target")

    def test_nobody_has_to_ask(self, left):
        assert all(rank["nobody asks"] == (0, 1, 4, 4) for rank in left)
