"""``fm-stages sample`` with two networks, and with a share of the steps for navigation: images, costs and mistakes."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from fm_stages.flow import EulerMaruyama, Guidance, LinearPath, heun, sample, stage_grid, time_grid
from fm_stages.networks import DiT
from fm_stages.training import CONFIG_KEY
from tests.studies.drawn_files import assert_same, pixels_of, pngs, record

NUM, STEPS, SPLIT = 40, 6, 0.3
LABELS = torch.arange(NUM) % 10

# the network of these checkpoints: 4 tokens of 16 values, width 16, one block; products, by hand
TIME, BLOCK = 256 * 16 + 16 * 16, 16 * 96 + (4 * 16 * 48 + 2 * 4 * 4 * 16 + 4 * 16 * 16) + 2 * 4 * 16 * 64
FLOPS = 2 * (4 * 16 * 16 + TIME + BLOCK + 16 * 32 + 4 * 16 * 16)


@pytest.fixture(scope="module")
def experts(tmp_path_factory, write_checkpoint) -> list[Path]:
    """The weights of seed 1 draw early, those of seed 2 late."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_checkpoint(folder / "early.ckpt", ema=False), write_checkpoint(folder / "late.ckpt")]


@pytest.fixture
def draw(command, experts):
    """Draws 40 images with 6 Euler steps of two experts, unless told otherwise."""

    def run(*arguments, out="out", files=experts):
        named = [argument for file in files for argument in ("--expert", file)]
        steps = [] if "dopri5" in arguments or "--num_steps" in arguments else ["--num_steps", STEPS]
        return command("sample", *named, "--num", NUM, "--out", out, *steps, *arguments)

    return run


@pytest.fixture
def expected(random_network):
    def draw_plainly(split: float = SPLIT, **settings) -> torch.Tensor:
        networks = [(0.0, random_network(1)), (split, random_network(2))]
        images = sample(networks, LABELS, (1, 8, 8), **{"num_steps": STEPS, **settings})
        return pixels_of(images)

    return draw_plainly


class TestImages:
    @pytest.mark.parametrize(
        ("arguments", "settings"),
        [
            ([], {}),
            (["--shift", 2, "--solver", "heun"], {"shift": 2.0, "solver": heun}),
            (["--solver", "euler_maruyama"], {"solver": EulerMaruyama(LinearPath(), "sigma")}),
            (["--navigation_share", 0.5], {"grid": stage_grid(STEPS, SPLIT, 0.5)}),
            (
                ["--guidance_scale", 2, "--guidance_interval", 0.2, 0.7, "--batch_size", 17],
                {"guidance": Guidance(2.0, (0.2, 0.7))},
            ),
        ],
    )
    def test_one_before_the_split_and_one_after_it(self, draw, expected, arguments, settings):
        done = draw("--split", SPLIT, *arguments)
        assert done.status == 0, done.err
        assert done.err.count("note") == 0
        assert_same(pngs(), expected(**settings))
        # and this is no picture of one of them: neither network at any t
        assert (pngs().double() - expected(split=0.999, **{**settings, "grid": None})).abs().max() > 10

    def test_the_same_network_twice_draws_what_it_draws_alone(self, command, draw, experts):
        """0.5 is a node of four steps anyway."""
        assert draw("--num_steps", 4, "--split", 0.5, files=experts[:1] * 2, out="twice").status == 0
        done = command("sample", "--ckpt", experts[0], "--num", NUM, "--out", "once", "--num_steps", 4)
        assert done.status == 0, done.err
        for file in Path("once/images").iterdir():
            assert file.read_bytes() == Path("twice/images", file.name).read_bytes()
        assert record("twice")["settings"]["weights_digest"] == [record("once")["settings"]["weights_digest"]] * 2

    def test_split_and_interval_of_a_profile(self, draw, profile_of, expected):
        profile = profile_of(boundary=0.12, navigation_end=0.05)
        profile.save("profile.json")
        done = draw("--profile", "profile.json", "--guidance_scale", 3)
        assert done.status == 0, done.err
        assert record()["settings"]["split"] == 0.12
        assert_same(pngs(), expected(0.12, guidance=Guidance(3.0, profile.guidance_interval())))

    def test_split_of_a_profile_whose_interval_is_not_asked_for(self, draw, profile_of, expected):
        profile_of(boundary=0.12).save("profile.json")
        settings = ["--profile", "profile.json", "--guidance_scale", 3, "--guidance_interval", 0.2, 0.5]
        assert draw(*settings).status == 0
        assert_same(pngs(), expected(0.12, guidance=Guidance(3.0, (0.2, 0.5))))
        assert draw("--profile", "profile.json", out="plain").status == 0
        assert record("plain")["settings"]["guidance_interval"] is None
        assert_same(pngs("plain"), expected(0.12))

    def test_dopri5(self, draw, expected):
        """Two tolerances agree, so no step mixed the networks."""
        for tolerance in (1e-4, 1e-6):
            arguments = ["--solver", "dopri5", "--tolerance", tolerance, "--split", SPLIT, "--num", 5]
            done = draw(*arguments, out=f"out{tolerance:g}")
            assert done.status == 0, done.err
        coarse, fine = (pngs(f"out{tolerance:g}").double() for tolerance in (1e-4, 1e-6))
        assert (coarse - fine).abs().max() <= 1
        assert (fine - expected(num_steps=400)[:5]).abs().mean() < 1
        assert all(each["evaluations_per_image"] > 6 for each in record("out1e-06")["calls"][0]["networks"])

    def test_one_network_with_a_share_of_the_steps(self, command, experts, random_network, profile_of):
        profile_of(boundary=0.2).save("profile.json")
        arguments = ["sample", "--ckpt", experts[0], "--num", NUM, "--num_steps", 9, "--navigation_share", 0.34]
        for out, where in (("a", ["--split", 0.2]), ("b", ["--profile", "profile.json"])):
            done = command(*arguments, "--out", out, *where)
            assert done.status == 0, done.err
            settings = record(out)["settings"]
            assert (settings["split"], settings["steps_before_split"], settings["shift"]) == (0.2, 3, None)
        grid = torch.tensor([0, 0.2 / 3, 0.4 / 3, 0.2, *(0.2 + 0.8 * k / 6 for k in range(1, 7))])
        images = sample(random_network(1), LABELS, (1, 8, 8), grid=grid)
        assert_same(pngs("a"), ((images.double() + 1) * 127.5).round().clamp(0, 255))
        assert torch.equal(pngs("a"), pngs("b"))


