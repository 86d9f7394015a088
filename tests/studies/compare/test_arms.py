"""Arms: how they are read and filled in, what they may not change, and that those which ship can be trained."""

import warnings
from pathlib import Path

import pytest
import yaml

from fm_stages.studies.compare.arms import choose_reference, first_difference, read_arms, resolve, resolve_arms

ROOT = Path(__file__).parents[3]
DIGITS = str(ROOT / "configs" / "digits_dit.yaml")
SHIFT = {"class_path": "ShiftToBoundary"}
READY = sorted((ROOT / "configs" / "arms").glob("*.yaml"))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


class TestReading:
    def test_a_mapping_keeps_its_order(self, tmp_path):
        file = write(tmp_path / "arms.yaml", "plain: {}\nb: {model: {label_dropout: 0.2}}\na:\n")
        assert read_arms([file]) == {"plain": {}, "b": {"model": {"label_dropout": 0.2}}, "a": {}}

    def test_one_arm_per_file_is_called_as_the_file(self, tmp_path):
        write(tmp_path / "b.yaml", "model: {label_dropout: 0.2}\n")
        write(tmp_path / "a.yml", "# nothing\n")
        expected = {"a": {}, "b": {"model": {"label_dropout": 0.2}}}
        assert read_arms([str(tmp_path)]) == expected
        assert list(read_arms([str(tmp_path / "b.yaml"), str(tmp_path / "a.yml")])) == ["b", "a"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: {}", r"two arms or more, found \['a'\]"),
            ("- a\n- b", "holds a list"),
            ("a: {modle: {}}\nb:", "arm a .* not overrides in the shape of a config"),
            ("a: 3\nb:", "arm a is 3"),
            ("a/b: {}\nc:", "'a/b' names a folder too"),
            ("a: {data: {class_path: Digits}}\nb:", "changes data, but every arm sees the same images"),
            ("a: {model: {seed: 3}}\nb:", "changes model.seed, but every arm runs with the same seeds"),
            ("a: {model: {path: CosinePath}}\nb:", "changes model.path, but a gap is measured on one path"),
            ("a: {init_from: x.ckpt}\nb:", "changes init_from"),
            ("a: [1, 2\nb: }", "line 2"),
        ],
    )
    def test_mistakes_are_named(self, text, message, tmp_path):
        file = write(tmp_path / "arms.yaml", text)
        with pytest.raises(ValueError, match=message) as error:
            read_arms([file])
        assert file in str(error.value)

    def test_two_arms_of_one_name(self, tmp_path):
        file = write(tmp_path / "arms.yaml", "a: {}\nb: {}")
        with pytest.raises(ValueError, match="an arm 'a' already"):
            read_arms([file, file])

    def test_no_such_file(self):
        with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
            read_arms(["nowhere.yaml"])

    def test_reference(self):
        assert choose_reference({"a": {"model": {}}, "b": {}}, None) == "b"
        assert choose_reference({"a": {"model": {}}, "b": {"data": {}}}, None) == "a"
        assert choose_reference({"a": {}, "b": {}}, "b") == "b"
        with pytest.raises(ValueError, match="--reference c: the arms are a, b"):
            choose_reference({"a": {}, "b": {}}, "c")


