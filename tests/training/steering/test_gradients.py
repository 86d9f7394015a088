"""The gradient's variance: against closed form and torch.func, and nothing of the run is touched."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fm_stages.flow import CosinePath, LinearPath
from fm_stages.oracle import DataBank, Oracle, StageProfile
from fm_stages.training.steering.gradients import GradientVariance, measure_gradient_variance

NUM_ROWS, SHAPE = 40, (1, 4, 4)
EDGES = [0.0, 0.1, 0.4, 0.9, 1.0]


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(NUM_ROWS, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.arange(NUM_ROWS) % 3


@pytest.fixture
def oracle(rows, labels) -> Oracle:
    return Oracle(DataBank(rows, labels), LinearPath())


class Linear(nn.Module):
    """A linear map of x_t, in float64, that forgets t and labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x, t, y=None):
        return self.map(x.flatten(1)).view_as(x)


class Seen:
    """What a network was called with, one tensor for each argument."""

    def __init__(self, network: nn.Module) -> None:
        self.calls: list[tuple] = []
        network.register_forward_pre_hook(lambda module, inputs: self.calls.append(inputs))

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.cat([call[i] for call in self.calls])


def moments(gradients: np.ndarray) -> tuple[float, float]:
    """Total variance of (n, P), and the unbiased squared norm of its mean."""
    variance = np.var(gradients, axis=0, ddof=1).sum()
    return variance, np.square(gradients.mean(0)).sum() - variance / len(gradients)


class TestNumbers:
    def test_a_linear_network_in_closed_form(self, rows, oracle):
        """The gradient of ||W x + b - u||^2 / D is 2 / D (W x + b - u) (x, 1)^T."""
        network = Linear()
        seen = Seen(network)
        x1 = rows[:10].double()
        measured = measure_gradient_variance(network, oracle, x1, None, None, EDGES, num_per_bin=6)
        x_t, t = seen[0], seen[1]
        assert len(t) == measured.num_samples == 24
        own = x1[torch.arange(24) % 10]
        wide = t.double().view(-1, 1, 1, 1)
        x0 = (x_t - wide * own) / (1 - wide)
        conditional, best = own - x0, oracle.target(x0, own, t).double()
        with torch.no_grad():
            prediction = network(x_t, t)
        inputs = torch.cat([x_t.flatten(1), torch.ones(24, 1)], 1)
        for target, variances in ((conditional, measured.regular), (best, measured.oracle)):
            residual = (prediction - target).flatten(1)
            g = (2 / 16 * residual[:, :, None] * inputs[:, None]).flatten(1).numpy()
            expected = [moments(g[6 * k : 6 * k + 6]) for k in range(4)]
            assert variances == pytest.approx([v for v, _ in expected], rel=1e-5)
        assert measured.mean_square == pytest.approx([m for _, m in expected], rel=1e-4, abs=1e-6)
        assert measured.ratio() == pytest.approx(sum(measured.regular) / sum(measured.oracle))
        assert measured.ratio(EDGES[1], EDGES[3]) == pytest.approx(
            sum(measured.regular[1:3]) / sum(measured.oracle[1:3])
        )

    @pytest.mark.parametrize("path", [LinearPath(), CosinePath()])
    def test_a_transformer_against_torch_func(self, rows, labels, make_network, path):
        network = make_network()
        oracle = Oracle(DataBank(rows, labels), path)
        seen = Seen(network)
        told = torch.where(torch.arange(NUM_ROWS) % 2 == 0, labels, -1)
        measured = measure_gradient_variance(
            network, oracle, rows, told, torch.arange(NUM_ROWS), EDGES[1:-1], num_per_bin=5, seed=3, step=7
        )
        x_t, t, y = seen[0], seen[1], seen[2]
        assert y.tolist() == told[:10].tolist()
        a, s = (c.view(-1, 1, 1, 1) for c in (path.alpha(t), path.sigma(t)))
        x0 = (x_t - a * rows[:10]) / s
        targets = path.velocity(x0, rows[:10], t), oracle.target(x0, rows[:10], t, y)
        learned = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        # the embedding's own check of labels reads a value, which vmap cannot
        network.y_embedder.forward = lambda y: network.y_embedder.embedding_table(torch.where(y < 0, 3, y))

        def loss(parameters, x, t, y, target):
            v = functional_call(network, parameters, (x[None], t[None], y[None]))
            return (v[0] - target).square().mean()

        for target, variances in zip(targets, (measured.regular, measured.oracle), strict=True):
            gradient = vmap(grad(loss), (None, 0, 0, 0, 0))(learned, x_t, t, y, target)
            g = torch.cat([part.flatten(1) for part in gradient.values()], 1).double().numpy()
            assert variances == pytest.approx([moments(g[:5])[0], moments(g[5:])[0]], rel=1e-3)

    def test_both_targets_have_the_same_expected_gradient(self, rows, oracle):
        """What is measured with the oracle is, for a linear network, the mean gradient with the conditional target."""
        network = Linear()
        measured = measure_gradient_variance(network, oracle, rows.double(), None, None, [0.1, 0.3], num_per_bin=600)
        generator = torch.Generator().manual_seed(1)
        draws = 200_000
        x1 = rows[torch.randint(NUM_ROWS, (draws,), generator=generator)].double().flatten(1)
        t = 0.1 + 0.2 * torch.rand(draws, 1, generator=generator, dtype=torch.float64)
        x0 = torch.randn(x1.shape, generator=generator, dtype=torch.float64)
        x_t = t * x1 + (1 - t) * x0
        with torch.no_grad():
            residual = network.map(x_t) - (x1 - x0)
        mean = 2 / 16 * residual.T @ torch.cat([x_t, torch.ones_like(t)], 1) / draws
        # the estimate's standard error is about 2 |mean| sqrt(variance along the mean / 600)
        assert measured.mean_square[0] == pytest.approx(mean.square().sum().item(), rel=0.1)

    def test_the_oracle_scatters_less_in_navigation_and_as_much_past_it(self, rows, make_network):
        oracle = Oracle(DataBank(rows), LinearPath())
        profile = StageProfile.measure(oracle)
        assert 0.2 < profile.boundary < profile.refinement_complete < 0.8
        edges = [0.0, profile.navigation_end, profile.boundary, 0.8, 1.0]
        measured = measure_gradient_variance(make_network(), oracle, rows, None, None, edges, num_per_bin=30)
        assert min(measured.ratio(edges[0], edges[1]), measured.ratio(edges[1], edges[2])) > 1.2
        assert measured.ratio(edges[3], 1) == pytest.approx(1, abs=1e-3)

    def test_no_scatter_has_no_ratio(self):
        assert np.isnan(GradientVariance([0.0, 1.0], [0.0], [0.0], [0.0], 2).ratio())


