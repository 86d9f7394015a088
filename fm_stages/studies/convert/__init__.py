"""``fm-stages import``: weights of other projects as a checkpoint."""
