"""``fm-stages sample``: images of a checkpoint, to files."""
