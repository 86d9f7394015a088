"""``fm-stages doctor``: what would waste a run, before it starts."""