class TestCosts:
    def test_plain(self, draw):
        done = draw("--split", SPLIT, "--num_steps", 10)
        assert done.status == 0, done.err
        (call,) = record()["calls"]
        each = {name: [network[name] for network in call["networks"]] for name in call["networks"][0]}
        assert each["evaluations_per_image"] == each["rows_per_image"] == [3, 7]
        assert each["flops_per_image"] == [3 * FLOPS, 7 * FLOPS]
        assert (call["evaluations_per_image"], call["flops_per_image"]) == (10, 10 * FLOPS)
        written = pytest.approx(call["seconds"] / NUM, abs=0.001 / NUM)  # to the millisecond
        assert call["seconds_per_image"] == written
        text = f"10 network evaluations each (3 before t = 0.3, 7 after it), {10 * FLOPS / 1e9:.4g} GFLOP and"
        assert text in done.out
        assert "not counted: norms" in record()["flops"]

    def test_guided_rows_count_twice(self, draw):
        """Within 0.2..0.7 alone; 0.2 and 0.7 are nodes of ten steps."""
        guided = ["--guidance_scale", 2, "--guidance_interval", 0.2, 0.7]
        draw("--split", SPLIT, "--num_steps", 10, "--solver", "heun", "--batch_size", 9, *guided)
        early, late = record()["calls"][0]["networks"]
        # two evaluations for each step but the last
        assert (early["evaluations_per_image"], early["rows_per_image"]) == (6, 2 * 2 + 2 * 2)
        assert (late["evaluations_per_image"], late["rows_per_image"]) == (13, 2 * 4 * 2 + 2 * 2 + 1)
        assert late["flops_per_image"] == 21 * FLOPS

    def test_one_network(self, command, experts):
        done = command("sample", "--ckpt", experts[1], "--num", 7, "--out", "out", "--num_steps", 5)
        (call,) = record()["calls"]
        assert call["flops_per_image"] == 5 * FLOPS
        assert f"5 network evaluations each, {5 * FLOPS / 1e9:.4g} GFLOP and" in done.out


