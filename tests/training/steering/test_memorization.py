"""The onset of memorization is told once, and not because of noise."""

import json
import math

import numpy as np
import pytest

from fm_stages.training.steering.memorization import MemorizationWatch


def feed(watch, held_out, error=0.01, training=None):
    """Told at which validations, counted from 0."""
    training = training if training is not None else 1 - 0.01 * np.arange(len(held_out))
    told = [
        watch.update(100 * i, *row)
        for i, row in enumerate(zip(held_out, [error] * len(held_out), training, strict=True))
    ]
    return [i for i, text in enumerate(told) if text]


FALLS_AND_RISES = [1.0, 0.8, 0.7, 0.6, 0.61, 0.7, 0.75, 0.8, 0.9]


class TestMemorizationWatch:
    def test_told_once_at_the_second_validation_that_lies_above(self):
        assert feed(MemorizationWatch(), FALLS_AND_RISES) == [6]

    def test_the_words_name_both_losses_and_the_weights_to_keep(self):
        watch = MemorizationWatch()
        rows = list(zip(FALLS_AND_RISES, 1 - 0.1 * np.arange(9), strict=True))
        (text,) = filter(None, (watch.update(100 * i, h, 0.01, t) for i, (h, t) in enumerate(rows)))
        assert "from 0.6000 ± 0.0100 at step 300 to 0.7500 ± 0.0100 at step 600" in text
        assert "fell from 0.7000 to 0.4000" in text
        assert "Keep the weights of step 300" in text

    def test_one_validation_alone_is_chance(self):
        assert feed(MemorizationWatch(), [1.0, 0.6, 0.9, 0.61, 0.9, 0.6, 0.9]) == []

    def test_a_rise_within_the_errors_is_chance(self):
        assert feed(MemorizationWatch(), FALLS_AND_RISES, error=0.1) == []

    def test_where_the_training_loss_rises_too_something_else_is_wrong(self):
        assert feed(MemorizationWatch(), FALLS_AND_RISES, training=FALLS_AND_RISES) == []

    def test_after_a_new_minimum_it_is_told_again(self):
        assert feed(MemorizationWatch(), [*FALLS_AND_RISES, 0.5, 0.7, 0.8, 0.9]) == [6, 11]

    def test_a_run_goes_on_from_a_checkpoint(self):
        whole, parts = MemorizationWatch(), MemorizationWatch()
        expected = feed(whole, FALLS_AND_RISES)
        found = []
        for i, held_out in enumerate(FALLS_AND_RISES):
            state = json.loads(json.dumps(parts.state_dict()))  # plain: survives any file
            parts = MemorizationWatch()
            parts.load_state_dict(state)
            found += [i] if parts.update(100 * i, held_out, 0.01, 1 - 0.01 * i) else []
            assert parts.update(100 * i, 0.0, 0.01, 0.0) is None  # a step that was seen
        assert found == expected
        assert parts.state_dict() == whole.state_dict()

    def test_a_foreign_state_is_refused(self):
        with pytest.raises(ValueError, match="it holds \\['loss'\\], not \\['best'"):
            MemorizationWatch().load_state_dict({"loss": 1.0})

    def test_numbers_that_are_none_are_ignored(self):
        watch = MemorizationWatch()
        assert watch.update(0, math.nan, 0.1, 1.0) is None
        assert watch.update(100, 1.0, math.nan, 1.0) is None
        assert watch.state_dict() == MemorizationWatch().state_dict()

    @pytest.mark.parametrize(("num", "share"), [(10, 0.01), (50, 0.02), (200, 0.05)])
    def test_noise_alone_hardly_ever_raises_the_alarm(self, num, share):
        rng = np.random.default_rng(0)
        alarms = [bool(feed(MemorizationWatch(), 1 + 0.01 * rng.standard_normal(num))) for _ in range(500)]
        assert np.mean(alarms) < share

    def test_a_slow_rise_is_found_in_noise(self):
        rng = np.random.default_rng(0)
        rise = np.maximum(0, np.arange(40) - 10) * 0.005  # half a standard error at each validation
        first = [feed(MemorizationWatch(), 1 + rise + 0.01 * rng.standard_normal(40)) for _ in range(200)]
        assert np.mean([bool(f) for f in first]) > 0.98
        assert min(f[0] for f in first if f) > 10
