"""``fm-stages profile``: what a training set says before any network exists."""
