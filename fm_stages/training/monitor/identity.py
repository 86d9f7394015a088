"""The identity regular = gap + floor, which fails where the bank is not what the network trains on."""

from __future__ import annotations

import lightning as L

from fm_stages.training.logs.alerts import alert

ALARM = 5.0
"""|z| of the identity's residual that two windows running must exceed to raise the alarm."""


class IdentityAlarm:
    """Warns when regular = gap + floor fails beyond chance in two windows running."""

    def __init__(self) -> None:
        self.alarming = False
        """Whether the last window was beyond chance."""

    def test(self, trainer: L.Trainer, z: float) -> None:
        """Add a window's z."""
        alarming = abs(z) > ALARM
        if alarming and self.alarming:
            alert(
                trainer,
                "The identity regular = gap + floor is broken",
                f"z = {z:.1f}, two windows running. The bank is not the distribution that the network trains on "
                "(another augmentation, coupling of noise and data, or labels): do not trust gap and floor.",
            )
        self.alarming = alarming
