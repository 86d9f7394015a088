"""What is suggested does what it says, and is what the paper found best when it is given the paper's numbers."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from fm_stages.flow import LogitNormalTimesteps, ShiftedTimesteps, StageWeighting, shift_time
from fm_stages.studies.profile.recommend import SHARE, UNVALIDATED, floor_table, recommend

DIGITS = Path(__file__).parents[3] / "configs" / "digits_dit.yaml"
CASES = [(0.02, 1 / 3), (0.1, 0.5), (0.31, 1 / 3), (0.31, 0.05), (0.7, 0.9)]
TRAINING_SHIFT, LOGIT_NORMAL = "shift of training timesteps", "logit-normal timesteps instead"
WEIGHTS, SAMPLING_SHIFT, GUIDANCE = "stage weights instead", "shift of the sampling grid", "guidance interval"


def numbers(profile, share: float = SHARE) -> dict[str, dict[str, float]]:
    return {one.name: one.numbers for one in recommend(profile, share)}


class TestThePapersNumbers:
    """ImageNet latents: navigation ends and the boundary lies at t = 0.1 (arXiv 2512.02826)."""

    TABLE_2 = {1.0: 22, 0.7: 28, 0.5: 34, 0.1: 72}
    """Per cent of its 50 steps that its s spends up to t = 0.2."""
    FID_2 = {0.7: 12.46, 0.5: 12.23, 0.1: 19.91}
    FID_3 = {(0, 1): 10.79, (0, 0.1): 6.33, (0.1, 0.3): 3.54, (0.1, 0.5): 2.82, (0.1, 0.6): 2.80, (0.1, 0.7): 2.86}

    def test_the_grid_of_table_2_is_ours_with_the_inverse_shift(self):
        even = torch.arange(50, dtype=torch.float64) / 50
        found = {s: round(100 * (shift_time(even, 1 / s) <= 0.2 + 1e-9).double().mean().item()) for s in self.TABLE_2}
        assert found == self.TABLE_2

    def test_sampling_shift_is_the_best_row_of_table_2(self, profile_of):
        shift = numbers(profile_of())[SAMPLING_SHIFT]["shift"]
        assert shift == pytest.approx(2)
        assert 1 / shift == pytest.approx(min(self.FID_2, key=self.FID_2.get))

    def test_guidance_is_the_best_row_of_table_3(self, profile_of):
        interval = numbers(profile_of())[GUIDANCE]
        best = min(self.FID_3, key=self.FID_3.get)
        assert (interval["start"], interval["end"]) == pytest.approx(best)
        (text,) = (one for one in recommend(profile_of()) if one.name == GUIDANCE)
        assert text.value == "[0.1, 0.6]"
        assert "[0.4, 0.9]" in text.rule  # with time the other way round


class TestRules:
    @pytest.mark.parametrize(("b", "share"), CASES)
    def test_the_share_of_draws_is_before_the_boundary(self, profile_of, b, share):
        found = numbers(profile_of(b), share)
        u = (np.arange(200_000) + 0.5) / 200_000
        odds = u / (1 - u) / found[TRAINING_SHIFT]["shift"]  # t / (1 - t) of a shifted uniform draw
        assert np.mean(odds < b / (1 - b)) == pytest.approx(share, abs=1e-4)
        logit = found[LOGIT_NORMAL]["mean"] + found[LOGIT_NORMAL]["std"] * scipy.stats.norm.ppf(u)
        assert np.mean(logit < np.log(b / (1 - b))) == pytest.approx(share, abs=1e-4)

    @pytest.mark.parametrize(("b", "share"), CASES)
    def test_the_samplers_themselves_draw_that_share(self, profile_of, b, share):
        found = numbers(profile_of(b), share)
        for density in (ShiftedTimesteps(**found[TRAINING_SHIFT]), LogitNormalTimesteps(**found[LOGIT_NORMAL])):
            drawn = density.sample(100_000, torch.Generator().manual_seed(0))
            assert (drawn < b).double().mean().item() == pytest.approx(share, abs=0.006)

    @pytest.mark.parametrize(("b", "share"), CASES)
    def test_weights_have_mean_1_and_the_share_before_the_boundary(self, profile_of, b, share):
        weights = numbers(profile_of(b), share)[WEIGHTS]
        t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        w = StageWeighting(b, **weights)(t)
        assert w.mean().item() == pytest.approx(1, abs=1e-6)
        assert (w * (t < b)).mean().item() == pytest.approx(share, abs=1e-3)

    @pytest.mark.parametrize(("b", "share"), [case for case in CASES if 2 * case[0] < case[1]])
    def test_the_share_of_steps_is_before_twice_the_boundary(self, profile_of, b, share):
        even = np.arange(100_000) / 100_000
        shift = numbers(profile_of(b), share)[SAMPLING_SHIFT]["shift"]
        assert np.mean(even / (even + shift * (1 - even)) < 2 * b) == pytest.approx(share, abs=1e-4)

    @pytest.mark.parametrize("b", [0.2, 0.49, 0.5, 0.7])
    def test_never_fewer_early_steps_than_uniform_ones(self, profile_of, b):
        """A third of them before twice the boundary would be fewer."""
        assert numbers(profile_of(b))[SAMPLING_SHIFT]["shift"] == 1
        (found,) = (one for one in recommend(profile_of(b)) if one.name == SAMPLING_SHIFT)
        assert found.rule.startswith("uniform steps: t = 1 comes before" if b >= 0.5 else "33% of the steps before t")

    def test_guidance_needs_labels_and_ends_at_1(self, profile_of):
        assert numbers(profile_of(0.3, 0.2))[GUIDANCE] == {"start": 0.2, "end": 1.0}
        assert GUIDANCE not in numbers(profile_of(label_dropout=1.0))

    @pytest.mark.parametrize("b", [0.0, 1.0])
    def test_none_where_there_is_one_stage(self, profile_of, b):
        assert recommend(profile_of(b)) == []
        (row,) = floor_table(profile_of(b), None)
        assert row["density"] == "uniform t"

    @pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
    def test_a_share_of_none_or_all_is_refused(self, profile_of, share):
        with pytest.raises(ValueError, match="share"):
            recommend(profile_of(), share)

    def test_each_says_its_rule_and_what_was_tried(self, profile_of):
        found = recommend(profile_of())
        assert len(found) == 5
        assert all(one.rule for one in found)
        assert {one.name for one in found if one.status != UNVALIDATED} == {SAMPLING_SHIFT, GUIDANCE}


class TestYaml:
    def test_each_block_is_what_training_reads(self, profile_of, command, tmp_path):
        expected = {
            TRAINING_SHIFT: ("timesteps", "fm_stages.flow.ShiftedTimesteps"),
            LOGIT_NORMAL: ("timesteps", "fm_stages.flow.LogitNormalTimesteps"),
            WEIGHTS: ("weighting", "fm_stages.flow.StageWeighting"),
        }
        found = {one.name: one for one in recommend(profile_of(0.313, 0.2))}
        for name, (section, class_path) in expected.items():
            done = self.parsed(command, tmp_path, found[name].yaml)["model"][section]
            assert done["class_path"] == class_path
            for key, value in found[name].numbers.items():
                assert done["init_args"][key] == pytest.approx(value, rel=1e-3), name
        assert (
            self.parsed(command, tmp_path, found[WEIGHTS].yaml)["model"]["weighting"]["init_args"]["boundary"] == 0.313
        )
        shift = self.parsed(command, tmp_path, found[SAMPLING_SHIFT].yaml)["samples"]["shift"]
        assert shift == pytest.approx(found[SAMPLING_SHIFT].numbers["shift"], rel=1e-3)
        assert found[GUIDANCE].yaml == ""

    @staticmethod
    def parsed(command, folder: Path, text: str) -> dict:
        (folder / "pasted.yaml").write_text(text + "\n")
        done = command("fit", "--config", DIGITS, "--config", "pasted.yaml", "--print_config")
        assert done.status == 0, done.err
        return yaml.safe_load(done.out)


class TestFloors:
    """Under the floor 1 - t averages have closed forms."""

    def test_uniform(self, profile_of):
        row = floor_table(profile_of(0.3), None)[0]
        assert row["density"] == "uniform t"
        assert row["share_navigation"] == pytest.approx(0.3)
        assert row["floor"] == pytest.approx(0.5, abs=1e-4)
        assert row["floor_navigation"] == pytest.approx(0.85, abs=1e-4)
        assert row["floor_sem"] == pytest.approx(0.01)

    def test_suggested_densities_by_numerical_integrals(self, profile_of):
        _, shifted, normal = floor_table(profile_of(0.3), None, 0.4)
        s = 0.4 * 0.7 / (0.6 * 0.3)
        t = (np.arange(400_000) + 0.5) / 400_000
        odds = np.log(t / (1 - t))
        mean = np.log(3 / 7) - scipy.stats.norm.ppf(0.4)
        densities = s / (s * t + 1 - t) ** 2, scipy.stats.norm.pdf(odds - mean) / (t * (1 - t))
        for row, density in zip((shifted, normal), densities, strict=True):
            assert density.mean() == pytest.approx(1, abs=1e-4)
            assert row["share_navigation"] == pytest.approx(0.4)
            assert row["floor"] == pytest.approx((density * (1 - t)).mean(), abs=2e-4)
            early = t < 0.3
            assert row["floor_navigation"] == pytest.approx(
                (density * (1 - t))[early].sum() / density[early].sum(), abs=2e-4
            )

    def test_ones_own_density_comes_first(self, profile_of):
        rows = floor_table(profile_of(0.3), LogitNormalTimesteps(8.0, 0.5))
        assert [row["density"] for row in rows][0] == "logit-normal(8.00, 0.50)"
        assert rows[0]["floor_navigation"] is None
        assert rows[0]["floor"] == pytest.approx(0, abs=0.002)