class TestRecord:
    def test_says_it_all(self, draw, experts):
        draw("--split", SPLIT, "--navigation_share", 0.4)
        found = record()
        assert found["checkpoint"] == [str(file) for file in experts]
        settings = found["settings"]
        assert (settings["weights"], settings["step"]) == (["raw", "ema"], [7, 7])
        assert len(set(settings["weights_digest"])) == 2
        assert (settings["split"], settings["navigation_share"], settings["steps_before_split"]) == (SPLIT, 0.4, 2)

    def test_goes_on_and_refuses_others(self, draw, experts):
        draw("--split", SPLIT)
        whole = pngs()
        for number in (3, 30):
            Path(f"out/images/{number:06d}.png").unlink()
        assert draw("--split", SPLIT).status == 0
        assert_same(pngs(), whole.double())
        assert [call["images"] for call in record()["calls"]] == [NUM, 2]
        for arguments, files, difference in (
            (["--split", 0.4], experts, "split was 0.3 and is 0.4"),
            (["--split", SPLIT, "--navigation_share", 0.5], experts, "navigation_share was None and is 0.5"),
            (["--split", SPLIT], experts[::-1], "weights was ['raw', 'ema'] and is ['ema', 'raw']"),
        ):
            done = draw(*arguments, files=files)
            assert (done.status, done.err.count("\n")) == (2, 1)
            assert difference in done.err


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(draw, experts, launch, tmp_path):
    arguments = ["--split", "0.3", "--solver", "euler_maruyama", "--guidance_scale", "2", "--num_steps", "6"]
    assert draw(*arguments, out=tmp_path / "one").status == 0
    named = ["--expert", str(experts[0]), "--expert", str(experts[1])]
    whole = ["sample", *named, "--num", str(NUM), "--out", str(tmp_path / "two"), "--batch_size", "9", *arguments]
    (tmp_path / "arguments.json").write_text(json.dumps(whole))
    launch(Path(__file__).with_name("run_on_ranks.py"), tmp_path, 2, "cpu")
    assert_same(pngs(tmp_path / "two"), pngs(tmp_path / "one").double())
    one, two = (record(tmp_path / name)["calls"][0] for name in ("one", "two"))
    assert one["networks"] == two["networks"]
    assert two["seconds_per_image"] < 2.1 * two["seconds"] / NUM


def changed(file: Path, to: Path, **config) -> Path:
    """A copy of a checkpoint whose configuration says something else."""
    checkpoint = torch.load(file, weights_only=False)
    checkpoint[CONFIG_KEY] = yaml.safe_dump({**yaml.safe_load(checkpoint[CONFIG_KEY]), **config})
    torch.save(checkpoint, to)
    return to


class TestMistakes:
    """Each costs one line and no folder."""

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ([], "--expert needs the time between the stages: give --split, or --profile"),
            (["--split", 0.0], "stages cannot part at t = 0: give a --split inside (0, 1)"),
            (["--split", 1.5], "stages cannot part at t = 1.5"),
            (["--split", 0.3, "--ckpt", "x.ckpt"], "--ckpt and --expert both name networks"),
            (["--split", 0.3, "--expert", "x.ckpt"], "--expert is given 3 times"),
            (["--split", 0.3, "--navigation_share", 1.0], "a share of 1.0 of the steps before t = 0.3"),
            (["--split", 0.3, "--navigation_share", 0.5, "--shift", 2], "--navigation_share says already where"),
            (["--split", 0.3, "--navigation_share", 0.5, "--num_steps", 1], "num_steps=1 cannot be shared out"),
            (["--split", 0.3, "--num_steps", 1], "num_steps=1"),
            (["--split", 0.3, "--navigation_share", 0.5, "--solver", "dopri5"], "dopri5 chooses its own steps"),
            (["--split", 0.3, "--profile", "x.json"], "and here neither is asked of it: leave it out"),
            (["--profile", "x.json"], "No such file"),
            (["--split", 0.3, "--weights", "ema"], "early.ckpt holds no ema weights"),
        ],
    )
    def test_options(self, draw, arguments, complaint):
        done = draw(*arguments)
        assert done.status == 2
        assert complaint in done.err
        assert done.err.count("\n") == 1
        assert not Path("out").exists()

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ([], "give the network before the split and the one after it, as --expert EARLY --expert LATE"),
            (["--expert", "x.ckpt", "--split", 0.1], "--expert is given 1 times"),
            (["--ckpt", "x.ckpt", "--split", 0.1], "--split 0.1 is for --expert or --navigation_share"),
            (["--ckpt", "x.ckpt", "--navigation_share", 0.1], "--navigation_share needs the time between the stages"),
        ],
    )
    def test_networks(self, command, arguments, complaint):
        done = command("sample", "--num", 4, "--out", "out", *arguments)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert complaint in done.err

    def test_a_boundary_that_parts_nothing(self, draw, profile_of):
        profile_of(boundary=1.0).save("profile.json")
        assert "stages cannot part at t = 1: give a --split" in draw("--profile", "profile.json").err

    def test_a_profile_of_another_path(self, draw, profile_of):
        profile_of(path="CosinePath").save("profile.json")
        assert "is of CosinePath, the network of LinearPath" in draw("--profile", "profile.json").err

    def test_experts_that_differ(self, draw, experts, write_checkpoint):
        early = experts[0]
        classes = write_checkpoint(Path("classes.ckpt"), num_classes=4)
        model = yaml.safe_load(torch.load(early, weights_only=False)[CONFIG_KEY])["model"]
        cosine = {**model, "path": {"class_path": "fm_stages.flow.CosinePath"}}
        path = changed(early, Path("path.ckpt"), model=cosine)
        data = changed(early, Path("data.ckpt"), data={"class_path": "fm_stages.data.FashionMNIST"})
        for other, complaint in (
            (classes, "differ in classes: {early} has 10, classes.ckpt has 4"),
            (path, "differ in path: {early} has LinearPath, path.ckpt has CosinePath"),
            (data, "differ in data: {early} has Digits, data.ckpt has FashionMNIST"),
        ):
            done = draw("--split", 0.3, files=[early, other])
            assert (done.status, done.err.count("\n")) == (2, 1)
            assert complaint.format(early=early) in done.err

    def test_experts_of_other_shapes(self, draw, experts):
        sizes = {"input_size": 4, "patch_size": 4, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}
        network = {"class_path": "fm_stages.networks.DiT", "init_args": {**sizes, "num_classes": 10}}
        changed(experts[0], Path("shape.ckpt"), model={"network": network})
        checkpoint = torch.load("shape.ckpt", weights_only=False)
        weights = DiT(**sizes, num_classes=10).state_dict()
        checkpoint["state_dict"] = {f"network.{name}": weight for name, weight in weights.items()}
        torch.save(checkpoint, "shape.ckpt")
        done = draw("--split", 0.3, files=[experts[0], Path("shape.ckpt")])
        assert "differ in shape:" in done.err
        assert "has (1, 8, 8), shape.ckpt has (3, 4, 4)" in done.err

    def test_guidance_of_which_one_is_not_able(self, draw, experts, write_checkpoint):
        labelled = write_checkpoint(Path("labelled.ckpt"), label_dropout=0.0)
        done = draw("--split", 0.3, "--guidance_scale", 2, files=[experts[0], labelled])
        assert "this one's label dropout was 0.0" in done.err


