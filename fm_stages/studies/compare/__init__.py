"""``fm-stages compare``: ways to train, paired by seed."""