class TestTheRun:
    def measure(self, network, oracle, rows, **kwargs):
        return measure_gradient_variance(network, oracle, rows, None, None, EDGES, num_per_bin=3, **kwargs)

    def test_draws_depend_on_seed_and_step_alone(self, rows, oracle, make_network):
        network = make_network()
        first = self.measure(network, oracle, rows)
        torch.randn(5)
        assert self.measure(network, oracle, rows) == first
        assert self.measure(network, oracle, rows, step=1) != first
        assert self.measure(network, oracle, rows, seed=1) != first

    def test_nothing_of_it_is_touched(self, rows, oracle):
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm, self.dropout = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Dropout()

            def forward(self, x, t, y=None):
                return self.dropout(self.norm(self.conv(x)))

        network = Noisy()
        network(rows, None).square().mean().backward()
        before = copy.deepcopy(network.state_dict()), [p.grad.clone() for p in network.parameters()]
        hooks = []
        for p in network.parameters():  # what DDP reduces gradients in
            p.register_post_accumulate_grad_hook(lambda p: hooks.append(p))
        state = torch.get_rng_state()
        with torch.no_grad():
            measured = self.measure(network, oracle, rows)
        assert min(measured.oracle) > 0
        assert torch.equal(torch.get_rng_state(), state)
        assert network.training
        assert not hooks
        torch.testing.assert_close(network.state_dict(), before[0], rtol=0, atol=0)
        torch.testing.assert_close([p.grad for p in network.parameters()], before[1], rtol=0, atol=0)

    def test_autocast_does_not_reach_it(self, rows, oracle, make_network):
        network = make_network()
        expected = self.measure(network, oracle, rows)
        with torch.autocast("cpu", torch.bfloat16):
            assert self.measure(network, oracle, rows) == expected

    def test_costs_a_forward_and_two_backward_passes_a_sample(self, rows, oracle, make_network, monkeypatch):
        network = make_network()
        seen, backward, plain = Seen(network), [], torch.autograd.grad
        monkeypatch.setattr(
            torch.autograd, "grad", lambda *args, **kwargs: backward.append(1) or plain(*args, **kwargs)
        )
        asked = []
        monkeypatch.setattr(oracle, "target", lambda *args: asked.append(1) or Oracle.target(oracle, *args))
        self.measure(network, oracle, rows)
        assert len(seen.calls) == 12
        assert len(backward) == 24
        assert len(asked) == 1

    def test_a_compiled_network_is_not_compiled_anew(self, rows, oracle, make_network):
        network = make_network()
        expected = self.measure(network, oracle, rows)
        compiled = []
        network.compile(backend=lambda graph, inputs: compiled.append(len(inputs)) or graph.forward)
        assert self.measure(network, oracle, rows) == expected
        assert not compiled
        network(rows, torch.rand(NUM_ROWS))
        assert compiled

    def test_frozen_and_unused_parameters(self, rows, oracle, make_network):
        network = make_network()
        expected = self.measure(network, oracle, rows)
        network.unused = nn.Parameter(torch.ones(3))
        assert self.measure(network, oracle, rows) == expected
        network.x_embedder.requires_grad_(False)
        frozen = self.measure(network, oracle, rows)
        assert all(0 < f < e for f, e in zip(frozen.regular, expected.regular, strict=True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_per_bin": 1}, "num_per_bin=1: a variance takes at least 2"),
        ({"edges": [0.5]}, "2 or more increasing edges in \\[0, 1\\]"),
        ({"edges": [0.0, 0.5, 0.5]}, "increasing"),
        ({"edges": [0.0, 1.5]}, "increasing"),
        ({"x1": torch.empty(0, *SHAPE)}, "x1 has none"),
    ],
)
def test_what_has_no_variance_is_refused(oracle, rows, make_network, change, complaint):
    given = {"x1": rows, "labels": None, "index": None, "edges": EDGES, **change}
    with pytest.raises(ValueError, match=complaint):
        measure_gradient_variance(make_network(), oracle, **given)