class TestSpecialists:
    """Trained on a part of t, which they should draw in."""

    @pytest.fixture
    def specialists(self, write_checkpoint) -> list[Path]:
        def specialist(name: str, low: float, high: float) -> Path:
            density = {"class_path": "fm_stages.flow.TruncatedTimesteps", "init_args": {"low": low, "high": high}}
            return write_checkpoint(Path(f"{name}.ckpt"), timesteps=density)

        return [specialist("near_noise", 0.0, 0.3), specialist("near_data", 0.3, 1.0)]

    def test_in_their_stages(self, draw, specialists):
        done = draw("--split", 0.3, files=specialists)
        assert done.status == 0, done.err
        assert "note" not in done.err

    def test_a_little_beyond_is_said(self, draw, specialists):
        done = draw("--split", 0.4, files=specialists)
        assert done.status == 0, done.err
        assert "near_noise.ckpt was trained on t in [0, 0.3] and draws from 0 to 0.4, so also where" in done.err
        assert done.err.count("note") == 1

    def test_the_wrong_order_is_refused(self, draw, specialists):
        done = draw("--split", 0.3, files=specialists[::-1])
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "near_data.ckpt was trained on t in [0.3, 1] and should draw from 0 to 0.3: give first" in done.err

    def test_one_alone(self, command, specialists):
        done = command("sample", "--ckpt", specialists[1], "--num", 2, "--out", "out", "--num_steps", 2)
        assert done.status == 0
        assert "near_data.ckpt was trained on t in [0.3, 1] and draws from 0 to 1" in done.err


def test_densities_that_reach_everywhere_need_no_note(command, write_checkpoint):
    density = {"class_path": "fm_stages.flow.LogitNormalTimesteps"}
    file = write_checkpoint(Path("logit.ckpt"), timesteps=density)
    assert "note" not in command("sample", "--ckpt", file, "--num", 2, "--out", "out", "--num_steps", 2).err


def test_the_grid_of_one_network_is_as_before(command, experts, random_network):
    """A split that nobody asked for is no node."""
    command("sample", "--ckpt", experts[0], "--num", NUM, "--out", "out", "--num_steps", 5, "--shift", 2)
    images = sample(random_network(1), LABELS, (1, 8, 8), grid=time_grid(5, 2.0))
    assert_same(pngs(), ((images.double() + 1) * 127.5).round().clamp(0, 255))
