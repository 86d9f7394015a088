"""Do samples repeat the training set? Called by ``fm-stages evaluate`` and by the hand-over."""