class TestResolving:
    HYBRID = {"model": {"target": {"class_path": "HybridTarget", "init_args": {"boundary": "${boundary}"}}}}

    def test_measured_times_are_filled_in(self, profile_of):
        (arm,) = resolve_arms([DIGITS], {"hybrid": self.HYBRID}, profile_of(boundary=0.31))
        assert arm.overrides["model"]["target"]["init_args"]["boundary"] == 0.31
        assert arm.config["model"]["target"] == {
            "class_path": "fm_stages.training.HybridTarget",
            "init_args": {"boundary": 0.31},
        }
        assert arm.config["model"]["warmup_steps"] == 100  # of the base
        assert arm.config["trainer"]["gradient_clip_val"] == 1.0  # of the defaults

    def test_what_is_not_measured_is_refused(self, profile_of):
        overrides = {"model": {"label_dropout": "${bondary}"}}
        with pytest.raises(ValueError, match=r"arm odd: \$\{bondary\} is not measured; there are .*\$\{boundary\}"):
            resolve_arms([DIGITS], {"odd": overrides}, profile_of())

    def test_a_misspelt_field_is_refused_with_the_arms_name(self, profile_of):
        with pytest.raises(ValueError, match="arm odd: .*ema_deacy"):
            resolve_arms([DIGITS], {"odd": {"model": {"ema_deacy": 0.9}}}, profile_of())

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"steering": {"policies": [SHIFT | {"init_args": {"fraction": 1.5}}]}}, r"fraction=1.5 must lie in"),
            ({"steering": {"policies": [SHIFT, {"class_path": "GapDensity"}]}}, "both change the timesteps"),
            ({"steering": {"policies": [SHIFT, {"class_path": "StageWeights"}]}}, "contradict each other"),
            (
                {"model": {"target": {"class_path": "OracleTarget"}}}
                | {"steering": {"policies": [{"class_path": "TargetByStage"}]}},
                "leave the target conditional",
            ),
            ({"monitor": {"every_n_steps": 0}}, "every_n_steps=0"),
        ],
        ids=["fraction", "two densities", "density and weights", "two targets", "monitor"],
    )
    def test_what_would_end_a_run_as_it_starts_is_refused_before_any(self, overrides, message, profile_of):
        with pytest.raises(ValueError, match=f"(?s)arm odd: .*{message}"):
            resolve_arms([DIGITS], {"odd": overrides}, profile_of())

    def test_arms_start_from_the_same_weights_unless_the_network_differs(self, profile_of):
        wide = {"model": {"network": {"init_args": {"hidden_size": 64}}}}
        learned = {"model": {"weighting": {"class_path": "fm_stages.flow.LearnedWeighting"}}}
        regular, hybrid, weighted, other = resolve_arms(
            [DIGITS], {"regular": {}, "hybrid": self.HYBRID, "learned": learned, "wide": wide}, profile_of()
        )
        assert regular.weights_hash == hybrid.weights_hash == weighted.weights_hash != other.weights_hash
        assert len({arm.config_hash for arm in (regular, hybrid, weighted, other)}) == 4

    def test_a_list_of_components_stays_plain_data(self, profile_of):
        """Or no report of such an arm could be written after it was trained."""
        (arm,) = resolve_arms([DIGITS], {"shifted": {"steering": {"policies": [SHIFT]}}}, profile_of())
        assert arm.config["steering"]["policies"][0]["class_path"] == "fm_stages.training.ShiftToBoundary"
        assert yaml.safe_load(yaml.safe_dump(arm.config)) == arm.config
        assert len(arm.config_hash) == 16

    def test_reading_a_configuration_makes_no_folder_and_warns_of_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "LightningCLI's args")
            assert resolve([DIGITS])["data"]["class_path"] == "fm_stages.data.Digits"
        assert list(tmp_path.iterdir()) == []

    def test_the_first_difference_is_named(self):
        before = {"a": {"b": 1, "c": [1, 2]}, "d": None}
        assert first_difference(before, before) is None
        assert first_difference({"a": float("nan")}, {"a": float("nan")}) is None
        assert first_difference(before, {"a": {"b": 1, "c": [1, 3]}, "d": None}) == ("a.c", [1, 2], [1, 3])
        assert first_difference(before, {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}) == ("d", None, {"e": 1})


class TestReadyArms:
    def test_the_one_without_overrides_is_the_reference(self):
        arms = read_arms([str(ROOT / "configs" / "arms")])
        assert choose_reference(arms, None) == "regular"
        assert set(arms) == {
            *("regular", "oracle", "hybrid", "subset"),
            *("shift_to_boundary", "gap_density", "stage_weights"),
        }

    @pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
    def test_is_short_says_what_it_does_and_can_be_trained(self, file, profile_of):
        assert file.read_text().startswith("# ")
        assert len(file.read_text().splitlines()) <= 10
        overrides = yaml.safe_load(file.read_text()) or {}
        (arm,) = resolve_arms([DIGITS], {file.stem: overrides}, profile_of())
        assert arm.config != resolve([DIGITS]) or not overrides
