"""The hand-over: both orders against plain integration, and its numbers against distances written out."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fm_stages.data import Digits
from fm_stages.flow import LinearPath, euler, heun, integrate, keyed_normal, sample, time_grid
from fm_stages.oracle import Oracle
from fm_stages.studies.handover import hand_over, study_handover
from fm_stages.studies.models import load_trained

TAUS = [0.0, 0.3, 0.62, 1.0]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, write_checkpoint) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def found(ckpt):
    trained = load_trained(ckpt)
    return trained, study_handover(trained, [0.3, 0.62], num=6, num_shown=4, num_steps=20, batch_size=4, seed=3)


@pytest.mark.parametrize("solver", [euler, heun])
def test_one_velocity_before_tau_and_the_other_after_it(solver):
    def first(x: Tensor, t: Tensor) -> Tensor:
        return x * t[:, None]

    def second(x: Tensor, t: Tensor) -> Tensor:
        return 1 - x

    x0, grid = torch.linspace(-1, 1, 5)[:, None], time_grid(9, nodes=TAUS)
    ends = hand_over(first, second, x0, TAUS, grid, solver)
    for order, (early, late) in enumerate(((first, second), (second, first))):
        for end, tau in zip(ends[order], TAUS, strict=True):
            fields = [(0.0, early), (tau, late)] if tau else [(0.0, late)]
            torch.testing.assert_close(end, integrate(fields, x0, grid, solver), rtol=0, atol=1e-6)


def test_images(found, random_network):
    """Noise and labels are those of `fm-stages sample`; where one draws alone, both orders agree."""
    trained, result = found
    assert result.taus == TAUS
    assert result.images.shape == result.nearest.shape == (2, 4, 4, 1, 8, 8)
    x0, labels = keyed_normal(("sample", 3), torch.arange(4), (1, 8, 8)), torch.arange(4)
    oracle = Oracle(trained.data.bank(), LinearPath())
    grid, network = time_grid(20, nodes=TAUS), random_network(2)
    alone = sample(network, labels, (1, 8, 8), seed=3, num_steps=20)
    # without the taus the grid is another one
    torch.testing.assert_close(result.images[0, 0], alone, rtol=0, atol=0.2)
    fields = [(0.0, lambda x, t: oracle.velocity(x, t, labels)), (0.62, lambda x, t: network(x, t, labels))]
    with torch.no_grad():
        expected = integrate(fields, x0, grid, euler)
    torch.testing.assert_close(result.images[0, 2], expected, rtol=0, atol=1e-5)
    for one, other in ((0, -1), (-1, 0)):
        torch.testing.assert_close(result.images[0, one], result.images[1, other], rtol=0, atol=1e-5)


def test_numbers(found):
    trained, result = found
    data = Digits()
    data.setup()
    rows = data.bank().rows(torch.arange(data.num_train)).double().flatten(1).unique(dim=0)
    distance = torch.cdist(
        result.images.double().flatten(0, 2).flatten(1), rows, compute_mode="donot_use_mm_for_euclid_dist"
    )
    near, index = distance.topk(2, largest=False)
    torch.testing.assert_close(result.ratios.flatten(), near[:, 0] / near[:, 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.nearest.flatten(0, 2).flatten(1).double(), rows[index[:, 0]], rtol=0, atol=1e-6)
    assert [(c.order, c.tau) for c in result.closeness] == [
        *(("oracle first", tau) for tau in TAUS),
        *(("model first", tau) for tau in TAUS),
        ("held-out images", None),
    ]
    for oracle_alone in (result.closeness[3], result.closeness[4]):
        assert (oracle_alone.memorized, oracle_alone.as_oracle) == (1, 1)
        assert oracle_alone.distance < 1e-5
    for oracle_last in result.closeness[5:7]:
        assert oracle_last.memorized == 1
    model_alone = result.closeness[0]
    assert model_alone.memorized == 0  # random weights
    assert (model_alone.num, result.closeness[-1].num) == (6, 6)
    held_out = result.closeness[-1]
    assert 0 < held_out.distance < model_alone.distance
    assert 0.5 < held_out.ratio < 1
    assert held_out.as_oracle is None


def test_all_noises_count(ckpt):
    """With all of them shown, the means are those of what is shown."""
    result = study_handover(load_trained(ckpt), [0.5], num=5, num_shown=5, num_steps=4)
    ratios = result.ratios.flatten(0, 1)
    for closeness, own in zip(result.closeness, ratios, strict=False):
        assert closeness.ratio == pytest.approx(own.mean().item())
        assert closeness.ratio_sem == pytest.approx((own.std() / 5**0.5).item())
        assert closeness.memorized == (own < 1 / 3).double().mean().item()


class TestCommand:
    def test_table_json_and_figure(self, command, ckpt):
        done = command("handover", "--ckpt", ckpt, "--taus", 0.3, 0.6, "--num", 6, "--num_steps", 5, "--columns", 2)
        assert done.status == 0, done.err
        folder = ckpt.parents[1] / "handover"
        assert {path.name for path in folder.iterdir()} == {"handover.json", "handover.png"}
        plain = json.loads((folder / "handover.json").read_text())
        assert plain["settings"]["taus"] == [0, 0.3, 0.6, 1]
        assert len(plain["closeness"]) == 9
        for name in ("oracle first, tau 0.30", "model first, tau 0.60", "held-out images"):
            assert name in done.out

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--taus", 1.5], "--taus 1.5 must lie in [0, 1]"),
            (["--taus", 0.3, 0.4, "--num_steps", 2], "num_steps=2"),
            (["--num", 0], "--num 0 must be 1 or more"),
            (["--columns", 0], "--columns 0 must be 1 or more"),
            (["--solver", "rk45"], "no solver 'rk45'"),
            (["--labels", "11"], "there is no class 11"),
            (["--ckpt", "missing.ckpt"], "no checkpoint at missing.ckpt"),
            (["--tau", 1], "--tau"),
        ],
    )
    def test_a_mistake_costs_one_line(self, command, ckpt, arguments, complaint):
        done = command("handover", "--ckpt", ckpt, "--out", "out", *arguments)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert complaint in done.err
        assert not Path("out").exists()

    def test_an_imported_network_has_no_oracle(self, command, write_checkpoint):
        done = command("handover", "--ckpt", write_checkpoint(Path("imported.ckpt"), data=False), "--out", "out")
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "names no data" in done.err
