"""``fm-stages replay``: a step that the guards of a run found, once more."""
