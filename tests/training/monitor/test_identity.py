"""A broken identity is told once it cannot be chance."""

import pytest

from fm_stages.training.monitor.identity import IdentityAlarm


class TestIdentityAlarm:
    def test_one_bad_window_raises_none_and_two_do(self, make_trainer, recwarn):
        alarm = IdentityAlarm()
        for z in (6.0, 1.0, 6.0):
            alarm.test(make_trainer(), z)
        assert not [w for w in recwarn if "identity" in str(w.message)]
        with pytest.warns(UserWarning, match=r"z = -7\.0, two windows running"):
            alarm.test(make_trainer(), -7.0)
