"""``fm-stages evaluate``: numbers of a checkpoint or of images, against real ones."""
